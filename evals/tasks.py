"""The benchmarks: one frozen record a task, and how its questions are loaded and identified."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lim_sglang.errors import DataError
from lim_sglang.evals.grade import AnswerKind, as_integer

MOST_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Task:
    """Where a benchmark's questions come from and how their answers are compared."""

    name: str
    hub_id: str
    revision: str
    split: str
    answer_kind: AnswerKind
    digest: str
    """`questions_digest` of the whole benchmark, to tell it from other questions of that name."""
    source: str
    """Who wrote the questions."""


TASKS: Mapping[str, Task] = {
    "math500": Task(
        name="math500",
        hub_id="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        split="test",
        answer_kind=AnswerKind.EXPRESSION,
        digest="f7848c20f816a9d7bf32f5f9a6e58087278fd086f8b2acf1fe4572df62aa417e",
        source="Lightman et al., Let's Verify Step by Step, arXiv 2305.20050; questions of MATH",
    ),
    "aime24": Task(
        name="aime24",
        hub_id="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        split="train",
        answer_kind=AnswerKind.INTEGER,
        digest="bdfaff45e7623d3cb495d846cccba1ed9d9fccb035ce5136760b5ac4dcc631b8",
        source="American Invitational Mathematics Examination 2024, I and II",
    ),
}


@dataclass(frozen=True)
class Question:
    """One problem with its gold answer."""

    question_id: str
    text: str
    gold: str


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        DataError: there is none; the message lists those that there are.
    """
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def load_questions(
    task: Task, data_dir: Path | None = None, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions (all without one), in the order of the file.

    Args:
        data_dir: a folder with `<task>.jsonl`; without one the hub is asked.

    Raises:
        DataError: the source cannot be read, or rows of it are no questions (each is named).
    """
    rows = _hub_rows(task) if data_dir is None else _file_rows(data_dir / f"{task.name}.jsonl")
    questions: dict[str, Question] = {}
    problems = []
    for index, (place, row) in enumerate(rows):
        try:
            question = _read_question(row, task.answer_kind, index)
            if question.question_id in questions:
                raise DataError(f"the id {question.question_id!r} occurs a second time")
            questions[question.question_id] = question
        except DataError as problem:
            problems.append(f"{place}: {problem}")
    if problems:
        raise DataError(_bad_rows(problems))
    if not questions:
        where = task.hub_id if data_dir is None else data_dir / f"{task.name}.jsonl"
        raise DataError(f"{where} holds no question; expected one row a question")
    return list(questions.values())[:limit]


def questions_digest(questions: Iterable[Question]) -> str:
    """SHA-256 over the stripped problem texts, sorted, joined by newlines: free of order and id."""
    texts = sorted(question.text.strip() for question in questions)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def selection_digest(questions: Iterable[Question]) -> str:
    """SHA-256 over ids, texts and gold answers in their order: exactly what a run asks."""
    rows = [[q.question_id, q.text, q.gold] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_question(row: object, kind: AnswerKind, index: int) -> Question:
    """Check one row, a mapping or a line of JSON; its DataError says what is wrong, not where."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise DataError("expected an object with problem and answer")
    missing = [name for name in ("problem", "answer") if row.get(name) is None]
    if missing:
        raise DataError(f"has no {' and no '.join(missing)}")
    problem = row["problem"]
    if not isinstance(problem, str) or not problem.strip():
        raise DataError("problem must be a text that is not empty")
    if not problem.isascii() and problem != problem.encode(errors="ignore").decode():
        raise DataError("problem holds half a surrogate pair, which is no text")
    gold = _answer_text(row["answer"])
    if kind is AnswerKind.INTEGER and as_integer(gold) is None:
        raise DataError(f"answer must be an integer from 0 to 999, not {gold!r}")
    identity = next((row[k] for k in ("id", "unique_id") if row.get(k) is not None), index)
    return Question(question_id=str(identity), text=problem, gold=gold)


def _answer_text(answer: Any) -> str:
    """An answer as text; 25 and 25.0 are both "25"."""
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    if isinstance(answer, float) and math.isfinite(answer):
        return str(int(answer)) if answer.is_integer() else str(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    raise DataError(f"answer must be a number or a text that is not empty, not {answer!r}")


def _bad_rows(problems: list[str]) -> str:
    shown = problems[:MOST_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "these rows are no questions:" + "".join(f"\n  - {problem}" for problem in shown)


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The lines of a JSONL file, each with the place that an error names; blank ones are left out.

    Split at newlines alone: `str.splitlines` would also split at U+2028 inside a text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path} ({error}); --data-dir must be a folder with {path.name}, "
            "one JSON object a line with problem and answer"
        ) from None
    return ((f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip())


def _hub_rows(task: Task) -> Iterator[tuple[str, object]]:
    """The rows of the hub's data set at the pinned revision."""
    try:
        from datasets import load_dataset

        rows = load_dataset(task.hub_id, split=task.split, revision=task.revision)
    except Exception as error:  # noqa: BLE001 - the hub's clients raise a dozen unrelated classes
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot load {task.hub_id} at revision {task.revision[:8]} from the hub ({reason}); "
            f"connect to it, or give --data-dir a folder with {task.name}.jsonl"
        ) from None
    return ((f"{task.hub_id}, row {number}", row) for number, row in enumerate(rows))
