"""Two debugging aids: `Audit` checks a GPU server step by step; a `LayerObserver` is shown what a
layer has read, on a CPU or in an eager step of a GPU. `KeptSets` observes a CPU server.

Audit: when a step is planned, its lengths and cache slots are copied; when a SELECT layer has run,
also inside a CUDA graph, its scores and kept slots are copied; of a policy whose kept slots are
written as the step begins, the slots alone. All copies stay on the GPU, in the order of the stream,
so that overlap scheduling goes on as always, but for cycles of drafts, which wait for their exact
lengths. Kept sets are recomputed by the definition when the copies fill their share of memory, and
when `/server_info` is asked; where ranks of tensor parallelism share the heads, each rank does so
from the scores of all heads. A REUSE layer's output is recomputed at once, since its cache may be
overwritten soon, and only the number of wrong rows is kept; so is a PICK layer's, and the summaries
of the keys that a step's rows have. Scores are taken as they are, then overwritten with NaN, so
that a score which the next dense pass leaves out is seen. A step whose rows have more tokens than
one chunk has room for is counted, not checked. Rows that pad a graph's batch, and rows of a graph's
warm-up, are checked, too.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

from lim_sglang.config import AUDIT_VAR, TRACE_VAR
from lim_sglang.errors import ServerError
from lim_sglang.kernels.packed import PackedRows, row_ends
from lim_sglang.kernels.page_selector import PageSelector
from lim_sglang.kernels.selector import ScoreSelector, Selector
from lim_sglang.kernels.verify_attention import ATTENTION_TOLERANCE
from lim_sglang.policies.policy import LayerInputs, SparsePolicy

BEGINNING = -1
"""In a layer's place: the kept slots are written before the first layer."""
MAX_BYTES = 4 << 30
"""Memory of the copies that are kept before they are checked."""


@dataclass(frozen=True)
class AuditedStep:
    """Inputs and kept slots of one step. L SELECT layers, B rows, H heads, S longest row."""

    lengths: tuple[int, ...]
    slots: Tensor
    """[B, S] int32, the cache slots of each row's tokens when the step was planned."""
    scores: tuple[PackedRows, ...] | None
    """Part of this rank in the scores that decide which tokens are kept, of each layer."""
    kept: Tensor
    """[L, sum of kept lengths] int32, the kept slots; [L, lists, …] where heads have their own."""


class Audit:
    """Recorded steps, and counts of kept sets and outputs that differ from the definition."""

    def __init__(
        self,
        selector: Selector,
        kept_slots: Tensor,
        policy: SparsePolicy,
        select_layers: Sequence[int],
        max_rows: int,
    ) -> None:
        """Allocate the memory of the copies.

        Args:
            select_layers: SELECT or PICK layers; `BEGINNING` alone where there are none.

        Raises:
            ServerError: a step may have more rows than the selector holds at once.
        """
        scores = selector.own_scores
        if scores is not None and max_rows > scores.max_rows:
            raise ServerError(
                f"{AUDIT_VAR} covers {scores.max_rows} rows a step, not {max_rows}: "
                f"set --max-running-requests {scores.max_rows} or less"
            )
        self.checked_sets = 0
        self.wrong_sets = 0
        self.unchecked_steps = 0
        self._selector = selector
        self._kept_slots = kept_slots
        self._index_of_layer = {layer: index for index, layer in enumerate(select_layers)}
        self._count_read = policy.count_read
        # CUDA graphs write here, so these buffers must never move.
        self._scores: tuple[PackedRows, ...] | None = None
        if scores is not None:
            copies = scores.values.new_empty(len(select_layers), len(scores.values))
            self._scores = tuple(replace(scores, values=of_layer) for of_layer in copies)
        self._kept = kept_slots.new_empty(len(select_layers), *kept_slots.shape)
        self._outputs = kept_slots.new_zeros(2)  # rows checked, rows wrong
        self._summarized = kept_slots.new_zeros(2)  # blocks checked, blocks wrong
        self._block = policy.block
        self._pool: Any = None
        self._summaries: Mapping[int, Tensor] = {}
        self._lanes = torch.arange(policy.budget, device=kept_slots.device)
        self._steps: list[AuditedStep] = []
        self._lengths: tuple[int, ...] = ()
        self._slots: Tensor | None = None

    @staticmethod
    def is_wanted() -> bool:
        """Return True if `LIM_AUDIT` is 1."""
        return os.environ.get(AUDIT_VAR) == "1"

    def watch_summaries(self, pool: Any, summaries: Mapping[int, Tensor]) -> None:
        """Check these summaries after each step.

        Args:
            pool: SGLang's KV cache.
            summaries: by layer.
        """
        self._pool, self._summaries = pool, summaries

    def begin_step(self, forward_batch: Any, req_to_token: Tensor) -> None:
        """Copy the slots of the rows' tokens, on the stream that plans the step."""
        rows = forward_batch.batch_size
        self._lengths = tuple(forward_batch.seq_lens_cpu[:rows].tolist())
        if not self._selector.fits(sum(self._lengths)):
            self.unchecked_steps += 1
            return  # a later chunk of rows will have overwritten the scores
        width = max(self._lengths)
        self._slots = req_to_token[forward_batch.req_pool_indices[:rows], :width]

    def note_layer(self, layer: int) -> None:
        """Copy the scores and kept slots of a SELECT layer that has just run; graphs capture it."""
        index = self._index_of_layer[layer]
        if self._scores is not None and self._selector.own_scores is not None:
            self._scores[index].values.copy_(self._selector.own_scores.values)
        if isinstance(self._selector, ScoreSelector):
            self._selector.scores.values.fill_(torch.nan)
        self._kept[index].copy_(self._kept_slots)

    def note_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        kept_indptr: Tensor,
        layer: Any,
    ) -> None:
        """Recompute the output of a REUSE layer that has just run; CUDA graphs capture it.

        Args:
            query, output: [B, H, D].
            keys, values: [P, G, D].
            kept_indptr: [B + 1] int32, the start of each row's kept slots.
            layer: SGLang's, for its scales and soft-cap.
        """
        starts, ends = kept_indptr[:-1, None], kept_indptr[1:, None]
        positions = starts + self._lanes  # [B, K]
        inside = positions < ends
        slots = self._kept_slots[..., torch.where(inside, positions, 0)].long()
        rows, heads, dim = query.shape
        if slots.ndim == 2:  # [B, K]: the heads of each KV head read one list
            units = keys.shape[1]
            read_keys, read_values = keys[slots].transpose(1, 2), values[slots].transpose(1, 2)
        else:  # [lists, B, K]
            units = slots.shape[0]
            unit = torch.arange(units, device=slots.device)[:, None, None]
            kv_head = unit * keys.shape[1] // units
            read_keys = keys[slots, kv_head].transpose(0, 1)
            read_values = values[slots, kv_head].transpose(0, 1)
        grouped = query.float().view(rows, units, -1, dim)  # [B, units, heads of each, D]
        scores = torch.einsum("bgqd,bgkd->bgqk", grouped, read_keys.float())
        scores *= layer.scaling * (layer.k_scale_float or 1.0)
        if layer.logit_cap:
            scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
        weights = scores.masked_fill(~inside[:, None, None], -torch.inf).softmax(-1)
        expected = torch.einsum("bgqk,bgkd->bgqd", weights, read_values.float())
        expected = expected.reshape(rows, heads * dim) * (layer.v_scale_float or 1.0)
        error = (output.float().view_as(expected) - expected).square().mean(-1)
        bound = ATTENTION_TOLERANCE[output.dtype] ** 2 * expected.square().mean(-1)
        self._outputs[0] += rows
        self._outputs[1] += (~(error <= bound)).sum()

    def end_step(self) -> None:
        """Keep the copies of the step that has just been launched."""
        if self._slots is None:
            return
        total = sum(map(self._count_read, self._lengths))
        self._check_summaries(self._slots)
        ends = row_ends(self._lengths)
        step = AuditedStep(
            self._lengths,
            self._slots,
            self._scores and tuple(scores.used(ends) for scores in self._scores),
            self._kept[..., :total].clone(),
        )
        self._slots = None
        self.record(step)

    def record(self, step: AuditedStep) -> None:
        """Keep the copies of a step, to be checked later."""
        self._steps.append(step)
        if sum(map(copied_bytes, self._steps)) > MAX_BYTES:
            self.check()

    def counts(self) -> dict[str, int]:
        """Wait for all steps; return what was checked, found wrong, and not checked."""
        self.check()
        checked, wrong = self._outputs.tolist()
        counts = {
            "checked_sets": self.checked_sets,
            "wrong_sets": self.wrong_sets,
            "checked_outputs": checked,
            "wrong_outputs": wrong,
            "unchecked_steps": self.unchecked_steps,
        }
        if self._summaries:
            names = ("checked_summaries", "wrong_summaries")
            counts |= dict(zip(names, self._summarized.tolist(), strict=True))
        return counts

    def _check_summaries(self, slots: Tensor) -> None:
        """Compare the summary of each complete block of a step's rows with the definition.

        Args:
            slots: [B, S].
        """
        block = self._block
        num_blocks = slots.shape[1] // block
        if not self._summaries or not num_blocks:
            return
        members = slots[:, : num_blocks * block].long().unflatten(1, (num_blocks, block))
        lengths = torch.tensor(self._lengths, device=slots.device)[:, None]
        ends = torch.arange(1, num_blocks + 1, device=slots.device) * block
        is_complete = ends <= lengths
        is_right = cast(PageSelector, self._selector).has_right_summaries
        for layer, summaries in self._summaries.items():
            keys = self._pool.get_key_buffer(layer)
            for row, of_row in enumerate(members):  # [blocks, block]
                found = summaries[of_row[:, 0] // block]
                is_wrong = ~is_right(layer, keys[of_row.flatten()], found)
                self._summarized[0] += is_complete[row].sum()
                self._summarized[1] += (is_complete[row] & is_wrong).sum()

    def check(self) -> None:
        """Recompute the kept sets of all recorded steps."""
        torch.cuda.synchronize()  # the steps ran on another stream
        steps, self._steps = self._steps, []
        for step in steps:
            for index, kept in enumerate(step.kept):
                self._check_layer(step, None if step.scores is None else step.scores[index], kept)

    def _check_layer(self, step: AuditedStep, scores: PackedRows | None, kept: Tensor) -> None:
        rows = [None] * len(step.lengths) if scores is None else scores.rows(row_ends(step.lengths))
        first = 0
        for row, length in enumerate(step.lengths):
            last, of_row = first + self._count_read(length), rows[row]
            if of_row is not None and length > self._selector.budget:
                of_row = self._selector.of_all_ranks(of_row)
            # A row within the budget has no scores: it keeps everything.
            positions = self._selector.keep(of_row, length)
            is_right = torch.equal(kept[..., first:last], step.slots[row, positions])
            self.checked_sets += 1
            self.wrong_sets += not is_right or self._has_gaps(of_row, length)
            first = last

    def _has_gaps(self, scores: Tensor | None, length: int) -> bool:
        """Return True if a score that a row's set depends on was not written."""
        if scores is None or length <= self._selector.budget:
            return False
        return bool(scores[:, : self._selector.num_candidates(length)].isnan().any())


def copied_bytes(step: AuditedStep) -> int:
    """Return the memory of a recorded step."""
    return step.slots.nbytes + step.kept.nbytes + sum(each.num_bytes for each in step.scores or ())


@dataclass(frozen=True)
class ObservedRow:
    """Inputs of one row in one layer of a decode step that has just run, and its kept set."""

    step: int
    """Number of the server's decode step, or of its cycle of drafts."""
    rid: str | None
    """Id of the row's request; None outside a server."""
    inputs: LayerInputs
    kept: Tensor
    """[lists, n] int64, ascending positions that the nearest layer below that selects, or this one,
    has kept; all S of a row without such a layer, or within the budget."""
    selects: bool
    """True if this layer selects."""


class LayerObserver(Protocol):
    """Receiver of the layers of decode steps: of each step on a CPU, of eager steps on a GPU."""

    def note_layer(self, row: ObservedRow) -> None:
        """See a row of a layer; its tensors are the observer's own."""


class KeptSets:
    """A file of JSON lines, one for the kept set of a sparse row after each layer that selects."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Open `kept-<rank>-<pid>.jsonl` in this folder, one file a scheduler process."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"kept-{rank}-{os.getpid()}.jsonl").open("a", buffering=1)

    @classmethod
    def from_environment(cls, rank: int) -> Self | None:
        """Return kept sets in the folder that `LIM_TRACE` names, None if the variable is unset.

        Args:
            rank: of tensor parallelism.
        """
        folder = os.environ.get(TRACE_VAR)
        return cls(Path(folder), rank) if folder else None

    def note_layer(self, row: ObservedRow) -> None:
        """Write the ascending positions that a sparse row keeps after a layer that selects."""
        length = row.inputs.keys.shape[0]
        if row.selects and row.kept.shape[1] < length:
            line = {"step": row.step, "rid": row.rid, "layer": row.inputs.layer, "seq_len": length}
            self._file.write(json.dumps(line | {"kept": row.kept.tolist()}) + "\n")
