"""Coupled sampling: the token whose probability over its noise is largest, among those kept.

Defined by `reference_sampling.coupled_pick`. Nothing is sorted: all three filters keep the
likeliest tokens up to some rank, so the winner of a race is checked against them, and where it is
not kept, neither is any token behind it, and the race is run again among those before it. Nearly
always the first or the second winner is kept. So three launches race, each with a program for each
block of a row: the first lets all tokens race, each later one those before the winner so far,
which also counts them for its check. A last launch settles each row, and runs the further races
that few rows need. Many rows occupy a GPU by themselves: there the first race alone is shared.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import check_tensors
from lim_sglang.kernels.reference_sampling import LARGEST

PICK_BLOCK = 4096
"""Tokens that a program reads."""
PICK_WARPS = 8
PICK_RACES = 3
"""Races that all blocks of a row share."""
PICK_SHARED_ROWS = 64
"""Rows of the largest batch in which they share more than the first."""
SETTLE_BLOCK = 8192
SETTLE_WARPS = 16

_LARGEST: tl.constexpr = tl.constexpr(LARGEST)
_OUTSIDE: tl.constexpr = tl.constexpr(-1.0)
"""Probability, and ratio, of no token."""
_NO_TOKEN: tl.constexpr = tl.constexpr(0x7FFFFFFF)


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
def _hash_row(seeds, positions, row):
    """Hash seed and position of a row."""
    seed = tl.load(seeds + row).to(tl.int64)
    state = _mix(tl.full((), 0, tl.uint32), seed.to(tl.uint32))
    state = _mix(state, (seed >> 32).to(tl.uint32))
    return _mix(state, tl.load(positions + row).to(tl.uint32))


@triton.jit
def _race(probs, tokens, vocab, state, is_greedy, rival):
    """Let those of some tokens race that come before a rival, or all if the rival is negative.

    Of equal probabilities the lower token comes first; what is not a number never races. A greedy
    row's likeliest token wins, without noise.

    Returns:
        For each token its ratio, its probability, 0 where it does not race, and True if it races.
    """
    prob = tl.load(probs + tokens, mask=tokens < vocab, other=_OUTSIDE)
    limit = tl.load(probs + rival, mask=rival >= 0, other=_OUTSIDE)
    is_before = (prob > limit) | ((prob == limit) & (tokens < rival))
    ratio = prob / tl.where(is_greedy, 1.0, _noise(state, tokens))
    return tl.where(is_before, ratio, _OUTSIDE), tl.where(is_before, prob, 0.0), is_before


@triton.jit
def _first_largest(ratio, tokens):
    """Return the token of the largest ratio; of equal ones the lowest."""
    return tl.min(tl.where(ratio == tl.max(ratio, 0), tokens, _NO_TOKEN), 0)


@triton.jit
def _winner(ratios, tokens, blocks, BLOCKS: tl.constexpr):
    """Return the token of the largest ratio of a row's blocks."""
    lanes = tl.arange(0, BLOCKS)
    ratio = tl.load(ratios + lanes, mask=lanes < blocks, other=_OUTSIDE - 1)
    token = tl.load(tokens + lanes, mask=lanes < blocks, other=_NO_TOKEN)
    return _first_largest(ratio, token)


@triton.jit
def _is_refused(before, mass, prob, top_k, top_p, least):
    """Return True if a filter refuses a token of this probability, with so many tokens of so much
    mass before it; the likeliest is always kept.
    """
    is_within = (before < top_k) & ((mass <= top_p) | (top_p >= 1)) & (prob >= least)
    return (before > 0) & (is_within == 0)


@triton.jit
def _follow(
    probs,  # [V] f32
    ratios,  # [races, B, blocks] f32, from the row on; as the next four: what a race found
    tokens,  # int32
    masses,  # f32
    largest,  # f32
    counts,  # int32
    top_k,
    top_p,
    min_p,
    vocab,
    blocks,
    race_stride,
    RACES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Follow a row's races to the first winner that its filters keep.

    Returns:
        The token, True if no race has checked it yet, and the least probability that min_p keeps.
    """
    lanes = tl.arange(0, BLOCKS)
    is_block = lanes < blocks
    least = tl.max(tl.load(largest + lanes, mask=is_block, other=0.0), 0) * min_p
    token = _winner(ratios, tokens, blocks, BLOCKS)
    # The likeliest token of a greedy row needs no check, nor does any where nothing is filtered.
    is_open = (top_k != 1) & ((top_k < vocab) | (top_p < 1) | (least > 0))
    for race in tl.static_range(1, RACES):
        place = race * race_stride
        before = tl.sum(tl.load(counts + place + lanes, mask=is_block & is_open, other=0), 0)
        mass = tl.sum(tl.load(masses + place + lanes, mask=is_block & is_open, other=0.0), 0)
        prob = tl.load(probs + token)
        is_open = is_open & _is_refused(before, mass, prob, top_k, top_p, least)
        if is_open:
            token = _winner(ratios + place, tokens + place, blocks, BLOCKS)
    return token, is_open, least


@triton.jit(do_not_specialize=["vocab", "blocks"])
def _race_blocks(
    probs,  # [B, V] f32
    seeds,  # [B] int64
    positions,  # [B] int64
    top_ks,  # [B] int32
    top_ps,  # [B] f32
    min_ps,  # [B] f32
    ratios,  # [races, B, blocks] f32, as the next four: what each race found in each block
    tokens,  # int32
    masses,  # f32
    largest,  # f32
    counts,  # int32
    vocab,
    blocks,
    row_stride,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    RACE: tl.constexpr,
):
    """Let a block's tokens race: all in race 0, later those before the winner so far, if a filter
    may refuse it.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    race_stride = tl.num_programs(0) * blocks
    probs += row * row_stride
    top_k = tl.load(top_ks + row)
    place = row * blocks
    rival = tl.full((), -1, tl.int32)
    is_open = rival < 0
    if RACE > 0:
        rival, is_open, _ = _follow(
            probs,
            ratios + place,
            tokens + place,
            masses + place,
            largest + place,
            counts + place,
            top_k,
            tl.load(top_ps + row),
            tl.load(min_ps + row),
            vocab,
            blocks,
            race_stride,
            RACE,
            BLOCKS,
        )
    if is_open:
        state = _hash_row(seeds, positions, row)
        lanes = block * BLOCK + tl.arange(0, BLOCK)
        ratio, prob, is_before = _race(probs, lanes, vocab, state, top_k == 1, rival)
        place += RACE * race_stride + block
        tl.store(ratios + place, tl.max(ratio, 0))
        tl.store(tokens + place, _first_largest(ratio, lanes))
        tl.store(masses + place, tl.sum(prob, 0))
        tl.store(largest + place, tl.max(prob, 0))
        tl.store(counts + place, tl.sum(is_before.to(tl.int32), 0))


@triton.jit(do_not_specialize=["vocab", "blocks"])
def _settle(
    probs,
    seeds,
    positions,
    top_ks,
    top_ps,
    min_ps,
    ratios,
    tokens,
    masses,
    largest,
    counts,
    picks,  # [B] int64
    vocab,
    blocks,
    row_stride,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    RACES: tl.constexpr,
):
    """Pick a row's first winner that its filters keep, by further races where it takes them; for
    the arguments see `_race_blocks`.
    """
    row = tl.program_id(0).to(tl.int64)
    probs += row * row_stride
    place = row * blocks
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    token, is_open, least = _follow(
        probs,
        ratios + place,
        tokens + place,
        masses + place,
        largest + place,
        counts + place,
        top_k,
        top_p,
        tl.load(min_ps + row),
        vocab,
        blocks,
        tl.num_programs(0) * blocks,
        RACES,
        BLOCKS,
    )
    state = _hash_row(seeds, positions, row)
    lanes = tl.arange(0, BLOCK)
    while is_open:
        count = tl.full([BLOCK], 0, tl.int32)
        mass = tl.full([BLOCK], 0.0, tl.float32)
        best = tl.full([BLOCK], _OUTSIDE, tl.float32)
        best_token = lanes
        for first in range(0, vocab, BLOCK):
            ratio, prob, is_before = _race(probs, first + lanes, vocab, state, False, token)
            count += is_before.to(tl.int32)
            mass += prob
            best_token = tl.where(ratio > best, first + lanes, best_token)
            best = tl.maximum(ratio, best)
        before, mass_before = tl.sum(count, 0), tl.sum(mass, 0)
        is_open = _is_refused(before, mass_before, tl.load(probs + token), top_k, top_p, least)
        token = tl.where(is_open, _first_largest(best, best_token), token)
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
    settings = seeds, positions, top_ks, top_ps, min_ps
    check_tensors(probs=probs, seeds=seeds, positions=positions, top_ks=top_ks, top_ps=top_ps)
    rows, vocab = probs.shape
    if any(each.shape != (rows,) for each in settings) or probs.dtype != torch.float32:
        raise ValueError(
            f"probs must be float32, and {rows} of each setting, not {probs.dtype} and "
            f"{[tuple(each.shape) for each in settings]}"
        )
    picks = torch.empty(rows, dtype=torch.int64, device=probs.device)
    block = min(PICK_BLOCK, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, block)
    ratios, masses, largest = (probs.new_empty(PICK_RACES, rows, blocks) for _ in range(3))
    tokens, counts = (torch.empty_like(ratios, dtype=torch.int32) for _ in range(2))
    arguments = probs, *settings, ratios, tokens, masses, largest, counts
    sizes = vocab, blocks, probs.stride(0)
    padded = triton.next_power_of_2(blocks)
    races = PICK_RACES if rows <= PICK_SHARED_ROWS else 1
    for race in range(races):
        _race_blocks[rows, blocks](
            *arguments, *sizes, BLOCK=block, BLOCKS=padded, RACE=race, num_warps=PICK_WARPS
        )
    _settle[(rows,)](
        *arguments,
        picks,
        *sizes,
        BLOCK=min(SETTLE_BLOCK, triton.next_power_of_2(vocab)),
        BLOCKS=padded,
        RACES=races,
        num_warps=SETTLE_WARPS,
    )
    return picks
