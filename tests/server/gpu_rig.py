"""SGLang's model runner in the test's own process, on a small random model, with any layer roles.

`Rig` has the runner. A `Step` is one decode step of a SELECT and a REUSE layer, run eagerly or as a
CUDA graph: slots are shuffled over the KV pool, lengths are ragged, q, k and v are random, so that
the results are known from the definition alone.
"""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench.model_runner import (
    Contender,
    build_dense_backend,
    load_runner,
    policy_state,
    summarize_rows,
    use_policy,
)
from lim_sglang.config import LimConfig
from lim_sglang.gates.files import write_gates
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.page_selector import GateSelector, PageSelector
from lim_sglang.kernels.reference import attend_lists, score_tokens
from lim_sglang.kernels.reference_rivals import (
    BlockGate,
    page_bounds,
    share_scores,
    summarize_pages,
)
from lim_sglang.kernels.selector import MassSelector, ScoreSelector
from lim_sglang.kernels.verify import MASS_TOLERANCE, SCORE_TOLERANCE, relative_error
from lim_sglang.kernels.verify_attention import ATTENTION_TOLERANCE
from lim_sglang.kernels.verify_pages import row_logits
from lim_sglang.policies import POLICIES
from lim_sglang.policies.policy import Role, SelectingPolicy

NUM_LAYERS = 6
"""Layers of the small random models."""
CONTEXT = 4096
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 128)
GATE_ROUNDING = 1e-3
"""Largest relative error of logits whose compressed keys are rounded by another function."""
PAGE_SIZE = 64
"""SGLang's, for the policies that need blocks in consecutive slots; a `Step` scatters tokens."""


@dataclass(frozen=True)
class Shape:
    """Heads and dtypes: they decide which of FlashInfer's decode kernels run."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int = 64
    dtype: str = "float16"
    kv_cache_dtype: str = "auto"
    """Value of SGLang's option."""
    tensor_cores: bool = True
    """True if dense decode is left to us; False if the user chose CUDA cores."""


SHAPES = {
    "qwen3-8b": Shape(1024, 32, 8, 128, "bfloat16"),
    "smollm2": Shape(576, 9, 3, tensor_cores=False),
    "coder-0.5b": Shape(896, 14, 2),
    "group-of-one": Shape(1024, 8, 8, 128, "bfloat16"),
    "group-of-six": Shape(1536, 12, 2, 128, "bfloat16"),
    "group-of-eight": Shape(1024, 16, 2, 128, "bfloat16"),
    "wide-head": Shape(1024, 8, 4, 256, "bfloat16"),
    "fp8-cache": Shape(896, 14, 2, kv_cache_dtype="fp8_e4m3"),
}
"""Heads of real models, in small random ones."""


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


def write_random_gates(
    folder: Path, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Write a gate for each layer of a small random model."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / dim**0.5).to(dtype)

    def gate() -> BlockGate:
        query_weight = random(kv_heads, heads // kv_heads, dim, dim)
        return BlockGate(query_weight, random(kv_heads, 3 * dim, dim), random(dim), random(dim))

    write_gates(folder, [gate() for _ in range(NUM_LAYERS)], {"base_model": "random"})


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
            max_running_requests=GRAPH_ROWS[-1],
            page_size=PAGE_SIZE,
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
        """Relative error that one layer's attention may have."""
        return ATTENTION_TOLERANCE[self.runner.dtype]

    def use_dense(self, name: str = "flashinfer") -> Any:
        """Let one of SGLang's own backends serve; return it."""
        if name not in self._contenders:
            with compat.decode_on_tensor_cores(wanted=True):  # as ours, which is compared with it
                build_dense_backend(self.runner, name)
            self._keep(name)
        return self._take(name)

    def use_lim(self, budget: int, **settings: Any) -> Any:
        """Let our backend serve with these settings; return it."""
        if issubclass(POLICIES[settings.get("policy", "lessismore")], SelectingPolicy):
            settings = {"select_layers": (2, 4), **settings}
        if settings.get("policy") == "seer":
            settings = {"gate": self._gate(), **settings}
        config = LimConfig.from_mapping({"budget": budget, **settings})
        key = config.to_json()
        if key not in self._contenders:
            use_policy(self.runner, config)
            self._keep(key)
        return self._take(key)

    def _gate(self) -> str:
        """Return the folder of random gates for the model, written at the first call."""
        folder = Path(self.runner.model_config.model_path) / "gate"
        if not folder.exists():
            write_random_gates(folder, *self.heads, self.runner.dtype)
        return str(folder)

    def _keep(self, key: object) -> None:
        runner = self.runner
        self._contenders[key] = Contender(
            str(key), runner.attn_backend, runner.decode_cuda_graph_runner, policy_state(runner)
        )

    def summarize(self, step: "Step") -> None:
        """Summarize the blocks of a step's rows, where the live backend has summaries."""
        live = Contender("live", self.runner.attn_backend, None, policy_state(self.runner))
        summarize_rows(self.runner, live, step.slots)

    def _take(self, key: object) -> Any:
        contender = self._contenders[key]
        contender.take_over(self.runner)
        return contender.attn_backend

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
        """Prefill and decode with the live backend: tokens [B, n]."""
        from sglang.benchmark.one_batch import decode, extend

        self.clear()
        next_ids, _, batch = extend(_requests(prompts), self.runner)
        tokens = [next_ids]
        for _ in range(num_tokens - 1):
            next_ids, _ = decode(next_ids, batch, self.runner)
            torch.cuda.synchronize()  # as a scheduler does that reads the sampled tokens
            tokens.append(next_ids)
        return torch.stack(tokens, 1)

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


SELECT, REUSE = 2, 3
"""Layers of the rig that a `Step` runs."""


@dataclass(frozen=True)
class Step:
    """Inputs of a step: B rows, some of them padding of a graph's batch."""

    forward_batch: Any
    slots: list[Tensor]
    query: tuple[Tensor, Tensor]
    """[B, H * D] of the SELECT and of the REUSE layer."""
    new_kv: tuple[Tensor, Tensor]
    """[B, G * D] each."""


@dataclass(frozen=True)
class Outcome:
    """Copies of a step's results."""

    outputs: tuple[Tensor, Tensor]
    kept: list[Tensor]
    """The kept slots of each row."""
    scores: list[Tensor] | None
    """Of each row; None where lengths alone decide, as for `deciding_scores`."""
    deciding_scores: list[Tensor] | None
    """The scores, the mass of each token or page as of one head, or the bounds of pages."""


def fill_cache(rig: Rig, seed: int = 0) -> None:
    """Fill K and V of both layers with random values."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pool = rig.runner.token_to_kv_pool
    for layer in (SELECT, REUSE):
        for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer)):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, device="cuda"))


def make_step(rig: Rig, lengths: Sequence[int], *, padding: int = 0, seed: int = 0) -> Step:
    """Make rows of these lengths in shuffled slots, then rows as SGLang pads a graph's batch."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads, kv_heads, dim = rig.heads
    table = rig.runner.req_to_token_pool.req_to_token
    # Single tokens in any slots, unless summaries need whole blocks; slot 0 is SGLang's reserve.
    selector = getattr(rig.runner.attn_backend, "selector", None)
    block = selector.page if isinstance(selector, PageSelector) else 1
    order = 1 + torch.randperm(72_000 // block - 1, generator=generator, device="cuda").int()
    slots, first = [], 0
    for row, length in enumerate(lengths, start=1):
        blocks = order[first : first + -(-length // block)]
        members = blocks[:, None] * block + torch.arange(block, device="cuda").int()
        slots.append(members.flatten()[:length])
        table[row, :length] = slots[-1]
        first += len(blocks)
    all_lengths = [*lengths, *[1] * padding]
    rows = len(all_lengths)

    def randn(width: int) -> Tensor:
        values = torch.randn(rows, width, generator=generator, device="cuda")
        return values.to(rig.runner.dtype)

    lens = torch.tensor(all_lengths, dtype=torch.int64)
    new_slots = [int(row[-1]) for row in slots] + [0] * padding
    batch = SimpleNamespace(
        batch_size=rows,
        forward_mode=compat.ForwardMode.DECODE,
        req_pool_indices=torch.tensor(
            [*range(1, len(lengths) + 1), *[0] * padding], dtype=torch.int64, device="cuda"
        ),
        seq_lens=lens.cuda(),
        seq_lens_cpu=lens,
        seq_lens_sum=sum(all_lengths),
        out_cache_loc=torch.tensor(new_slots, dtype=torch.int64, device="cuda"),
        positions=lens.cuda() - 1,
        encoder_lens=None,
        spec_info=None,
    )
    slots += [torch.zeros(1, dtype=torch.int32, device="cuda")] * padding
    query = (randn(heads * dim), randn(heads * dim))
    return Step(batch, slots, query, (randn(kv_heads * dim), randn(kv_heads * dim)))


def layers_of(rig: Rig) -> tuple[Any, Any]:
    """Return the attention layers that a step runs."""
    layers = list(compat.attention_layers(rig.runner.model))
    return layers[SELECT], layers[REUSE]


def run_layers(rig: Rig, backend: Any, step: Step) -> tuple[Tensor, Tensor]:
    """Run both layers on the current plan."""
    outputs = [
        backend.forward_decode(query, *step.new_kv, layer, step.forward_batch)
        for query, layer in zip(step.query, layers_of(rig), strict=True)
    ]
    return outputs[0], outputs[1]


def run_eager(rig: Rig, backend: Any, step: Step) -> Outcome:
    """Plan and run layer by layer."""
    poison(backend)
    backend.init_forward_metadata(step.forward_batch)
    return outcome(backend, step, run_layers(rig, backend, step))


def poison(backend: Any) -> None:
    """Overwrite the results of an earlier step, so that none passes for this step's."""
    if isinstance(backend.selector, ScoreSelector):
        backend.selector.scores.values.fill_(torch.nan)
    if backend.selector.deciding_scores is not None:
        backend.selector.deciding_scores.values.fill_(torch.nan)
    backend.sparse_decode.kept_slots.zero_()


def outcome(backend: Any, step: Step, outputs: tuple[Tensor, Tensor]) -> Outcome:
    """Copy a step's results."""
    ends = backend.sparse_decode.kept_indptr.tolist()
    kept = backend.sparse_decode.kept_slots.clone()
    selector = backend.selector
    row_ends = [0, *itertools.accumulate(step.forward_batch.seq_lens_cpu.tolist())]

    def rows(scores: PackedRows | None) -> list[Tensor] | None:
        return scores and [row.clone() for row in scores.rows(row_ends)]

    return Outcome(
        (outputs[0].clone(), outputs[1].clone()),
        [kept[..., first:last] for first, last in itertools.pairwise(ends)],
        rows(selector.scores) if isinstance(selector, ScoreSelector) else None,
        rows(selector.deciding_scores),
    )


class Graph:
    """Both layers captured for one batch size, replayed for other steps of that size."""

    def __init__(self, rig: Rig, backend: Any, step: Step) -> None:
        self._backend = backend
        self._static = step
        backend.init_forward_metadata_out_graph(step.forward_batch, in_capture=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run_layers(rig, backend, step)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = run_layers(rig, backend, step)

    def plan(self, step: Step) -> None:
        """Plan a replay, as SGLang does, with the inputs of another step."""
        for mine, theirs in zip(self._inputs(self._static), self._inputs(step), strict=True):
            mine.copy_(theirs)
        self._backend.init_forward_metadata_out_graph(step.forward_batch)

    def replay(self) -> None:
        """Run the current plan."""
        self._graph.replay()

    def run(self, step: Step) -> Outcome:
        """Plan, replay, and copy the results."""
        poison(self._backend)
        self.plan(step)
        self.replay()
        return self.outcome(step)

    def outcome(self, step: Step) -> Outcome:
        """Copy the results of the last replay."""
        return outcome(self._backend, step, self._outputs)

    @staticmethod
    def _inputs(step: Step) -> list[Tensor]:
        batch = step.forward_batch
        inputs = [batch.out_cache_loc, batch.req_pool_indices, batch.seq_lens]
        return [*step.query, *step.new_kv, *inputs]


def wrong_rows(rig: Rig, backend: Any, step: Step, found: Outcome) -> list[str]:
    """List the rows with a result that differs from the definition's for the step's q, k and v."""
    heads, _, dim = rig.heads
    pool = rig.runner.token_to_kv_pool
    keys = [pool.get_key_buffer(layer) for layer in (SELECT, REUSE)]
    values = [pool.get_value_buffer(layer) for layer in (SELECT, REUSE)]
    selector, wrong = backend.selector, []
    chooser = int(backend.roles[REUSE] is Role.PICK)  # index of the layer that scores tokens

    for row, slots in enumerate(step.slots):
        name = f"row {row} of {len(slots)} tokens"
        query = [q[row].view(heads, dim).float() for q in step.query]
        if len(slots) > selector.budget and found.scores is not None:
            scores = found.scores[row][:, : len(slots)]
            expected = score_tokens(query[chooser], keys[chooser][slots.long()].float())
            error = relative_error(scores, expected)
            if not error <= SCORE_TOLERANCE:
                wrong.append(f"{name}: scores are off by {error:.1e}")
            if isinstance(selector, MassSelector):
                mass = selector.masses(scores, layers_of(rig)[chooser].scaling)
                error = relative_error(found.deciding_scores[row][0, : len(mass)], mass)
                if not error <= 10 * MASS_TOLERANCE:  # the normalisers are FlashInfer's
                    wrong.append(f"{name}: masses are off by {error:.1e}")
        if isinstance(selector, PageSelector) and len(slots) > selector.budget:
            row_keys, scores = keys[1][slots.long()], found.deciding_scores[row]
            wrong += _wrong_page_scores(selector, scores, query[1], row_keys, name)
        deciding_scores = None if found.deciding_scores is None else found.deciding_scores[row]
        kept = slots[selector.keep(deciding_scores, len(slots))]
        if not torch.equal(found.kept[row], kept):
            wrong.append(f"{name} keeps other slots")
        for n, read in enumerate((slots, kept)):
            scale = layers_of(rig)[n].scaling
            lists = torch.atleast_2d(read.long())
            expected = attend_lists(query[n], keys[n], values[n], lists, scale)
            error = relative_error(found.outputs[n][row].view(heads, dim), expected)
            if not error <= rig.tolerance:
                wrong.append(f"{name}: layer {(SELECT, REUSE)[n]} is off by {error:.1e}")
    return wrong


def _wrong_page_scores(
    selector: PageSelector, found: Tensor, query: Tensor, keys: Tensor, name: str
) -> list[str]:
    """Compare the bounds of a row's pages, or the logits of its blocks, with those of its keys."""
    if isinstance(selector, GateSelector):
        compressed = selector.summarized(REUSE, keys).to(keys.dtype)
        expected = row_logits(selector.gates, REUSE, query, compressed, len(keys))
    else:
        sharing = {len(query): "query_head", keys.shape[1]: "kv_head", 1: "all"}
        bounds = page_bounds(query, *summarize_pages(keys, selector.page))
        expected = share_scores(bounds, sharing[len(found)], keys.shape[1])
    competing = -(-len(keys) // selector.page) - 1
    error = relative_error(found[:, :competing], expected[:, :competing])
    # Two roundings of a compressed key to the cache's dtype may fall apart.
    tolerance = GATE_ROUNDING if isinstance(selector, GateSelector) else SCORE_TOLERANCE
    return [] if error <= tolerance else [f"{name}: scores of pages are off by {error:.1e}"]
