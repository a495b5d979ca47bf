"""Selection of one SELECT layer: memory allocated once, and the kernels that run in it, in order.

`RankSelector` is the paper's selection; `MassSelector` ranks tokens by attention mass.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
import triton
from torch import Tensor

from lim_sglang.kernels.compact import StepSlots, compact_slots
from lim_sglang.kernels.full_ranking import rank_tokens
from lim_sglang.kernels.launch import RowBuffers
from lim_sglang.kernels.mass import candidate_capacity, log_sum_exp, softmax_mass, topk_by_mass
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.scores import score_tokens
from lim_sglang.kernels.shortlist import shortlist_capacity, shortlist_tokens
from lim_sglang.kernels.union import RankingBuffers

ALIGNMENT = 64
"""Rows of scores begin at multiples of this many elements, for wide loads."""
MAX_SCORE_BYTES = 256 << 20
"""Most bytes for the scores of a chunk of rows, unless a single row takes more."""


@dataclass(frozen=True)
class Selector(RowBuffers, ABC):
    """Selection of the kept slots of a batch, chunk by chunk of rows.

    Shapes: R rows per chunk, B rows of the batch, H query heads, N the longest row there can be.
    """

    budget_split: BudgetSplit
    scores: Tensor
    """[R, H, N] f32, raw q·k."""
    lse: Tensor | None
    """[>= B, H] f32, log-sum-exp of the scaled scores to base 2; None if selection ignores it."""

    @classmethod
    def allocate(
        cls,
        budget_split: BudgetSplit,
        *,
        max_rows: int,
        num_heads: int,
        context: int,
        device: torch.device | str,
    ) -> Self:
        """Allocate for batches of `max_rows` rows; `MAX_SCORE_BYTES` limits the rows of a chunk.

        Args:
            budget_split: tokens that each row keeps.
            max_rows: most rows of a batch.
            num_heads: query heads.
            context: tokens of the longest row there can be.
            device: of all tensors.
        """
        columns = triton.cdiv(context, ALIGNMENT) * ALIGNMENT
        rows = max(1, min(max_rows, MAX_SCORE_BYTES // (4 * num_heads * columns)))
        scores = torch.zeros(rows, num_heads, columns, dtype=torch.float32, device=device)
        return cls._with_scores(budget_split, scores, max_rows)

    @classmethod
    @abstractmethod
    def _with_scores(cls, budget_split: BudgetSplit, scores: Tensor, max_rows: int) -> Self:
        """Allocate the other buffers, for chunks of these scores and batches of `max_rows` rows."""

    @property
    @abstractmethod
    def deciding_scores(self) -> Tensor:
        """Scores that decide which tokens are kept, [R, heads that take turns, N] f32."""

    @property
    def max_rows(self) -> int:
        """R, the most rows of a chunk."""
        return self.scores.shape[0]

    def counts(self) -> dict[str, int]:
        """Return counters for `/server_info`; waits for the device."""
        return {}

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
        num_rows = query.shape[0]
        for first in range(0, num_rows, self.max_rows):
            rows = min(self.max_rows, num_rows - first)
            chunk, lists = self.first_rows(rows), step.chunk(first, rows)
            is_scored = first == 0 and first_chunk_is_scored
            if not is_scored:
                chunk.score(query[first : first + rows], keys, lists)
            chunk.select_scored(lists, scale=scale, has_lse=is_scored)

    def score(self, query: Tensor, keys: Tensor, step: StepSlots) -> None:
        """Write raw q·k of a chunk of R rows to `scores`."""
        budget = self.budget_split.budget
        score_tokens(query, keys, step.indptr, step.slots, budget, self.scores)

    @abstractmethod
    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Write the kept slots of a chunk of R rows whose scores are in `scores`.

        Args:
            step: slots of R rows.
            scale: factor on q·k before the softmax.
            has_lse: `lse` holds the chunk's.
        """


@dataclass(frozen=True)
class RankSelector(Selector):
    """The paper's selection: heads take turns, each by its own ranking."""

    buffers: RankingBuffers

    @classmethod
    def _with_scores(cls, budget_split: BudgetSplit, scores: Tensor, max_rows: int) -> Self:
        depth = max(budget_split.selected, shortlist_capacity(budget_split.selected))
        return cls(budget_split, scores, None, RankingBuffers.allocate(scores, depth))

    @property
    def deciding_scores(self) -> Tensor:
        """Raw q·k: scale and softmax change no head's ranking."""
        return self.scores

    def counts(self) -> dict[str, int]:
        """Return the rows that shortlists left to a full ranking, counted per SELECT layer."""
        return {"rows_fully_ranked": int(self.buffers.rows_fully_ranked)}

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Rank, unite and compact."""
        self.unite(step.indptr)
        self.compact(step)

    def unite(self, indptr: Tensor) -> None:
        """Find each row's last turn, with shortlists and, where they fail, full rankings."""
        if self.budget_split.selected:  # else nothing but sinks and recent tokens is kept
            self.shortlist(indptr)
            self.rank_fully(indptr)

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
class MassSelector(Selector):
    """Selection by the attention mass that all heads together give a token; not the paper's."""

    lse: Tensor
    mass: Tensor
    """[R, N] f32."""
    candidates: Tensor
    """[R, `candidate_capacity(selected)`] int32."""

    @classmethod
    def _with_scores(cls, budget_split: BudgetSplit, scores: Tensor, max_rows: int) -> Self:
        rows, num_heads, columns = scores.shape
        capacity = candidate_capacity(budget_split.selected)
        return cls(
            budget_split=budget_split,
            scores=scores,
            lse=scores.new_zeros(max_rows, num_heads),  # a dense pass writes every row's
            mass=scores.new_zeros(rows, columns),
            candidates=scores.new_zeros(rows, capacity, dtype=torch.int32),
        )

    @property
    def deciding_scores(self) -> Tensor:
        """The masses, as the scores of one head."""
        return self.mass[:, None]

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Sum the heads' softmax weights and keep the top-k."""
        budget = self.budget_split.budget
        if not has_lse:
            log_sum_exp(self.scores, step.indptr, budget, scale, self.lse)
        softmax_mass(self.scores, step.indptr, self.lse, budget, scale, self.mass)
        self.topk(step)

    def topk(self, step: StepSlots) -> None:
        """Write the slots of sinks, top-k by mass and recent tokens."""
        topk_by_mass(self.mass, step, self.budget_split, self.candidates)
