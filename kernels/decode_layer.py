"""Kernels of a decode step's layer beside attention: few rows times a weight matrix; and norm, RoPE
and store of q, k and v.

Defined by `reference.linear` and `reference.norm_and_rotate`.

**Skinny GEMM**: a program multiplies up to 32 rows by a tile of output features over the whole
depth, so that no sums are left to add: nearly as fast as a copy of the weights. Programmatic
dependent launch: the programs start while the kernel before still runs, and allow the next kernel's
at once.

**Norm, RoPE and store**: a program takes a head of a row. Each step is rounded as by the kernels of
SGLang that this one replaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    MIN_DOT_ROWS,
    interpreted,
    pdl_launch_next,
    pdl_options,
    pdl_wait,
)

MEASURED_CAPABILITY = (9, 0)
"""Compute capability of the GPUs on which these kernels were measured."""


@dataclass(frozen=True)
class GemmTile:
    """Tile of a weight matrix that one program of the skinny GEMM reads at a time."""

    depth: int
    """Input features."""
    stages: int
    """Tiles in flight."""


SKINNY_TILES: Mapping[int, tuple[GemmTile, GemmTile]] = {
    MIN_DOT_ROWS: (GemmTile(128, stages=6), GemmTile(128, stages=4)),
    2 * MIN_DOT_ROWS: (GemmTile(128, stages=5), GemmTile(64, stages=6)),
}
"""Tiles by the rows that a program multiplies: where each program has an SM to itself, and where
there are more programs than SMs, so that they share SMs."""
MAX_SKINNY_ROWS = max(SKINNY_TILES)
SKINNY_FEATURES = 64
"""Output features of a program."""
SKINNY_WARPS = 4
MIN_FEATURES = 512
"""Fewest output features: fewer were not measured, and make few programs."""
DEEP = 4096
"""Input features of a weight matrix above which cuBLAS, which also splits the depth, is faster for
matrices of fewer output features, and for more than 16 rows."""


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    rows,
    weight,
    bias,
    out,
    num_rows,
    output_features,
    input_features,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
    UPCAST: tl.constexpr,  # products in f32, for the interpreter
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.arange(0, ROWS)[None, :]
    inner = tl.arange(0, DEPTH)
    weights = weight + feature[:, None].to(tl.int64) * input_features + inner[None, :]
    inputs = rows + row * input_features + inner[:, None]
    total = tl.zeros([FEATURES, ROWS], tl.float32)
    for first in tl.range(0, input_features, DEPTH, num_stages=STAGES):
        tile = tl.load(weights + first, eviction_policy="evict_first")
        values = tl.load(inputs + first, mask=row < num_rows, other=0.0)
        if UPCAST:
            tile, values = tile.to(tl.float32), values.to(tl.float32)
        total = tl.dot(tile, values, total)
    if HAS_BIAS:
        total += tl.load(bias + feature)[:, None]
    tl.store(out + row * output_features + feature[:, None], total, mask=row < num_rows)


def skinny_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by a weight matrix; the other rows of a batch change no bit of a row's result.

    Args:
        rows: [B, depth], B up to `most_rows` of the weights, contiguous.
        weight: [features, depth] of the same dtype.
        bias: [features].

    Returns:
        `rows @ weight.T + bias`, [B, features], summed in f32 and rounded once.
    """
    (num_rows, depth), features = rows.shape, len(weight)
    out = rows.new_empty(num_rows, features)
    num_programs = features // SKINNY_FEATURES
    padded_rows = next(most for most in SKINNY_TILES if num_rows <= most)
    tile = SKINNY_TILES[padded_rows][num_programs > _num_sms()]
    _multiply[(num_programs,)](
        rows,
        weight,
        bias,
        out,
        num_rows,
        features,
        depth,
        HAS_BIAS=bias is not None,
        ROWS=padded_rows,
        FEATURES=SKINNY_FEATURES,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        UPCAST=interpreted(),
        num_warps=SKINNY_WARPS,
        **pdl_options(),
    )
    return out


@cache
def _num_sms() -> int:
    return 1 if interpreted() else torch.cuda.get_device_properties().multi_processor_count


def most_rows(weight: Tensor) -> int:
    """Return the most rows that the kernel multiplies by a matrix, [features, depth], faster than
    cuBLAS does; 0 for a matrix that it does not serve.

    Measured: `docs/log/2026-12-01-layer-kernels.md`.
    """
    features, depth = weight.shape
    if (
        weight.dtype not in (torch.bfloat16, torch.float16)
        or not weight.is_contiguous()
        or features < MIN_FEATURES
        or features % SKINNY_FEATURES
        or any(depth % tile.depth for tiles in SKINNY_TILES.values() for tile in tiles)
    ):
        return 0
    if depth <= DEEP:
        return MAX_SKINNY_ROWS
    return min(SKINNY_TILES) if features >= DEEP else 0


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of the heads of q and k."""

    query: Tensor
    """[D], weights of q's heads."""
    key: Tensor
    """[D], of k's."""
    epsilon: float


@triton.jit
def _norm_rotate_store(
    qkv,
    query,
    query_weight,
    key_weight,
    epsilon,
    cos_sin,
    positions,
    slots,
    keys,
    values,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIM
    slot = tl.load(slots + row).to(tl.int64)
    if head < HEADS + KV_HEADS:
        half = tl.arange(0, DIM // 2)
        low = tl.load(source + half).to(tl.float32)
        high = tl.load(source + DIM // 2 + half).to(tl.float32)
        target = query + (row * HEADS + head) * DIM
        if head >= HEADS:
            target = keys + (slot * KV_HEADS + head - HEADS) * DIM
        if HAS_NORMS:
            weight = query_weight
            if head >= HEADS:
                weight = key_weight
            scale = tl.rsqrt((tl.sum(low * low) + tl.sum(high * high)) / DIM + epsilon)
            low *= scale * tl.load(weight + half).to(tl.float32)
            high *= scale * tl.load(weight + DIM // 2 + half).to(tl.float32)
            low = low.to(qkv.dtype.element_ty).to(tl.float32)
            high = high.to(qkv.dtype.element_ty).to(tl.float32)
        angles = cos_sin + tl.load(positions + row).to(tl.int64) * DIM
        cosine = tl.load(angles + half).to(tl.float32)
        sine = tl.load(angles + DIM // 2 + half).to(tl.float32)
        tl.store(target + half, low * cosine - high * sine)
        tl.store(target + DIM // 2 + half, high * cosine + low * sine)
    else:
        dim = tl.arange(0, DIM)
        target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM
        tl.store(target + dim, tl.load(source + dim))


def norm_rotate_store(
    qkv: Tensor,
    norms: HeadNorms | None,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm q and k of new tokens, if the model does, rotate them, and store k and v.

    Args:
        qkv: [B, (H + 2 G) * D], heads of q, k and v of each token, D a power of two.
        norms: of the heads; None: the model has none.
        cos_sin: [positions, D], half-split RoPE: cosines, then sines.
        positions: [B] int.
        slots: [B] int, of the new tokens.
        keys, values: [P, G, D], the KV cache, of the dtype of qkv; written.

    Returns:
        q, [B, H * D].
    """
    num_rows, width = qkv.shape
    _, kv_heads, dim = keys.shape
    heads = width // dim - 2 * kv_heads
    query = qkv.new_empty(num_rows, heads * dim)
    _norm_rotate_store[(num_rows, heads + 2 * kv_heads)](
        qkv,
        query,
        norms and norms.query,
        norms and norms.key,
        norms.epsilon if norms else 0.0,
        cos_sin,
        positions,
        slots,
        keys,
        values,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HAS_NORMS=norms is not None,
        num_warps=1,
        **pdl_options(),
    )
    return query
