"""Ranks that share the query heads keep the set of all heads, each of them the same."""

from dataclasses import replace

import pytest

from lim_sglang.kernels.verify import Batch
from lim_sglang.kernels.verify_exchange import mass_exchange_differences, turn_exchange_differences
from tests.kernels.batches import COMPILED_HERE, LARGE, SMALL, on_both, some

SHARED = {
    name: replace(batch, heads=8, kv_heads=8 if batch.kv_heads > 1 else 1)
    for name, batch in SMALL.items()
}
"""Small batches with heads for 2, 4 and 8 ranks."""
LARGE_SHARED = {name: batch for name, batch in LARGE.items() if batch.heads % 8 == 0}


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@on_both({}, LARGE_SHARED)
def test_ranks_keep_the_set_of_all_heads(batch: Batch, device: str, num_ranks: int) -> None:
    assert not turn_exchange_differences(batch, device, num_ranks)


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("mixed-lengths", 1),
        ("mixed-lengths", 8),
        ("ties", 4),
        ("few-values-of-either-sign", 2),
        ("no-recency", 2),
        ("window-only", 2),
        ("no-sinks", 4),
        ("budget-of-one", 8),
        ("longer-than-a-block", 2),
        ("ties-in-two-blocks", 2),
        ("heads-that-agree", 8),
        ("nan-and-infinities", 2),
        ("just-over-nan-and-infinities", 4),
    ],
)
@COMPILED_HERE
def test_few_ranks_keep_the_set_of_all_heads(name: str, num_ranks: int) -> None:
    assert not turn_exchange_differences(SHARED[name], "cpu", num_ranks)


@pytest.mark.parametrize("num_ranks", [3])
@on_both(some(SMALL, "odd-heads"), some(LARGE, "smollm2"))
def test_ranks_of_odd_heads_keep_the_set_of_all(batch: Batch, device: str, num_ranks: int) -> None:
    assert not turn_exchange_differences(batch, device, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("by_largest", [False, True])
@on_both(some(SHARED, "mixed-lengths", "ties"), some(LARGE, "qwen3-8b", "many-rows"))
def test_ranks_add_up_or_compare_masses(
    batch: Batch, device: str, by_largest: bool, num_ranks: int
) -> None:
    batch = replace(batch, by_largest=by_largest)
    assert not mass_exchange_differences(batch, device, num_ranks)
