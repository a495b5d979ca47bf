"""Run the kernels of page selection on a random batch and compare each with the definition.

As `verify.py`, whose batches these are: their heads, dtypes and lengths. Pages are Quest's, or the
blocks of a trained gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lim_sglang.kernels import reference_rivals
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.page_selector import BoundSelector, GateSelector, ModelGates, PageSelector
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.reference_rivals import BlockGate
from lim_sglang.kernels.selector import Room
from lim_sglang.kernels.verify import (
    SCORE_TOLERANCE,
    SPARE,
    Batch,
    kept_differences,
    poison,
    relative_error,
    token_slots,
)

FEWEST_PAGES = 3
"""Pages of the smallest budget that is verified."""
GATE_BLOCK = 64
GATE_TOLERANCE = 1e-4
"""Largest relative error of a gate's logits: sums of products of sums, in another order."""
ROPE_THETA = 10000.0
ROPE_FACTOR = 1.37
"""Factor on the rope table, as YaRN's attention factor is: to rotate back divides by its square."""


@dataclass(frozen=True)
class PagedStep:
    """Random tensors of a batch of B rows whose tokens lie in whole pages of the cache."""

    batch: Batch
    """The budget a number of pages."""
    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[P, G, D]."""
    slots: StepSlots
    """Pages in random order; `kept` has a row for each list, poisoned, with SPARE more."""
    summaries: Tensor
    """[P / page, …] of the selector, NaN but for the pages that are complete."""

    def row_keys(self, row: int) -> Tensor:
        """Return the keys of one row's tokens, [S, G, D]."""
        return self.keys[token_slots(self.slots, row)]


def page_batch(batch: Batch, page: int) -> Batch:
    """Return a batch with a budget of whole pages."""
    pages = max(FEWEST_PAGES, batch.budget // page)
    return replace(batch, budget=pages * page, page=page)


def bound_selector(batch: Batch, device: str, lists: int) -> BoundSelector:
    """Allocate the memory of a batch for Quest."""
    split, room = _split_and_room(batch, device)
    return BoundSelector.allocate(split, room, lists=lists, page=batch.page)


def gate_selector(
    batch: Batch, device: str, *, has_norm: bool, gain: float = 1.0, seed: int = 0
) -> GateSelector:
    """Allocate the memory of a batch for a random gate of one layer.

    Args:
        has_norm: the gate has RMSNorms.
        gain: factor on all projections; at 0 all logits are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, groups = batch.dim, batch.kv_heads
    split, room = _split_and_room(batch, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gate = BlockGate(
        (random(groups, batch.heads // groups, dim, dim) * gain / dim**0.5).to(batch.dtype),
        (random(groups, 3 * dim, dim) * gain / dim**0.5).to(batch.dtype),
        (1 + random(dim) / 4).to(batch.dtype) if has_norm else None,
        (1 + random(dim) / 4).to(batch.dtype) if has_norm else None,
        block=batch.page,
    )
    positions = torch.arange(room.context)[:, None]
    angles = positions * ROPE_THETA ** -(torch.arange(0, dim, 2) / dim)
    cos_sin = ROPE_FACTOR * torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    return GateSelector.allocate(
        split, room, ModelGates.load([gate], replace(room, cos_sin=cos_sin))
    )


def _split_and_room(batch: Batch, device: str) -> tuple[BudgetSplit, Room]:
    context, tokens = max(batch.lengths) + 3, sum(batch.lengths)
    room = Room(len(batch.lengths), batch.heads, batch.kv_heads, context, tokens, device)
    return BudgetSplit(sinks=0, selected=batch.budget // batch.page - 1, recent=1), room


def paged_step(
    batch: Batch, selector: PageSelector, *, opposed: bool = False, seed: int = 0
) -> PagedStep:
    """Generate the tensors of a batch and summarize its complete pages.

    Args:
        opposed: no score and no bound is above 0.
    """
    device, lists = selector.page_scores.values.device, selector.page_scores.lists
    generator = torch.Generator().manual_seed(seed)
    page = batch.page
    per_row = [triton.cdiv(length, page) for length in batch.lengths]
    order = torch.randperm(sum(per_row), generator=generator) + 1  # page 0 is SGLang's reserve
    slots = [
        (pages[:, None] * page + torch.arange(page)).flatten()[:length]
        for pages, length in zip(order.split(per_row), batch.lengths, strict=True)
    ]
    num_slots = (len(order) + 1) * page
    query = torch.randn(len(batch.lengths), batch.heads, batch.dim, generator=generator)
    keys = torch.randn(num_slots, batch.kv_heads, batch.dim, generator=generator)
    if batch.levels:  # sums of integers are exact in any order, and ties are real
        query, keys = query.mul(batch.levels).round(), keys.mul(batch.levels).round()
    if opposed:
        query, keys = -query.abs() - 1, keys.abs() + 1
    keys = keys.to(batch.dtype).to(batch.key_dtype or batch.dtype).to(device)
    kept = batch.kept_lengths
    step = PagedStep(
        batch,
        query.to(batch.dtype).to(device),
        keys,
        StepSlots(
            torch.tensor([0, *batch.lengths]).cumsum(0).int().to(device),
            torch.cat(slots).int().to(device),
            torch.tensor([0, *kept]).cumsum(0).int().to(device),
            poison(torch.empty(lists, sum(kept) + SPARE, dtype=torch.int32, device=device)),
        ),
        poison_summaries(selector, keys),
    )
    lengths = torch.cat([torch.arange(1, length + 1) for length in batch.lengths]).to(device)
    selector.summarize(0, keys, lengths, step.slots.slots.long(), step.summaries)
    return step


def poison_summaries(selector: PageSelector, keys: Tensor) -> Tensor:
    """Allocate the summaries of a cache, filled with NaN."""
    sides = (2,) if isinstance(selector, BoundSelector) else ()
    shape = (len(keys) // selector.page, *sides, *keys.shape[1:])
    return torch.full(shape, torch.nan, device=keys.device).to(keys.dtype)


def page_differences(batch: Batch, device: str, page: int = 16) -> list[str]:
    """Compare summaries, bounds and kept slots, for a list of each query head, of each KV head's
    query heads, and of all.
    """
    batch = page_batch(batch, page)
    sharings = {"query_head": batch.heads, "kv_head": batch.kv_heads, "all": 1}
    differences = []
    for shared_by, lists in sharings.items():
        selector = bound_selector(batch, device, lists)
        steps = [paged_step(batch, selector)]
        if batch.levels:
            steps.append(paged_step(batch, selector, opposed=True))
        for step in steps:
            bounds = [_bounds(step, row, shared_by) for row in range(len(batch.lengths))]
            found = _summary_differences(step, selector)
            found += _selection_differences(step, selector, bounds, SCORE_TOLERANCE)
            if batch.levels:  # sums of integers are exact: the set follows from the keys alone
                found += _differences_of_sets(step, selector, bounds)
            differences += [f"shared by {shared_by}: {difference}" for difference in found]
    return differences


def gate_differences(batch: Batch, device: str) -> list[str]:
    """Compare compressed keys, logits and kept slots, of a gate with norms and of one without; none
    of an fp8 cache, which no gate is served with."""
    if (batch.key_dtype or batch.dtype).itemsize == 1:
        return []
    batch = page_batch(batch, GATE_BLOCK)
    differences = []
    for has_norm in (True, False):
        selector = gate_selector(batch, device, has_norm=has_norm)
        step = paged_step(batch, selector)
        logits = [_logits(step, selector, row) for row in range(len(batch.lengths))]
        found = _summary_differences(step, selector)
        found += _selection_differences(step, selector, logits, GATE_TOLERANCE)
        differences += [f"{'with' if has_norm else 'without'} norms: {each}" for each in found]
    return differences


def _summary_differences(step: PagedStep, selector: PageSelector) -> list[str]:
    page, differences = step.batch.page, []
    untouched = torch.ones(len(step.summaries), dtype=torch.bool)
    for row, length in enumerate(step.batch.lengths):
        whole = length // page * page
        pages = token_slots(step.slots, row)[:whole:page] // page
        untouched[pages.cpu()] = False
        keys, found = step.row_keys(row)[:whole], step.summaries[pages]
        if not selector.has_right_summaries(0, keys, found).all():
            differences.append(f"row {row}: summaries differ")
    # In f32, since fp8 has no comparison.
    if not step.summaries[untouched.to(step.summaries.device)].float().isnan().all():
        differences.append("summaries of pages that are not complete are written")
    return differences


def _selection_differences(
    step: PagedStep, selector: PageSelector, expected: Sequence[Tensor], tolerance: float
) -> list[str]:
    """Compare the scores of pages with [lists, competing pages] of each row, and kept slots with
    those that the scores give."""
    poison(selector.page_scores.values)
    poison(selector.candidates)
    selector.select(0, step.query, step.summaries, step.slots)
    differences = []
    scores = selector.page_scores.rows(step.slots.indptr.tolist())
    for row, wanted in enumerate(expected):
        found = scores[row]
        if not found[:, wanted.shape[1] :].isnan().all():
            differences.append(f"row {row}: scores are written from the newest page on")
        error = relative_error(found[:, : wanted.shape[1]], wanted) if wanted.numel() else 0.0
        if not error <= tolerance:
            differences.append(f"row {row}: scores of pages are off by {error:.2e}")
    differences += _differences_of_sets(step, selector, scores)
    whole = step.slots.kept.clone()
    poison(step.slots.kept)
    chunked = selector.in_chunks_of(min(2, len(step.batch.lengths)))
    chunked.select(0, step.query, step.summaries, step.slots)
    if not torch.equal(whole, step.slots.kept):
        differences.append("chunks of two rows keep other slots")
    return differences


def _differences_of_sets(
    step: PagedStep, selector: PageSelector, bounds: Sequence[Tensor]
) -> list[str]:
    return kept_differences(
        step.batch,
        step.slots,
        lambda row, length: torch.atleast_2d(selector.keep(bounds[row], length)),
    )


def _bounds(step: PagedStep, row: int, shared_by: str) -> Tensor:
    """Return the bounds of a row by the definition, [lists, competing pages]."""
    batch = step.batch
    least, most = reference_rivals.summarize_pages(step.row_keys(row), batch.page)
    found = reference_rivals.page_bounds(step.query[row], least, most)
    shared = reference_rivals.share_scores(found, shared_by, batch.kv_heads)
    return shared[:, : _count_competing(batch, row)]


def _logits(step: PagedStep, selector: GateSelector, row: int) -> Tensor:
    """Return the logits of a row by the definition, of its compressed keys as they are stored:
    [G, competing blocks]."""
    pages = token_slots(step.slots, row)[:: step.batch.page] // step.batch.page
    compressed = step.summaries[pages[: _count_competing(step.batch, row)]]
    return row_logits(selector.gates, 0, step.query[row], compressed, step.batch.lengths[row])


def row_logits(
    gates: ModelGates, layer: int, query: Tensor, compressed: Tensor, length: int
) -> Tensor:
    """Return the logits of one row by the definition.

    Args:
        query: [H, D] after RoPE.
        compressed: [blocks, G, D].
        length: tokens of the row.

    Returns:
        [G, blocks] f32.
    """
    position, table = length - 1, gates.cos_sin
    raw = reference_rivals.rotate_back(query[None], table[position : position + 1])[0]
    gate = gates.of_layer[layer]
    return reference_rivals.compressed_logits(raw, compressed, gate, position, table)


def _count_competing(batch: Batch, row: int) -> int:
    """Return the pages of a row that are scored: none of a row within the budget."""
    length = batch.lengths[row]
    return triton.cdiv(length, batch.page) - 1 if length > batch.budget else 0
