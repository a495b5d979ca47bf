"""LessIsMore at decode on a GPU: FlashInfer reads token lists that Triton kernels write.

FULL and SELECT layers are SGLang's own dense decode. A SELECT layer then writes each row's kept
slots, and REUSE layers run FlashInfer's paged decode over them at page size 1.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lim_sglang.compat import (
    BatchDecodeWithPagedKVCacheWrapper,
    FlashInferAttnBackend,
    KVWriteLoc,
    fast_decode_plan,
)
from lim_sglang.kernels.selector import Selector
from lim_sglang.schedule import Role

PLAN_BYTES = 1 << 20
"""Workspace of one sparse plan, on the GPU and pinned; FlashInfer's default is 8 MiB of each."""


class LimAttnBackend(FlashInferAttnBackend):
    """SGLang's FlashInfer backend whose decode layers act by their roles.

    Lengths are planned outside CUDA graphs, on the host; indices are written inside them. Positions
    become slots through the dense indices that FlashInfer's plan gathered, never through
    `req_to_token`, which the scheduler may already be writing for the next step.

    Shapes: B requests, H query heads, G KV heads, D head_dim, K budget.
    """

    def __init__(self, runner: Any, **options: Any) -> None:
        super().__init__(runner, **options)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.selector: Selector | None = runner.lim_selector
        if self.selector is None:  # no layer reuses: SGLang's own dense decode throughout
            return
        self.kept_slots: Tensor = runner.lim_kept_slots  # [rows * K] int32
        self.budget = self.selector.budget
        max_rows = self.kv_last_page_len.shape[0]
        device = self.workspace_buffer.device
        self.kept_indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self.eager_wrapper = self._new_wrapper()
        self.graph_wrappers: dict[int, Any] = {}
        self.sparse_wrapper = self.eager_wrapper

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan an eager step: the dense plan is SGLang's, the sparse one ours."""
        super().init_forward_metadata(forward_batch)
        if self.selector and forward_batch.forward_mode.is_decode():
            self._plan(self.eager_wrapper, forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a step that a CUDA graph captures or replays."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if not self.selector or not forward_batch.forward_mode.is_decode_or_idle():
            return
        rows = forward_batch.batch_size
        if in_capture:
            self.graph_wrappers[rows] = self._new_wrapper(rows)
        wrapper = self.graph_wrappers[rows]
        self._plan(wrapper, forward_batch)
        if in_capture:
            # FlashInfer's fast plan needs what the first full plan has cached.
            wrapper.begin_forward = partial(fast_decode_plan, wrapper)

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
        if role is Role.REUSE:
            return self._attend_kept(q, k, v, layer, forward_batch, save_kv_cache)
        output: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if role is Role.SELECT and self.selector:
            dense = self.forward_metadata.decode_wrappers[0]
            self.selector.keep_slots(
                q.view(-1, layer.tp_q_head_num, layer.head_dim),
                self.token_to_kv_pool.get_key_buffer(layer.layer_id),
                dense._paged_kv_indptr_buf,
                dense._paged_kv_indices_buf,
                self.kept_indptr,
                self.kept_slots,
            )
        return output

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
        if k is not None and save_kv_cache:
            location = KVWriteLoc(
                forward_batch.out_cache_loc, self.forward_metadata.swa_out_cache_loc
            )
            scales = self._kv_write_scales(layer)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v, *scales)
        output: Tensor = self.sparse_wrapper.forward(
            q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim),
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
        )
        return output.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _plan(self, wrapper: Any, forward_batch: Any) -> None:
        """Tell FlashInfer how many tokens each row keeps; which ones is decided in the step."""
        rows = forward_batch.batch_size
        kept_lens = forward_batch.seq_lens_cpu[:rows].clamp(max=self.budget)
        host_indptr = torch.zeros(rows + 1, dtype=torch.int32)
        torch.cumsum(kept_lens, 0, out=host_indptr[1:])
        torch.cumsum(
            forward_batch.seq_lens[:rows].clamp(max=self.budget),
            0,
            out=self.kept_indptr[1 : rows + 1],
        )
        fast = isinstance(wrapper.begin_forward, partial)
        dense = self.indices_updater_decode
        slots = self.kept_slots
        if not wrapper.is_cuda_graph_enabled:
            slots = slots[: int(host_indptr[-1])]
        wrapper.begin_forward(
            self.kept_indptr[: rows + 1],
            slots,
            self.kv_last_page_len[:rows],
            dense.num_qo_heads,
            dense.num_kv_heads,
            dense.head_dim,
            1,
            data_type=dense.data_type,
            q_data_type=dense.q_data_type,
            non_blocking=True,
            disable_split_kv=False,
            **({"global_override_indptr_cpu": host_indptr} if fast else {}),
        )
        self.sparse_wrapper = wrapper

    def _new_wrapper(self, rows: int | None = None) -> Any:
        """A FlashInfer decode wrapper over the kept slots; for CUDA graphs, of a fixed batch."""
        buffers: dict[str, Any] = {}
        if rows is not None:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": self.kept_indptr[: rows + 1],
                "paged_kv_indices_buffer": self.kept_slots,
                "paged_kv_last_page_len_buffer": self.kv_last_page_len[:rows],
            }
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self.workspace_buffer,
            "NHD",
            backend=self.decode_backend,
            use_tensor_cores=self.decode_use_tensor_cores,
            **buffers,
        )
        plan_buffer = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=self.kept_slots.device)
        wrapper.reset_workspace_buffer(self.workspace_buffer, plan_buffer)
        return wrapper
