"""Reasons against a start: SGLang options, models, GPUs and environments that cannot be served
without silently changing the result. Pure: asked before anything loads.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.config import LimConfig, ModelShape, Role, layer_roles, with_preset
from lim_sglang.errors import ConfigError
from lim_sglang.tracing import ENV_VAR as TRACE_VAR

if TYPE_CHECKING:
    import torch

BACKEND = "lim"
"""The name of the attention backend."""


@dataclass(frozen=True)
class Refusal:
    """One SGLang option that is refused while the decode backend is ours."""

    option: str
    field: str
    refused: Callable[[Any], bool]
    why: str


def _more_than_one(value: Any) -> bool:
    return value is not None and value > 1


def _given(value: Any) -> bool:
    return value is not None


def _decode_graph(config: Any) -> str | None:
    """The decode backend of a graph configuration, as typed (a mapping) or as resolved."""
    if isinstance(config, Mapping):
        decode = config.get("decode")
        # Anything else than a mapping is SGLang's to refuse.
        return decode.get("backend") if isinstance(decode, Mapping) else None
    return getattr(getattr(config, "decode", None), "backend", None)


KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
"""KV caches that hold keys as they are; all others of SGLang's keep scales beside them."""
_GRAPHS = (None, "full", "disabled")
_DENSE = "these steps would be dense"
_UNTESTED = "it has not been verified with sparse decode"

REFUSALS = (
    Refusal("--tp-size", "tp_size", _more_than_one, "the set needs the heads of all ranks"),
    Refusal("--pp-size", "pp_size", _more_than_one, "a set cannot cross pipeline stages"),
    Refusal("--enable-dp-attention", "enable_dp_attention", bool, _UNTESTED),
    Refusal("--dcp-size", "dcp_size", _more_than_one, "the set needs the whole context"),
    Refusal("--attn-cp-size", "attn_cp_size", _more_than_one, "the set needs the whole context"),
    Refusal("--enable-prefill-cp", "enable_prefill_cp", bool, _UNTESTED),
    Refusal(
        "--speculative-algorithm",
        "speculative_algorithm",
        _given,
        f"drafts are verified as prefill, so {_DENSE}",
    ),
    Refusal(
        "--enable-mixed-chunk",
        "enable_mixed_chunk",
        bool,
        f"decode tokens would join prefill batches, and {_DENSE}",
    ),
    Refusal("--enable-two-batch-overlap", "enable_two_batch_overlap", bool, _UNTESTED),
    Refusal("--enable-pdmux", "enable_pdmux", bool, _UNTESTED),
    Refusal(
        "--disaggregation-mode", "disaggregation_mode", lambda v: v not in (None, "null"), _UNTESTED
    ),
    Refusal(
        "--enable-deterministic-inference",
        "enable_deterministic_inference",
        bool,
        "the backend has no batch-invariant kernels",
    ),
    Refusal("--enable-torch-compile", "enable_torch_compile", bool, _UNTESTED),
    Refusal(
        "--cuda-graph-backend-decode",
        "cuda_graph_backend_decode",
        lambda backend: backend not in _GRAPHS,
        "decode graphs must be captured whole, so use full or disabled",
    ),
    Refusal(
        "--cuda-graph-config",
        "cuda_graph_config",
        lambda config: _decode_graph(config) not in _GRAPHS,
        "decode graphs must be captured whole, so use full or disabled",
    ),
    Refusal("--debug-cuda-graph", "debug_cuda_graph", bool, _UNTESTED),
    Refusal("--enable-mis", "enable_mis", bool, "it needs another attention backend"),
    Refusal("--enable-hisparse", "enable_hisparse", bool, "it is another sparse attention"),
    Refusal("--dllm-algorithm", "dllm_algorithm", _given, "diffusion models do not decode"),
    Refusal("--is-embedding", "is_embedding", bool, "embedding models do not decode"),
    Refusal("--encoder-only", "encoder_only", bool, "an encoder does not decode"),
    Refusal("--language-only", "language_only", bool, _UNTESTED),
    Refusal(
        "--prefill-only-disable-kv-cache",
        "prefill_only_disable_kv_cache",
        bool,
        "the set is picked from the KV cache",
    ),
    Refusal(
        "--kv-cache-dtype",
        "kv_cache_dtype",
        lambda v: v is not None and v not in KV_CACHE_DTYPES,
        f"keys are scored without scales beside them, so use {', '.join(KV_CACHE_DTYPES)}",
    ),
)

CPU_REFUSALS = (
    Refusal(
        "--page-size",
        "page_size",
        _more_than_one,
        "SGLang needs a GPU for pages of several tokens",
    ),
)


def decodes_with_lim(options: Any) -> bool:
    """Whether decode steps go to the backend `lim`. `options`: a namespace or ServerArgs."""
    return (options.decode_attention_backend or options.attention_backend) == BACKEND


def reasons_against(options: Any, *, on_cpu: bool) -> list[str]:
    """Why these SGLang options cannot be served, one line each. `options`: as typed or resolved."""
    table = REFUSALS + (CPU_REFUSALS if on_cpu else ())
    given = ((refusal, getattr(options, refusal.field, None)) for refusal in table)
    return [
        f"{_shown(refusal.option, value)}: {refusal.why}"
        for refusal, value in given
        if refusal.refused(value)
    ]


def reasons_against_environment(environment: Mapping[str, str]) -> list[str]:
    """Which variables would keep SGLang from loading the plugin, one line each."""
    reasons = []
    plugins = environment.get("SGLANG_PLUGINS")
    if plugins and BACKEND not in [name.strip() for name in plugins.split(",")]:
        reasons.append(
            f"SGLANG_PLUGINS={plugins} keeps the plugin {BACKEND} from loading: "
            f"unset it, or add {BACKEND}"
        )
    platform = environment.get("SGLANG_PLATFORM")
    if platform:
        reasons.append(
            f"SGLANG_PLATFORM={platform} keeps the plugin {BACKEND} from loading: unset it"
        )
    return reasons


def reasons_against_model(model_config: Any, config: LimConfig) -> list[str]:
    """Why a model with this Hugging Face text configuration cannot be served, one line each."""
    kinds = set(getattr(model_config, "layer_types", None) or ())
    window = getattr(model_config, "sliding_window", None)
    sliding = "sliding_attention" in kinds or (not kinds and window is not None)
    found = {
        "multi-head latent attention (MLA)": getattr(model_config, "kv_lora_rank", None),
        "sliding-window attention": sliding,
        "chunked attention": getattr(model_config, "attention_chunk_size", None),
        "an encoder and a decoder": getattr(model_config, "is_encoder_decoder", False),
        "layers without full attention (a hybrid)": kinds - {"full_attention", "sliding_attention"},
    }
    reasons = [f"the model has {trait}: not supported yet" for trait, has in found.items() if has]
    return reasons or _reasons_against_schedule(model_config, config)


def reuses_sets(model_config: Any, config: LimConfig) -> bool:
    """Whether any layer of a model that can be served reads a set."""
    shape = model_shape(model_config)
    return Role.REUSE in layer_roles(with_preset(config, shape), shape.num_layers)


def reasons_against_layers(
    layers: list[Any], roles: Sequence[Role], config: LimConfig, *, on_cpu: bool
) -> list[str]:
    """Why the attention layers of the loaded model cannot be served, one line each."""
    reasons, depth = [], len(roles)
    capped = any(layer.logit_cap for layer in layers)
    if [layer.layer_id for layer in layers] != list(range(depth)):
        reasons.append(
            f"the model has {len(layers)} attention layers, expected one in each of {depth} layers"
        )
    if any(layer.sliding_window_size > -1 for layer in layers):
        reasons.append("the model has sliding-window attention: not supported yet")
    if any(layer.is_cross_attention for layer in layers):
        reasons.append("the model has cross-attention: not supported yet")
    if capped and config.ranking == "mass" and Role.REUSE in roles:
        reasons.append("the model caps attention logits: use --lim-ranking rank")
    if capped and on_cpu:
        reasons.append("the model caps attention logits: SGLang ignores that on a CPU")
    return reasons


def model_shape(model_config: Any) -> ModelShape:
    """The preset's key for a Hugging Face text configuration."""
    return ModelShape(
        model_config.model_type,
        model_config.num_hidden_layers,
        model_config.hidden_size,
        model_config.num_attention_heads,
    )


def _reasons_against_schedule(model_config: Any, config: LimConfig) -> list[str]:
    try:
        shape = model_shape(model_config)
        layer_roles(with_preset(config, shape), shape.num_layers)
    except ConfigError as error:
        return [str(error)]
    except AttributeError as error:
        return [f"the model's configuration has no {error.name}: it is no decoder that is known"]
    return []


def _shown(option: str, value: Any) -> str:
    """The option as a user would type it."""
    return f"{option} {value}" if isinstance(value, str | int) and value is not True else option


MIN_CAPABILITY = (8, 0)
"""Ampere: older GPUs have no bf16 tensor cores, and the kernels are not compiled for them."""
HEAD_DIMS = (64, 128, 256)
"""Head dimensions that FlashInfer decodes and our kernels are tested with."""
FP8_E4M3_CAPABILITY = (8, 9)
"""Ada: Triton compiles no kernel that reads fp8_e4m3 for older GPUs; fp8_e5m2 it does."""
SORT_BYTES = 8
"""Shared memory a token that sorting a head's ranking takes, padded to a power of two."""
INTERPRET_VAR = "TRITON_INTERPRET"
"""Triton reads it when a kernel is decorated."""
INTERPRETED = ("1", "true", "on", "yes", "y")
"""The values, in any case, with which it interprets kernels instead of compiling them."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that would serve, and whether FlashInfer can compile for it."""

    name: str
    capability: tuple[int, int]
    compiles: bool
    shared_bytes: int
    """Shared memory that one program of a kernel may take."""


def find_gpu() -> Gpu | None:
    """The current CUDA device, None where there is none."""
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
    """Whether FlashInfer would find CUDA's compiler: it looks in these places, in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return (Path(home) / "bin" / "nvcc").is_file()
    return bool(shutil.which("nvcc")) or Path("/usr/local/cuda/bin/nvcc").is_file()


def reasons_against_gpu(
    gpu: Gpu | None, model_config: Any | None, environment: Mapping[str, str]
) -> list[str]:
    """Why this GPU cannot serve, one line each.

    Args:
        gpu: None where there is none.
        model_config: the Hugging Face text configuration, None where it cannot be read.
    """
    if gpu is None:
        return [f"there is no NVIDIA GPU: set {CPU_ENGINE_VAR}=1 to serve on the CPU"]
    reasons = []
    if gpu.capability < MIN_CAPABILITY:
        reasons.append(
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, "
            f"needed is {_dotted(MIN_CAPABILITY)} (Ampere) or newer"
        )
    if not gpu.compiles:
        reasons.append(
            "FlashInfer compiles its kernels and one of ours at the first start, and found no "
            "nvcc: install the CUDA toolkit and set CUDA_HOME"
        )
    head_dim = model_config and head_dim_of(model_config)
    if head_dim and head_dim not in HEAD_DIMS:
        reasons.append(
            f"the model has heads of {head_dim} dimensions: "
            f"kernels exist for {', '.join(map(str, HEAD_DIMS))}"
        )
    if environment.get(TRACE_VAR):
        reasons.append(f"{TRACE_VAR} is for CPUs: on a GPU use LIM_AUDIT=1, or unset it")
    if environment.get(INTERPRET_VAR, "").lower() in INTERPRETED:
        reasons.append(f"{INTERPRET_VAR} is set, so no kernel would be compiled: unset it")
    return reasons


def reasons_against_selection(
    gpu: Gpu, config: LimConfig, context: int, kv_cache_dtype: str
) -> list[str]:
    """Why the kernels cannot pick sets on this GPU, one line each.

    Args:
        config: of a schedule with REUSE layers; any other picks nothing.
        context: the longest request in tokens; a budget that covers it picks nothing.
        kv_cache_dtype: SGLang's option.
    """
    if config.budget >= context:
        return []
    import torch

    from lim_sglang.kernels.launch import MAX_SORT
    from lim_sglang.kernels.reference import split_budget

    reasons = []
    selected = split_budget(config.budget, config.recent_ratio, config.sinks).selected
    most = min(MAX_SORT, _power_of_two_within(gpu.shared_bytes // SORT_BYTES))
    if selected > most:
        largest = int(most / (1 - config.recent_ratio))
        reasons.append(
            f"a budget of {config.budget} selects {selected} tokens, but on {gpu.name} at most "
            f"{most} a head can be ranked: use --lim-budget {largest} or less, or {context} to "
            "read everything"
        )
    if kv_cache_dtype == "fp8_e4m3":
        reasons += reasons_against_kv_cache(torch.float8_e4m3fn, torch.bfloat16, gpu.capability)
    return reasons


def reasons_against_kv_cache(
    dtype: "torch.dtype", queries: "torch.dtype", capability: tuple[int, int]
) -> list[str]:
    """Why keys of a KV cache cannot be scored on a GPU of this capability, one line each.

    Args:
        dtype: of the cache; `--kv-cache-dtype auto` leaves it to the checkpoint.
        queries: their dtype, which is the model's.
    """
    import torch

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


def head_dim_of(model_config: Any) -> int:
    """Dimensions of one attention head."""
    stated: int | None = getattr(model_config, "head_dim", None)
    return stated or int(model_config.hidden_size // model_config.num_attention_heads)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _power_of_two_within(limit: int) -> int:
    return 1 << (limit.bit_length() - 1) if limit else 0
