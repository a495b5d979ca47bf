"""The cost and the savings of stopping early, over 20,000 questions with known probabilities.

The rules decide on every state that occurs; walking the questions is vectorised. Expected values
come from theory: dynamic programming over the votes, closed forms, and Bayes' rule. Bands are four
standard errors of the 20,000, so that a right rule fails one of these tests in some thousand runs.
"""

import math
import operator
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, binom

from lim_sglang.programs.stopping import FirstRule, PosteriorRule, WindowRule
from lim_sglang.programs.vote import tally
from tests.builders import make_sample

QUESTIONS = 20_000
N = 40
"""Samples of a full vote: both papers' default."""
WINDOW = 5
CONFIDENCE = 0.95
ERRORS = 4.0
TAIL = 3e-5
"""Probability of a normal distribution beyond four standard errors."""

Answers = NDArray[np.int64]  # [questions, N]
Stops = Callable[[int, int, int], bool]


def answers_of(chances: NDArray[np.float64], seed: int) -> Answers:
    """Sample answers 0, 1, … of each question, one after the other, by its probabilities."""
    uniform = np.random.default_rng(seed).random((len(chances), N, 1))
    return (uniform > np.cumsum(chances, axis=1)[:, None, :-1]).sum(-1)


def count_votes(answers: Answers, num_answers: int) -> NDArray[np.int64]:
    """Count the votes after each sample: [questions, N, answers]."""
    return np.cumsum(answers[:, :, None] == np.arange(num_answers), axis=1)


def leaders(answers: Answers, num_answers: int) -> Answers:
    """Return the winner after each sample; at a tie the answer with the earlier sample."""
    given = answers[:, :, None] == np.arange(num_answers)
    first = np.where(given.any(1), given.argmax(1), N)
    return (count_votes(answers, num_answers) * (N + 1) - first[:, None, :]).argmax(-1)


def posterior_stops(answers: Answers, num_answers: int) -> NDArray[np.int64]:
    """Return the number of samples at which `PosteriorRule` stops; N + 1 if it does not."""
    settled = np.zeros((N + 1, N + 1), bool)
    for first, second in product(range(N + 1), repeat=2):
        if first >= second and first + second <= N:
            ended = [make_sample(i, "AB"[i >= first]) for i in range(first + second)]
            settled[first, second] = PosteriorRule(CONFIDENCE).is_settled(ended, 0, operator.eq)
    votes = np.sort(count_votes(answers, num_answers), axis=-1)
    return first_true(settled[votes[..., -1], votes[..., -2]])


def window_stops(answers: Answers, num_answers: int) -> NDArray[np.int64]:
    """Return the number of samples at which `WindowRule` stops; N + 1 if it does not."""
    agrees = np.zeros((num_answers,) * WINDOW, bool)
    for window in product(range(num_answers), repeat=WINDOW):
        ended = [make_sample(i, str(answer)) for i, answer in enumerate(window)]
        agrees[window] = WindowRule(WINDOW).is_settled(ended, 0, operator.eq)
    settled = np.zeros(answers.shape, bool)
    for end in range(WINDOW, N + 1, WINDOW):
        settled[:, end - 1] = agrees[tuple(answers[:, end - WINDOW : end].T)]
    return first_true(settled)


def first_true(settled: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the first sample, from 1, at which each question is settled; N + 1 for none."""
    return np.where(settled.any(1), settled.argmax(1), N) + 1


def exact(chance: Callable[[int, int], float], stops: Stops) -> tuple[float, float, float]:
    """Return, for a question with two answers, the expected samples, their square, and the
    probability that the vote at the stop and the vote of all N differ.

    Args:
        chance: probability of the answer that came first, given its votes and the other's.
        stops: the rule, given these votes and the number of equal answers at the end.
    """

    @cache
    def kept(a: int, b: int) -> float:
        """Return the probability that the answer that came first wins, as it does at a tie."""
        if a + b == N:
            return float(a >= b)
        p = chance(a, b)
        return p * kept(a + 1, b) + (1 - p) * kept(a, b + 1)

    states = {(1, 0, 1): 1.0}  # the third number: equal answers at the end, signed
    samples = squares = differ = 0.0
    for count in range(1, N + 1):
        following: dict[tuple[int, int, int], float] = {}
        for (a, b, run), mass in states.items():
            if count == N or stops(a, b, abs(run)):
                samples, squares = samples + mass * count, squares + mass * count**2
                differ += mass * (1 - kept(a, b) if a >= b else kept(a, b))
                continue
            p = chance(a, b)
            for state, share in (
                ((a + 1, b, max(run, 0) + 1), p),
                ((a, b + 1, min(run, 0) - 1), 1 - p),
            ):
                following[state] = following.get(state, 0.0) + mass * share
        states = following
    return samples, squares, differ


def beta_stops(a: int, b: int, run: int) -> bool:
    """Decide as Adaptive-Consistency's paper says, by SciPy's Beta posterior."""
    return bool(beta.sf(0.5, max(a, b) + 1, min(a, b) + 1) >= CONFIDENCE)


def window_agrees(a: int, b: int, run: int) -> bool:
    """Decide as ESC's paper says: a window ends here, and all of its answers are equal."""
    return (a + b) % WINDOW == 0 and run >= WINDOW


def question(p: float, stops: Stops) -> tuple[float, float, float]:
    """Return `exact` for a question whose more probable answer has probability p."""
    sides = [(q, exact(lambda a, b, q=q: q, stops)) for q in (p, 1 - p)]
    samples, squares, differ = (sum(q * found[i] for q, found in sides) for i in range(3))
    return samples, squares, differ


def deviation(mean: float, squares: float) -> float:
    """Return the standard error of the mean over all questions."""
    return math.sqrt((squares - mean**2) / QUESTIONS)


def test_the_vectorised_vote_is_the_vote() -> None:
    answers = answers_of(np.random.default_rng(0).dirichlet(np.ones(4), 50), seed=1)
    found = leaders(answers, 4)
    for row, leader in zip(answers, found, strict=True):
        samples = [make_sample(i, str(answer)) for i, answer in enumerate(row)]
        for count in range(1, N + 1):
            assert tally(samples[:count], operator.eq).winner == str(leader[count - 1])


@pytest.mark.parametrize(
    ("rule", "p", "samples", "differ"),
    [
        ("adaptive", 0.95, 4.695, 6.3e-6),
        ("adaptive", 0.9, 5.622, 1.04e-4),
        ("adaptive", 0.8, 8.718, 1.86e-3),
        ("adaptive", 0.7, 15.114, 1.11e-2),
        ("adaptive", 0.6, 24.161, 3.45e-2),
        ("esc", 0.95, 6.462, 3.9e-7),
        ("esc", 0.9, 8.461, 1.5e-5),
        ("esc", 0.8, 14.610, 7.0e-4),
        ("esc", 0.7, 22.752, 7.71e-3),
        ("esc", 0.6, 29.626, 3.45e-2),
    ],
)
def test_two_answers_cost_and_save_what_dynamic_programming_expects(
    rule: str, p: float, samples: float, differ: float
) -> None:
    find_stops, stops = {
        "adaptive": (posterior_stops, beta_stops),
        "esc": (window_stops, window_agrees),
    }[rule]
    expected, squares, differing = question(p, stops)
    assert (expected, differing) == pytest.approx((samples, differ), rel=0.02)
    answers = answers_of(np.tile([p, 1 - p], (QUESTIONS, 1)), seed=round(100 * p))
    stopped = np.minimum(find_stops(answers, 2), N)
    assert abs(stopped.mean() - expected) <= ERRORS * deviation(expected, squares)
    vote = leaders(answers, 2)
    differs = vote[np.arange(QUESTIONS), stopped - 1] != vote[:, -1]
    assert binom.ppf(TAIL, QUESTIONS, differing) <= differs.sum()
    assert differs.sum() <= binom.isf(TAIL, QUESTIONS, differing)


def test_adaptive_is_wrong_as_rarely_as_its_posterior_says() -> None:
    # Two answers with any probabilities, all equally likely: the paper's prior.
    chances = np.random.default_rng(7).random(QUESTIONS)
    answers = answers_of(np.stack([chances, 1 - chances], axis=1), seed=8)
    found = posterior_stops(answers, 2)
    early, stopped = found <= N, np.minimum(found, N)
    at = np.arange(QUESTIONS), stopped - 1
    vote = leaders(answers, 2)
    wrong = (vote[at] != (chances < 0.5))[early].mean()
    # Bayes' rule: one minus the posterior at the stop, averaged.
    votes = count_votes(answers, 2)[at][early]
    doubt = beta.cdf(0.5, votes.max(1) + 1, votes.min(1) + 1).mean()
    assert doubt <= 1 - CONFIDENCE
    assert abs(wrong - doubt) <= ERRORS * math.sqrt(doubt / early.sum())
    # Who does not know the chances sees each answer as the next ball of Pólya's urn.
    expected, squares, differing = exact(lambda a, b: (a + 1) / (a + b + 2), beta_stops)
    assert (expected, differing) == pytest.approx((14.014, 0.0146), rel=0.01)
    assert abs(stopped.mean() - expected) <= ERRORS * deviation(expected, squares)
    differs = (vote[at] != vote[:, -1]).mean()
    assert abs(differs - differing) <= ERRORS * math.sqrt(differing / QUESTIONS)


def test_adaptive_with_more_answers_is_wrong_no_more_than_its_posteriors_add_up_to() -> None:
    # Five answers, all chances as likely. For each rival the paper's posterior is exact, given that
    # one of the two is answered, and each of four rivals may be the more probable one.
    chances = np.random.default_rng(9).dirichlet(np.ones(5), QUESTIONS)
    answers = answers_of(chances, seed=10)
    found = posterior_stops(answers, 5)
    early = found <= N
    at = np.arange(QUESTIONS), np.minimum(found, N) - 1
    vote = leaders(answers, 5)
    votes = np.sort(count_votes(answers, 5)[at][early], axis=1)
    doubt = beta.cdf(0.5, votes[:, -1:] + 1, votes[:, :-1] + 1).sum(1).mean()
    wrong = (vote[at] != chances.argmax(1))[early].mean()
    # It is above the 5 % of two answers: the criterion looks at the first two only.
    assert 1 - CONFIDENCE < wrong <= doubt <= 4 * (1 - CONFIDENCE)
    # A full vote for another answer leaves it the more probable one: at least half of the doubt.
    assert (vote[at] != vote[:, -1])[early].mean() <= 2 * doubt


def test_esc_stops_as_often_and_as_wrongly_as_its_windows_agree() -> None:
    chances = np.random.default_rng(11).dirichlet(np.full(5, 0.3), QUESTIONS)
    answers = answers_of(chances, seed=12)
    found = window_stops(answers, 5)
    early, stopped = found <= N, np.minimum(found, N)
    agreed = answers[np.arange(QUESTIONS), stopped - 1]
    powers = chances**WINDOW
    agree = powers.sum(1)
    stops = 1 - (1 - agree) ** (N // WINDOW)
    for seen, expected in (
        (early, stops),
        (early & (agreed != chances.argmax(1)), stops * (1 - powers.max(1) / agree)),
        (stopped, WINDOW * stops / agree),
    ):
        error = np.std(seen - expected) / math.sqrt(QUESTIONS)
        assert abs(seen.mean() - expected.mean()) <= ERRORS * error


def test_short_spends_m_of_k_chains() -> None:
    # Chains that may end at any token with the same chance: until the m-th of k ends, m mean
    # lengths are generated in all (the total time on test of exponential lengths), m/k of all.
    k, m, mean = 8, 3, 4000.0
    lengths = np.random.default_rng(13).exponential(mean, (QUESTIONS, k)).round().astype(int)
    lengths.sort(axis=1)
    spent = np.zeros(QUESTIONS)
    for number, ends in enumerate(lengths.tolist()):
        ended = [make_sample(i, "A", num_tokens=length) for i, length in enumerate(ends)]
        last = next(n for n in range(k) if FirstRule(m).is_settled(ended[: n + 1], 0, operator.eq))
        spent[number] = np.minimum(ends, ends[last]).sum()
    assert abs(spent.mean() - m * mean) <= ERRORS * math.sqrt(m / QUESTIONS) * mean
