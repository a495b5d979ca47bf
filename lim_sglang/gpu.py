"""What the GPU, its host and the model must have for the backend: asked before anything loads."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.config import LimConfig
from lim_sglang.tracing import ENV_VAR as TRACE_VAR

if TYPE_CHECKING:
    import torch

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
