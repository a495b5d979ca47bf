"""Refusals: SGLang options, environments, models and GPUs that LessIsMore cannot serve.

Each function `reasons_against_…` returns one line for each reason, so that a start names all of
them at once. Nothing is loaded to find out: torch is imported only where a GPU is asked.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lim_sglang.compat import (
    CPU_ENGINE_VAR,
    CPU_GRAMMARS,
    GLUE_GRAPH_VAR,
    PLATFORM_VAR,
    PLUGINS_VAR,
)
from lim_sglang.config import (
    AUDIT_VAR,
    BACKEND,
    TRACE_VAR,
    LimConfig,
    ModelShape,
    with_preset,
)
from lim_sglang.errors import ConfigError, reasons_that_hold
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.policy import SPARSE, Role, SharedBy, SparsePolicy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Refusal:
    """An SGLang option that is refused while our backend serves decode."""

    option: str
    is_refused: Callable[[Any], bool]
    """Decides by the option's value, as typed or as SGLang resolved it."""
    why: str
    aliases: tuple[str, ...] = ()
    """Other names of the option that SGLang's parser accepts."""

    @property
    def field(self) -> str:
        """The option's name in a parsed command line and in `ServerArgs`."""
        return self.option.removeprefix("--").replace("-", "_")


def _over_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_given(value: Any) -> bool:
    return value is not None


def _is_partial_graph(backend: Any) -> bool:
    """Return True for a CUDA graph backend that captures a decode step in pieces."""
    return backend not in (None, "full", "disabled")


def _has_partial_graph(config: Any) -> bool:
    """Return True if a graph configuration, a mapping or resolved, has a partial decode graph."""
    if isinstance(config, Mapping):
        decode = config.get("decode")
        # SGLang itself refuses anything else than a mapping.
        return isinstance(decode, Mapping) and _is_partial_graph(decode.get("backend"))
    return _is_partial_graph(getattr(getattr(config, "decode", None), "backend", None))


FP8_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""torch's names of SGLang's dtypes."""
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", *FP8_DTYPES)
"""KV caches that hold keys as they are; all others of SGLang's keep scales beside the keys."""

_DENSE = "these steps would be dense"
_UNTESTED = "it has not been verified with sparse decode"
_UNCHECKED = "requests would reach the scheduler without the checks that keep it alive"
_WHOLE_GRAPHS = "decode graphs must be captured in one piece, so use full or disabled"
_ANOTHER_PROGRAM = "it takes the place of the model's layers, and all would be dense"
_WITHOUT_SUMMARIES = "keys could come back without their summaries"
_UNTESTED_DRAFTS = "it has not been verified with policy lossless"
_ONE_SAMPLER = f"drafts and verification sample by {BACKEND}"
DRAFTING = "LIM_LOSSLESS"
"""The name of lossless drafting among SGLang's speculative algorithms."""
_WHOLE_CONTEXT = "the set needs the whole context"

REFUSALS = (
    # Parallelism
    Refusal(
        "--pp-size",
        _over_one,
        "a set cannot cross pipeline stages",
        ("--pp", "--pipeline-parallel-size"),
    ),
    Refusal("--ep-size", _over_one, _UNTESTED, ("--ep", "--expert-parallel-size")),
    Refusal("--nnodes", _over_one, _UNTESTED),
    Refusal("--enable-dp-attention", bool, _UNTESTED),
    Refusal("--dcp-size", _over_one, _WHOLE_CONTEXT),
    Refusal("--attn-cp-size", _over_one, _WHOLE_CONTEXT),
    Refusal("--enable-prefill-cp", bool, _UNTESTED),
    Refusal("--disaggregation-mode", lambda v: v not in (None, "null"), _UNTESTED),
    # Steps that mix decode with prefill
    Refusal(
        "--speculative-algorithm",
        lambda v: v not in (None, DRAFTING),
        f"drafts are verified as prefill, so {_DENSE}",
    ),
    Refusal(
        "--enable-mixed-chunk", bool, f"decode tokens would join prefill batches, and {_DENSE}"
    ),
    Refusal("--enable-two-batch-overlap", bool, _UNTESTED),
    Refusal("--enable-pdmux", bool, _UNTESTED),
    # Requests
    Refusal("--tokenizer-worker-num", _over_one, _UNCHECKED),
    Refusal("--grpc-mode", bool, _UNCHECKED),
    Refusal("--smg-grpc-mode", bool, _UNCHECKED),
    # Execution
    Refusal("--enable-deterministic-inference", bool, "the backend has no batch-invariant kernels"),
    Refusal("--enable-torch-compile", bool, _UNTESTED),
    Refusal("--cuda-graph-backend-decode", _is_partial_graph, _WHOLE_GRAPHS),
    Refusal("--cuda-graph-config", _has_partial_graph, _WHOLE_GRAPHS),
    Refusal("--debug-cuda-graph", bool, _UNTESTED),
    # Other attention, and models that do not decode
    Refusal("--enable-mis", bool, "it needs another attention backend"),
    Refusal("--enable-hisparse", bool, "it is another sparse attention"),
    Refusal("--dllm-algorithm", _is_given, "diffusion models do not decode"),
    Refusal("--is-embedding", bool, "embedding models do not decode"),
    Refusal("--encoder-only", bool, "an encoder does not decode"),
    Refusal("--language-only", bool, _UNTESTED),
    # KV cache
    Refusal("--prefill-only-disable-kv-cache", bool, "the set is selected from the KV cache"),
    Refusal(
        "--kv-cache-dtype",
        lambda v: v is not None and v not in KV_CACHE_DTYPES,
        f"keys are scored without scales beside them, so use {', '.join(KV_CACHE_DTYPES)}",
    ),
)

GPU_REFUSALS = (
    Refusal(
        "--tp-size",
        _over_one,
        "the exchange of ranks has not been verified on several GPUs",
        ("--tp", "--tensor-parallel-size"),
    ),
)
CPU_REFUSALS = (
    Refusal(
        "--grammar-backend",
        lambda v: v not in (None, CPU_GRAMMARS, "none"),
        f"it does not mask logits on a CPU, so use {CPU_GRAMMARS}, or none",
    ),
    Refusal("--page-size", _over_one, "SGLang needs a GPU for pages of several tokens"),
)
LATER_REFUSALS = (
    Refusal("--attn-dp-size", _over_one, _UNTESTED),  # in 0.5.22 and later
    Refusal("--enable-nvidia-megakernel", bool, _ANOTHER_PROGRAM),  # 0.5.23
    Refusal("--enable-amd-monokernel", bool, _ANOTHER_PROGRAM),  # 0.5.23
    Refusal("--enable-unified-memory", bool, _UNTESTED),  # 0.5.23
)
"""Options that the pinned release of SGLang does not have, refused where a later one has them."""


def _other_caches(why: str) -> tuple[Refusal, ...]:
    """Refuse the options by which keys come from elsewhere than SGLang's own radix cache."""
    return (
        Refusal("--enable-hierarchical-cache", bool, why),
        Refusal("--enable-lmcache", bool, why),
        Refusal("--enable-flexkv", bool, why),
        Refusal("--radix-cache-backend", _is_given, why),
    )


DRAFTING_REFUSALS = (
    Refusal(
        *("--tp-size", _over_one, "policy lossless drafts and verifies on one rank so far"),
        aliases=("--tp", "--tensor-parallel-size"),
    ),
    Refusal("--page-size", _over_one, _UNTESTED_DRAFTS),
    Refusal("--enable-lora", bool, _UNTESTED_DRAFTS),
    Refusal("--lora-paths", bool, _UNTESTED_DRAFTS),
    Refusal("--sampling-backend", lambda v: v not in (None, BACKEND), _ONE_SAMPLER),
    Refusal("--prefill-attention-backend", _is_given, _UNTESTED_DRAFTS),
    Refusal("--kv-cache-dtype", lambda v: v in FP8_DTYPES, _UNTESTED_DRAFTS),
    Refusal(
        "--enable-forward-pass-metrics", bool, "it reads lengths that the host does not wait for"
    ),
    *_other_caches(_UNTESTED_DRAFTS),
)
"""Options that are refused under policy lossless."""


def reasons_against_drafting(options: Any, config: LimConfig) -> list[str]:
    """List the options that lossless drafting cannot be served with, as the user gave them."""
    is_lossless = isinstance(config.make_policy(), Lossless)
    reasons = reasons_that_hold(
        (
            not is_lossless and getattr(options, "speculative_algorithm", None) == DRAFTING,
            f"--speculative-algorithm {DRAFTING}: use --lim-policy lossless in its place",
        ),
    )
    if is_lossless:
        reasons += reasons_against_drafts(options)
        reasons += [f"{option}: policy lossless sets it" for option in _speculation(options)]
    return reasons


def reasons_against_drafts(options: Any) -> list[str]:
    """List the options, given or resolved, that drafts cannot be served with."""
    return _refused(DRAFTING_REFUSALS, options)


def _speculation(options: Any) -> list[str]:
    """Return the options of SGLang's speculation that differ from their defaults, but for the
    algorithm."""
    return [
        f"--{field.name.replace('_', '-')}"
        for field in (fields(options) if is_dataclass(options) else ())
        if field.name.startswith("speculative_")
        and field.name != "speculative_algorithm"
        and getattr(options, field.name) != field.default
    ]


SUMMARY_REFUSALS = _other_caches(_WITHOUT_SUMMARIES)
"""Options that are refused where a policy reads summaries of the keys."""
SUMMARY_PAGE_SIZE = 64
"""SGLang's page size, if none is given, where a policy reads summaries of blocks of keys."""


def reasons_against_summaries(options: Any, config: LimConfig) -> list[str]:
    """List the options under which blocks of keys, and their summaries, would not stay together."""
    policy = _policy_with_summaries(config)
    if policy is None:
        return []
    return _refused(SUMMARY_REFUSALS, options) + reasons_that_hold(
        (
            (options.page_size or 1) % policy.block != 0,
            f"--page-size {options.page_size}: policy {config.policy} keeps blocks of "
            f"{policy.block} tokens in consecutive slots, so use a multiple of {policy.block}, "
            f"such as {SUMMARY_PAGE_SIZE}",
        )
    )


def default_page_size(config: LimConfig) -> int | None:
    """Return the page size of SGLang that a policy needs; None if any does."""
    return SUMMARY_PAGE_SIZE if _policy_with_summaries(config) else None


def _policy_with_summaries(config: LimConfig) -> SparsePolicy | None:
    """Return the policy if it reads summaries of blocks of keys."""
    policy = config.make_policy()
    if isinstance(policy, SparsePolicy) and policy.summary_shape(1, 1) is not None:
        return policy
    return None


def decodes_with_lim(options: Any) -> bool:
    """Return True if decode steps go to the backend `lim`.

    Args:
        options: a parsed command line or `ServerArgs`.
    """
    return (options.decode_attention_backend or options.attention_backend) == BACKEND


def reasons_against(options: Any, *, on_cpu: bool) -> list[str]:
    """List the SGLang options that cannot be served.

    Args:
        options: a parsed command line or `ServerArgs`.
    """
    return _refused(refusals(on_cpu=on_cpu), options)


def refusals(*, on_cpu: bool) -> tuple[Refusal, ...]:
    """Return the options that are refused, whatever the policy and the model."""
    return REFUSALS + (CPU_REFUSALS if on_cpu else GPU_REFUSALS) + LATER_REFUSALS


def _refused(table: Sequence[Refusal], options: Any) -> list[str]:
    given = ((refusal, getattr(options, refusal.field, None)) for refusal in table)
    return [
        f"{_as_typed(refusal.option, value)}: {refusal.why}"
        for refusal, value in given
        if refusal.is_refused(value)
    ]


def _as_typed(option: str, value: Any) -> str:
    """Return an option and its value as a user would type them."""
    return f"{option} {value}" if isinstance(value, str | int) and value is not True else option


def reasons_against_environment(environment: Mapping[str, str]) -> list[str]:
    """List the variables that would keep SGLang from loading the plugin."""
    plugins, platform = environment.get(PLUGINS_VAR, ""), environment.get(PLATFORM_VAR)
    names = [name.strip() for name in plugins.split(",")]
    return reasons_that_hold(
        (
            bool(plugins) and BACKEND not in names,
            f"{PLUGINS_VAR}={plugins} keeps the plugin {BACKEND} from loading: "
            f"unset it, or add {BACKEND}",
        ),
        (
            bool(platform),
            f"{PLATFORM_VAR}={platform} keeps the plugin {BACKEND} from loading: unset it",
        ),
    )


def model_shape(model_config: Any) -> ModelShape:
    """Return the preset's key for a Hugging Face text configuration."""
    return ModelShape(
        model_config.model_type,
        model_config.num_hidden_layers,
        model_config.hidden_size,
        model_config.num_attention_heads,
    )


def model_traits(model_config: Any) -> dict[str, Any]:
    """Return what tells models of one shape apart, as `Preset.differences` takes it."""
    parameters = getattr(model_config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta") or getattr(model_config, "rope_theta", None)
    return {"vocab_size": getattr(model_config, "vocab_size", None), "rope_theta": theta}


def head_dim_of(model_config: Any) -> int:
    """Return the dimensions of one attention head."""
    stated: int | None = getattr(model_config, "head_dim", None)
    return stated or int(model_config.hidden_size // model_config.num_attention_heads)


def reasons_against_model(model_config: Any, config: LimConfig) -> list[str]:
    """List the traits of a model, or its mismatch with the layer lists, that cannot be served.

    Args:
        model_config: the Hugging Face text configuration.
    """
    kinds = set(getattr(model_config, "layer_types", None) or ())
    window = getattr(model_config, "sliding_window", None)
    # A window of the whole context never acts; the loaded layers are looked at, too.
    context = getattr(model_config, "max_position_embeddings", math.inf)
    acts = window is not None and window < context
    traits = {
        "multi-head latent attention (MLA)": getattr(model_config, "kv_lora_rank", None),
        "sliding-window attention": "sliding_attention" in kinds or (not kinds and acts),
        "chunked attention": getattr(model_config, "attention_chunk_size", None),
        "an encoder and a decoder": getattr(model_config, "is_encoder_decoder", False),
        "layers without full attention (a hybrid)": kinds - {"full_attention", "sliding_attention"},
    }
    reasons = [f"the model has {trait}: not supported yet" for trait, has in traits.items() if has]
    reasons = reasons or _reasons_against_layer_lists(model_config, config)
    return reasons or config.make_policy().reasons_against_model(model_config)


def reasons_against_ranks(
    num_ranks: int, model_config: Any, config: LimConfig, *, on_cpu: bool
) -> list[str]:
    """List what keeps ranks of tensor parallelism from sharing the heads of a model.

    On a CPU SGLang adds heads of zeros to the configuration where ranks cannot share KV heads
    equally, and keeps the model's numbers beside them. These heads would take turns, too.

    Args:
        model_config: the Hugging Face text configuration.
    """
    if num_ranks == 1:
        return []
    heads, kv_heads = (
        getattr(model_config, own, None) or getattr(model_config, name, None)
        for own, name in (
            ("original_num_attention_heads", "num_attention_heads"),
            ("original_total_num_kv_heads", "num_key_value_heads"),
        )
    )
    heads = heads or num_ranks
    kv_heads = kv_heads or heads
    policy = config.make_policy()
    reasons = policy.reasons_against_ranks(num_ranks, kv_heads)
    if not (on_cpu or policy.merges_on_gpu):
        reasons.append(f"ranks exchange what policy {config.policy} selects on a CPU only so far")
    if not _divides(num_ranks, heads, kv_heads, on_cpu):
        possible = [n for n in range(1, heads + 1) if _divides(n, heads, kv_heads, on_cpu)]
        reasons.append(
            f"{num_ranks} ranks cannot share {heads} query heads and {kv_heads} KV heads equally: "
            f"use {', '.join(map(str, possible))}"
        )
    return [f"--tp-size {num_ranks}: {reason}" for reason in reasons]


def _divides(num_ranks: int, heads: int, kv_heads: int, on_cpu: bool) -> bool:
    """Return True if each rank gets equally many query heads and whole KV heads, or on a GPU a copy
    of one."""
    has_copies = not on_cpu and num_ranks % kv_heads == 0
    return heads % num_ranks == 0 and (kv_heads % num_ranks == 0 or has_copies)


def _reasons_against_layer_lists(model_config: Any, config: LimConfig) -> list[str]:
    try:
        _roles(model_config, config)
    except ConfigError as error:
        return [str(error)]
    except AttributeError as error:
        return [f"the model's configuration has no {error.name}: no decoder of a known kind"]
    return []


def _roles(model_config: Any, config: LimConfig) -> tuple[Role, ...]:
    shape = model_shape(model_config)
    return with_preset(config, shape).make_policy().roles(shape.num_layers)


def reads_sparsely(model_config: Any, config: LimConfig) -> bool:
    """Return True if any layer of a model that can be served, or of a draft, reads less than
    everything."""
    is_lossless = isinstance(config.make_policy(), Lossless)
    return is_lossless or any(role in SPARSE for role in _roles(model_config, config))


def reasons_against_layers(
    layers: list[Any], roles: Sequence[Role], config: LimConfig, *, on_cpu: bool
) -> list[str]:
    """List the traits of a loaded model's attention layers that cannot be served.

    Args:
        layers: SGLang's attention layers, in the order of the model.
    """
    depth = len(roles)
    capped = any(layer.logit_cap for layer in layers)
    return reasons_that_hold(
        (
            [layer.layer_id for layer in layers] != list(range(depth)),
            f"the model has {len(layers)} attention layers, expected one in each of {depth} layers",
        ),
        (
            any(layer.sliding_window_size > -1 for layer in layers),
            "the model has sliding-window attention: not supported yet",
        ),
        (
            any(layer.is_cross_attention for layer in layers),
            "the model has cross-attention: not supported yet",
        ),
        (
            capped and _weighs_by_softmax(config) and any(role in SPARSE for role in roles),
            "the model caps attention logits, which a ranking by softmax ignores: "
            "use --lim-policy lessismore and --lim-ranking rank",
        ),
        (
            capped and on_cpu,
            "the model caps attention logits: SGLang ignores that on a CPU",
        ),
    )


def _weighs_by_softmax(config: LimConfig) -> bool:
    policy = config.make_policy()
    return isinstance(policy, SparsePolicy) and policy.weighs_by_softmax


MIN_CAPABILITY = (8, 0)
"""Ampere: older GPUs have no bf16 tensor cores, and the kernels are not compiled for them."""
HEAD_DIMS = (64, 128, 256)
"""Head dimensions that FlashInfer decodes and our kernels are tested with."""
FP8_E4M3_CAPABILITY = (8, 9)
"""Ada: for older GPUs Triton compiles kernels that read fp8_e5m2, but none that read fp8_e4m3."""
SORT_BYTES = 8
"""Shared memory a token that sorting a head's ranking takes, padded to a power of two."""
INTERPRET_VAR = "TRITON_INTERPRET"
"""Triton reads it when a kernel is decorated."""
INTERPRETED = ("1", "true", "on", "yes", "y")
"""The values, in any case, with which Triton interprets kernels instead of compiling them."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    capability: tuple[int, int]
    compiles: bool
    """True if FlashInfer can compile for this GPU."""
    shared_bytes: int
    """Shared memory that one program of a kernel may take."""


def find_gpu() -> Gpu | None:
    """Return the current CUDA device, None if there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties: Any = torch.cuda.get_device_properties()
    return Gpu(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        has_nvcc(),
        properties.shared_memory_per_block_optin,
    )


def has_nvcc() -> bool:
    """Return True if CUDA's compiler lies where FlashInfer looks, in FlashInfer's order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return (Path(home) / "bin" / "nvcc").is_file()
    return bool(shutil.which("nvcc")) or Path("/usr/local/cuda/bin/nvcc").is_file()


def reasons_against_gpu(
    gpu: Gpu | None, model_config: Any | None, environment: Mapping[str, str]
) -> list[str]:
    """List the reasons why this GPU cannot serve.

    Args:
        gpu: None if there is none.
        model_config: the Hugging Face text configuration, None if unreadable.
    """
    if gpu is None:
        return [f"there is no NVIDIA GPU: set {CPU_ENGINE_VAR}=1 to serve on the CPU"]
    head_dim = head_dim_of(model_config) if model_config is not None else None
    return reasons_that_hold(
        (
            gpu.capability < MIN_CAPABILITY,
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, "
            f"needed is {_dotted(MIN_CAPABILITY)} (Ampere) or newer",
        ),
        (
            not gpu.compiles,
            "FlashInfer compiles its kernels and one of ours at the first start, and found no "
            "nvcc: install the CUDA toolkit and set CUDA_HOME",
        ),
        (
            head_dim is not None and head_dim not in HEAD_DIMS,
            f"the model has heads of {head_dim} dimensions: "
            f"kernels exist for {', '.join(map(str, HEAD_DIMS))}",
        ),
        (
            bool(environment.get(TRACE_VAR)),
            f"{TRACE_VAR} is for CPUs: on a GPU use {AUDIT_VAR}=1, or unset it",
        ),
        (
            environment.get(INTERPRET_VAR, "").lower() in INTERPRETED,
            f"{INTERPRET_VAR} is set, so no kernel would be compiled: unset it",
        ),
        (
            environment.get(GLUE_GRAPH_VAR, "").lower() in INTERPRETED,
            f"{GLUE_GRAPH_VAR} would keep LessIsMore from beginning a step: unset it",
        ),
    )


def reasons_against_selection(
    gpu: Gpu,
    config: LimConfig,
    context: int,
    kv_cache_dtype: str,
    max_running_requests: int | None,
) -> list[str]:
    """List the reasons why the kernels cannot select tokens on this GPU.

    Args:
        config: of a schedule with sparse layers; any other selects nothing.
        context: tokens of the longest request; a budget that covers them selects nothing.
        kv_cache_dtype, max_running_requests: the values of SGLang's options.
    """
    policy = config.make_policy()
    if not isinstance(policy, SparsePolicy) or policy.budget >= context:
        return []
    import torch

    from lim_sglang.kernels.launch import MAX_SORT

    ranked = policy.num_ranked
    most = min(MAX_SORT, _power_of_two_within(gpu.shared_bytes // SORT_BYTES))
    reasons = []
    if policy.sharing is not SharedBy.ALL and max_running_requests is None:
        reasons.append(
            f"policy {config.policy} keeps {policy.budget} slots for each head and request: "
            "say how many requests run at once by --max-running-requests"
        )
    if ranked > most:
        largest = policy.budget * most // ranked
        unit = "tokens" if policy.block == 1 else "pages"
        reasons.append(
            f"a budget of {policy.budget} selects {ranked} {unit}, but on {gpu.name} at most "
            f"{most} a list can be ranked: use --lim-budget {largest} or less, or {context} to "
            "read everything"
        )
    if cache := FP8_DTYPES.get(kv_cache_dtype):
        dtype = getattr(torch, cache)
        reasons += reasons_against_kv_cache(dtype, torch.bfloat16, gpu.capability, policy)
    return reasons


def reasons_against_kv_cache(
    dtype: "torch.dtype",
    queries: "torch.dtype",
    capability: tuple[int, int],
    policy: SparsePolicy | None = None,
) -> list[str]:
    """Return one reason if keys of a KV cache cannot be scored on a GPU of this capability.

    Args:
        dtype: the cache's; `--kv-cache-dtype auto` leaves the choice to the checkpoint.
        queries: the queries' dtype, which is the model's.
        policy: None if any would do.
    """
    import torch

    if isinstance(policy, Lossless) and dtype.itemsize == 1:
        return [
            f"policy lossless with a KV cache of {str(dtype).removeprefix('torch.')}, which the "
            "checkpoint asks for: not verified yet, use --kv-cache-dtype bfloat16"
        ]
    if policy and policy.reads_before_rope and dtype.itemsize == 1:
        return [
            "a KV cache of fp8 does not give back the keys before RoPE that the policy's gate was "
            "trained on: use --kv-cache-dtype auto"
        ]
    if dtype is torch.float8_e4m3fn and capability < FP8_E4M3_CAPABILITY:
        return [
            "a KV cache of fp8_e4m3 needs compute capability "
            f"{_dotted(FP8_E4M3_CAPABILITY)} (Ada) or newer, not {_dotted(capability)}: "
            "use --kv-cache-dtype fp8_e5m2 or bf16"
        ]
    if dtype not in (queries, torch.float8_e4m3fn, torch.float8_e5m2):
        return [
            f"a KV cache of {str(dtype).removeprefix('torch.')} cannot be scored with queries of "
            f"{str(queries).removeprefix('torch.')}: use --kv-cache-dtype auto, fp8_e4m3 or "
            "fp8_e5m2"
        ]
    return []


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _power_of_two_within(limit: int) -> int:
    return 1 << (limit.bit_length() - 1) if limit else 0
