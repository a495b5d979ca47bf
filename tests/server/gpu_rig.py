"""SGLang's model runner in the test's own process, on a small random model, with any schedule."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lim_sglang.bench.runner import Contender, load_runner, with_backend
from lim_sglang.compat import decode_on_tensor_cores
from lim_sglang.config import layer_roles
from lim_sglang.kernels.verify import ATTENTION_TOLERANCE

NUM_LAYERS = 6
"""Of the small random models."""
CONTEXT = 4096
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 64)


@dataclass(frozen=True)
class Shape:
    """What decides which of FlashInfer's decode kernels run."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int = 64
    dtype: str = "float16"
    kv_cache_dtype: str = "auto"
    """SGLang's option."""
    tensor_cores: bool = True
    """Whether dense decode is left to us; else the user chose CUDA cores."""


SHAPES = {
    "qwen3-8b": Shape(1024, 32, 8, 128, "bfloat16"),
    "smollm2": Shape(576, 9, 3, tensor_cores=False),
    "coder-0.5b": Shape(896, 14, 2),
    "wide-head": Shape(1024, 8, 4, 256, "bfloat16"),
    "fp8-cache": Shape(896, 14, 2, kv_cache_dtype="fp8_e4m3"),
}
"""The heads of real models, in small random ones."""


def build_model(folder: Path, shape: str) -> Path:
    """Write a random Llama whose attention is peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=found.hidden,
        intermediate_size=2 * found.hidden,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=found.heads,
        num_key_value_heads=found.kv_heads,
        head_dim=found.dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        dtype=found.dtype,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0.0, gain / weight.shape[1] ** 0.5)
    model.to(getattr(torch, found.dtype)).save_pretrained(folder)
    return folder


class Rig:
    """One runner; schedules and dense backends take turns on it."""

    def __init__(self, folder: Path, dtype: str = "float16", kv_cache_dtype: str = "auto") -> None:
        self.runner = load_runner(
            str(folder),
            backend="lim",
            dummy=False,
            mem_fraction_static=0.6,  # `max_total_tokens` is what counts
            kv_cache_dtype=kv_cache_dtype,
            batch_sizes=GRAPH_ROWS,
            dtype=dtype,
            context_length=CONTEXT,
            max_total_tokens=80_000,
            max_running_requests=64,
        )
        self.runner.init_attention_backends()
        self.runner.init_cuda_graphs()
        self._contenders: dict[object, Contender] = {}

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head_dim."""
        config = self.runner.model_config
        kv_heads = config.hf_text_config.num_key_value_heads
        return config.num_attention_heads, kv_heads, config.head_dim

    @property
    def tolerance(self) -> float:
        """Of one layer's attention."""
        return ATTENTION_TOLERANCE[self.runner.dtype]

    def use_dense(self, name: str = "flashinfer") -> Any:
        """Let one of SGLang's own backends serve; returns it."""
        if name not in self._contenders:
            with decode_on_tensor_cores(wanted=True):  # as ours, which is compared with it
                with_backend(self.runner, name)
            self._keep(name)
        return self._take(name)

    def use_lim(
        self, budget: int, select_layers: Sequence[int] = (2, 4), ranking: str = "rank"
    ) -> Any:
        """Let LessIsMore serve with these settings; returns its backend."""
        key = (budget, tuple(select_layers), ranking)
        if key not in self._contenders:
            runner = self.runner
            runner.lim_config = replace(
                runner.lim_config,
                budget=budget,
                select_layers=tuple(select_layers),
                ranking=ranking,
            )
            runner.lim_roles = layer_roles(runner.lim_config, len(runner.lim_roles))
            runner.allocate_selection()
            runner.init_attention_backends()
            runner.init_decode_cuda_graph()
            self._keep(key)
        return self._take(key)

    def _keep(self, key: object) -> None:
        runner = self.runner
        self._contenders[key] = Contender(
            str(key), runner.attn_backend, runner.decode_cuda_graph_runner
        )

    def _take(self, key: object) -> Any:
        contender = self._contenders[key]
        contender.take_over(self.runner)
        return contender.attn_backend

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Prefill and decode with whoever serves: tokens [B, n], logits [B, n, V] of decode."""
        from sglang.benchmark.one_batch import decode, extend

        self.clear()
        next_ids, _, batch = extend(_requests(prompts), self.runner)
        tokens, logits = [next_ids], []
        for _ in range(num_tokens - 1):
            next_ids, step_logits = decode(next_ids, batch, self.runner)
            torch.cuda.synchronize()  # as a scheduler does that reads what was drawn
            tokens.append(next_ids)
            logits.append(step_logits.float().clone())
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def teacher_forced(
        self, prompts: Sequence[Sequence[int]], forced: Sequence[Sequence[int]]
    ) -> Tensor:
        """Prefill, then decode while the given tokens are fed: logits [B, n - 1, V] of decode."""
        from sglang.benchmark.one_batch import decode, extend

        self.clear()
        fed = torch.tensor(forced, device="cuda")  # [B, n]
        _, _, batch = extend(_requests(prompts), self.runner)
        logits = []
        for step in range(fed.shape[1] - 1):
            _, step_logits = decode(fed[:, step], batch, self.runner)
            torch.cuda.synchronize()
            logits.append(step_logits.clone())
        return torch.stack(logits, 1)

    def clear(self) -> None:
        """Forget all requests."""
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()


def _requests(prompts: Sequence[Sequence[int]]) -> list[Any]:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    requests = []
    for rid, prompt in enumerate(prompts):
        request = Req(
            rid=str(rid),
            origin_input_text="",
            origin_input_ids=array("q", prompt),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=512),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.set_extend_range(len(request.prefix_indices), len(request.origin_input_ids))
        requests.append(request)
    return requests
