"""Benchmarks and their questions: one frozen, versioned record a task; questions loaded from the
Hugging Face hub or a file, checked row by row, and identified by digests.
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

from lim_sglang.errors import DataError, bullets
from lim_sglang.programs.answers import CHOICES, AnswerKind, as_choice, as_integer
from lim_sglang.programs.schema import CHOICE_PROMPT, MATH_PROMPT

OWN_FILE = "file:"
"""Prefix of the name of a task whose questions are in a user's own file."""


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns. A JSONL file always has `problem` and `answer`."""

    problem: str = "problem"
    answer: str = "answer"
    wrong_answers: tuple[str, ...] = ()
    """Columns of the wrong options of a multiple choice, which are shuffled with the right one."""
    identity: tuple[str, ...] = ("id", "unique_id")
    """Candidates for the question's id: the first that a row has, else the row's number."""
    answer_follows: str | None = None
    """Mark before the answer, where the column holds a solution that ends in the answer."""


@dataclass(frozen=True)
class Task:
    """A benchmark: source of the questions, prompt, and kind of answer."""

    name: str
    version: int
    """Raised with every change of prompt, extraction or grading that is not a correction."""
    answer_kind: AnswerKind
    source: str
    """Authors of the questions."""
    prompt: str = MATH_PROMPT
    """Template for `str.format(question=...)`."""
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    """Commit of the data set that is loaded."""
    split: str = "test"
    columns: Columns = Columns()
    digest: str | None = None
    """`questions_digest` of the published benchmark; tells other questions of that name apart."""
    shuffle_seed: int = 0
    """Seed of the order of options, which follows from the seed and the question's id."""
    file: Path | None = None
    """File of a user's own questions."""


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
    """Return the benchmark of that name, or the task of a user's own file.

    `file:PATH.jsonl` compares answers by math-verify, letters and integers among them;
    `file:PATH.jsonl:choice` asks for the letter of an option, and `file:PATH.jsonl:integer` takes
    only integers from 0 to 999. The short name that such a task has in a stored run
    (`file:STEM:choice`) is accepted, too.

    Raises:
        DataError: unknown name; the message lists the known ones.
    """
    if name.startswith(OWN_FILE) and (text := name.removeprefix(OWN_FILE)):
        return _own_task(text)
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise DataError(f"unknown task {name!r}; the tasks are {known}, and {OWN_FILE}PATH.jsonl")
    return TASKS[name]


def short_name(name: str) -> str:
    """Return a task's name without the folder of a user's own file. The task need not exist."""
    return find_task(name).name if name.startswith(OWN_FILE) and name != OWN_FILE else name


def _own_task(text: str) -> Task:
    """Return the task of `PATH` or `PATH:KIND`."""
    path, _, word = text.rpartition(":")
    kind = AnswerKind(word) if path and word in list(AnswerKind) else None
    file = Path(path if kind else text).expanduser()
    return Task(
        # The file's name alone: its folder differs from machine to machine.
        name=f"{OWN_FILE}{file.stem}" + (f":{kind}" if kind else ""),
        version=1,
        answer_kind=kind or AnswerKind.EXPRESSION,
        prompt=CHOICE_PROMPT if kind is AnswerKind.CHOICE else MATH_PROMPT,
        source="a file of the user's own",
        file=file,
    )


MAX_PROBLEMS_SHOWN = 10
Rows = Iterator[tuple[str, object]]
"""Pairs of a row's location, for errors, and the row: a mapping, or a line of JSON."""


@dataclass(frozen=True)
class Question:
    """One problem with its gold answer."""

    question_id: str
    text: str
    """Problem, with the options of a multiple choice."""
    gold: str


def load_questions(task: Task, data_dir: Path | None = None) -> list[Question]:
    """Load all questions of a task in the order of their source: the user's own file, else
    `<data_dir>/<task>.jsonl`, else the hub.

    Raises:
        DataError: the source cannot be read, or rows are not questions (each is named).
    """
    columns = Columns()
    if task.file:
        rows = _file_rows(task.file, f"{OWN_FILE}PATH must name a file")
    elif data_dir:
        path = data_dir / f"{task.name}.jsonl"
        rows = _file_rows(path, f"--data-dir must be a folder with {path.name}")
    else:
        rows, columns = _hub_rows(task), task.columns
    questions: dict[str, Question] = {}
    problems = []
    for index, (location, row) in enumerate(rows):
        try:
            question = _read_question(row, task, columns, index)
            if question.question_id in questions:
                raise DataError(f"the id {question.question_id!r} occurs a second time")
            questions[question.question_id] = question
        except DataError as problem:
            problems.append(f"{location}: {problem}")
    if problems:
        raise DataError(_describe_problems(problems))
    if not questions:
        source = questions_source(task, data_dir)
        raise DataError(f"{source} holds no question; expected one row a question")
    return list(questions.values())


def questions_source(task: Task, data_dir: Path | None) -> str:
    """Return the file or data set that `load_questions` reads."""
    return str(task.file or (data_dir / f"{task.name}.jsonl" if data_dir else task.hub_id))


def questions_digest(questions: Iterable[Question]) -> str:
    """Return the SHA-256 of the stripped problem texts, sorted and joined by newlines.

    The digest identifies a benchmark: the order and ids of its questions do not matter.
    """
    texts = sorted(question.text.strip() for question in questions)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def selection_digest(questions: Iterable[Question]) -> str:
    """Return the SHA-256 of ids, texts and gold answers in their order: exactly what a run asks."""
    rows = [[q.question_id, q.text, q.gold] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_question(row: object, task: Task, columns: Columns, index: int) -> Question:
    """Check one row, a mapping or a line of JSON, and return its question.

    Raises:
        DataError: the row is no question; the message does not say where the row stands.
    """
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise DataError("expected an object with problem and answer")
    required = (columns.problem, columns.answer, *columns.wrong_answers)
    missing = [name for name in required if row.get(name) is None]
    if missing:
        keys = " and ".join(f'"{name}"' for name in missing)
        raise DataError(f"lacks {keys}")
    text = _check_text(row[columns.problem], columns.problem)
    gold = _answer_text(row[columns.answer], columns.answer, columns.answer_follows)
    ids = (row[name] for name in columns.identity if row.get(name) is not None)
    question_id = _check_text(str(next(ids, index)), "id")
    if columns.wrong_answers:
        wrong = [_answer_text(row[name], name) for name in columns.wrong_answers]
        text, gold = _with_options(text, [gold, *wrong], f"{task.shuffle_seed} {question_id}")
    _check_gold(gold, task.answer_kind)
    return Question(question_id=question_id, text=text, gold=gold)


def _check_text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} must be a non-empty text")
    if not value.isascii() and value != value.encode(errors="ignore").decode():
        raise DataError(f"{name} holds half a surrogate pair, which is not valid text")
    return value


def _answer_text(answer: Any, name: str, follows: str | None = None) -> str:
    """Return an answer as text; 25 and 25.0 are both "25".

    Args:
        follows: mark before the answer at the end of a solution. Answers behind a mark are
            numbers, so their thousands separators are removed.
    """
    if follows and isinstance(answer, str):
        _, mark, answer = answer.rpartition(follows)
        if not mark:
            raise DataError(f"{name} must end in {follows} and the number")
        answer = answer.replace(",", "")
    if isinstance(answer, str) and answer.strip():
        return _check_text(answer, name).strip()
    if isinstance(answer, float) and math.isfinite(answer):
        return str(int(answer)) if answer.is_integer() else str(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    raise DataError(f"{name} must be a number or a non-empty text, not {answer!r}")


def _with_options(text: str, options: list[str], seed: str) -> tuple[str, str]:
    """Append shuffled options to a question; return the text and the letter of the first option.

    The order follows from SHA-256 digests of the seed, so it is the same in every version of
    Python and does not depend on the other questions.
    """
    order = sorted(
        range(len(options)), key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest()
    )
    lines = [f"{CHOICES[letter]}) {options[n]}" for letter, n in enumerate(order)]
    return "\n".join([text.strip(), "", *lines]), CHOICES[order.index(0)]


def _check_gold(gold: str, kind: AnswerKind) -> None:
    if kind is AnswerKind.INTEGER and as_integer(gold) is None:
        raise DataError(f"answer must be an integer from 0 to 999, not {gold!r}")
    if kind is AnswerKind.CHOICE and as_choice(gold) is None:
        raise DataError(
            f"answer must be the letter of an option, {CHOICES[0]} to {CHOICES[-1]}, not {gold!r}"
        )


def _describe_problems(problems: list[str]) -> str:
    shown = problems[:MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return f"these rows are not questions:{bullets(shown)}"


def _file_rows(path: Path, expected: str) -> Rows:
    """Return the lines of a JSONL file, without blank ones.

    Lines are split at newlines alone: `str.splitlines` would also split at U+2028 inside a text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # not UTF-8, or not a valid file name
        raise DataError(
            f"cannot read {path} ({error}); {expected}, one JSON object a line with problem and "
            "answer"
        ) from None
    return ((f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip())


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub client's warning about each retry; the last failure becomes our error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hub_rows(task: Task) -> Rows:
    """Return the rows of the hub's data set at the pinned revision."""
    try:
        from datasets import load_dataset

        with _quiet_hub():
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
