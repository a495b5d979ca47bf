"""The benchmarks: one frozen, versioned record a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lim_sglang.errors import DataError
from lim_sglang.evals.grade import AnswerKind
from lim_sglang.programs.prompts import CHOICE_PROMPT, MATH_PROMPT

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
