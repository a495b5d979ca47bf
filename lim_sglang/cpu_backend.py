"""Sparse decode on a CPU, through the definitions in torch. Prefill is SGLang's own."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lim_sglang.audit import Trace
from lim_sglang.compat import KVWriteLoc, Ranks, TorchNativeAttnBackend
from lim_sglang.counters import StepLengths, step_lengths
from lim_sglang.kernels.reference import attend_lists
from lim_sglang.policies.policy import SPARSE, LayerInputs, Role, SparsePolicy, window_layer


class LimCpuBackend(TorchNativeAttnBackend):
    """SGLang's torch backend whose decode layers act by their roles.

    Shapes: B requests, H query heads, G KV heads, D head_dim, P slots of the KV pool, S tokens of
    one request. Heads are those of this rank of tensor parallelism.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.window_layer = window_layer(self.roles)
        self.stats = runner.lim_stats
        self.policy: SparsePolicy | None = runner.lim_policy
        self.cos_sin: Tensor | None = runner.lim_cos_sin
        self.ranks = Ranks.of_runner(runner)
        self.trace = Trace.from_environment(self.ranks.rank)
        self.lengths: StepLengths = step_lengths([], None)
        self.slots: list[Tensor] = []
        """[S] int64 of each row: the slots of all its tokens."""
        self.kept_slots: list[Tensor] = []
        """[lists, n] int64 of each row: the slots that sparse layers read."""

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
        self.kept_slots = [slots[None] for slots in self.slots]

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
        if role in SPARSE and self.lengths.sparse_rows:
            if save_kv_cache and k is not None and v is not None:
                location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
            if role is Role.PICK or layer.layer_id == self.window_layer:
                self._select(q, layer, forward_batch.rids)
            return self._attend_kept(q, layer)
        output: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if role is Role.SELECT:
            self._select(q, layer, forward_batch.rids)
        return output

    def _select(self, q: Tensor, layer: Any, rids: list[str]) -> None:
        """Select each sparse row's kept slots from this layer's queries and keys."""
        if self.policy is None:  # no layer above reuses
            return
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        inputs = (
            LayerInputs(
                query[row],
                keys[self.slots[row]],
                layer.scaling,
                layer.layer_id,
                self.cos_sin,
                self.ranks.rank,
                self.ranks.size,
            )
            for row in self.lengths.sparse_rows
        )
        for row, kept in zip(self.lengths.sparse_rows, self._keep(inputs), strict=True):
            self.kept_slots[row] = self.slots[row][kept]
            if self.trace:
                self.trace.record(
                    step=self.stats.decode_steps,
                    rid=rids[row],
                    layer=layer.layer_id,
                    seq_len=self.lengths.seq_lens[row],
                    kept=kept.tolist(),
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
        gathered = self.ranks.gather(torch.cat([part.flatten() for part in parts]))
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
        for row, kept in enumerate(self.kept_slots):
            output[row] = attend_lists(query[row], keys, values, kept, layer.scaling)
        return output.flatten(1)
