"""The forward passes of a cycle: drafts that read lists, and a dense one that verifies.

`CpuPasses` (`cpu_passes.py`) and `GpuPasses` (`gpu_passes.py`) are two of a kind. A verified token
is a row of a dense decode step, whatever request it belongs to, but on a GPU the rows of a request
read its keys together.

Shapes: B requests, w tokens of each, H query heads, D head_dim, V tokens of the vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.lossless.sampling import RunSampling
from lim_sglang.lossless.widths import PassTimes


@dataclass(frozen=True)
class CycleRows:
    """The requests of one cycle, and the tokens that are drafted and verified of each."""

    batch: Any
    """SGLang's."""
    requests: Tensor
    """[B] int64, their rows of `req_to_token`."""
    lengths: Tensor
    """[B] int64, tokens that have keys and values."""
    host_lengths: Tensor
    """The same on the host, or more: exact where the passes need them so."""
    positions: Tensor
    """[B, w] int64."""
    slots: Tensor
    """[B, w] int64, where the keys and values of these positions are written."""

    @classmethod
    def of(cls, batch: Any, width: int, host_lengths: Tensor, req_to_token: Tensor) -> "CycleRows":
        """Look up the slots of `width` tokens of each request, once for the whole cycle."""
        requests, lengths = batch.req_pool_indices, batch.seq_lens
        positions = lengths[:, None]
        if width > 1:
            positions = positions + torch.arange(width, device=lengths.device)
        slots = req_to_token[requests[:, None], positions].long()
        return cls(batch, requests, lengths, host_lengths, positions, slots)

    @property
    def width(self) -> int:
        """w."""
        return self.positions.shape[1]


@dataclass(frozen=True)
class LaunchedCycle:
    """A cycle whose runs the host does not know yet."""

    requests: frozenset[int]
    """Ids of SGLang's objects."""
    width: int


def host_lengths(batch: Any, launched: Iterable[LaunchedCycle]) -> tuple[Tensor, bool]:
    """Return the tokens of each request that have keys and values, [B] int64, or more, and whether
    they are exact.

    A cycle is launched while the one before runs, whose runs have from one token to its width.

    Args:
        batch: SGLang's.
        launched: cycles whose runs SGLang has not counted yet.
    """
    if batch.seq_lens_cpu is not None:
        return batch.seq_lens_cpu, True
    cycles = list(launched)
    bounds = [
        request.kv_committed_len
        + sum(cycle.width for cycle in cycles if id(request) in cycle.requests)
        for request in batch.reqs
    ]
    return torch.tensor(bounds, dtype=torch.int64), all(cycle.width == 1 for cycle in cycles)


class Passes(ABC):
    """Forward passes of the served model, one cycle after the other."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.policy = runner.lim_drafting
        self.stats = runner.lim_stats.drafting
        self.choices: Sequence[int] = runner.lim_draft_choices
        """Numbers of tokens that a cycle may draft, ascending."""
        self.times: PassTimes | None = None
        """None where passes were not timed: one number alone may be drafted, or no graph runs."""
        self.backend = compat.decode_backend(runner.attn_backend)
        """The backend of prefills, which keeps queries."""
        self.rows: CycleRows
        """Those of the cycle that was begun last."""
        self.req_to_token: Tensor = runner.req_to_token_pool.req_to_token
        layers = {layer.layer_id: layer for layer in compat.attention_layers(runner.model)}
        self.select: Sequence[Any] = [layers[n] for n in self.policy.selecting(len(layers))]
        """SGLang's attention layers that select, in order."""

    @property
    def max_drafted(self) -> int:
        """Requests of the largest batch that drafts."""
        return len(self.req_to_token)

    def needs_exact_lengths(self, width: int) -> bool:
        """Return True if a cycle of this width cannot do with more than its requests' lengths on
        the host."""
        return False

    @property
    def query_shape(self) -> tuple[int, int, int]:
        """SELECT layers, H and D."""
        layer = self.select[0]
        return len(self.select), layer.tp_q_head_num, layer.qk_head_dim

    @abstractmethod
    def capture(self) -> None:
        """Capture what is run as CUDA graphs."""

    @abstractmethod
    def begin(self, rows: CycleRows, queries: Tensor | None) -> None:
        """Begin a cycle; select what its drafts read, if it has any.

        Args:
            queries: [B, SELECT layers, H, D], of the newest token with keys and values; None where
                w is 1, so that nothing is drafted.
        """

    def draft(self, newest: Tensor, sampling: RunSampling) -> Tensor:
        """Draft the tokens of a cycle, one after the other.

        Args:
            newest: [B] int64, of each request.
            sampling: of the cycle.

        Returns:
            [B, w] int64, the newest token and the drafts behind it.
        """
        positions = self.rows.positions
        if self.rows.width == 1:
            return newest[:, None]
        tokens = torch.empty_like(positions)
        tokens[:, 0] = newest
        for step in range(self.rows.width - 1):
            logits = self.draft_step(tokens[:, step], step)
            tokens[:, step + 1] = sampling.draft(logits, positions[:, step])
        return tokens

    @abstractmethod
    def draft_step(self, tokens: Tensor, step: int) -> Tensor:
        """Run the model over the lists and the drafts so far.

        Args:
            tokens: [B] int64, the newest token of each request.
            step: drafts before.

        Returns:
            [B, V] logits, which the next pass overwrites.
        """

    @abstractmethod
    def verify(self, tokens: Tensor) -> Any:
        """Run the model densely over the newest token of each request and its drafts.

        Args:
            tokens: [B, w] int64.

        Returns:
            SGLang's output; its logits have a row for each token.
        """

    @abstractmethod
    def queries_of(self, rows: Tensor) -> Tensor:
        """Return the SELECT layers' queries of the last dense pass.

        Args:
            rows: [n] int64, of that pass: tokens of a verification, requests of a prefill.

        Returns:
            [n, SELECT layers, H, D].
        """

    def prefill_queries(self, rows: Tensor) -> Tensor:
        """Return the queries of each request's last token in the prefill that has just run."""
        return self.stack(self.backend.queries, rows)

    def stack(self, queries: dict[int, Tensor], rows: Tensor) -> Tensor:
        """Return rows of the queries of all SELECT layers, [n, SELECT layers, H, D].

        Args:
            queries: [R, H, D] by layer.
        """
        return torch.stack([queries[layer.layer_id][rows] for layer in self.select], 1)


class KeptQueries:
    """A backend that keeps the queries of some layers; comes before a backend of SGLang's."""

    query_layers: Sequence[int]
    """Layers whose queries are kept."""
    queries: dict[int, Tensor]
    """By layer, the queries of the last dense pass: [R, H, D], of a decode step a row a token; of a
    prefill a row a request, its last token's."""

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *others: Any, **options: Any
    ) -> Tensor:
        """Run one layer of a prefill; keep the query of each request's last token.

        Args:
            q: [T, H * D], of all new tokens, like the result.
            k, v: [T, KV heads * D].
            layer, batch, others, options: SGLang's.
        """
        output: Tensor = super().forward_extend(q, k, v, layer, batch, *others, **options)  # type: ignore[misc]
        if layer.layer_id in self.query_layers:
            last = batch.extend_seq_lens.long().cumsum(0) - 1
            # A prefill graph may pad the requests beyond the tokens.
            self.queries[layer.layer_id] = by_head(q, layer)[last.clamp(max=len(q) - 1)]
        return output

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *others: Any, **options: Any
    ) -> Tensor:
        """Run one layer of a dense decode step; keep its queries.

        Args:
            q, k, v, layer, batch, others, options: as for `forward_extend`, of R rows.
        """
        output: Tensor = super().forward_decode(q, k, v, layer, batch, *others, **options)  # type: ignore[misc]
        if layer.layer_id in self.query_layers:
            self.queries[layer.layer_id] = by_head(q, layer)
        return output


def by_head(q: Tensor, layer: Any) -> Tensor:
    """Return queries as [R, H, D]."""
    return q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
