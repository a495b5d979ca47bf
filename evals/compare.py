"""Two runs over the same questions: differences with 95 % intervals, and McNemar's test. Pure.

Intervals resample whole questions (bootstrap), since samples of one question are not independent;
McNemar's exact test compares the votes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

from lim_sglang.errors import DataError
from lim_sglang.evals.metrics import (
    MIN_QUESTIONS,
    PastBudget,
    QuestionResult,
    Summary,
    count_past_budget,
    has_majority,
    stops_early,
)
from lim_sglang.evals.pairing import (
    Pairs,
    are_published,
    ask_the_same,
    paired_questions,
    unpaired,
)
from lim_sglang.evals.settings import differences
from lim_sglang.markdown_section import counted, join_words
from lim_sglang.policies import POLICIES
from lim_sglang.programs.schema import SampleState

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
FEW_DIFFERENT = 10
"""Fewest differing questions whose spread is taken for the spread of all questions."""
MUCH = 0.1
"""Least difference between the runs' shares of samples without an answer that is pointed out."""
BLOCK = 2_000_000
"""Most resampled question indices in memory at once: 16 MB."""


def mean_interval(values: Sequence[float], *, seed: int, resamples: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean over questions, by percentiles of resampled means.

    The percentiles' distance from the mean is widened by t / z · sqrt(n / (n - 1)), since bare
    percentiles are too narrow for few questions. If fewer than `FEW_DIFFERENT` questions differ,
    resampling underestimates the differences that were not seen. Two pseudo-observations, as far to
    either side as the largest difference seen, then stand in for these, after Bonett and Price
    (2012, Journal of Educational and Behavioral Statistics 37, 479-488), who add them to pairs of
    verdicts.

    `tests/evals/test_compare.py` measures the coverage of the interval by simulation.

    Args:
        values: difference in each question, from -1 to 1.
        seed: of the resampling.
    """
    import numpy as np

    observed = np.asarray(values, float)
    if np.count_nonzero(observed) < FEW_DIFFERENT:
        furthest = float(np.abs(observed).max()) or 1.0
        observed = np.append(observed, [furthest, -furthest])
    means = resampled_means(observed[:, None], seed=seed, resamples=resamples)[:, 0]
    low, high = _widened_interval(means, float(observed.mean()), len(observed))
    return max(-1.0, low), min(1.0, high)


def ratio_interval(
    a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int
) -> tuple[float, float]:
    """Return the 95 % interval of mean(b) / mean(a): as `mean_interval`, on a logarithmic scale.

    Studentised resamples cover no better for distributions as skewed as the lengths of samples.

    Args:
        a: positive value of each question.
        b: positive values of the same questions.
        seed: of the resampling.
    """
    import numpy as np

    pairs = np.column_stack([a, b]).astype(float)
    means = np.log(resampled_means(pairs, seed=seed, resamples=resamples))
    mean_a, mean_b = np.log(pairs.mean(axis=0))
    low, high = _widened_interval(means[:, 1] - means[:, 0], float(mean_b - mean_a), len(pairs))
    return math.exp(low), math.exp(high)


def resampled_means(values: "NDArray[Any]", *, seed: int, resamples: int) -> "NDArray[Any]":
    """Return the means of bootstrap resamples: n of n questions, drawn with replacement.

    Args:
        values: [n questions, columns].

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
        indices = generator.integers(0, n, size=(size, n))
        for column in range(columns):
            means[start : start + size, column] = values[:, column][indices].mean(axis=1)
    return means


def _widened_interval(means: "NDArray[Any]", center: float, n: int) -> tuple[float, float]:
    """Return the middle `LEVEL` of resampled means of n questions, widened around the center."""
    import numpy as np
    from scipy.special import stdtrit

    upper = (1 + LEVEL) / 2
    t = stdtrit(n - 1, upper)  # quantile of Student's distribution with n - 1 degrees of freedom
    widen = t / NormalDist().inv_cdf(upper) * math.sqrt(n / (n - 1))
    low, high = np.quantile(means, [1 - upper, upper])
    return float(center + (low - center) * widen), float(center + (high - center) * widen)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (1947), by the binomial distribution.

    The p-value is the probability of counts at least as uneven if neither run is better. The test
    is conservative: without a difference, at most a share p of all tests has a p-value up to p.

    Args:
        only_a: questions that run a alone answers correctly.
        only_b: questions that run b alone answers correctly.
    """
    count, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)


POLICY = (
    *("policy", "budget", "ranking", "recent_ratio", "sinks", "shared_by"),
    *("draft_tokens", "dense_layers", "select_layers", "pick_layers"),
)
"""Conditions that are compared on purpose."""
PROVENANCE = ("date", "commit", "seed", "requests_by_session")
"""Conditions whose differences need no warning; that of the sessions is the note on seconds."""
SELECTION = ("benchmark", "questions")
"""Digests of a file and of the questions asked, in place of which the questions are named."""
DESCRIBED = {
    "concurrency": "most requests at a time (the lower of --concurrency and the servers' limit)"
}
"""Conditions whose names do not say what they are."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float | None = None
    """None, as `high`, for fewer than `MIN_QUESTIONS` questions."""
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of the interval, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def excludes_zero(self) -> bool:
        """True if there is an interval, and all of it lies on one side of zero."""
        low, high = self.bounds or (0.0, 0.0)
        return low > 0 or high < 0


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test on the questions that only one of the two runs answers correctly."""

    only_a: int
    only_b: int
    p: float
    """Two-sided."""


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run in a comparison, over the compared questions."""

    completed: int = 0
    """Samples that finished or reached the token limit."""
    failed: int = 0
    """Samples of the whole run that the server failed: they are part of no figure."""
    gap: str = ""
    """See `Summary.gap`."""
    pass_at_1: float = 0.0
    """Over the questions with completed samples in both runs, as all means over questions."""
    right_votes: float = 0.0
    """Share of the questions that the run's vote answers correctly."""
    no_answer: float = 0.0
    """Share of the completed samples; a sample that was cut off may have no answer, too."""
    cut_off: float = 0.0
    """Share of the completed samples that reached the token limit."""
    mean_tokens: float = 0.0
    """Mean over questions of the mean tokens of a completed sample."""
    tokens_per_question: float = 0.0
    """Generated tokens, those of aborted and late samples included."""
    mean_seconds: float | None = None
    """As `mean_tokens`: seconds from a sample's request to its end; None: not recorded."""


@dataclass(frozen=True)
class Comparison:
    """Run b against run a, question by question."""

    a: str
    """Name of the reference run."""
    b: str
    num_questions: int
    difference: Interval
    """pass@1 of b - a, from -1 to 1, over the questions with completed samples in both runs."""
    answers: Interval
    """Share of questions that the run's vote answers correctly, b - a."""
    mcnemar: McNemar
    """Test of the same votes."""
    length_ratio: Interval
    """Mean over questions of the mean tokens of a completed sample, b / a."""
    spent_ratio: Interval
    """Generated tokens a question, those of aborted and late samples included, b / a."""
    stops_by_itself: bool
    """True if the program of either run stops early. Its samples are a biased selection: few where
    they agree, and perhaps the short ones only. The votes then speak for the run."""
    other_differences: tuple[str, ...]
    """Differing conditions other than policy, date, commit and seed."""
    past_budget_a: PastBudget | None = None
    past_budget_b: PastBudget | None = None
    figures_a: RunFigures = RunFigures()
    figures_b: RunFigures = RunFigures()
    seconds_ratio: Interval | None = None
    """Mean over questions of the mean seconds of a completed sample, b / a; None: a run did not
    record them, or `uneven_seconds` says why they do not compare."""
    uneven_seconds: str = ""
    """See the function `uneven_seconds`; empty, too, where a run did not record seconds."""
    has_majority: bool = True
    """False: the votes of a run are of two samples, so that `answers` and `mcnemar` say nothing."""

    @property
    def has_failures(self) -> bool:
        """True if samples of either run failed, so that those left are a biased selection."""
        return bool(self.figures_a.failed or self.figures_b.failed)

    @property
    def answers_differ_in_number(self) -> bool:
        """True if one run has far more samples without an answer than the other."""
        return abs(self.figures_b.no_answer - self.figures_a.no_answer) >= MUCH

    @property
    def reads_everything(self) -> bool:
        """True if either run has a budget and no sample of both grew past it: the comparison says
        nothing about sparse attention.
        """
        sparse = [each for each in (self.past_budget_a, self.past_budget_b) if each]
        return bool(sparse) and all(each.is_none for each in sparse)

    @property
    def headline_difference(self) -> Interval:
        """Difference of pass@1, or of the votes if either program stops early."""
        return self.answers if self.stops_by_itself else self.difference

    @property
    def headline_ratio(self) -> Interval:
        """Ratio of the sample lengths, or of tokens a question if either program stops early."""
        return self.spent_ratio if self.stops_by_itself else self.length_ratio


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
        names: of both runs; None: by `distinct_names`.
        common: compare the questions that both runs have, even if either has others.
        seed: of the resampling.

    Raises:
        DataError: the tasks or the questions differ, or no question can be compared.
    """
    pairs = paired_questions(a, b, common=common)
    completed = [(x, y) for x, y in pairs if x.completed and y.completed]
    if not completed:
        raise DataError(f"{a.label} and {b.label} share no question with completed samples")
    name_a, name_b = names or distinct_names((a, b))
    bootstrap = {"seed": seed, "resamples": resamples}
    has_seconds = all(question.seconds for pair in completed for question in pair)
    uneven = uneven_seconds({name_a: a.conditions, name_b: b.conditions}) if has_seconds else ""
    verdicts = [(x.answer_correct, y.answer_correct) for x, y in pairs]
    only_a = sum(x and not y for x, y in verdicts)
    only_b = sum(y and not x for x, y in verdicts)
    return Comparison(
        a=name_a,
        b=name_b,
        num_questions=len(pairs),
        difference=_difference(completed, _share_correct, **bootstrap),
        answers=_difference(pairs, lambda q: q.answer_correct, **bootstrap),
        mcnemar=McNemar(only_a, only_b, mcnemar_p(only_a, only_b)),
        length_ratio=_ratio(completed, _mean_tokens, **bootstrap),
        spent_ratio=_ratio(pairs, lambda q: sum(q.tokens), **bootstrap),
        seconds_ratio=(
            _ratio(completed, mean_seconds, **bootstrap) if has_seconds and not uneven else None
        ),
        uneven_seconds=uneven,
        stops_by_itself=stops_early(a.conditions) or stops_early(b.conditions),
        other_differences=(
            *_other_questions(a, b, pairs),
            *_other_differences(a.conditions, b.conditions),
            *_other_references(a, b, pairs),
            *_other_seeds(pairs),
        ),
        past_budget_a=count_past_budget(replace(a, questions=tuple(x for x, _ in pairs))),
        past_budget_b=count_past_budget(replace(b, questions=tuple(y for _, y in pairs))),
        figures_a=_figures(a, [x for x, _ in pairs], [x for x, _ in completed]),
        figures_b=_figures(b, [y for _, y in pairs], [y for _, y in completed]),
        has_majority=has_majority(a) and has_majority(b),
    )


def uneven_seconds(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why the seconds of some runs' samples do not compare; empty where they do.

    Seconds depend on the number of requests that a server works on at the same time. They compare
    where every run was sampled in one session, with the same number of requests.

    Args:
        runs: conditions by the run's name.
    """
    sessions = {name: conditions.get("requests_by_session") for name, conditions in runs.items()}
    resumed = [name for name, each in sessions.items() if each and len(each) > 1]
    unknown = [name for name, each in sessions.items() if not each]
    sent = {name: each[0] for name, each in sessions.items() if each}
    if resumed:
        why = f"{join_words(resumed)} {'were' if len(resumed) > 1 else 'was'} resumed"
    elif unknown:
        these = join_words(unknown) if sent else "the runs"
        were = "were" if len(unknown) > 1 else "was"
        why = f"no record says whether {these} {were} resumed"
    elif len(set(sent.values())) > 1:
        # The count first: a name may hold commas and numbers.
        each_sent = join_words(f"{count} ({name})" for name, count in sent.items())
        why = f"each server was sent at most {each_sent} requests at a time"
    else:
        return ""
    return f"seconds a sample do not compare, since they depend on the load: {why}"


def _figures(
    run: Summary, compared: Sequence[QuestionResult], completed: Sequence[QuestionResult]
) -> RunFigures:
    """Return a run's figures.

    Args:
        completed: those of the compared questions that have completed samples in both runs.
    """
    samples = [(question, n) for question in compared for n in question.completed]
    num_cut_off = sum(each.states[n] is SampleState.TRUNCATED for each, n in samples)
    return RunFigures(
        completed=len(samples),
        failed=run.num_failed,
        gap=run.gap,
        pass_at_1=fmean(map(_share_correct, completed)),
        right_votes=fmean(question.answer_correct for question in compared),
        no_answer=sum(each.group[n] is None for each, n in samples) / len(samples),
        cut_off=num_cut_off / len(samples),
        mean_tokens=fmean(map(_mean_tokens, completed)),
        tokens_per_question=fmean(sum(question.tokens) for question in compared),
        mean_seconds=(
            fmean(map(mean_seconds, completed)) if all(q.seconds for q in completed) else None
        ),
    )


def _difference(
    pairs: Pairs, measure: Callable[[QuestionResult], float], **bootstrap: int
) -> Interval:
    return mean_difference([measure(y) - measure(x) for x, y in pairs], **bootstrap)


def mean_difference(values: Sequence[float], **bootstrap: int) -> Interval:
    """Return the mean difference over questions, with its interval where they are enough.

    Args:
        values: difference in each question, from -1 to 1.
        bootstrap: `seed` and `resamples`.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < MIN_QUESTIONS:
        return Interval(mean)
    return Interval(mean, *mean_interval(values, **bootstrap))


def _ratio(pairs: Pairs, measure: Callable[[QuestionResult], float], **bootstrap: int) -> Interval:
    """Compare positive values; a question without tokens counts one, so that a ratio exists."""
    a, b = ([measure(question) or 1.0 for question in run] for run in zip(*pairs, strict=True))
    quotient = math.fsum(b) / math.fsum(a)
    if len(pairs) < MIN_QUESTIONS:
        return Interval(quotient)
    return Interval(quotient, *ratio_interval(a, b, **bootstrap))


def _share_correct(question: QuestionResult) -> float:
    return question.share_correct or 0.0


def _mean_tokens(question: QuestionResult) -> float:
    return fmean(question.tokens[n] for n in question.completed)


def mean_seconds(question: QuestionResult) -> float:
    """Return the mean of recorded seconds, at least their resolution, so that a ratio exists."""
    assert question.seconds, "only called where seconds were recorded"
    return max(fmean(question.seconds[n] for n in question.completed), 0.01)


def _other_questions(a: Summary, b: Summary, pairs: Pairs) -> Iterator[str]:
    """Yield the questions that are left out, or how selections of the same texts may differ."""
    if left_out := "; ".join(unpaired(a, b, pairs)):
        yield f"their questions, of which these are left out: {left_out}"
    elif not ask_the_same(a, b):
        yield "the order of their questions, or in references"


def _other_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for found in differences(a, b):
        if found.name.partition(".")[0] not in (*POLICY, *PROVENANCE, *SELECTION):
            name = DESCRIBED.get(found.name, found.name)
            yield f"{name}: {_abbreviated(found.old)} and {_abbreviated(found.new)}"


def _other_references(a: Summary, b: Summary, pairs: Pairs) -> Iterator[str]:
    """Yield a line if the references of runs that were asked different selections may differ."""
    if ask_the_same(a, b) or are_published(a, b):
        return
    if any(question.reference is None for pair in pairs for question in pair):
        yield "references, perhaps: a summary keeps none, the folder of its run does"


def _other_seeds(pairs: Pairs) -> Iterator[str]:
    """Yield a line if questions have other ids, from which the seeds of their samples are made."""
    if moved := sum(x.question_id != y.question_id for x, y in pairs):
        yield f"the ids of {counted(moved, 'question')}, and so in the seeds of their samples"


def _abbreviated(value: object) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return repr(f"{str(value)[:8]}…" if is_digest else value)


def distinct_names(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """Name runs by their policies, or by the first of program, model and path that differs."""
    ways: tuple[Callable[[Summary], str], ...] = (
        lambda run: policy_name(run.conditions),
        lambda run: f"{policy_name(run.conditions)} {run.conditions.get('program')}",
        lambda run: f"{run.conditions.get('model')} {policy_name(run.conditions)}",
        lambda run: run.label,
    )
    for way in ways:
        names = tuple(map(way, summaries))
        if len(set(names)) == len(names):
            return names
    return tuple(f"{name} ({n})" for n, name in enumerate(names, start=1))


def policy_name(conditions: Mapping[str, Any]) -> str:
    """Return `full`, `LessIsMore 256` or, of another server, its API."""
    title, budget = policy_title(str(conditions["policy"])), conditions.get("budget")
    return f"{title} {budget:,}" if budget else title


def policy_title(policy: str) -> str:
    """Return a policy's name in documents; the name of another server's API as it is."""
    return POLICIES[policy].title if policy in POLICIES else policy
