"""Lengths of one decode step, known on the host, and the counters that `/server_info` shows.

A row is one request in one step. A row is dense while its length is within the budget, and always
where no layer is sparse: the policy's roles have none (policy `full`, no SELECT layers, no layer
above them that could reuse), or the budget covers the model's whole context
(`LimModelRunner.lim_policy` is None then).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
class DraftStats:
    """Counters of lossless drafting, updated once a cycle. A run of a request is its accepted
    drafts and one token more; a stop may cut it later, which is not counted here."""

    cycles: int = 0
    drafted_tokens: int = 0
    """Drafts of requests whose runs may have more than one token."""
    accepted_tokens: int = 0
    """Drafts among those that verification repeated."""
    accepted_histogram: dict[int, int] = field(default_factory=dict)
    """Runs by their accepted drafts."""
    cycles_by_width: dict[int, int] = field(default_factory=dict)
    """Cycles by the tokens that each request had verified: drafts and one."""
    rows_capped: dict[str, int] = field(default_factory=dict)
    """Runs of one token, by what their requests ask for."""
    cycles_undrafted: dict[str, int] = field(default_factory=dict)
    """Cycles without drafts, by the reason."""

    def count_undrafted(self, reason: str) -> None:
        """Count a cycle that drafts nothing."""
        _add(self.cycles_undrafted, reason)

    def count_cycle(self, width: int, accepted: Sequence[int], capped: Mapping[int, str]) -> None:
        """Count a cycle.

        Args:
            width: tokens verified of each request.
            accepted: accepted drafts of each request.
            capped: reasons of those whose runs have one token, by their index.
        """
        self.cycles += 1
        _add(self.cycles_by_width, width)
        for reason in capped.values():
            _add(self.rows_capped, reason)
        if width == 1:
            return
        free = [count for row, count in enumerate(accepted) if row not in capped]
        self.drafted_tokens += (width - 1) * len(free)
        self.accepted_tokens += sum(free)
        for count in free:
            _add(self.accepted_histogram, count)


def _add(counts: dict[Any, int], key: object) -> None:
    counts[key] = counts.get(key, 0) + 1


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
    drafting: DraftStats | None = None
    """Under policy lossless."""

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
