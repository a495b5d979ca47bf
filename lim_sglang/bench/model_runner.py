"""SGLang's model runner in this process: backends that take turns on one set of weights and one KV
cache, each with CUDA graphs of its own, and batches whose random context is in the cache."""

import importlib
import io
import logging
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.audit import LayerObserver
from lim_sglang.bench.ranks import ALONE, Rank
from lim_sglang.bench.workloads import (
    DENSE_BACKENDS,
    WITH_LAYERS,
    CacheDtype,
    ModelChoice,
    Point,
    options_of_policies,
)
from lim_sglang.config import (
    BACKEND,
    CONFIG_VAR,
    LimConfig,
    resolve_settings,
    with_preset,
)
from lim_sglang.errors import ConfigError, LimError, RefusedError, ServerError
from lim_sglang.launch.server import free_port
from lim_sglang.models import visible_gpus
from lim_sglang.plugin import register
from lim_sglang.policies.policy import SparsePolicy, sparse_policy
from lim_sglang.validation import (
    FP8_DTYPES,
    model_shape,
    reasons_against,
    reasons_against_kv_cache,
    reasons_against_model,
    reasons_against_ranks,
)

FILL_ROWS = 1 << 16  # slots of one layer that get random K or V at a time
PREFILL_TOKENS = 2048  # of one request at a time


def show_log(*, verbose: bool) -> None:
    """Log to stderr: with `verbose` all that SGLang and its libraries say, else errors, our own
    warnings and those of SGLang about the model that it loads. To be called before SGLang is
    imported."""
    handler = logging.StreamHandler()
    if not verbose:
        handler.addFilter(_is_of_use)
        logging.getLogger("torch").setLevel(logging.ERROR)  # has a handler of its own
        warnings.simplefilter("ignore")
        # Has a handler of its own, too, and sets its level while it is imported.
        importlib.import_module("transformers.utils.logging").set_verbosity_error()
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def _is_of_use(record: logging.LogRecord) -> bool:
    """Return True for what a user sees without `--verbose`."""
    is_ours = record.name.startswith("lim_sglang")
    return record.levelno >= logging.ERROR or is_ours or compat.tells_of_model(record.name)


def _is_verbose() -> bool:
    """Return True if `show_log` shows all."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def log_as_here() -> Callable[[], None]:
    """Return a function for a new process, which gives it the log of this one."""
    return partial(show_log, verbose=_is_verbose())


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep what SGLang draws on `sys.stderr` from the user, and show it if the block fails; the
    log's handlers have the stream from before."""
    if _is_verbose():
        yield
        return
    drawn = io.StringIO()
    try:
        with redirect_stderr(drawn):
            yield
    except Exception:
        sys.stderr.write(drawn.getvalue())
        raise


def settings_for(budget: int) -> LimConfig:
    """Set LessIsMore's budget in the environment, where SGLang's processes read the settings."""
    config = resolve_settings(os.environ.get(CONFIG_VAR), None, {"budget": budget})
    os.environ[CONFIG_VAR] = config.to_json()
    return config


def load_runner(
    folder: str,
    *,
    backend: str,
    dummy: bool,
    mem_fraction_static: float,
    batch_sizes: Sequence[int] | None = None,
    rank: Rank = ALONE,
    **options: Any,
) -> Any:
    """Load a model and size its KV cache, exactly as a server with this backend does.

    Args:
        folder: a model folder; with `dummy`, its configuration is enough.
        batch_sizes: batch sizes of the decode graphs; None for SGLang's own choice.
        rank: of this process; all ranks call this together.
        options: further fields of SGLang's `ServerArgs`.
    """
    # First, since SGLang reads while it is imported whether it serves on a CPU.
    if not compat.loads_backend(BACKEND):  # a checkout that is not installed has no entry point
        register()
    from lim_sglang.model_runner import LimModelRunner

    server_args = compat.ServerArgs(
        model_path=folder,
        load_format="dummy" if dummy else "auto",
        skip_tokenizer_init=True,
        attention_backend=backend,
        mem_fraction_static=mem_fraction_static,
        tp_size=rank.size,
        cuda_graph_bs_decode=list(batch_sizes) if batch_sizes else None,
        # Prefill is not measured, and capturing its graphs takes minutes.
        disable_prefill_cuda_graph=True,
        disable_flashinfer_autotune=True,
        random_seed=0,
        log_level="warning",
        **options,
    )
    runner_class = LimModelRunner if backend == BACKEND else compat.ModelRunner
    with _without_bars():
        port = rank.port or free_port()
        runner = compat.load_runner(runner_class, server_args, port, rank.number)
    if dummy:
        reset_dummy_scales(compat.attention_layers(runner.model))
    runner.alloc_memory_pool()
    return runner


def reset_dummy_scales(layers: Iterable[Any]) -> None:
    """Set the scales of K and V of a quantized model to 1. SGLang's dummy loader sets them from
    -0.001 to 0.001 and uses the positive ones: attention would be lost in rounding."""
    for layer in layers:
        if layer.k_scale is not None:
            layer.k_scale.fill_(1.0)
            layer.v_scale.fill_(1.0)
            layer.k_scale_float = layer.v_scale_float = 1.0


def options_on_this_machine(policies: Mapping[str, LimConfig], max_rows: int) -> dict[str, Any]:
    """Return SGLang's options that all of these policies can have: on the GPU, or in f32 on the CPU
    of a machine without one.

    Args:
        max_rows: requests at a time.
    """
    options = options_of_policies(policies, max_rows)
    if not torch.cuda.is_available():
        options |= {"device": "cpu", "dtype": "float32", "page_size": 1}
    return options


def check_formats(runner: Any, model: ModelChoice) -> None:
    """Refuse a runner whose KV cache or weights have another format than the chosen one."""
    cache, weights = model.kv_cache_dtype, model.quantization
    dtypes = sorted({str(weight.dtype) for weight in runner.model.parameters()})
    # torch calls fp8_e4m3 float8_e4m3fn.
    if cache != "auto" and cache.replace("fp8", "float8") not in str(runner.kv_cache_dtype):
        raise ServerError(f"--kv-cache-dtype {cache} gave a KV cache of {runner.kv_cache_dtype}")
    if weights != "none" and "float8" not in " ".join(dtypes):
        raise ServerError(f"--quantization {weights} left weights of {', '.join(dtypes)}")


def model_facts(runner: Any) -> dict[str, Any]:
    """Return the properties of model and memory that a time depends on."""
    layer, pool = next(compat.attention_layers(runner.model)), runner.token_to_kv_pool
    weights = dict(runner.model.named_parameters())
    by_dtype: Counter[str] = Counter()
    for weight in weights.values():
        by_dtype[str(weight.dtype)] += weight.nbytes
    return {
        # By SGLang's name, chosen by the user or found in the checkpoint.
        "quantization": runner.model_config.quantization or "none",
        "weight_bytes_by_dtype": dict(by_dtype),
        "weight_bytes_read": weight_bytes_read(weights),
        "kv_bytes_per_token_and_layer": pool.k_buffer[0][0].nbytes + pool.v_buffer[0][0].nbytes,
        "roles": [role.value for role in runner.lim_roles],
        "heads": layer.tp_q_head_num,
        "kv_heads": layer.tp_k_head_num,
        "head_dim": layer.head_dim,
        "dtype": str(runner.dtype),
        "kv_dtype": str(runner.kv_cache_dtype),
        "page_size": runner.page_size,
        "context_length": runner.model_config.context_len,
        "kv_capacity": runner.max_total_num_tokens,
    }


def weight_bytes_read(weights: Mapping[str, Tensor]) -> int:
    """Return the bytes of the weights that a decode step reads: without the embedding, of which a
    step reads one row per request, unless the model has no other output matrix."""
    tied = not any(name.endswith("lm_head.weight") for name in weights)
    read = [name for name in weights if tied or not name.endswith("embed_tokens.weight")]
    return sum(weights[name].nbytes for name in read)


@dataclass(frozen=True)
class Contender:
    """An attention backend with its captured decode graphs."""

    name: str
    """Name of a dense backend, `lim`, or the name of a policy that is compared with `lim`."""
    attn_backend: Any
    graph_runner: Any
    state: Mapping[str, Any] = field(default_factory=dict)
    """The runner's attributes that belong to a policy; a dense backend has none."""

    @property
    def is_ours(self) -> bool:
        """True for our backend, whatever its policy."""
        return self.name not in DENSE_BACKENDS

    def take_over(self, runner: Any) -> None:
        """Let this backend serve the runner's next steps."""
        runner.attn_backend = self.attn_backend
        runner.decode_cuda_graph_runner = self.graph_runner
        vars(runner).update(self.state)


POLICY_STATE = (
    *("lim_config", "lim_roles", "lim_policy"),
    *("lim_selector", "lim_kept_slots", "lim_summaries", "lim_cos_sin"),
)
"""Attributes of `LimModelRunner` that change with the policy."""


def policy_state(runner: Any) -> dict[str, Any]:
    """Return the runner's attributes that belong to its policy."""
    return {name: getattr(runner, name) for name in POLICY_STATE if hasattr(runner, name)}


def check_policies(
    folder: str, policies: Mapping[str, LimConfig], kv_cache_dtype: CacheDtype
) -> None:
    """Refuse policies that cannot serve a model, before the model is loaded.

    Raises:
        RefusedError: with the reasons against each policy by its name.
    """
    if (text_config := _text_config(folder)) is None:
        return
    reasons = []
    for name, config in policies.items():
        found = reasons_against_model(text_config, config)
        if cache := FP8_DTYPES.get(kv_cache_dtype):
            found += reasons_against_cache(getattr(torch, cache), torch.bfloat16, config)
        reasons += [f"{name}: {reason}" for reason in found]
    if reasons:
        raise RefusedError(reasons)


def check_ranks(folder: str, num_ranks: int, policies: Mapping[str, LimConfig]) -> None:
    """Refuse more ranks than GPUs, and ranks that cannot share the heads of a model equally.

    Raises:
        ConfigError: there are fewer GPUs.
        RefusedError: with the reasons against the ranks, each once.
    """
    if num_ranks > (num_gpus := len(visible_gpus())):
        raise ConfigError(
            f"--tp {num_ranks} needs as many GPUs, found {num_gpus}: use --tp {num_gpus} or less"
        )
    reasons = reasons_against(SimpleNamespace(tp_size=num_ranks), on_cpu=False)
    if text_config := _text_config(folder):
        for config in policies.values():
            reasons += reasons_against_ranks(num_ranks, text_config, config, on_cpu=False)
    if reasons:  # by the name of our option
        raise RefusedError(
            [each.replace("--tp-size", "--tp", 1) for each in dict.fromkeys(reasons)]
        )


def _text_config(folder: str) -> Any | None:
    """Return the Hugging Face text configuration of a model; None where it cannot be read: SGLang
    says what is wrong with the model, or knows the model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError):
        return None


def reasons_against_cache(dtype: torch.dtype, queries: torch.dtype, config: LimConfig) -> list[str]:
    """List what keeps a policy from reading a KV cache of this dtype on this GPU."""
    policy = config.make_policy()
    assert isinstance(policy, SparsePolicy)
    return reasons_against_kv_cache(dtype, queries, torch.cuda.get_device_capability(), policy)


def use_policy(runner: Any, config: LimConfig) -> None:
    """Let a runner that serves with our backend serve another policy: its memory, its backend and
    its decode graphs are made beside those of the policies before.

    Raises:
        RefusedError: the policy cannot read the runner's KV cache.
    """
    config = with_preset(config, model_shape(runner.model_config.hf_text_config))
    policy = config.make_policy()
    roles = policy.roles(len(runner.lim_roles))
    sparse = sparse_policy(policy, roles)
    runner.lim_config, runner.lim_roles, runner.lim_policy = config, roles, sparse
    runner.lim_selector, runner.lim_kept_slots, runner.lim_summaries = None, None, {}
    runner.lim_cos_sin = runner.rope_table(sparse)
    if sparse and not compat.serves_on_cpu():  # where the definitions select
        # `--kv-cache-dtype auto` may have found fp8 in the checkpoint.
        if reasons := reasons_against_cache(runner.kv_cache_dtype, runner.dtype, config):
            raise RefusedError(reasons)
        runner.allocate_selection(sparse, runner.max_total_num_tokens)
        runner.allocate_summaries(sparse)
    runner.init_attention_backends()
    runner.init_decode_cuda_graph()


def summarize_rows(runner: Any, contender: Contender, rows: Iterable[Tensor]) -> None:
    """Summarize the complete blocks of requests, where the contender's policy has summaries.

    Args:
        rows: slots of each request's tokens, [S], oldest first.
    """
    state = contender.state
    for layer, summaries in state.get("lim_summaries", {}).items():
        keys = runner.token_to_kv_pool.get_key_buffer(layer)
        for slots in rows:
            lengths = torch.arange(1, len(slots) + 1, device=keys.device)
            state["lim_selector"].summarize(layer, keys, lengths, slots.long(), summaries)


def check_backends(names: Sequence[str]) -> None:
    """Refuse backends that this GPU cannot run, before a model is loaded."""
    found = [(name, compat.missing_backend(name.removesuffix(WITH_LAYERS))) for name in names]
    if layers := [name for name in names if name.endswith(WITH_LAYERS)]:
        runner = importlib.import_module("lim_sglang.model_runner")  # imports SGLang
        if not runner.uses_layer_kernels():
            found.append((layers[0], "our kernels of layers serve on Hopper alone"))
    if reasons := [f"--backends {name}: {reason}" for name, reason in found if reason]:
        raise LimError("; ".join(reasons))


def make_contender(runner: Any, name: str, config: LimConfig | None = None) -> Contender:
    """Build a backend on the runner and capture its decode graphs; ours has to be the first.

    Args:
        config: of another policy than the runner was loaded with, whose name is `name`.
    """
    is_ours = name == BACKEND or config is not None
    with countable_graphs():
        if config:
            use_policy(runner, config)
        elif name == BACKEND:
            runner.init_attention_backends()
            runner.init_cuda_graphs()
        else:
            build_dense_backend(runner, name)
    live, expected = runner.attn_backend, BACKEND if is_ours else name.removesuffix(WITH_LAYERS)
    # SGLang records the backend that it chose for the name; ours alone has roles.
    if live.decode_attention_backend_str != expected or hasattr(live, "roles") != is_ours:
        raise ServerError(f"SGLang built {type(live).__name__} for the backend {name}")
    if runner.decode_cuda_graph_runner is None and not compat.serves_on_cpu():
        raise ServerError(f"SGLang captured no decode graph for the backend {name}")
    state = policy_state(runner) if is_ours else {}
    return Contender(name, live, runner.decode_cuda_graph_runner, state)


def build_dense_backend(runner: Any, name: str) -> None:
    """Let SGLang build one of its own backends on a runner that was started with ours."""
    others = dict.fromkeys(("prefill_attention_backend", "decode_attention_backend"))
    # SGLang records the origin of a changed option.
    override = partial(runner.server_args.override, "lim bench", **others)
    override(attention_backend=name.removesuffix(WITH_LAYERS))
    try:
        # Bypasses LimModelRunner's check that the live backend is ours: here it must not be.
        compat.ModelRunner.init_attention_backends(runner)
        with nullcontext() if name.endswith(WITH_LAYERS) else runner.sglang_layers():
            runner.init_decode_cuda_graph()
    finally:
        override(attention_backend=BACKEND)


@contextmanager
def countable_graphs() -> Iterator[None]:
    """Let SGLang capture CUDA graphs that keep their list of nodes, until the block ends."""
    module: Any = torch.cuda
    original = module.CUDAGraph
    module.CUDAGraph = partial(original, keep_graph=True)
    try:
        yield
    finally:
        module.CUDAGraph = original


def count_kernels(contender: Contender) -> int:
    """Return the number of kernels in the CUDA graph that the contender's last step replayed."""
    graphs, key = contender.graph_runner.backend, contender.graph_runner._replay_graph_key
    driver = importlib.import_module("cuda.bindings.driver")
    graph = driver.CUgraph(init_value=graphs._graphs[key].raw_cuda_graph())
    _, _, num_nodes = driver.cuGraphGetNodes(graph)
    _, nodes, _ = driver.cuGraphGetNodes(graph, num_nodes)
    kinds = [driver.cuGraphNodeGetType(node)[1] for node in nodes[:num_nodes]]
    return kinds.count(driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL)


@dataclass(frozen=True)
class FilledBatch:
    """Requests in the middle of decoding."""

    point: Point
    slots: tuple[Tensor, ...]  # of each request's tokens: [S] int64, oldest first
    forward_batch: Any


def fill_cache(pool: Any, seed: int) -> None:
    """Write normally distributed K and V into every slot and layer."""
    generator = torch.Generator(pool.k_buffer[0].device).manual_seed(seed)
    for buffer in [*pool.k_buffer, *pool.v_buffer]:
        for piece in buffer.split(FILL_ROWS):
            values = torch.randn(
                piece.shape, generator=generator, device=piece.device, dtype=torch.bfloat16
            )
            piece.copy_(values.to(pool.dtype).view(pool.store_dtype))


def check_room(runner: Any, points: Sequence[Point]) -> None:
    """Refuse points that the KV cache or the model's context cannot hold, all at once."""
    slots, context = runner.max_total_num_tokens, runner.model_config.context_len
    if large := [p for p in points if p.num_tokens > slots or p.longest > context]:
        raise LimError(
            f"no room for {', '.join(map(str, large))}: the KV cache has {slots:,} slots, the "
            f"model a context of {context:,} tokens"
        )


@contextmanager
def filled_batch(runner: Any, point: Point, seed: int) -> Iterator[FilledBatch]:
    """Give a batch pages of slots in random order, until the block ends. Each step writes K and V
    of a request's newest token again and the length stays, so that all steps do the same work."""
    device, page = runner.device, runner.page_size
    generator = torch.Generator(device).manual_seed(seed)
    allocator, pool = runner.token_to_kv_pool_allocator, runner.req_to_token_pool
    num_pages = [-(-length // page) for length in point.lengths]
    free = allocator.alloc(sum(num_pages) * page)
    if free is None or len(pool.free_slots) < point.batch:
        raise LimError(f"the runner has no room for {point}")
    order = torch.randperm(sum(num_pages), generator=generator, device=device)
    pages = free.view(-1, page)[order].split(num_pages)
    slots = [mine.flatten()[:length] for mine, length in zip(pages, point.lengths, strict=True)]
    requests = pool.free_slots[: point.batch]
    for request, mine in zip(requests, slots, strict=True):
        pool.req_to_token[request, : len(mine)] = mine.to(torch.int32)
    forward_batch = decode_batch(
        runner,
        torch.tensor(requests, dtype=torch.int64, device=device),
        lengths=point.lengths,
        input_ids=torch.randint(
            runner.model_config.vocab_size, (point.batch,), generator=generator, device=device
        ),
        new_slots=torch.stack([mine[-1] for mine in slots]),
    )
    try:
        yield FilledBatch(point, tuple(slots), forward_batch)
    finally:
        allocator.clear()


def decode_batch(
    runner: Any, requests: Tensor, *, lengths: Sequence[int], input_ids: Tensor, new_slots: Tensor
) -> Any:
    """Return SGLang's batch of a decode step.

    Args:
        requests: [B] int64, rows of `req_to_token`, which name the slots of all tokens.
        lengths: tokens of each request, the newest included.
        input_ids: [B] int64, the newest tokens.
        new_slots: [B] int64, where K and V of these are written.
    """
    seq_lens = torch.tensor(lengths, dtype=torch.int64)
    on_device = seq_lens.to(runner.device)
    return _forward_batch(
        runner,
        forward_mode=compat.ForwardMode.DECODE,
        batch_size=len(lengths),
        input_ids=input_ids,
        req_pool_indices=requests,
        seq_lens=on_device,
        out_cache_loc=new_slots,
        seq_lens_sum=sum(lengths),
        seq_lens_cpu=seq_lens,
        orig_seq_lens=on_device,
        positions=on_device - 1,
        num_token_non_padded_cpu=len(lengths),
    )


def _forward_batch(runner: Any, **given: Any) -> Any:
    """Return a batch with the fields that SGLang reads, as `ForwardBatch.init_new` sets them."""
    return compat.ForwardBatch(
        spec_algorithm=runner.spec_algorithm,
        capture_hidden_mode=compat.CaptureHiddenMode.NULL,
        **given,
    )


def prefill(runner: Any, batch: FilledBatch, tokens: Tensor) -> list[Any]:
    """Write K and V of the first tokens of each request, by the runner's live backend.

    Args:
        batch: requests of at least T tokens, from `filled_batch`.
        tokens: [B, T] int64 on the device.

    Returns:
        SGLang's output of each request's last token.
    """
    requests, outputs = batch.forward_batch.req_pool_indices, []
    for row, slots in enumerate(batch.slots):
        for first in range(0, tokens.shape[1], PREFILL_TOKENS):
            new = tokens[row, first : first + PREFILL_TOKENS]
            last = first + len(new)
            seq_lens = torch.tensor([last], dtype=torch.int64)
            on_device = seq_lens.to(runner.device)
            chunk = _forward_batch(
                runner,
                forward_mode=compat.ForwardMode.EXTEND,
                batch_size=1,
                input_ids=new,
                req_pool_indices=requests[row : row + 1],
                seq_lens=on_device,
                out_cache_loc=slots[first:last],
                seq_lens_sum=last,
                seq_lens_cpu=seq_lens,
                orig_seq_lens=on_device,
                positions=torch.arange(first, last, device=runner.device),
                num_token_non_padded_cpu=len(new),
                extend_num_tokens=len(new),
                extend_seq_lens=(on_device - first).int(),
                extend_prefix_lens=(on_device - len(new)).int(),
                extend_start_loc=torch.zeros_like(on_device, dtype=torch.int32),
                extend_prefix_lens_cpu=[first],
                extend_seq_lens_cpu=[len(new)],
                extend_logprob_start_lens_cpu=[len(new)],
            )
            output = runner.forward(chunk)
        outputs.append(output)
    return outputs


def run_step(runner: Any, batch: FilledBatch, observer: LayerObserver | None = None) -> Tensor:
    """Run one decode step, on a GPU by a captured graph, whose next replay overwrites the result.

    Args:
        observer: sees the step's layers, for which the step runs without a graph.

    Returns:
        The logits [B, V].

    Raises:
        ServerError: the step ran without a graph on a GPU.
    """
    with _observed(runner, observer) if observer else nullcontext():
        output = runner.forward(batch.forward_batch)
    if not output.can_run_graph and not compat.serves_on_cpu() and not observer:
        raise ServerError(f"{batch.point}: the step ran without its CUDA graph")
    logits: Tensor = output.logits_output.next_token_logits
    return logits


@contextmanager
def _observed(runner: Any, observer: LayerObserver) -> Iterator[None]:
    """Let our backend show the layers of the block's steps, which run without a graph."""
    runner.attn_backend.observer = observer
    try:
        with compat.without_decode_graphs(runner):
            yield
    finally:
        runner.attn_backend.observer = None


def count_slots(
    model: ModelChoice,
    backend: str,
    config: LimConfig,
    mem_fraction_static: float,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Load a model for one backend and return the tokens that the KV cache holds.

    Args:
        config: LessIsMore's settings, for our backend.
        options: further fields of SGLang's `ServerArgs`.
    """
    os.environ[CONFIG_VAR] = config.to_json()
    with model.as_folder(longest=1) as folder:
        runner = load_runner(
            folder,
            backend=backend,
            mem_fraction_static=mem_fraction_static,
            **model.load_options,
            **options,
        )
        check_formats(runner, model)
        return int(runner.max_total_num_tokens)


def run_in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a new process, with the log of this one, so that all memory of
    the GPU is free again afterwards; its error comes through as a `LimError`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), log_as_here()) as pool:
        try:
            return pool.submit(_call, function, args).result()
        except BrokenProcessPool:
            raise ServerError(f"the process of {function.__name__} died: see its output") from None


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except LimError as error:  # one with arguments of its own cannot be pickled
        raise LimError(str(error)) from None
