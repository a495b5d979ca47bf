"""Grading: decide whether an answer is right and whether two answers are equivalent, and renew the
verdicts of a stored run.

Integers (AIME) and letters (multiple choice) are parsed here; every other answer is compared by
math-verify.
"""

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from lim_sglang.evals.run_store import GRADES_FILE, GradedSample, load_run, write_atomically
from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.schema import COMPLETED_STATES

GRADING_VERSION = 1
"""Version of extraction and grading: raise the number with a change of `programs/answers.py`,
`programs/equivalence.py` or this module that changes a verdict. Verdicts of another version are
renewed from the stored texts."""


class AnswerKind(StrEnum):
    """Comparison of an answer with the gold answer."""

    EXPRESSION = "expression"
    """Mathematical equality by math-verify."""
    INTEGER = "integer"
    """Integer from 0 to 999, as the AIME asks for."""
    CHOICE = "choice"
    """Letter of an option, A to J."""


CHOICES = "ABCDEFGHIJ"
MAX_PARSED_CHARS = 500
"""Characters in which a letter is searched, and length of the longest text that may be an
integer."""

_MARKED = r"\\(?:text|textbf|mathbf|mathrm|mbox|boxed)"
_MARKED_TEXT = re.compile(rf"{_MARKED}\s*\{{([^{{}}]*)\}}")
_NAME = re.compile(r"\A(?!.*\b(?:and|or)\b)[^,;]*=", re.DOTALL)
"""Left side of an equation, as in `m+n = 33`. Two numbers have two names and do not match."""
_SIGNS = re.compile(r"\\left|\\right|\^\s*\{?\s*\\circ\s*\}?|\\?%|[$°]")
_INTEGER = re.compile(r"[\s(]*0*(\d{1,3})(?:\.0*)?[\s.)]*", re.ASCII)
_MARKUP = re.compile(rf"{_MARKED}\b|[{{}}$*]")
_LETTER = re.compile(
    r"(?i:(?:the )?(?:correct |final )?(?:option|choice|answer)(?: is)?:? )?[(\[]?"
    # Alone, or before the bracket or full stop that starts a reason; an article has neither.
    r"([A-Ja-j](?=[)\].:]*$)|[A-J](?=[)\].:,])|[a-j](?=[)\]]))"
)
_SECOND_LETTER = re.compile(
    r"[)\].:]*(?:,|/| and\b| or\b)[, ]*(?:(?:and|or) )?[(\[]?(?:[A-J](?!\w)|[a-j](?=[)\]]|$))"
)


class Equivalence(Protocol):
    """Comparison of expressions; `programs.equivalence.EquivalenceChecker` implements it."""

    def equivalent(self, a: str, b: str) -> bool:
        """Return True if two answers are equal; symmetric."""

    def correct(self, gold: str, answer: str) -> bool:
        """Return True if `answer` equals the gold answer."""


class Grader:
    """Verdicts for one kind of answer. The same answer always gets the same verdict."""

    def __init__(self, kind: AnswerKind, checker: Equivalence) -> None:
        self._parse = PARSERS.get(kind)
        self._checker = checker

    def correct(self, gold: str, answer: str | None) -> bool:
        """Return True if an answer is right; a sample without an answer (None) is wrong."""
        if answer is None:
            return False
        if self._parse is None:
            return self._checker.correct(gold, answer)
        value = self._parse(answer)
        return value is not None and value == self._parse(gold)

    def equivalent(self, a: str, b: str) -> bool:
        """Return True if two answers share a vote."""
        if a == b:
            return True
        if self._parse is None:
            return self._checker.equivalent(a, b)
        value = self._parse(a)
        return value is not None and value == self._parse(b)


def as_integer(text: str) -> int | None:
    r"""Parse an integer from 0 to 999; return None where `text` states none.

    Leading zeros, a name (`m+n = 33`), a degree or percent sign, brackets, `\text{}` around a unit
    or around the number, zero decimals and a full stop are ignored.
    """
    if len(text) > MAX_PARSED_CHARS:
        return None
    bare = _MARKED_TEXT.sub(_keep_digits, _NAME.sub("", text))
    match = _INTEGER.fullmatch(_SIGNS.sub("", bare))
    return int(match[1]) if match else None


def as_choice(text: str) -> str | None:
    r"""Parse the letter of an option, A to J, from `B`, `(B)`, `\text{B}`, `b`, `B) because …` or
    `option B`; return None where `text` has no letter (a number, a word) or two.
    """
    bare = " ".join(_MARKUP.sub("", text[:MAX_PARSED_CHARS]).split())
    match = _LETTER.match(bare)
    if match is None or _SECOND_LETTER.match(bare, match.end()):
        return None
    return match[1].upper()


def _keep_digits(marked: re.Match[str]) -> str:
    return marked[1] if re.search(r"\d", marked[1]) else ""


PARSERS: Mapping[AnswerKind, Callable[[str], int | str | None]] = {
    AnswerKind.INTEGER: as_integer,
    AnswerKind.CHOICE: as_choice,
}
"""Parsers of the kinds that need no math-verify."""


@dataclass(frozen=True)
class GradingResult:
    """Counts after a run was graded again."""

    num_samples: int
    """Samples that ended by themselves or at their token limit; only these count."""
    num_changed: int
    """Verdicts that differ from the ones before."""
    num_right: int


def grade_run(
    path: Path,
    grader: Grader,
    *,
    num_threads: int,
    on_graded: Callable[[int], object] = lambda _: None,
) -> GradingResult:
    """Extract the answer of each stored sample again, grade the answer, and write `grades.jsonl`,
    which `load_run` prefers to the verdicts in `samples.jsonl`.

    Grading twice writes the same file. An interruption leaves the file as it was before.

    Args:
        num_threads: verdicts computed at the same time; the number of the checker's workers.
        on_graded: called with the number of graded samples after each of them.

    Raises:
        DataError: the folder holds no run, a line of its files is damaged, or the disk is full.
    """
    samples = load_run(path).samples
    by = f"math-verify {metadata.version('math-verify')}, grading {GRADING_VERSION}"
    rows = []
    with closing(_verdicts(samples, grader, num_threads)) as verdicts:
        for row in verdicts:
            rows.append({**row, "by": by})
            on_graded(len(rows))
    write_atomically(path / GRADES_FILE, "".join(f"{json.dumps(row)}\n" for row in rows))
    counted = [
        (graded.correct, row["correct"])
        for graded, row in zip(samples, rows, strict=True)
        if graded.sample.state in COMPLETED_STATES  # an aborted sample is neither right nor wrong
    ]
    return GradingResult(
        num_samples=len(counted),
        num_changed=sum(before != now for before, now in counted),
        num_right=sum(now for _, now in counted),
    )


def _verdicts(
    samples: Sequence[GradedSample], grader: Grader, num_threads: int
) -> Generator[dict[str, Any]]:
    """Yield the row of each sample for `grades.jsonl`, in the order of the samples."""

    def verdict(graded: GradedSample) -> dict[str, Any]:
        question, index = graded.key
        answer = extract_answer(graded.sample.text)
        correct = grader.correct(graded.gold, answer)
        return {"question": question, "index": index, "answer": answer, "correct": correct}

    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(verdict, samples)
    finally:
        # No waiting: after an interruption, these threads end when the checker is closed.
        pool.shutdown(wait=False, cancel_futures=True)
