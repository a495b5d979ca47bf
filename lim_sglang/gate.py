"""Exactness before anything else: no time is shown for a GPU whose kernels differ."""

import torch

from lim_sglang.kernels.check import Batch, differences

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn

BATCHES = {
    "Qwen3-8B": Batch((8192, 2049, 2048, 1), 32, 8, 128, 2048, dtype=BF16),
    "Qwen2.5-Coder-1.5B": Batch((900, 513, 100), 12, 2, 128, 512, dtype=BF16),
    "Qwen2.5-Coder-0.5B": Batch((900, 300), 14, 2, 64, 256, dtype=FP16),
    "SmolLM2-135M": Batch((1400, 257, 3), 9, 3, 64, 256, dtype=FP16),
    "heads of 256": Batch((700,), 8, 4, 256, 300, dtype=BF16),
    "fp8 cache": Batch((3000, 90), 32, 8, 128, 1024, dtype=BF16, key_dtype=FP8),
    "real ties": Batch((5000, 2100), 32, 8, 128, 1024, dtype=BF16, spread=2),
}
"""Shapes that are served, with lengths on both sides of the budget."""


def check_gpu() -> list[str]:
    """Compile every selection kernel on the current GPU and compare it with the definition.

    Returns:
        What differs, in words; nothing where all is exact.
    """
    capability = torch.cuda.get_device_capability()
    found = []
    for name, batch in BATCHES.items():
        if batch.key_dtype is FP8 and capability < (8, 9):
            continue  # SGLang offers no fp8 cache there
        found += [f"{name}: {difference}" for difference in differences(batch, "cuda")]
    return found
