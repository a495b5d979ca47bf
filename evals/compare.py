"""Two runs over the same questions, pure: what is different, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from lim_sglang.errors import DataError
from lim_sglang.evals.summary import QuestionResult, Summary

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
POLICY = ("policy", "budget", "ranking", "recent_ratio", "sinks", "select_layers")
"""Conditions that are compared on purpose."""
PROVENANCE = ("date", "commit", "seed")
"""Conditions that may differ without a word."""
NAMES_SHOWN = 5
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Interval:
    """A value and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether it is all on one side."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class McNemar:
    """The exact test on questions that one run answers rightly and the other does not."""

    only_a: int
    only_b: int
    p: float
    """Two-sided, by the binomial distribution; at most its level where there is no difference."""


@dataclass(frozen=True)
class Comparison:
    """Run b against run a, question by question."""

    a: str
    """Name of the run that is compared with."""
    b: str
    num_questions: int
    difference: Interval
    """Of pass@1, b - a, from -1 to 1."""
    mcnemar: McNemar
    """On the answers that the runs' votes gave."""
    length_ratio: Interval
    """Mean tokens of a sample, b / a."""
    other_differences: tuple[str, ...]
    """Conditions besides policy, date and commit that are not the same."""
    sentence: str
    """What the data do and do not support."""


def compare(
    a: Summary,
    b: Summary,
    *,
    names: tuple[str, str] | None = None,
    common: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two runs of the same questions.

    Args:
        names: what the sentence calls them; their policies if None.
        common: compare the questions that both have, where the runs differ in them.
        seed: of the bootstrap.

    Raises:
        DataError: the tasks or the questions differ, or fewer than two questions are shared.
    """
    pairs = _pairs(a, b, common=common)
    name_a, name_b = names or (name_of(a.conditions), name_of(b.conditions))
    shares = [(_share(x), _share(y)) for x, y in pairs]
    lengths = [(_mean_length(x), _mean_length(y)) for x, y in pairs]
    difference, ratio = bootstrap(shares, lengths, seed=seed, resamples=resamples)
    return Comparison(
        a=name_a,
        b=name_b,
        num_questions=len(pairs),
        difference=difference,
        mcnemar=mcnemar([(x.answer_correct, y.answer_correct) for x, y in pairs]),
        length_ratio=ratio,
        other_differences=tuple(_other_differences(a.conditions, b.conditions)),
        sentence=sentence(name_a, name_b, difference, ratio),
    )


def bootstrap(
    shares: Sequence[tuple[float, float]],
    lengths: Sequence[tuple[float, float]],
    *,
    seed: int,
    resamples: int,
) -> tuple[Interval, Interval]:
    """Intervals by resampling whole questions: of the mean difference, and of the ratio of means.

    Percentiles of the resampled values, their distance from the estimate widened by
    t / z · sqrt(n / (n - 1)): a bare percentile interval is too narrow for few questions. The ratio
    is treated on a logarithmic scale. `tests/unit/test_evals_coverage.py` measures the coverage.

    Args:
        shares: of a and b in each question: right samples.
        lengths: of a and b in each question: mean tokens.
    """
    import numpy as np
    from scipy.stats import t

    n = len(shares)
    generator = np.random.default_rng(seed)
    right, tokens = np.array(shares, float), np.array(lengths, float)
    values = np.column_stack([right[:, 1] - right[:, 0], tokens])
    means = np.empty((resamples, 3))
    block = max(1, 4_000_000 // n)  # drawn at once: 32 MB
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, n, size=(size, n))
        means[start : start + size] = values[drawn].mean(axis=1)
    two_sided = (1 + LEVEL) / 2
    widen = t.ppf(two_sided, n - 1) / NormalDist().inv_cdf(two_sided) * math.sqrt(n / (n - 1))
    mean, mean_a, mean_b = values.mean(axis=0)
    if min(mean_a, mean_b) <= 0:
        raise DataError("a run without any token has no length to compare")
    log_ratio = math.log(mean_b / mean_a)
    ratios = np.log(means[:, 2]) - np.log(means[:, 1])
    low, high = _widened(means[:, 0], mean, widen)
    ratio_low, ratio_high = _widened(ratios, log_ratio, widen)
    return (
        Interval(float(mean), max(low, -1.0), min(high, 1.0)),
        Interval(math.exp(log_ratio), math.exp(ratio_low), math.exp(ratio_high)),
    )


def _widened(drawn: "NDArray[Any]", value: float, widen: float) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(value + (low - value) * widen), float(value + (high - value) * widen)


def mcnemar(answers: Sequence[tuple[bool, bool]]) -> McNemar:
    """Whether answers that are right in one run only are as often a's as b's (McNemar, 1947).

    Args:
        answers: for each question, whether a's and b's are right.
    """
    only_a = sum(x and not y for x, y in answers)
    only_b = sum(y and not x for x, y in answers)
    count, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count
    return McNemar(only_a, only_b, min(1.0, 2 * tail))


def sentence(a: str, b: str, difference: Interval, ratio: Interval) -> str:
    """What the data do and do not support, in one sentence."""
    points = 100 * difference.value
    found = (
        f"{b} is right in {abs(points):.1f} points {'more' if points > 0 else 'fewer'} of its "
        f"samples than {a} (95 % interval {_signed(difference.low)} to {_signed(difference.high)})"
    )
    if difference.excludes_zero:
        shown = f"a {'gain' if points > 0 else 'loss'} that chance does not explain"
    else:
        loss, gain = max(0.0, -difference.low), max(0.0, difference.high)
        shown = (
            "no difference is shown, and the data exclude a loss of more than "
            f"{100 * loss:.1f} points and a gain of more than {100 * gain:.1f}"
        )
    length = (
        f"its samples are {ratio.value:.2f} times as long ({ratio.low:.2f} to {ratio.high:.2f})"
    )
    return f"{found}: {shown}; {length}."


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", MINUS)


def name_of(conditions: Mapping[str, Any]) -> str:
    """`full`, `lessismore-256`, or what else answered."""
    budget = conditions.get("budget")
    return f"{conditions['policy']}-{budget}" if budget else str(conditions["policy"])


def _share(question: QuestionResult) -> float:
    share = question.share_correct
    return 0.0 if share is None else share


def _mean_length(question: QuestionResult) -> float:
    whole = question.whole
    return sum(question.tokens[n] for n in whole) / len(whole) if whole else 0.0


def _pairs(a: Summary, b: Summary, *, common: bool) -> list[tuple[QuestionResult, QuestionResult]]:
    """The same question in both, in a's order; only those with samples that ended."""
    if a.conditions["task"] != b.conditions["task"]:
        raise DataError(
            f"{a.run_id} is of {a.conditions['task']} and {b.run_id} of {b.conditions['task']}: "
            "compare runs of one task"
        )
    of_a = {question.question_id: question for question in a.questions if question.whole}
    of_b = {question.question_id: question for question in b.questions if question.whole}
    lonely = [name for name in {**of_a, **of_b} if name not in of_a or name not in of_b]
    same_text = a.conditions.get("questions") == b.conditions.get("questions")
    if not common and (lonely or not same_text):
        shown = ", ".join(lonely[:NAMES_SHOWN]) + (", …" if len(lonely) > NAMES_SHOWN else "")
        reason = (
            f"{len(lonely)} questions are in one only: {shown}" if lonely else "their texts differ"
        )
        raise DataError(
            f"{a.run_id} and {b.run_id} have other questions ({reason}); complete the runs, or "
            "compare what both have with --common"
        )
    pairs = [(question, of_b[name]) for name, question in of_a.items() if name in of_b]
    if len(pairs) < 2:
        raise DataError(
            f"{a.run_id} and {b.run_id} share {len(pairs)} questions; an interval needs two"
        )
    return pairs


def _other_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    skipped = (*POLICY, *PROVENANCE)
    names = [name for name in {**a, **b} if name not in skipped]
    return [
        f"{name}: {a.get(name)!r} and {b.get(name)!r}"
        for name in names
        if a.get(name) != b.get(name)
    ]
