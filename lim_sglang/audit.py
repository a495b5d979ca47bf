"""A debugging aid for GPUs: every step's kept slots and sparse attention against the definition.

When a step is planned, its lengths and cache slots are copied; when a SELECT layer has run, also
inside a CUDA graph, its scores and kept slots are. All of it stays on the GPU, in the order of the
stream, so that overlap scheduling goes on as always. The sets are recomputed when the copies fill
their share of memory, and when `/server_info` is asked. What a REUSE layer gives is recomputed on
the spot, since its cache may be overwritten soon, and only the number of wrong rows is kept. Scores
are taken as they are; rows that pad a graph's batch and those of its warm-up are checked, too.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_sglang.errors import ServerError
from lim_sglang.kernels.reference import keep_tokens
from lim_sglang.kernels.selector import Selector
from lim_sglang.kernels.verify import ATTENTION_TOLERANCE

ENV_VAR = "LIM_AUDIT"
"""Set to 1, it lets every SELECT layer of every step be checked. Slow, and takes memory."""
MAX_BYTES = 4 << 30
"""Copies that are kept before they are checked."""


@dataclass(frozen=True)
class AuditedStep:
    """What one step had and what it kept. L SELECT layers, B rows, H heads, S longest row."""

    lengths: tuple[int, ...]
    slots: Tensor
    """[B, S] int32: where each row's tokens lay when the step was planned."""
    scores: Tensor
    """[L, B, H, S] f32, what decides which tokens are kept; H is 1 for masses."""
    kept: Tensor
    """[L, sum of kept lengths] int32."""


class Audit:
    """Records steps and counts the sets that are not the definition's."""

    def __init__(
        self,
        selector: Selector,
        kept_slots: Tensor,
        select_layers: Sequence[int],
        max_rows: int,
    ) -> None:
        """Take the memory of the copies.

        Raises:
            ServerError: a step may have more rows than the selector's memory holds at once.
        """
        if max_rows > selector.max_rows:
            raise ServerError(
                f"{ENV_VAR} covers {selector.max_rows} rows a step, not {max_rows}: "
                f"set --max-running-requests {selector.max_rows} or less"
            )
        self.checked_sets = 0
        self.wrong_sets = 0
        self._selector = selector
        self._kept_slots = kept_slots
        self._layers = {layer: place for place, layer in enumerate(select_layers)}
        budget = selector.budget_split.budget
        # Written inside CUDA graphs, so they must stay where they are.
        self._scores = selector.deciding_scores.new_empty(
            len(select_layers), *selector.deciding_scores.shape
        )
        self._kept = kept_slots.new_empty(len(select_layers), max_rows * budget)
        self._outputs = kept_slots.new_zeros(2)  # rows checked, rows wrong
        self._lanes = torch.arange(budget, device=kept_slots.device)
        self._steps: list[AuditedStep] = []
        self._lengths: tuple[int, ...] = ()
        self._slots: Tensor | None = None

    @staticmethod
    def is_wanted() -> bool:
        """Whether the environment asks for it."""
        return os.environ.get(ENV_VAR) == "1"

    def begin_step(self, forward_batch: Any, req_to_token: Tensor) -> None:
        """Copy where the rows' tokens lie, on the stream that the step is planned on."""
        rows = forward_batch.batch_size
        self._lengths = tuple(forward_batch.seq_lens_cpu[:rows].tolist())
        width = max(self._lengths)
        self._slots = req_to_token[forward_batch.req_pool_indices[:rows], :width]

    def note_layer(self, layer: int, rows: int) -> None:
        """Copy what a SELECT layer has just computed; a CUDA graph captures this."""
        place = self._layers[layer]
        self._scores[place, :rows].copy_(self._selector.deciding_scores[:rows])
        self._kept[place].copy_(self._kept_slots[: self._kept.shape[1]])

    def note_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        kept_indptr: Tensor,
        layer: Any,
    ) -> None:
        """Recompute what a REUSE layer has just computed; a CUDA graph captures this.

        Args:
            query, output: [B, H, D].
            keys, values: [P, G, D].
            kept_indptr: [B + 1] int32, where each row's kept slots begin.
            layer: SGLang's, for its scales and soft-cap.
        """
        starts, ends = kept_indptr[:-1, None], kept_indptr[1:, None]
        places = starts + self._lanes  # [B, K]
        inside = places < ends
        slots = self._kept_slots[torch.where(inside, places, 0)].long()
        rows, heads, dim = query.shape
        grouped = query.float().view(rows, keys.shape[1], -1, dim)  # [B, G, H/G, D]
        scores = torch.einsum("bgqd,bkgd->bgqk", grouped, keys[slots].float())
        scores *= layer.scaling * (layer.k_scale_float or 1.0)
        if layer.logit_cap:
            scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
        weights = scores.masked_fill(~inside[:, None, None], -torch.inf).softmax(-1)
        expected = torch.einsum("bgqk,bkgd->bgqd", weights, values[slots].float())
        expected = expected.reshape(rows, heads * dim) * (layer.v_scale_float or 1.0)
        error = (output.float().view_as(expected) - expected).square().mean(-1)
        bound = ATTENTION_TOLERANCE[output.dtype] ** 2 * expected.square().mean(-1)
        self._outputs[0] += rows
        self._outputs[1] += (~(error <= bound)).sum()

    def end_step(self) -> None:
        """Keep the copies of the step that has just been launched."""
        if self._slots is None:
            return
        rows, width = len(self._lengths), max(self._lengths)
        total = sum(min(length, self._selector.budget_split.budget) for length in self._lengths)
        step = AuditedStep(
            self._lengths,
            self._slots,
            self._scores[:, :rows, :, :width].clone(),
            self._kept[:, :total].clone(),
        )
        self._slots = None
        self._steps.append(step)
        if sum(step.scores.nbytes for step in self._steps) > MAX_BYTES:
            self.check()

    def counts(self) -> dict[str, int]:
        """Sets and outputs that were checked and found wrong so far, once all steps have run."""
        self.check()
        checked, wrong = self._outputs.tolist()
        return {
            "checked_sets": self.checked_sets,
            "wrong_sets": self.wrong_sets,
            "checked_outputs": checked,
            "wrong_outputs": wrong,
        }

    def check(self) -> None:
        """Recompute the sets of all recorded steps."""
        torch.cuda.synchronize()  # they ran on another stream
        steps, self._steps = self._steps, []
        for step in steps:
            for place in range(len(self._layers)):
                self._check_layer(step, step.scores[place], step.kept[place])

    def _check_layer(self, step: AuditedStep, scores: Tensor, kept: Tensor) -> None:
        first = 0
        for row, length in enumerate(step.lengths):
            last = first + min(length, self._selector.budget_split.budget)
            # A short row has no scores: it keeps everything.
            row_scores = scores[row, :, :length]
            wanted = step.slots[row, keep_tokens(row_scores, self._selector.budget_split)]
            self.checked_sets += 1
            self.wrong_sets += not torch.equal(kept[first:last], wanted)
            first = last
