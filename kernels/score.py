"""Raw q·k of every query head with every token of each long row, read from the paged KV cache.

Defined by `reference.score_tokens`, row by row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    NUM_STAGES,
    SCORE_BLOCK,
    SCORE_SPLITS,
    check_int32,
    check_tensors,
    interpreted,
    padded_group,
)


@triton.jit(do_not_specialize=["budget"])
def _score(
    query,  # [B, H, D]
    keys,  # [P, G, D]
    indptr,  # [B + 1] int32
    slots,  # [indptr[B]] int32
    scores,  # [B, H, >= S] f32
    budget,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    score_row_stride,
    score_head_stride,
    GROUP: tl.constexpr,  # query heads a KV head
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = tl.load(indptr + row + 1).to(tl.int64) - start
    if length <= budget:
        return

    dims = tl.arange(0, DIM)
    members = tl.arange(0, PADDED_GROUP)
    heads = kv_head * GROUP + members
    # [PADDED_GROUP, DIM]
    q = tl.load(
        query + row * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
        mask=members[:, None] < GROUP,
        other=0.0,
    )
    for first in range(split * BLOCK, length, SPLITS * BLOCK):
        positions = first + tl.arange(0, BLOCK)
        inside = positions < length
        slot = tl.load(slots + start + positions, mask=inside, other=0).to(tl.int64)
        # [BLOCK, DIM]
        k = tl.load(
            keys + slot[:, None] * key_slot_stride + kv_head * key_head_stride + dims[None, :],
            mask=inside[:, None],
            other=0.0,
        ).to(q.dtype)
        if UPCAST:
            product = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
        tl.store(
            scores + row * score_row_stride + heads[:, None] * score_head_stride + positions,
            product,
            mask=(members[:, None] < GROUP) & inside[None, :],
        )


def score_tokens(
    query: Tensor, keys: Tensor, indptr: Tensor, slots: Tensor, budget: int, out: Tensor
) -> Tensor:
    """Score every token of each row that is longer than the budget; other rows stay untouched.

    Args:
        query: [B, H, D] fp16, bf16 or f32.
        keys: [P, G, D], one layer of the KV cache, in the query's dtype or fp8.
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32, the slot of each token, oldest first.
        budget: tokens that a row may keep.
        out: [B, H, N] f32 with N at least the longest row; columns past a row's length are not
            written.

    Returns:
        `out`.
    """
    check_tensors(query=query, keys=keys, indptr=indptr, slots=slots, out=out)
    check_int32(indptr=indptr, slots=slots)
    rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    if num_heads % num_kv_heads or keys.shape[2] != dim or dim & (dim - 1):
        raise ValueError(
            f"query heads must be a multiple of KV heads and dims one power of two, not "
            f"{tuple(query.shape)} and {tuple(keys.shape)}"
        )
    _score[(rows, SCORE_SPLITS, num_kv_heads)](
        query,
        keys,
        indptr,
        slots,
        out,
        budget,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        out.stride(0),
        out.stride(1),
        GROUP=num_heads // num_kv_heads,
        PADDED_GROUP=padded_group(num_heads, num_kv_heads),
        DIM=dim,
        BLOCK=SCORE_BLOCK,
        SPLITS=SCORE_SPLITS,
        # The interpreter computes bf16 products wrongly (Triton 3.6).
        UPCAST=interpreted() and query.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=NUM_STAGES,
    )
    return out
