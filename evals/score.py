"""Scores of a run, pure: from graded samples to numbers with their standard errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lim_sglang.errors import DataError
from lim_sglang.evals.records import GradedSample
from lim_sglang.programs.records import SampleState
from lim_sglang.programs.vote import tally

Same = Callable[[str, str], bool]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error."""

    value: float
    error: float | None
    """None where one question alone cannot show any spread."""


@dataclass(frozen=True)
class Score:
    """What a run's finished samples say. Rates are shares of the samples, from 0 to 1."""

    num_questions: int
    num_samples: int
    pass_at_1: Estimate
    """Mean over questions of the mean over their samples."""
    majority: Estimate
    """Share of questions whose most frequent answer is right."""
    truncated: float
    answerless: float
    mean_tokens: float


def score_samples(samples: Sequence[GradedSample], same: Same) -> Score:
    """Score what is finished; failed samples are no part of `samples`.

    Args:
        same: whether two answers share a vote.

    Raises:
        DataError: there is no sample.
    """
    if not samples:
        raise DataError("no sample is finished, so there is nothing to score")
    questions = list(by_question(samples).values())
    return Score(
        num_questions=len(questions),
        num_samples=len(samples),
        pass_at_1=estimate([_mean([g.correct for g in group]) for group in questions]),
        majority=estimate([float(majority_is_right(group, same)) for group in questions]),
        truncated=_mean([g.sample.state is SampleState.TRUNCATED for g in samples]),
        answerless=_mean([g.sample.answer is None for g in samples]),
        mean_tokens=_mean([g.sample.num_tokens for g in samples]),
    )


def by_question(samples: Sequence[GradedSample]) -> dict[str, list[GradedSample]]:
    """The samples of each question by index, so that nothing depends on who finished first."""
    groups: dict[str, list[GradedSample]] = {}
    for graded in sorted(samples, key=lambda g: g.sample.index):
        groups.setdefault(graded.question_id, []).append(graded)
    return groups


def majority_is_right(group: Sequence[GradedSample], same: Same) -> bool:
    """Whether the answer that most samples of one question gave is right; no vote is wrong."""
    winner = tally([graded.sample for graded in group], same).winner
    return winner is not None and any(g.correct for g in group if g.sample.answer == winner)


def estimate(per_question: Sequence[float]) -> Estimate:
    """The mean with a standard error clustered by question.

    Samples of one question are not independent, so the spread is taken between questions.
    """
    count = len(per_question)
    mean = _mean(per_question)
    if count < 2:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in per_question) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
