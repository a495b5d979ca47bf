"""The order of scores, for kernels: floats as integers, and a sort of one head's ranking.

Equal scores put the older token first, -0.0 ties with +0.0, NaN ranks last: the order of
`reference.rank_tokens`.
"""

import triton
import triton.language as tl

_SIGN: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def sortable_key(scores):
    """Map floats to unsigned integers of the same order; NaN below -inf."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, _SIGN, ordered)
    return (ordered ^ _SIGN).to(tl.uint32, bitcast=True)


@triton.jit
def sort_ranking(
    scores,  # of one head
    ranking,  # [>= count] int32, positions in any order
    count,
    PADDED: tl.constexpr,  # a power of two, at least `count`
):
    """Put the positions that this program has written into order, best first."""
    tl.debug_barrier()  # other threads of this program wrote some of them
    lanes = tl.arange(0, PADDED)
    inside = lanes < count
    positions = tl.load(ranking + lanes, mask=inside, other=0)
    keys = sortable_key(tl.load(scores + positions, mask=inside, other=0.0))
    # Among equals the lower position, which its complement makes the larger key.
    packed = (keys.to(tl.uint64) << 32) | (0xFFFFFFFF - positions.to(tl.uint64))
    packed = tl.sort(tl.where(inside, packed, 0), descending=True)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    best = 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    tl.store(ranking + lanes, best.to(tl.int32), mask=inside)
