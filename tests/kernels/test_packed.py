"""Packed rows: where each row begins, and chunks that rows of many tokens are cut into."""

from itertools import accumulate, pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from lim_sglang.kernels.packed import ALIGNMENT, PackedRows, packed_row
from lim_sglang.kernels.reference import split_budget
from lim_sglang.kernels.selector import MassSelector, RankSelector, Room, WindowSelector
from tests.kernels.batches import COMPILED_HERE

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=9)


@triton.jit
def _note_rows(indptr, noted, page: tl.constexpr):
    row = tl.program_id(0)
    before, pitch = packed_row(indptr, row, page)
    tl.store(noted + 2 * row, before)
    tl.store(noted + 2 * row + 1, pitch)


def allocate(lengths: list[int], lists: int = 1, page: int = 1) -> PackedRows:
    return PackedRows.allocate(
        lists=lists,
        max_rows=len(lengths),
        longest=max(lengths),
        tokens=sum(lengths),
        device="cpu",
        page=page,
    )


@given(LENGTHS, st.integers(1, 5), st.sampled_from([1, 16, 64]), st.integers(0, 1000))
def test_rows_hold_their_columns_apart_from_each_other_within_the_memory(
    lengths: list[int], lists: int, page: int, begin: int
) -> None:
    packed = allocate(lengths, lists, page)
    ends = [begin, *accumulate(lengths, initial=begin)][1:]
    for number, view in enumerate(packed.rows(ends), 1):
        assert view.shape[0] == lists
        assert view.shape[1] % ALIGNMENT == view.storage_offset() % ALIGNMENT == 0
        assert view.shape[1] >= triton.cdiv(lengths[number - 1], page)
        assert not view.any()
        view.fill_(number)
    assert sum(view.numel() for view in packed.rows(ends)) == int(packed.values.count_nonzero())
    assert torch.equal(packed.used(ends).values.nonzero(), packed.values.nonzero())


@COMPILED_HERE
@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("first", [0, 3])
def test_a_kernel_finds_rows_where_the_host_does(page: int, first: int) -> None:
    """Also those of a chunk, which begins at its own first row."""
    lengths = [1, 700, 64, 65, 3, 4096, 31]
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()[first:]
    noted = torch.zeros(len(indptr) - 1, 2, dtype=torch.int64)
    _note_rows[(len(noted),)](indptr, noted, page=page)
    views = allocate(lengths, lists=3, page=page).rows(indptr.tolist())
    assert noted.tolist() == [[view.storage_offset() // 3, view.shape[1]] for view in views]


@pytest.mark.parametrize("kind", [RankSelector, MassSelector])
def test_rows_of_more_tokens_than_the_memory_take_chunks_that_fit(
    kind: type[RankSelector] | type[MassSelector],
) -> None:
    selector = kind.allocate(split_budget(64, 0.25, sinks=4), Room(8, 4, 2, 400, 1000, "cpu"))
    assert selector.max_rows == 8
    assert selector.fits(1000)
    assert not selector.fits(1001)
    assert selector.for_rows(torch.tensor([400, 400, 200])) is selector
    shared = torch.tensor([400] * 8)  # a prompt that all of them have in the cache once
    part = selector.for_rows(shared)
    assert part.max_rows == 2
    assert part.scores.values.data_ptr() == selector.scores.values.data_ptr()
    ends = [0, *accumulate(shared.tolist())]
    for first, last in pairwise(range(0, 9, 2)):
        views = part.scores.rows(ends[first : last + 1])
        assert [view.shape for view in views] == [(4, 416)] * 2


def test_a_step_of_several_chunks_fits_where_each_of_them_does() -> None:
    room = Room(4096, 4, 2, 100, 10**6, "cpu")
    selector = RankSelector.allocate(split_budget(64, 0.25, sinks=4), room)
    assert (selector.max_rows, selector.scores.tokens) == (256, 25600)
    assert selector.fits(600 * 100)


@pytest.mark.parametrize("kind", [RankSelector, MassSelector])
def test_chunks_have_as_many_rows_as_their_candidates_leave_room_for(
    kind: type[RankSelector] | type[MassSelector],
) -> None:
    split = split_budget(8192, 0.25, sinks=4)
    rows = kind.allocate(split, Room(4096, 64, 8, 100, 100, "cpu")).max_rows
    # 64 rankings of 6,144 tokens a row, or one list of 16,384 candidates.
    assert rows == (170 if kind is RankSelector else 256)


def test_lengths_alone_need_no_chunks() -> None:
    selector = WindowSelector(split_budget(64, 1.0, sinks=4))
    assert selector.fits(10**9)
    assert selector.for_rows(torch.tensor([10**9])) is selector
