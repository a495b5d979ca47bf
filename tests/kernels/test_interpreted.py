"""The Triton kernels, interpreted on the CPU: indexing, masks, order, fp32 and fp16 arithmetic."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from lim_sglang.kernels.check import (
    Batch,
    differing_lengths,
    differing_pipeline,
    differing_rankings,
    differing_scores,
    differing_sets,
    differing_shortlists,
    undecided_rows,
)
from lim_sglang.kernels.check_mass import mass_differences
from lim_sglang.kernels.launch import interpreted
from lim_sglang.kernels.rank import _rank

BATCHES = {
    "mixed-lengths": Batch((5, 33, 200, 32, 1)),
    "odd-heads": Batch((90, 1, 140), heads=9, kv_heads=3, budget=37),
    "one-kv-head": Batch((70,), heads=16, kv_heads=1, budget=40),
    "no-groups": Batch((60, 50), heads=6, kv_heads=6, budget=40),
    "ties": Batch((120, 80), budget=41, spread=2),
    "few-values-of-either-sign": Batch((60,), budget=24, spread=1),
    "no-recency": Batch((80,), recent_ratio=0.0),
    "window-only": Batch((80,), recent_ratio=1.0),
    "no-sinks": Batch((80,), sinks=0),
    "budget-of-one": Batch((9, 1), budget=1),
    "budget-of-two": Batch((9, 70), budget=2, sinks=0),
    "more-heads-than-selected": Batch((70,), heads=32, kv_heads=8, budget=16),
    "longer-than-a-block": Batch((2600, 40), heads=2, kv_heads=1, budget=50, spread=9),
    "newest-in-two-blocks": Batch((2060, 2100), heads=2, kv_heads=1, budget=600, spread=9),
    "f32": Batch((100,), dtype=torch.float32),
    "bf16": Batch((100,), dtype=torch.bfloat16),
    "heads-that-agree": Batch((1900, 700), heads=4, budget=700, alike=True),
    "as-long-as-a-shortlist": Batch((1700,), heads=3, kv_heads=1, budget=1000),
    "too-many-ties-for-a-shortlist": Batch((1900, 1500), heads=2, kv_heads=1, budget=400, spread=1),
    "nan-and-infinities": Batch((300, 90), budget=80, odd=True),
    "more-than-a-sample": Batch((5000,), heads=8, budget=300),
    "wide-head": Batch((70,), dim=256),
}


def test_kernels_are_interpreted() -> None:
    assert interpreted()
    assert isinstance(_rank, InterpretedFunction)


@pytest.mark.parametrize("lengths", [(5, 33, 200, 32, 1), (7,), tuple(range(1, 2051))])
def test_kept_lengths_are_the_reference_s(lengths: tuple[int, ...]) -> None:
    assert not differing_lengths(Batch(lengths), "cpu")


@pytest.mark.parametrize("name", BATCHES)
def test_scores_are_the_reference_s(name: str) -> None:
    assert not differing_scores(BATCHES[name], "cpu")


@pytest.mark.parametrize("name", BATCHES)
def test_a_shortlist_is_the_beginning_of_the_reference_s_ranking(name: str) -> None:
    assert not differing_shortlists(BATCHES[name], "cpu")


@pytest.mark.parametrize("name", ["mixed-lengths", "odd-heads", "more-than-a-sample"])
def test_shortlists_decide_where_heads_differ(name: str) -> None:
    assert undecided_rows(BATCHES[name], "cpu") == ([], 0)


@pytest.mark.parametrize("name", ["heads-that-agree", "too-many-ties-for-a-shortlist"])
def test_shortlists_do_not_decide_what_they_cannot_know(name: str) -> None:
    sparse = BATCHES[name].sparse
    assert undecided_rows(BATCHES[name], "cpu") == (sparse, len(sparse))


@pytest.mark.parametrize("name", BATCHES)
def test_a_whole_ranking_is_exactly_the_reference_s(name: str) -> None:
    assert not differing_rankings(BATCHES[name], "cpu")


@pytest.mark.parametrize("name", BATCHES)
def test_the_set_is_exactly_the_reference_s(name: str) -> None:
    assert not differing_sets(BATCHES[name], "cpu")


@pytest.mark.parametrize("max_rows", [1, 2, 8])
def test_chunks_of_rows_change_nothing(max_rows: int) -> None:
    assert not differing_pipeline(BATCHES["mixed-lengths"], "cpu", max_rows)


@pytest.mark.parametrize("name", BATCHES)
def test_selection_by_mass_is_exactly_the_reference_s(name: str) -> None:
    assert not mass_differences(BATCHES[name], "cpu")
