"""`DecodePlan`: what one decode step reads, in lengths alone, decided once on the host."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepLengths:
    """The rows of one decode step; a row is one request.

    Lengths are known before the step runs, because a kept set always has `min(length, budget)`
    tokens: so planning copies nothing from the device.
    """

    seq_lens: tuple[int, ...]
    """Tokens of each row, the newest included."""
    kept_lens: tuple[int, ...]
    """Tokens that each row's REUSE layers read."""

    @property
    def sparse_rows(self) -> tuple[int, ...]:
        """Rows that read less than everything."""
        pairs = zip(self.seq_lens, self.kept_lens, strict=True)
        return tuple(row for row, (seen, kept) in enumerate(pairs) if kept < seen)


def step_lengths(seq_lens: Sequence[int], budget: int | None) -> StepLengths:
    """Plan a step. `budget` is None where the schedule has no REUSE layer: then all is read."""
    kept = seq_lens if budget is None else [min(length, budget) for length in seq_lens]
    return StepLengths(tuple(seq_lens), tuple(kept))
