"""One set for all heads: heads take turns, repeats are skipped, and the set is written as slots.

Defined by `reference.unite_rankings` and `reference.keep_tokens`. Each token's first turn is
found by a scatter-min; the turn of the last token that fits cuts the set off; positions within
the cut are compacted in ascending order. All of it is linear work.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import UNION_BLOCK, check_same_device

NEVER = 2**31 - 1
"""The first turn of a token that no head has ranked."""


@triton.jit(do_not_specialize=["budget", "num_heads", "num_turns"])
def _take_turns(
    ranking,  # [B, H, K] int32
    indptr,  # [B + 1] int32
    first_turn,  # [B, >= S] int32, NEVER everywhere
    budget,
    num_heads,
    num_turns,
    ranking_row_stride,
    ranking_head_stride,
    turn_row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    turns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = turns < num_turns
    source = (turns % num_heads).to(tl.int64) * ranking_head_stride + turns // num_heads
    token = tl.load(ranking + row * ranking_row_stride + source, mask=inside, other=0)
    tl.atomic_min(first_turn + row * turn_row_stride + token, turns, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["budget", "selected", "num_heads", "num_turns"])
def _cut(
    ranking,  # [B, H, K] int32
    indptr,  # [B + 1] int32
    first_turn,  # [B, >= S] int32
    last_turn,  # [B] int32
    budget,
    selected,
    num_heads,
    num_turns,
    ranking_row_stride,
    ranking_head_stride,
    turn_row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    taken = 0
    cut = -1
    first = 0
    while (taken < selected) & (first < num_turns):
        turns = first + tl.arange(0, BLOCK)
        inside = turns < num_turns
        source = (turns % num_heads).to(tl.int64) * ranking_head_stride + turns // num_heads
        token = tl.load(ranking + row * ranking_row_stride + source, mask=inside, other=0)
        turn = tl.load(first_turn + row * turn_row_stride + token, mask=inside, other=-1)
        new = (inside & (turn == turns)).to(tl.int32)
        count = taken + tl.cumsum(new, 0)
        fits = (new > 0) & (count <= selected)
        cut = tl.maximum(cut, tl.max(tl.where(fits, turns, -1), 0))
        taken += tl.sum(new, 0)
        first += BLOCK
    tl.store(last_turn + row, cut)


@triton.jit(do_not_specialize=["budget", "sinks", "recent"])
def _compact(
    indptr,  # [B + 1] int32, of all tokens
    slots,  # [indptr[B]] int32
    kept_indptr,  # [B + 1] int32, of the kept tokens
    first_turn,  # [B, >= S] int32
    last_turn,  # [B] int32
    kept,  # [kept_indptr[B]] int32
    budget,
    sinks,
    recent,
    turn_row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = tl.load(indptr + row + 1).to(tl.int64) - start
    target = tl.load(kept_indptr + row).to(tl.int64)
    whole = length <= budget
    cut = tl.load(last_turn + row)
    lanes = tl.arange(0, BLOCK)
    taken = 0
    for first in range(0, length, BLOCK):
        positions = first + lanes
        inside = positions < length
        turn = tl.load(first_turn + row * turn_row_stride + positions, mask=inside, other=0)
        always = whole | (positions < sinks) | (positions >= length - recent)
        keep = inside & (always | (turn <= cut))
        place = taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        slot = tl.load(slots + start + positions, mask=inside, other=0)
        tl.store(kept + target + place, slot, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)


def unite_rankings(
    ranking: Tensor,
    indptr: Tensor,
    *,
    budget: int,
    selected: int,
    first_turn: Tensor,
    last_turn: Tensor,
) -> None:
    """Find which turns win: token t of row b is chosen if `first_turn[b, t] <= last_turn[b]`.

    Args:
        ranking: [B, H, K] int32, from `rank_tokens`; K at least `selected`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        budget: rows within it are not looked at.
        selected: tokens to choose.
        first_turn: [B, N] int32, written whole.
        last_turn: [B] int32, written for rows over the budget.
    """
    check_same_device(ranking=ranking, indptr=indptr, first_turn=first_turn, last_turn=last_turn)
    rows, heads, ranks = ranking.shape
    turns = heads * ranks
    shape = (heads, turns, ranking.stride(0), ranking.stride(1), first_turn.stride(0))
    first_turn.fill_(NEVER)
    if turns:
        _take_turns[(rows, triton.cdiv(turns, UNION_BLOCK))](
            ranking, indptr, first_turn, budget, *shape, BLOCK=UNION_BLOCK
        )
    _cut[(rows,)](
        ranking, indptr, first_turn, last_turn, budget, selected, *shape, BLOCK=UNION_BLOCK
    )


def compact_slots(
    indptr: Tensor,
    slots: Tensor,
    kept_indptr: Tensor,
    *,
    budget: int,
    sinks: int,
    recent: int,
    first_turn: Tensor,
    last_turn: Tensor,
    out: Tensor,
) -> Tensor:
    """Write the slots of each row's kept tokens, in order of position.

    Args:
        indptr, slots: [B + 1] and [indptr[B]] int32, all tokens.
        kept_indptr: [B + 1] int32, where each row's kept tokens begin: `min(length, budget)` each.
        sinks, recent: tokens at either end that are always kept.
        first_turn, last_turn: from `unite_rankings`.
        out: [kept_indptr[B]] int32 or longer.

    Returns:
        `out`.
    """
    check_same_device(indptr=indptr, slots=slots, kept_indptr=kept_indptr, out=out)
    _compact[(first_turn.shape[0],)](
        indptr,
        slots,
        kept_indptr,
        first_turn,
        last_turn,
        out,
        budget,
        sinks,
        recent,
        first_turn.stride(0),
        BLOCK=UNION_BLOCK,
    )
    return out
