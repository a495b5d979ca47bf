"""What cannot be served without silently changing the result, and why. Pure: it only looks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lim_sglang.config import LimConfig, ModelShape, with_preset
from lim_sglang.errors import ConfigError
from lim_sglang.schedule import Role, layer_roles

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
