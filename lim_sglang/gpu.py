"""What the GPU, its host and the model must have for the backend: asked before anything loads."""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.tracing import ENV_VAR as TRACE_VAR

MIN_CAPABILITY = (8, 0)
"""Ampere: older GPUs have no bf16 tensor cores, and the kernels are not compiled for them."""
HEAD_DIMS = (64, 128, 256)
"""Head dimensions that FlashInfer decodes and the kernels score."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that would serve, and whether FlashInfer can compile for it."""

    name: str
    capability: tuple[int, int]
    compiles: bool


def find_gpu() -> Gpu | None:
    """The current CUDA device, None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Gpu(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        has_nvcc() or importlib.util.find_spec("flashinfer_jit_cache") is not None,
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
            "FlashInfer compiles its kernels at the first start and found no nvcc: install the "
            "CUDA toolkit and set CUDA_HOME, or install flashinfer-jit-cache"
        )
    head_dim = model_config and head_dim_of(model_config)
    if head_dim and head_dim not in HEAD_DIMS:
        reasons.append(
            f"the model has heads of {head_dim} dimensions: "
            f"kernels exist for {', '.join(map(str, HEAD_DIMS))}"
        )
    if environment.get(TRACE_VAR):
        reasons.append(f"{TRACE_VAR} is for CPUs: on a GPU use LIM_AUDIT=1, or unset it")
    return reasons


def head_dim_of(model_config: Any) -> int:
    """Dimensions of one attention head."""
    stated: int | None = getattr(model_config, "head_dim", None)
    return stated or int(model_config.hidden_size // model_config.num_attention_heads)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
