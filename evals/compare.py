"""Two runs over the same questions: what is different, and how sure that is. Pure.

Intervals resample whole questions (bootstrap), since samples of one question are not independent;
McNemar's exact test compares the votes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from lim_sglang.errors import DataError
from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.evals.run_config import SAMPLE_BY_SAMPLE
from lim_sglang.evals.run_store import differences

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
FEW = 10
"""Questions of which at least so many have to differ before their spread speaks for all others."""
BLOCK = 2_000_000
"""Drawn questions that are held at once: 16 MB."""


def mean_interval(values: Sequence[float], *, seed: int, resamples: int) -> tuple[float, float]:
    """Where the mean of all questions lies, by the percentiles of resampled means.

    Their distance from the mean is widened by t / z · sqrt(n / (n - 1)), since bare percentiles are
    too close for few questions. Where fewer than `FEW` questions differ, others that would were
    hardly seen, and resampling what was seen is blind to them: two made-up questions, as far to
    either side as the furthest that was seen, stand in for these, after Bonett and Price (2012,
    Journal of Educational and Behavioral Statistics 37, 479-488), who do so with pairs of verdicts.

    `tests/evals/test_statistics.py` measures how often the truth is inside.

    Args:
        values: what is different in each question, from -1 to 1.
    """
    import numpy as np

    seen = np.asarray(values, float)
    if np.count_nonzero(seen) < FEW:
        furthest = float(np.abs(seen).max()) or 1.0
        seen = np.append(seen, [furthest, -furthest])
    drawn = resampled_means(seen[:, None], seed=seed, resamples=resamples)[:, 0]
    low, high = _widened(drawn, float(seen.mean()), len(seen))
    return max(-1.0, low), min(1.0, high)


def ratio_interval(
    a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int
) -> tuple[float, float]:
    """Where the ratio of the means, b / a, lies: as above, on a logarithmic scale.

    Studentised resamples cover no better where lengths are as skewed as those of samples.

    Args:
        a: of each question, above zero.
        b: of the same questions, likewise.
    """
    import numpy as np

    pairs = np.column_stack([a, b]).astype(float)
    drawn = np.log(resampled_means(pairs, seed=seed, resamples=resamples))
    mean_a, mean_b = np.log(pairs.mean(axis=0))
    low, high = _widened(drawn[:, 1] - drawn[:, 0], float(mean_b - mean_a), len(pairs))
    return math.exp(low), math.exp(high)


def resampled_means(values: "NDArray[Any]", *, seed: int, resamples: int) -> "NDArray[Any]":
    """Means over as many questions as there are, drawn with replacement.

    Args:
        values: [questions, columns].

    Returns:
        [resamples, columns].
    """
    import numpy as np

    n, columns = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, columns))
    block = max(1, BLOCK // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, n, size=(size, n))
        for column in range(columns):
            means[start : start + size, column] = values[:, column][drawn].mean(axis=1)
    return means


def _widened(drawn: "NDArray[Any]", value: float, n: int) -> tuple[float, float]:
    """The middle `LEVEL` of what was drawn from n questions, further from the value."""
    import numpy as np
    from scipy.special import stdtrit

    two_sided = (1 + LEVEL) / 2
    t = stdtrit(n - 1, two_sided)  # of Student's distribution with n - 1 degrees of freedom
    widen = t / NormalDist().inv_cdf(two_sided) * math.sqrt(n / (n - 1))
    low, high = np.quantile(drawn, [1 - two_sided, two_sided])
    return float(value + (low - value) * widen), float(value + (high - value) * widen)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """How likely counts as uneven as these are where neither is favoured: McNemar's test (1947),
    two-sided and exact, by the binomial distribution.

    At most a share p of runs without a difference has a p-value up to p.
    """
    count, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)


RESAMPLES = 10_000
LAYERS = ("dense_layers", "select_layers")
POLICY = ("policy", "budget", "ranking", "recent_ratio", "sinks", *LAYERS)
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
    """Two-sided; at most its level where there is no difference."""


@dataclass(frozen=True)
class Comparison:
    """Run b against run a, question by question."""

    a: str
    """Name of the run that is compared with."""
    b: str
    num_questions: int
    difference: Interval
    """Of pass@1, b - a, from -1 to 1, over the questions with a sample that ended in both."""
    answers: Interval
    """Of the share of questions that the runs' votes answer rightly, b - a."""
    mcnemar: McNemar
    """On the same answers."""
    length_ratio: Interval
    """Mean over questions of the mean tokens of a sample that ended, b / a."""
    spent_ratio: Interval
    """Tokens a question, with all that was aborted or late, b / a."""
    stops_by_itself: bool
    """Whether a program decided how many samples a question has. Its samples are then no fair ones,
    as it has few where they agree, and may only have kept the short: its answers speak for it."""
    other_differences: tuple[str, ...]
    """Conditions that are not the same, but for those of the policy, date, commit and seed."""
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
        names: what the sentence calls them; `names_of` both if None.
        common: compare the questions that both have, where the runs differ in them.
        seed: of the resampling, with 95 % intervals by `mean_interval` and `ratio_interval`.

    Raises:
        DataError: the tasks or the questions differ, or fewer than two questions are shared.
    """
    pairs = _pairs(a, b, common=common)
    ended = [(x, y) for x, y in pairs if x.whole and y.whole]
    if len(ended) < 2:
        raise DataError(
            f"{a.run_id} and {b.run_id} share {len(ended)} questions with samples that ended; "
            "an interval needs two"
        )
    name_a, name_b = names or names_of((a, b))
    how = {"seed": seed, "resamples": resamples}
    programs = {str(each.conditions.get("program", "majority")) for each in (a, b)}
    stops_by_itself = not programs <= set(SAMPLE_BY_SAMPLE)
    difference = _difference(ended, _share, **how)
    answers = _difference(pairs, lambda question: question.answer_correct, **how)
    length, spent = _ratio(ended, _mean_length, **how), _ratio(pairs, _spent, **how)
    said = (answers, spent) if stops_by_itself else (difference, length)
    return Comparison(
        a=name_a,
        b=name_b,
        num_questions=len(pairs),
        difference=difference,
        answers=answers,
        mcnemar=mcnemar([(x.answer_correct, y.answer_correct) for x, y in pairs]),
        length_ratio=length,
        spent_ratio=spent,
        stops_by_itself=stops_by_itself,
        other_differences=tuple(_other_differences(a.conditions, b.conditions)),
        sentence=sentence(name_a, name_b, *said, of_answers=stops_by_itself),
    )


def mcnemar(answers: Sequence[tuple[bool, bool]]) -> McNemar:
    """Whether answers that are right in one run only are as often a's as b's.

    Args:
        answers: for each question, whether a's and b's are right.
    """
    only_a = sum(x and not y for x, y in answers)
    only_b = sum(y and not x for x, y in answers)
    return McNemar(only_a, only_b, mcnemar_p(only_a, only_b))


def sentence(
    a: str, b: str, difference: Interval, ratio: Interval, *, of_answers: bool = False
) -> str:
    """What the data do and do not support, in one sentence.

    Args:
        difference: of pass@1, or of the answers.
        ratio: of the length of samples, or of the tokens of questions.
    """
    size = f"{100 * abs(difference.value):.1f}"
    amount, than = f"{size} points {'more' if difference.value > 0 else 'fewer'}", "than"
    if size == "0.0":
        amount, than = "as many", "as"
    if of_answers:
        found = f"{b} answers {amount} questions rightly {than} {a}"
    else:
        found = f"{b} is right in {amount} of its samples {than} {a}"
    within = f"95 % interval {_signed(difference.low)} to {_signed(difference.high)}"
    return f"{found} ({within}): {_shown(difference)}; {_longer(ratio, of_answers=of_answers)}."


def _shown(difference: Interval) -> str:
    if difference.excludes_zero:
        return f"the data show a {'gain' if difference.value > 0 else 'loss'}"
    return (
        "the data do not show a difference, and exclude a loss of more than "
        f"{100 * max(0.0, -difference.low):.1f} points and a gain of more than "
        f"{100 * max(0.0, difference.high):.1f}"
    )


def _longer(ratio: Interval, *, of_answers: bool) -> str:
    times = f"{ratio.value:.2f} times as"
    within = f"({ratio.low:.2f} to {ratio.high:.2f})"
    if of_answers:
        return f"it spends {times} many tokens a question {within}"
    return f"its samples are {times} long {within}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", MINUS)


def names_of(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """What to call runs that are compared: their policies, or the next that tells them apart."""
    ways: tuple[Callable[[Summary], str], ...] = (
        lambda run: name_of(run.conditions),
        lambda run: f"{name_of(run.conditions)} {run.conditions.get('program')}",
        lambda run: f"{run.conditions.get('model')} {name_of(run.conditions)}",
        lambda run: run.run_id,
    )
    for way in ways:
        names = tuple(map(way, summaries))
        if len(set(names)) == len(names):
            return names
    return tuple(f"{name} ({n})" for n, name in enumerate(names, start=1))


def name_of(conditions: Mapping[str, Any]) -> str:
    """`full`, `lessismore-256`, or what else answered."""
    budget = conditions.get("budget")
    return f"{conditions['policy']}-{budget}" if budget else str(conditions["policy"])


Pairs = Sequence[tuple[QuestionResult, QuestionResult]]
"""The same question in both runs."""


def _difference(pairs: Pairs, of: Callable[[QuestionResult], float], **how: int) -> Interval:
    values = [of(y) - of(x) for x, y in pairs]
    return Interval(math.fsum(values) / len(values), *mean_interval(values, **how))


def _ratio(pairs: Pairs, of: Callable[[QuestionResult], float], **how: int) -> Interval:
    a, b = ([of(question) for question in run] for run in zip(*pairs, strict=True))
    return Interval(math.fsum(b) / math.fsum(a), *ratio_interval(a, b, **how))


def _share(question: QuestionResult) -> float:
    return question.share_correct or 0.0


def _mean_length(question: QuestionResult) -> float:
    return _counted(sum(question.tokens[n] for n in question.whole) / len(question.whole))


def _spent(question: QuestionResult) -> float:
    return _counted(sum(question.tokens))


def _counted(tokens: float) -> float:
    """At least the one that a sample ends with, so that there is a ratio."""
    return max(tokens, 1.0)


def _pairs(a: Summary, b: Summary, *, common: bool) -> Pairs:
    """The questions that have samples in both, in a's order."""
    if a.conditions["task"] != b.conditions["task"]:
        raise DataError(
            f"{a.run_id} is of {a.conditions['task']} and {b.run_id} of {b.conditions['task']}: "
            "compare runs of one task"
        )
    of_a = {question.question_id: question for question in a.questions}
    of_b = {question.question_id: question for question in b.questions}
    lonely = [name for name in {**of_a, **of_b} if name not in of_a or name not in of_b]
    same_text = a.conditions.get("questions") == b.conditions.get("questions")
    if not common and (lonely or not same_text):
        shown = ", ".join(lonely[:NAMES_SHOWN]) + (", …" if len(lonely) > NAMES_SHOWN else "")
        reason = (
            f"{len(lonely)} are in one only: {shown}" if lonely else "their digests are not equal"
        )
        raise DataError(
            f"{a.run_id} and {b.run_id} have other questions ({reason}); complete the runs, or "
            "compare what both have with --common"
        )
    return [(question, of_b[name]) for name, question in of_a.items() if name in of_b]


def _other_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for found in differences(a, b):
        if found.name.partition(".")[0] not in (*POLICY, *PROVENANCE):
            yield f"{found.name}: {_brief(found.old)} and {_brief(found.new)}"


def _brief(value: object) -> str:
    """A digest by its beginning, all else as it is."""
    return repr(value[:8] + "…" if isinstance(value, str) and len(value) == 64 else value)
