"""The benchmarks, one frozen, versioned record a task, and their questions: read from a hub or a
file, checked row by row, and identified by digests.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lim_sglang.errors import DataError
from lim_sglang.evals.grading import CHOICES, AnswerKind, as_choice, as_integer
from lim_sglang.programs.schema import CHOICE_PROMPT, MATH_PROMPT

OWN_FILE = "file:"
"""How the name of a task from a user's own file begins."""


@dataclass(frozen=True)
class Columns:
    """Where a data set keeps its questions; a file in its place has `problem` and `answer`."""

    problem: str = "problem"
    answer: str = "answer"
    wrong_answers: tuple[str, ...] = ()
    """Of a multiple choice: the options beside the right one, which are shuffled with it."""
    identity: tuple[str, ...] = ("id", "unique_id")
    """The first of these that a row has; its number in the file without any."""
    answer_follows: str | None = None
    """What the answer follows in its text, where a solution leads to it."""


@dataclass(frozen=True)
class Task:
    """Where a benchmark's questions come from, how they are asked and how answers are compared."""

    name: str
    version: int
    """Higher with every change of prompt, extraction or grading that is not a mend."""
    answer_kind: AnswerKind
    source: str
    """Who wrote the questions."""
    prompt: str = MATH_PROMPT
    """For `str.format(question=...)`."""
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    """The commit that is loaded."""
    split: str = "test"
    columns: Columns = Columns()
    digest: str | None = None
    """`questions_digest` of the whole benchmark, to tell it from other questions of that name."""
    shuffle_seed: int = 0
    """Of the options' order, which follows for each question from this and its id."""
    file: Path | None = None
    """Of a user's own questions."""


TASKS: Mapping[str, Task] = {
    "math500": Task(
        name="math500",
        version=1,
        hub_id="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        answer_kind=AnswerKind.EXPRESSION,
        digest="f7848c20f816a9d7bf32f5f9a6e58087278fd086f8b2acf1fe4572df62aa417e",
        source="Lightman et al., Let's Verify Step by Step, arXiv 2305.20050; questions of MATH",
    ),
    "aime24": Task(
        name="aime24",
        version=1,
        hub_id="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        split="train",
        answer_kind=AnswerKind.INTEGER,
        digest="bdfaff45e7623d3cb495d846cccba1ed9d9fccb035ce5136760b5ac4dcc631b8",
        source="American Invitational Mathematics Examination 2024, I and II",
    ),
    "aime25": Task(
        name="aime25",
        version=1,
        hub_id="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        answer_kind=AnswerKind.INTEGER,
        source="American Invitational Mathematics Examination 2025, I and II",
    ),
    "aime26": Task(
        name="aime26",
        version=1,
        hub_id="MathArena/aime_2026",
        revision="d2de22f3c656b4f56cf8981212186377d1e23bc3",
        split="train",
        columns=Columns(identity=("problem_idx",)),
        answer_kind=AnswerKind.INTEGER,
        source="American Invitational Mathematics Examination 2026, I and II",
    ),
    "gpqa_diamond": Task(
        name="gpqa_diamond",
        version=1,
        hub_id="Idavidrein/gpqa",
        hub_config="gpqa_diamond",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        split="train",
        columns=Columns(
            problem="Question",
            answer="Correct Answer",
            wrong_answers=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            identity=("Record ID",),
        ),
        answer_kind=AnswerKind.CHOICE,
        prompt=CHOICE_PROMPT,
        source="Rein et al., GPQA, arXiv 2311.12022; the hub asks for its terms to be accepted",
    ),
    "gsm8k": Task(
        name="gsm8k",
        version=1,
        hub_id="openai/gsm8k",
        hub_config="main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        columns=Columns(problem="question", answer_follows="####"),
        answer_kind=AnswerKind.EXPRESSION,
        source="Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168",
    ),
}


def find_task(name: str) -> Task:
    """The task of that name, or one of a user's own questions.

    `file:PATH.jsonl` has answers that math-verify compares, letters and integers among them;
    `file:PATH.jsonl:choice` asks for the letter of an option, and `file:PATH.jsonl:integer` takes
    integers from 0 to 999 only. Such a task is found by its own name as well, without its file.

    Raises:
        DataError: there is none; the message lists those that there are.
    """
    if name.startswith(OWN_FILE) and (place := name.removeprefix(OWN_FILE)):
        return _own_task(place)
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise DataError(f"unknown task {name!r}; the tasks are {known}, and {OWN_FILE}PATH.jsonl")
    return TASKS[name]


def _own_task(place: str) -> Task:
    path, _, word = place.rpartition(":")
    kind = AnswerKind(word) if path and word in list(AnswerKind) else None
    file = Path(path if kind else place).expanduser()
    return Task(
        # Named by the file alone: a folder of one machine is no part of what was asked.
        name=f"{OWN_FILE}{file.stem}" + (f":{kind}" if kind else ""),
        version=1,
        answer_kind=kind or AnswerKind.EXPRESSION,
        prompt=CHOICE_PROMPT if kind is AnswerKind.CHOICE else MATH_PROMPT,
        source="a file of the user's own",
        file=file,
    )


MOST_PROBLEMS_SHOWN = 10
Rows = Iterator[tuple[str, object]]
"""Each with the place that an error names."""


@dataclass(frozen=True)
class Question:
    """One problem with its gold answer."""

    question_id: str
    text: str
    """With the options, where one is to be chosen."""
    gold: str


def load_questions(
    task: Task, data_dir: Path | None = None, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions (all without one), in the order of the file.

    Args:
        data_dir: a folder with `<task>.jsonl`; without one the hub is asked, or the user's file.

    Raises:
        DataError: the source cannot be read, or rows of it are no questions (each is named).
    """
    columns = Columns()
    if task.file:
        where, rows = str(task.file), _file_rows(task.file, f"{OWN_FILE}PATH must name a file")
    elif data_dir:
        path = data_dir / f"{task.name}.jsonl"
        where, rows = str(path), _file_rows(path, f"--data-dir must be a folder with {path.name}")
    else:
        where, rows, columns = str(task.hub_id), _hub_rows(task), task.columns
    questions: dict[str, Question] = {}
    problems = []
    for index, (place, row) in enumerate(rows):
        try:
            question = _read_question(row, task, columns, index)
            if question.question_id in questions:
                raise DataError(f"the id {question.question_id!r} occurs a second time")
            questions[question.question_id] = question
        except DataError as problem:
            problems.append(f"{place}: {problem}")
    if problems:
        raise DataError(_bad_rows(problems))
    if not questions:
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


def _read_question(row: object, task: Task, columns: Columns, index: int) -> Question:
    """Check one row, a mapping or a line of JSON; its DataError says what is wrong, not where."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise DataError("expected an object with problem and answer")
    wanted = (columns.problem, columns.answer, *columns.wrong_answers)
    missing = [name for name in wanted if row.get(name) is None]
    if missing:
        raise DataError(f"has no {' and no '.join(missing)}")
    text = _text(row[columns.problem], columns.problem)
    gold = _answer_text(row[columns.answer], columns.answer, columns.answer_follows)
    names = columns.identity
    identity = _text(
        str(next((row[name] for name in names if row.get(name) is not None), index)), "id"
    )
    if columns.wrong_answers:
        wrong = [_answer_text(row[name], name) for name in columns.wrong_answers]
        text, gold = _with_options(text, [gold, *wrong], f"{task.shuffle_seed} {identity}")
    _check_gold(gold, task.answer_kind)
    return Question(question_id=identity, text=text, gold=gold)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} must be a text that is not empty")
    if not value.isascii() and value != value.encode(errors="ignore").decode():
        raise DataError(f"{name} holds half a surrogate pair, which is no text")
    return value


def _answer_text(answer: Any, name: str, follows: str | None = None) -> str:
    """An answer as text; 25 and 25.0 are both "25".

    Args:
        follows: what it stands behind in a solution; such answers are numbers, whose commas go.
    """
    if follows and isinstance(answer, str):
        _, mark, answer = answer.rpartition(follows)
        if not mark:
            raise DataError(f"{name} must end in {follows} and the number")
        answer = answer.replace(",", "")
    if isinstance(answer, str) and answer.strip():
        return _text(answer, name).strip()
    if isinstance(answer, float) and math.isfinite(answer):
        return str(int(answer)) if answer.is_integer() else str(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    raise DataError(f"{name} must be a number or a text that is not empty, not {answer!r}")


def _with_options(text: str, options: list[str], seed: str) -> tuple[str, str]:
    """The question with its options in an order of its own, and the letter of the first one.

    Ordered by digests, so that no version of Python and no other data set changes it.
    """
    order = sorted(
        range(len(options)), key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest()
    )
    lines = [f"{CHOICES[place]}) {options[n]}" for place, n in enumerate(order)]
    return "\n".join([text.strip(), "", *lines]), CHOICES[order.index(0)]


def _check_gold(gold: str, kind: AnswerKind) -> None:
    if kind is AnswerKind.INTEGER and as_integer(gold) is None:
        raise DataError(f"answer must be an integer from 0 to 999, not {gold!r}")
    if kind is AnswerKind.CHOICE and as_choice(gold) is None:
        raise DataError(
            f"answer must be the letter of an option, {CHOICES[0]} to {CHOICES[-1]}, not {gold!r}"
        )


def _bad_rows(problems: list[str]) -> str:
    shown = problems[:MOST_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "these rows are no questions:" + "".join(f"\n  - {problem}" for problem in shown)


def _file_rows(path: Path, expected: str) -> Rows:
    """The lines of a JSONL file; blank ones are left out.

    Split at newlines alone: `str.splitlines` would also split at U+2028 inside a text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # no UTF-8, or no name that a file can have
        raise DataError(
            f"cannot read {path} ({error}); {expected}, one JSON object a line with problem and "
            "answer"
        ) from None
    return ((f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip())


@contextmanager
def _without_retries_being_told() -> Iterator[None]:
    """The hub's client warns of each of its attempts; what came of the last one is the error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hub_rows(task: Task) -> Rows:
    """The rows of the hub's data set at the pinned revision."""
    try:
        from datasets import load_dataset

        with _without_retries_being_told():
            rows = load_dataset(
                task.hub_id, name=task.hub_config, split=task.split, revision=task.revision
            )
    except Exception as error:  # noqa: BLE001 - the hub's clients raise a dozen unrelated classes
        reason = " ".join(str(error).split())
        version = f" at revision {task.revision[:8]}" if task.revision else ""
        raise DataError(
            f"cannot load {task.hub_id}{version} from the hub ({reason}); "
            f"connect to it, or give --data-dir a folder with {task.name}.jsonl"
        ) from None
    return ((f"{task.hub_id}, row {number}", row) for number, row in enumerate(rows))
