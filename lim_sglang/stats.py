"""Counters that show what the server really does; `/server_info` carries them."""

from dataclasses import dataclass

from lim_sglang.plan import StepLengths


@dataclass
class Stats:
    """Counted on the host, once a decode step. A row is one request in one step."""

    decode_steps: int = 0
    dense_rows: int = 0
    """Rows that read everything."""
    sparse_rows: int = 0
    """Rows whose REUSE layers read less than everything."""
    tokens_kept: int = 0
    """Sum over rows of the tokens that REUSE layers read."""
    tokens_seen: int = 0
    """Sum over rows of the row's length, newest token included."""
    retractions: int = 0
    """Requests that gave their KV cache back and were prefilled again, densely."""

    def count_step(self, plan: StepLengths) -> None:
        """Count one decode step."""
        sparse = len(plan.sparse_rows)
        self.decode_steps += 1
        self.sparse_rows += sparse
        self.dense_rows += len(plan.seq_lens) - sparse
        self.tokens_kept += sum(plan.kept_lens)
        self.tokens_seen += sum(plan.seq_lens)
