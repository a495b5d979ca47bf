"""What REUSE layers read in one step: lengths planned on the host, slots written in the step.

A kept set has `min(length, budget)` tokens, so FlashInfer is planned from the lengths that the host
knows, before it is decided which tokens these are. Nothing here waits for the device.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lim_sglang.compat import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan
from lim_sglang.errors import ServerError
from lim_sglang.kernels.lengths import count_kept

PLAN_BYTES = 1 << 20
"""Workspace of one plan; FlashInfer's default is 8 MiB on the GPU and 8 MiB pinned."""


class KeptPlan:
    """FlashInfer's paged decode at page size 1 over the kept slots of a batch.

    Shapes: R rows at most, K budget.
    """

    def __init__(self, dense: Any, kept_slots: Tensor, budget: int) -> None:
        """Take over how SGLang's FlashInfer backend decodes.

        Args:
            dense: the `FlashInferAttnBackend`.
            kept_slots: [>= R * K] int32; REUSE layers read what is written here.

        Raises:
            ServerError: `kept_slots` is too small for the rows that SGLang runs at once.
        """
        max_rows: int = dense.kv_last_page_len.shape[0]
        if kept_slots.shape[0] < max_rows * budget:
            raise ServerError(
                f"SGLang runs {max_rows} requests at once, more than LessIsMore has memory for: "
                f"set --max-running-requests {kept_slots.shape[0] // budget} or less"
            )
        self.kept_slots = kept_slots
        self.budget = budget
        self._dense = dense
        self._indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=kept_slots.device)
        self._host_lens = torch.zeros(max_rows, dtype=torch.int64)
        self._host_indptr = torch.zeros(max_rows + 1, dtype=torch.int32)
        # The host is at most one step ahead, so what it stages for one step is still to be copied
        # while it stages the next, and is free again for the one after that.
        self._staging = [
            torch.empty(PLAN_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._eager = self._new_wrapper()
        self._graphs: dict[int, Any] = {}
        self.wrapper = self._eager
        """Plans and runs the sparse attention of the step that is planned."""
        self.kept_indptr = self._indptr
        """[B + 1] int32, of that step."""

    def plan_eager(self, forward_batch: Any) -> None:
        """Plan a step that runs layer by layer."""
        self._plan(self._eager, forward_batch)

    def plan_capture(self, forward_batch: Any) -> None:
        """Plan a step that a CUDA graph captures; its batch size gets a wrapper of its own."""
        rows = forward_batch.batch_size
        self._graphs[rows] = self._new_wrapper(rows)
        self._plan(self._graphs[rows], forward_batch)

    def plan_replay(self, forward_batch: Any) -> None:
        """Plan a step that replays the CUDA graph of its batch size."""
        self._plan(self._graphs[forward_batch.batch_size], forward_batch)

    def _plan(self, wrapper: Any, forward_batch: Any) -> None:
        rows = forward_batch.batch_size
        host_lens, host_indptr = self._host_lens[:rows], self._host_indptr[: rows + 1]
        torch.clamp(forward_batch.seq_lens_cpu[:rows], max=self.budget, out=host_lens)
        torch.cumsum(host_lens, 0, dtype=torch.int32, out=host_indptr[1:])
        self.kept_indptr = self._indptr[: rows + 1]
        count_kept(forward_batch.seq_lens[:rows], self.budget, self.kept_indptr)
        slots = self.kept_slots
        if not wrapper.is_cuda_graph_enabled:
            slots = slots[: int(host_indptr[rows])]
        is_first = not isinstance(wrapper.begin_forward, partial)
        self._staging.reverse()
        wrapper._pin_memory_int_workspace_buffer = self._staging[0]
        dense = self._dense.indices_updater_decode
        wrapper.begin_forward(
            self.kept_indptr,
            slots,
            self._dense.kv_last_page_len[:rows],
            dense.num_qo_heads,
            dense.num_kv_heads,
            dense.head_dim,
            1,
            data_type=dense.data_type,
            q_data_type=dense.q_data_type,
            non_blocking=True,
            disable_split_kv=self._splits_never(wrapper),
            **({} if is_first else {"global_override_indptr_cpu": host_indptr}),
        )
        if is_first:
            # The full plan has loaded FlashInfer's module; the fast one copies nothing back.
            wrapper.begin_forward = partial(fast_decode_plan, wrapper)
        self.wrapper = wrapper

    def _splits_never(self, wrapper: Any) -> bool:
        """What SGLang's own decode does in the same place."""
        never: bool = (
            self._dense.disable_cuda_graph_kv_split if wrapper.is_cuda_graph_enabled else False
        )
        return never

    def _new_wrapper(self, rows: int | None = None) -> Any:
        """A FlashInfer decode wrapper over the kept slots; for CUDA graphs, of a fixed batch."""
        buffers: dict[str, Any] = {}
        if rows is not None:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": self._indptr[: rows + 1],
                "paged_kv_indices_buffer": self.kept_slots,
                "paged_kv_last_page_len_buffer": self._dense.kv_last_page_len[:rows],
            }
        dense = self._dense
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            dense.workspace_buffer,
            "NHD",
            backend=dense.decode_backend,
            use_tensor_cores=dense.decode_use_tensor_cores,
            **buffers,
        )
        # One stream runs dense and sparse layers in turn: the float workspace is shared.
        wrapper._float_workspace_buffer = dense.workspace_buffer
        wrapper._int_workspace_buffer = torch.empty(
            PLAN_BYTES, dtype=torch.uint8, device=self.kept_slots.device
        )
        return wrapper
