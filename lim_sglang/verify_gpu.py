"""Exactness before speed: every kernel on the current GPU against the definition in torch."""

import logging
from collections.abc import Callable, Mapping
from subprocess import SubprocessError

import torch
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from lim_sglang.kernels.decode_layer import MEASURED_CAPABILITY
from lim_sglang.kernels.launch import interpreted
from lim_sglang.kernels.verify import (
    Batch,
    head_differences,
    largest_mass_differences,
    mass_differences,
    selection_differences,
    stored_score_differences,
    window_differences,
)
from lim_sglang.kernels.verify_attention import (
    attention_differences,
    decode_layer_differences,
    list_attention_differences,
    run_attention_differences,
)
from lim_sglang.kernels.verify_pages import gate_differences, page_differences
from lim_sglang.validation import INTERPRET_VAR, reasons_against_kv_cache

logger = logging.getLogger(__name__)

BF16, FP16 = torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

BATCHES = {
    "Qwen3-8B": Batch((8192, 2049, 2048, 1), 32, 8, 128, 2048, dtype=BF16),
    "Qwen3-8B alone": Batch((16385,), 32, 8, 128, 2048, dtype=BF16),  # split into chunks
    "Qwen3-1.7B": Batch((4700, 2560, 2050), 16, 8, 128, 2048, dtype=BF16),
    "Qwen2.5-Coder-1.5B": Batch((900, 257, 100), 12, 2, 128, 256, dtype=BF16),
    "Qwen2.5-Coder-0.5B": Batch((900, 300), 14, 2, 64, 256, dtype=FP16),
    "SmolLM2-135M": Batch((1400, 257, 3), 9, 3, 64, 256, dtype=FP16),
    "heads of 256": Batch((700,), 8, 4, 256, 256, dtype=BF16),
    "fp8_e4m3 cache": Batch((3000, 90), 32, 8, 128, 2048, dtype=BF16, key_dtype=E4M3),
    "fp8_e5m2 cache": Batch((900, 90), 12, 2, 128, 256, dtype=BF16, key_dtype=E5M2),
    "real ties": Batch((5000, 2100), 32, 8, 128, 2048, dtype=BF16, levels=2),
}
"""Shapes that are served, with lengths on both sides of the budget. Few budgets: each compiles."""

SCORED = ("Qwen3-8B", "Qwen3-8B alone", "Qwen3-1.7B", "Qwen2.5-Coder-1.5B")
"""Batches whose dense pass stores scores, all of one dtype and head dimension: nvcc is slow."""

RUN_WIDTH = 9
"""Tokens of a run that is verified by default."""

Check = Callable[[Batch], list[str]]
"""Compares the kernels with the definition on one batch; returns the differences in words."""


def _served_layer_differences(batch: Batch) -> list[str]:
    """Compare the kernels of a decode layer on a GPU where they serve."""
    serves = torch.cuda.get_device_capability() == MEASURED_CAPABILITY
    return decode_layer_differences(batch, "cuda") if serves else []


CHECKS: Mapping[str, Check] = {
    "selection": lambda batch: selection_differences(batch, "cuda"),
    "selection by mass": lambda batch: mass_differences(batch, "cuda"),
    "selection by largest mass": lambda batch: largest_mass_differences(batch, "cuda"),
    "selection by head": lambda batch: head_differences(batch, "cuda"),
    "attention over lists": lambda batch: list_attention_differences(batch, "cuda"),
    "selection by page": lambda batch: page_differences(batch, "cuda"),
    "selection by gate": lambda batch: gate_differences(batch, "cuda"),
    "decode layer": _served_layer_differences,
    "window": lambda batch: window_differences(batch, "cuda"),
    "sparse attention": lambda batch: attention_differences(batch, "cuda"),
    "scoring dense pass": stored_score_differences,
    "attention of runs": lambda batch: run_attention_differences(batch, "cuda", RUN_WIDTH),
}
SCORED_CHECKS = ("scoring dense pass", "attention of runs")
"""Checks of `SCORED` batches only."""

FAILURES = (TritonError, SubprocessError, OSError, RuntimeError)
"""Errors that a compiler, its helper programs, the cache folder and the GPU raise."""


def served_batches(capability: tuple[int, int]) -> dict[str, Batch]:
    """Return the batches whose KV cache is served on a GPU of this capability."""
    return {
        name: batch
        for name, batch in BATCHES.items()
        if not reasons_against_kv_cache(batch.key_dtype or batch.dtype, batch.dtype, capability)
    }


def verify_gpu(checks: Mapping[str, Check] = CHECKS) -> list[str]:
    """Compile every kernel on the current GPU and compare its results with the definition.

    Returns:
        The differences and failures in words; an empty list if all kernels are exact.
    """
    if interpreted():
        return [f"{INTERPRET_VAR} is set: unset it, interpreted kernels prove nothing of a GPU"]
    found = []
    for name, batch in served_batches(torch.cuda.get_device_capability()).items():
        try:
            for check, compare in checks.items():
                if name in SCORED or check not in SCORED_CHECKS:
                    found += [f"{name}: {difference}" for difference in compare(batch)]
        except FAILURES as error:
            logger.debug("the batch %s failed", name, exc_info=True)
            found.append(f"{name}: {_in_words(error)}")
    return found


def _in_words(error: Exception) -> str:
    """Say what went wrong and what to do about it."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU has no memory left: end what else uses it, nvidia-smi lists it"
    if isinstance(error, OutOfResources):
        return (
            f"a kernel takes {error.required} of {error.name}, this GPU has {error.limit}: "
            "use another GPU, and report this line"
        )
    last = (str(error).strip() or "no message").splitlines()[-1]
    return (
        f"a kernel does not compile or run ({type(error).__name__}: {last}): "
        "run `make install` for the pinned versions, and report this line if it stays"
    )
