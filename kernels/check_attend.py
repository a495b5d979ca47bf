"""Judges attention over lists of slots by the reference; what `check.py` is for selection."""

from dataclasses import replace

import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.attend import attend_tokens
from lim_sglang.kernels.check import ATTENTION_TOLERANCE, Batch, Tensors, draw, relative_error
from lim_sglang.kernels.parts import Parts

VALUE_SCALE = 0.5
"""Of a quantised cache; a power of two, so that it changes no error."""


def differing_attention(batch: Batch, device: str) -> list[str]:
    """Rows whose attention over the batch's slots is beyond tolerance, and what else is amiss.

    Rows are taken whole, whatever the budget. Slots that no row reads are NaN.
    """
    tensors = draw(batch, device)
    values = drawn_values(tensors)
    keys, values = (poisoned(cache, tensors) for cache in (tensors.keys, values))
    parts = Parts.allocate(
        num_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        dim=batch.dim,
        cache_dtype=keys.dtype,
        device=device,
    )
    found = []
    # As many programs a row as there are; and one, as where rows are many.
    for name, some in (("shared", parts), ("alone", replace(parts, outputs=parts.outputs[:0]))):
        outputs = [attended(batch, tensors, keys, values, some) for _ in range(2)]
        if not torch.equal(*outputs):
            found.append(f"{name}: the same again gives other bits")
        if parts.arrivals.any():
            found.append(f"{name}: arrivals are left, so the next step would end too early")
            parts.arrivals.zero_()
        found += [f"{name}, {text}" for text in differing_rows(batch, tensors, values, outputs[0])]
    return found


def drawn_values(tensors: Tensors) -> Tensor:
    """V of the same shape and dtype as K."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(tensors.keys.shape, generator=generator)
    return drawn.to(tensors.query.dtype).to(tensors.keys.dtype).to(tensors.keys.device)


def poisoned(cache: Tensor, tensors: Tensors) -> Tensor:
    """A cache [P, G, D] with NaN in all slots that no row reads."""
    unread = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
    unread[tensors.slots.long()] = False
    filled = cache.float().masked_fill(unread[:, None, None], torch.nan)
    return filled.to(cache.dtype)


def attended(batch: Batch, tensors: Tensors, keys: Tensor, values: Tensor, parts: Parts) -> Tensor:
    """[B, H, D] over each row's slots, in memory that was NaN."""
    out = torch.full_like(tensors.query, torch.nan)
    return attend_tokens(
        *(tensors.query, keys, values, tensors.slots, tensors.indptr),
        longest=max(batch.lengths),
        scale=batch.scale,
        value_scale=VALUE_SCALE,
        parts=parts,
        out=out,
    )


def differing_rows(batch: Batch, tensors: Tensors, values: Tensor, found: Tensor) -> list[str]:
    """Rows that are not the reference's."""
    keys, values = tensors.keys.float(), values.float()
    ends = tensors.indptr.tolist()
    wrong = []
    for row, length in enumerate(batch.lengths):
        slots = tensors.slots[ends[row] : ends[row + 1]].long()
        wanted = VALUE_SCALE * reference.attend_tokens(
            tensors.query[row].float(), keys, values, slots, batch.scale
        )
        error = relative_error(found[row], wanted)
        if not error <= ATTENTION_TOLERANCE[batch.dtype]:
            wrong.append(f"row {row} of {length} tokens: attention is off by {error:.1e}")
    return wrong
