"""Bounds on the scores of a page's tokens, from the least and the greatest of its keys (Quest).

Defined by `reference_rivals.summarize_pages`, `page_bounds` and `share_scores`. A page holds
`page` consecutive positions of a request. The KV cache has pages of its own, each a multiple of
these, so a page's tokens lie in consecutive slots, and `slot // page` names the page everywhere:
summaries live in a pool of that index and are a pure function of the keys. A summary is written
when the page's last token is, and read only once the page is complete.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    BOUND_BLOCK,
    BOUND_SPLITS,
    check_int32,
    check_tensors,
    interpreted,
    padded_group,
)
from lim_sglang.kernels.packed import PackedRows, packed_row


@triton.jit
def _summarize_pages(
    keys,  # [P, G, DIM]
    lengths,  # [T] int64
    slots,  # [T] int64
    summaries,  # [P / PAGE, 2, G, DIM]
    key_slot_stride,
    key_head_stride,
    summary_page_stride,
    summary_side_stride,
    summary_head_stride,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    if tl.load(lengths + token) % PAGE != 0:
        return
    page = tl.load(slots + token).to(tl.int64) // PAGE
    members = page * PAGE + tl.arange(0, PAGE)
    dims = tl.arange(0, DIM)
    # [PAGE, DIM]
    k = tl.load(
        keys + members[:, None] * key_slot_stride + kv_head * key_head_stride + dims[None, :]
    ).to(tl.float32)
    summaries += page * summary_page_stride + kv_head * summary_head_stride + dims
    dtype = summaries.dtype.element_ty
    tl.store(summaries, tl.min(k, 0).to(dtype))
    tl.store(summaries + summary_side_stride, tl.max(k, 0).to(dtype))


def summarize_pages(
    keys: Tensor, lengths: Tensor, slots: Tensor, page: int, summaries: Tensor
) -> None:
    """Write the least and the greatest keys of the pages that new tokens complete.

    Args:
        keys: [P, G, D], one layer of the KV cache, the new tokens' keys included.
        lengths: [T] int, tokens of the request up to each new token, the token included.
        slots: [T] int, slot of each new token.
        page: tokens of a page, a power of two.
        summaries: [>= P / page, 2, G, D] in the keys' dtype: least, greatest.
    """
    check_tensors(keys=keys, lengths=lengths, slots=slots, summaries=summaries)
    if summaries.shape[1:] != (2, *keys.shape[1:]) or summaries.dtype != keys.dtype:
        raise ValueError(
            f"summaries must be [pages, 2, {keys.shape[1]}, {keys.shape[2]}] {keys.dtype}, not "
            f"{list(summaries.shape)} {summaries.dtype}"
        )
    if lengths.shape != slots.shape:
        raise ValueError(f"{list(lengths.shape)} lengths, but {list(slots.shape)} slots")
    if not len(lengths):
        return
    _summarize_pages[(len(lengths), keys.shape[1])](
        keys,
        lengths,
        slots,
        summaries,
        keys.stride(0),
        keys.stride(1),
        summaries.stride(0),
        summaries.stride(1),
        summaries.stride(2),
        DIM=keys.shape[2],
        PAGE=page,
        num_warps=2,
    )


@triton.jit(do_not_specialize=["budget", "num_lists"])
def _page_bounds(
    query,  # [B, H, DIM]
    summaries,  # [pages of the cache, 2, G, DIM]
    indptr,  # [B + 1] int32
    slots,  # [indptr[B]] int32
    bounds,  # [B, lists, pages] f32, packed
    budget,
    num_lists,
    query_row_stride,
    query_head_stride,
    summary_page_stride,
    summary_side_stride,
    summary_head_stride,
    GROUP: tl.constexpr,  # query heads per KV head
    PADDED_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,  # of one program
    IS_SHARED: tl.constexpr,  # the program's query heads have one list, else each its own
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first_kv_head = tl.program_id(2).to(tl.int64) * KV_HEADS
    start = tl.load(indptr + row).to(tl.int64)
    length = tl.load(indptr + row + 1).to(tl.int64) - start
    if length <= budget:
        return
    num_pages = tl.cdiv(length, PAGE) - 1  # the newest page is read whatever its bound
    dims = tl.arange(0, DIM)
    members = tl.arange(0, PADDED_GROUP)
    before, pitch = packed_row(indptr, row, PAGE)
    bounds += before * num_lists
    for first in range(split * BLOCK, num_pages, SPLITS * BLOCK):
        pages = first + tl.arange(0, BLOCK)
        inside = pages < num_pages
        slot = tl.load(slots + start + pages * PAGE, mask=inside, other=0).to(tl.int64)
        of_pages = summaries + (slot // PAGE)[:, None] * summary_page_stride + dims[None, :]
        shared = tl.full((BLOCK,), float("-inf"), tl.float32)
        for kv_head in range(first_kv_head, first_kv_head + KV_HEADS):
            heads = kv_head * GROUP + members
            # [PADDED_GROUP, DIM]
            q = tl.load(
                query + row * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
                mask=members[:, None] < GROUP,
                other=0.0,
            )
            of_head = of_pages + kv_head * summary_head_stride
            # [BLOCK, DIM]
            least = tl.load(of_head, mask=inside[:, None], other=0.0).to(q.dtype)
            most = tl.load(of_head + summary_side_stride, mask=inside[:, None], other=0.0)
            most = most.to(q.dtype)
            if UPCAST:
                q, least, most = q.to(tl.float32), least.to(tl.float32), most.to(tl.float32)
            # The larger product is with the greatest key where q is positive, else with the least.
            positive, negative = tl.where(q > 0, q, 0.0), tl.where(q > 0, 0.0, q)
            bound = tl.dot(positive.to(q.dtype), tl.trans(most), input_precision="ieee")
            bound += tl.dot(negative.to(q.dtype), tl.trans(least), input_precision="ieee")
            if IS_SHARED:
                of_group = tl.where(members[:, None] < GROUP, bound, float("-inf"))
                shared = tl.maximum(shared, tl.max(of_group, 0))
            else:
                tl.store(
                    bounds + heads[:, None] * pitch + pages[None, :],
                    bound,
                    mask=(members[:, None] < GROUP) & inside[None, :],
                )
        if IS_SHARED:
            tl.store(bounds + tl.program_id(2) * pitch + pages, shared, mask=inside)


def page_bounds(
    query: Tensor,
    summaries: Tensor,
    indptr: Tensor,
    slots: Tensor,
    budget: int,
    out: PackedRows,
) -> PackedRows:
    """Bound the scores of each page but the newest, in each row that is longer than the budget.

    Args:
        query: [B, H, D] fp16, bf16 or f32.
        summaries: [pages of the cache, 2, G, D], one layer's, from `summarize_pages`.
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32, the slot of each token, oldest first.
        budget: rows within it stay untouched.
        out: of B rows and of the summaries' pages; a list for each query head, or one for each KV
            head's query heads or for all, with the largest of their bounds. Columns from the newest
            page on stay untouched.

    Returns:
        `out`.
    """
    check_tensors(query=query, summaries=summaries, indptr=indptr, slots=slots, out=out.values)
    check_int32(indptr=indptr, slots=slots)
    rows, num_heads, dim = query.shape
    num_kv_heads, num_lists = summaries.shape[2], out.lists
    if num_heads % num_kv_heads or summaries.shape[3] != dim:
        raise ValueError(
            "query heads must be a multiple of KV heads, and the head dimension of both the same, "
            f"not query {tuple(query.shape)} and summaries {tuple(summaries.shape)}"
        )
    if num_lists not in (num_heads, num_kv_heads, 1):
        raise ValueError(f"out must have {num_heads} lists, {num_kv_heads} or one, not {num_lists}")
    kv_heads = num_kv_heads if num_lists == 1 else 1
    _page_bounds[(rows, BOUND_SPLITS, num_kv_heads // kv_heads)](
        query,
        summaries,
        indptr,
        slots,
        out.values,
        budget,
        num_lists,
        query.stride(0),
        query.stride(1),
        summaries.stride(0),
        summaries.stride(1),
        summaries.stride(2),
        GROUP=num_heads // num_kv_heads,
        PADDED_GROUP=padded_group(num_heads, num_kv_heads),
        KV_HEADS=kv_heads,
        IS_SHARED=num_lists < num_heads,
        DIM=dim,
        PAGE=out.page,
        BLOCK=BOUND_BLOCK,
        SPLITS=BOUND_SPLITS,
        # The interpreter computes bf16 products wrongly (Triton 3.6).
        UPCAST=interpreted() and query.dtype == torch.bfloat16,
        num_warps=4,
    )
    return out
