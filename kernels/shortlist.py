"""Each head's very best tokens, best first, as many as the union is likely to look at; the union.

Heads agree on some tokens and not on others, so the union of their rankings is complete long
before any ranking ends. A threshold from a sample of a head's scores lets about the wanted number
of tokens pass; those that do are sorted. Nothing is guessed: what passed is exactly the head's best
so many tokens, and a row for which they are too few or too many is ranked whole by `rank.py`. So
is one just over the budget: most of its tokens are chosen, and heads that agree need deep rankings.

Defined by `reference.rank_tokens`, of which this is the beginning, and `reference.unite_rankings`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.full_ranking import padded_ranks
from lim_sglang.kernels.launch import (
    NEEDS_FULL_RANKING,
    SHORTLIST_BLOCK,
    check_int32,
    check_tensors,
    is_last_block,
    pdl_launch_next,
    pdl_options,
    pdl_wait,
    sample_size,
    sort_warps,
)
from lim_sglang.kernels.radix import collect, sampled_threshold, sort_ranking, written_tokens
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.union import cut_turns, note_turns


@triton.jit
def _wanted(candidates, sampled, CAPACITY: tl.constexpr):
    """Ranks of a sample whose last, as a threshold, seldom lets more than CAPACITY candidates pass.

    The number that passes varies by about sqrt(CAPACITY * (candidates / sampled - 1)): three times
    that is left free, so that a whole sample fills the room and a thin one half of it.
    """
    # Never below 0, however it is rounded.
    unsampled = (candidates - sampled).to(tl.float32) / sampled
    target = tl.maximum(CAPACITY - 3.0 * tl.sqrt(CAPACITY * unsampled), CAPACITY / 2)
    return tl.maximum((target * sampled / candidates).to(tl.int32), 1)


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "selected", "num_heads"])
def _shortlist(
    scores,  # [B, H, >= S] f32
    indptr,  # [B + 1] int32
    ranking,  # [B, H, >= CAPACITY] int32, best first
    depth,  # [B, H] int32
    first_turn,  # [B, >= S] int32
    last_turn,  # [B] int32
    new_tokens_per_rank,  # [B, MET_RANKS] int32
    block_counters,  # [B] int32
    full_ranking_rows,  # [1] int64
    budget,
    sinks,
    recent,
    selected,
    num_heads,
    score_row_stride,
    score_head_stride,
    ranking_row_stride,
    ranking_head_stride,
    turn_row_stride,
    rank_count_row_stride,
    NEEDS_FULL_RANKING: tl.constexpr,
    CAPACITY: tl.constexpr,
    SORTED_AT_ONCE: tl.constexpr,  # candidates that `rank.py` sorts without a threshold
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    scores += row * score_row_stride + head * score_head_stride
    rankings = ranking + row * ranking_row_stride
    ranking = rankings + head * ranking_head_stride
    first_turn += row * turn_row_stride
    new_tokens_per_rank += row * rank_count_row_stride
    depth += row * num_heads
    end = length - recent

    candidates = end - sinks
    if (candidates > CAPACITY) & (candidates <= SORTED_AT_ONCE):
        tl.store(depth + head, 0)
        if head == 0:
            tl.store(last_turn + row, NEEDS_FULL_RANKING)
            tl.atomic_add(full_ranking_rows, 1, sem="relaxed")
        return
    wanted = _wanted(candidates, tl.minimum(candidates, SAMPLE), CAPACITY)
    passed = CAPACITY + 1
    attempts = 0
    while (passed > CAPACITY) & (attempts < 2):
        tl.debug_barrier()  # the same places may be written again
        threshold = sampled_threshold(scores, sinks, end, wanted, SAMPLE)
        passed = collect(scores, ranking, threshold, sinks, end, CAPACITY, BLOCK)
        # What passed says how far off the sample was: if too many, once more, with half of it.
        wanted = tl.maximum((wanted.to(tl.float32) * CAPACITY / (2.0 * passed)).to(tl.int32), 1)
        attempts += 1
    fits = passed <= CAPACITY
    if fits:
        positions, inside = written_tokens(ranking, passed, CAPACITY)
        ranked = sort_ranking(scores, ranking, positions, inside, passed, CAPACITY)
        note_turns(first_turn, new_tokens_per_rank, ranked, passed, head, num_heads, CAPACITY)
    tl.store(depth + head, tl.where(fits, passed, 0))

    if is_last_block(block_counters + row, num_heads):
        heads = tl.arange(0, PADDED_HEADS)
        inside = heads < num_heads
        depths = tl.load(depth + heads, mask=inside, other=CAPACITY, cache_modifier=".cg")
        cut = cut_turns(
            rankings,
            first_turn,
            new_tokens_per_rank,
            tl.min(depths, 0),  # the end of the shortest ranking
            selected,
            num_heads,
            ranking_head_stride,
            PADDED_HEADS,
            COUNTED_RANKS,
        )
        tl.store(last_turn + row, cut)
        if cut == NEEDS_FULL_RANKING:
            tl.atomic_add(full_ranking_rows, 1, sem="relaxed")


def shortlist_capacity(selected: int) -> int:
    """Tokens a head that a shortlist has room for, a power of two.

    Heads of real models are united after a fifth to a half of `selected` ranks (docs/log.md).
    """
    small = min(256, triton.next_power_of_2(2 * selected))
    return max(16, small, triton.next_power_of_2(triton.cdiv(selected, 2)))


def counted_ranks(selected: int) -> int:
    """Ranks at which a token can be met first, a power of two: of shortlists or whole rankings."""
    return max(shortlist_capacity(selected), triton.next_power_of_2(max(1, selected)))


def shortlist_tokens(
    scores: Tensor,
    indptr: Tensor,
    *,
    budget_split: BudgetSplit,
    capacity: int,
    ranking: Tensor,
    depth: Tensor,
    first_turn: Tensor,
    last_turn: Tensor,
    new_tokens_per_rank: Tensor,
    block_counters: Tensor,
    full_ranking_rows: Tensor,
) -> None:
    """Rank the very best candidates of every head in each row over the budget, and unite them.

    Token t of row b is chosen if `first_turn[b, t] <= last_turn[b]`.

    Args:
        scores: [B, H, N] f32, from `score_tokens`; N a multiple of 4, at least the longest row.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        shares: rows within its budget stay untouched; its ends are no candidates; its `selected`,
            at least 1, are chosen.
        capacity: from `shortlist_capacity`.
        ranking: [B, H, >= capacity] int32; positions, best first, are written to its beginning.
        depth: [B, H] int32; how many were ranked. 0 where more would have passed than fit, and in
            a row that is left to `rank_tokens` untried, which sorts all of its candidates.
        first_turn: [B, N] int32, NEVER at first; a token's first turn is written.
        last_turn: [B] int32, written: UNDECIDED where rankings are not deep enough or not tried.
        met_counts: [B, `met_ranks(selected)`] int32, 0 at first, and afterwards but in undecided
            rows: tokens whose first turn is at each rank.
        arrivals: [B] int32, zero before and after.
        undecided_rows: [1] int64, counts them.
    """
    ints = {"indptr": indptr, "ranking": ranking, "depth": depth, "first_turn": first_turn}
    ints |= {"last_turn": last_turn, "met_counts": new_tokens_per_rank, "arrivals": block_counters}
    check_tensors(scores=scores, **ints, full_ranking_rows=full_ranking_rows)
    check_int32(**ints)
    rows, heads, columns = scores.shape
    if columns % 4:
        raise ValueError(f"rows of scores must have a multiple of 4 columns, not {columns}")
    _shortlist[(rows, heads)](
        *(
            scores,
            indptr,
            ranking,
            depth,
            first_turn,
            last_turn,
            new_tokens_per_rank,
            block_counters,
        ),
        *(
            full_ranking_rows,
            budget_split.budget,
            budget_split.sinks,
            budget_split.recent,
            budget_split.selected,
            heads,
        ),
        *(scores.stride(0), scores.stride(1), ranking.stride(0), ranking.stride(1)),
        *(first_turn.stride(0), new_tokens_per_rank.stride(0)),
        NEEDS_FULL_RANKING=NEEDS_FULL_RANKING,
        CAPACITY=capacity,
        SORTED_AT_ONCE=padded_ranks(budget_split.selected),
        SAMPLE=sample_size(columns),
        BLOCK=SHORTLIST_BLOCK,
        PADDED_HEADS=triton.next_power_of_2(heads),
        COUNTED_RANKS=new_tokens_per_rank.shape[1],
        num_warps=sort_warps(capacity),
        **pdl_options(),
    )
