"""Intervals and tests against known truth: how often they are right, over thousands of runs.

Questions have a probability of their own, drawn from a U-shaped distribution as benchmarks have it;
two runs share it where there is no difference.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from lim_sglang.evals.compare import bootstrap, mcnemar

SIMULATIONS, QUESTIONS, SAMPLES = 4000, 200, 4
RESAMPLES = 500
"""Fewer than a user's 10,000, for the time; the rates would be the same but for their own noise."""


def simulate(generator: np.random.Generator, loss: float) -> tuple[NDArray, NDArray, float]:
    """Right samples and mean lengths, [questions, 2] each, and the true ratio of lengths.

    Args:
        loss: probability that run b spoils a right sample.
    """
    hard = generator.beta(0.5, 0.7, QUESTIONS)
    right = generator.binomial(SAMPLES, np.stack([hard, hard * (1 - loss)], 1)) / SAMPLES
    typical = 400 * np.exp(0.5 * generator.standard_normal((QUESTIONS, 1)))
    ratio = 1.05
    lengths = typical * np.array([1, ratio])
    noise = np.exp(0.4 * generator.standard_normal((SAMPLES, QUESTIONS, 2)) - 0.08)
    return right, lengths * noise.mean(0), ratio


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["no difference", "a loss"])
def rates(request: pytest.FixtureRequest) -> dict[str, float]:
    """How often each statement was true or made."""
    loss = request.param
    truth = -loss * 0.5 / (0.5 + 0.7)
    generator = np.random.default_rng(20251125)
    counts = dict.fromkeys(("covered", "rejected", "ratio covered", "McNemar"), 0)
    for seed in range(SIMULATIONS):
        right, lengths, ratio = simulate(generator, loss)
        difference, length = bootstrap(right, lengths, seed=seed, resamples=RESAMPLES)
        counts["covered"] += difference.low <= truth <= difference.high
        counts["rejected"] += difference.excludes_zero
        counts["ratio covered"] += length.low <= ratio <= length.high
        # The vote of a question is right where most of its samples are.
        votes = right + generator.uniform(-0.01, 0.01, right.shape) > 0.5
        counts["McNemar"] += mcnemar(votes.tolist()).p < 0.05
    found = {name: count / SIMULATIONS for name, count in counts.items()}
    print(loss, found)  # noqa: T201 - shown with -rP, for docs/log.md
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
        assert rates["McNemar"] <= 0.06


def test_few_questions_have_no_narrower_intervals_than_they_should() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(2000):
        hard = generator.beta(0.5, 0.7, 20)
        right = generator.binomial(SAMPLES, np.stack([hard, hard * 0.9], 1)) / SAMPLES
        difference, _ = bootstrap(right, np.ones((20, 2)), seed=seed, resamples=RESAMPLES)
        covered += difference.low <= -0.1 * 0.5 / 1.2 <= difference.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.025)
