"""The Triton kernels, interpreted on the CPU: indexing, masks, order, fp32 and fp16 arithmetic."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from lim_sglang.kernels import sparse_attention
from lim_sglang.kernels.compact import count_kept
from lim_sglang.kernels.full_ranking import _rank
from lim_sglang.kernels.launch import NARROW_TILE, NEEDS_FULL_RANKING, attend_block, interpreted
from lim_sglang.kernels.reference import attend_tokens as attend_by_definition
from lim_sglang.kernels.reference import score_tokens
from lim_sglang.kernels.shortlist import shortlist_capacity
from lim_sglang.kernels.sparse_attention import (
    INTERPRETED_PROCESSORS,
    SplitWorkspace,
    attend_tokens,
)
from lim_sglang.kernels.verify import (
    Batch,
    differing_attention,
    differing_compaction,
    differing_lengths,
    differing_pipeline,
    differing_rankings,
    differing_scores,
    differing_sets,
    differing_shortlists,
    draw,
    full_ranking_rows,
    mass_differences,
    prepared_selector,
    shortlist_depths,
)

BATCHES = {
    "one-over-the-budget": Batch((513,), 6, 2, 64, 512),
    "just-over-ties": Batch((410,), heads=3, kv_heads=1, budget=400, spread=1),
    "just-over-heads-that-agree": Batch((430,), heads=3, kv_heads=1, budget=400, alike=True),
    "just-over-nan-and-infinities": Batch((420,), heads=3, kv_heads=1, budget=400, odd=True),
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
    assert full_ranking_rows(BATCHES[name], "cpu") == ([], 0)


@pytest.mark.parametrize("length", [641, 1500])
def test_a_whole_sample_fills_a_shortlist(length: int) -> None:
    batch = Batch((length,), 6, 2, 64, 512)
    assert (
        min(shortlist_depths(batch, "cpu")) >= shortlist_capacity(batch.budget_split.selected) - 1
    )


@pytest.mark.parametrize(("length", "is_tried"), [(513, False), (640, False), (641, True)], ids=str)
def test_rows_just_over_the_budget_are_left_to_be_sorted_at_once(
    length: int, is_tried: bool
) -> None:
    batch = Batch((length,), 6, 2, 64, 512)  # 128 sinks and newest tokens
    assert [depth > 0 for depth in shortlist_depths(batch, "cpu")] == [is_tried] * 6
    assert full_ranking_rows(batch, "cpu") == (([], 0) if is_tried else ([0], 1))


@pytest.mark.parametrize("name", ["heads-that-agree", "too-many-ties-for-a-shortlist"])
def test_shortlists_do_not_decide_what_they_cannot_know(name: str) -> None:
    sparse = BATCHES[name].sparse
    assert full_ranking_rows(BATCHES[name], "cpu") == (sparse, len(sparse))


def test_no_row_is_decided_without_all_of_its_heads() -> None:
    batch = Batch((1500,), heads=6, kv_heads=2, budget=400)
    tensors = draw(batch, "cpu")
    tensors.scores[0, 0] = 0.0  # one head cannot choose, and the others have enough tokens
    selector = prepared_selector(batch, tensors, "cpu")
    selector.shortlist(tensors.indptr)
    assert (selector.depth[0] > 0).tolist() == [False, True, True, True, True, True]
    assert selector.last_turn.tolist() == [NEEDS_FULL_RANKING]
    selector.rank(tensors.indptr)  # goes on from the turns that five heads have noted
    assert not differing_compaction(batch, tensors, selector)


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


@pytest.mark.parametrize("name", [*BATCHES, "fp8-cache"])
def test_attention_over_slots_is_the_reference_s(name: str) -> None:
    fp8 = Batch((90, 20), key_dtype=torch.float8_e5m2)
    assert not differing_attention(BATCHES.get(name, fp8), "cpu")


def test_attention_with_narrow_tiles_is_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(*arguments: Any) -> int:
        chosen.append(attend_block(*arguments))
        return chosen[-1]

    monkeypatch.setattr(sparse_attention, "attend_block", choose)
    monkeypatch.setattr(sparse_attention, "INTERPRETED_PROCESSORS", 8)
    rows = tuple(range(1, 145, 12))  # times 4 KV heads: 6 programs a processor
    assert not differing_attention(Batch(rows, heads=4, kv_heads=4, budget=90), "cpu")
    assert set(chosen) == {NARROW_TILE.elements // 64}


def allocated(num_programs: int) -> SplitWorkspace:
    """Memory that so many programs share, for 4 heads of 2 KV heads of 64 dimensions."""
    return SplitWorkspace(
        torch.zeros(num_programs, 16, 64),
        torch.zeros(num_programs, 16),
        torch.zeros(num_programs, dtype=torch.int32),
        processors=num_programs // 2,
    )


def test_narrow_numbers_get_more_programs() -> None:
    shape = {"num_heads": 12, "num_kv_heads": 2, "dim": 128}
    for dtype, per_processor in ((torch.bfloat16, 2), (torch.float8_e4m3fn, 4), (torch.float32, 1)):
        sparse_attention = SplitWorkspace.allocate(**shape, cache_dtype=dtype, device="cpu")
        assert sparse_attention.outputs.shape == (INTERPRETED_PROCESSORS * per_processor, 16, 128)
        assert (
            len(sparse_attention.lse)
            == len(sparse_attention.block_counters)
            == len(sparse_attention.outputs)
        )


@pytest.mark.parametrize(
    ("units", "longest", "count"),
    [
        *((1, 2048, 16), (8, 2048, 16), (32, 2048, 8), (64, 2048, 4)),
        *((264, 2048, 1), (999, 2048, 1), (8, 64, 1), (8, 65, 2), (8, 1, 1)),
    ],
)
def test_as_many_programs_share_a_row_as_run_at_once(units: int, longest: int, count: int) -> None:
    assert allocated(264).count_for(units, longest) == count


@pytest.mark.parametrize(
    ("dim", "group", "cache_bytes", "per_processor", "block"),
    [
        *((128, 4, 2, 2, 64), (128, 4, 2, 5, 64), (128, 4, 2, 5.1, 32), (128, 4, 2, 8, 32)),
        *((128, 4, 2, 8.1, 64), (128, 8, 2, 7, 64), (128, 4, 1, 7, 64), (128, 4, 4, 7, 64)),
        *((64, 7, 2, 7, 64), (64, 7, 2, 2, 128), (256, 2, 2, 7, 32), (512, 1, 2, 7, 16)),
    ],
)
def test_tiles_are_narrow_where_only_so_all_programs_run_at_once(
    dim: int, group: int, cache_bytes: int, per_processor: float, block: int
) -> None:
    assert attend_block(dim, group, cache_bytes, per_processor) == block


def attended(lengths: list[int], *, soft_cap: float = 0.0, longest: int = 256) -> torch.Tensor:
    """[B, 4, 64] f32 over slots in order, and the reference's."""
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(shape, generator=generator)
        for shape in ((len(lengths), 4, 64), (700, 2, 64), (700, 2, 64))
    )
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.randperm(700, generator=generator).int()
    found = attend_tokens(
        *(query, keys, values, slots, indptr),
        longest=longest,
        scale=0.5,
        soft_cap=soft_cap,
        sparse_attention=allocated(16),
        out=torch.full_like(query, torch.nan),
    )
    wanted = []
    for row, (first, last) in enumerate(pairwise(indptr.tolist())):
        kept = slots[first:last].long()
        if soft_cap:
            scores = 0.5 * score_tokens(query[row], keys[kept])
            weights = (soft_cap * torch.tanh(scores / soft_cap)).softmax(-1)
            grouped = weights.view(2, 2, -1) @ values[kept].transpose(0, 1)
            wanted.append(grouped.reshape(4, 64))
        elif first < last:
            wanted.append(attend_by_definition(query[row], keys, values, kept, 0.5))
        else:
            wanted.append(torch.zeros(4, 64))
    return torch.stack([found, torch.stack(wanted)])


def test_scores_may_be_capped() -> None:
    found, wanted = attended([200, 33], soft_cap=1.5)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, attended([200, 33])[0], atol=1e-2)


@pytest.mark.parametrize("longest", [1, 256])
def test_a_row_without_tokens_gives_zeros_and_disturbs_no_other(longest: int) -> None:
    found, wanted = attended([3, 0, 150], longest=longest)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": torch.zeros(9, 2, 32)}, "multiple of KV heads"),
        ({"keys": torch.zeros(9, 3, 64), "values": torch.zeros(9, 3, 64)}, "multiple of KV heads"),
        ({"out": torch.zeros(2, 4, 64)}, "out must be torch.float32 of shape"),
        ({"out": torch.zeros(1, 4, 64).half()}, "out must be torch.float32 of shape"),
        ({"indptr": torch.tensor([0, 4, 9]).int()}, "indptr must have 2 numbers, not 3"),
        ({"slots": torch.arange(9)}, "slots must be int32"),
        (
            {"query": torch.zeros(1, 4, 32), "keys": torch.zeros(9, 2, 32)}
            | {"values": torch.zeros(9, 2, 32), "out": torch.zeros(1, 4, 32)},
            r"parts are for \(16, 64\) padded heads and dims, not \(16, 32\)",
        ),
    ],
)
def test_what_would_be_read_out_of_bounds_is_refused(
    changed: dict[str, torch.Tensor], words: str
) -> None:
    cache, row = torch.zeros(9, 2, 64), torch.zeros(1, 4, 64)
    tensors = {"query": row, "keys": cache, "values": cache, "out": row.clone()}
    tensors |= {"slots": torch.arange(9).int(), "indptr": torch.tensor([0, 9]).int()}
    with pytest.raises(ValueError, match=words):
        attend_tokens(**(tensors | changed), longest=9, scale=1.0, sparse_attention=allocated(4))


def test_lengths_for_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="out must have 3 numbers, not 5"):
        count_kept(torch.tensor([4, 5]), 3, torch.zeros(5, dtype=torch.int32))
