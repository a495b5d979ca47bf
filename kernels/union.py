"""One set for all heads: heads take turns, and repeats are skipped until enough tokens are chosen.

Defined by `reference.unite_rankings`. A scatter-min finds each token's first turn and counts, for
each rank, the tokens that are new there. So the last turn of the set is found without walking
through the turns: the work is linear. The union has no launch of its own: the program that ranks a
head records the head's turns, the last of a row's programs to end finds the row's last turn, and
the next launch counts the chosen tokens.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    NEEDS_FULL_RANKING,
    NO_TURN,
    RowBuffers,
    check_int32,
    check_tensors,
)
from lim_sglang.kernels.packed import PackedRows

_NO_TURN: tl.constexpr = tl.constexpr(NO_TURN)
_NEEDS_FULL_RANKING: tl.constexpr = tl.constexpr(NEEDS_FULL_RANKING)


@dataclass(frozen=True)
class RankingBuffers(RowBuffers):
    """Rankings and turns of a chunk of rows, shared by the kernels from shortlist to compaction.

    Shapes: R rows at most, H query heads, N the longest row there can be.
    """

    ranking: Tensor
    """[R, H, >= the deepest ranking] int32, each head's positions, best first."""
    depth: Tensor
    """[R, H] int32, ranks in each shortlist; 0 if more candidates passed than there was room for,
    and in rows that are left to `rank_tokens`."""
    first_turn: PackedRows
    """A list of int32 for each row, NO_TURN between two steps."""
    last_turn: Tensor
    """[R] int32; a token of row b is chosen if its first turn is at most `last_turn[b]`.
    NEEDS_FULL_RANKING where no shortlist was tried, or shortlists are not deep enough."""
    new_tokens_per_rank: Tensor
    """[R, a power of two from the deepest ranking on] int32, tokens whose first turn is at each
    rank; 0 between two steps."""
    chosen_counts: Tensor
    """[R, a power of two from N / COMPACT_BLOCK on] int32, chosen tokens per block of positions."""
    block_counters: Tensor
    """[R] int32, programs of a row that have ended; 0 between two kernels."""
    rows_fully_ranked: Tensor
    """[1] int64, rows so far that shortlists left to a full ranking, counted per SELECT layer."""

    @classmethod
    def allocate(cls, scores: PackedRows, depth: int) -> "RankingBuffers":
        """Allocate for scores of R rows and rankings of up to `depth` tokens a head."""
        rows, heads, values = scores.max_rows, scores.lists, scores.values
        blocks = triton.next_power_of_2(triton.cdiv(scores.columns, COMPACT_BLOCK))

        def ints(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=values.device)

        return cls(
            ranking=ints(rows, heads, depth),
            depth=ints(rows, heads),
            first_turn=replace(scores, values=ints(len(values) // heads, fill=NO_TURN), lists=1),
            last_turn=ints(rows, fill=NEEDS_FULL_RANKING),
            new_tokens_per_rank=ints(rows, triton.next_power_of_2(depth)),
            chosen_counts=ints(rows, blocks),
            block_counters=ints(rows),
            rows_fully_ranked=ints(1, dtype=torch.int64),
        )

    def reset(self) -> None:
        """Restore the state between two steps, for a step that was not finished."""
        self.first_turn.values.fill_(NO_TURN)
        self.last_turn.fill_(NEEDS_FULL_RANKING)
        self.new_tokens_per_rank.zero_()

    def check(self, scores: PackedRows, indptr: Tensor) -> None:
        """Refuse tensors that the ranking kernels would misread."""
        ints = vars(self) | {"first_turn": self.first_turn.values}
        rows_fully_ranked = ints.pop("rows_fully_ranked")
        check_tensors(
            scores=scores.values, indptr=indptr, rows_fully_ranked=rows_fully_ranked, **ints
        )
        check_int32(indptr=indptr, **ints)


@triton.jit
def lower_turns(first_turn, new_tokens_per_rank, tokens, ranks, turns, inside, num_heads):
    """Lower the first turns of different tokens.

    `new_tokens_per_rank` counts each token once, at the best rank that any head has given it yet.
    """
    before = tl.atomic_min(first_turn + tokens, turns, mask=inside, sem="relaxed")
    lowered = inside & (turns < before)
    tl.atomic_add(new_tokens_per_rank + ranks, 1, mask=lowered, sem="relaxed")
    moved = lowered & (before != _NO_TURN)
    tl.atomic_add(
        new_tokens_per_rank + tl.where(moved, before // num_heads, 0), -1, mask=moved, sem="relaxed"
    )


@triton.jit
def record_turns(
    first_turn, new_tokens_per_rank, ranked, count, head, num_heads, PADDED: tl.constexpr
):
    """Lower the first turns of the `count` tokens that a head has ranked, best first."""
    ranks = tl.arange(0, PADDED)
    turns = (ranks * num_heads + head).to(tl.int32)
    lower_turns(first_turn, new_tokens_per_rank, ranked, ranks, turns, ranks < count, num_heads)


@triton.jit
def find_last_rank(new_tokens, selected, COUNTED_RANKS: tl.constexpr):
    """Return the rank at which `selected` tokens are reached, and the new tokens before it.

    The rank is COUNTED_RANKS if they are not reached.
    """
    last_rank = tl.sum((tl.cumsum(new_tokens, 0) < selected).to(tl.int32), 0)
    ranks = tl.arange(0, COUNTED_RANKS)
    return last_rank, tl.sum(tl.where(ranks < last_rank, new_tokens, 0), 0)


@triton.jit
def find_last_turn(
    ranking,  # [H, >= num_ranks] int32, of one row
    first_turn,  # [>= S] int32
    new_tokens_per_rank,  # [COUNTED_RANKS] int32
    num_ranks,  # ranks that every head has recorded
    selected,
    num_heads,
    ranking_head_stride,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
):
    """Return the turn of the last chosen token; NEEDS_FULL_RANKING if turns choose too few.

    Resets `new_tokens_per_rank` on success. Reads bypass L1, since other programs wrote the data.
    NEEDS_FULL_RANKING is lower than any turn.
    """
    ranks = tl.arange(0, COUNTED_RANKS)
    new_tokens = tl.load(
        new_tokens_per_rank + ranks, mask=ranks < num_ranks, other=0, cache_modifier=".cg"
    )
    last_rank, num_before = find_last_rank(new_tokens, selected, COUNTED_RANKS)
    last_turn = _NEEDS_FULL_RANKING
    if last_rank < COUNTED_RANKS:
        heads = tl.arange(0, PADDED_HEADS)
        inside = heads < num_heads
        ranked = ranking + heads.to(tl.int64) * ranking_head_stride + last_rank
        token = tl.load(ranked, mask=inside, other=0, cache_modifier=".cg")
        turn = tl.load(first_turn + token, mask=inside, other=-1, cache_modifier=".cg")
        turns = last_rank * num_heads + heads
        new = (inside & (turn == turns)).to(tl.int32)
        fits = (new > 0) & (num_before + tl.cumsum(new, 0) <= selected)
        last_turn = tl.max(tl.where(fits, turns, _NEEDS_FULL_RANKING), 0)
        tl.debug_barrier()  # no thread resets what another thread has yet to read
        tl.store(new_tokens_per_rank + ranks, 0)
    return last_turn


@triton.jit
def count_chosen(
    first_turn,  # [>= length] int32
    chosen_counts,  # [>= blocks of length] int32
    last_turn,
    length,
    first_block,
    step,
    BLOCK: tl.constexpr,
):
    """Count the chosen tokens of every `step`-th block of positions from `first_block` on."""
    for block in range(first_block, tl.cdiv(length, BLOCK), step):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        inside = positions < length
        turn = tl.load(first_turn + positions, mask=inside, other=_NO_TURN, cache_modifier=".cg")
        tl.store(chosen_counts + block, tl.sum((turn <= last_turn).to(tl.int32), 0))
