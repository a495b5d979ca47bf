"""Run the kernels of page selection on a random batch and compare each with the definition.

As `verify.py`, whose batches these are: their heads, dtypes and lengths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lim_sglang.kernels import reference_rivals
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.page_bounds import summarize_pages
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.selector import PageSelector, Room
from lim_sglang.kernels.verify import (
    POISON,
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
    """[P / page, 2, G, D], NaN but for the pages that are complete."""

    def row_keys(self, row: int) -> Tensor:
        """Return the keys of one row's tokens, [S, G, D]."""
        return self.keys[token_slots(self.slots, row)]


def page_batch(batch: Batch, page: int) -> Batch:
    """Return a batch with a budget of whole pages."""
    pages = max(FEWEST_PAGES, batch.budget // page)
    return replace(batch, budget=pages * page, page=page)


def paged_step(
    batch: Batch, device: str, lists: int, *, opposed: bool = False, seed: int = 0
) -> PagedStep:
    """Generate the tensors of a batch and summarize its complete pages.

    Args:
        lists: of a row.
        opposed: no score and no bound is above 0.
    """
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
        poison_summaries(keys, page),
    )
    lengths = torch.cat([torch.arange(1, length + 1) for length in batch.lengths]).to(device)
    summarize_pages(keys, lengths, step.slots.slots.long(), page, step.summaries)
    return step


def poison_summaries(keys: Tensor, page: int) -> Tensor:
    """Allocate the summaries of a cache, filled with NaN."""
    shape = (len(keys) // page, 2, *keys.shape[1:])
    return torch.full(shape, torch.nan, device=keys.device).to(keys.dtype)


def page_differences(batch: Batch, device: str, page: int = 16) -> list[str]:
    """Compare summaries, bounds and kept slots, for a list of each query head, of each KV head's
    query heads, and of all.
    """
    batch = page_batch(batch, page)
    differences = []
    for shared_by, lists in _sharings(batch):
        steps = [paged_step(batch, device, lists)]
        if batch.levels:
            steps.append(paged_step(batch, device, lists, opposed=True))
        for step in steps:
            found = _summary_differences(step) + _selection_differences(step, shared_by, lists)
            differences += [f"shared by {shared_by}: {difference}" for difference in found]
    return differences


def _sharings(batch: Batch) -> Iterator[tuple[str, int]]:
    yield "query_head", batch.heads
    yield "kv_head", batch.kv_heads
    yield "all", 1


def _summary_differences(step: PagedStep) -> list[str]:
    expected = poison_summaries(step.keys, step.batch.page)
    for row in range(len(step.batch.lengths)):
        sides = reference_rivals.summarize_pages(step.row_keys(row), step.batch.page)
        pages = token_slots(step.slots, row)[:: step.batch.page] // step.batch.page
        expected[pages[: len(sides[0])]] = torch.stack(sides, 1)
    # In f32, since fp8 has no comparison; NaN where nothing is to be written.
    found, wanted = (each.float().nan_to_num(POISON) for each in (step.summaries, expected))
    return [] if torch.equal(found, wanted) else ["summaries differ"]


def _selection_differences(step: PagedStep, shared_by: str, lists: int) -> list[str]:
    batch = step.batch
    rows, context = len(batch.lengths), max(batch.lengths) + 3
    room = Room(rows, batch.heads, batch.kv_heads, context, step.keys.device)
    split = BudgetSplit(sinks=0, selected=batch.budget // batch.page - 1, recent=1)
    selector = PageSelector.allocate(split, room, lists=lists, page=batch.page)
    poison(selector.bounds)
    poison(selector.candidates)
    selector.select(step.query, step.summaries, step.slots)
    differences = []
    for row in range(len(batch.lengths)):
        expected = _bounds(step, row, shared_by)
        found = selector.bounds[row]
        if not found[:, expected.shape[1] :].isnan().all():
            differences.append(f"row {row}: bounds are written from the newest page on")
        error = relative_error(found[:, : expected.shape[1]], expected) if expected.numel() else 0.0
        if not error <= SCORE_TOLERANCE:
            differences.append(f"row {row}: bounds are off by {error:.2e}")
    differences += _differences_of_sets(step, selector, list(selector.bounds))
    if batch.levels:  # sums of integers are exact: the set follows from the keys alone
        exact = [_bounds(step, row, shared_by) for row in range(len(batch.lengths))]
        differences += _differences_of_sets(step, selector, exact)
    whole = step.slots.kept.clone()
    poison(step.slots.kept)
    chunked = selector.first_rows(min(2, len(batch.lengths)))
    chunked.select(step.query, step.summaries, step.slots)
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
    """Return the bounds of a row over the budget by the definition, [lists, pages - 1]; none of
    another row."""
    batch, length = step.batch, step.batch.lengths[row]
    least, most = reference_rivals.summarize_pages(step.row_keys(row), batch.page)
    found = reference_rivals.page_bounds(step.query[row], least, most)
    shared = reference_rivals.share_scores(found, shared_by, batch.kv_heads)
    competing = triton.cdiv(length, batch.page) - 1 if length > batch.budget else 0
    return shared[:, :competing]
