"""Judges attention over lists of slots by the reference; what `check.py` is for selection."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lim_sglang.kernels import reference
from lim_sglang.kernels.attend import attend_tokens
from lim_sglang.kernels.check import ATTENTION_TOLERANCE, Batch, draw, relative_error
from lim_sglang.kernels.parts import SplitWorkspace

VALUE_SCALE = 0.5
"""Of a quantised cache; a power of two, so that it changes no error."""


def differing_attention(batch: Batch, device: str) -> list[str]:
    """Rows whose attention over the batch's slots is beyond tolerance, and what else is amiss.

    Rows are taken whole, whatever the budget. Slots that no row reads are NaN, the first among
    them, and no tensor is without gaps.
    """
    step = draw_step(batch, device)
    workspace = SplitWorkspace.allocate(
        num_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        dim=batch.dim,
        cache_dtype=step.keys.dtype,
        device=device,
    )
    found = []
    # As many programs a row as there are; and one, as where rows are many.
    for name, some in (
        ("shared", workspace),
        ("alone", replace(workspace, outputs=workspace.outputs[:0])),
    ):
        outputs = [attended(batch, step, some) for _ in range(2)]
        if not torch.equal(*outputs):
            found.append(f"{name}: the same again gives other bits")
        if workspace.block_counters.any():
            found.append(f"{name}: arrivals are left, so the next step would end too early")
            workspace.block_counters.zero_()
        found += [f"{name}, {text}" for text in differing_rows(batch, step, outputs[0])]
    return found


@dataclass(frozen=True)
class Step:
    """What attention finds on the device; B rows, P slots."""

    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[P, G, D]."""
    values: Tensor
    """[P, G, D]."""
    indptr: Tensor
    """[B + 1] int32."""
    slots: Tensor
    """[indptr[B]] int32, none of them 0."""


def draw_step(batch: Batch, device: str) -> Step:
    """The batch's query, keys and slots, and values beside them."""
    tensors = draw(batch, device)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(tensors.keys.shape, generator=generator).to(batch.dtype)
    unread = torch.ones(len(values), dtype=torch.bool)
    unread[tensors.slots.long().cpu()] = False

    def cache(drawn: Tensor, more_heads: int, more_dims: int) -> Tensor:
        poisoned = drawn.cpu().float().masked_fill(unread[:, None, None], torch.nan)
        return _within(poisoned, (1, 0), more_heads, more_dims).to(tensors.keys.dtype).to(device)

    _, kv_heads, dim = values.shape
    keys = cache(tensors.keys, more_heads=1, more_dims=0)[:, :kv_heads]
    values = cache(values, more_heads=0, more_dims=16)[..., :dim]
    query = _within(tensors.query, (0, 0), 1, 16)[:, : batch.heads, :dim]
    return Step(query, keys, values, tensors.indptr, tensors.slots + 1)


def _within(drawn: Tensor, more_rows: tuple[int, int], more_heads: int, more_dims: int) -> Tensor:
    """A tensor of three dimensions with NaN around it."""
    return functional.pad(drawn, (0, more_dims, 0, more_heads, *more_rows), value=torch.nan)


def attended(batch: Batch, step: Step, workspace: SplitWorkspace) -> Tensor:
    """[B, H, D] over each row's slots, in memory that was NaN."""
    return attend_tokens(
        *(step.query, step.keys, step.values, step.slots, step.indptr),
        longest=max(batch.lengths),
        scale=batch.scale,
        value_scale=VALUE_SCALE,
        workspace=workspace,
        out=torch.full_like(step.query, torch.nan),
    )


def attention_error(
    found: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scale: float,
    value_scale: float = 1.0,
) -> float:
    """Relative RMS of one row's attention [H, D] against the reference's in f32."""
    wanted = reference.attend_tokens(query.float(), keys, values, slots, scale)
    return relative_error(found, value_scale * wanted)


def differing_rows(batch: Batch, step: Step, found: Tensor) -> list[str]:
    """Rows that are not the reference's."""
    keys, values = step.keys.float(), step.values.float()
    ends = step.indptr.tolist()
    wrong = []
    for row, length in enumerate(batch.lengths):
        slots = step.slots[ends[row] : ends[row + 1]].long()
        error = attention_error(
            found[row], step.query[row], keys, values, slots, batch.scale, VALUE_SCALE
        )
        if not error <= ATTENTION_TOLERANCE[batch.dtype]:
            wrong.append(f"row {row} of {length} tokens: attention is off by {error:.1e}")
    return wrong
