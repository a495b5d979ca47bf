"""Shortlists: each head's best tokens, to the depth that the union probably needs.

Heads agree on some tokens and not on others, so the union of their rankings is complete long
before any ranking ends. A threshold from a sample of a head's scores lets about the wanted number
of tokens pass; those are sorted. The result is exact: the tokens that pass are the head's best, and
a row for which they are too few or too many is left to `full_ranking.py`. So is a row just over the
budget: most of its tokens are chosen, and heads that agree need deep rankings.

Heads take turns in `union.py`, whose functions the kernel calls. Defined by
`reference.rank_tokens`, of which a shortlist is the beginning, and `reference.unite_rankings`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.full_ranking import padded_ranks
from lim_sglang.kernels.launch import (
    MAX_REGISTERS,
    NEEDS_FULL_RANKING,
    SHORTLIST_BLOCK,
    SHORTLIST_SAMPLE,
    is_last_block,
    pdl_launch_next,
    pdl_options,
    pdl_wait,
    row_and_head,
    sample_size,
    sort_warps,
)
from lim_sglang.kernels.packed import PackedRows, packed_row
from lim_sglang.kernels.radix import collect_by_sample, collect_densely, read_back, sort_ranking
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.union import RankingBuffers, find_last_turn, record_turns


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "selected", "num_heads"])
def _shortlist_tokens(
    scores,  # [B, H, S] f32, packed
    indptr,  # [B + 1] int32
    ranking,  # [B, H, >= CAPACITY] int32, best first
    depth,  # [B, H] int32
    first_turn,  # [B, S] int32, packed
    last_turn,  # [B] int32
    new_tokens_per_rank,  # [B, COUNTED_RANKS] int32
    block_counters,  # [B] int32
    rows_fully_ranked,  # [1] int64
    budget,
    sinks,
    recent,
    selected,
    num_heads,
    ranking_row_stride,
    ranking_head_stride,
    rank_count_row_stride,
    NEEDS_FULL_RANKING: tl.constexpr,
    CAPACITY: tl.constexpr,
    SORTED_AT_ONCE: tl.constexpr,  # most candidates of a row that no shortlist is tried for
    SAMPLE: tl.constexpr,
    DENSE: tl.constexpr,  # the longest row that there can be is too long for one sample
    BLOCK: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    row, head, length = row_and_head(indptr)
    if length <= budget:
        return
    before, pitch = packed_row(indptr, row, 1)
    scores += before * num_heads + head * pitch
    rankings = ranking + row * ranking_row_stride
    ranking = rankings + head * ranking_head_stride
    first_turn += before
    new_tokens_per_rank += row * rank_count_row_stride
    depth += row * num_heads
    end = length - recent

    candidates = end - sinks
    if (candidates > CAPACITY) & (candidates <= SORTED_AT_ONCE):
        tl.store(depth + head, 0)
        if head == 0:
            tl.store(last_turn + row, NEEDS_FULL_RANKING)
            tl.atomic_add(rows_fully_ranked, 1, sem="relaxed")
        return
    if DENSE:
        passed = collect_densely(scores, ranking, sinks, end, SAMPLE, CAPACITY, BLOCK)
    else:
        passed = collect_by_sample(scores, ranking, sinks, end, SAMPLE, CAPACITY, BLOCK)
    fits = passed <= CAPACITY
    if fits:
        positions, inside = read_back(ranking, passed, CAPACITY)
        ranked = sort_ranking(scores, ranking, positions, inside, passed, CAPACITY)
        record_turns(first_turn, new_tokens_per_rank, ranked, passed, head, num_heads, CAPACITY)
    tl.store(depth + head, tl.where(fits, passed, 0))

    if is_last_block(block_counters + row, num_heads):
        heads = tl.arange(0, PADDED_HEADS)
        inside = heads < num_heads
        depths = tl.load(depth + heads, mask=inside, other=CAPACITY, cache_modifier=".cg")
        found = find_last_turn(
            rankings,
            first_turn,
            new_tokens_per_rank,
            tl.min(depths, 0),  # ranks of the shortest ranking
            selected,
            num_heads,
            ranking_head_stride,
            PADDED_HEADS,
            COUNTED_RANKS,
        )
        tl.store(last_turn + row, found)
        if found == NEEDS_FULL_RANKING:
            tl.atomic_add(rows_fully_ranked, 1, sem="relaxed")


def shortlist_capacity(selected: int) -> int:
    """Return the tokens per head that a shortlist has room for, a power of two.

    The union of real models' heads is complete after a fifth to a half of `selected` ranks
    (measured: docs/log).
    """
    small = min(256, triton.next_power_of_2(2 * selected))
    return max(16, small, triton.next_power_of_2(triton.cdiv(selected, 2)))


def sorted_at_once(selected: int) -> int:
    """Return the most candidates of a row just over the budget, which is left to a full ranking.

    A third over `selected` at most, so that the same share over any budget is sorted whole: beyond
    it a shortlist decides most rows. Never more than a full ranking sorts without selecting first.
    """
    return min(padded_ranks(selected), 4 * selected // 3)


def shortlist_tokens(
    scores: PackedRows, indptr: Tensor, budget_split: BudgetSplit, buffers: RankingBuffers
) -> None:
    """Rank the best candidates of every head in each row over the budget, and unite them.

    Writes `depth` and `last_turn`; the beginning of `ranking`, `first_turn` and
    `new_tokens_per_rank`, which are complete where `last_turn` is found.

    Args:
        scores: of B rows and H heads, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        budget_split: rows within its budget stay untouched; sinks and recent tokens are no
            candidates; `selected`, at least 1, are chosen.
        buffers: of B rows and H heads, as the last step left them.
    """
    buffers.check(scores, indptr)
    heads = scores.lists
    capacity = shortlist_capacity(budget_split.selected)
    sample, most = sample_size(scores.columns), max(SHORTLIST_SAMPLE, capacity)
    _shortlist_tokens[(len(indptr) - 1, heads)](
        scores.values,
        indptr,
        buffers.ranking,
        buffers.depth,
        buffers.first_turn.values,
        buffers.last_turn,
        buffers.new_tokens_per_rank,
        buffers.block_counters,
        buffers.rows_fully_ranked,
        budget_split.budget,
        budget_split.sinks,
        budget_split.recent,
        budget_split.selected,
        heads,
        buffers.ranking.stride(0),
        buffers.ranking.stride(1),
        buffers.new_tokens_per_rank.stride(0),
        NEEDS_FULL_RANKING=NEEDS_FULL_RANKING,
        CAPACITY=capacity,
        SORTED_AT_ONCE=sorted_at_once(budget_split.selected),
        SAMPLE=min(sample, most),
        DENSE=sample > most,
        BLOCK=SHORTLIST_BLOCK,
        PADDED_HEADS=triton.next_power_of_2(heads),
        COUNTED_RANKS=buffers.new_tokens_per_rank.shape[1],
        num_warps=sort_warps(capacity),
        maxnreg=MAX_REGISTERS,
        **pdl_options(),
    )
