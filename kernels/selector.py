"""Selection of kept slots: memory allocated once, and the kernels that run in it, in order.

`RankSelector` is LessIsMore's selection; `MassSelector` ranks tokens, or pages of them, by
attention mass; `HeadSelector` ranks tokens for each query head; `WindowSelector` keeps by position,
without scores. Selectors of pages by summaries of their keys are in `page_selector.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
from torch import Tensor

from lim_sglang.kernels import reference, reference_rivals
from lim_sglang.kernels.compact import StepSlots, compact_slots, copy_window
from lim_sglang.kernels.exchange import HeadRanks, ScoreExchange, TurnExchange, gather
from lim_sglang.kernels.full_ranking import rank_tokens
from lim_sglang.kernels.launch import COUNTED_SCORES, RowBuffers
from lim_sglang.kernels.mass import candidate_capacity, log_sum_exp, softmax_mass, topk_by_mass
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.reference import BudgetSplit, keep_tokens
from lim_sglang.kernels.scores import score_tokens
from lim_sglang.kernels.shortlist import shortlist_capacity, shortlist_tokens
from lim_sglang.kernels.union import RankingBuffers

MAX_CHUNK_ROWS = 256
"""Most rows of a chunk: SGLang captures CUDA graphs of up to as many."""
MAX_CANDIDATE_BYTES = 256 << 20
"""Most bytes for the rankings, or the candidates, of a chunk of rows."""


@dataclass(frozen=True)
class Room:
    """The batches that memory is allocated for."""

    max_rows: int
    """Most rows of a batch."""
    num_heads: int
    """Query heads of this rank."""
    num_kv_heads: int
    """KV heads of this rank."""
    context: int
    """Tokens of the longest row there can be."""
    tokens: int
    """Tokens of all rows of a chunk together; a step with more takes smaller chunks."""
    device: torch.device | str
    cos_sin: Tensor | None = None
    """[positions, D] f32, the model's RoPE, for a policy that rotates back."""
    ranks: HeadRanks | None = None
    """The ranks of tensor parallelism; None if no list depends on the heads of others."""


@dataclass(frozen=True)
class Selector(RowBuffers, ABC):
    """Selection of the kept slots of a batch. B rows of the batch, H query heads."""

    budget_split: BudgetSplit
    """Parts of the budget, in tokens or, where pages are kept, in pages."""

    @property
    def budget(self) -> int:
        """Tokens that a row keeps at most."""
        return self.budget_split.budget

    @property
    def deciding_scores(self) -> PackedRows | None:
        """Scores that decide what is kept, a list for each head that takes turns; None if the
        lengths decide."""
        return None

    @property
    def own_scores(self) -> PackedRows | None:
        """Part of this rank in the deciding scores: all of them, if no rank has other heads."""
        return self.deciding_scores

    @abstractmethod
    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the positions that a row keeps, by the definition in torch: [n], or [lists, n]
        where heads have lists of their own.

        Args:
            deciding_scores: [heads that take turns, candidates] of the row.
            length: tokens of the row.
        """

    def chunks(
        self, query: Tensor, step: StepSlots, max_rows: int
    ) -> Iterator[tuple[int, Self, Tensor, StepSlots]]:
        """Yield, for each chunk of rows, the first row, memory for the chunk, queries and slots."""
        for first in range(0, query.shape[0], max_rows):
            rows = min(max_rows, query.shape[0] - first)
            yield first, self.first_rows(rows), query[first : first + rows], step.chunk(first, rows)

    def in_chunks_of(self, num_rows: int) -> Self:
        """Return the same memory for chunks of fewer rows, where there are chunks."""
        return self

    def fits(self, num_tokens: int) -> bool:
        """Return True if a step whose rows have so many tokens together needs no smaller chunks.

        Tokens that rows share count for each of them, so rows may have more than the KV cache.
        """
        return self.deciding_scores is None or self.deciding_scores.fits(num_tokens)

    def for_rows(self, lengths: Tensor) -> Self:
        """Return the same memory, with chunks that rows of these lengths fit into.

        Args:
            lengths: [B] int64, on the host.
        """
        scores = self.deciding_scores
        if scores is None or self.fits(int(lengths.sum())):
            return self
        num_rows = max(1, scores.tokens // int(lengths.max()))
        return self.in_chunks_of(min(num_rows, scores.max_rows))

    def num_candidates(self, length: int) -> int:
        """Return the deciding scores of one list that a row of this length has."""
        return length

    def of_all_ranks(self, own_scores: Tensor) -> Tensor:
        """Return the deciding scores of a row. All ranks call this together, outside a CUDA graph.

        Args:
            own_scores: [lists of this rank, columns].

        Returns:
            [lists of all ranks that take turns, columns].
        """
        return own_scores

    def counts(self) -> dict[str, int]:
        """Return counters for `/server_info`; waits for the device."""
        return {}


@dataclass(frozen=True)
class WindowSelector(Selector):
    """Selection of the oldest and the newest tokens, once a step."""

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return sinks and window."""
        return reference_rivals.keep_by_position(length, self.budget, self.budget_split.sinks)[0]

    def keep_slots(self, step: StepSlots) -> None:
        """Write each row's kept slots to `step.kept`."""
        copy_window(step, self.budget_split)


@dataclass(frozen=True)
class ScoreSelector(Selector):
    """Selection by scores, chunk by chunk of R rows."""

    scores: PackedRows
    """Raw q·k, a list for each query head."""
    lse: Tensor | None
    """[>= B, H] f32, log-sum-exp of the scaled scores to base 2; None if selection ignores it."""

    @classmethod
    @abstractmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room) -> Self:
        """Allocate for batches that keep `budget_split`."""

    @property
    def deciding_scores(self) -> PackedRows:
        """Raw q·k: scale and softmax change no head's ranking."""
        return self.scores

    @property
    def max_rows(self) -> int:
        """R, the most rows of a chunk."""
        return self.scores.max_rows

    def in_chunks_of(self, num_rows: int) -> Self:
        """Return the same memory for chunks of fewer rows."""
        return replace(self, scores=self.scores.first_rows(num_rows))

    def select(
        self,
        query: Tensor,
        keys: Tensor,
        step: StepSlots,
        *,
        scale: float,
        first_chunk_is_scored: bool = False,
    ) -> None:
        """Write each row's kept slots to `step.kept`.

        Args:
            query: [B, H, D].
            keys: [P, G, D], one layer of the KV cache.
            step: slots of B rows.
            scale: factor on q·k before the softmax.
            first_chunk_is_scored: `scores` and `lse` hold the first chunk's, from a dense pass
                that stores them (`scores.ScoreStoringAttention`).
        """
        for first, chunk, of_rows, lists in self.chunks(query, step, self.max_rows):
            is_scored = first == 0 and first_chunk_is_scored
            if not is_scored:
                chunk.score(of_rows, keys, lists)
            chunk.select_scored(lists, scale=scale, has_lse=is_scored)

    def score(self, query: Tensor, keys: Tensor, step: StepSlots) -> None:
        """Write raw q·k of a chunk of R rows to `scores`."""
        score_tokens(query, keys, step.indptr, step.slots, self.budget, self.scores)

    @abstractmethod
    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Write the kept slots of a chunk of R rows whose scores are in `scores`.

        Args:
            step: slots of R rows.
            scale: factor on q·k before the softmax.
            has_lse: `lse` holds the chunk's.
        """


def allocate_scores(room: Room, lists: int, num_candidates: int, page: int = 1) -> PackedRows:
    """Allocate the scores of a chunk of rows; `MAX_CANDIDATE_BYTES` limits the rows.

    Args:
        lists: of a row.
        num_candidates: ranks, or candidates, that a row has room for besides, in all of its lists.
        page: tokens of each score.
    """
    rows = min(room.max_rows, MAX_CHUNK_ROWS, MAX_CANDIDATE_BYTES // (4 * num_candidates))
    return PackedRows.allocate(
        lists=lists,
        max_rows=max(1, rows),
        longest=room.context,
        tokens=room.tokens,
        device=room.device,
        page=page,
    )


def allocate_candidates(scores: PackedRows, capacity: int) -> Tensor:
    """Allocate the candidates of each list of a chunk of rows, [R, lists, capacity] int32.

    Raises:
        ValueError: a row may have more scores than are counted.
    """
    if scores.columns >= COUNTED_SCORES:
        raise ValueError(
            f"at most {COUNTED_SCORES - 1} scores of a row can be counted, not {scores.columns}"
        )
    shape = scores.max_rows, scores.lists, capacity
    return torch.zeros(shape, dtype=torch.int32, device=scores.values.device)


@dataclass(frozen=True)
class RankSelector(ScoreSelector):
    """LessIsMore's selection: heads take turns, each by its own ranking."""

    buffers: RankingBuffers
    exchange: TurnExchange | None = None
    """None if this rank has all heads."""

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room) -> Self:
        """Allocate scores and rankings."""
        depth = max(budget_split.selected, shortlist_capacity(budget_split.selected))
        scores = allocate_scores(room, room.num_heads, room.num_heads * depth)
        buffers = RankingBuffers.allocate(scores, depth)
        exchange = TurnExchange.allocate(room.ranks, buffers, budget_split)
        return cls(budget_split, scores, None, buffers, exchange)

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the union of the heads' rankings, sinks and recent tokens."""
        assert deciding_scores is not None
        return keep_tokens(deciding_scores[:, :length], self.budget_split)

    def counts(self) -> dict[str, int]:
        """Return the rows that shortlists left to a full ranking, counted per SELECT layer."""
        return {"rows_fully_ranked": int(self.buffers.rows_fully_ranked)}

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Rank, unite and compact."""
        self.unite(step.indptr)
        self.compact(step)

    def unite(self, indptr: Tensor) -> None:
        """Find each row's last turn, with shortlists and, where they fail, full rankings; then, if
        ranks share the heads, with the turns of all ranks."""
        if self.budget_split.selected:  # else nothing but sinks and recent tokens is kept
            self.shortlist(indptr)
            self.rank_fully(indptr)
            if self.exchange:
                self.exchange.unite(indptr, self.budget_split, self.buffers)

    def of_all_ranks(self, own_scores: Tensor) -> Tensor:
        """Return the scores of all heads, [heads of all ranks, columns]."""
        if self.exchange is None:
            return own_scores
        return gather(self.exchange.ranks, own_scores).flatten(0, 1)

    def shortlist(self, indptr: Tensor) -> None:
        """Try shortlists in every row over the budget."""
        shortlist_tokens(self.scores, indptr, self.budget_split, self.buffers)

    def rank_fully(self, indptr: Tensor) -> None:
        """Rank the rows that shortlists left open; count the chosen tokens of every row."""
        rank_tokens(self.scores, indptr, self.budget_split, self.buffers)

    def compact(self, step: StepSlots) -> None:
        """Write the slots of sinks, chosen and recent tokens."""
        compact_slots(step, self.budget_split, self.buffers)


@dataclass(frozen=True)
class MassSelector(ScoreSelector):
    """Selection by attention mass: of a token the heads' softmax weights, summed, or the largest of
    them; of a page the sum over its tokens."""

    lse: Tensor
    mass: PackedRows
    """One list of tokens or pages."""
    candidates: Tensor
    """[R, 1, `candidate_capacity(selected)`] int32."""
    by_largest: bool = False
    """A token's mass is the largest of the heads' weights, not their sum."""
    exchange: ScoreExchange | None = None
    """None if this rank has all heads."""

    @property
    def page(self) -> int:
        """Tokens that are kept or dropped together."""
        return self.mass.page

    @classmethod
    def allocate(
        cls, budget_split: BudgetSplit, room: Room, *, by_largest: bool = False, page: int = 1
    ) -> Self:
        """Allocate for batches that keep `budget_split` pages."""
        capacity = candidate_capacity(budget_split.selected)
        scores = allocate_scores(room, room.num_heads, capacity)
        mass = allocate_scores(room, 1, capacity, page)
        return cls(
            budget_split=budget_split,
            scores=scores,
            # A dense pass writes every row's.
            lse=scores.values.new_zeros(room.max_rows, room.num_heads),
            mass=mass,
            candidates=allocate_candidates(mass, capacity),
            by_largest=by_largest,
            exchange=ScoreExchange.allocate(room.ranks, mass, by_largest=by_largest),
        )

    @property
    def budget(self) -> int:
        """Tokens that a row keeps at most."""
        return self.budget_split.budget * self.page

    @property
    def deciding_scores(self) -> PackedRows:
        """The masses, as the scores of one head."""
        return self.mass

    @property
    def own_scores(self) -> PackedRows:
        """The masses that this rank's heads give."""
        return self.exchange.own if self.exchange else self.mass

    def of_all_ranks(self, own_scores: Tensor) -> Tensor:
        """Return the masses that all heads give."""
        return self.exchange.of_all_ranks(own_scores) if self.exchange else own_scores

    def num_candidates(self, length: int) -> int:
        """Return the row's tokens, or pages."""
        return triton.cdiv(length, self.page)

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the tokens of the top-k pages, sinks and recent pages."""
        assert deciding_scores is not None
        pages = keep_tokens(deciding_scores[:, : self.num_candidates(length)], self.budget_split)
        tokens = pages[:, None] * self.page + torch.arange(self.page, device=pages.device)
        return tokens[tokens < length]

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Weigh tokens or pages and keep the top-k."""
        if not has_lse:
            log_sum_exp(self.scores, step.indptr, self.budget, scale, self.lse)
        self.weigh(step.indptr, scale)
        self.topk(step)

    def masses(self, scores: Tensor, scale: float) -> Tensor:
        """Return the masses of one row [H, S] by the definition in torch, of tokens or pages."""
        weigh = reference_rivals.max_mass if self.by_largest else reference.softmax_mass
        mass = weigh(scores, scale)
        return mass if self.page == 1 else reference_rivals.page_mass(mass, self.page)

    def weigh(self, indptr: Tensor, scale: float) -> None:
        """Write the masses of every row over the budget, those that the heads of all ranks give."""
        softmax_mass(
            self.scores,
            indptr,
            self.lse,
            self.budget,
            scale,
            self.own_scores,
            by_largest=self.by_largest,
        )
        if self.exchange:
            self.exchange.unite(self.mass)

    def topk(self, step: StepSlots) -> None:
        """Write the slots of sinks, top-k by mass and recent pages."""
        topk_by_mass(self.mass, step, self.budget_split, self.candidates)


@dataclass(frozen=True)
class HeadSelector(ScoreSelector):
    """Selection by each query head for itself, by raw q·k."""

    candidates: Tensor
    """[R, H, `candidate_capacity(selected)`] int32."""

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room) -> Self:
        """Allocate scores and candidates."""
        capacity = candidate_capacity(budget_split.selected)
        scores = allocate_scores(room, room.num_heads, room.num_heads * capacity)
        return cls(budget_split, scores, None, allocate_candidates(scores, capacity))

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return each head's own list, [H, n]."""
        assert deciding_scores is not None
        return reference_rivals.keep_per_head(deciding_scores[:, :length], self.budget_split)

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Keep each head's top-k."""
        topk_by_mass(self.scores, step, self.budget_split, self.candidates)
