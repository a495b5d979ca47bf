"""Runs the kernels that order tokens by mass on a random batch and judges them by the reference.

Also how much mass the paper's ranking loses when the kernels compute it.
"""

import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.check import (
    POISON,
    Batch,
    Tensors,
    draw,
    kept_of,
    poisoned_slots,
    relative_error,
    row_slots,
)
from lim_sglang.kernels.mass_selector import MassSelector
from lim_sglang.kernels.pool import log_sum_exp, softmax_mass
from lim_sglang.kernels.selector import RankSelector

MASS_TOLERANCE = 2e-5
"""Relative RMS of a row's masses: exponentials and sums in f32."""


def prepared_selector(batch: Batch, tensors: Tensors, device: str, max_rows: int) -> MassSelector:
    """A selector whose memory is poisoned."""
    selector = MassSelector.allocate(
        batch.budget_split,
        max_rows=max_rows,
        num_heads=batch.heads,
        context=tensors.scores.shape[2],
        device=device,
    )
    for tensor in (selector.scores, selector.normalisers, selector.mass):
        tensor.fill_(torch.nan)
    selector.candidates.fill_(POISON)
    return selector


def differing_masses(batch: Batch, device: str) -> list[str]:
    """Rows whose normalisers or masses are beyond tolerance; places written that should not be."""
    tensors = draw(batch, device)
    selector = prepared_selector(batch, tensors, device, len(batch.lengths))
    selector.scores[..., : tensors.scores.shape[2]].copy_(tensors.scores)
    step = (batch.budget_split.budget, batch.scale)
    log_sum_exp(selector.scores, tensors.indptr, *step, selector.normalisers)
    softmax_mass(selector.scores, tensors.indptr, selector.normalisers, *step, selector.mass)
    found = []
    for row, length in enumerate(batch.lengths):
        written = length if row in batch.sparse else 0
        if not selector.mass[row, written:].isnan().all():
            found.append(f"row {row}: masses written past its {written}")
        if written:
            scores = tensors.scores[row, :, :length]
            lse = reference.log_sum_exp(scores, batch.scale)
            if not torch.allclose(selector.normalisers[row], lse, rtol=1e-5, atol=1e-5):
                found.append(f"row {row}: other normalisers")
            wanted = reference.softmax_mass(scores, batch.scale)
            error = relative_error(selector.mass[row, :length], wanted)
            if not error <= MASS_TOLERANCE:
                found.append(f"row {row}: masses are off by {error:.2e}")
    return found


def differing_heaviest(batch: Batch, device: str) -> list[str]:
    """Rows whose kept slots are not exactly the reference's, given equal masses."""
    tensors = draw(batch, device)
    selector = prepared_selector(batch, tensors, device, len(batch.lengths))
    masses = tensors.scores[:, 0]  # any numbers will do
    selector.mass[:, : masses.shape[1]].copy_(masses)
    kept = poisoned_slots(tensors)
    selector.write(tensors.indptr, tensors.slots, tensors.kept_indptr, kept)
    return differing_rows(batch, tensors, masses, kept)


def differing_pipeline(batch: Batch, device: str, max_rows: int) -> list[str]:
    """From query and cache to slots, in chunks: rows that are not what the masses give."""
    tensors = draw(batch, device)
    rows = len(batch.lengths)
    whole, chunked = (prepared_selector(batch, tensors, device, n) for n in (rows, max_rows))
    kept = []
    for selector in (whole, chunked):
        kept.append(poisoned_slots(tensors))
        selector.keep_slots(
            *(tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr),
            kept[-1],
            scale=batch.scale,
        )
    if not torch.equal(*kept):
        return [f"chunks of {max_rows} rows keep other slots"]
    return differing_rows(batch, tensors, whole.mass, kept[0])


def differing_rows(batch: Batch, tensors: Tensors, masses: Tensor, kept: Tensor) -> list[str]:
    """Rows whose kept slots are not the reference's for these masses, in order of position."""
    found = [] if (kept[-5:] == POISON).all() else ["slots written past the last row"]
    for row, length in enumerate(batch.lengths):
        wanted = reference.topk_by_mass(masses[row, :length], batch.budget_split)
        if not torch.equal(kept_of(tensors, kept, row), row_slots(tensors, row)[wanted]):
            found.append(f"row {row} of {length} tokens keeps another set by mass")
    return found


def mass_differences(batch: Batch, device: str) -> list[str]:
    """All of the above."""
    masses = [] if batch.odd else differing_masses(batch, device)
    return masses + differing_heaviest(batch, device) + differing_pipeline(batch, device, 2)


def lost_mass(batch: Batch, device: str) -> float:
    """Attention mass that the pipeline's sets lose against the reference's own, at most.

    The reference scores in f32 from the same query and cache; mass is a head's softmax over all
    tokens, scaled by 1 / sqrt(D), summed over the kept ones.
    """
    tensors = draw(batch, device)
    selector = RankSelector.allocate(
        batch.budget_split,
        max_rows=len(batch.lengths),
        num_heads=batch.heads,
        context=max(batch.lengths),
        device=device,
    )
    kept = torch.full_like(tensors.slots, POISON)
    selector.keep_slots(
        *(tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr, kept),
        scale=batch.scale,
    )
    lost = 0.0
    for row in batch.sparse:
        slots = row_slots(tensors, row)
        scores = reference.score_tokens(tensors.query[row], tensors.keys[slots].to(batch.dtype))
        mass = (scores * batch.scale).softmax(-1)
        ours = torch.isin(slots, kept_of(tensors, kept, row))
        wanted = reference.keep_tokens(scores, batch.budget_split)
        lost = max(lost, float((mass[:, wanted].sum(-1) - mass[:, ours].sum(-1)).abs().max()))
    return lost
