"""Attention over the kept slots of a batch, in the place of FlashInfer's wrapper.

A kept set has `min(length, budget)` tokens, so where each row's slots begin follows from the
lengths that a step starts with. Nothing else is planned, and nothing here waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from lim_sglang.errors import ServerError
from lim_sglang.kernels.attend import attend_tokens
from lim_sglang.kernels.lengths import count_kept
from lim_sglang.kernels.parts import SplitWorkspace


class SparseDecodeWrapper:
    """What REUSE layers run: `forward` is what SGLang's decode calls of a FlashInfer wrapper.

    Shapes: R rows at most, K budget; B rows of the step; H query heads, D head_dim.
    """

    def __init__(self, backend: Any, kept_slots: Tensor, budget: int) -> None:
        """Take the memory of any step.

        Args:
            backend: the `FlashInferAttnBackend` whose layers are attended.
            kept_slots: [>= R * K] int32; REUSE layers read what is written here.

        Raises:
            ServerError: `kept_slots` is too small for the rows that SGLang runs at once.
        """
        max_rows: int = backend.kv_last_page_len.shape[0]  # one a request
        if kept_slots.shape[0] < max_rows * budget:
            raise ServerError(
                f"SGLang runs {max_rows} requests at once, more than LessIsMore has memory for: "
                f"set --max-running-requests {kept_slots.shape[0] // budget} or less"
            )
        shape = backend.indices_updater_decode
        self.kept_slots = kept_slots
        self.budget = budget
        self._indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=kept_slots.device)
        self._workspace = SplitWorkspace.allocate(
            num_heads=shape.num_qo_heads,
            num_kv_heads=shape.num_kv_heads,
            dim=shape.head_dim,
            cache_dtype=shape.data_type,
            device=kept_slots.device,
        )
        self.kept_indptr = self._indptr
        """[B + 1] int32, where each row's slots begin in the step that was begun last."""

    def begin_step(self, seq_lens: Tensor) -> None:
        """Count what each row will keep, in the order of the stream.

        Args:
            seq_lens: [B] int64 on the device, the newest token included.
        """
        self.kept_indptr = self._indptr[: len(seq_lens) + 1]
        count_kept(seq_lens, self.budget, self.kept_indptr)

    def forward(
        self,
        query: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        *,
        sm_scale: float,
        logits_soft_cap: float | None,
        k_scale: float | None,
        v_scale: float | None,
    ) -> Tensor:
        """Attend [B, H, D] over the kept slots; a CUDA graph may capture it."""
        keys, values = kv_cache
        return attend_tokens(
            query,
            keys,
            values,
            self.kept_slots,
            self.kept_indptr,
            longest=self.budget,
            scale=sm_scale * (k_scale or 1.0),
            soft_cap=logits_soft_cap or 0.0,
            value_scale=v_scale or 1.0,
            workspace=self._workspace,
            out=torch.empty_like(query),
        )
