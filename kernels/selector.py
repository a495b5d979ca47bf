"""The memory that selection needs, allocated once: rows are processed in chunks of its size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_sglang.kernels.rank import rank_tokens
from lim_sglang.kernels.reference import Shares
from lim_sglang.kernels.score import score_tokens
from lim_sglang.kernels.union import compact_slots, unite_rankings

MAX_SCORE_BYTES = 256 << 20
"""Scores of a chunk of rows take no more than this, unless a single row does."""


@dataclass(frozen=True)
class Selector:
    """Picks the kept slots of a batch, chunk by chunk, in memory of its own."""

    budget: int
    shares: Shares
    scores: Tensor
    """[R, H, N] f32, R rows a chunk, N the model's context."""
    ranking: Tensor
    """[R, H, selected] int32."""
    first_turn: Tensor
    """[R, N] int32."""
    last_turn: Tensor
    """[R] int32."""

    @classmethod
    def allocate(
        cls,
        shares: Shares,
        *,
        max_rows: int,
        num_heads: int,
        context: int,
        device: torch.device | str,
    ) -> "Selector":
        """Size a chunk by its scores, at most `max_rows` rows."""
        rows = max(1, min(max_rows, MAX_SCORE_BYTES // (4 * num_heads * context)))

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            budget=shares.sinks + shares.selected + shares.recent,
            shares=shares,
            scores=empty(rows, num_heads, context, dtype=torch.float32),
            ranking=empty(rows, num_heads, shares.selected),
            first_turn=empty(rows, context),
            last_turn=empty(rows),
        )

    @property
    def num_bytes(self) -> int:
        """Device memory held, in bytes."""
        tensors = (self.scores, self.ranking, self.first_turn, self.last_turn)
        return sum(tensor.nbytes for tensor in tensors)

    def keep_slots(
        self,
        query: Tensor,
        keys: Tensor,
        indptr: Tensor,
        slots: Tensor,
        kept_indptr: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Write each row's kept slots, ascending by position; a row within the budget keeps all.

        Args:
            query: [B, H, D].
            keys: [P, G, D], one layer of the KV cache.
            indptr, slots: [B + 1] and [indptr[B]] int32, all tokens, oldest first.
            kept_indptr: [B + 1] int32, `min(length, budget)` tokens a row.
            out: [kept_indptr[B]] int32 or longer.
        """
        chunk = self.scores.shape[0]
        for first in range(0, query.shape[0], chunk):
            rows = min(chunk, query.shape[0] - first)
            part = indptr[first : first + rows + 1]
            self._keep_chunk(
                query[first : first + rows],
                keys,
                part,
                slots,
                kept_indptr[first : first + rows + 1],
                out,
            )
        return out

    def _keep_chunk(
        self,
        query: Tensor,
        keys: Tensor,
        indptr: Tensor,
        slots: Tensor,
        kept_indptr: Tensor,
        out: Tensor,
    ) -> None:
        rows, sinks, recent = query.shape[0], self.shares.sinks, self.shares.recent
        first_turn, last_turn = self.first_turn[:rows], self.last_turn[:rows]
        scores = score_tokens(query, keys, indptr, slots, self.budget, self.scores[:rows])
        ranking = rank_tokens(
            scores,
            indptr,
            budget=self.budget,
            sinks=sinks,
            recent=recent,
            out=self.ranking[:rows],
        )
        unite_rankings(
            ranking,
            indptr,
            budget=self.budget,
            selected=self.shares.selected,
            first_turn=first_turn,
            last_turn=last_turn,
        )
        compact_slots(
            indptr,
            slots,
            kept_indptr,
            budget=self.budget,
            sinks=sinks,
            recent=recent,
            first_turn=first_turn,
            last_turn=last_turn,
            out=out,
        )
