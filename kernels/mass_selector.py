"""Selection by mass: one pooled score a token, and the heaviest tokens of each row."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lim_sglang.kernels.heaviest import candidate_capacity, keep_heaviest
from lim_sglang.kernels.pool import log_sum_exp, pool_mass
from lim_sglang.kernels.reference import Shares
from lim_sglang.kernels.selector import Selector, chunk_shape


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
    def allocate(
        cls,
        shares: Shares,
        *,
        max_rows: int,
        num_heads: int,
        context: int,
        device: torch.device | str,
    ) -> Self:
        """Size a chunk by its scores, at most `max_rows` rows of `context` tokens or a few more."""
        rows, _, columns = shape = chunk_shape(max_rows, num_heads, context)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        room = candidate_capacity(shares.selected)
        return cls(
            shares=shares,
            scores=floats(*shape),
            normalisers=floats(max_rows, num_heads),  # a dense pass leaves them for all rows
            mass=floats(rows, columns),
            candidates=torch.zeros(rows, room, dtype=torch.int32, device=device),
        )

    @property
    def decisive(self) -> Tensor:
        """The masses, as of one head."""
        return self.mass[:, None]

    @property
    def lse(self) -> Tensor | None:
        """Where a dense pass leaves its normalisers."""
        return self.normalisers

    def narrow(self, rows: int) -> Self:
        """The same memory for a chunk of fewer rows."""
        return type(self)(
            self.shares,
            scores=self.scores[:rows],
            normalisers=self.normalisers[:rows],
            mass=self.mass[:rows],
            candidates=self.candidates[:rows],
        )

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
        budget = self.shares.budget
        if not has_lse:
            log_sum_exp(self.scores, indptr, budget, scale, self.normalisers)
        pool_mass(self.scores, indptr, self.normalisers, budget, scale, self.mass)
        self.write(indptr, slots, kept_indptr, out)

    def write(self, indptr: Tensor, slots: Tensor, kept_indptr: Tensor, out: Tensor) -> None:
        """Write the slots of the heaviest tokens between those of the ends."""
        keep_heaviest(
            self.mass,
            indptr,
            slots,
            kept_indptr,
            shares=self.shares,
            candidates=self.candidates,
            out=out,
        )
