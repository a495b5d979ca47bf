"""Each head's best tokens, best first, as deep as a union can go, and the union; what is chosen.

For the rows that no shortlist decided: a sort, after a radix selection where candidates are many.
For all that are over the budget: how many tokens are chosen in each block of positions. Defined by
`reference.rank_tokens` and `reference.unite_rankings`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    MAX_SORT,
    NEEDS_FULL_RANKING,
    RANK_BLOCK,
    check_int32,
    check_tensors,
    is_last_block,
    pdl_launch_next,
    pdl_options,
    pdl_wait,
    rank_warps,
)
from lim_sglang.kernels.radix import sort_ranking, sortable_key, written_tokens
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.union import count_chosen, cut_turns, note_turns


@triton.jit
def _write_best(scores, ranking, sinks, end, num_ranks, BLOCK: tl.constexpr):
    """Write the positions of a head's best candidates, in order of position: radix selection."""
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)

    # The K-th best key, 8 bits at a time: `threshold` is its prefix, `wanted` how many with this
    # prefix are still to take.
    threshold = tl.full((), 0, tl.uint32)
    wanted = num_ranks
    for byte in range(4):  # a loop, since four copies of it would not stay in a cache for code
        shift = 24 - 8 * byte
        counts = tl.zeros((256,), tl.int32)
        for first in range(sinks, end, BLOCK):
            inside = first + lanes < end
            keys = sortable_key(tl.load(scores + first + lanes, mask=inside, other=0.0))
            inside &= (keys >> shift >> 8) == (threshold >> shift >> 8)
            counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=inside)
        at_least = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > chosen, counts, 0), 0)
        threshold |= chosen.to(tl.uint32) << shift

    # Everything above the threshold, and the oldest `wanted` that equal it, in order of position.
    taken = 0
    ties = 0
    for first in range(sinks, end, BLOCK):
        positions = first + lanes
        inside = positions < end
        keys = sortable_key(tl.load(scores + positions, mask=inside, other=0.0))
        equal = (inside & (keys == threshold)).to(tl.int32)
        take = inside & (
            (keys > threshold) | ((equal > 0) & (ties + tl.cumsum(equal, 0) <= wanted))
        )
        place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(ranking + place, positions, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        ties += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "num_ranks", "num_heads"])
def _rank(
    scores,  # [B, H, >= S] f32
    indptr,  # [B + 1] int32
    ranking,  # [B, H, >= K] int32, best first
    first_turn,  # [B, >= S] int32
    last_turn,  # [B] int32
    new_tokens_per_rank,  # [B, MET_RANKS] int32
    chosen_counts,  # [B, >= blocks of S] int32
    block_counters,  # [B] int32
    budget,
    sinks,
    recent,
    num_ranks,  # K, and as many are chosen
    num_heads,
    score_row_stride,
    score_head_stride,
    ranking_row_stride,
    ranking_head_stride,
    turn_row_stride,
    rank_count_row_stride,
    count_row_stride,
    NEEDS_FULL_RANKING: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
    COUNTED: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    first_turn += row * turn_row_stride
    chosen_counts += row * count_row_stride
    cut = tl.load(last_turn + row)
    if cut != NEEDS_FULL_RANKING:  # the row's programs share the counting
        count_chosen(first_turn, chosen_counts, cut, length, head, num_heads, COUNTED)
        return
    scores += row * score_row_stride + head * score_head_stride
    rankings = ranking + row * ranking_row_stride
    ranking = rankings + head * ranking_head_stride
    new_tokens_per_rank += row * rank_count_row_stride
    end = length - recent
    ranks = tl.arange(0, PADDED_RANKS)
    if end - sinks <= PADDED_RANKS:  # so few are all sorted
        positions = sinks + ranks
        inside = positions < end
    else:
        _write_best(scores, ranking, sinks, end, num_ranks, BLOCK)
        positions, inside = written_tokens(ranking, num_ranks, PADDED_RANKS)
    ranked = sort_ranking(scores, ranking, positions, inside, num_ranks, PADDED_RANKS)
    note_turns(first_turn, new_tokens_per_rank, ranked, num_ranks, head, num_heads, PADDED_RANKS)

    if is_last_block(block_counters + row, num_heads):
        cut = cut_turns(
            rankings,
            first_turn,
            new_tokens_per_rank,
            num_ranks,
            num_ranks,
            num_heads,
            ranking_head_stride,
            PADDED_HEADS,
            COUNTED_RANKS,
        )
        tl.store(last_turn + row, cut)
        count_chosen(first_turn, chosen_counts, cut, length, 0, 1, COUNTED)


def padded_ranks(selected: int) -> int:
    """Tokens of a head that are sorted at once, a power of two, at least `selected`."""
    return max(16, triton.next_power_of_2(selected))


def rank_tokens(
    scores: Tensor,
    indptr: Tensor,
    *,
    budget_split: BudgetSplit,
    ranking: Tensor,
    first_turn: Tensor,
    last_turn: Tensor,
    new_tokens_per_rank: Tensor,
    chosen_counts: Tensor,
    block_counters: Tensor,
) -> None:
    """Rank the best candidates of every head in each row that is undecided, and unite them.

    In rows over the budget, decided or not, count what is chosen.

    Args:
        scores: [B, H, N] f32, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        shares: rows within its budget stay untouched; its ends are no candidates.
        ranking: [B, H, >= selected] int32; positions, best first, are written.
        first_turn: [B, N] int32, from `shortlist_tokens`; lowered.
        last_turn: [B] int32, from `shortlist_tokens`; written for undecided rows.
        met_counts: [B, `met_ranks(selected)`] int32, from `shortlist_tokens`; 0 afterwards.
        chosen_counts: [B, `padded_counts(N)`] int32; chosen tokens among each COMPACT_BLOCK
            positions are written.
        arrivals: [B] int32, zero before and after.
    """
    ints = {"indptr": indptr, "ranking": ranking, "first_turn": first_turn}
    ints |= {"last_turn": last_turn, "met_counts": new_tokens_per_rank, "arrivals": block_counters}
    ints |= {"chosen_counts": chosen_counts}
    check_tensors(scores=scores, **ints)
    check_int32(**ints)
    rows, heads, _ = scores.shape
    num_ranks = budget_split.selected
    if num_ranks > MAX_SORT:
        raise ValueError(f"at most {MAX_SORT} tokens a head can be ranked, not {num_ranks}")
    padded = padded_ranks(num_ranks)
    _rank[(rows, heads)](
        *(
            scores,
            indptr,
            ranking,
            first_turn,
            last_turn,
            new_tokens_per_rank,
            chosen_counts,
            block_counters,
        ),
        *(budget_split.budget, budget_split.sinks, budget_split.recent, num_ranks, heads),
        *(scores.stride(0), scores.stride(1), ranking.stride(0), ranking.stride(1)),
        *(first_turn.stride(0), new_tokens_per_rank.stride(0), chosen_counts.stride(0)),
        NEEDS_FULL_RANKING=NEEDS_FULL_RANKING,
        PADDED_RANKS=padded,
        BLOCK=RANK_BLOCK,
        PADDED_HEADS=triton.next_power_of_2(heads),
        COUNTED_RANKS=new_tokens_per_rank.shape[1],
        COUNTED=COMPACT_BLOCK,
        num_warps=rank_warps(padded),
        **pdl_options(),
    )
