"""The forward passes of a cycle on a CPU, through SGLang's decode steps and the definitions.

A verified row is a row of a dense decode step: each attends as in a dense server, in the same
calls.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.audit import KeptSets, ObservedRow
from lim_sglang.kernels.reference import attend_tokens
from lim_sglang.lossless.passes import CycleRows, KeptQueries, Passes, by_head
from lim_sglang.policies.policy import LayerInputs, Role

Lists = list[list[Tensor]]
"""For each SELECT layer and request the slots to read, [n] int64."""


class LosslessCpuBackend(KeptQueries, compat.TorchNativeAttnBackend):
    """SGLang's torch backend, dense but in drafts. Shapes: R rows of a step."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.roles: tuple[Role, ...] = runner.lim_roles
        depth = len(self.roles)
        self._list_of_layer = runner.lim_drafting.list_of_layer(depth)
        self.query_layers = runner.lim_drafting.selecting(depth)
        self.queries: dict[int, Tensor] = {}
        self._lists: Sequence[Sequence[Tensor]] | None = None

    @contextmanager
    def drafting(self, lists: Sequence[Sequence[Tensor]]) -> Iterator[None]:
        """Let decode steps in this block read lists.

        Args:
            lists: for each SELECT layer and row the slots to read, [n] int64.
        """
        self._lists = lists
        try:
            yield
        finally:
            self._lists = None

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> Tensor:
        """Run one layer: over the lists in a draft, dense in any other step."""
        if self._lists is None:
            return super().forward_decode(q, k, v, layer, batch, save_kv_cache, **options)
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, compat.KVWriteLoc(batch.out_cache_loc, None), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        lists = self._lists[self._list_of_layer[layer.layer_id]]
        rows = zip(by_head(q, layer), lists, strict=True)
        outputs = [attend_tokens(query, keys, values, kept, layer.scaling) for query, kept in rows]
        return torch.stack(outputs).flatten(1)


class CpuPasses(Passes):
    """Passes that SGLang's runner makes, each a decode step."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._observer = KeptSets.from_environment(rank=0)
        self._lists: Lists = []
        # A verification has w rows of each request. The process is the server's scheduler alone.
        os.environ[compat.NO_COPY_VAR] = "1"

    def capture(self) -> None:
        """Do nothing: a CPU has no graphs."""

    def begin(self, rows: CycleRows, queries: Tensor | None) -> None:
        """Select the lists of the drafts."""
        self.rows = rows
        if queries is not None:
            self._lists = self._select_lists(rows, queries)

    def draft_step(self, tokens: Tensor, step: int) -> Tensor:
        """Add the slots of a token to the lists; run a step over them."""
        column = slice(step, step + 1)
        slots = self.rows.slots[:, column]
        for of_layer in self._lists:
            of_layer[:] = map(torch.cat, zip(of_layer, slots, strict=True))
        with self.backend.drafting(self._lists):
            output = self._forward(self.rows, tokens[:, None], column)
        logits: Tensor = output.next_token_logits
        return logits

    def verify(self, tokens: Tensor) -> Any:
        """Run a dense step of B * w rows."""
        return self._forward(self.rows, tokens, slice(None))

    def queries_of(self, rows: Tensor) -> Tensor:
        """Return the queries of the backend's last dense step."""
        return self.stack(self.backend.queries, rows)

    def _select_lists(self, rows: CycleRows, queries: Tensor) -> Lists:
        """Return the lists, slots of drafts left out."""
        lists: Lists = [[] for _ in self.select]
        requests = zip(rows.requests.tolist(), rows.lengths.tolist(), rows.batch.reqs, strict=True)
        for row, (request, length, asked) in enumerate(requests):
            slots = self.req_to_token[request, :length].long()
            for index, (layer, of_layer) in enumerate(zip(self.select, lists, strict=True)):
                if length <= self.policy.budget:
                    of_layer.append(slots)
                    continue
                keys = self.runner.token_to_kv_pool.get_key_buffer(layer.layer_id)[slots]
                inputs = LayerInputs(queries[row, index], keys, layer.scaling, layer.layer_id)
                kept = self.policy.keep(inputs)
                of_layer.append(slots[kept[0]])
                if self._observer:
                    row_seen = ObservedRow(self.stats.cycles, asked.rid, inputs, kept, selects=True)
                    self._observer.note_layer(row_seen)
        return lists

    def _forward(self, rows: CycleRows, tokens: Tensor, columns: slice) -> Any:
        """Run the model over some of the cycle's tokens, [B, n], each a row of a decode step.

        Returns:
            SGLang's output; its logits have a row for each token.
        """
        batch, positions = rows.batch, rows.positions[:, columns]
        with _fields_kept(batch):
            batch.forward_mode = compat.ForwardMode.DECODE
            batch.spec_info = None
            batch.input_ids = tokens.flatten()
            batch.out_cache_loc = rows.slots[:, columns].flatten()
            batch.seq_lens = (positions + 1).flatten()
            batch.seq_lens_cpu = batch.orig_seq_lens = batch.seq_lens
            batch.seq_lens_sum = int(batch.seq_lens.sum())
            batch.req_pool_indices = rows.requests.repeat_interleave(tokens.shape[1])
            forward_batch = compat.ForwardBatch.init_new(
                batch, self.runner, return_hidden_states_before_norm=False
            )
            return self.runner.forward_uncounted(forward_batch).logits_output


@contextmanager
def _fields_kept(batch: Any) -> Iterator[None]:
    """Put all fields of SGLang's batch back after the block."""
    kept = dict(vars(batch))
    try:
        yield
    finally:
        vars(batch).update(kept)
