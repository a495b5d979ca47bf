"""Where each row's kept tokens begin, from lengths alone.

Defined by `reference.count_kept`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import LENGTH_BLOCK, check_int32, check_tensors


@triton.jit(do_not_specialize=["num_rows", "budget"])
def _count_kept(
    lengths,  # [B] int64
    kept_indptr,  # [B + 1] int32
    num_rows,
    budget,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    total = tl.full((), 0, tl.int32)
    tl.store(kept_indptr, total)
    for first in range(0, num_rows, BLOCK):
        rows = first + lanes
        inside = rows < num_rows
        kept = tl.minimum(tl.load(lengths + rows, mask=inside, other=0), budget).to(tl.int32)
        tl.store(kept_indptr + 1 + rows, total + tl.cumsum(kept, 0), mask=inside)
        total += tl.sum(kept, 0)


def count_kept(lengths: Tensor, budget: int, out: Tensor) -> Tensor:
    """Add up `min(length, budget)` over the rows of a step.

    Args:
        lengths: [B] int64, tokens of each row, the newest included.
        budget: tokens that a row may keep.
        out: [B + 1] int32.

    Returns:
        `out`: row b keeps `out[b + 1] - out[b]` tokens.
    """
    check_tensors(lengths=lengths, out=out)
    check_int32(out=out)
    if len(out) != len(lengths) + 1:
        raise ValueError(f"out must have {len(lengths) + 1} numbers, not {len(out)}")
    _count_kept[(1,)](lengths, out, lengths.shape[0], budget, BLOCK=LENGTH_BLOCK)
    return out
