"""The kept tokens as cache slots, in order of position: sinks, chosen tokens, newest tokens.

Defined by `reference.count_kept` and `reference.compact_slots`. `count_kept` counts, from lengths
alone, where each row's kept tokens begin. In `compact_slots` programs share a row's positions; how
many are kept before a program's own is known from what `full_ranking.py` has counted, so that no
second pass is needed. First turns are reset as they are read, so that the next step finds none.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    LENGTH_BLOCK,
    NEVER,
    WIDE_WARPS,
    check_int32,
    check_tensors,
    pdl_options,
    pdl_wait,
)
from lim_sglang.kernels.reference import BudgetSplit


@triton.jit(do_not_specialize=["num_rows", "budget"])
def _count_kept(
    lengths,  # [B] int64
    kept_indptr,  # [B + 1] int32
    num_rows,
    budget,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    total = tl.full((), 0, tl.int32)
    tl.store(kept_indptr, total)
    for first in range(0, num_rows, BLOCK):
        rows = first + lanes
        inside = rows < num_rows
        kept = tl.minimum(tl.load(lengths + rows, mask=inside, other=0), budget).to(tl.int32)
        tl.store(kept_indptr + 1 + rows, total + tl.cumsum(kept, 0), mask=inside)
        total += tl.sum(kept, 0)


def count_kept(lengths: Tensor, budget: int, out: Tensor) -> Tensor:
    """Add up `min(length, budget)` over the rows of a step.

    Args:
        lengths: [B] int64, tokens of each row, the newest included.
        budget: tokens that a row may keep.
        out: [B + 1] int32.

    Returns:
        `out`: row b keeps `out[b + 1] - out[b]` tokens.
    """
    check_tensors(lengths=lengths, out=out)
    check_int32(out=out)
    if len(out) != len(lengths) + 1:
        raise ValueError(f"out must have {len(lengths) + 1} numbers, not {len(out)}")
    _count_kept[(1,)](lengths, out, lengths.shape[0], budget, BLOCK=LENGTH_BLOCK)
    return out


@triton.jit(do_not_specialize=["budget", "sinks", "recent"])
def _compact(
    indptr,  # [B + 1] int32, of all tokens
    slots,  # [indptr[B]] int32
    kept_indptr,  # [B + 1] int32, of the kept tokens
    first_turn,  # [B, >= S] int32
    last_turn,  # [B] int32
    chosen_counts,  # [B, PADDED_COUNTS] int32, of BLOCK positions each
    kept,  # [kept_indptr[B]] int32
    budget,
    sinks,
    recent,
    turn_row_stride,
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
    own = tl.program_id(1) * BLOCK
    if own >= length:
        return
    positions = own + tl.arange(0, BLOCK)
    inside = positions < length
    slot = tl.load(slots + start + positions, mask=inside, other=0)
    kept += tl.load(kept_indptr + row).to(tl.int64)
    if length <= budget:
        tl.store(kept + positions, slot, mask=inside)
        return
    newest = length - recent
    blocks = tl.arange(0, PADDED_COUNTS)
    counts = chosen_counts + row * count_row_stride + blocks
    before = tl.sum(tl.load(counts, mask=blocks < tl.program_id(1), other=0), 0)
    before += tl.minimum(own, sinks) + tl.maximum(own - newest, 0)
    first_turn += row * turn_row_stride + positions
    turn = tl.load(first_turn, mask=inside, other=0)
    tl.store(first_turn, NO_TURN, mask=inside & (turn != NO_TURN))
    chosen = turn <= tl.load(last_turn + row)
    keep = inside & (chosen | (positions < sinks) | (positions >= newest))
    place = before + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(kept + place, slot, mask=keep)


def compact_slots(
    indptr: Tensor,
    slots: Tensor,
    kept_indptr: Tensor,
    *,
    budget_split: BudgetSplit,
    first_turn: Tensor,
    last_turn: Tensor,
    chosen_counts: Tensor,
    out: Tensor,
) -> Tensor:
    """Write the slots of each row's kept tokens, in order of position.

    Args:
        indptr, slots: [B + 1] and [indptr[B]] int32, all tokens.
        kept_indptr: [B + 1] int32, where each row's kept tokens begin: `min(length, budget)` each.
        shares: rows within its budget keep everything; its ends are always kept.
        first_turn: [B, N] int32, N at least the longest row; from `shortlist_tokens` and
            `rank_tokens`. NEVER is written.
        last_turn, chosen_counts: [B] and [B, `padded_counts(N)`] int32, from these, too.
        out: [kept_indptr[B]] int32 or longer.

    Returns:
        `out`.
    """
    ints = {"indptr": indptr, "slots": slots, "kept_indptr": kept_indptr, "out": out}
    ints |= {"first_turn": first_turn, "last_turn": last_turn, "chosen_counts": chosen_counts}
    check_tensors(**ints)
    check_int32(**ints)
    rows, width = first_turn.shape
    _compact[(rows, triton.cdiv(width, COMPACT_BLOCK))](
        indptr,
        slots,
        kept_indptr,
        first_turn,
        last_turn,
        chosen_counts,
        out,
        budget_split.budget,
        budget_split.sinks,
        budget_split.recent,
        first_turn.stride(0),
        chosen_counts.stride(0),
        NO_TURN=NEVER,
        PADDED_COUNTS=chosen_counts.shape[1],
        BLOCK=COMPACT_BLOCK,
        num_warps=WIDE_WARPS,
        **pdl_options(),
    )
    return out
