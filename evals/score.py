"""Scores of a run, pure: from its summary to numbers with their standard errors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from lim_sglang.errors import DataError
from lim_sglang.evals.summary import QuestionResult, Summary
from lim_sglang.programs.records import SampleState

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error."""

    value: float
    error: float | None
    """None where one question alone cannot show any spread."""


@dataclass(frozen=True)
class Score:
    """What a run's samples say. Rates are shares from 0 to 1, of the samples that ended by
    themselves where nothing else is said. Late samples are among these: only votes are without.
    """

    num_questions: int
    """Those with any sample."""
    num_samples: int
    """Those that ended by themselves."""
    num_failed: int
    pass_at_1: Estimate
    """Mean over questions of the mean over their samples, however many each has."""
    pass_at: Mapping[int, Estimate]
    """By k, in powers of two and the number of samples: `pass_at_k`."""
    majority_at: Mapping[int, Estimate]
    """By k, as above: `majority_at_k`."""
    questions_at: Mapping[int, int]
    """By k: questions with at least k samples, which `pass_at` is over."""
    answered: Estimate
    """Share of questions that the program's own vote answers rightly; none is no right answer."""
    truncated: float
    answerless: float
    aborted: float
    """Of all samples that were begun."""
    mean_tokens: float
    percentiles: Mapping[int, float]
    """Of the length, in tokens."""
    tokens_per_question: float
    """All that was generated for it, by aborted and late samples too."""
    tokens_per_correct: float | None
    """All generated tokens, a right sample; None where no sample is right."""


def score(summary: Summary) -> Score:
    """Score what ended by itself; failed samples are counted apart.

    Raises:
        DataError: no sample ended by itself.
    """
    questions = [question for question in summary.questions if question.whole]
    if not questions:
        raise DataError(f"run {summary.run_id} has no sample that ended, so nothing to score")
    most = max(len(question.whole) for question in questions)
    most_voters = max(len(question.voters) for question in questions)
    ks = sorted({*(2**n for n in range(most.bit_length())), most})
    states = [state for question in summary.questions for state in question.states]
    whole = [(question, n) for question in questions for n in question.whole]
    lengths = sorted(question.tokens[n] for question, n in whole)
    tokens = sum(sum(question.tokens) for question in summary.questions)
    num_correct = sum(question.correct[n] for question, n in whole)
    return Score(
        num_questions=len(summary.questions),
        num_samples=len(whole),
        num_failed=summary.num_failed,
        pass_at_1=pass_at_k(summary, 1),
        pass_at={k: pass_at_k(summary, k) for k in ks},
        majority_at={k: majority_at_k(summary, k) for k in ks if k <= most_voters},
        questions_at={k: sum(len(question.whole) >= k for question in questions) for k in ks},
        answered=estimate([float(question.answer_correct) for question in summary.questions]),
        truncated=states.count(SampleState.TRUNCATED) / len(whole),
        answerless=sum(question.group[n] is None for question, n in whole) / len(whole),
        aborted=states.count(SampleState.ABORTED) / len(states),
        mean_tokens=sum(lengths) / len(lengths),
        percentiles={percent: percentile(lengths, percent) for percent in PERCENTILES},
        tokens_per_question=tokens / len(summary.questions),
        tokens_per_correct=tokens / num_correct if num_correct else None,
    )


def pass_at_k(summary: Summary, k: int) -> Estimate:
    """Probability that of k samples at least one is right: 1 - C(n - c, k) / C(n, k), without bias
    (Chen et al., arXiv 2107.03374).

    Over the questions with at least k samples that ended by themselves, which are all unless the
    run is not complete or its program stops by itself; a program that stops where samples agree
    makes this a score of the questions that it found hard.
    """
    shares = []
    for question in _with(summary, k, lambda question: question.whole):
        n, c = len(question.whole), sum(question.correct[i] for i in question.whole)
        shares.append(1 - comb(n - c, k) / comb(n, k))
    return estimate(shares)


def majority_at_k(summary: Summary, k: int) -> Estimate:
    """Probability that the most frequent answer of k samples is right; ties go to the group with
    the earlier sample. Exact: the mean over all subsets of k samples (`winning_subsets`).

    Votes count alike, also where the program's own vote weighs them. Over the questions with at
    least k samples that had a vote.
    """
    shares = []
    for question in _with(summary, k, lambda question: question.voters):
        voters = question.voters
        groups = tuple(question.group[n] for n in voters)
        correct = tuple(question.correct[n] for n in voters)
        shares.append(winning_subsets(groups, correct)[k] / comb(len(voters), k))
    return estimate(shares)


@lru_cache(maxsize=4096)
def winning_subsets(groups: tuple[int | None, ...], correct: tuple[bool, ...]) -> tuple[int, ...]:
    """How many subsets of 0, 1, … of the samples answer rightly by their vote.

    Counted without listing them. A subset answers with the group that has v votes from sample f on
    if each other group has fewer than v, or v and begins after f; samples without an answer fill
    up. As polynomials in x, whose power is the size of the subset, the ways of all groups multiply.
    At x = 2^(n + 1), above any coefficient, an integer holds such a polynomial digit by digit.

    Args:
        groups: each sample's group, None for no answer, in the order of the samples.
        correct: whether each sample's answer is right; that of the group is its earliest one's.
    """
    bits = len(groups) + 1
    places: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if group is not None:
            places.setdefault(group, []).append(place)
    silent = (1 + (1 << bits)) ** groups.count(None)
    found = 0
    for group, members in places.items():
        others = [others for other, others in places.items() if other != group]
        for number, first in enumerate(members):
            if not correct[first]:
                continue
            num_later = len(members) - number - 1
            for votes in range(1, num_later + 2):
                ways = silent * comb(num_later, votes - 1)
                for other in others:
                    ways *= _losing(other, votes, first, bits)
                found += ways << (bits * votes)
    digit = (1 << bits) - 1
    return tuple((found >> (bits * k)) & digit for k in range(len(groups) + 1))


def _losing(members: Sequence[int], votes: int, first: int, bits: int) -> int:
    """The ways of a group that loses to `votes` votes from `first` on, as digits of `bits` bits."""
    num_later = sum(place > first for place in members)
    return _fewer(len(members), votes, bits) + (comb(num_later, votes) << (bits * votes))


@lru_cache(maxsize=65_536)
def _fewer(count: int, votes: int, bits: int) -> int:
    """The ways to take 0, 1, … but fewer than `votes` of `count`."""
    return sum(comb(count, size) << (bits * size) for size in range(min(votes, count + 1)))


def _with(
    summary: Summary, k: int, samples: Callable[[QuestionResult], Sequence[int]]
) -> Iterable[QuestionResult]:
    """The questions with at least k samples.

    Raises:
        DataError: there is none.
    """
    found = [question for question in summary.questions if len(samples(question)) >= k > 0]
    if not found:
        raise DataError(f"run {summary.run_id} has no question with {k} samples")
    return found


def estimate(per_question: Sequence[float]) -> Estimate:
    """The mean with a standard error clustered by question.

    Samples of one question are not independent, so the spread is taken between questions.
    """
    count = len(per_question)
    mean = math.fsum(per_question) / count
    if count < 2:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in per_question) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, interpolated between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
