"""The attention that all heads together give each token: their softmax, added up.

Defined by `reference.pool_mass`. A head's normaliser is the log-sum-exp that its dense attention
has anyway; where that is not at hand, `log_sum_exp` finds it in the scores.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.follow import pdl_launch_next, pdl_options, pdl_wait
from lim_sglang.kernels.launch import (
    LSE_BLOCK,
    POOL_BLOCK,
    POOL_HEADS,
    check_int32,
    check_tensors,
)

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["budget"])
def _log_sum_exp(
    scores,  # [B, H, >= S] f32
    indptr,  # [B + 1] int32
    lse,  # [B, H] f32
    budget,
    scale,  # times log2 e
    score_row_stride,
    score_head_stride,
    lse_row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if length <= budget:
        return
    scores += row * score_row_stride + head * score_head_stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        inside = first + lanes < length
        score = tl.load(scores + first + lanes, mask=inside, other=float("-inf")) * scale
        higher = tl.maximum(largest, score)
        # A lane that has seen nothing yet stays at zero.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(largest - safe) + tl.exp2(score - safe)
        largest = higher
    top = tl.max(largest, 0)
    tl.store(
        lse + row * lse_row_stride + head, top + tl.log2(tl.sum(total * tl.exp2(largest - top), 0))
    )


@triton.jit(do_not_specialize=["budget", "num_heads"])
def _pool(
    scores,  # [B, H, >= S] f32
    indptr,  # [B + 1] int32
    lse,  # [B, H] f32
    mass,  # [B, >= S] f32
    budget,
    num_heads,
    scale,  # times log2 e
    score_row_stride,
    score_head_stride,
    lse_row_stride,
    mass_row_stride,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    first = tl.program_id(1) * BLOCK
    if (length <= budget) | (first >= length):
        return
    positions = first + tl.arange(0, BLOCK)
    scores += row * score_row_stride + positions[None, :]
    # Rows are longer than a block's last four scores, which are loaded at once.
    read = (positions // 4 * 4 < length)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for first_head in range(0, num_heads, HEADS):
        heads = first_head + tl.arange(0, HEADS)[:, None]
        of_heads = scores + heads.to(tl.int64) * score_head_stride
        score = tl.load(of_heads, mask=read & (heads < num_heads), other=float("-inf"))
        of_all = tl.load(lse + row * lse_row_stride + heads, mask=heads < num_heads, other=0.0)
        total += tl.sum(tl.exp2(score * scale - of_all), 0)
    tl.store(mass + row * mass_row_stride + positions, total, mask=positions < length)


def log_sum_exp(scores: Tensor, indptr: Tensor, budget: int, scale: float, out: Tensor) -> Tensor:
    """Each head's normaliser in each row that is longer than the budget.

    Args:
        scores: [B, H, N] f32, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        budget: rows within it stay untouched.
        scale: factor on q·k before the softmax.
        out: [B, H] f32.

    Returns:
        `out`: log2 of the sum of e^(scale · score), as FlashInfer has it.
    """
    check_tensors(scores=scores, indptr=indptr, out=out)
    check_int32(indptr=indptr)
    rows, heads, _ = scores.shape
    _log_sum_exp[(rows, heads)](
        scores,
        indptr,
        out,
        budget,
        scale * LOG2_E,
        scores.stride(0),
        scores.stride(1),
        out.stride(0),
        BLOCK=LSE_BLOCK,
    )
    return out


def softmax_mass(
    scores: Tensor, indptr: Tensor, lse: Tensor, budget: int, scale: float, out: Tensor
) -> Tensor:
    """Add up the heads' attention to each token of each row that is longer than the budget.

    Args:
        scores: [B, H, N] f32, from `score_tokens`; N a multiple of 4, at least the longest row.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        lse: [B, H] f32, from `log_sum_exp` or FlashInfer.
        budget: rows within it stay untouched.
        scale: factor on q·k before the softmax.
        out: [B, M] f32, M at least the longest row.

    Returns:
        `out`.
    """
    check_tensors(scores=scores, indptr=indptr, lse=lse, out=out)
    check_int32(indptr=indptr)
    rows, heads, columns = scores.shape
    if columns % 4:
        raise ValueError(f"rows of scores must have a multiple of 4 columns, not {columns}")
    _pool[(rows, triton.cdiv(columns, POOL_BLOCK))](
        scores,
        indptr,
        lse,
        out,
        budget,
        heads,
        scale * LOG2_E,
        scores.stride(0),
        scores.stride(1),
        lse.stride(0),
        out.stride(0),
        HEADS=min(POOL_HEADS, triton.next_power_of_2(heads)),
        BLOCK=POOL_BLOCK,
        **pdl_options(),
    )
    return out
