"""Sparse decode on a CPU, through the definitions in torch. Prefill is SGLang's own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lim_sglang.audit import KeptSets, LayerObserver, ObservedRow
from lim_sglang.compat import KVWriteLoc, Ranks, TorchNativeAttnBackend
from lim_sglang.counters import StepLengths, step_lengths
from lim_sglang.kernels.reference import attend_lists
from lim_sglang.policies.policy import SPARSE, LayerInputs, Role, SparsePolicy, choosing_layers


class LimCpuBackend(TorchNativeAttnBackend):
    """SGLang's torch backend whose decode layers act by their roles.

    Shapes: B requests, H query heads, G KV heads, D head_dim, P slots of the KV pool, S tokens of
    one request. Heads are those of this rank of tensor parallelism.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.choosing = choosing_layers(self.roles)
        self.stats = runner.lim_stats
        self.policy: SparsePolicy | None = runner.lim_policy
        self.cos_sin: Tensor | None = runner.lim_cos_sin
        self.ranks = Ranks.of_runner(runner)
        self.observer: LayerObserver | None = KeptSets.from_environment(self.ranks.rank)
        self.lengths: StepLengths = step_lengths([], None)
        self.slots: list[Tensor] = []
        """[S] int64 of each row: the slots of all its tokens."""
        self.kept: list[Tensor] = []
        """[lists, n] int64 of each row: the positions that sparse layers read."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Begin a decode step: count lengths and look up each request's slots in the KV pool."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        self.lengths = step_lengths(forward_batch.seq_lens.tolist(), self.policy)
        rows = forward_batch.req_pool_indices.tolist()
        table = self.req_to_token_pool.req_to_token
        self.slots = [
            table[row, :length].long()
            for row, length in zip(rows, self.lengths.seq_lens, strict=True)
        ]
        # A row within the budget keeps everything.
        self.kept = [torch.arange(length)[None] for length in self.lengths.seq_lens]

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> Tensor:
        """Run one layer of a decode step; the layer's role decides what is read.

        Args:
            q: [B, H * D], like the result.
            k, v: [B, G * D].
        """
        role = self.roles[layer.layer_id]
        selects = layer.layer_id in self.choosing
        if role in SPARSE and self.lengths.sparse_rows:
            if save_kv_cache and k is not None and v is not None:
                location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
            if selects:
                self._select(q, layer)
            output = self._attend_kept(q, layer)
        else:
            output = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            if selects:
                self._select(q, layer)
        if self.observer:
            rids = forward_batch.rids or [None] * len(self.slots)
            rows = zip(rids, self._inputs(q, layer, range(len(rids))), self.kept, strict=True)
            for rid, inputs, kept in rows:
                row = ObservedRow(self.stats.decode_steps, rid, inputs, kept, selects)
                self.observer.note_layer(row)
        return output

    def _select(self, q: Tensor, layer: Any) -> None:
        """Select each sparse row's kept tokens from this layer's queries and keys."""
        if self.policy is None:  # no layer above reuses
            return
        sparse = self.lengths.sparse_rows
        for row, kept in zip(sparse, self._keep(self._inputs(q, layer, sparse)), strict=True):
            self.kept[row] = kept

    def _inputs(self, q: Tensor, layer: Any, rows: Sequence[int]) -> Iterator[LayerInputs]:
        """Yield what a layer selects from, row by row."""
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        for row in rows:
            yield LayerInputs(
                query[row],
                keys[self.slots[row]],
                layer.scaling,
                layer.layer_id,
                self.cos_sin,
                self.ranks.rank,
                self.ranks.size,
            )

    def _keep(self, inputs: Iterable[LayerInputs]) -> Iterator[Tensor]:
        """Yield the kept positions of each sparse row; ranks exchange the parts of all rows at
        once."""
        policy = self.policy
        assert policy is not None
        if self.ranks.size == 1 or not policy.needs_all_heads:
            yield from map(policy.keep, inputs)
            return
        parts = [policy.part_of_rank(each) for each in inputs]
        if not parts:
            return
        own = torch.cat([part.flatten() for part in parts])
        gathered = own.new_empty(self.ranks.size, len(own))
        self.ranks.gather_into(own, gathered)
        of_rows = gathered.split([part.numel() for part in parts], dim=1)
        for row, of_row, part in zip(self.lengths.sparse_rows, of_rows, parts, strict=True):
            merged = of_row.reshape(self.ranks.size, *part.shape)
            yield policy.keep_by_parts(merged, self.lengths.seq_lens[row])

    def _attend_kept(self, q: Tensor, layer: Any) -> Tensor:
        """Attend over the kept slots."""
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = query.new_empty(*query.shape[:2], layer.v_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for row, kept in enumerate(self.kept):
            slots = self.slots[row][kept]
            output[row] = attend_lists(query[row], keys, values, slots, layer.scaling)
        return output.flatten(1)
