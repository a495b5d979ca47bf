"""Intervals and tests against known truth: how often they are right, over thousands of runs.

Questions have a probability of their own, drawn from a U-shaped distribution as benchmarks have it;
two runs share it where there is no difference. Answers are voted on as programs do it.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import binomtest

from lim_sglang.evals.compare import mcnemar_p, mean_interval, ratio_interval, resampled_means

SIMULATIONS, QUESTIONS, SAMPLES = 4000, 200, 4
RESAMPLES = 500
"""Fewer than a user's 10,000, for the time; the rates would be the same but for their own noise."""
EASY, HARD = 0.5, 0.7
"""Of the beta distribution of probabilities: 42 % right on average, many questions near 0 or 1."""
WRONG = np.cumsum([0.5, 0.3, 0.2])
"""How samples that are wrong share the wrong answers."""
RATIO = 1.05


@dataclass(frozen=True)
class Simulated:
    """One pair of runs, [questions, 2] each."""

    shares: NDArray
    """Right samples."""
    answers: NDArray
    """Whether the vote is right."""
    lengths: NDArray
    """Mean tokens."""


def simulate(generator: np.random.Generator, loss: float, questions: int = QUESTIONS) -> Simulated:
    """Draw the samples of two runs.

    Args:
        loss: probability that run b spoils a right sample.
    """
    chance = generator.beta(EASY, HARD, (questions, 1, 1))
    right = generator.random((questions, 2, SAMPLES)) < chance * np.array([[1], [1 - loss]])
    wrong = 1 + np.searchsorted(WRONG, generator.random(right.shape))
    groups = np.where(right, 0, wrong)
    votes = (groups[..., None] == np.arange(4)).sum(axis=2)
    # Of two answers with as many votes, the one that was there first.
    first = np.argmax(groups[..., None] == np.arange(4), axis=2)
    winner = np.argmax(votes - first / (SAMPLES + 1), axis=2)
    typical = 400 * np.exp(0.5 * generator.standard_normal((questions, 1, 1)))
    noise = np.exp(0.4 * generator.standard_normal(right.shape) - 0.08)
    lengths = typical * np.array([[1], [RATIO]]) * noise
    return Simulated(right.mean(axis=2), winner == 0, lengths.mean(axis=2))


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["no difference", "a loss"])
def rates(request: pytest.FixtureRequest) -> dict[str, float]:
    """How often each statement was true or made."""
    loss = request.param
    truth = -loss * EASY / (EASY + HARD)
    generator = np.random.default_rng(20251125)
    counts = dict.fromkeys(("covered", "rejected", "answers", "ratio covered", "McNemar"), 0)
    for seed in range(SIMULATIONS):
        runs = simulate(generator, loss)
        how = {"seed": seed, "resamples": RESAMPLES}
        low, high = mean_interval(runs.shares[:, 1] - runs.shares[:, 0], **how)
        counts["covered"] += low <= truth <= high
        counts["rejected"] += low > 0 or high < 0
        low, high = mean_interval(runs.answers[:, 1] - runs.answers[:, 0].astype(float), **how)
        counts["answers"] += low > 0 or high < 0
        low, high = ratio_interval(runs.lengths[:, 0], runs.lengths[:, 1], **how)
        counts["ratio covered"] += low <= RATIO <= high
        a, b = runs.answers[:, 0], runs.answers[:, 1]
        counts["McNemar"] += mcnemar_p(int((a & ~b).sum()), int((b & ~a).sum())) <= 0.05
    found = {name: int(count) / SIMULATIONS for name, count in counts.items()}
    print(f"loss {loss}: {found}")  # noqa: T201 - shown with -rP, for docs/log.md
    return {"loss": loss, **found}


def test_intervals_cover_the_truth_95_times_of_100(rates: dict[str, float]) -> None:
    assert rates["covered"] == pytest.approx(0.95, abs=0.02)
    assert rates["ratio covered"] == pytest.approx(0.95, abs=0.02)


def test_without_a_difference_one_is_seen_5_times_of_100(rates: dict[str, float]) -> None:
    if rates["loss"]:
        assert rates["rejected"] > 0.5
        assert rates["McNemar"] > 0.1
    else:
        assert rates["rejected"] == pytest.approx(0.05, abs=0.015)
        assert rates["answers"] == pytest.approx(0.05, abs=0.015)
        assert 0.02 < rates["McNemar"] <= 0.06


def binary(generator: np.random.Generator, differ: float, worse: float) -> NDArray:
    """One sample of each of 30 questions, as many as the AIME has."""
    drawn = generator.random(30)
    return np.where(drawn < differ * worse, -1.0, np.where(drawn < differ, 1.0, 0.0))


@pytest.mark.parametrize(
    ("differ", "worse"), [(0.02, 1.0), (0.05, 0.7), (0.1, 0.7), (0.2, 0.8)], ids=str
)
def test_few_questions_that_differ_do_not_make_an_interval_blind(
    differ: float, worse: float
) -> None:
    """Bare percentiles cover the truth 45, 64, 87 and 93 times of 100 here."""
    generator = np.random.default_rng(7)
    truth = differ * (1 - 2 * worse)
    covered = 0
    for seed in range(1000):
        values = binary(generator, differ, worse)
        low, high = mean_interval(values, seed=seed, resamples=RESAMPLES)
        covered += low <= truth <= high
    print(f"differ {differ}: {covered / 1000}")  # noqa: T201 - shown with -rP, for docs/log.md
    assert covered / 1000 > 0.945


def test_few_questions_have_no_narrower_intervals_than_they_should() -> None:
    generator = np.random.default_rng(7)
    truth = -0.1 * EASY / (EASY + HARD)
    covered = 0
    for seed in range(2000):
        shares = simulate(generator, 0.1, questions=20).shares
        low, high = mean_interval(shares[:, 1] - shares[:, 0], seed=seed, resamples=RESAMPLES)
        covered += low <= truth <= high
    print(f"20 questions: {covered / 2000}")  # noqa: T201 - shown with -rP, for docs/log.md
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_the_interval_is_that_of_a_t_distribution_where_there_is_much_to_resample() -> None:
    low, high = mean_interval([0.1 * (n % 3) for n in range(60)], seed=0, resamples=20_000)
    # Mean 0.1, standard error 0.0823 / sqrt(60), t(59) = 2.001; means are in steps of 1/600.
    assert high - low == pytest.approx(2 * 2.001 * 0.08234 / 60**0.5, abs=2 / 600)
    assert (high + low) / 2 == pytest.approx(0.1, abs=1 / 600)


def test_two_questions_are_nearly_none() -> None:
    # Resampled means are 0, 0.5 and 1; t(1) / z = 6.48, times sqrt(2) for n - 1.
    low, high = ratio_interval([1.0, 1.0], [1.0, math.e**2], seed=0, resamples=1000)
    mean = math.log((1 + math.e**2) / 2)
    assert math.log(high) == pytest.approx(mean + (2 - mean) * 6.4829 * 2**0.5, rel=1e-3)
    assert math.log(low) == pytest.approx(mean - mean * 6.4829 * 2**0.5, rel=1e-3)


def test_where_no_question_differs_as_many_may_as_the_number_allows() -> None:
    for count in (30, 500):
        low, high = mean_interval([0.0] * count, seed=0, resamples=10_000)
        # Of two opposite ones among n + 2, resamples have a sum of 3 or more in 100 on each side.
        expected = 3 / (count + 2)
        assert high == pytest.approx(expected, rel=0.07)
        assert low == pytest.approx(-expected, rel=0.07)


def test_nine_questions_that_differ_are_few_and_ten_are_not() -> None:
    low, high = mean_interval([0.5] * 9, seed=0, resamples=2000)
    assert high - low > 0.3  # that they all agree does not say that all others would
    low, high = mean_interval([0.5] * 10, seed=0, resamples=2000)
    assert (low, high) == (0.5, 0.5)


def test_the_made_up_questions_are_as_far_apart_as_the_furthest_that_was_seen() -> None:
    values = [0.25, -0.5, *[0.0] * 38]
    low, high = mean_interval(values, seed=0, resamples=20_000)
    spread = (0.25**2 + 3 * 0.5**2) / 42
    half = stdtrit(41, 0.975) * math.sqrt(spread / 41)
    assert high - low == pytest.approx(2 * half, abs=0.25 / 42)


def test_resampled_means_are_of_whole_questions_drawn_with_replacement() -> None:
    values = np.array([[0.0, 5.0], [1.0, 7.0], [0.0, 5.0]])
    means = resampled_means(values, seed=3, resamples=3000)
    assert means.shape == (3000, 2)
    np.testing.assert_allclose(means[:, 1], 5 + 2 * means[:, 0])  # rows stay together
    shares = [np.mean(np.isclose(means[:, 0], ones / 3)) for ones in range(4)]
    np.testing.assert_allclose(shares, [8 / 27, 12 / 27, 6 / 27, 1 / 27], atol=0.03)


def test_many_questions_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    values = [rng.random() for _ in range(50)]
    whole = mean_interval(values, seed=1, resamples=4000)
    monkeypatch.setattr("lim_sglang.evals.compare.BLOCK", 50 * 333)
    assert mean_interval(values, seed=1, resamples=4000) == pytest.approx(whole, rel=0.02)


def test_a_seed_gives_the_same_interval_again_and_another_one_nearly_the_same() -> None:
    rng = random.Random(3)
    a, b = ([rng.uniform(50, 500) for _ in range(50)] for _ in range(2))
    one, again, other = (ratio_interval(a, b, seed=seed, resamples=2000) for seed in (1, 1, 2))
    assert one == again
    assert other != one
    assert other == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(1, 0), (3, 9), (9, 3), (12, 12), (0, 20), (210, 160), (900, 1000)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected)


def test_where_no_answer_differs_nothing_is_shown() -> None:
    assert mcnemar_p(0, 0) == 1.0
