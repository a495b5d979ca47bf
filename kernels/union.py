"""One set for all heads: heads take turns, and repeats are skipped until enough tokens are taken.

Defined by `reference.unite_rankings`. Each token's first turn is found by a scatter-min; the turn
of the last token that fits cuts the set off. Both are linear work.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.arrive import arrives_last
from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    CUT_BLOCK,
    TURN_BLOCK,
    UNDECIDED,
    WIDE_WARPS,
    check_int32,
    check_tensors,
)
from lim_sglang.kernels.reference import Shares


@triton.jit
def _num_turns(depth, row, num_heads, max_ranks, WHOLE: tl.constexpr, PADDED_HEADS: tl.constexpr):
    """Turns up to the shortest of a row's rankings."""
    ranks = max_ranks
    if not WHOLE:
        heads = tl.arange(0, PADDED_HEADS)
        inside = heads < num_heads
        ranks = tl.min(tl.load(depth + row * num_heads + heads, mask=inside, other=max_ranks), 0)
    return ranks * num_heads


@triton.jit
def _token_of_turn(ranking, turns, inside, num_heads, ranking_head_stride):
    """The token of a row that a head offers at each turn."""
    source = (turns % num_heads).to(tl.int64) * ranking_head_stride + turns // num_heads
    return tl.load(ranking + source, mask=inside, other=0)


@triton.jit
def _cut(
    ranking,  # [H, >= K] int32, of one row
    first_turn,  # [>= S] int32
    chosen_counts,  # [>= S / COUNTED] int32
    num_turns,
    selected,
    num_heads,
    ranking_head_stride,
    COUNTED: tl.constexpr,
    PADDED_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The turn of the last token that fits, and how many tokens the turns up to it take.

    What each block of COUNTED positions has of them is counted.
    """
    counts = chosen_counts + tl.arange(0, PADDED_COUNTS)
    tl.store(counts, 0)
    tl.debug_barrier()
    taken = 0
    cut = -1
    first = 0
    while (taken < selected) & (first < num_turns):
        turns = first + tl.arange(0, BLOCK)
        inside = turns < num_turns
        token = _token_of_turn(ranking, turns, inside, num_heads, ranking_head_stride)
        # Other programs wrote these turns: not from this processor's own cache.
        turn = tl.load(first_turn + token, mask=inside, other=-1, cache_modifier=".cg")
        new = (inside & (turn == turns)).to(tl.int32)
        fits = (new > 0) & (taken + tl.cumsum(new, 0) <= selected)
        tl.atomic_add(chosen_counts + token // COUNTED, 1, mask=fits, sem="relaxed")
        cut = tl.maximum(cut, tl.max(tl.where(fits, turns, -1), 0))
        taken += tl.sum(new, 0)
        first += BLOCK
    return cut, taken


@triton.jit(do_not_specialize=["budget", "selected", "num_heads", "max_ranks"])
def _unite(
    ranking,  # [B, H, >= K] int32
    indptr,  # [B + 1] int32
    depth,  # [B, H] int32
    first_turn,  # [B, >= S] int32
    last_turn,  # [B] int32
    chosen_counts,  # [B, PADDED_COUNTS] int32
    arrivals,  # [B] int32
    undecided_rows,  # [1] int64
    budget,
    selected,
    num_heads,
    max_ranks,  # K
    ranking_row_stride,
    ranking_head_stride,
    turn_row_stride,
    count_row_stride,
    WHOLE: tl.constexpr,  # the undecided rows, whose rankings are all K deep
    UNDECIDED: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_COUNTS: tl.constexpr,
    COUNTED: tl.constexpr,
    TURN_BLOCK: tl.constexpr,
    CUT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    skipped = length <= budget
    if WHOLE:
        skipped |= tl.load(last_turn + row) != UNDECIDED
    if skipped:
        return
    num_turns = _num_turns(depth, row, num_heads, max_ranks, WHOLE, PADDED_HEADS)
    ranking += row * ranking_row_stride
    first_turn += row * turn_row_stride
    turns = tl.program_id(1) * TURN_BLOCK + tl.arange(0, TURN_BLOCK)
    inside = turns < num_turns
    token = _token_of_turn(ranking, turns, inside, num_heads, ranking_head_stride)
    tl.atomic_min(first_turn + token, turns, mask=inside, sem="relaxed")
    if arrives_last(arrivals + row, tl.num_programs(1)):
        cut, taken = _cut(
            ranking,
            first_turn,
            chosen_counts + row * count_row_stride,
            num_turns,
            selected,
            num_heads,
            ranking_head_stride,
            COUNTED,
            PADDED_COUNTS,
            CUT_BLOCK,
        )
        tl.store(last_turn + row, tl.where(taken >= selected, cut, UNDECIDED))
        if taken < selected:
            tl.atomic_add(undecided_rows, 1, sem="relaxed")


def padded_counts(columns: int) -> int:
    """Blocks of positions of the longest row, as a power of two."""
    return triton.next_power_of_2(triton.cdiv(columns, COMPACT_BLOCK))


def unite_rankings(
    ranking: Tensor,
    indptr: Tensor,
    depth: Tensor,
    *,
    shares: Shares,
    num_ranks: int,
    whole: bool,
    first_turn: Tensor,
    last_turn: Tensor,
    chosen_counts: Tensor,
    arrivals: Tensor,
    undecided_rows: Tensor,
) -> None:
    """Find which turns win: token t of row b is chosen if `first_turn[b, t] <= last_turn[b]`.

    Args:
        ranking: [B, H, >= K] int32, from `shortlist_tokens` or `rank_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        depth: [B, H] int32, from `shortlist_tokens`: how deep each ranking is.
        shares: rows within its budget are not looked at; its `selected`, at least 1, are chosen.
        num_ranks: K, the deepest that a ranking can be.
        whole: take the undecided rows only, all of whose rankings are K deep.
        first_turn: [B, N] int32, made ready by `shortlist_tokens`.
        last_turn: [B] int32, written for rows over the budget: UNDECIDED where the rankings are not
            deep enough. With K `selected` they always are.
        chosen_counts: [B, `padded_counts(N)`] int32, written for rows that are decided: chosen
            tokens among each COMPACT_BLOCK positions.
        arrivals: [B] int32, zero before and after.
        undecided_rows: [1] int64, counts them.
    """
    ints = {"ranking": ranking, "indptr": indptr, "depth": depth}
    ints |= {"first_turn": first_turn, "last_turn": last_turn}
    ints |= {"chosen_counts": chosen_counts, "arrivals": arrivals}
    check_tensors(**ints, undecided_rows=undecided_rows)
    check_int32(**ints)
    rows, heads, _ = ranking.shape
    _unite[(rows, triton.cdiv(heads * num_ranks, TURN_BLOCK))](
        *(ranking, indptr, depth, first_turn, last_turn, chosen_counts, arrivals, undecided_rows),
        *(shares.budget, shares.selected, heads, num_ranks),
        *(ranking.stride(0), ranking.stride(1), first_turn.stride(0), chosen_counts.stride(0)),
        WHOLE=whole,
        UNDECIDED=UNDECIDED,
        PADDED_HEADS=triton.next_power_of_2(heads),
        PADDED_COUNTS=chosen_counts.shape[1],
        COUNTED=COMPACT_BLOCK,
        TURN_BLOCK=TURN_BLOCK,
        CUT_BLOCK=CUT_BLOCK,
        num_warps=WIDE_WARPS,
    )
