"""Shortlists: the beginning of each head's ranking, and the rows that they decide."""

import pytest

from lim_sglang.kernels.launch import NEEDS_FULL_RANKING
from lim_sglang.kernels.selector import RankSelector
from lim_sglang.kernels.shortlist import shortlist_capacity
from lim_sglang.kernels.verify import (
    Batch,
    compaction_differences,
    random_step,
    scored_selector,
    shortlist_differences,
)
from tests.kernels.batches import BF16, LARGE, SMALL, on_both, some


def shortlist_depths(batch: Batch, device: str) -> list[int]:
    """Return the ranks that each head of each row has in its shortlist."""
    step = random_step(batch, device)
    selector = scored_selector(RankSelector, batch, step)
    selector.shortlist(step.slots.indptr)
    return [int(depth) for depth in selector.buffers.depth.flatten()]


def rows_left_open(batch: Batch, device: str) -> list[int]:
    """Return the rows over the budget that shortlists leave open; check the counter of rows."""
    step = random_step(batch, device)
    selector = scored_selector(RankSelector, batch, step)
    selector.shortlist(step.slots.indptr)
    last_turn = selector.buffers.last_turn.tolist()
    rows = [row for row in batch.rows_over_budget if last_turn[row] == NEEDS_FULL_RANKING]
    selector.rank_fully(step.slots.indptr)
    assert selector.counts() == {"rows_fully_ranked": len(rows)}
    return rows


@on_both()
def test_a_shortlist_is_the_beginning_of_the_reference_s_ranking(batch: Batch, device: str) -> None:
    assert not shortlist_differences(batch, device)


@on_both(
    some(SMALL, "mixed-lengths", "odd-heads", "more-than-a-sample"),
    some(LARGE, "smollm2", "wide-head"),
)
def test_shortlists_decide_where_heads_differ(batch: Batch, device: str) -> None:
    assert rows_left_open(batch, device) == []


@on_both({}, some(LARGE, "qwen3-8b", "coder-1.5b"))
def test_shortlists_decide_all_rows_but_those_just_over_the_budget(
    batch: Batch, device: str
) -> None:
    just_over = [row for row, n in enumerate(batch.lengths) if n == batch.budget + 1]
    assert rows_left_open(batch, device) == just_over


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [256, 2048, 6144])
@pytest.mark.parametrize("length", [8192, 32768, 65536, 131072, 300_000, 1_000_000])
def test_shortlists_of_32_heads_decide_at_any_length(length: int, budget: int) -> None:
    batch = Batch((length,), 32, 8, 128, budget, dtype=BF16)
    assert rows_left_open(batch, "cuda") == []


@pytest.mark.parametrize("lengths", [(66_000, 20_000, 1500, 641), (131_700,)], ids=str)
def test_thresholds_of_long_rows_are_raised_among_denser_samples(lengths: tuple[int, ...]) -> None:
    batch = Batch(lengths, heads=2, kv_heads=1, budget=300)
    assert not shortlist_differences(batch, "cpu")
    capacity = shortlist_capacity(batch.budget_split.selected)
    assert min(shortlist_depths(batch, "cpu")) > capacity // 3
    assert rows_left_open(batch, "cpu") == []


@on_both(
    some(SMALL, "heads-that-agree", "too-many-ties-for-a-shortlist"),
    some(LARGE, "heads-that-agree", "all-ties"),
)
def test_shortlists_leave_open_what_they_cannot_decide(batch: Batch, device: str) -> None:
    assert rows_left_open(batch, device) == batch.rows_over_budget


@on_both(
    {str(n): Batch((n,), 6, 2, 64, 512) for n in (641, 1500)},
    {str(n): Batch((n,), 12, 2, 64, 512, dtype=BF16) for n in (641, 700, 1023, 1501, 2111)},
)
def test_a_complete_sample_fills_a_shortlist(batch: Batch, device: str) -> None:
    """The threshold of no deeper rank is possible, whatever the rounding of a GPU."""
    capacity = shortlist_capacity(batch.budget_split.selected)
    assert min(shortlist_depths(batch, device)) >= capacity - 1


@pytest.mark.parametrize(
    ("budget", "length", "is_tried"),
    [
        # 128 sinks and recent tokens, 384 selected: a power of two is a third over them.
        *((512, 513, False), (512, 640, False), (512, 641, True)),
        # 175 and 525, whose next power of two is nearly twice as many.
        *((700, 701, False), (700, 875, False), (700, 876, True), (700, 1100, True)),
    ],
    ids=str,
)
def test_rows_just_over_the_budget_are_left_to_be_sorted_at_once(
    budget: int, length: int, is_tried: bool
) -> None:
    batch = Batch((length,), 6, 2, 64, budget)
    assert [depth > 0 for depth in shortlist_depths(batch, "cpu")] == [is_tried] * 6
    assert rows_left_open(batch, "cpu") == ([] if is_tried else [0])


def test_no_row_is_decided_without_all_of_its_heads() -> None:
    batch = Batch((1500,), heads=6, kv_heads=2, budget=400)
    step = random_step(batch, "cpu")
    step.scores[0, 0] = 0.0  # one head has only ties, and the others have enough tokens
    selector = scored_selector(RankSelector, batch, step)
    selector.shortlist(step.slots.indptr)
    assert (selector.buffers.depth[0] > 0).tolist() == [False, True, True, True, True, True]
    assert selector.buffers.last_turn.tolist() == [NEEDS_FULL_RANKING]
    selector.rank_fully(step.slots.indptr)  # goes on from the turns that five heads have recorded
    assert not compaction_differences(batch, step, selector)
