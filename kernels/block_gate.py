"""Logits of blocks by a trained gate (SeerAttention-R).

Defined by `reference_rivals.compress_blocks`, `project_query` and `gate_logits`. The gate was
trained on queries and keys before RoPE and the KV cache holds keys after it: both are rotated back
in f32, so that a block's compressed key is a pure function of the keys in the cache and of the
block's position. As in `page_bounds.py`, `slot // block` names a block everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    GATE_BLOCKS,
    GATE_COLUMNS,
    GATE_ROWS,
    GATE_SPLITS,
    check_int32,
    check_tensors,
)
from lim_sglang.kernels.packed import PackedRows, packed_row
from lim_sglang.kernels.reference_rivals import GATE_NORM_EPS, BlockGate


@triton.jit
def _rotate_back(first, second, cos, sin):
    """Undo half-split RoPE; the table may have a factor."""
    square = cos * cos + sin * sin
    return (first * cos + second * sin) / square, (second * cos - first * sin) / square


@triton.jit
def _norm_and_rotate(
    first,
    second,
    norm,
    table,
    halves,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """Normalize a projected vector, given in halves, and rotate it by a row of the table."""
    if HAS_NORM:
        square = tl.sum(first * first, 0) + tl.sum(second * second, 0)
        scale = 1.0 / tl.sqrt(square / (2 * HALF) + EPS)
        first *= scale * tl.load(norm + halves).to(tl.float32)
        second *= scale * tl.load(norm + HALF + halves).to(tl.float32)
    cos, sin = tl.load(table + halves), tl.load(table + HALF + halves)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _compress_blocks(
    keys,  # [P, G, 2 HALF]
    lengths,  # [T] int64
    slots,  # [T] int64
    weight,  # [G, 6 HALF, 2 HALF]
    norm,  # [2 HALF]
    cos_sin,  # [positions, 2 HALF] f32
    compressed,  # [P / BLOCK, G, 2 HALF]
    key_slot_stride,
    key_head_stride,
    block_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + token).to(tl.int64)
    if length % BLOCK != 0:
        return
    block = tl.load(slots + token).to(tl.int64) // BLOCK
    members = tl.arange(0, BLOCK)
    halves = tl.arange(0, HALF)
    start = (length - BLOCK) * (2 * HALF)
    of_block = (
        keys
        + (block * BLOCK + members)[:, None] * key_slot_stride
        + kv_head * key_head_stride
        + halves[None, :]
    )
    table = cos_sin + start + members[:, None] * (2 * HALF) + halves[None, :]
    # [BLOCK, HALF]
    first, second = _rotate_back(
        tl.load(of_block).to(tl.float32),
        tl.load(of_block + HALF).to(tl.float32),
        tl.load(table),
        tl.load(table + HALF),
    )
    weight += kv_head * (6 * HALF * 2 * HALF) + halves[:, None] * (2 * HALF) + halves[None, :]
    low = tl.zeros((HALF,), tl.float32)
    high = tl.zeros((HALF,), tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            pooled_first, pooled_second = tl.max(first, 0), tl.max(second, 0)
        elif part == 1:
            pooled_first, pooled_second = tl.min(first, 0), tl.min(second, 0)
        else:
            pooled_first, pooled_second = tl.sum(first, 0) / BLOCK, tl.sum(second, 0) / BLOCK
        upper = weight + part * (4 * HALF * HALF)
        lower = upper + 2 * HALF * HALF
        low += tl.sum(pooled_first[:, None] * tl.load(upper).to(tl.float32), 0)
        low += tl.sum(pooled_second[:, None] * tl.load(lower).to(tl.float32), 0)
        high += tl.sum(pooled_first[:, None] * tl.load(upper + HALF).to(tl.float32), 0)
        high += tl.sum(pooled_second[:, None] * tl.load(lower + HALF).to(tl.float32), 0)
    low, high = _norm_and_rotate(low, high, norm, cos_sin + start, halves, HALF, HAS_NORM, EPS)
    out = compressed + block * block_stride + kv_head * (2 * HALF) + halves
    dtype = compressed.dtype.element_ty
    tl.store(out, low.to(dtype))
    tl.store(out + HALF, high.to(dtype))


def compress_blocks(
    keys: Tensor,
    lengths: Tensor,
    slots: Tensor,
    gate: BlockGate,
    cos_sin: Tensor,
    compressed: Tensor,
) -> None:
    """Write the compressed keys of the blocks that new tokens complete.

    Args:
        keys: [P, G, D] after RoPE, one layer of the KV cache, the new tokens' keys included.
        lengths: [T] int, tokens of the request up to each new token, the token included.
        slots: [T] int, slot of each new token.
        gate: the layer's, contiguous, on the keys' device.
        cos_sin: [positions, D] f32, as in `reference_rivals.rotate`.
        compressed: [>= P / block, G, D], contiguous in its last two dimensions.
    """
    check_tensors(keys=keys, lengths=lengths, slots=slots, cos_sin=cos_sin, compressed=compressed)
    _check_gate(gate, keys.shape[1], keys.shape[2], cos_sin)
    _check_compressed(compressed, *keys.shape[1:])
    if lengths.shape != slots.shape:
        raise ValueError(f"{list(lengths.shape)} lengths, but {list(slots.shape)} slots")
    if not len(lengths):
        return
    _compress_blocks[(len(lengths), keys.shape[1])](
        keys,
        lengths,
        slots,
        gate.key_weight,
        gate.key_norm,
        cos_sin,
        compressed,
        keys.stride(0),
        keys.stride(1),
        compressed.stride(0),
        HALF=keys.shape[2] // 2,
        BLOCK=gate.block,
        HAS_NORM=gate.key_norm is not None,
        EPS=GATE_NORM_EPS,
        num_warps=8,
    )


@triton.jit
def _project_queries(
    query,  # [B, H, 2 HALF]
    indptr,  # [B + 1] int32
    weight,  # [G, GROUP, 2 HALF, 2 HALF]
    cos_sin,  # [positions, 2 HALF] f32
    projected,  # [B, G, 2 HALF] f32
    num_rows,
    query_row_stride,
    query_head_stride,
    projected_row_stride,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kv_head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < num_rows
    lengths = tl.load(indptr + rows + 1, mask=inside, other=1)
    lengths -= tl.load(indptr + rows, mask=inside, other=0)
    halves = tl.arange(0, HALF)
    table = cos_sin + (lengths - 1).to(tl.int64)[:, None] * (2 * HALF) + halves[None, :]
    cos = tl.load(table, mask=inside[:, None], other=1.0)
    sin = tl.load(table + HALF, mask=inside[:, None], other=0.0)
    of_rows = query + rows.to(tl.int64)[:, None] * query_row_stride + halves[None, :]
    weight += kv_head * (GROUP * 4 * HALF * HALF) + halves[:, None] * (2 * HALF) + columns[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for member in range(GROUP):
        of_head = of_rows + (kv_head * GROUP + member) * query_head_stride
        # [ROWS, HALF]
        first = tl.load(of_head, mask=inside[:, None], other=0.0).to(tl.float32)
        second = tl.load(of_head + HALF, mask=inside[:, None], other=0.0).to(tl.float32)
        first, second = _rotate_back(first, second, cos, sin)
        of_weight = weight + member * (4 * HALF * HALF)
        upper = tl.load(of_weight).to(tl.float32)
        lower = tl.load(of_weight + 2 * HALF * HALF).to(tl.float32)
        total += tl.dot(first, upper, input_precision="ieee")
        total += tl.dot(second, lower, input_precision="ieee")
    out = projected + rows.to(tl.int64)[:, None] * projected_row_stride
    tl.store(out + kv_head * (2 * HALF) + columns[None, :], total, mask=inside[:, None])


@triton.jit(do_not_specialize=["budget"])
def _gate_logits(
    projected,  # [B, G, 2 HALF] f32
    compressed,  # [blocks of the cache, G, 2 HALF]
    indptr,  # [B + 1] int32
    slots,  # [indptr[B]] int32
    norm,  # [2 HALF]
    cos_sin,  # [positions, 2 HALF] f32
    logits,  # [B, G, blocks] f32, packed
    budget,
    projected_row_stride,
    block_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = tl.load(indptr + row + 1).to(tl.int64) - start
    if length <= budget:
        return
    num_blocks = tl.cdiv(length, BLOCK) - 1  # the newest block is read whatever its logit
    if split * TILE >= num_blocks:
        return
    halves = tl.arange(0, HALF)
    of_row = projected + row * projected_row_stride + kv_head * (2 * HALF) + halves
    table = cos_sin + (length - 1) * (2 * HALF)
    first, second = _norm_and_rotate(
        tl.load(of_row), tl.load(of_row + HALF), norm, table, halves, HALF, HAS_NORM, EPS
    )
    scale = 1.0 / tl.sqrt(2.0 * HALF)
    before, pitch = packed_row(indptr, row, BLOCK)
    logits += before * tl.num_programs(2) + kv_head * pitch
    compressed += kv_head * (2 * HALF) + halves[None, :]
    for begin in range(split * TILE, num_blocks, SPLITS * TILE):
        blocks = begin + tl.arange(0, TILE)
        inside = blocks < num_blocks
        slot = tl.load(slots + start + blocks * BLOCK, mask=inside, other=0).to(tl.int64)
        of_blocks = compressed + (slot // BLOCK)[:, None] * block_stride
        # [TILE, HALF]
        low = tl.load(of_blocks, mask=inside[:, None], other=0.0).to(tl.float32)
        high = tl.load(of_blocks + HALF, mask=inside[:, None], other=0.0).to(tl.float32)
        logit = tl.sum(low * first[None, :] + high * second[None, :], 1) * scale
        tl.store(logits + blocks, logit, mask=inside)


def gate_logits(
    query: Tensor,
    compressed: Tensor,
    indptr: Tensor,
    slots: Tensor,
    budget: int,
    gate: BlockGate,
    cos_sin: Tensor,
    projected: Tensor,
    out: PackedRows,
) -> PackedRows:
    """Compute the logit of each block but the newest, in each row that is longer than the budget.

    Args:
        query: [B, H, D] after RoPE, fp16, bf16 or f32.
        compressed: [blocks of the cache, G, D], one layer's, from `compress_blocks`.
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32, the slot of each token, oldest first.
        budget: rows within it stay untouched.
        gate: the layer's, contiguous, on the queries' device.
        cos_sin: [positions, D] f32, as in `reference_rivals.rotate`.
        projected: [>= B, G, D] f32, memory for the projected queries.
        out: of B rows, G lists and the gate's blocks. Columns from the newest block on stay
            untouched.

    Returns:
        `out`.
    """
    check_tensors(
        query=query,
        compressed=compressed,
        indptr=indptr,
        slots=slots,
        cos_sin=cos_sin,
        projected=projected,
        out=out.values,
    )
    check_int32(indptr=indptr, slots=slots)
    rows, num_heads, dim = query.shape
    num_kv_heads = compressed.shape[1]
    _check_gate(gate, num_kv_heads, dim, cos_sin)
    _check_compressed(compressed, num_kv_heads, dim)
    group = gate.query_weight.shape[1]
    if num_heads != num_kv_heads * group or out.lists != num_kv_heads:
        raise ValueError(
            f"the gate has {num_kv_heads} KV heads of {group} query heads, but the query has "
            f"{num_heads} heads and out {out.lists} lists"
        )
    half = dim // 2
    _project_queries[(triton.cdiv(rows, GATE_ROWS), num_kv_heads, dim // GATE_COLUMNS)](
        query,
        indptr,
        gate.query_weight,
        cos_sin,
        projected,
        rows,
        query.stride(0),
        query.stride(1),
        projected.stride(0),
        GROUP=group,
        HALF=half,
        ROWS=GATE_ROWS,
        COLUMNS=GATE_COLUMNS,
        num_warps=4,
    )
    _gate_logits[(rows, GATE_SPLITS, num_kv_heads)](
        projected,
        compressed,
        indptr,
        slots,
        gate.query_norm,
        cos_sin,
        out.values,
        budget,
        projected.stride(0),
        compressed.stride(0),
        HALF=half,
        BLOCK=gate.block,
        TILE=GATE_BLOCKS,
        SPLITS=GATE_SPLITS,
        HAS_NORM=gate.query_norm is not None,
        EPS=GATE_NORM_EPS,
        num_warps=4,
    )
    return out


def _check_compressed(compressed: Tensor, kv_heads: int, dim: int) -> None:
    if compressed.shape[1:] != (kv_heads, dim) or compressed.stride()[1:] != (dim, 1):
        raise ValueError(
            f"compressed must be [blocks, {kv_heads}, {dim}] without gaps in a block, not "
            f"{list(compressed.shape)} with strides {compressed.stride()}"
        )


def _check_gate(gate: BlockGate, kv_heads: int, dim: int, cos_sin: Tensor) -> None:
    found = (*gate.query_weight.shape[:1], gate.query_weight.shape[2])
    if found != (kv_heads, dim):
        raise ValueError(
            f"the gate is of {found[0]} KV heads of {found[1]} dimensions, the cache of "
            f"{kv_heads} of {dim}"
        )
    if dim % GATE_COLUMNS:
        raise ValueError(f"head dimensions must be multiples of {GATE_COLUMNS}, not {dim}")
    if cos_sin.dtype != torch.float32 or cos_sin.shape[1] != dim or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be [positions, {dim}] f32 without gaps")
    named = (gate.query_weight, gate.key_weight, gate.query_norm, gate.key_norm)
    weights = [each for each in named if each is not None]
    if not all(each.is_contiguous() and each.device == cos_sin.device for each in weights):
        raise ValueError("the gate's weights must be contiguous and on the device of cos_sin")
