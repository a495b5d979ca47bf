"""Cache slots of the kept tokens, in order of position: sinks, chosen tokens, newest tokens.

Defined by `reference.count_kept` and `reference.compact_slots`. `count_kept` computes from lengths
alone where each row's kept tokens begin; `copy_window` needs nothing else. In `compact_slots` many
programs share a row; the counts of `full_ranking.py` tell each program how many tokens are kept
before its own positions, so no second pass is needed. First turns are reset as they are read, ready
for the next step.
"""

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    COMPACT_REGISTERS,
    COMPACT_SPLITS,
    LENGTH_BLOCK,
    NO_TURN,
    WIDE_WARPS,
    check_int32,
    check_tensors,
    pdl_options,
    pdl_wait,
)
from lim_sglang.kernels.packed import packed_row
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.union import RankingBuffers


@dataclass(frozen=True)
class StepSlots:
    """Cache slots of one decode step: those of all tokens, and those of the tokens kept.

    Shapes: B rows, one request each.
    """

    indptr: Tensor
    """[B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens."""
    slots: Tensor
    """[indptr[B]] int32, the slot of each token, oldest first."""
    kept_indptr: Tensor
    """[B + 1] int32; row b keeps `kept_indptr[b + 1] - kept_indptr[b]` tokens: all within the
    budget, else the budget, or what the newest of a budget's pages leaves of it."""
    kept: Tensor
    """[>= kept_indptr[B]] int32, written in order of position; a row of these for each list, where
    heads have lists of their own."""

    def chunk(self, first: int, num_rows: int) -> "StepSlots":
        """Return the lists of `num_rows` rows from the row `first` on."""
        ends = slice(first, first + num_rows + 1)
        return replace(self, indptr=self.indptr[ends], kept_indptr=self.kept_indptr[ends])


@triton.jit(do_not_specialize=["num_rows", "budget"])
def _count_kept(
    lengths,  # [B] int64
    kept_indptr,  # [B + 1] int32
    num_rows,
    budget,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,  # tokens that are kept or dropped together
):
    lanes = tl.arange(0, BLOCK)
    total = tl.full((), 0, tl.int32)
    tl.store(kept_indptr, total)
    for first in range(0, num_rows, BLOCK):
        rows = first + lanes
        inside = rows < num_rows
        length = tl.load(lengths + rows, mask=inside, other=0)
        most = budget.to(tl.int64) - PAGE + (length - 1) % PAGE + 1
        kept = tl.where(length <= budget, length, most).to(tl.int32)
        tl.store(kept_indptr + 1 + rows, total + tl.cumsum(kept, 0), mask=inside)
        total += tl.sum(kept, 0)


def count_kept(lengths: Tensor, budget: int, out: Tensor, *, page: int = 1) -> Tensor:
    """Add up the tokens that the rows of a step keep: `min(length, budget)`, or what the newest of
    a budget's pages leaves of it.

    Args:
        lengths: [B] int64, tokens of each row, the newest included.
        budget: most tokens that a row keeps, a multiple of `page`.
        page: tokens that are kept or dropped together.
        out: [B + 1] int32.

    Returns:
        `out`: row b keeps `out[b + 1] - out[b]` tokens.
    """
    check_tensors(lengths=lengths, out=out)
    check_int32(out=out)
    if len(out) != len(lengths) + 1:
        raise ValueError(f"out must have {len(lengths) + 1} elements, not {len(out)}")
    _count_kept[(1,)](lengths, out, lengths.shape[0], budget, BLOCK=LENGTH_BLOCK, PAGE=page)
    return out


@triton.jit
def copy_slots(slots, kept, count, BLOCK: tl.constexpr):
    """Copy `count` slots."""
    lanes = tl.arange(0, BLOCK)
    for first in range(0, count, BLOCK):
        inside = first + lanes < count
        slot = tl.load(slots + first + lanes, mask=inside, other=0)
        tl.store(kept + first + lanes, slot, mask=inside)


@triton.jit(do_not_specialize=["budget", "sinks"])
def _copy_window(
    indptr,  # [B + 1] int32, of all tokens
    slots,  # [indptr[B]] int32
    kept_indptr,  # [B + 1] int32, of the kept tokens
    kept,  # [kept_indptr[B]] int32
    budget,
    sinks,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = (tl.load(indptr + row + 1) - start).to(tl.int32)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tl.minimum(length, budget)
    dropped = tl.maximum(length - budget, 0)
    position = tl.where(index < sinks, index, index + dropped)
    slot = tl.load(slots + start + position, mask=inside, other=0)
    tl.store(kept + tl.load(kept_indptr + row).to(tl.int64) + index, slot, mask=inside)


def copy_window(step: StepSlots, budget_split: BudgetSplit) -> None:
    """Write the slots of each row's sinks and newest tokens to `step.kept`.

    Args:
        step: slots of B rows.
        budget_split: rows within its budget keep everything; nothing else is selected.
    """
    check_tensors(**vars(step))
    check_int32(**vars(step))
    rows = step.kept_indptr.shape[0] - 1
    _copy_window[(rows, triton.cdiv(budget_split.budget, COMPACT_BLOCK))](
        step.indptr,
        step.slots,
        step.kept_indptr,
        step.kept,
        budget_split.budget,
        budget_split.sinks,
        BLOCK=COMPACT_BLOCK,
    )


@triton.jit(do_not_specialize=["budget", "sinks", "recent"])
def _compact_slots(
    indptr,  # [B + 1] int32, of all tokens
    slots,  # [indptr[B]] int32
    kept_indptr,  # [B + 1] int32, of the kept tokens
    first_turn,  # [B, S] int32, packed
    last_turn,  # [B] int32
    chosen_counts,  # [B, PADDED_COUNTS] int32, of BLOCK positions each
    kept,  # [kept_indptr[B]] int32
    budget,
    sinks,
    recent,
    count_row_stride,
    NO_TURN: tl.constexpr,
    PADDED_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = (tl.load(indptr + row + 1) - start).to(tl.int32)
    if tl.program_id(1) * BLOCK >= length:
        return
    kept += tl.load(kept_indptr + row).to(tl.int64)
    newest = length - recent
    blocks = tl.arange(0, PADDED_COUNTS)
    counts = chosen_counts + row * count_row_stride + blocks
    begin, _ = packed_row(indptr, row, 1)
    last = tl.load(last_turn + row)
    for block in range(tl.program_id(1), tl.cdiv(length, BLOCK), tl.num_programs(1)):
        own = block * BLOCK
        positions = own + tl.arange(0, BLOCK)
        inside = positions < length
        slot = tl.load(slots + start + positions, mask=inside, other=0)
        if length <= budget:
            tl.store(kept + positions, slot, mask=inside)
        else:
            before = tl.sum(tl.load(counts, mask=blocks < block, other=0), 0)
            before += tl.minimum(own, sinks) + tl.maximum(own - newest, 0)
            turns = first_turn + begin + positions
            turn = tl.load(turns, mask=inside, other=0)
            tl.store(turns, NO_TURN, mask=inside & (turn != NO_TURN))
            keep = inside & ((turn <= last) | (positions < sinks) | (positions >= newest))
            index = before + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(kept + index, slot, mask=keep)


def compact_slots(step: StepSlots, budget_split: BudgetSplit, buffers: RankingBuffers) -> None:
    """Write the slots of each row's kept tokens to `step.kept`; reset `first_turn`.

    Args:
        step: slots of B rows.
        budget_split: rows within its budget keep everything; sinks and recent tokens are kept.
        buffers: of B rows, from `rank_tokens`.
    """
    ints = vars(step) | {
        "first_turn": buffers.first_turn.values,
        "last_turn": buffers.last_turn,
        "chosen_counts": buffers.chosen_counts,
    }
    check_tensors(**ints)
    check_int32(**ints)
    blocks = triton.cdiv(buffers.first_turn.columns, COMPACT_BLOCK)
    _compact_slots[(len(step.indptr) - 1, min(blocks, COMPACT_SPLITS))](
        step.indptr,
        step.slots,
        step.kept_indptr,
        buffers.first_turn.values,
        buffers.last_turn,
        buffers.chosen_counts,
        step.kept,
        budget_split.budget,
        budget_split.sinks,
        budget_split.recent,
        buffers.chosen_counts.stride(0),
        NO_TURN=NO_TURN,
        PADDED_COUNTS=buffers.chosen_counts.shape[1],
        BLOCK=COMPACT_BLOCK,
        num_warps=WIDE_WARPS,
        maxnreg=COMPACT_REGISTERS,
        **pdl_options(),
    )
