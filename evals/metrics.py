"""A run without its texts, and its scores: verdicts, votes, lengths and conditions, then pass@k
and maj@k with standard errors.

A summary may be committed and published where the samples may not: they quote the questions.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import GradedSample, write_atomically
from lim_sglang.programs.program import find_program
from lim_sglang.programs.schema import COMPLETED_STATES, SampleState
from lim_sglang.programs.vote import Equivalent, Order, tally

if TYPE_CHECKING:
    from lim_sglang.evals.run_store import RunRecord
    from lim_sglang.programs.equivalence import EquivalenceChecker

LISTS = ("indices", "correct", "group", "states", "tokens", "late")
"""Fields of a question that run along its samples."""
FILES = ("tokenizer_path", "chat_template")
"""Arguments of a server that may name a file of its machine."""
MACHINE = ("device_name", "dtype", "kv_cache_dtype", "quantization")
"""What of the server has a name of its own among the conditions, like model and revision."""


@dataclass(frozen=True)
class QuestionResult:
    """The samples of one question, by index; the lists run along `indices`."""

    question_id: str
    indices: tuple[int, ...]
    correct: tuple[bool, ...]
    group: tuple[int | None, ...]
    """Equal answers share a number, from 0 in the order of the samples; None: no answer."""
    states: tuple[SampleState, ...]
    tokens: tuple[int, ...]
    """Generated."""
    late: tuple[bool, ...]
    """Drawn, but not heard by the program's vote."""
    chosen: int | None
    """The group that the program answers with; None: no answer."""

    @property
    def answer_correct(self) -> bool:
        """Whether the program's answer is right, which is the chosen group's as its first voter
        wrote it; no answer is not.
        """
        if self.chosen is None:
            return False
        return self.correct[next(n for n in self.voters if self.group[n] == self.chosen)]

    @property
    def whole(self) -> tuple[int, ...]:
        """Positions of the samples that ended by themselves."""
        return tuple(n for n, state in enumerate(self.states) if state in COMPLETED_STATES)

    @property
    def voters(self) -> tuple[int, ...]:
        """Positions of those among them that the vote heard."""
        return tuple(n for n in self.whole if not self.late[n])

    @property
    def share_correct(self) -> float | None:
        """Of the samples that ended by themselves; None where there is none."""
        whole = self.whole
        return sum(self.correct[n] for n in whole) / len(whole) if whole else None

    def to_row(self) -> dict[str, Any]:
        """One flat object, ready for JSON."""
        row = asdict(self)
        return {"id": row.pop("question_id"), **row, "correct": [int(c) for c in self.correct]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read back what `to_row` gave.

        Raises:
            ValueError: the lists do not belong together.
            KeyError, TypeError: it is something else.
        """
        lists = {name: tuple(row[name]) for name in LISTS}
        indices, tokens = lists["indices"], lists["tokens"]
        if len({len(values) for values in lists.values()}) != 1:
            raise ValueError(f"the lists of question {row['id']} differ in length")
        if list(indices) != sorted(set(indices)) or not all(type(n) is int for n in tokens):
            raise ValueError(f"question {row['id']} needs ascending indices and whole tokens")
        lists["correct"] = tuple(map(bool, lists["correct"]))
        lists["states"] = tuple(map(SampleState, lists["states"]))
        found = cls(question_id=row["id"], chosen=row["chosen"], **lists)
        if found.chosen not in (None, *(found.group[n] for n in found.voters)):
            raise ValueError(f"question {found.question_id} chose a group without a vote")
        return found


@dataclass(frozen=True)
class Summary:
    """A run without its texts."""

    run_id: str
    conditions: Mapping[str, Any]
    """What the results hold for: task, model, policy, sampling, machine, versions, date."""
    questions: tuple[QuestionResult, ...]
    """Those with samples, by id, so that it does not matter which of them ended first."""
    num_failed: int
    """Samples that the server failed: neither right nor wrong, and no part of `questions`."""


def summarise(
    record: "RunRecord",
    samples: Sequence[GradedSample],
    equivalent: Equivalent,
    num_failed: int = 0,
) -> Summary:
    """Count what a run's samples say.

    Args:
        samples: finished, truncated and aborted ones; each question's in any order.
        same: whether two answers share a vote.
    """
    questions: dict[str, list[GradedSample]] = {}
    for graded in samples:
        questions.setdefault(graded.question_id, []).append(graded)
    order = find_program(_program(record)["name"]).order
    return Summary(
        run_id=record.run_id,
        conditions=conditions_of(record),
        questions=tuple(
            _question(name, group, equivalent, order) for name, group in sorted(questions.items())
        ),
        num_failed=num_failed,
    )


def _question(
    name: str, group: Sequence[GradedSample], equivalent: Equivalent, order: Order
) -> QuestionResult:
    group = sorted(group, key=lambda graded: graded.sample.index)
    samples = [graded.sample for graded in group]
    # Ordered by their earliest samples, whatever wins.
    found = sorted(tally(samples, equivalent).groups, key=lambda answers: answers.indices[0])
    number = {index: n for n, answers in enumerate(found) for index in answers.indices}
    winners = tally([g.sample for g in group if not g.late], equivalent, order).groups
    return QuestionResult(
        question_id=name,
        indices=tuple(sample.index for sample in samples),
        correct=tuple(graded.correct for graded in group),
        group=tuple(number.get(sample.index) for sample in samples),
        states=tuple(sample.state for sample in samples),
        tokens=tuple(sample.num_tokens for sample in samples),
        late=tuple(graded.late for graded in group),
        chosen=number[winners[0].indices[0]] if winners else None,
    )


def _program(record: "RunRecord") -> Mapping[str, Any]:
    """The program of a run; a record of the time before there was a choice is of majority."""
    found: Mapping[str, Any] = record.settings.get("program") or {"name": "majority", "options": {}}
    return found


def conditions_of(record: "RunRecord") -> dict[str, Any]:
    """What a reader of the scores has to know, in flat and readable terms."""
    settings, about, program = record.settings, record.about, _program(record)
    questions, sampling, server = settings["questions"], settings["sampling"], settings["server"]
    system, thinking = settings.get("system"), settings.get("thinking") or {}
    return {
        "task": settings["task"],
        "task_version": settings.get("task_version", 1),
        "questions": questions["asked_digest"],
        "benchmark": questions["digest"],
        "asked": questions["asked"],
        "revision": questions["revision"],
        "prompt_sha256": settings["prompt_sha256"],
        "system_sha256": hashlib.sha256(system.encode()).hexdigest() if system else None,
        "model": published_name(str(server["model_path"])),
        "model_revision": server.get("revision"),
        **_policy(settings.get("lim") or {}, other=str(settings.get("api", "sglang"))),
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
        **{name: server.get(name) for name in MACHINE},
        "server": _other_arguments(server),
        "versions": {**(about.get("client_versions") or {}), **settings["versions"]},
        "code_sha256": settings.get("code_sha256"),
        "sampling_version": settings.get("sampling_version"),
        "commit": about.get("commit"),
        "date": str(about.get("began", ""))[:10],
    }


def _policy(lim: Mapping[str, Any], *, other: str) -> dict[str, Any]:
    """How decode reads; of a server without LessIsMore no more than `other`."""
    config, roles = lim.get("config") or {}, lim.get("roles") or []
    sparse = config if config.get("policy") == "lessismore" else {}
    return {
        "policy": config.get("policy", other),
        **{name: sparse.get(name) for name in ("budget", "ranking", "recent_ratio", "sinks")},
        "dense_layers": [n for n, role in enumerate(roles) if role == "full"] if sparse else None,
        "select_layers": [n for n, role in enumerate(roles) if role == "select"] or None,
    }


def _other_arguments(server: Mapping[str, Any]) -> dict[str, Any]:
    """Of the server, those that are set."""
    return {
        name: published_name(value) if name in FILES else value
        for name, value in server.items()
        if name not in ("model_path", "revision", *MACHINE) and value not in (None, "", "{}")
    }


def published_name(model_path: str) -> str:
    """A hub's id as it is; of a folder, which another machine does not have, the last name."""
    path = model_path.rstrip("/")
    return path if path.count("/") == 1 and path[0] not in "/.~" else path.rpartition("/")[2]


FORMAT = 1
EXPECTED = "expected a run's folder, or a file that lim report --summaries wrote"


def write_summary(summary: Summary, path: Path) -> None:
    """Write it as JSON with a line a question, so that two can be compared line by line.

    Raises:
        DataError: the file cannot be written.
    """
    head = {
        "format": FORMAT,
        "run_id": summary.run_id,
        "conditions": summary.conditions,
        "num_failed": summary.num_failed,
    }
    rows = ",\n".join(f"  {json.dumps(question.to_row())}" for question in summary.questions)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "questions": [\n{rows}\n ]\n}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); name another file") from None
    write_atomically(path, text)


def read_summary(path: Path) -> Summary:
    """Read what `write_summary` wrote.

    Raises:
        DataError: it is none, or one of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); {EXPECTED}") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); {EXPECTED}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise DataError(f"{path} is no summary of a run; {EXPECTED}")
    if content["format"] != FORMAT:
        raise DataError(
            f"{path} is of format {content['format']}, expected {FORMAT}: write it again with "
            "lim report --summaries from its run"
        )
    try:
        questions = tuple(map(QuestionResult.from_row, content["questions"]))
        if len({question.question_id for question in questions}) != len(questions):
            raise ValueError("a question is there twice")
        return Summary(
            content["run_id"], dict(content["conditions"]), questions, content["num_failed"]
        )
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is a damaged summary: {reason}; {EXPECTED}") from None


def load_summaries(paths: Sequence[Path]) -> list[Summary]:
    """Of runs' folders, whose votes are counted anew, and of summaries' files.

    Raises:
        DataError: a path is neither, or a run has no sample.
    """
    from lim_sglang.programs.equivalence import EquivalenceChecker

    # One for all: it remembers verdicts, and takes seconds to start.
    with EquivalenceChecker() as checker:
        return [_of_run(path, checker) if path.is_dir() else read_summary(path) for path in paths]


def _of_run(path: Path, checker: "EquivalenceChecker") -> Summary:
    from lim_sglang.evals.grading import Grader
    from lim_sglang.evals.run_store import load_run
    from lim_sglang.evals.tasks import find_task

    run = load_run(path)
    if not run.samples:
        raise DataError(f"{path} has no sample yet; run lim eval until it has")
    grader = Grader(find_task(run.record.settings["task"]).answer_kind, checker)
    return summarise(run.record, run.samples, grader.equivalent, len(run.failures))


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
