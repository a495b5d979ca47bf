"""The Triton kernels, compiled, on a GPU: shapes, dtypes, budgets, and lengths that users have."""

import pytest
import torch

from lim_sglang.kernels.launch import interpreted
from lim_sglang.kernels.shortlist import shortlist_capacity
from lim_sglang.kernels.verify import (
    Batch,
    differing_attention,
    differing_lengths,
    differing_pipeline,
    differing_rankings,
    differing_scores,
    differing_scoring,
    differing_sets,
    differing_shortlists,
    full_ranking_rows,
    lost_mass,
    mass_differences,
    shortlist_depths,
)

pytestmark = pytest.mark.gpu

BF16, FP16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn

BATCHES = {
    "qwen3-8b": Batch((32768, 5000, 2048, 2049, 1), 32, 8, 128, 2048, dtype=BF16),
    "coder-1.5b": Batch((900, 513, 100), 12, 2, 128, 512, dtype=BF16),
    "coder-0.5b": Batch((900, 300), 14, 2, 64, 256, dtype=FP16),
    "smollm2": Batch((1400, 257, 3), 9, 3, 64, 256, dtype=FP16),
    "wide-head": Batch((700,), 8, 4, 256, 300, dtype=BF16),
    "fp8-cache": Batch((3000, 90), 32, 8, 128, 1024, dtype=BF16, key_dtype=FP8),
    "group-of-one": Batch((3000, 90), 6, 6, 64, 333, dtype=FP16),
    "group-of-sixteen": Batch((3000, 90), 32, 2, 128, 333, dtype=BF16),
    "budget-4096": Batch((9000,), 32, 8, 128, 4096, dtype=BF16),
    "budget-6144": Batch((9000,), 32, 8, 128, 6144, dtype=BF16),
    "odd-budget": Batch((5001, 777), 32, 8, 128, 777, dtype=BF16),
    "ties": Batch((5000, 2100), 32, 8, 128, 1024, dtype=BF16, spread=2),
    "all-ties": Batch((5000, 2100), 8, 8, 64, 1024, dtype=BF16, spread=1),
    "no-recency": Batch((5000,), 32, 8, 128, 1024, 0.0, dtype=BF16),
    "window-only": Batch((5000,), 32, 8, 128, 1024, 1.0, dtype=BF16),
    "no-sinks": Batch((5000,), 32, 8, 128, 1024, sinks=0, dtype=BF16),
    "budget-of-one": Batch((5000, 2), 4, 2, 64, 1, dtype=FP16),
    "heads-that-agree": Batch((5000, 2100), 8, 2, 64, 1024, dtype=BF16, alike=True),
    "nan-and-infinities": Batch((5000, 2100), 8, 2, 64, 1024, dtype=BF16, odd=True),
    "just-over": Batch((1204, 1040), 8, 2, 64, 1024, dtype=BF16, alike=True),
    "just-over-nan-and-infinities": Batch((1100,), 8, 2, 64, 1024, dtype=BF16, odd=True),
    "f32": Batch((3000,), 8, 2, 64, 512, dtype=F32),
    "sixty-four-rows": Batch(tuple(range(1, 6401, 100)), 16, 8, 128, 512, dtype=BF16),
}


ATTENDED = {
    "a-full-gpu": Batch((2048, *range(1, 2048, 16)), 32, 8, 128, 2048, dtype=BF16),
    # narrow on the 132 processors of an H100
    "narrow-tiles": Batch(tuple(range(1, 512, 4)), 16, 8, 128, 512, dtype=BF16),
    "too-many-for-narrow-tiles": Batch(tuple(range(1, 512, 3)), 16, 8, 128, 512, dtype=BF16),
    "one-long-row": Batch((131072,), 32, 8, 128, 2048, dtype=BF16),
    "heads-of-their-own": Batch((2048, 77), 32, 32, 128, 2048, dtype=BF16),
    "group-of-thirty-two": Batch((2048, 77), 64, 2, 128, 2048, dtype=BF16),
    "wide-head-fp8": Batch((700, 1), 8, 4, 256, 300, dtype=FP16, key_dtype=FP8),
    "fp8_e5m2": Batch((3000, 90), 14, 2, 64, 256, dtype=FP16, key_dtype=torch.float8_e5m2),
}
"""More shapes for attention: as many programs as rows, one row for all of them, any group."""


def test_kernels_are_compiled() -> None:
    assert not interpreted()


@pytest.mark.parametrize("rows", [1, 64, 1024, 3000])
def test_kept_lengths_are_the_reference_s(rows: int) -> None:
    assert not differing_lengths(Batch(tuple(range(1, rows + 1)), budget=300), "cuda")


@pytest.mark.parametrize("name", BATCHES)
def test_scores_are_the_reference_s(name: str) -> None:
    assert not differing_scores(BATCHES[name], "cuda")


@pytest.mark.parametrize("name", BATCHES)
def test_a_shortlist_is_the_beginning_of_the_reference_s_ranking(name: str) -> None:
    assert not differing_shortlists(BATCHES[name], "cuda")


@pytest.mark.parametrize(
    ("name", "at_once"),
    [("qwen3-8b", [3]), ("smollm2", []), ("coder-1.5b", [1]), ("wide-head", [])],
)
def test_shortlists_decide_where_heads_differ(name: str, at_once: list[int]) -> None:
    """But for rows just over the budget, all of whose candidates are sorted at once."""
    assert full_ranking_rows(BATCHES[name], "cuda") == (at_once, len(at_once))


@pytest.mark.parametrize("length", [641, 700, 1023, 1501, 2111])
def test_a_whole_sample_fills_a_shortlist(length: int) -> None:
    """However a GPU rounds: no deeper threshold can be had from all candidates."""
    batch = Batch((length,), 12, 2, 64, 512, dtype=BF16)
    assert (
        min(shortlist_depths(batch, "cuda")) >= shortlist_capacity(batch.budget_split.selected) - 1
    )


@pytest.mark.parametrize("name", ["heads-that-agree", "all-ties"])
def test_shortlists_do_not_decide_what_they_cannot_know(name: str) -> None:
    sparse = BATCHES[name].sparse
    assert full_ranking_rows(BATCHES[name], "cuda") == (sparse, len(sparse))


@pytest.mark.parametrize("name", BATCHES)
def test_a_whole_ranking_is_exactly_the_reference_s(name: str) -> None:
    assert not differing_rankings(BATCHES[name], "cuda")


@pytest.mark.parametrize("name", BATCHES)
def test_the_set_is_exactly_the_reference_s(name: str) -> None:
    assert not differing_sets(BATCHES[name], "cuda")


@pytest.mark.parametrize("max_rows", [1, 5, 64])
@pytest.mark.parametrize("name", ["qwen3-8b", "smollm2", "sixty-four-rows"])
def test_chunks_of_rows_change_nothing(name: str, max_rows: int) -> None:
    assert not differing_pipeline(BATCHES[name], "cuda", max_rows)


@pytest.mark.parametrize("name", ["qwen3-8b", "coder-1.5b", "group-of-sixteen", "fp8-cache"])
def test_kept_mass_is_the_reference_s(name: str) -> None:
    assert lost_mass(BATCHES[name], "cuda") <= 1e-3


@pytest.mark.parametrize("name", BATCHES)
def test_selection_by_mass_is_exactly_the_reference_s(name: str) -> None:
    assert not mass_differences(BATCHES[name], "cuda")


@pytest.mark.parametrize("name", [*BATCHES, *ATTENDED])
def test_attention_over_slots_is_the_reference_s(name: str) -> None:
    assert not differing_attention((BATCHES | ATTENDED)[name], "cuda")


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3-8b", "coder-1.5b", "group-of-sixteen", "sixty-four-rows"),
        *("smollm2", "coder-0.5b", "group-of-one", "wide-head"),
    ],
)
def test_the_dense_pass_stores_the_reference_s_scores(name: str) -> None:
    assert not differing_scoring(BATCHES[name])


@pytest.mark.parametrize("length", [300, 2049, 16385, 32768, 65537])
def test_a_lone_rows_chunks_store_no_others_scores(length: int) -> None:
    assert not differing_scoring(Batch((length,), 32, 8, 128, 256, dtype=BF16))


@pytest.mark.parametrize("length", [3000, 8192, 32768, 131072])
def test_shortlists_of_32_heads_decide_at_any_length(length: int) -> None:
    batch = Batch((length, length), 32, 8, 128, 2048, dtype=BF16)
    assert full_ranking_rows(batch, "cuda") == ([], 0)
