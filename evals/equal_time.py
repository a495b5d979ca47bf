"""Votes at equal time: as many samples of each of two runs as take the same seconds. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import (
    RESAMPLES,
    Interval,
    distinct_names,
    mean_difference,
    mean_seconds,
    uneven_seconds,
)
from lim_sglang.evals.metrics import (
    QuestionResult,
    Summary,
    majority_share,
    stops_early,
)
from lim_sglang.evals.pairing import paired_questions

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Samples of the reference run whose time is compared."""


@dataclass(frozen=True)
class EqualTime:
    """The votes of two runs in the time of some samples of the first."""

    seconds: float
    """Time of the samples of run a one after the other, on a server that works on as many requests
    at a time as it did in the run."""
    samples_a: int
    samples_b: int
    """Most samples of run b that take no longer."""
    majority_a: float
    """Mean over questions of maj@k, exact over all subsets of the samples."""
    majority_b: float
    difference: Interval
    """b - a, from -1 to 1."""


def equal_times(
    a: Summary, b: Summary, *, common: bool = False, seed: int = 0, resamples: int = RESAMPLES
) -> list[EqualTime]:
    """Compare the votes of two runs of the same questions second by second.

    Both servers had the same number of requests at a time, so a sample that takes half the seconds
    leaves room for two. Only counts are compared that both runs can draw from their samples.

    Args:
        common: compare the questions that both runs have, even if either has others.
        seed: of the intervals' resampling.

    Raises:
        DataError: the runs' seconds do not compare, a program stops early, which makes its samples
            a biased selection, or no question has samples in both runs.
    """
    names = dict(zip(distinct_names((a, b)), (a.conditions, b.conditions), strict=True))
    early = [name for name, conditions in names.items() if stops_early(conditions)]
    pairs = [(x, y) for x, y in paired_questions(a, b, common=common) if x.voters and y.voters]
    if not pairs:
        raise DataError(f"{a.label} and {b.label} share no question with completed samples")
    if early:
        reason = f"{early[0]} stops early, so that the samples that it took are a biased selection"
    elif not all(question.seconds for pair in pairs for question in pair):
        reason = "a run did not record its samples' seconds"
    else:
        reason = uneven_seconds(names)
    if reason:
        raise DataError(f"no votes at equal time: {reason}")
    questions = ([x for x, _ in pairs], [y for _, y in pairs])
    seconds_a, seconds_b = (fmean(map(mean_seconds, run)) for run in questions)
    most_a, most_b = (min(len(question.voters) for question in run) for run in questions)
    found = []
    for count in takewhile(lambda count: count <= most_a, COUNTS):
        seconds = count * seconds_a
        other = int(seconds / seconds_b + 1e-9)  # a quotient of equal means may fall short of one
        if other > most_b:
            break
        if other:
            found.append(_votes(pairs, seconds, (count, other), seed=seed, resamples=resamples))
    if not found:
        raise DataError(
            f"no votes at equal time: a sample of {a.label} takes {seconds_a:,.1f} s, in which the "
            f"{most_b} samples a question of {b.label}, {seconds_b:,.1f} s each, do not fit or do "
            "not last: draw more samples of the faster run, or name the slower run first"
        )
    return found


def _votes(
    pairs: Sequence[tuple[QuestionResult, QuestionResult]],
    seconds: float,
    counts: tuple[int, int],
    **bootstrap: int,
) -> EqualTime:
    """Compare the votes of a number of samples of each run."""
    shares_a, shares_b = (
        [majority_share(question, count) for question in run]
        for run, count in zip(zip(*pairs, strict=True), counts, strict=True)
    )
    differences = [y - x for x, y in zip(shares_a, shares_b, strict=True)]
    difference = mean_difference(differences, **bootstrap)
    return EqualTime(seconds, *counts, fmean(shares_a), fmean(shares_b), difference)
