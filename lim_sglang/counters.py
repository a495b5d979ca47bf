"""Lengths of one decode step, known on the host, and the counters that `/server_info` shows.

A row is one request in one step. A row is dense while its length is within the budget, and always
where no layer is sparse: the policy's roles have none (policy `full`, no SELECT layers, no layer
above them that could reuse), or the budget covers the model's whole context
(`LimModelRunner.lim_policy` is None then).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lim_sglang.policies.policy import SparsePolicy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class StepLengths:
    """The rows of one decode step, by length.

    Lengths are known before the step runs, because a row's length decides how many tokens it keeps
    (`SparsePolicy.count_read`): so planning copies nothing from the device.
    """

    seq_lens: tuple[int, ...]
    """Tokens of each row, the newest included."""
    kept_lens: tuple[int, ...]
    """Tokens that one query head reads of each row in a sparse layer."""

    @property
    def sparse_rows(self) -> tuple[int, ...]:
        """Indices of the rows that read less than everything."""
        pairs = zip(self.seq_lens, self.kept_lens, strict=True)
        return tuple(row for row, (seen, kept) in enumerate(pairs) if kept < seen)


def step_lengths(seq_lens: Sequence[int], policy: SparsePolicy | None) -> StepLengths:
    """Count the tokens that each row keeps.

    Args:
        seq_lens: tokens of each row, the newest included.
        policy: None where no layer is sparse.
    """
    kept = seq_lens if policy is None else map(policy.count_read, seq_lens)
    return StepLengths(tuple(seq_lens), tuple(kept))


@dataclass
class Stats:
    """Counters, updated on the host once a decode step."""

    decode_steps: int = 0
    dense_rows: int = 0
    """Rows that read everything."""
    sparse_rows: int = 0
    """Rows whose sparse layers read less than everything."""
    tokens_kept: int = 0
    """Sum over rows of the tokens that one query head reads in a sparse layer."""
    tokens_seen: int = 0
    """Sum over rows of the row's length, newest token included."""
    oversized_steps: int = 0
    """Decode steps whose rows, sharing prefixes, have more tokens together than selection has
    memory for: they run without a CUDA graph, and without an audit."""
    retractions: int = 0
    """Requests that gave their KV cache back and were prefilled again, densely."""

    def count_step(self, seq_lens: "NDArray[np.int64]", policy: SparsePolicy | None) -> None:
        """Count one decode step.

        Args:
            seq_lens: [B] int64, tokens of each row, the newest included.
            policy: None where no layer is sparse.
        """
        kept_lens = seq_lens if policy is None else policy.count_read(seq_lens)
        sparse = int((kept_lens < seq_lens).sum())
        self.decode_steps += 1
        self.sparse_rows += sparse
        self.dense_rows += len(seq_lens) - sparse
        self.tokens_kept += int(kept_lens.sum())
        self.tokens_seen += int(seq_lens.sum())
