"""Coupled sampling: the law of its draws, its filters, and how often close distributions agree."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from scipy import stats

from lim_sglang.kernels.reference_sampling import (
    count_accepted,
    coupled_pick,
    exponential_noise,
    hash_tokens,
    kept_tokens,
)

PROBS = torch.tensor([0.3, 0.05, 0.2, 0.2, 0.02, 0.13, 0.1])
DRAWS = 200_000
ALL = {"top_k": 1 << 30, "top_p": 1.0, "min_p": 0.0}
FILTERS: Mapping[str, tuple[Mapping[str, float], set[int]]] = {
    "none": ({}, set(range(7))),
    "top_k": ({"top_k": 3}, {0, 2, 3}),
    "top_k 1": ({"top_k": 1}, {0}),
    # Before the fourth token, in order 0 2 3 5 6 1 4, there is a mass of 0.7.
    "top_p": ({"top_p": 0.65}, {0, 2, 3}),
    "top_p at a boundary": ({"top_p": 0.29}, {0}),
    "top_p 0": ({"top_p": 0.0}, {0}),
    "min_p": ({"min_p": 0.4}, {0, 2, 3, 5}),
    "all": ({"top_k": 5, "top_p": 0.9, "min_p": 0.35}, {0, 2, 3, 5}),
}
LEAST_P = 1e-4
"""Least p of a chi-square test: eight of them."""


def pick(probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, **limits: float):
    """Draw one token a row with the same limits for all."""
    limits = ALL | limits
    count = len(probs)
    return coupled_pick(
        probs,
        seeds,
        positions,
        torch.full((count,), int(limits["top_k"])),
        torch.full((count,), limits["top_p"]),
        torch.full((count,), limits["min_p"]),
    )


def murmur3(words: list[int]) -> int:
    """Return MurmurHash3's x86 hash of whole words with seed 0, without the length."""
    state = 0
    for each in words:
        word = each * 0xCC9E2D51 % 2**32
        word = (word << 15 | word >> 17) % 2**32
        state ^= word * 0x1B873593 % 2**32
        state = (state << 13 | state >> 19) % 2**32
        state = (state * 5 + 0xE6546B64) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor % 2**32
    return state ^ state >> 16


def test_the_hash_is_murmurs_of_both_halves_of_the_seed_the_position_and_the_token() -> None:
    seeds, positions = [0, 1, -1, 2**40 + 7, -(2**62)], [0, 5, 131071, 7, 7]
    found = hash_tokens(torch.tensor(seeds), torch.tensor(positions), 5)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        halves = seed % 2**32, (seed >> 32) % 2**32
        assert found[row].tolist() == [murmur3([*halves, position, t]) for t in range(5)]


def test_the_noise_is_finite_and_positive_at_the_ends_of_the_hash() -> None:
    noise = exponential_noise(torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 1]))
    assert noise.isfinite().all()
    assert (noise > 0).all()
    assert (noise.diff() >= 0).all()
    certain = torch.tensor([0.0, 1.0, 0.0])
    assert pick(certain.repeat(9, 1), torch.arange(9), torch.arange(9)).unique().tolist() == [1]


@pytest.mark.parametrize("name", FILTERS)
def test_draws_have_the_filtered_probabilities(name: str) -> None:
    limits, kept = FILTERS[name]
    seeds = torch.arange(DRAWS) % 1000
    positions = torch.arange(DRAWS) // 1000
    tokens = pick(PROBS.repeat(DRAWS, 1), seeds, positions, **limits)
    counts = torch.bincount(tokens, minlength=7)
    assert set(counts.nonzero().flatten().tolist()) == kept
    share = PROBS[sorted(kept)] / PROBS[sorted(kept)].sum()
    if len(kept) > 1:
        expected = share.double() / share.double().sum() * DRAWS
        assert stats.chisquare(counts[sorted(kept)], expected).pvalue > LEAST_P


def test_three_steps_of_a_seed_are_independent() -> None:
    count = 100_000
    steps = [
        pick(PROBS[:3].repeat(count, 1), torch.arange(count), torch.full((count,), at))
        for at in (10, 11, 12)
    ]
    found = torch.bincount(steps[0] * 9 + steps[1] * 3 + steps[2], minlength=27)
    share = (PROBS[:3] / PROBS[:3].sum()).double()
    expected = torch.einsum("a,b,c->abc", share, share, share).flatten()
    assert stats.chisquare(found, expected / expected.sum() * count).pvalue > LEAST_P


def test_chains_of_drafts_have_the_law_of_the_verifier() -> None:
    """Two drafts by one Markov chain, verified by another: the joint law of three tokens, of which
    each run gives the first ones, and a step of the verifier the others.
    """
    count, generator = 100_000, torch.Generator().manual_seed(5)
    verifier, drafter = (torch.rand(2, 3, 3, generator=generator) + 0.2).softmax(-1)
    start, seeds = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    at = [torch.full((count,), place) for place in (10, 11, 12)]
    drafts = [pick(drafter[start], seeds, at[0])]
    drafts.append(pick(drafter[drafts[0]], seeds, at[1]))
    before = [start, *drafts]
    picks = [pick(verifier[each], seeds, place) for each, place in zip(before, at, strict=True)]
    accepted = count_accepted(torch.stack(drafts, 1), torch.stack(picks, 1))
    assert set(accepted.tolist()) == {1, 2, 3}
    tokens = [picks[0]]
    for place in (1, 2):
        alone = pick(verifier[tokens[-1]], seeds, at[place])
        tokens.append(torch.where(accepted > place, picks[place], alone))
    found = torch.bincount(tokens[0] * 9 + tokens[1] * 3 + tokens[2], minlength=27)
    law = verifier.double()
    expected = torch.einsum("a,ab,bc->abc", law[0], law, law).flatten()
    assert stats.chisquare(found, expected / expected.sum() * count).pvalue > LEAST_P


def test_two_distributions_agree_as_often_as_the_formula_says() -> None:
    other = torch.tensor([0.25, 0.1, 0.3, 0.1, 0.05, 0.1, 0.1])
    seeds, positions = torch.arange(DRAWS), torch.zeros(DRAWS, dtype=torch.int64)
    same = pick(PROBS.repeat(DRAWS, 1), seeds, positions) == pick(
        other.repeat(DRAWS, 1), seeds, positions
    )
    ratios = torch.maximum(PROBS / PROBS[:, None], other / other[:, None])
    expected = float((1 / ratios.sum(1)).sum())
    assert expected < 0.9
    assert float(same.float().mean()) == pytest.approx(expected, abs=0.004)


def test_a_row_does_not_depend_on_its_neighbours_or_on_unlikely_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(6, 50, generator=generator).softmax(-1)
    seeds, positions = torch.arange(6) * 7919, torch.arange(6) * 11
    together = pick(probs, seeds, positions, top_p=0.8)
    for row in range(6):
        alone = (each[row : row + 1] for each in (probs, seeds, positions))
        assert pick(*alone, top_p=0.8) == together[row]
    longer = torch.cat([probs, torch.zeros(6, 30)], dim=1)
    assert torch.equal(pick(longer, seeds, positions, top_p=0.8), together)


def test_of_equal_tokens_the_lower_id_is_kept() -> None:
    probs = torch.full((1, 6), 1 / 6)
    for count in (1, 2, 5):
        limits = torch.tensor([count]), torch.ones(1), torch.zeros(1)
        assert kept_tokens(probs, *limits)[0].tolist() == [t < count for t in range(6)]


def test_filters_judge_the_same_probabilities() -> None:
    """No filter sees what another has left: each alone and all together keep the intersection."""
    generator = torch.Generator().manual_seed(1)
    probs = (3 * torch.randn(40, 30, generator=generator)).softmax(-1)
    limits = [(1 << 30, 7), (1.0, 0.7), (0.0, 0.1)]
    for top_k, top_p, min_p in itertools.product(*limits):
        rows = [torch.full((40,), each) for each in (top_k, top_p, min_p)]
        alone = [
            kept_tokens(probs, rows[0], torch.ones(40), torch.zeros(40)),
            kept_tokens(probs, torch.full((40,), 1 << 30), rows[1], torch.zeros(40)),
            kept_tokens(probs, torch.full((40,), 1 << 30), torch.ones(40), rows[2]),
        ]
        assert torch.equal(kept_tokens(probs, *rows), alone[0] & alone[1] & alone[2])
