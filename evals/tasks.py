"""Benchmarks and their questions: one frozen, versioned record a task; questions loaded from the
Hugging Face hub or a file, checked row by row, and identified by digests.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lim_sglang.errors import ConfigError, DataError, bullets, likely_name
from lim_sglang.evals.long_questions import (
    DEFAULT_LENGTH,
    GENERATORS,
    LENGTHS,
    NUM_QUESTIONS,
    Generator,
    shots_of,
)
from lim_sglang.evals.options import check_letter, with_options
from lim_sglang.evals.sources import ROW_FORM, NoJson, file_rows, hub_rows
from lim_sglang.markdown_section import places
from lim_sglang.programs.grading.kinds import (
    AnswerKind,
    as_integer,
    fault_of_reference,
    lost_command,
    number_text,
)
from lim_sglang.programs.grading.references import reference_answer
from lim_sglang.programs.schema import CHOICE_PROMPT, MATH_PROMPT

_SIZE = re.compile(r"[0-9]{1,9}")
OWN_FILE = "file:"
"""Prefix of the name of a task whose questions are in a user's own file."""


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns."""

    problem: tuple[str, ...] = ("problem", "question")
    """Candidates for the question's text: the first that a row has."""
    answer: str = "answer"
    wrong_answers: tuple[str, ...] = ()
    """Columns of the wrong options of a multiple choice, which are shuffled with the right one."""
    solution: str = "solution"
    """Worked solution, where a row has one: it is shown before other questions."""
    identity: tuple[str, ...] = ("id", "unique_id")
    """Candidates for the question's id: the first that a row has, else the row's number."""
    answer_follows: str | None = None
    """Mark before the answer, where every row of the column holds a solution."""
    may_be_solution: bool = False
    """True: an answer that ends in a mark is a solution, and only the part behind the mark counts;
    see `reference_answer`."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that every row has, in words."""
        return " or ".join(f'"{name}"' for name in self.problem), *(
            f'"{name}"' for name in (self.answer, *self.wrong_answers)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Columns that are read where a row has them."""
        return (*self.problem, self.answer, *self.wrong_answers, *self.identity)


FILE_COLUMNS = Columns(may_be_solution=True)


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
    num_questions: int | None = None
    """Number of published questions."""
    digest: str | None = None
    """`questions_digest` of the published questions; tells other questions of that name apart."""
    answers_digest: str | None = None
    """`answers_digest` of the published questions."""
    may_be_shown: bool = True
    """False: the authors ask that no question stand in plain text where it may be published."""
    shuffle_seed: int = 0
    """Seed of the order of options, which follows from the seed and the question's id."""
    file: Path | None = None
    """File of a user's own questions."""
    generator: Generator | None = None
    """Makes the questions of a task that has none elsewhere."""
    length: int | None = None
    """Tokens of a question, about (`count_tokens`), with the solved ones before it; None: no solved
    questions stand before it."""
    question_seed: int = 0
    """Seed of generated questions, and of the choice of solved ones."""


TASKS: Mapping[str, Task] = {
    "math500": Task(
        name="math500",
        version=1,
        hub_id="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        answer_kind=AnswerKind.EXPRESSION,
        num_questions=500,
        answers_digest="294f8f566a80a3883ce243c29c85195d03da3375607c0e06d34d4b8c16836fc8",
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
        num_questions=30,
        answers_digest="172a8f41a82e7ce2599584b1897df949b6642c0f11d6222660b27a22b5e10beb",
        digest="bdfaff45e7623d3cb495d846cccba1ed9d9fccb035ce5136760b5ac4dcc631b8",
        source="American Invitational Mathematics Examination 2024, I and II",
    ),
    "aime25": Task(
        name="aime25",
        version=1,
        hub_id="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        answer_kind=AnswerKind.INTEGER,
        num_questions=30,
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
        num_questions=30,
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
            problem=("Question",),
            answer="Correct Answer",
            wrong_answers=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            identity=("Record ID",),
        ),
        answer_kind=AnswerKind.CHOICE,
        prompt=CHOICE_PROMPT,
        num_questions=198,
        may_be_shown=False,
        source="Rein et al., GPQA, arXiv 2311.12022; the hub asks for its terms to be accepted",
    ),
    "gsm8k": Task(
        name="gsm8k",
        version=1,
        hub_id="openai/gsm8k",
        hub_config="main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        columns=Columns(answer_follows="####"),
        answer_kind=AnswerKind.EXPRESSION,
        num_questions=1319,
        source="Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168",
    ),
    **{
        name: Task(
            name=name,
            version=1,
            answer_kind=generator.answer_kind,
            prompt=generator.prompt,
            num_questions=NUM_QUESTIONS,
            source="generated from a seed, evals/long_questions.py",
            generator=generator,
            length=DEFAULT_LENGTH,
        )
        for name, generator in GENERATORS.items()
    },
}


def find_task(name: str) -> Task:
    """Return the benchmark of that name, or the task of a user's own file.

    `file:PATH.jsonl` compares answers by math-verify, letters and integers among them;
    `file:PATH.jsonl:choice` asks for the letter of an option, `file:PATH.jsonl:integer` takes only
    integers from 0 to 999, and `file:PATH.jsonl:text` compares texts. The short name that such a
    task has in a stored run (`file:STEM:choice`) is accepted, too. `needle:2048`, or
    `needle:2048:7` with a seed, has questions of about 2,048 tokens; those of a benchmark get there
    by solved questions before each question.

    Raises:
        ConfigError: unknown name; the message names the likeliest one, and lists the known ones.
            Or a length or seed that is none.
    """
    if name.startswith(OWN_FILE) and (text := name.removeprefix(OWN_FILE)):
        return _own_task(text)
    benchmark, *size = name.split(":")
    if benchmark in TASKS and (size or TASKS[benchmark].length):
        return _sized_task(TASKS[benchmark], size)
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise ConfigError(
            f"unknown task {name!r}; {_guess(name)}the tasks are {known}, and {OWN_FILE}PATH.jsonl"
        )
    return TASKS[name]


def sized_name(name: str, length: int | None, seed: int | None) -> str:
    """Return the name of a task of questions of a length and a seed; None: the task's own.

    `needle`, `needle:1024` and `needle:1024:0` are one name.

    Raises:
        ConfigError: the name states a length already, or the task has no length.
    """
    if length is None and seed is None:
        return find_task(name).name if _benchmark(name) else name
    task = find_task(name)
    if ":" in name:
        raise ConfigError(
            f"{name}: --length and --question-seed go with a benchmark's name alone, such as needle"
        )
    length = task.length if length is None else length
    if length is None:
        raise ConfigError(
            f"{name}: --question-seed chooses the solved questions before each question: give "
            "--length, too"
        )
    return find_task(f"{name}:{length}:{seed or 0}").name


def _sized_task(task: Task, size: Sequence[str]) -> Task:
    """Return a task with the length, and perhaps the seed, of its questions."""
    if len(size) > 2 or not all(map(_SIZE.fullmatch, size)):
        raise ConfigError(
            f"{':'.join([task.name, *size])}: expected {task.name}:LENGTH or "
            f"{task.name}:LENGTH:SEED, such as {task.name}:2048 or {task.name}:2048:7"
        )
    length, seed = map(int, [*size, *(str(task.length), "0")[len(size) :]])
    if length not in LENGTHS:
        raise ConfigError(
            f"{task.name}: expected a length of {LENGTHS[0]:,} to {LENGTHS[-1]:,} tokens, got "
            f"{length:,}"
        )
    name = f"{task.name}:{length}" + (f":{seed}" if seed else "")
    return replace(task, name=name, length=length, question_seed=seed)


def _benchmark(name: str) -> Task | None:
    """Return the benchmark of a task's name, which may state a length; None: an own file."""
    return TASKS.get(name.partition(":")[0])


def _guess(name: str) -> str:
    """Return the task that was probably meant, as part of a sentence; empty without a guess."""
    path, _, word = name.rpartition(":")
    file = Path(path if path and word in list(AnswerKind) else name)
    if file.suffix in QUESTION_SUFFIXES or "/" in name or _is_file(file):
        return f"questions in a file of your own are named {OWN_FILE}{name}; "
    return likely_name(name, TASKS)


def _is_file(path: Path) -> bool:
    """Return True for an existing file; False, too, for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def short_name(name: str) -> str:
    """Return a task's name without the folder of a user's own file, that of a generated one with
    its length. The task need not exist."""
    is_file = name.startswith(OWN_FILE) and name != OWN_FILE
    return find_task(name).name if is_file or name in GENERATORS else name


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


class Origin(StrEnum):
    """Relation of the questions that a run asks to the published ones of its task's name."""

    PUBLISHED = "published"
    OWN = "own"
    """Other questions, or other answers, than the published ones."""
    UNVERIFIED = "unverified"
    """A file with as many questions as were published, of which nothing else is known."""


def question_origin(task: Task, questions: Sequence["Question"], *, from_hub: bool) -> Origin:
    """Return whether questions are the published ones of a task.

    A digest decides where one is known. Otherwise the hub's pinned revision is trusted, and a file
    is not.

    Args:
        questions: all questions of the task, before any limit.
        from_hub: the questions were loaded from the hub.
    """
    if task.generator:
        return Origin.PUBLISHED
    if task.file or len(questions) != task.num_questions:
        return Origin.OWN
    if task.digest is None:
        return Origin.PUBLISHED if from_hub else Origin.UNVERIFIED
    is_same = questions_digest(questions) == task.digest and (
        from_hub or answers_digest(questions, task.answer_kind) == task.answers_digest
    )
    return Origin.PUBLISHED if is_same else Origin.OWN


def recorded_origin(name: str, digest: str, source: str | None) -> Origin:
    """Return the origin of the questions of a run whose record does not state one.

    Args:
        name: of the task.
        digest: `questions_digest` of the run's task.
        source: file or data set that the questions came from; None: not recorded.
    """
    task = _benchmark(name)
    if task is None:
        return Origin.OWN
    if task.digest:
        return Origin.PUBLISHED if digest == task.digest else Origin.OWN
    return Origin.PUBLISHED if source == task.hub_id else Origin.UNVERIFIED


def task_title(name: str, origin: Origin) -> str:
    """Return a task's name for readers: `math500 (own questions)` where it is not the benchmark."""
    if origin is Origin.PUBLISHED or _benchmark(name) is None:
        return name
    return f"{name} ({origin} questions)"


QUESTION_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
"""Endings by which a word on the command line is taken for a file of questions."""
MAX_PROBLEMS_SHOWN = 10
MAX_SHOWN = 60
"""Characters of a wrong value in a message."""


@dataclass(frozen=True)
class Question:
    """One problem with its gold answer."""

    question_id: str
    text: str
    """Problem, with the options of a multiple choice."""
    gold: str
    answer_behind: str | None = None
    """Mark behind which the gold answer stood, where a file gave a whole solution."""
    location: str = field(default="", compare=False)
    """File and line, or data set and row."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Fields of a file's row that are not read."""
    solution: str | None = field(default=None, compare=False)
    """Worked solution, where a row has one."""
    shots: str = ""
    """Solved questions that stand before the text."""

    @property
    def asked(self) -> str:
        """The text as it goes into the prompt."""
        return self.shots + self.text


def load_questions(task: Task, data_dir: Path | None = None) -> list[Question]:
    """Load all questions of a task in the order of their source: the user's own file, the task's
    generator, else `<data_dir>/<task>.jsonl`, else the hub.

    Raises:
        ConfigError: the user's own file does not exist, or an unknown kind of answer follows it.
        DataError: the hub cannot be read, or rows are not questions (each is named).
    """
    columns = FILE_COLUMNS
    if task.file:
        _check_ending(task.file)
        rows = file_rows(task.file, f"{OWN_FILE}PATH must name a file{_hint(task.file)}")
    elif task.generator:
        made = task.generator.rows(task.length or DEFAULT_LENGTH, task.question_seed)
        rows = ((f"{task.name}, question {row['id']}", row) for row in made)
    elif data_dir:
        path = data_dir / _file_name(task)
        rows = file_rows(path, f"--data-dir must be a folder with {path.name}")
    else:
        columns = task.columns
        rows = hub_rows(
            task.hub_id,
            config=task.hub_config,
            split=task.split,
            revision=task.revision,
            file=_file_name(task),
        )
    questions: dict[str, Question] = {}
    problems: dict[str, list[str]] = {}
    for index, (location, row) in enumerate(rows):
        try:
            question = _read_question(row, task, columns, index)
            name = question.question_id
            if name in questions:
                raise DataError(
                    f"the id {name!r} occurs a second time, after {questions[name].location}; "
                    "a row without an id has its number, from 0: give every row an id, or none"
                )
            questions[name] = replace(question, location=location)
        except DataError as problem:
            problems.setdefault(str(problem), []).append(location)
    if problems:
        raise DataError(_describe_problems(problems, num_rows=index + 1))
    if not questions:
        source = questions_source(task, data_dir)
        raise DataError(f"{source} holds no question; expected one row a question")
    loaded = list(questions.values())
    if task.length and not task.generator:
        solved = [(each.text, each.solution) for each in loaded]
        shots = shots_of(solved, task.length, task.question_seed)
        loaded = [replace(each, shots=text) for each, text in zip(loaded, shots, strict=True)]
    return loaded


def _file_name(task: Task) -> str:
    return f"{task.name.partition(':')[0]}.jsonl"


def questions_source(task: Task, data_dir: Path | None) -> str:
    """Return the file or data set that `load_questions` reads, or that it reads none."""
    if task.generator:
        return f"the generator of {task.name}, version {task.version}"
    return str(task.file or (data_dir / _file_name(task) if data_dir else task.hub_id))


def questions_digest(questions: Iterable[Question]) -> str:
    """Return the SHA-256 of the stripped problem texts, sorted and joined by newlines.

    The digest identifies a benchmark: the order and ids of its questions do not matter.
    """
    texts = sorted(question.text.strip() for question in questions)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def answers_digest(questions: Iterable[Question], kind: AnswerKind) -> str:
    """Return the SHA-256 of texts and gold answers, sorted and joined by newlines.

    White space in an expression and leading zeros of an integer make no difference.
    """

    def bare(gold: str) -> str:
        return str(as_integer(gold)) if kind is AnswerKind.INTEGER else "".join(gold.split())

    rows = sorted(f"{question.text.strip()}\n{bare(question.gold)}" for question in questions)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def text_digest(text: str | None) -> str | None:
    """Return the start of the SHA-256 of a question's text; None without a text.

    The digest may be published. With the reference in it, whoever has the text could find an
    integer reference in 1,000 tries.
    """
    return None if text is None else hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def selection_digest(questions: Iterable[Question]) -> str:
    """Return the SHA-256 of ids, texts and gold answers in their order: exactly what a run asks."""
    # Without shots no field, so that other runs keep their ids.
    rows = [[q.question_id, q.text, q.gold, *filter(None, [q.shots])] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_question(row: object, task: Task, columns: Columns, index: int) -> Question:
    """Check one row and return its question.

    Raises:
        DataError: the row is no question; the message does not say where the row stands.
    """
    if isinstance(row, NoJson):
        raise DataError(f"not JSON ({row.fault})")
    if not isinstance(row, Mapping):
        raise DataError(f"expected {ROW_FORM}, not {_shown(row)}")
    problem = next((name for name in columns.problem if row.get(name) is not None), None)
    required = (columns.answer, *columns.wrong_answers)
    if problem is None or any(row.get(name) is None for name in required):
        raise DataError(_describe_fields(row, columns))
    text = _check_text(row[problem], problem)
    gold, mark = _answer_text(row[columns.answer], columns.answer, columns), None
    if columns.may_be_solution and task.answer_kind is not AnswerKind.TEXT:
        gold, mark = reference_answer(gold)
    ids = (row[name] for name in columns.identity if row.get(name) is not None)
    question_id = _check_id(next(ids, index))
    if columns.wrong_answers:
        wrong = [_answer_text(row[name], name, columns) for name in columns.wrong_answers]
        text, gold = with_options(text, [gold, *wrong], f"{task.shuffle_seed} {question_id}")
    _check_gold(gold, task.answer_kind)
    unread = tuple(each for each in row if columns is FILE_COLUMNS and each not in columns.names)
    check_letter(text, gold, task.answer_kind, [each for each in unread if row[each]])
    solution = row.get(columns.solution)
    return Question(
        question_id,
        text,
        gold,
        solution=solution if isinstance(solution, str) else None,
        answer_behind=mark,
        unread=unread,
    )


def _describe_fields(row: Mapping[str, Any], columns: Columns) -> str:
    """Return which fields a row lacks, which ones it has, and which ones it needs."""
    filled = {name for name in row if row[name] is not None}
    candidates = (columns.problem, (columns.answer,), *((name,) for name in columns.wrong_answers))
    lacks = [
        words
        for names, words in zip(candidates, columns.needed, strict=True)
        if not filled.intersection(names)
    ]
    found = [f'"{name}"' if name in filled else f'"{name}" (null)' for name in row]
    return (
        f"lacks {' and '.join(lacks)}; it has {', '.join(found) or 'no field'}, and needs "
        f"{' and '.join(columns.needed)}"
    )


def _check_text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} must be a non-empty text, not {_shown(value)}")
    if not value.isascii() and value != value.encode(errors="ignore").decode():
        raise DataError(f"{name} holds half a surrogate pair, which is not valid text")
    if fault := lost_command(value):
        raise DataError(f"{name} {fault}")
    return value


def _check_id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"id must be a text or a whole number, not {_shown(value)}")
    return _check_text(value, "id")


def _answer_text(answer: Any, name: str, columns: Columns) -> str:
    """Return an answer as text; 25 and 25.0 are both "25"."""
    if columns.answer_follows and isinstance(answer, str):
        _, mark, answer = answer.rpartition(columns.answer_follows)
        if not mark:
            raise DataError(f"{name} must end in {columns.answer_follows} and the number")
        answer = answer.replace(",", "")
    if isinstance(answer, str) and answer.strip():
        return _check_text(answer, name).strip()
    if number := number_text(answer):
        return number
    raise DataError(f"{name} must be a number or a non-empty text, not {_shown(answer)}")


def _shown(value: object) -> str:
    """Return the beginning of a value as JSON."""
    return json.dumps(value, ensure_ascii=True, default=str)[:MAX_SHOWN]


def _check_gold(gold: str, kind: AnswerKind) -> None:
    if fault := fault_of_reference(gold, kind):
        without = f"; without :{kind} behind the file's name answers are compared as expressions"
        raise DataError(f"answer {fault}{without if kind is AnswerKind.CHOICE else ''}")


def _describe_problems(problems: Mapping[str, Sequence[str]], num_rows: int) -> str:
    """Return each problem once, with the rows that have it.

    Args:
        problems: locations of the rows by problem.
        num_rows: number of all rows.
    """
    described = [
        f"all {num_rows} rows of {locations[0].rpartition(', ')[0]}: {problem}"
        if len(locations) == num_rows > 1
        else f"{places(locations)}: {problem}"
        for problem, locations in problems.items()
    ]
    shown = described[:MAX_PROBLEMS_SHOWN]
    shown += [f"and {more} more"] if (more := len(described) - len(shown)) else []
    return f"these rows are not questions:{bullets(shown)}"


def _check_ending(path: Path) -> None:
    """Raise `ConfigError` where a path is that of a file with an unknown kind of answer."""
    name, _, word = str(path).rpartition(":")
    is_named = Path(name).suffix in QUESTION_SUFFIXES or _is_file(Path(name))
    if name and "/" not in word and is_named and not _is_file(path):
        kinds = ", :".join(AnswerKind)
        raise ConfigError(f"unknown kind ':{word}'; {OWN_FILE}{name} may end in :{kinds}")


def _hint(path: Path) -> str:
    """Return what was probably meant by the path of a file that does not exist."""
    if not path.name or _is_file(path):  # the root and the working folder have no name
        return ""
    similar = path.with_name(f"{path.name}.jsonl")
    return f" ({similar} exists)" if _is_file(similar) else ""
