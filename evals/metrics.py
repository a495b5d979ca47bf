"""Summaries of runs, and their scores: pass@k, maj@k, lengths, standard errors.

A written summary holds no text and no reference: it may be published where the samples may not,
since samples quote the questions.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import comb
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import Extent, GradedSample
from lim_sglang.evals.tasks import Origin, recorded_origin, task_title, text_digest
from lim_sglang.markdown_section import counted
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import COMPLETED_STATES, SampleState
from lim_sglang.programs.vote import Equivalent, Order, tally

if TYPE_CHECKING:
    from lim_sglang.evals.run_store import AskedQuestion, RunRecord

SAMPLE_LISTS = ("indices", "correct", "group", "states", "tokens", "late")
"""Fields of a question that have one value a sample."""
FILE_ARGUMENTS = ("tokenizer_path", "chat_template")
"""Server arguments that may name a file of the server's machine."""
NAMED_ARGUMENTS = ("device_name", "dtype", "kv_cache_dtype", "quantization")
"""Server arguments that are conditions under their own names."""


@dataclass(frozen=True)
class QuestionResult:
    """The samples of one question, by ascending index."""

    question_id: str
    indices: tuple[int, ...]
    correct: tuple[bool, ...]
    group: tuple[int | None, ...]
    """Number of each sample's answer: equal answers share a number, from 0 in the order of the
    samples; None: no answer."""
    states: tuple[SampleState, ...]
    tokens: tuple[int, ...]
    """Generated tokens of each sample."""
    late: tuple[bool, ...]
    """True for a completed sample without a vote: it ended after its program had stopped, or it was
    truncated and its program takes finished samples only."""
    chosen: int | None
    """The answer group that won the program's vote; None: no answer."""
    prompt_tokens: int | None = None
    """Tokens of the question's prompt; None: not recorded."""
    seconds: tuple[float, ...] | None = None
    """Seconds of each sample, from its request to its end; None: not recorded."""
    text_digest: str | None = None
    """See the function `text_digest`, by which runs of different selections are paired; None: not
    recorded, or recorded with the reference by an earlier version."""
    reference: str | None = field(default=None, compare=False, repr=False)
    """Gold answer, which is never written; None: read from a written summary."""

    @property
    def answer_correct(self) -> bool:
        """Verdict on the program's answer, which is the one of the chosen group's earliest voter.

        False without an answer. (Equality of answers is not transitive, so a group may hold
        answers with different verdicts.)
        """
        if self.chosen is None:
            return False
        return self.correct[next(n for n in self.voters if self.group[n] == self.chosen)]

    @property
    def completed(self) -> tuple[int, ...]:
        """Positions of the samples that finished or reached the token limit."""
        return tuple(n for n, state in enumerate(self.states) if state in COMPLETED_STATES)

    @property
    def voters(self) -> tuple[int, ...]:
        """Positions of the completed samples that have a vote."""
        return tuple(n for n in self.completed if not self.late[n])

    @property
    def num_correct(self) -> int:
        """Number of completed samples that are correct."""
        return sum(self.correct[n] for n in self.completed)

    @property
    def share_correct(self) -> float | None:
        """Share of the completed samples that are correct; None if none completed."""
        return self.num_correct / len(self.completed) if self.completed else None

    def to_row(self) -> dict[str, Any]:
        """Return a flat JSON object."""
        row = asdict(self)
        del row["reference"]
        if self.text_digest is None:  # as in the files of older versions
            del row["text_digest"]
        return {"id": row.pop("question_id"), **row, "correct": [int(c) for c in self.correct]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read an object that `to_row` returned.

        Raises:
            ValueError: the lists contradict each other.
            KeyError, TypeError: the object has other fields or types.
        """
        lists: dict[str, Any] = {name: tuple(row[name]) for name in SAMPLE_LISTS}
        if row.get("seconds") is not None:
            lists["seconds"] = tuple(map(float, row["seconds"]))
        indices, tokens = lists["indices"], lists["tokens"]
        if len({len(values) for values in lists.values()}) != 1:
            raise ValueError(f"the lists of question {row['id']} differ in length")
        if list(indices) != sorted(set(indices)) or not all(type(n) is int for n in tokens):
            raise ValueError(f"question {row['id']} needs ascending indices and integer tokens")
        lists["correct"] = tuple(map(bool, lists["correct"]))
        lists["states"] = tuple(map(SampleState, lists["states"]))
        result = cls(
            question_id=row["id"],
            chosen=row["chosen"],
            prompt_tokens=row.get("prompt_tokens"),
            text_digest=row.get("text_digest"),
            **lists,
        )
        if result.chosen not in (None, *(result.group[n] for n in result.voters)):
            raise ValueError(f"question {result.question_id} chose a group without a vote")
        return result


@dataclass(frozen=True)
class Summary:
    """A run without its texts; see `QuestionResult.reference`."""

    run_id: str
    conditions: Mapping[str, Any]
    """Everything that the results depend on: task, model, policy, sampling, machine, versions."""
    questions: tuple[QuestionResult, ...]
    """The questions with samples, by id: their order does not depend on which finished first."""
    num_failed: int
    """Samples that the server failed: neither right nor wrong, and no part of `questions`."""
    source: str = field(default="", compare=False)
    """Folder or file that the summary was read from; empty: made in memory."""

    @property
    def label(self) -> str:
        """Name of the run in messages: the user's own path, or the run's id."""
        return self.source or self.run_id

    @property
    def gap(self) -> str:
        """The stored part of a run that is not complete, and how to resume the run; empty where
        samples that failed are all that is missing."""
        by_question = stops_early(self.conditions)
        extent = Extent.of(
            [each.question_id for each in self.questions for _ in each.indices],
            self.conditions["asked"],
            self.conditions["samples"],
            stops_early=by_question,
        )
        # It is not known how many questions the failed samples belong to.
        num_failed = 0 if by_question else self.num_failed
        if extent.stored + num_failed >= extent.total:
            return ""
        retry = " with --retry-failed" if self.num_failed else ""
        return (
            f"{extent.stored:,} of {counted(extent.total, extent.unit)}: the run is not complete, "
            f"the same lim eval command{retry} resumes it"
        )


def stops_early(conditions: Mapping[str, Any]) -> bool:
    """Return True if a run's program decides from the samples how many a question gets.

    Such samples are a biased selection: easy questions, on which samples agree, get few.
    """
    program = PROGRAMS.get(conditions.get("program", "majority"))
    return program is None or program.stops_early


def summarise(
    record: "RunRecord",
    samples: Sequence[GradedSample],
    equivalent: Equivalent,
    num_failed: int = 0,
    asked: Mapping[str, "AskedQuestion"] = MappingProxyType({}),
) -> Summary:
    """Summarise a run.

    Args:
        samples: finished, truncated and aborted samples, in any order.
        equivalent: returns True for two answers that share a vote.
        num_failed: samples that the server failed.
        asked: the questions by id, of whose texts the summary keeps digests.
    """
    questions: dict[str, list[GradedSample]] = {}
    for graded in samples:
        questions.setdefault(graded.question_id, []).append(graded)
    digests = {name: text_digest(each.text) for name, each in asked.items()}
    program = PROGRAMS.get(_program(record)["name"])
    order = program.order if program else Order.BY_VOTES  # a program of another version
    return Summary(
        run_id=record.run_id,
        conditions=run_conditions(record),
        questions=tuple(
            replace(
                _question_result(question_id, group, equivalent, order),
                text_digest=digests.get(question_id),
                reference=group[0].gold,
            )
            for question_id, group in sorted(questions.items())
        ),
        num_failed=num_failed,
    )


def _question_result(
    question_id: str, group: Sequence[GradedSample], equivalent: Equivalent, order: Order
) -> QuestionResult:
    group = sorted(group, key=lambda graded: graded.sample.index)
    samples = [graded.sample for graded in group]
    # Numbered by the earliest sample of each answer, independent of the program's ranking.
    answers = sorted(tally(samples, equivalent).groups, key=lambda answer: answer.indices[0])
    number = {index: n for n, answer in enumerate(answers) for index in answer.indices}
    ranked = tally([g.sample for g in group if not g.late], equivalent, order).groups
    return QuestionResult(
        question_id=question_id,
        indices=tuple(sample.index for sample in samples),
        correct=tuple(graded.correct for graded in group),
        group=tuple(number.get(sample.index) for sample in samples),
        states=tuple(sample.state for sample in samples),
        tokens=tuple(sample.num_tokens for sample in samples),
        late=tuple(graded.late for graded in group),
        chosen=number[ranked[0].indices[0]] if ranked else None,
        prompt_tokens=max(sample.num_prompt_tokens for sample in samples) or None,
        seconds=tuple(round(sample.latency_s, 2) for sample in samples),
    )


def _program(record: "RunRecord") -> Mapping[str, Any]:
    """Return a run's program; the oldest records name none, since there was only majority."""
    majority = {"name": "majority", "options": {}}
    return record.settings.get("program") or majority


def run_conditions(record: "RunRecord") -> dict[str, Any]:
    """Return the conditions of a run's results, flat and in the order in which people read them."""
    settings, about, program = record.settings, record.about, _program(record)
    questions, sampling, server = settings["questions"], settings["sampling"], settings["server"]
    system, thinking = settings.get("system"), settings.get("thinking") or {}
    origin = about.get("origin") or recorded_origin(
        settings["task"], questions["digest"], about.get("questions_from")
    )
    return {
        "task": task_title(settings["task"], Origin(origin)),
        "task_version": settings.get("task_version", 1),
        "questions": questions["asked_digest"],
        "benchmark": questions["digest"],
        "asked": questions["asked"],
        "revision": questions["revision"],
        "prompt_sha256": settings["prompt_sha256"],
        "system_sha256": hashlib.sha256(system.encode()).hexdigest() if system else None,
        "model": published_name(str(server["model_path"])),
        "model_revision": server.get("revision"),
        **_policy_conditions(settings.get("lim") or {}, str(settings.get("api", "sglang"))),
        "program": program["name"],
        "options": dict(program["options"]),
        "parallel": program.get("parallel"),
        "samples": settings["num_samples"],
        "thinking": thinking.get("enabled"),
        "thinking_budget": thinking.get("budget"),
        **{name: sampling[name] for name in ("max_tokens", "temperature", "top_p", "top_k")},
        "seed": sampling["seed"],
        "seed_honoured": sampling["seed_honoured"],
        "api": settings.get("api", "sglang"),
        "concurrency": _concurrency(about),
        "requests_by_session": [each["requests"] for each in about.get("sessions") or []] or None,
        **{name: server.get(name) for name in NAMED_ARGUMENTS},
        "server": _other_arguments(server),
        "versions": {**(about.get("client_versions") or {}), **settings["versions"]},
        "code_sha256": settings.get("code_sha256"),
        "sampling_version": settings.get("sampling_version"),
        "commit": about.get("commit"),
        "date": str(about.get("began", ""))[:10],
        "origin": str(origin),
    }


def _concurrency(about: Mapping[str, Any]) -> int | None:
    """Return the requests that a run's servers were sent at a time; None: not recorded."""
    each = about.get("concurrency")
    return sum(each) if each else None


POLICY_SETTINGS = ("budget", "ranking", "recent_ratio", "sinks")
"""Settings that are conditions of every run, None where the policy does not heed them."""


def _policy_conditions(lim: Mapping[str, Any], api: str) -> dict[str, Any]:
    """Return the conditions of the attention policy.

    Args:
        lim: the server's report on LessIsMore; empty for other servers.
        api: name of the policy of such other servers.
    """
    config, roles = lim.get("config") or {}, lim.get("roles") or []
    sparse = {} if config.get("policy") == "full" else config
    drafts = "draft_tokens" in config  # verified by layers that are all dense
    full = [n for n, role in enumerate(roles) if role == "full"]
    select = [n for n, role in enumerate(roles) if role == "select"]
    return {
        "policy": config.get("policy", api),
        **{name: sparse.get(name) for name in POLICY_SETTINGS},
        **({"shared_by": sparse["shared_by"]} if "shared_by" in sparse else {}),
        **({"draft_tokens": sparse["draft_tokens"]} if drafts else {}),
        "dense_layers": full if sparse and not drafts else None,
        "select_layers": (config.get("select_layers") if drafts else select) or None,
        **({"pick_layers": pick} if (pick := config.get("pick_layers")) else {}),
    }


def _other_arguments(server: Mapping[str, Any]) -> dict[str, Any]:
    """Return the server arguments that are set and are no conditions under their own names."""
    return {
        name: published_name(value) if name in FILE_ARGUMENTS else value
        for name, value in server.items()
        if name not in ("model_path", "revision", *NAMED_ARGUMENTS)
        and value not in (None, "", "{}")
    }


def published_name(model_path: str) -> str:
    """Return a model's hub id, or the last name of a local folder, which only one machine has."""
    path = model_path.rstrip("/")
    return path if path.count("/") == 1 and path[0] not in "/.~" else path.rpartition("/")[2]


PERCENTILES = (50, 90, 99)
MIN_QUESTIONS = 20
"""Fewest questions for which a standard error or an interval is stated: the fewest for which the
coverage of the intervals was measured."""
MIN_VOTERS = 3
"""Fewest samples with a vote of which several can be a majority."""
NO_MAJORITY = (
    f"a majority needs {MIN_VOTERS} samples: of two answers that differ, sample 1's would win"
)


def has_majority(summary: "Summary") -> bool:
    """Return False for a run of two samples a question, whose votes say no more than its samples.

    The vote of a single sample is the sample, and a program that stops early answers by a rule of
    its own: these votes count.
    """
    most = max((len(question.voters) for question in summary.questions), default=0)
    return not 1 < most < MIN_VOTERS or stops_early(summary.conditions)


@dataclass(frozen=True)
class PastBudget:
    """Samples of a sparse run that grew past its budget. Only these were decoded from fewer tokens
    than they had; every other sample is one of full attention.
    """

    count: int
    num_samples: int
    budget: int
    is_exact: bool
    """False: the lengths of prompts were not recorded, so that more samples may have grown past."""
    read_share: float | None = None
    """Share, at most, of their tokens that a sparse layer reads in the decode steps of all samples;
    None: the lengths of prompts were not recorded, or there was no decode step."""

    @property
    def is_none(self) -> bool:
        """True if certainly no sample did: the run measured nothing sparse."""
        return self.is_exact and not self.count


def count_past_budget(summary: "Summary") -> PastBudget | None:
    """Count the samples whose last decode step was longer than the budget.

    The step that generates token n of a prompt of P tokens has P + n - 1 tokens to read.

    Returns:
        None for a run without a budget.
    """
    budget = summary.conditions.get("budget")
    if not budget or summary.conditions.get("draft_tokens"):  # dense steps verify all drafts
        return None
    lengths = [
        (question.prompt_tokens or 0) + tokens - 1
        for question in summary.questions
        for tokens in question.tokens
    ]
    num_past = sum(length > budget for length in lengths)
    return PastBudget(
        count=num_past,
        num_samples=len(lengths),
        budget=budget,
        is_exact=num_past == len(lengths) or all(q.prompt_tokens for q in summary.questions),
        read_share=_read_share(summary.questions, budget),
    )


def _sum_between(before: int, last: int) -> int:
    """Return before + 1, and so on up to last, summed; 0 if there is none."""
    return max(0, last * (last + 1) - before * (before + 1)) // 2


def _read_share(questions: Sequence[QuestionResult], budget: int) -> float | None:
    """See `PastBudget.read_share`: a prefill generates a sample's first token, decode steps all
    others."""
    num_read = num_seen = 0
    for question in questions:
        if not question.prompt_tokens:
            return None
        for tokens in question.tokens:
            before, last = question.prompt_tokens, question.prompt_tokens + tokens - 1
            within = max(before, min(last, budget))  # the last step that reads everything
            num_read += _sum_between(before, within) + budget * max(0, last - within)
            num_seen += _sum_between(before, last)
    return num_read / num_seen if num_seen else None


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error."""

    value: float
    error: float | None
    """None for fewer than `MIN_QUESTIONS` questions."""


@dataclass(frozen=True)
class Score:
    """The scores of a run. Rates are shares, from 0 to 1, of the completed samples unless a field
    says otherwise. Late samples count everywhere except in votes.
    """

    num_questions: int
    """Questions with at least one sample."""
    num_samples: int
    """Completed samples."""
    num_failed: int
    pass_at_1: Estimate
    """Mean over questions of the share of correct samples, however many samples each has."""
    pass_at: Mapping[int, Estimate]
    """`pass_at_k` by k: powers of two and the largest number of samples."""
    majority_at: Mapping[int, Estimate]
    """`majority_at_k` by the same k."""
    questions_at: Mapping[int, int]
    """By k: number of questions with at least k samples, which `pass_at` averages."""
    has_majority: bool
    """See the function `has_majority`."""
    vote_correct: Estimate
    """Share of questions with a correct answer by the program's own vote; no answer is wrong."""
    truncated: float
    no_answer: float
    num_cut_off: int
    """Completed samples that reached a limit of tokens before they stated an answer."""
    longest_cut_off: int
    """Tokens of the longest of these; less than the limit where the server's context was full."""
    num_unanswered: int
    """Completed samples that ended by themselves without an answer."""
    aborted: float
    """Share of all samples that were started."""
    mean_tokens: float
    mean_seconds: float | None
    """Seconds of a sample, from its request to its end; None: not recorded."""
    percentiles: Mapping[int, float]
    """Percentiles of the number of generated tokens: the median, and those that the number of
    samples resolves."""
    tokens_per_question: float
    """Generated tokens, those of aborted and late samples included."""
    tokens_per_correct: float | None
    """All generated tokens over the number of correct samples; None if no sample is correct."""
    past_budget: PastBudget | None
    """None for a run without a budget."""


def score(summary: Summary) -> Score:
    """Score the completed samples of a run.

    Raises:
        DataError: no sample completed.
    """
    import numpy as np

    questions = [question for question in summary.questions if question.completed]
    if not questions:
        raise DataError(f"run {summary.label} has no completed sample, so nothing to score")
    most = max(len(question.completed) for question in questions)
    most_voters = max(len(question.voters) for question in questions)
    ks = sorted({*(2**n for n in range(most.bit_length())), most})
    states = [state for question in summary.questions for state in question.states]
    completed = [(question, n) for question in questions for n in question.completed]
    lengths = [question.tokens[n] for question, n in completed]
    tokens = sum(sum(question.tokens) for question in summary.questions)
    num_correct = sum(question.num_correct for question in questions)
    without_answer = [(each, n) for each, n in completed if each.group[n] is None]
    cut_off = [e.tokens[n] for e, n in without_answer if e.states[n] is SampleState.TRUNCATED]
    resolved = [each for each in PERCENTILES if each == 50 or len(lengths) * (100 - each) >= 100]
    return Score(
        num_questions=len(summary.questions),
        num_samples=len(completed),
        num_failed=summary.num_failed,
        pass_at_1=pass_at_k(summary, 1),
        pass_at={k: pass_at_k(summary, k) for k in ks},
        majority_at={k: majority_at_k(summary, k) for k in ks if k <= most_voters},
        questions_at={k: sum(len(question.completed) >= k for question in questions) for k in ks},
        has_majority=has_majority(summary),
        vote_correct=estimate([float(question.answer_correct) for question in summary.questions]),
        truncated=states.count(SampleState.TRUNCATED) / len(completed),
        no_answer=len(without_answer) / len(completed),
        num_cut_off=len(cut_off),
        longest_cut_off=max(cut_off, default=0),
        num_unanswered=len(without_answer) - len(cut_off),
        aborted=states.count(SampleState.ABORTED) / len(states),
        mean_tokens=sum(lengths) / len(lengths),
        mean_seconds=_mean_seconds(questions),
        percentiles={each: float(np.percentile(lengths, each)) for each in resolved},
        tokens_per_question=tokens / len(summary.questions),
        tokens_per_correct=tokens / num_correct if num_correct else None,
        past_budget=count_past_budget(summary),
    )


def _mean_seconds(questions: Sequence[QuestionResult]) -> float | None:
    """Return the mean over completed samples; None if a question does not say."""
    found: list[float] = []
    for question in questions:
        if question.seconds is None:
            return None
        found += [question.seconds[n] for n in question.completed]
    return sum(found) / len(found)


def pass_at_k(summary: Summary, k: int) -> Estimate:
    """Estimate the probability that at least one of k samples is correct.

    Unbiased: 1 - C(n - c, k) / C(n, k) for c correct of n samples (Chen et al., arXiv 2107.03374),
    averaged over the questions with at least k completed samples. These are all questions of a
    complete run, unless its program stops early: then they are the questions that it found hard.

    Raises:
        DataError: no question has k completed samples.
    """
    shares = []
    for question in _questions_with(summary, k, lambda question: question.completed):
        n = len(question.completed)
        shares.append(1 - comb(n - question.num_correct, k) / comb(n, k))
    return estimate(shares)


def majority_at_k(summary: Summary, k: int) -> Estimate:
    """Estimate the probability that the most frequent answer of k samples is correct.

    Exact: the mean over all subsets of k voters (`winning_subsets`), averaged over the questions
    with at least k voters. All votes weigh the same, even if the program weighs them differently;
    ties go to the answer with the earlier sample.

    Raises:
        DataError: no question has k voters.
    """
    questions = _questions_with(summary, k, lambda question: question.voters)
    return estimate([majority_share(question, k) for question in questions])


def majority_share(question: QuestionResult, k: int) -> float:
    """Return the share of the subsets of k voters of a question whose majority is correct."""
    groups = tuple(question.group[n] for n in question.voters)
    correct = tuple(question.correct[n] for n in question.voters)
    return winning_subsets(groups, correct)[k] / comb(len(groups), k)


@lru_cache(maxsize=4096)
def winning_subsets(groups: tuple[int | None, ...], correct: tuple[bool, ...]) -> tuple[int, ...]:
    """Count the subsets of 0, 1, … samples whose majority answer is correct, without listing them.

    A group wins with v votes, the earliest of them sample f, if every other group has fewer than v
    votes, or exactly v that all come after f. Samples without an answer may be in the subset or
    not. Generating functions: a polynomial in x counts the choices of one group by their size, and
    the product of the polynomials counts the subsets. Integers hold these polynomials at
    x = 2^(n + 1): each coefficient, at most 2^n, is a digit of n + 1 bits.

    Args:
        groups: group of each sample's answer, in the order of the samples; None: no answer.
        correct: verdict on each sample; the verdict on a group is that of its earliest sample in
            the subset.

    Returns:
        One count for each size from 0 to the number of samples.
    """
    bits = len(groups) + 1
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(position)
    unanswered = (1 + (1 << bits)) ** groups.count(None)
    total = 0
    for group, positions in members.items():
        rivals = [others for other, others in members.items() if other != group]
        for number, first in enumerate(positions):
            if not correct[first]:
                continue
            num_later = len(positions) - number - 1
            for votes in range(1, num_later + 2):
                ways = unanswered * comb(num_later, votes - 1)
                for rival in rivals:
                    ways *= _losing_choices(rival, votes, first, bits)
                total += ways << (bits * votes)
    digit = (1 << bits) - 1
    return tuple((total >> (bits * k)) & digit for k in range(len(groups) + 1))


def _losing_choices(positions: Sequence[int], votes: int, first: int, bits: int) -> int:
    """Return the polynomial of a group's choices that lose to `votes` votes from `first` on."""
    num_later = sum(position > first for position in positions)
    return _small_choices(len(positions), votes, bits) + (comb(num_later, votes) << (bits * votes))


@lru_cache(maxsize=65_536)
def _small_choices(count: int, votes: int, bits: int) -> int:
    """Return the polynomial of the choices of fewer than `votes` of `count` samples."""
    return sum(comb(count, size) << (bits * size) for size in range(min(votes, count + 1)))


def _questions_with(
    summary: Summary, k: int, samples: Callable[[QuestionResult], Sequence[int]]
) -> Iterable[QuestionResult]:
    found = [question for question in summary.questions if len(samples(question)) >= k > 0]
    if not found:
        raise DataError(f"run {summary.label} has no question with {k} samples")
    return found


def estimate(per_question: Sequence[float]) -> Estimate:
    """Return the mean and its standard error, clustered by question.

    Samples of one question are not independent, so the spread is the one between questions. A few
    questions do not show their spread: four right ones would have an error of zero.
    """
    count = len(per_question)
    mean = math.fsum(per_question) / count
    if count < MIN_QUESTIONS:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in per_question) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))
