"""The definition of coupled sampling, in plain torch: one noise for all who sample a position.

An exponential race (the Gumbel trick in another form) picks the token whose probability over its
noise is largest, and so draws from the probabilities. The noise is a function of seed, position and
token alone, so that two distributions that are close pick the same token nearly always, whoever
computes them: Daliri et al., "Coupling without Communication and Drafter-Invariant Speculative
Decoding", arXiv 2408.07978.

Shapes: B rows, V tokens of the vocabulary.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
"""Bits of a hash."""
LARGEST = 1 - 2.0**-24
"""Largest uniform number: 1 would make the noise infinite."""


def _mix(state: Tensor, word: Tensor) -> Tensor:
    """Mix a word of 32 bits into a state, as MurmurHash3 does."""
    word = word * 0xCC9E2D51 & WORD
    word = (word << 15 | word >> 17) & WORD
    state = state ^ (word * 0x1B873593 & WORD)
    state = (state << 13 | state >> 19) & WORD
    return state * 5 + 0xE6546B64 & WORD


def _finish(state: Tensor) -> Tensor:
    """Spread the last words over all bits, as MurmurHash3 does."""
    state = (state ^ state >> 16) * 0x85EBCA6B & WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 & WORD
    return state ^ state >> 16


def hash_tokens(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Hash seed, position and token id.

    Args:
        seeds: [B] int64.
        positions: [B] int, of the query whose next token is sampled.
        num_tokens: V.

    Returns:
        [B, V] int64, each of 32 bits.
    """
    seeds, positions = seeds.long(), positions.long()
    state = torch.zeros_like(seeds)
    for word in (seeds & WORD, seeds >> 32 & WORD, positions & WORD):
        state = _mix(state, word)
    tokens = torch.arange(num_tokens, device=seeds.device)
    return _finish(_mix(state[:, None], tokens[None, :]))


def exponential_noise(hashes: Tensor) -> Tensor:
    """Return [B, V] f32, exponentially distributed with mean 1.

    Small numbers decide a race, and f32 is dense there.
    """
    uniform = (hashes.float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=LARGEST))


def kept_tokens(probs: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Return which tokens the three filters leave, [B, V] bool; all judge the same probabilities.

    A token is kept if fewer than `top_k` tokens come before it, if these have no more mass than
    `top_p`, and if its probability is at least `min_p` times the largest. Of equal tokens the lower
    id comes first. The likeliest token is always kept.

    Args:
        probs: [B, V] f32.
        top_ks: [B] int; more than V for no limit.
        top_ps, min_ps: [B] f32.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    within = (before <= top_ps[:, None]) | (top_ps[:, None] >= 1)  # where sums are rounded above 1
    keep = (ranks < top_ks[:, None]) & within
    keep &= ordered >= ordered[:, :1] * min_ps[:, None]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(-1, order, keep)


def coupled_pick(
    probs: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
) -> Tensor:
    """Draw one token a row; see `hash_tokens` and `kept_tokens` for the arguments.

    Returns:
        [B] int64; of equal tokens the lowest id.
    """
    noise = exponential_noise(hash_tokens(seeds, positions, probs.shape[-1]))
    keep = kept_tokens(probs, top_ks, top_ps, min_ps)
    return torch.where(keep, probs / noise, -1.0).argmax(-1)


def count_accepted(drafts: Tensor, picks: Tensor) -> Tensor:
    """Return the tokens of each verified run: the drafts that the picks repeat from the first on,
    and the pick behind them.

    Args:
        drafts: [B, N] int; the first follows the newest token of the row.
        picks: [B, N + 1] int, drawn after the newest token and after each draft.

    Returns:
        [B] int64, from 1 to N + 1.
    """
    return 1 + (drafts == picks[:, :-1]).long().cumprod(-1).sum(-1)
