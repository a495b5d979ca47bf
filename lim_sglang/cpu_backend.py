"""LessIsMore at decode on a CPU, through the reference in torch. Prefill is SGLang's own."""

from typing import Any

from torch import Tensor

from lim_sglang.compat import KVWriteLoc, TorchNativeAttnBackend
from lim_sglang.config import Role
from lim_sglang.counters import StepLengths, step_lengths
from lim_sglang.kernels.reference import (
    attend_tokens,
    keep_tokens,
    score_tokens,
    softmax_mass,
    split_budget,
    topk_by_mass,
)
from lim_sglang.tracing import Trace


class LimCpuBackend(TorchNativeAttnBackend):
    """SGLang's torch backend whose decode layers act by their roles.

    Shapes: B requests, H query heads, G KV heads, D head_dim, P slots of the KV pool.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        config = runner.lim_config
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.stats = runner.lim_stats
        self.by_mass = config.ranking == "mass"
        self.budget_split = split_budget(config.budget, config.recent_ratio, config.sinks)
        self.budget: int | None = config.budget if Role.REUSE in self.roles else None
        self.trace = Trace.from_environment()
        self.plan: StepLengths = step_lengths([], None)
        self.slots: list[Tensor] = []
        self.kept_slots: list[Tensor] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a decode step: lengths, and where each request's tokens lie in the KV pool."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        self.plan = step_lengths(forward_batch.seq_lens.tolist(), self.budget)
        rows = forward_batch.req_pool_indices.tolist()
        table = self.req_to_token_pool.req_to_token
        self.slots = [
            table[row, :length].long() for row, length in zip(rows, self.plan.seq_lens, strict=True)
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
        """One layer of a decode step: `q` and the result [B, H * D], `k` and `v` [B, G * D]."""
        role = self.roles[layer.layer_id]
        if role is Role.REUSE and self.plan.sparse_rows:
            return self._attend_kept(q, k, v, layer, forward_batch, save_kv_cache)
        output: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if role is Role.SELECT:
            self._select(q, layer, forward_batch)
        return output

    def _select(self, q: Tensor, layer: Any, forward_batch: Any) -> None:
        """Pick each sparse row's set from this layer's queries and keys."""
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        for row in self.plan.sparse_rows:
            slots = self.slots[row]
            scores = score_tokens(query[row], keys[slots])
            if self.by_mass:
                kept = topk_by_mass(softmax_mass(scores, layer.scaling), self.budget_split)
            else:
                kept = keep_tokens(scores, self.budget_split)
            self.kept_slots[row] = slots[kept]
            if self.trace:
                self.trace.record(
                    self.stats.decode_steps,
                    forward_batch.rids[row],
                    layer.layer_id,
                    self.plan.seq_lens[row],
                    kept.tolist(),
                )

    def _attend_kept(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
    ) -> Tensor:
        """Sparse attention over the set of the nearest SELECT layer below."""
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = query.new_empty(*query.shape[:2], layer.v_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [P, G, D]
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for row, kept in enumerate(self.kept_slots):
            output[row] = attend_tokens(query[row], keys, values, kept, layer.scaling)
        return output.flatten(1)
