"""A debugging aid for GPUs: every step's kept slots against the definition, without a pause.

When a step is planned, its lengths and cache slots are copied; when a SELECT layer has run, also
inside a CUDA graph, its scores and kept slots are. All of it stays on the GPU, in the order of the
stream, so that overlap scheduling goes on as always. The sets are recomputed when the copies fill
their share of memory, and when `/server_info` is asked.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels.reference import keep_tokens
from lim_sglang.kernels.selector import Selector

ENV_VAR = "LIM_AUDIT"
"""Set to 1, it lets every SELECT layer of every step be checked. Slow, and takes memory."""
MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class AuditedStep:
    """What one step had and what it kept. L SELECT layers, B rows, H heads, S longest row."""

    lengths: tuple[int, ...]
    slots: Tensor
    """[B, S] int32: where each row's tokens lay when the step was planned."""
    scores: Tensor
    """[L, B, H, S] f32."""
    kept: Tensor
    """[L, sum of kept lengths] int32."""


class Audit:
    """Records steps and counts the sets that are not the definition's."""

    def __init__(self, selector: Selector, kept_slots: Tensor, select_layers: list[int]) -> None:
        self.checked_sets = 0
        self.wrong_sets = 0
        self._selector = selector
        self._kept_slots = kept_slots
        self._layers = {layer: place for place, layer in enumerate(select_layers)}
        rows = selector.scores.shape[0]
        # Written inside CUDA graphs, so they must stay where they are.
        self._scores = selector.scores.new_empty(len(select_layers), *selector.scores.shape)
        self._kept = kept_slots.new_empty(len(select_layers), rows * selector.budget)
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
        if rows > self._scores.shape[1]:
            raise ValueError(
                f"{ENV_VAR} covers {self._scores.shape[1]} rows a step, not {rows}: "
                "lower --max-running-requests"
            )
        self._lengths = tuple(forward_batch.seq_lens_cpu[:rows].tolist())
        width = max(self._lengths)
        self._slots = req_to_token[forward_batch.req_pool_indices[:rows], :width]

    def note_layer(self, layer: int, rows: int) -> None:
        """Copy what a SELECT layer has just computed; a CUDA graph captures this."""
        place = self._layers[layer]
        self._scores[place, :rows].copy_(self._selector.scores[:rows])
        self._kept[place].copy_(self._kept_slots[: self._kept.shape[1]])

    def end_step(self) -> None:
        """Keep the copies of the step that has just been launched."""
        if self._slots is None:
            return
        rows, width = len(self._lengths), max(self._lengths)
        total = sum(min(length, self._selector.budget) for length in self._lengths)
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

    def check(self) -> None:
        """Recompute the sets of all recorded steps."""
        steps, self._steps = self._steps, []
        for step in steps:
            for place in range(len(self._layers)):
                self._check_layer(step, step.scores[place], step.kept[place])

    def _check_layer(self, step: AuditedStep, scores: Tensor, kept: Tensor) -> None:
        first = 0
        for row, length in enumerate(step.lengths):
            last = first + min(length, self._selector.budget)
            # A short row has no scores: it keeps everything.
            row_scores = scores[row, :, :length]
            wanted = step.slots[row, keep_tokens(row_scores, self._selector.shares)]
            self.checked_sets += 1
            self.wrong_sets += not torch.equal(kept[first:last], wanted)
            first = last
