"""LessIsMore at decode on a GPU: FlashInfer reads token lists that Triton kernels write.

FULL and SELECT layers are SGLang's own dense decode. A SELECT layer then writes each row's kept
slots, and REUSE layers run FlashInfer's paged decode over them at page size 1.
"""

from typing import Any

from torch import Tensor

from lim_sglang.audit import Audit
from lim_sglang.compat import DecodeMetadata, FlashInferAttnBackend
from lim_sglang.kept_plan import KeptPlan
from lim_sglang.kernels.selector import Selector
from lim_sglang.schedule import Role


class LimAttnBackend(FlashInferAttnBackend):
    """SGLang's FlashInfer backend whose decode layers act by their roles.

    Lengths are planned outside CUDA graphs, on the host; indices are written inside them. Positions
    become slots through the dense indices that FlashInfer's plan gathered, never through
    `req_to_token`, which the scheduler may already be writing for the next step.

    Shapes: B requests, H query heads, G KV heads, D head_dim.
    """

    forward_metadata: Any

    def __init__(self, runner: Any, **options: Any) -> None:
        super().__init__(runner, **options)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.selector: Selector | None = runner.lim_selector
        self.audit: Audit | None = runner.lim_audit
        if self.selector is not None:
            self.kept = KeptPlan(self, runner.lim_kept_slots, self.selector.budget)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan an eager step: the dense plan is SGLang's, the sparse one ours."""
        super().init_forward_metadata(forward_batch)
        if self.selector and forward_batch.forward_mode.is_decode() and forward_batch.batch_size:
            self.kept.plan_eager(forward_batch)
            self._begin_audit(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a step that a CUDA graph captures or replays."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if not self.selector or not forward_batch.forward_mode.is_decode_or_idle():
            return
        if in_capture:
            self.kept.plan_capture(forward_batch)
        else:
            self.kept.plan_replay(forward_batch)
            self._begin_audit(forward_batch)

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
        planned = self.forward_metadata
        if role is Role.REUSE:  # SGLang's decode, but over the kept slots
            self.forward_metadata = DecodeMetadata([self.kept.wrapper])
        try:
            output: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        finally:
            self.forward_metadata = planned
        if role is Role.SELECT:
            self._select(q, layer)
        return output

    def _select(self, q: Tensor, layer: Any) -> None:
        """Write each row's kept slots from this layer's queries and keys."""
        if self.selector is None:  # no layer above reuses
            return
        dense = self.forward_metadata.decode_wrappers[0]
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        self.selector.keep_slots(
            query,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            dense._paged_kv_indptr_buf,
            dense._paged_kv_indices_buf,
            self.kept.kept_indptr,
            self.kept.kept_slots,
        )
        if self.audit:
            self.audit.note_layer(layer.layer_id, query.shape[0])

    def _begin_audit(self, forward_batch: Any) -> None:
        if self.audit:
            self.audit.begin_step(forward_batch, self.req_to_token_pool.req_to_token)
