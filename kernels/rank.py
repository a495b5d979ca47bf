"""Each head's best tokens, best first: radix selection of the k best, then a sort of those.

Defined by `reference.rank_tokens`: equal scores put the older token first, -0.0 ties with +0.0,
NaN ranks last.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    MAX_SORT,
    RANK_BLOCK,
    check_last_dim_dense,
    check_same_device,
    rank_warps,
)

_SIGN: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def _sortable(scores):
    """Map floats to unsigned integers of the same order; NaN below -inf."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, _SIGN, ordered)
    return (ordered ^ _SIGN).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "num_ranks"])
def _rank(
    scores,  # [B, H, >= S] f32
    indptr,  # [B + 1] int32
    ranking,  # [B, H, K] int32, best first
    budget,
    sinks,
    recent,
    num_ranks,  # K
    score_row_stride,
    score_head_stride,
    ranking_row_stride,
    ranking_head_stride,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    scores += row * score_row_stride + head * score_head_stride
    ranking += row * ranking_row_stride + head * ranking_head_stride
    end = length - recent
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)

    # The K-th best key, 8 bits at a time: `threshold` is its prefix, `wanted` how many with this
    # prefix are still to take.
    threshold = tl.full((), 0, tl.uint32)
    wanted = num_ranks
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros((256,), tl.int32)
        for first in range(sinks, end, BLOCK):
            inside = first + lanes < end
            keys = _sortable(tl.load(scores + first + lanes, mask=inside, other=0.0))
            if shift < 24:
                inside &= (keys >> (shift + 8)) == (threshold >> (shift + 8))
            counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=inside)
        at_least = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > chosen, counts, 0), 0)
        threshold |= chosen.to(tl.uint32) << shift

    # Everything above the threshold, and the oldest `wanted` that equal it, in order of position.
    taken = 0
    ties = 0
    for first in range(sinks, end, BLOCK):
        positions = first + lanes
        inside = positions < end
        keys = _sortable(tl.load(scores + positions, mask=inside, other=0.0))
        equal = (inside & (keys == threshold)).to(tl.int32)
        take = inside & (
            (keys > threshold) | ((equal > 0) & (ties + tl.cumsum(equal, 0) <= wanted))
        )
        place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(ranking + place, positions, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        ties += tl.sum(equal, 0)
    tl.debug_barrier()  # the sort below reads what other threads of this program wrote

    # Best first; among equals the lower position, which its complement makes the larger key.
    lanes = tl.arange(0, PADDED_K)
    inside = lanes < num_ranks
    positions = tl.load(ranking + lanes, mask=inside, other=0)
    keys = _sortable(tl.load(scores + positions, mask=inside, other=0.0))
    packed = (keys.to(tl.uint64) << 32) | (0xFFFFFFFF - positions.to(tl.uint64))
    packed = tl.sort(tl.where(inside, packed, 0), descending=True)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    best = 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    tl.store(ranking + lanes, best.to(tl.int32), mask=inside)


def rank_tokens(
    scores: Tensor,
    indptr: Tensor,
    *,
    budget: int,
    sinks: int,
    recent: int,
    out: Tensor,
) -> Tensor:
    """Rank the best candidates of every head in each row that is longer than the budget.

    Args:
        scores: [B, H, N] f32, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        budget: rows within it stay untouched.
        sinks, recent: tokens at either end that are no candidates.
        out: [B, H, K] int32; K tokens are ranked, at most as many as a long row has candidates.

    Returns:
        `out`: positions, best first.
    """
    check_same_device(scores=scores, indptr=indptr, out=out)
    check_last_dim_dense(scores=scores, out=out)
    rows, heads, k = out.shape
    if k > MAX_SORT:
        raise ValueError(f"at most {MAX_SORT} tokens a head can be ranked, not {k}")
    if k:
        padded = max(16, triton.next_power_of_2(k))
        _rank[(rows, heads)](
            scores,
            indptr,
            out,
            budget,
            sinks,
            recent,
            k,
            scores.stride(0),
            scores.stride(1),
            out.stride(0),
            out.stride(1),
            PADDED_K=padded,
            BLOCK=RANK_BLOCK,
            num_warps=rank_warps(padded),
        )
    return out
