"""Coupled sampling: the token whose probability over its noise is largest, among those kept.

Defined by `reference_sampling.coupled_pick`. A program draws one row, and sorts nothing: all three
filters keep the likeliest tokens up to some rank, so the winner of the race is checked against
them, and where it is not kept, neither is any token behind it, and the race is run again among
those before it. Nearly always the first winner is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import check_tensors
from lim_sglang.kernels.reference_sampling import LARGEST

PICK_BLOCK = 8192
"""Tokens that a program reads at a time."""
PICK_WARPS = 16

_LARGEST: tl.constexpr = tl.constexpr(LARGEST)
_OUTSIDE: tl.constexpr = tl.constexpr(float("-inf"))
"""Probability of no token."""


@triton.jit
def _mix(state, word):
    """Mix a word of 32 bits into a state, as MurmurHash3 does."""
    word = word * 0xCC9E2D51
    word = (word << 15) | (word >> 17)
    state = state ^ (word * 0x1B873593)
    state = (state << 13) | (state >> 19)
    return state * 5 + 0xE6546B64


@triton.jit
def _noise(state, tokens):
    """Return exponential noise of tokens, given the hash of seed and position."""
    state = _mix(state, tokens.to(tl.uint32))
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    state = state ^ (state >> 16)
    uniform = tl.minimum((state.to(tl.float32) + 0.5) * (1 / 4294967296), _LARGEST)
    # log(1 + x), exact where x is small: x times the slope between 1 and 1 + x as it is rounded.
    rest = 1 - uniform
    slope = tl.where(rest == 1, -1.0, tl.log(rest) / tl.where(rest == 1, 1.0, 1 - rest))
    return -uniform * slope


@triton.jit
def _race(best, best_token, ratio, tokens):
    """Let tokens race the best ones so far; what is not a number never wins."""
    is_better = ratio > best
    return tl.where(is_better, ratio, best), tl.where(is_better, tokens, best_token)


@triton.jit
def _winner(best, best_token):
    """Return the token of the largest ratio; of equal ones the lowest."""
    largest = tl.max(best, 0)
    return tl.min(tl.where(best == largest, best_token, 0x7FFFFFFF), 0)


@triton.jit(do_not_specialize=["vocab"])
def _pick(
    probs,  # [B, V] f32
    seeds,  # [B] int64
    positions,  # [B] int64
    top_ks,  # [B] int32
    top_ps,  # [B] f32
    min_ps,  # [B] f32
    picks,  # [B] int64
    vocab,
    row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    probs += row * row_stride
    seed = tl.load(seeds + row).to(tl.int64)
    state = _mix(tl.full((), 0, tl.uint32), seed.to(tl.uint32))
    state = _mix(state, (seed >> 32).to(tl.uint32))
    state = _mix(state, tl.load(positions + row).to(tl.uint32))
    top_k = tl.load(top_ks + row)
    is_greedy = top_k == 1  # then the likeliest token wins without a race
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -1.0, tl.float32)
    best_token = lanes
    likeliest = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, vocab, BLOCK):
        tokens = first + lanes
        prob = tl.load(probs + tokens, mask=tokens < vocab, other=_OUTSIDE)
        ratio = prob / tl.where(is_greedy, 1.0, _noise(state, tokens))
        best, best_token = _race(best, best_token, ratio, tokens)
        likeliest = tl.where(prob > likeliest, prob, likeliest)
    token = _winner(best, best_token)
    top_p = tl.load(top_ps + row)
    least = tl.max(likeliest, 0) * tl.load(min_ps + row)
    is_open = (is_greedy == 0) & ((top_k < vocab) | (top_p < 1) | (least > 0))
    while is_open:
        winner = tl.load(probs + token)
        count = tl.full([BLOCK], 0, tl.int32)
        mass = tl.full([BLOCK], 0.0, tl.float32)
        best = tl.full([BLOCK], -1.0, tl.float32)
        best_token = lanes
        for first in range(0, vocab, BLOCK):
            tokens = first + lanes
            prob = tl.load(probs + tokens, mask=tokens < vocab, other=_OUTSIDE)
            is_before = (prob > winner) | ((prob == winner) & (tokens < token))
            count += is_before.to(tl.int32)
            mass += tl.where(is_before, prob, 0.0)
            ratio = tl.where(is_before, prob / _noise(state, tokens), _OUTSIDE)
            best, best_token = _race(best, best_token, ratio, tokens)
        before = tl.sum(count, 0)
        is_within = (tl.sum(mass, 0) <= top_p) | (top_p >= 1)
        is_kept = (before < top_k) & is_within & (winner >= least)
        is_open = (before > 0) & (is_kept == 0)
        token = tl.where(is_open, _winner(best, best_token), token)
    tl.store(picks + row, token.to(tl.int64))


def pick_coupled(
    probs: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
) -> Tensor:
    """Draw one token a row; for the arguments see `reference_sampling.coupled_pick`.

    Returns:
        [B] int64; of equal tokens the lowest id.
    """
    arguments = seeds, positions, top_ks, top_ps, min_ps
    check_tensors(probs=probs, seeds=seeds, positions=positions, top_ks=top_ks, top_ps=top_ps)
    rows, vocab = probs.shape
    if any(each.shape != (rows,) for each in arguments) or probs.dtype != torch.float32:
        raise ValueError(
            f"probs must be float32, and {rows} of each setting, not {probs.dtype} and "
            f"{[tuple(each.shape) for each in arguments]}"
        )
    picks = torch.empty(rows, dtype=torch.int64, device=probs.device)
    _pick[(rows,)](
        probs,
        *arguments,
        picks,
        vocab,
        probs.stride(0),
        BLOCK=min(PICK_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=PICK_WARPS,
    )
    return picks
