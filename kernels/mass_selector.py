"""Selection by mass: one pooled score a token, and the heaviest tokens of each row."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lim_sglang.kernels.heaviest import candidate_capacity, topk_by_mass
from lim_sglang.kernels.pool import log_sum_exp, softmax_mass
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.selector import Selector


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
