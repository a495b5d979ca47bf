"""Batches that every kernel test runs on: small ones interpreted on a CPU, large ones on a GPU."""

import pytest
import torch

from lim_sglang.kernels.verify import Batch

COMPILED_HERE = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
)
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

SMALL = {
    "one-over-the-budget": Batch((513,), 6, 2, 64, 512),
    "just-over-ties": Batch((410,), heads=3, kv_heads=1, budget=400, levels=1),
    "just-over-heads-that-agree": Batch((430,), 3, 1, budget=400, heads_agree=True),
    "just-over-nan-and-infinities": Batch((420,), 3, 1, budget=400, non_finite=True),
    "mixed-lengths": Batch((5, 33, 200, 32, 1)),
    "odd-heads": Batch((90, 1, 140), heads=9, kv_heads=3, budget=37),
    "one-kv-head": Batch((70,), heads=16, kv_heads=1, budget=40),
    "no-groups": Batch((60, 50), heads=6, kv_heads=6, budget=40),
    "ties": Batch((120, 80), budget=41, levels=2),
    "few-values-of-either-sign": Batch((60,), budget=24, levels=1),
    "no-recency": Batch((80,), recent_ratio=0.0),
    "window-only": Batch((80,), recent_ratio=1.0),
    "no-sinks": Batch((80,), sinks=0),
    "budget-of-one": Batch((9, 1), budget=1),
    "budget-of-two": Batch((9, 70), budget=2, sinks=0),
    "more-heads-than-selected": Batch((70,), heads=33, kv_heads=11, budget=16),
    "longer-than-a-block": Batch((2600, 40), heads=2, kv_heads=1, budget=50, levels=9),
    "newest-in-two-blocks": Batch((2060, 2100), heads=2, kv_heads=1, budget=600, levels=9),
    "ties-in-two-blocks": Batch((2600,), heads=2, kv_heads=1, budget=500, levels=9),
    "f32": Batch((100,), dtype=F32),
    "bf16": Batch((100,), dtype=BF16),
    "heads-that-agree": Batch((1900, 700), heads=4, budget=700, heads_agree=True),
    "as-long-as-a-shortlist": Batch((1700,), heads=3, kv_heads=1, budget=1000),
    "too-many-ties-for-a-shortlist": Batch((1900, 1500), 2, 1, budget=400, levels=1),
    "nan-and-infinities": Batch((300, 90), budget=80, non_finite=True),
    "more-than-a-sample": Batch((5000,), heads=8, budget=300),
    "wide-head": Batch((70,), dim=256),
    "fp8-cache": Batch((90, 20), key_dtype=E5M2),
}


def some(batches: dict[str, Batch], *names: str) -> dict[str, Batch]:
    """Return the batches of these names."""
    return {name: batches[name] for name in names}


SMALL_SHAPES = some(
    SMALL,
    "mixed-lengths",
    "odd-heads",
    "one-kv-head",
    "no-groups",
    "more-heads-than-selected",
    "budget-of-one",
    "longer-than-a-block",
    "f32",
    "bf16",
    "wide-head",
    "fp8-cache",
)
"""Small batches that differ in lengths, heads or dtypes: scores and attention see nothing else."""

LARGE = {
    "qwen3-8b": Batch((32768, 5000, 2048, 2049, 1), 32, 8, 128, 2048, dtype=BF16),
    "coder-1.5b": Batch((900, 513, 100), 12, 2, 128, 512, dtype=BF16),
    "coder-0.5b": Batch((900, 300), 14, 2, 64, 256, dtype=FP16),
    "smollm2": Batch((1400, 257, 3), 9, 3, 64, 256, dtype=FP16),
    "wide-head": Batch((700,), 8, 4, 256, 300, dtype=BF16),
    "fp8-cache": Batch((3000, 90), 32, 8, 128, 1024, dtype=BF16, key_dtype=E4M3),
    "group-of-one": Batch((3000, 90), 6, 6, 64, 333, dtype=FP16),
    "group-of-sixteen": Batch((3000, 90), 32, 2, 128, 333, dtype=BF16),
    "qwen3-14b": Batch((40000, 2600, 2100), 40, 8, 128, 2048, dtype=BF16),
    "qwen3-32b": Batch((3000, 90), 64, 8, 128, 2048, dtype=BF16),
    "group-of-twelve": Batch((3000, 90), 24, 2, 128, 333, dtype=BF16),
    "long": Batch((300_000,), 12, 2, 128, 2048, dtype=BF16),
    "budget-4096": Batch((9000,), 32, 8, 128, 4096, dtype=BF16),
    "budget-6144": Batch((9000,), 32, 8, 128, 6144, dtype=BF16),
    "odd-budget": Batch((5001, 777), 32, 8, 128, 777, dtype=BF16),
    "ties": Batch((5000, 2100), 32, 8, 128, 1024, dtype=BF16, levels=2),
    "all-ties": Batch((5000, 2100), 8, 8, 64, 1024, dtype=BF16, levels=1),
    "no-recency": Batch((5000,), 32, 8, 128, 1024, 0.0, dtype=BF16),
    "window-only": Batch((5000,), 32, 8, 128, 1024, 1.0, dtype=BF16),
    "no-sinks": Batch((5000,), 32, 8, 128, 1024, sinks=0, dtype=BF16),
    "budget-of-one": Batch((5000, 2), 4, 2, 64, 1, dtype=FP16),
    "heads-that-agree": Batch((5000, 2100), 8, 2, 64, 1024, dtype=BF16, heads_agree=True),
    "nan-and-infinities": Batch((5000, 2100), 8, 2, 64, 1024, dtype=BF16, non_finite=True),
    "just-over": Batch((1204, 1040), 8, 2, 64, 1024, dtype=BF16, heads_agree=True),
    "just-over-nan-and-infinities": Batch((1100,), 8, 2, 64, 1024, dtype=BF16, non_finite=True),
    "f32": Batch((3000,), 8, 2, 64, 512, dtype=F32),
    "many-rows": Batch(tuple(range(1, 6401, 50)), 16, 8, 128, 512, dtype=BF16),
}


DEVICES = (
    pytest.param("cpu", marks=COMPILED_HERE),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
"""Where a kernel runs: interpreted on a CPU, or on a GPU."""


def on_both(
    small: dict[str, Batch] = SMALL, large: dict[str, Batch] = LARGE
) -> pytest.MarkDecorator:
    """Run a test with (batch, device): small batches interpreted on a CPU, large ones on a GPU."""
    return pytest.mark.parametrize(
        ("batch", "device"),
        [
            *(pytest.param(b, "cpu", id=f"{n}-cpu", marks=COMPILED_HERE) for n, b in small.items()),
            *(pytest.param(b, "cuda", id=n, marks=pytest.mark.gpu) for n, b in large.items()),
        ],
    )
