"""Each rule stops at exactly the sample that a slow, independent reading of its paper gives.

Also DeepConf's confidence of a chain, and the threshold that its warm-up sets.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad

from lim_sglang.errors import ConfigError
from lim_sglang.programs.schema import Sample, SampleState
from lim_sglang.programs.stopping import (
    ConsensusRule,
    FirstRule,
    GroupConfidence,
    PosteriorRule,
    Rule,
    TokenBudgetRule,
    WindowRule,
    confidence_threshold,
    fewest_votes,
    leader_probability,
)
from tests.builders import make_sample

STATES = {
    "!": SampleState.FAILED,
    "~": SampleState.TRUNCATED,
    "-": SampleState.FINISHED,
    "#": SampleState.ABORTED,
}


def chain(index: int, mark: str, **values: float) -> Sample:
    """Return a sample by its mark.

    A capital letter is a finished sample with this answer, `a` a truncated one with answer A; `-`
    finished and `~` was truncated without an answer, `!` failed, `#` was aborted with answer A.
    """
    if mark.islower():
        return make_sample(index, mark.upper(), SampleState.TRUNCATED, **values)
    answer = mark if mark.isupper() else "A" if mark == "#" else None
    return make_sample(index, answer, STATES.get(mark, SampleState.FINISHED), **values)


def chains(marks: str, **values: float) -> list[Sample]:
    """Return a sample for each mark."""
    return [chain(index, mark, **values) for index, mark in enumerate(marks)]


def stop(rule: Rule, ended: Sequence[Sample]) -> int | None:
    """Return the number of samples at which the rule is settled for the first time."""
    for count in range(len(ended) + 1):
        spent = sum(sample.num_tokens for sample in ended[:count])
        if rule.is_settled(ended[:count], spent, str.__eq__):
            return count
    return None


def random_marks(alphabet: str, length: int, seed: int) -> Iterator[str]:
    """Yield random sequences in which earlier letters of the alphabet are likelier."""
    rng = random.Random(seed)
    while True:
        lean = rng.uniform(0.2, 3)
        weights = [math.exp(-lean * place) for place in range(len(alphabet))]
        yield "".join(rng.choices(alphabet, weights, k=length))


@pytest.mark.parametrize(
    ("rule", "marks", "expected"),
    [
        # Adaptive-Consistency: 1 - 1/2^(n+1) for n equal votes, so 4 make 0.969 and 3 make 0.9375.
        (PosteriorRule(), "AAAA", 4),
        (PosteriorRule(), "", None),
        (PosteriorRule(), "BAAAAAA", 7),
        (PosteriorRule(), "BBAAAAAAAA", 10),
        (PosteriorRule(), "BCAAAAAA", 8),
        (PosteriorRule(), "ABABABABAB", None),
        (PosteriorRule(), "!-~#AAAA", 8),
        (PosteriorRule(), "aaAA", 4),
        # Equality counts, the next number above does not.
        (PosteriorRule(0.96875), "AAAAAA", 4),
        (PosteriorRule(math.nextafter(0.96875, 1)), "AAAAAA", 5),
        (PosteriorRule(0.75), "A", 1),
        # ESC: windows of five, by index.
        (WindowRule(), "AAAAA", 5),
        (WindowRule(), "BAAAAAAAAA", 10),
        (WindowRule(), "BAAAACCCCC", 10),
        (WindowRule(), "AAAA-AAAAA", 10),
        (WindowRule(), "-----!!!!!~~~~~", None),
        (WindowRule(), "aAAAA!AAAA#AAAA", None),
        (WindowRule(2), "ABBA" + "AA", 6),
        (WindowRule(1), "-A", 2),
        # short-m@k: finished samples, with an answer or without.
        (FirstRule(), "ABC", 3),
        (FirstRule(), "A~!#aB-", 7),
        (FirstRule(1), "~~A", 3),
        # Ten tokens a sample.
        (TokenBudgetRule(30), "ABC", 3),
        (TokenBudgetRule(31), "ABCD", 4),
        # DeepConf: 16 chains, then 95 % of the weight; 19 of 20 are just enough.
        (ConsensusRule(), "A" * 20, 16),
        (ConsensusRule(), "A" * 15 + "!#" + "A", 18),
        (ConsensusRule(), "A" * 15 + "~", 16),
        (ConsensusRule(), "-" * 20, None),
        (ConsensusRule(), "B" + "A" * 18, None),
        (ConsensusRule(), "B" + "A" * 19, 20),
        (ConsensusRule(math.nextafter(0.95, 1)), "B" + "A" * 20, 21),
        (ConsensusRule(1.0, 3), "AAA", 3),
        (ConsensusRule(0.6, 2), "ABA", 3),
    ],
)
def test_a_rule_is_settled_by_exactly_this_sample(
    rule: Rule, marks: str, expected: int | None
) -> None:
    assert stop(rule, chains(marks)) == expected


def test_samples_in_flight_count_for_the_budget_only() -> None:
    assert TokenBudgetRule(100).is_settled([], 100, str.__eq__)
    assert not TokenBudgetRule(101).is_settled(chains("AAAA"), 100, str.__eq__)
    for rule in (PosteriorRule(), WindowRule(), FirstRule(), ConsensusRule()):
        assert not rule.is_settled([], 10**9, str.__eq__)


@pytest.mark.parametrize(
    "rule", [PosteriorRule(), WindowRule(3), FirstRule(), ConsensusRule(0.8, 4)]
)
def test_failed_and_aborted_samples_are_no_evidence(rule: Rule) -> None:
    for marks, _ in zip(random_marks("ABC-a", 12, seed=1), range(200), strict=False):
        ended = chains(marks)
        noise = [chain(index, "!#"[index % 2]) for index in range(12, 40)]
        assert rule.is_settled(ended, 0, str.__eq__) == rule.is_settled(
            ended + noise, 0, str.__eq__
        )


def test_answers_are_compared_as_the_vote_compares_them() -> None:
    def as_numbers(a: str, b: str) -> bool:
        return float(a) == float(b)

    ended = [make_sample(i, text) for i, text in enumerate(("1", "1.0", "1.00", "01"))]
    for rule in (PosteriorRule(), WindowRule(4), ConsensusRule(warm_up=4)):
        assert rule.is_settled(ended, 0, as_numbers)
        assert not rule.is_settled(ended, 0, str.__eq__)


def integrated(first: int, second: int) -> float:
    """Return the paper's integral, normalised, as the authors' code computes it."""

    def density(x: float) -> float:
        return x**first * (1 - x) ** second

    return quad(density, 0.5, 1)[0] / (quad(density, 0, 0.5)[0] + quad(density, 0.5, 1)[0])


@pytest.mark.parametrize("second", [0, 1, 2, 3, 5, 8, 13, 21])
def test_the_posterior_is_the_papers_integral(second: int) -> None:
    for first in range(second, 40):
        assert float(leader_probability(first, second)) == pytest.approx(
            integrated(first, second), abs=1e-9
        )


@pytest.mark.parametrize(
    ("first", "second"), [(1000, 0), (999, 1), (526, 474), (527, 473), (501, 499), (500, 500)]
)
def test_a_thousand_votes_are_counted_without_rounding(first: int, second: int) -> None:
    with mpmath.workdps(400):
        exact = mpmath.betainc(first + 1, second + 1, 0.5, 1, regularized=True)
        found = leader_probability(first, second)
        assert abs(mpmath.mpf(found.numerator) / found.denominator - exact) < mpmath.mpf(10) ** -350


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.9, 0.95, 0.99])
def test_the_posterior_rule_stops_at_the_fewest_votes(confidence: float) -> None:
    votes = [make_sample(index, "391") for index in range(fewest_votes(confidence))]
    assert PosteriorRule(confidence).is_settled(votes, 0, str.__eq__)
    assert not PosteriorRule(confidence).is_settled(votes[1:], 0, str.__eq__)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_the_posterior_rule_stops_where_integration_does(confidence: float) -> None:
    def by_hand(marks: str) -> int | None:
        for count in range(1, len(marks) + 1):
            votes = [n for _, n in Counter(marks[:count].replace("-", "")).most_common(2)]
            if votes and integrated(votes[0], [*votes, 0][1]) >= confidence:
                return count
        return None

    stops = Counter()
    for marks, _ in zip(random_marks("ABCD-", 40, seed=2), range(150), strict=False):
        stops[expected := by_hand(marks)] += 1
        assert stop(PosteriorRule(confidence), chains(marks)) == expected, marks
    assert len(stops) > 10


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_window_rule_stops_with_the_first_window_that_agrees(size: int) -> None:
    def by_hand(ended: Sequence[Sample]) -> int | None:
        for count in range(1, len(ended) + 1):
            there = {sample.index: sample for sample in ended[:count]}
            for start in range(0, len(ended), size):
                window = [there.get(index) for index in range(start, start + size)]
                says = {s and s.state is SampleState.FINISHED and s.answer for s in window}
                if len(says) == 1 and says.pop():
                    return count
        return None

    rng = random.Random(3)
    stops = Counter()
    for marks, _ in zip(random_marks("ABC-a!", 31, seed=4), range(400), strict=False):
        ended = chains(marks)
        rng.shuffle(ended)
        stops[expected := by_hand(ended)] += 1
        assert stop(WindowRule(size), ended) == expected, marks
    assert len(stops) > 10


@pytest.mark.parametrize("weighed", [True, False])
def test_the_consensus_rule_stops_at_the_leaders_share_of_the_weight(weighed: bool) -> None:
    def by_hand(ended: Sequence[Sample], agreement: float, warm_up: int) -> int | None:
        for count in range(1, len(ended) + 1):
            weights: Counter[str] = Counter()
            for s in ended[:count]:
                if s.answer and s.state not in (SampleState.FAILED, SampleState.ABORTED):
                    weights[s.answer] += s.confidence if weighed else 1
            ran = [s for s in ended[:count] if s.state.value in ("finished", "truncated")]
            share = max(weights.values()) / sum(weights.values()) if weights else 0
            if len(ran) >= warm_up and share >= agreement:
                return count
        return None

    rng = random.Random(5)
    stops = Counter()
    for marks, _ in zip(random_marks("ABC-a~!#", 40, seed=6), range(400), strict=False):
        # In quarters, so that the sums above are exact.
        ended = [
            chain(i, mark, confidence=rng.randrange(4, 80) / 4 if weighed else None)
            for i, mark in enumerate(marks)
        ]
        agreement, warm_up = rng.choice((0.5, 0.75, 0.875)), rng.choice((1, 4, 9, 16))
        stops[expected := by_hand(ended, agreement, warm_up)] += 1
        assert stop(ConsensusRule(agreement, warm_up), ended) == expected, marks
    assert len(stops) > 10


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PosteriorRule(0.5), "confidence: expected above 0.5 and below 1, got 0.5"),
        (lambda: WindowRule(0), "window: expected at least 1, got 0"),
        (lambda: FirstRule(0), "wanted"),
        (lambda: TokenBudgetRule(0), "tokens"),
        (lambda: ConsensusRule(0.0), "agreement"),
        (lambda: ConsensusRule(1.1), "agreement"),
        (lambda: ConsensusRule(warm_up=0), "warm_up"),
        (lambda: GroupConfidence(0), "window"),
        (lambda: confidence_threshold([1.0], 0.0), "keep"),
        (lambda: confidence_threshold([]), "no chain of the warm-up has a confidence"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_group_confidence_is_the_mean_of_the_last_window(window: int) -> None:
    rng = random.Random(window)
    tokens = [rng.uniform(0, 20) for _ in range(500)]
    group, lowest = GroupConfidence(window), math.inf
    assert group.lowest is None
    for count, token in enumerate(tokens, 1):
        now = group.push(token)
        if count < window:
            assert now is None
            assert group.lowest == pytest.approx(sum(tokens[:count]) / count)
        else:
            mean = sum(tokens[count - window : count]) / window
            lowest = min(lowest, mean)
            assert now == pytest.approx(mean, rel=1e-12)
            assert group.lowest == pytest.approx(lowest, rel=1e-12)


def test_a_rounding_error_does_not_outlive_its_window() -> None:
    group = GroupConfidence(100)
    for token in (1e15, *(0.1 for _ in range(250))):
        now = group.push(token)
    assert now == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 16, 17])
def test_the_threshold_is_the_percentile_of_the_warm_up(keep: float, count: int) -> None:
    rng = random.Random(count)
    lowest = [rng.uniform(5, 25) for _ in range(count)]
    threshold = confidence_threshold(lowest, keep)
    assert threshold == pytest.approx(np.percentile(lowest, 100 - 100 * keep))
    kept = sum(confidence >= threshold for confidence in lowest)
    assert abs(kept - keep * count) <= 1
