"""LessIsMore at decode on a CPU, through the reference in torch. Prefill is SGLang's own."""

from typing import Any

from torch import Tensor

from lim_sglang.audit import Trace
from lim_sglang.compat import KVWriteLoc, TorchNativeAttnBackend
from lim_sglang.config import Role
from lim_sglang.counters import StepLengths, step_lengths
from lim_sglang.kernels.reference import (
    attend_tokens,
    keep_tokens,
    score_tokens,
    softmax_mass,
    topk_by_mass,
)


class LimCpuBackend(TorchNativeAttnBackend):
    """SGLang's torch backend whose decode layers act by their roles.

    Shapes: B requests, H query heads, G KV heads, D head_dim, P slots of the KV pool, S tokens of
    one request.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.stats = runner.lim_stats
        self.by_mass = runner.lim_config.ranking == "mass"
        self.budget_split = runner.lim_budget_split
        self.sparse_budget: int | None = runner.lim_sparse_budget
        self.trace = Trace.from_environment()
        self.lengths: StepLengths = step_lengths([], None)
        self.slots: list[Tensor] = []
        """[S] int64 of each row: the slots of all its tokens."""
        self.kept_slots: list[Tensor] = []
        """The slots of each row that REUSE layers read."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Begin a decode step: count lengths and look up each request's slots in the KV pool."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        self.lengths = step_lengths(forward_batch.seq_lens.tolist(), self.sparse_budget)
        rows = forward_batch.req_pool_indices.tolist()
        table = self.req_to_token_pool.req_to_token
        self.slots = [
            table[row, :length].long()
            for row, length in zip(rows, self.lengths.seq_lens, strict=True)
        ]
        self.kept_slots = list(self.slots)  # a row within the budget keeps everything

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
        if role is Role.REUSE and self.lengths.sparse_rows:
            if save_kv_cache and k is not None and v is not None:
                location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
            return self._attend_kept(q, layer)
        output: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if role is Role.SELECT:
            self._select(q, layer, forward_batch.rids)
        return output

    def _select(self, q: Tensor, layer: Any, rids: list[str]) -> None:
        """Select each sparse row's kept slots from this layer's queries and keys."""
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        for row in self.lengths.sparse_rows:
            slots = self.slots[row]
            scores = score_tokens(query[row], keys[slots])
            if self.by_mass:
                kept = topk_by_mass(softmax_mass(scores, layer.scaling), self.budget_split)
            else:
                kept = keep_tokens(scores, self.budget_split)
            self.kept_slots[row] = slots[kept]
            if self.trace:
                self.trace.record(
                    step=self.stats.decode_steps,
                    rid=rids[row],
                    layer=layer.layer_id,
                    seq_len=self.lengths.seq_lens[row],
                    kept=kept.tolist(),
                )

    def _attend_kept(self, q: Tensor, layer: Any) -> Tensor:
        """Attend over the kept slots of the nearest SELECT layer below."""
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = query.new_empty(*query.shape[:2], layer.v_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for row, kept in enumerate(self.kept_slots):
            output[row] = attend_tokens(query[row], keys, values, kept, layer.scaling)
        return output.flatten(1)
