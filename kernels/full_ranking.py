"""Full rankings: each head's best tokens, as deep as a union can go; counts of chosen tokens.

Rankings are for the rows that shortlists left open: a sort, after a radix selection where
candidates are many. In every row over the budget, the chosen tokens of each block of positions are
counted. Heads take turns in `union.py`, whose functions the kernel calls. Defined by
`reference.rank_tokens` and `reference.unite_rankings`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    MAX_SORT,
    NEEDS_FULL_RANKING,
    RADIX_BLOCK,
    full_ranking_warps,
    is_last_block,
    pdl_launch_next,
    pdl_options,
    pdl_wait,
    row_and_head,
)
from lim_sglang.kernels.packed import PackedRows, packed_row
from lim_sglang.kernels.radix import read_back, sort_ranking, sortable_key
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.union import RankingBuffers, count_chosen, find_last_turn, record_turns


@triton.jit
def _write_best(scores, ranking, sinks, end, num_ranks, BLOCK: tl.constexpr):
    """Write the positions of a head's best candidates, in order of position: radix selection."""
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)

    # The K-th best key, 8 bits at a time: `threshold` is its prefix, and `wanted` keys that begin
    # with this prefix are still to be taken.
    threshold = tl.full((), 0, tl.uint32)
    wanted = num_ranks
    for byte in range(4):  # a loop: four unrolled copies would not stay in the instruction cache
        shift = 24 - 8 * byte
        counts = tl.zeros((256,), tl.int32)
        for first in range(sinks, end, BLOCK):
            inside = first + lanes < end
            keys = sortable_key(tl.load(scores + first + lanes, mask=inside, other=0.0))
            inside &= (keys >> shift >> 8) == (threshold >> shift >> 8)
            counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=inside)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        threshold |= digit.to(tl.uint32) << shift

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
        index = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(ranking + index, positions, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        ties += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "num_ranks", "num_heads"])
def _rank_tokens(
    scores,  # [B, H, S] f32, packed
    indptr,  # [B + 1] int32
    ranking,  # [B, H, >= num_ranks] int32, best first
    first_turn,  # [B, S] int32, packed
    last_turn,  # [B] int32
    new_tokens_per_rank,  # [B, COUNTED_RANKS] int32
    chosen_counts,  # [B, >= blocks of S] int32
    block_counters,  # [B] int32
    budget,
    sinks,
    recent,
    num_ranks,  # ranks per head, and tokens to choose
    num_heads,
    ranking_row_stride,
    ranking_head_stride,
    rank_count_row_stride,
    count_row_stride,
    NEEDS_FULL_RANKING: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
    COUNTED_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    row, head, length = row_and_head(indptr)
    if length <= budget:
        return
    before, pitch = packed_row(indptr, row, 1)
    first_turn += before
    chosen_counts += row * count_row_stride
    found = tl.load(last_turn + row)
    if found != NEEDS_FULL_RANKING:  # the programs of the row share the counting
        count_chosen(first_turn, chosen_counts, found, length, head, num_heads, COUNTED_BLOCK)
        return
    scores += before * num_heads + head * pitch
    rankings = ranking + row * ranking_row_stride
    ranking = rankings + head * ranking_head_stride
    new_tokens_per_rank += row * rank_count_row_stride
    end = length - recent
    ranks = tl.arange(0, PADDED_RANKS)
    if end - sinks <= PADDED_RANKS:  # few enough to sort them all
        positions = sinks + ranks
        inside = positions < end
    else:
        _write_best(scores, ranking, sinks, end, num_ranks, BLOCK)
        positions, inside = read_back(ranking, num_ranks, PADDED_RANKS)
    ranked = sort_ranking(scores, ranking, positions, inside, num_ranks, PADDED_RANKS)
    record_turns(first_turn, new_tokens_per_rank, ranked, num_ranks, head, num_heads, PADDED_RANKS)

    if is_last_block(block_counters + row, num_heads):
        found = find_last_turn(
            rankings,
            first_turn,
            new_tokens_per_rank,
            num_ranks,
            num_ranks,  # each head ranks as many tokens as are selected
            num_heads,
            ranking_head_stride,
            PADDED_HEADS,
            COUNTED_RANKS,
        )
        tl.store(last_turn + row, found)
        count_chosen(first_turn, chosen_counts, found, length, 0, 1, COUNTED_BLOCK)


def padded_ranks(selected: int) -> int:
    """Return the tokens of a head that are sorted at once, a power of two from `selected` on."""
    return max(16, triton.next_power_of_2(selected))


def rank_tokens(
    scores: PackedRows, indptr: Tensor, budget_split: BudgetSplit, buffers: RankingBuffers
) -> None:
    """Rank every head fully and unite the rankings, in each row that needs a full ranking.

    Writes `ranking` and `last_turn`, lowers `first_turn` and resets `new_tokens_per_rank` of those
    rows; writes `chosen_counts` of all rows over the budget.

    Args:
        scores: of B rows and H heads, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        budget_split: rows within its budget stay untouched; sinks and recent tokens are no
            candidates; `selected`, at least 1, are chosen.
        buffers: of B rows and H heads, from `shortlist_tokens`.
    """
    buffers.check(scores, indptr)
    heads = scores.lists
    num_ranks = budget_split.selected
    if num_ranks > MAX_SORT:
        raise ValueError(f"at most {MAX_SORT} tokens per head can be ranked, not {num_ranks}")
    padded = padded_ranks(num_ranks)
    _rank_tokens[(len(indptr) - 1, heads)](
        scores.values,
        indptr,
        buffers.ranking,
        buffers.first_turn.values,
        buffers.last_turn,
        buffers.new_tokens_per_rank,
        buffers.chosen_counts,
        buffers.block_counters,
        budget_split.budget,
        budget_split.sinks,
        budget_split.recent,
        num_ranks,
        heads,
        buffers.ranking.stride(0),
        buffers.ranking.stride(1),
        buffers.new_tokens_per_rank.stride(0),
        buffers.chosen_counts.stride(0),
        NEEDS_FULL_RANKING=NEEDS_FULL_RANKING,
        PADDED_RANKS=padded,
        BLOCK=RADIX_BLOCK,
        PADDED_HEADS=triton.next_power_of_2(heads),
        COUNTED_RANKS=buffers.new_tokens_per_rank.shape[1],
        COUNTED_BLOCK=COMPACT_BLOCK,
        num_warps=full_ranking_warps(padded),
        **pdl_options(),
    )
