"""What is kept of a run: verdicts, votes, lengths and conditions, without any text.

A summary may be committed and published where the samples may not: they quote the questions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from lim_sglang.evals.records import GradedSample
from lim_sglang.programs.records import COMPLETED_STATES, SampleState
from lim_sglang.programs.vote import Equivalent, Order, tally

if TYPE_CHECKING:
    from lim_sglang.evals.store import RunRecord

ORDERS = {"short": Order.SHORTER_FIRST, "confidence": Order.BY_CONFIDENCE}
"""How programs rank their groups; all others by votes. Known here without loading SGLang."""
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
    order = ORDERS.get(_program(record)["name"], Order.BY_VOTES)
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
