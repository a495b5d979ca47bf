"""Attention over a list of slots."""

from typing import Any

import pytest
import torch

from lim_sglang.kernels import sparse_attention
from lim_sglang.kernels.launch import NARROW_TILE, attend_block
from lim_sglang.kernels.reference import attend_tokens as attend_by_definition
from lim_sglang.kernels.reference import score_tokens
from lim_sglang.kernels.sparse_attention import INTERPRETED_SMS, SplitWorkspace, attend_tokens
from lim_sglang.kernels.verify import Batch
from lim_sglang.kernels.verify_attention import attention_differences, list_attention_differences
from tests.kernels.batches import BF16, E4M3, E5M2, FP16, LARGE, SMALL_SHAPES, on_both, some

ATTENDED = {
    "a-full-gpu": Batch((2048, *range(1, 2048, 16)), 32, 8, 128, 2048, dtype=BF16),
    # Narrow tiles on the 132 SMs of an H100.
    "narrow-tiles": Batch(tuple(range(1, 512, 4)), 16, 8, 128, 512, dtype=BF16),
    "too-many-for-narrow-tiles": Batch(tuple(range(1, 512, 3)), 16, 8, 128, 512, dtype=BF16),
    "one-long-row": Batch((131072,), 32, 8, 128, 2048, dtype=BF16),
    "heads-of-their-own": Batch((2048, 77), 32, 32, 128, 2048, dtype=BF16),
    "group-of-thirty-two": Batch((2048, 77), 64, 2, 128, 2048, dtype=BF16),
    "wide-head-fp8": Batch((700, 1), 8, 4, 256, 300, dtype=FP16, key_dtype=E4M3),
    "fp8_e5m2": Batch((3000, 90), 14, 2, 64, 256, dtype=FP16, key_dtype=E5M2),
}
"""More shapes on a GPU: as many programs as rows, one row for all of them, any group."""


@on_both(SMALL_SHAPES, LARGE | ATTENDED)
def test_attention_over_slots_is_the_reference_s(batch: Batch, device: str) -> None:
    assert not attention_differences(batch, device)


@on_both(some(SMALL_SHAPES, "mixed-lengths", "no-groups"), LARGE | ATTENDED)
def test_attention_over_lists_of_some_heads_is_the_reference_s(batch: Batch, device: str) -> None:
    assert not list_attention_differences(batch, device)


@pytest.mark.parametrize("lists", [3, 5])
def test_lists_for_other_heads_are_refused(lists: int) -> None:
    query, cache = torch.zeros(1, 4, 64), torch.zeros(9, 2, 64)
    slots = torch.zeros(lists, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"2 for KV heads or 4 for query heads, not {lists}"):
        attend_tokens(
            *(query, cache, cache, slots, torch.tensor([0]).int(), torch.tensor([9]).int()),
            longest=9,
            scale=1.0,
            workspace=workspace(4),
            out=torch.zeros_like(query),
        )


def test_attention_with_narrow_tiles_is_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(*arguments: Any) -> int:
        chosen.append(attend_block(*arguments))
        return chosen[-1]

    monkeypatch.setattr(sparse_attention, "attend_block", choose)
    monkeypatch.setattr(sparse_attention, "INTERPRETED_SMS", 2)
    batch = Batch((1, 65, 129), heads=4, kv_heads=4, budget=90)
    assert not attention_differences(batch, "cpu")  # 12 programs: 6 per SM
    assert set(chosen) == {NARROW_TILE.elements // 64}


def workspace(num_programs: int) -> SplitWorkspace:
    """Allocate for this many programs, 4 heads of 2 KV heads and 64 dimensions."""
    return SplitWorkspace(
        torch.zeros(num_programs, 16, 64),
        torch.zeros(num_programs, 16),
        torch.zeros(num_programs, dtype=torch.int32),
        num_sms=num_programs // 4,
        programs_in_rounds=num_programs // 2,
    )


@pytest.mark.parametrize(
    ("dtype", "few"), [(torch.bfloat16, 2), (torch.float8_e4m3fn, 4), (torch.float32, 1)]
)
def test_caches_of_fewer_bytes_get_more_programs(dtype: torch.dtype, few: int) -> None:
    allocated = SplitWorkspace.allocate(
        num_heads=12, num_units=2, dim=128, cache_dtype=dtype, device="cpu"
    )
    programs = INTERPRETED_SMS * 4
    assert allocated.outputs.shape == (programs, 16, 128)
    assert len(allocated.lse) == len(allocated.block_counters) == programs
    assert allocated.programs_in_rounds == INTERPRETED_SMS * few


@pytest.mark.parametrize(
    ("units", "longest", "per_round", "count"),
    [
        (1, 2048, 8, 16),
        (8, 2048, 8, 16),
        (24, 2048, 8, 11),  # 528 / 24 = 22 are more than a round: 264 / 24
        (32, 2048, 8, 8),
        (48, 2048, 8, 8),
        (64, 2048, 8, 8),
        (64, 2048, 4, 4),
        (88, 2048, 8, 6),
        (88, 2048, 4, 4),
        (32, 2048, 32, 16),
        (192, 2048, 8, 2),
        (192, 2048, 1, 1),
        (528, 2048, 8, 1),
        (999, 2048, 8, 1),
        (8, 64, 8, 1),
        (8, 65, 8, 2),
        (8, 1, 8, 1),
    ],
)
def test_as_many_programs_share_a_row_as_run_at_once_and_combine_quickly(
    units: int, longest: int, per_round: int, count: int
) -> None:
    assert workspace(528).num_splits(units, longest, per_round) == count
    assert count * units <= 528 or count == 1


def attended(
    lengths: list[int], *, soft_cap: float = 0.0, longest: int = 256, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention [B, 4, 64] f32 over slots in random order, and the reference's.

    Args:
        gap: slots between two rows that belong to none.
    """
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(shape, generator=generator)
        for shape in ((len(lengths), 4, 64), (700, 2, 64), (700, 2, 64))
    )
    ends = torch.tensor(lengths).cumsum(0).int() + gap * torch.arange(1, len(lengths) + 1).int()
    starts = ends - torch.tensor(lengths).int()
    slots = torch.randperm(700, generator=generator).int()
    found = attend_tokens(
        query,
        keys,
        values,
        slots,
        starts,
        ends,
        longest=longest,
        scale=0.5,
        soft_cap=soft_cap,
        workspace=workspace(16),
        out=torch.full_like(query, torch.nan),
    )
    expected = []
    for row, (first, last) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        kept = slots[first:last].long()
        if soft_cap:
            scores = 0.5 * score_tokens(query[row], keys[kept])
            weights = (soft_cap * torch.tanh(scores / soft_cap)).softmax(-1)
            grouped = weights.view(2, 2, -1) @ values[kept].transpose(0, 1)
            expected.append(grouped.reshape(4, 64))
        elif first < last:
            expected.append(attend_by_definition(query[row], keys, values, kept, 0.5))
        else:
            expected.append(torch.zeros(4, 64))
    return found, torch.stack(expected)


def test_scores_may_be_capped() -> None:
    found, expected = attended([200, 33], soft_cap=1.5)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, attended([200, 33])[0], atol=1e-2)


def test_rows_may_lie_apart() -> None:
    found, expected = attended([64, 5, 200], gap=7)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("longest", [1, 256])
def test_a_row_without_tokens_gives_zeros_and_disturbs_no_other(longest: int) -> None:
    found, expected = attended([3, 0, 150], longest=longest)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": torch.zeros(9, 2, 32)}, "multiple of KV heads"),
        ({"keys": torch.zeros(9, 3, 64), "values": torch.zeros(9, 3, 64)}, "multiple of KV heads"),
        ({"out": torch.zeros(2, 4, 64)}, "out must be torch.float32 of shape"),
        ({"out": torch.zeros(1, 4, 64).half()}, "out must be torch.float32 of shape"),
        ({"ends": torch.tensor([4, 9]).int()}, "starts and ends must have 1 elements, not 1 and 2"),
        ({"slots": torch.arange(9)}, "slots must be int32"),
        (
            {"query": torch.zeros(1, 4, 32), "keys": torch.zeros(9, 2, 32)}
            | {"values": torch.zeros(9, 2, 32), "out": torch.zeros(1, 4, 32)},
            r"workspace is for .* = \(16, 64\), not \(16, 32\)",
        ),
    ],
)
def test_tensors_that_would_be_read_out_of_bounds_are_refused(
    changed: dict[str, torch.Tensor], words: str
) -> None:
    cache, row = torch.zeros(9, 2, 64), torch.zeros(1, 4, 64)
    tensors = {"query": row, "keys": cache, "values": cache, "out": row.clone()}
    tensors |= {"slots": torch.arange(9).int(), "starts": torch.tensor([0]).int()}
    tensors |= {"ends": torch.tensor([9]).int()}
    with pytest.raises(ValueError, match=words):
        attend_tokens(**(tensors | changed), longest=9, scale=1.0, workspace=workspace(4))
