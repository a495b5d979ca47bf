"""One set on all ranks of tensor parallelism, which share the query heads, by one gather.

Turns: each rank lists the first `selected` tokens of its own heads, with their turns among the
heads of all ranks; every rank then merges all lists, as `union.py` merges the rankings of heads.
Defined by `reference.turns_of_rank` and `reference.keep_by_turns`. No score is exchanged, so ranks
cannot disagree. Masses and bounds are exchanged whole, and summed or compared in the same order on
each rank.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMPACT_BLOCK,
    COMPACT_SPLITS,
    MERGE_BLOCK,
    NEEDS_FULL_RANKING,
    NO_TURN,
    WIDE_WARPS,
    RowBuffers,
    check_int32,
    check_tensors,
    is_last_block,
)
from lim_sglang.kernels.packed import PackedRows, packed_row
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.union import RankingBuffers, find_last_rank, lower_turns

_NEEDS_FULL_RANKING: tl.constexpr = tl.constexpr(NEEDS_FULL_RANKING)
_NO_TURN: tl.constexpr = tl.constexpr(NO_TURN)
MIN_BINS = 32
"""Fewest bins of a histogram: one for each thread of a warp."""


class HeadRanks(Protocol):
    """The ranks that share the query heads, as one of them sees them."""

    @property
    def rank(self) -> int:
        """Index of this rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def gather_into(self, part: Tensor, out: Tensor) -> None:
        """Write the parts of all ranks to `out`, [ranks, …], in rank order. All ranks call this
        together; a CUDA graph may capture it."""


def gather(ranks: HeadRanks, part: Tensor) -> Tensor:
    """Return the parts of all ranks, [ranks, …], in new memory; not for a CUDA graph."""
    parts = part.new_empty(ranks.size, *part.shape)
    ranks.gather_into(part.contiguous(), parts)
    return parts


@triton.jit(do_not_specialize=["budget", "selected", "num_heads", "first_head", "all_heads"])
def _list_turns(
    indptr,  # [B + 1] int32
    first_turn,  # [B, S] int32, packed; reset
    last_turn,  # [B] int32
    chosen_counts,  # [B, PADDED_COUNTS] int32, of BLOCK positions each
    listed,  # [B, selected, 2] int32
    budget,
    selected,
    num_heads,  # of this rank
    first_head,  # of this rank, among those of all ranks
    all_heads,
    count_row_stride,
    PADDED_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    begin, _ = packed_row(indptr, row, 1)
    last = tl.load(last_turn + row)
    blocks = tl.arange(0, PADDED_COUNTS)
    counts = chosen_counts + row * count_row_stride + blocks
    listed += row * selected * 2
    for block in range(tl.program_id(1), tl.cdiv(length, BLOCK), tl.num_programs(1)):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        inside = positions < length
        turns = first_turn + begin + positions
        turn = tl.load(turns, mask=inside, other=_NO_TURN)
        tl.store(turns, _NO_TURN, mask=inside & (turn != _NO_TURN))
        chosen = inside & (turn <= last)
        before = tl.sum(tl.load(counts, mask=blocks < block, other=0), 0)
        index = 2 * (before + tl.cumsum(chosen.to(tl.int32), 0) - 1)
        among_all = turn // num_heads * all_heads + first_head + turn % num_heads
        tl.store(listed + index, positions, mask=chosen)
        tl.store(listed + index + 1, among_all, mask=chosen)


@triton.jit
def _load_turns(listed, first, selected, BLOCK: tl.constexpr):
    """Load up to BLOCK tokens and their turns from the index `first` of one rank's list."""
    index = first + tl.arange(0, BLOCK)
    inside = index < selected
    token = tl.load(listed + 2 * index, mask=inside, other=0)
    turn = tl.load(listed + 2 * index + 1, mask=inside, other=_NO_TURN)
    return token, turn, inside


@triton.jit(do_not_specialize=["num_rows", "budget", "selected", "all_heads"])
def _merge_turns(
    indptr,  # [B + 1] int32
    listed,  # [ranks, B, selected, 2] int32: tokens and turns
    first_turn,  # [B, S] int32, packed
    last_turn,  # [B] int32
    new_tokens_per_rank,  # [B, COUNTED_RANKS] int32
    chosen_counts,  # [B, PADDED_COUNTS] int32
    block_counters,  # [B] int32
    num_rows,
    budget,
    selected,
    all_heads,
    rank_count_row_stride,
    count_row_stride,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
    PADDED_COUNTS: tl.constexpr,
    COUNTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    begin, _ = packed_row(indptr, row, 1)
    first_turn += begin
    new_tokens_per_rank += row * rank_count_row_stride
    num_ranks = tl.num_programs(1)
    pitch = num_rows.to(tl.int64) * selected * 2  # from one rank's lists to the next one's
    listed += row * selected * 2
    own = listed + tl.program_id(1) * pitch
    for first in range(0, selected, BLOCK):
        token, turn, inside = _load_turns(own, first, selected, BLOCK)
        lower_turns(
            first_turn, new_tokens_per_rank, token, turn // all_heads, turn, inside, all_heads
        )

    if is_last_block(block_counters + row, num_ranks):
        ranks = tl.arange(0, COUNTED_RANKS)
        new_tokens = tl.load(new_tokens_per_rank + ranks, cache_modifier=".cg")
        last_rank, num_before = find_last_rank(new_tokens, selected, COUNTED_RANKS)
        # The heads that choose a new token at the last rank, in their order.
        chosen_by = tl.zeros((PADDED_HEADS,), tl.int32)
        for rank in range(num_ranks):
            for first in range(0, selected, BLOCK):
                token, turn, inside = _load_turns(listed + rank * pitch, first, selected, BLOCK)
                inside &= turn // all_heads == last_rank
                found = tl.load(first_turn + token, mask=inside, other=-1, cache_modifier=".cg")
                chosen_by += tl.histogram(turn % all_heads, PADDED_HEADS, mask=found == turn)
        heads = tl.arange(0, PADDED_HEADS)
        fits = (chosen_by > 0) & (num_before + tl.cumsum(chosen_by, 0) <= selected)
        last = tl.max(tl.where(fits, last_rank * all_heads + heads, _NEEDS_FULL_RANKING), 0)
        tl.store(last_turn + row, last)
        counts = tl.zeros((PADDED_COUNTS,), tl.int32)
        for rank in range(num_ranks):
            for first in range(0, selected, BLOCK):
                token, turn, inside = _load_turns(listed + rank * pitch, first, selected, BLOCK)
                inside &= turn <= last
                found = tl.load(first_turn + token, mask=inside, other=-1, cache_modifier=".cg")
                counts += tl.histogram(token // COUNTED_BLOCK, PADDED_COUNTS, mask=found == turn)
        blocks = tl.arange(0, PADDED_COUNTS)
        tl.store(
            chosen_counts + row * count_row_stride + blocks, counts, mask=blocks < count_row_stride
        )
        tl.debug_barrier()  # no thread resets what another thread has yet to read
        tl.store(new_tokens_per_rank + ranks, 0)


@dataclass(frozen=True)
class TurnExchange(RowBuffers):
    """Lists of turns that ranks exchange, for chunks of R rows."""

    ranks: HeadRanks
    own: Tensor
    """[R, selected, 2] int32: tokens of this rank's union, and their turns among all heads."""
    gathered: Tensor
    """[ranks * R * selected * 2] int32: those of all ranks, of the rows of a chunk."""

    @classmethod
    def allocate(
        cls, ranks: HeadRanks | None, buffers: RankingBuffers, budget_split: BudgetSplit
    ) -> Self | None:
        """Allocate for the rows of `buffers`; None without ranks."""
        if ranks is None:
            return None
        rows = buffers.last_turn.shape[0]
        own = buffers.last_turn.new_zeros(rows, budget_split.selected, 2)
        return cls(ranks, own, own.new_zeros(ranks.size * own.numel()))

    def first_rows(self, num_rows: int) -> Self:
        """Return the same memory for fewer rows, whose lists lie close together."""
        return replace(self, own=self.own[:num_rows])

    def unite(self, indptr: Tensor, budget_split: BudgetSplit, buffers: RankingBuffers) -> None:
        """Turn the union of this rank's heads into the union of all heads, in rows over the budget.

        Writes `first_turn`, `last_turn` and `chosen_counts`, as `rank_tokens` does for the heads of
        one rank.

        Args:
            indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
            budget_split: `selected`, at least 1, are chosen.
            buffers: of B rows and this rank's heads, from `rank_tokens`.
        """
        self.list_turns(indptr, budget_split, buffers)
        gathered = self.gathered[: self.ranks.size * self.own.numel()]
        self.ranks.gather_into(self.own, gathered)
        self.merge_turns(indptr, budget_split, buffers, gathered)

    def list_turns(
        self, indptr: Tensor, budget_split: BudgetSplit, buffers: RankingBuffers
    ) -> None:
        """Write the tokens that this rank's heads choose to `own`; reset `first_turn`."""
        buffers.check(buffers.first_turn, indptr)
        heads = buffers.ranking.shape[1]
        blocks = triton.cdiv(buffers.first_turn.columns, COMPACT_BLOCK)
        _list_turns[(len(indptr) - 1, min(blocks, COMPACT_SPLITS))](
            indptr,
            buffers.first_turn.values,
            buffers.last_turn,
            buffers.chosen_counts,
            self.own,
            budget_split.budget,
            budget_split.selected,
            heads,
            self.ranks.rank * heads,
            self.ranks.size * heads,
            buffers.chosen_counts.stride(0),
            PADDED_COUNTS=buffers.chosen_counts.shape[1],
            BLOCK=COMPACT_BLOCK,
            num_warps=WIDE_WARPS,
        )

    def merge_turns(
        self,
        indptr: Tensor,
        budget_split: BudgetSplit,
        buffers: RankingBuffers,
        gathered: Tensor,
    ) -> None:
        """Find the union of all ranks' lists.

        Args:
            gathered: [ranks * B * selected * 2] int32.
        """
        check_tensors(indptr=indptr, gathered=gathered)
        check_int32(gathered=gathered)
        rows, all_heads = len(indptr) - 1, self.ranks.size * buffers.ranking.shape[1]
        _merge_turns[(rows, self.ranks.size)](
            indptr,
            gathered,
            buffers.first_turn.values,
            buffers.last_turn,
            buffers.new_tokens_per_rank,
            buffers.chosen_counts,
            buffers.block_counters,
            rows,
            budget_split.budget,
            budget_split.selected,
            all_heads,
            buffers.new_tokens_per_rank.stride(0),
            buffers.chosen_counts.stride(0),
            PADDED_HEADS=max(MIN_BINS, triton.next_power_of_2(all_heads)),
            COUNTED_RANKS=buffers.new_tokens_per_rank.shape[1],
            PADDED_COUNTS=max(MIN_BINS, buffers.chosen_counts.shape[1]),
            COUNTED_BLOCK=COMPACT_BLOCK,
            BLOCK=MERGE_BLOCK,
            num_warps=WIDE_WARPS,
        )


@dataclass(frozen=True)
class ScoreExchange(RowBuffers):
    """Masses or bounds that each rank computes from its own heads, for chunks of rows."""

    ranks: HeadRanks
    own: PackedRows
    """Those of this rank's heads."""
    gathered: Tensor
    """[ranks * values of all rows] f32: those of all ranks, of the rows of a chunk."""
    by_largest: bool
    """The largest of the ranks' values counts, not their sum."""

    @classmethod
    def allocate(
        cls, ranks: HeadRanks | None, scores: PackedRows, *, by_largest: bool
    ) -> Self | None:
        """Allocate for rows as `scores` has them; None without ranks."""
        if ranks is None:
            return None
        own = replace(scores, values=torch.zeros_like(scores.values))
        return cls(ranks, own, own.values.new_zeros(ranks.size * len(own.values)), by_largest)

    def first_rows(self, num_rows: int) -> Self:
        """Return the same memory for fewer rows."""
        return replace(self, own=self.own.first_rows(num_rows))

    def unite(self, out: PackedRows) -> None:
        """Write the values that all heads give, the same on all ranks.

        What rows can take is exchanged, whatever they have: a graph knows no lengths. Values past
        the rows' ends mean nothing.

        Args:
            out: rows as `own` has them.
        """
        used = self.own.most_values
        gathered = self.gathered[: self.ranks.size * used]
        self.ranks.gather_into(self.own.values[:used], gathered)
        self.merge(gathered.view(self.ranks.size, used), out.values[:used])

    def merge(self, parts: Tensor, out: Tensor) -> Tensor:
        """Write the sum, or the largest, of what ranks have to `out`, in rank order.

        Args:
            parts: [ranks, …].
        """
        join = torch.maximum if self.by_largest else torch.add
        out.copy_(parts[0])
        for part in parts[1:]:
            join(out, part, out=out)
        return out

    def of_all_ranks(self, own: Tensor) -> Tensor:
        """Return the values of a row that all heads give. All ranks call this together.

        Args:
            own: [lists, columns], of this rank's heads.
        """
        parts = gather(self.ranks, own)
        return self.merge(parts, torch.empty_like(own))
