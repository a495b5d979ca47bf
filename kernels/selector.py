"""The memory that selection needs, allocated once, and the stages that run in it, in order.

`RankSelector` is the paper's selection; `MassSelector` orders tokens by attention mass.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
from torch import Tensor

from lim_sglang.kernels.compact import compact_slots
from lim_sglang.kernels.full_ranking import rank_tokens
from lim_sglang.kernels.launch import NEEDS_FULL_RANKING, NEVER
from lim_sglang.kernels.mass import candidate_capacity, log_sum_exp, softmax_mass, topk_by_mass
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.scores import score_tokens
from lim_sglang.kernels.shortlist import counted_ranks, shortlist_capacity, shortlist_tokens
from lim_sglang.kernels.union import padded_counts

ALIGNMENT = 64
"""Rows of scores begin at multiples of so many elements, for wide loads."""
MAX_SCORE_BYTES = 256 << 20
"""Scores of a chunk of rows take no more than this, unless a single row does."""


@dataclass(frozen=True)
class Selector(ABC):
    """Picks the kept slots of a batch, chunk by chunk, in memory of its own.

    Shapes: R rows a chunk, H query heads, N the longest row there can be.
    """

    budget_split: BudgetSplit
    scores: Tensor
    """[R, H, N] f32, raw q·k."""

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
        """Size a chunk by its scores, at most `max_rows` rows of `context` tokens or a few more."""
        columns = triton.cdiv(context, ALIGNMENT) * ALIGNMENT
        rows = max(1, min(max_rows, MAX_SCORE_BYTES // (4 * num_heads * columns)))
        scores = torch.zeros(rows, num_heads, columns, dtype=torch.float32, device=device)
        return cls._around(budget_split, scores, max_rows)

    @classmethod
    @abstractmethod
    def _around(cls, budget_split: BudgetSplit, scores: Tensor, max_rows: int) -> Self:
        """Take the rest of the memory, for chunks of these scores and batches of `max_rows`."""

    def narrow(self, rows: int) -> Self:
        """The same memory for a chunk of fewer rows; what is not by row stays whole."""
        fields: dict[str, Any] = {
            name: value[:rows] if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return type(self)(**fields)

    @abstractmethod
    def keep(
        self,
        indptr: Tensor,
        slots: Tensor,
        kept_indptr: Tensor,
        out: Tensor,
        *,
        scale: float,
        has_lse: bool,
    ) -> None:
        """Write the kept slots of a chunk of R rows whose scores are there; see `keep_slots`."""

    @property
    @abstractmethod
    def decisive(self) -> Tensor:
        """[R, heads that take turns, N] f32: what decides which tokens are kept."""

    def counts(self) -> dict[str, int]:
        """Counters of how it went so far, for `/server_info`; waits for the device."""
        return {}

    @property
    def lse(self) -> Tensor | None:
        """[>= B, H] f32, log2 of each head's normaliser; None where nothing needs it."""
        return None

    @property
    def max_rows(self) -> int:
        """R."""
        return self.scores.shape[0]

    @property
    def num_bytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def score(self, query: Tensor, keys: Tensor, indptr: Tensor, slots: Tensor) -> None:
        """Raw q·k of all heads and tokens."""
        score_tokens(query, keys, indptr, slots, self.budget_split.budget, self.scores)

    def keep_slots(
        self,
        query: Tensor,
        keys: Tensor,
        indptr: Tensor,
        slots: Tensor,
        kept_indptr: Tensor,
        out: Tensor,
        *,
        scale: float,
        first_chunk_is_scored: bool = False,
    ) -> Tensor:
        """Write each row's kept slots, ascending by position; a row within the budget keeps all.

        Args:
            query: [B, H, D].
            keys: [P, G, D], one layer of the KV cache.
            indptr, slots: [B + 1] and [indptr[B]] int32, all tokens, oldest first.
            kept_indptr: [B + 1] int32, `min(length, budget)` tokens a row.
            out: [kept_indptr[B]] int32 or longer.
            scale: factor on q·k before the softmax.
            first_chunk_is_scored: its scores and normalisers are there (`scoring.py`).
        """
        num_rows = query.shape[0]
        for first in range(0, num_rows, self.max_rows):
            rows = min(self.max_rows, num_rows - first)
            chunk, ends = self.narrow(rows), slice(first, first + rows + 1)
            scored = first == 0 and first_chunk_is_scored
            if not scored:
                chunk.score(query[first : first + rows], keys, indptr[ends], slots)
            chunk.keep(indptr[ends], slots, kept_indptr[ends], out, scale=scale, has_lse=scored)
        return out


@dataclass(frozen=True)
class RankSelector(Selector):
    """The paper's selection: heads take turns over their rankings."""

    ranking: Tensor
    """[R, H, the larger of selected and a shortlist's capacity] int32."""
    depth: Tensor
    """[R, H] int32, ranks in each shortlist."""
    first_turn: Tensor
    """[R, N] int32, NEVER between two steps."""
    last_turn: Tensor
    """[R] int32."""
    new_tokens_per_rank: Tensor
    """[R, ranks] int32, tokens first met at each rank; 0 between two steps."""
    chosen_counts: Tensor
    """[R, blocks of N] int32, chosen tokens among each block of positions."""
    block_counters: Tensor
    """[R] int32, 0 between two kernels."""
    full_ranking_rows: Tensor
    """[1] int64, rows so far that shortlists did not decide, each SELECT layer counted."""

    @classmethod
    def _around(cls, budget_split: BudgetSplit, scores: Tensor, max_rows: int) -> Self:
        rows, num_heads, columns = scores.shape
        num_ranks = max(budget_split.selected, shortlist_capacity(budget_split.selected))

        def ints(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=scores.device)

        return cls(
            budget_split=budget_split,
            scores=scores,
            ranking=ints(rows, num_heads, num_ranks),
            depth=ints(rows, num_heads),
            first_turn=ints(rows, columns, fill=NEVER),
            last_turn=ints(rows, fill=NEEDS_FULL_RANKING),
            new_tokens_per_rank=ints(rows, counted_ranks(budget_split.selected)),
            chosen_counts=ints(rows, padded_counts(columns)),
            block_counters=ints(rows),
            full_ranking_rows=ints(1, dtype=torch.int64),
        )

    def counts(self) -> dict[str, int]:
        """Rows that were ranked whole, those just over the budget among them; per SELECT layer."""
        return {"rows_ranked_whole": int(self.full_ranking_rows)}

    @property
    def decisive(self) -> Tensor:
        """The scores."""
        return self.scores

    def keep(
        self,
        indptr: Tensor,
        slots: Tensor,
        kept_indptr: Tensor,
        out: Tensor,
        *,
        scale: float,  # monotone within a head: it changes no ranking
        has_lse: bool,
    ) -> None:
        """Rank and unite, then compact."""
        self.choose(indptr)
        self.compact(indptr, slots, kept_indptr, out)

    def choose(self, indptr: Tensor) -> None:
        """Find the turns that win, from the scores."""
        if self.budget_split.selected:  # else sinks and the newest tokens are all
            self.shortlist(indptr)
            self.rank(indptr)

    def shortlist(self, indptr: Tensor) -> None:
        """Rank what the union is likely to look at, and unite it."""
        shortlist_tokens(
            self.scores,
            indptr,
            budget_split=self.budget_split,
            capacity=shortlist_capacity(self.budget_split.selected),
            ranking=self.ranking,
            depth=self.depth,
            first_turn=self.first_turn,
            last_turn=self.last_turn,
            new_tokens_per_rank=self.new_tokens_per_rank,
            block_counters=self.block_counters,
            full_ranking_rows=self.full_ranking_rows,
        )

    def rank(self, indptr: Tensor) -> None:
        """Rank whole and unite the rows that no shortlist decided; count what is chosen in all."""
        rank_tokens(
            self.scores,
            indptr,
            budget_split=self.budget_split,
            ranking=self.ranking,
            first_turn=self.first_turn,
            last_turn=self.last_turn,
            new_tokens_per_rank=self.new_tokens_per_rank,
            chosen_counts=self.chosen_counts,
            block_counters=self.block_counters,
        )

    def forget(self) -> None:
        """Back to how it is between two steps, where a step was not finished."""
        self.first_turn.fill_(NEVER)
        self.new_tokens_per_rank.zero_()

    def compact(self, indptr: Tensor, slots: Tensor, kept_indptr: Tensor, out: Tensor) -> None:
        """Write the chosen tokens' slots between those of the ends."""
        compact_slots(
            indptr,
            slots,
            kept_indptr,
            budget_split=self.budget_split,
            first_turn=self.first_turn,
            last_turn=self.last_turn,
            chosen_counts=self.chosen_counts,
            out=out,
        )


@dataclass(frozen=True)
class MassSelector(Selector):
    """Orders tokens by the attention that all heads together give them; not the paper's."""

    normalisers: Tensor
    """[>= R, H] f32, log2 of the sum of e^(scale · score)."""
    mass: Tensor
    """[R, N] f32."""
    candidates: Tensor
    """[R, candidates that there is room for] int32."""

    @classmethod
    def _around(cls, budget_split: BudgetSplit, scores: Tensor, max_rows: int) -> Self:
        rows, num_heads, columns = scores.shape
        room = candidate_capacity(budget_split.selected)
        return cls(
            budget_split=budget_split,
            scores=scores,
            normalisers=scores.new_zeros(max_rows, num_heads),  # a dense pass leaves all rows'
            mass=scores.new_zeros(rows, columns),
            candidates=scores.new_zeros(rows, room, dtype=torch.int32),
        )

    @property
    def decisive(self) -> Tensor:
        """The masses, as of one head."""
        return self.mass[:, None]

    @property
    def lse(self) -> Tensor | None:
        """Where a dense pass leaves its normalisers."""
        return self.normalisers

    def keep(
        self,
        indptr: Tensor,
        slots: Tensor,
        kept_indptr: Tensor,
        out: Tensor,
        *,
        scale: float,
        has_lse: bool,
    ) -> None:
        """Pool the scores and keep the heaviest tokens."""
        budget = self.budget_split.budget
        if not has_lse:
            log_sum_exp(self.scores, indptr, budget, scale, self.normalisers)
        softmax_mass(self.scores, indptr, self.normalisers, budget, scale, self.mass)
        self.write(indptr, slots, kept_indptr, out)

    def write(self, indptr: Tensor, slots: Tensor, kept_indptr: Tensor, out: Tensor) -> None:
        """Write the slots of the heaviest tokens between those of the ends."""
        topk_by_mass(
            self.mass,
            indptr,
            slots,
            kept_indptr,
            budget_split=self.budget_split,
            candidates=self.candidates,
            out=out,
        )
