"""Run attention on a random batch and compare it with the reference.

As `verify.py`, whose batches these are; sparse attention over one list of all heads, and over lists
of their own; dense attention of runs of several tokens; the kernels of a layer beside attention.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lim_sglang.kernels import reference
from lim_sglang.kernels.decode_layer import (
    MAX_SKINNY_ROWS,
    HeadNorms,
    most_rows,
    norm_rotate_store,
    skinny_linear,
)
from lim_sglang.kernels.run_attention import RunWorkspace, attend_runs
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens
from lim_sglang.kernels.verify import POISON, Batch, poison, random_step, relative_error

ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative RMS of one layer's attention, by its dtype."""
VALUE_SCALE = 0.5
"""Value scale of a quantised cache; a power of two, so that it changes no relative error."""
FEW_PROGRAMS = 3
"""Programs that share all runs once more, each with several requests or parts of them."""


@dataclass(frozen=True)
class AttentionInputs:
    """Random tensors for attention over B rows of P slots; none of them is without gaps."""

    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[P, G, D], NaN in slots that no row reads, slot 0 among them."""
    values: Tensor
    """[P, G, D], the same."""
    indptr: Tensor
    """[B + 1] int32."""
    slots: Tensor
    """[indptr[B]] int32, or [lists, indptr[B]]."""


def random_attention_inputs(batch: Batch, device: str) -> AttentionInputs:
    """Generate values beside a batch's query and keys, and put NaN around all of them."""
    step = random_step(batch, device)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(step.keys.shape, generator=generator).to(batch.dtype)
    is_unread = torch.ones(len(values), dtype=torch.bool)
    is_unread[step.slots.slots.long().cpu()] = False

    def cache(tensor: Tensor, more_heads: int, more_dims: int) -> Tensor:
        poisoned = tensor.cpu().float().masked_fill(is_unread[:, None, None], torch.nan)
        padded = _pad_with_nan(poisoned, (1, 0), more_heads, more_dims)
        return padded.to(step.keys.dtype).to(device)

    keys = cache(step.keys, more_heads=1, more_dims=0)[:, : batch.kv_heads]
    values = cache(values, more_heads=0, more_dims=16)[..., : batch.dim]
    query = _pad_with_nan(step.query, (0, 0), 1, 16)[:, : batch.heads, : batch.dim]
    return AttentionInputs(query, keys, values, step.slots.indptr, step.slots.slots + 1)


def _pad_with_nan(
    tensor: Tensor, more_rows: tuple[int, int], more_heads: int, more_dims: int
) -> Tensor:
    return functional.pad(tensor, (0, more_dims, 0, more_heads, *more_rows), value=torch.nan)


def random_lists(inputs: AttentionInputs, num_lists: int) -> Tensor:
    """Draw from each row's slots, with repetition, as many as the row has: [lists, indptr[B]]."""
    generator = torch.Generator().manual_seed(2)
    starts, lengths = inputs.indptr[:-1].cpu(), inputs.indptr.diff().cpu()
    drawn = torch.rand(num_lists, int(inputs.indptr[-1]), generator=generator)
    offsets = (drawn * lengths.repeat_interleave(lengths)).long()
    return inputs.slots[(starts.repeat_interleave(lengths) + offsets).to(inputs.slots.device)]


def attention_differences(batch: Batch, device: str) -> list[str]:
    """Compare `attend_tokens` over all tokens of each row, with rows split and not split."""
    inputs = random_attention_inputs(batch, device)
    return _attention_differences(batch, inputs, batch.kv_heads)


def list_attention_differences(batch: Batch, device: str) -> list[str]:
    """Compare `attend_tokens` where each KV head or each query head has a list of its own."""
    inputs = random_attention_inputs(batch, device)
    return [
        f"{lists} lists: {difference}"
        for lists in sorted({batch.kv_heads, batch.heads})
        for difference in _attention_differences(
            batch, replace(inputs, slots=random_lists(inputs, lists)), lists
        )
    ]


def _attention_differences(batch: Batch, inputs: AttentionInputs, num_units: int) -> list[str]:
    device = inputs.query.device
    keys, values, ends = inputs.keys.float(), inputs.values.float(), inputs.indptr.tolist()
    workspace = SplitWorkspace.allocate(
        num_heads=batch.heads,
        num_units=num_units,
        dim=batch.dim,
        cache_dtype=inputs.keys.dtype,
        device=device,
    )
    no_room = replace(workspace, outputs=workspace.outputs[:0])  # as where rows are many
    differences = []
    for name, given in (("split rows", workspace), ("rows not split", no_room)):
        found, again = (
            attend_tokens(
                inputs.query,
                inputs.keys,
                inputs.values,
                inputs.slots,
                inputs.indptr[:-1],
                inputs.indptr[1:],
                longest=max(batch.lengths),
                scale=batch.scale,
                value_scale=VALUE_SCALE,
                workspace=given,
                out=poison(torch.empty_like(inputs.query)),
            )
            for _ in range(2)
        )
        if not torch.equal(found, again):
            differences.append(f"{name}: a second run gives other bits")
        if workspace.block_counters.any():
            differences.append(f"{name}: block counters are not reset")
            workspace.block_counters.zero_()
        for row, length in enumerate(batch.lengths):
            slots = inputs.slots[..., ends[row] : ends[row + 1]].long()
            error = attention_error(
                found[row], inputs.query[row], keys, values, slots, batch.scale, VALUE_SCALE
            )
            if not error <= ATTENTION_TOLERANCE[batch.dtype]:
                differences.append(
                    f"{name}: attention of row {row} of {length} tokens is off by {error:.1e}"
                )
    return differences


def run_attention_differences(
    batch: Batch, device: str, width: int, soft_cap: float = 0.0
) -> list[str]:
    """Compare `attend_runs`, of the last `width` tokens of each request, with the reference.

    Its tokens are shared by as many programs as the GPU runs at a time, and by few.
    """
    inputs = random_attention_inputs(batch, device)
    generator = torch.Generator().manual_seed(3)
    rows = len(batch.lengths) * width
    query = torch.randn(rows, batch.heads, batch.dim, generator=generator).to(batch.dtype)
    query = _pad_with_nan(query.to(device), (0, 0), 1, 16)[:, : batch.heads, : batch.dim]
    expected = reference.attend_runs(
        query.float(),
        inputs.keys.float(),
        inputs.values.float(),
        inputs.slots,
        inputs.indptr,
        width=width,
        scale=batch.scale,
        soft_cap=soft_cap,
    )
    expected = VALUE_SCALE * expected.view(-1, width, batch.heads, batch.dim)
    workspace = RunWorkspace.allocate(
        num_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        dim=batch.dim,
        max_width=width,
        device=device,
    )
    differences = []
    for name, given in (
        ("many programs", workspace),
        ("few programs", workspace.first_programs(FEW_PROGRAMS)),
    ):
        poison(workspace.outputs), poison(workspace.lse)
        found, again = (
            attend_runs(
                query,
                inputs.keys,
                inputs.values,
                inputs.slots,
                inputs.indptr,
                width=width,
                scale=batch.scale,
                soft_cap=soft_cap,
                value_scale=VALUE_SCALE,
                workspace=given,
                out=poison(torch.empty_like(query)),
            ).view(expected.shape)
            for _ in range(2)
        )
        if not torch.equal(found, again):
            differences.append(f"{name}: a second run gives other bits")
        for request, length in enumerate(batch.lengths):
            error = relative_error(found[request], expected[request])
            if not error <= ATTENTION_TOLERANCE[batch.dtype]:
                differences.append(
                    f"{name}: attention of request {request} of {length} tokens is off by "
                    f"{error:.1e}"
                )
    return differences


def attention_error(
    found: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scale: float,
    value_scale: float = 1.0,
) -> float:
    """Return the relative RMS of one row's attention [H, D] against the reference in f32.

    Args:
        found: [H, D].
        query: [H, D].
        keys, values: [P, G, D] f32.
        slots: [n] int64, or [lists, n].
        scale: factor on q·k before the softmax.
        value_scale: factor on the result.
    """
    lists = torch.atleast_2d(slots)
    expected = reference.attend_lists(query.float(), keys, values, lists, scale)
    return relative_error(found, value_scale * expected)


def linear_differences(features: int, depth: int, dtype: torch.dtype, device: str) -> list[str]:
    """Compare `skinny_linear`, with and without a bias, with the reference.

    Args:
        features, depth: of the weight matrix.
        dtype: of all inputs.
    """
    generator = torch.Generator().manual_seed(features + depth)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    weight, differences = normal(features, depth), []
    for num_rows in (1, 5, 16, 17, MAX_SKINNY_ROWS):
        # Rows that follow the last are NaN: nothing may be read of them.
        rows = functional.pad(normal(num_rows, depth), (0, 0, 0, 1), value=torch.nan)[:num_rows]
        for bias in (None, normal(features)):
            found = skinny_linear(rows, weight, bias)
            error = relative_error(found, reference.linear(rows, weight, bias))
            if not error <= ATTENTION_TOLERANCE[dtype]:
                differences.append(
                    f"{num_rows} rows times {features} x {depth}, "
                    f"{'no ' * (bias is None)}bias: off by {error:.1e}"
                )
    return differences


def norm_and_rope_differences(
    rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> list[str]:
    """Compare `norm_rotate_store`, with and without norms, with the reference, and look for stores
    elsewhere."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total, num_slots = heads + 2 * kv_heads, 2 * rows + 1
    qkv = normal(rows, total * dim).to(dtype).to(device)
    weights = (1 + normal(2, dim) / 4).to(dtype).to(device)
    angles = normal(40, dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(device)
    positions = torch.randint(0, len(cos_sin), (rows,), generator=generator).to(device)
    slots = (torch.randperm(num_slots - 1, generator=generator)[:rows] + 1).to(device)
    query, key, value = qkv.view(rows, total, dim).split([heads, kv_heads, kv_heads], 1)
    differences = []
    for norms in (HeadNorms(weights[0], weights[1], epsilon=1e-6), None):
        keys, values = (
            torch.full((num_slots, kv_heads, dim), POISON, dtype=dtype, device=device)
            for _ in range(2)
        )
        wanted_keys, wanted_values = keys.float(), values.float()
        wanted, wanted_keys[slots] = (
            reference.norm_and_rotate(each, weight if norms else None, 1e-6, cos_sin[positions])
            for each, weight in zip((query, key), weights, strict=True)
        )
        wanted_values[slots] = value.float()
        found = norm_rotate_store(qkv, norms, cos_sin, positions, slots, keys, values)
        differences += [
            f"{name} of {rows} rows of {heads} and {kv_heads} heads of {dim}, "
            f"{'no ' * (norms is None)}norms, are off by {error:.1e}"
            for name, error in (
                ("queries", relative_error(found, wanted.view(found.shape))),
                ("keys", relative_error(keys, wanted_keys)),
                ("values", relative_error(values, wanted_values)),
            )
            if not error <= ATTENTION_TOLERANCE[dtype]
        ]
    return differences


def decode_layer_differences(batch: Batch, device: str) -> list[str]:
    """Compare the kernels of a decode layer with the reference: the projection to q, k and v, if it
    suits, and what follows it."""
    heads = (len(batch.lengths), batch.heads, batch.kv_heads, batch.dim)
    found = norm_and_rope_differences(*heads, batch.dtype, device)
    shape = (batch.heads + 2 * batch.kv_heads) * batch.dim, batch.heads * batch.dim
    if most_rows(torch.empty(shape, dtype=batch.dtype, device="meta")):
        found += linear_differences(*shape, batch.dtype, device)
    return found
