"""What REUSE layers read in one step: lengths planned on the host, slots written in the step.

A kept set has `min(length, budget)` tokens, so FlashInfer is planned from the lengths that the host
knows, before it is decided which tokens these are. Nothing here waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from lim_sglang.compat import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan
from lim_sglang.errors import ServerError
from lim_sglang.kernels.lengths import count_kept

PLAN_BYTES = 1 << 20
"""Workspace of one plan; FlashInfer's default is 8 MiB on the GPU and 8 MiB pinned."""


class Staging:
    """Pinned memory that a plan is copied from, in the order of the stream."""

    def __init__(self) -> None:
        self.buffer = torch.empty(PLAN_BYTES, dtype=torch.uint8, pin_memory=True)
        self._copied = torch.cuda.Event()

    def wait_until_free(self) -> None:
        """Wait for the last copy. Under SGLang's scheduler there is nothing to wait for, since the
        host is at most one step ahead; a caller that runs on would overwrite a plan.
        """
        if not self._copied.query():
            self._copied.synchronize()

    def note_copy(self) -> None:
        """The copy has been queued."""
        self._copied.record()


class SparseWrapper:
    """A FlashInfer decode wrapper over the kept slots that is planned without a wait.

    The first plan is FlashInfer's full one, which loads its module; later ones copy nothing back.
    """

    def __init__(self, backend: Any, kept_slots: Tensor, indptr: Tensor | None) -> None:
        """For eager steps; or, with its own `indptr`, for the CUDA graph of one batch size."""
        rows = 0 if indptr is None else indptr.shape[0] - 1
        graph_buffers = {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": indptr,
            "paged_kv_indices_buffer": kept_slots,
            "paged_kv_last_page_len_buffer": backend.kv_last_page_len[:rows],
        }
        # One stream runs dense and sparse layers in turn: the float workspace is shared.
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            backend.workspace_buffer,
            "NHD",
            backend=backend.decode_backend,
            use_tensor_cores=backend.decode_use_tensor_cores,
            **(graph_buffers if rows else {}),
        )
        self.wrapper._int_workspace_buffer = torch.empty(
            PLAN_BYTES, dtype=torch.uint8, device=kept_slots.device
        )
        self.is_captured = bool(rows)
        self._was_planned = False

    def plan(self, staging: Tensor, host_indptr: Tensor, *arguments: Any, **options: Any) -> None:
        """Plan from lengths that the host knows.

        Args:
            staging: [PLAN_BYTES] uint8, pinned; copied to the device in the order of the stream.
            host_indptr: [B + 1] int32, the first of `arguments` as the host knows it.
            arguments, options: of FlashInfer's `plan`.
        """
        self.wrapper._pin_memory_int_workspace_buffer = staging
        if self._was_planned:
            fast_decode_plan(
                self.wrapper, *arguments, global_override_indptr_cpu=host_indptr, **options
            )
        else:
            self.wrapper.begin_forward(*arguments, **options)
            self._was_planned = True


class KeptPlan:
    """FlashInfer's paged decode at page size 1 over the kept slots of a batch.

    Shapes: R rows at most, K budget.
    """

    def __init__(self, backend: Any, kept_slots: Tensor, budget: int) -> None:
        """Take over how SGLang's FlashInfer backend decodes.

        Args:
            backend: the `FlashInferAttnBackend`.
            kept_slots: [>= R * K] int32; REUSE layers read what is written here.

        Raises:
            ServerError: `kept_slots` is too small for the rows that SGLang runs at once.
        """
        max_rows: int = backend.kv_last_page_len.shape[0]
        if kept_slots.shape[0] < max_rows * budget:
            raise ServerError(
                f"SGLang runs {max_rows} requests at once, more than LessIsMore has memory for: "
                f"set --max-running-requests {kept_slots.shape[0] // budget} or less"
            )
        self.kept_slots = kept_slots
        self.budget = budget
        self._backend = backend
        self._indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=kept_slots.device)
        self._host_lens = torch.zeros(max_rows, dtype=torch.int64)
        self._host_indptr = torch.zeros(max_rows + 1, dtype=torch.int32)
        # The host is at most one step ahead, so what it stages for one step is still to be copied
        # while it stages the next, and is free again for the one after that.
        self._staging = [Staging(), Staging()]
        self._last: tuple[SparseWrapper, int] | None = None
        """What was planned last, for how many rows; their lengths are in `_last_indptr`."""
        self._last_indptr = torch.zeros_like(self._host_indptr)
        self._eager = SparseWrapper(backend, kept_slots, None)
        self._captured: dict[int, SparseWrapper] = {}
        self.wrapper = self._eager.wrapper
        """Runs the sparse attention of the step that is planned."""
        self.kept_indptr = self._indptr
        """[B + 1] int32, of that step."""

    def plan_eager(self, forward_batch: Any) -> None:
        """Plan a step that runs layer by layer."""
        self._plan(self._eager, forward_batch)

    def plan_capture(self, forward_batch: Any) -> None:
        """Plan a step that a CUDA graph captures; its batch size gets a wrapper of its own."""
        rows = forward_batch.batch_size
        indptr = self._indptr[: rows + 1]
        self._captured[rows] = SparseWrapper(self._backend, self.kept_slots, indptr)
        self._plan(self._captured[rows], forward_batch)

    def plan_replay(self, forward_batch: Any) -> None:
        """Plan a step that replays the CUDA graph of its batch size."""
        self._plan(self._captured[forward_batch.batch_size], forward_batch)

    def forget(self) -> None:
        """Make the next plan anew, even if no kept length changes."""
        self._last = None

    def _plan(self, sparse: SparseWrapper, forward_batch: Any) -> None:
        rows = forward_batch.batch_size
        host_lens, host_indptr = self._host_lens[:rows], self._host_indptr[: rows + 1]
        torch.clamp(forward_batch.seq_lens_cpu[:rows], max=self.budget, out=host_lens)
        torch.cumsum(host_lens, 0, dtype=torch.int32, out=host_indptr[1:])
        self.wrapper = sparse.wrapper
        self.kept_indptr = self._indptr[: rows + 1]
        last_indptr = self._last_indptr[: rows + 1]
        if self._last == (sparse, rows) and torch.equal(host_indptr, last_indptr):
            return  # as in most steps: rows over the budget keep as many as before
        self._last = None  # until all of it is planned
        count_kept(forward_batch.seq_lens[:rows], self.budget, self.kept_indptr)
        self._plan_lengths(sparse, rows)
        self._last = (sparse, rows)
        last_indptr.copy_(host_indptr)

    def _plan_lengths(self, sparse: SparseWrapper, rows: int) -> None:
        """Tell FlashInfer how many slots each row keeps."""
        host_indptr = self._host_indptr[: rows + 1]
        slots = self.kept_slots
        if not sparse.is_captured:
            slots = slots[: int(host_indptr[rows])]
        self._staging.reverse()
        staging = self._staging[0]
        staging.wait_until_free()
        updater = self._backend.indices_updater_decode
        sparse.plan(
            staging.buffer,
            host_indptr,
            self.kept_indptr,
            slots,
            self._backend.kv_last_page_len[:rows],
            updater.num_qo_heads,
            updater.num_kv_heads,
            updater.head_dim,
            1,
            data_type=updater.data_type,
            q_data_type=updater.q_data_type,
            non_blocking=True,
        )
        staging.note_copy()
