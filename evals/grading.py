"""Is an answer right, and are two answers the same: by math-verify, as integers for the AIME, as
letters where one is to be chosen.
"""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

GRADING_VERSION = 1
"""Version of extraction and grading: raise the number with a change of `programs/answers.py`,
`programs/equivalence.py` or this module that changes a verdict. Verdicts of another version are
renewed from the stored texts."""


class AnswerKind(StrEnum):
    """How an answer is compared with the gold one."""

    EXPRESSION = "expression"
    """Mathematical equality, judged by math-verify."""
    INTEGER = "integer"
    """An integer from 0 to 999, as the AIME asks for."""
    CHOICE = "choice"
    """The letter of an option, A to J."""


CHOICES = "ABCDEFGHIJ"
MAX_READ = 500
"""Characters in which a letter is chosen, and of the longest text that is a number."""

_MARKED = r"\\(?:text|textbf|mathbf|mathrm|mbox|boxed)"
_MARKED_TEXT = re.compile(rf"{_MARKED}\s*\{{([^{{}}]*)\}}")
_NAME = re.compile(r"\A(?!.*\b(?:and|or)\b)[^,;]*=", re.DOTALL)
"""What an integer is said to be, as in `m+n = 33`; two numbers have two names."""
_SIGNS = re.compile(r"\\left|\\right|\^\s*\{?\s*\\circ\s*\}?|\\?%|[$°]")
_INTEGER = re.compile(r"[\s(]*0*(\d{1,3})(?:\.0*)?[\s.)]*", re.ASCII)
_MARKUP = re.compile(rf"{_MARKED}\b|[{{}}$*]")
_LETTER = re.compile(
    r"(?i:(?:the )?(?:correct |final )?(?:option|choice|answer)(?: is)?:? )?[(\[]?"
    # Alone, or a bracket or a full stop before the reason; an article has neither.
    r"([A-Ja-j](?=[)\].:]*$)|[A-J](?=[)\].:,])|[a-j](?=[)\]]))"
)
_SECOND_LETTER = re.compile(
    r"[)\].:]*(?:,|/| and\b| or\b)[, ]*(?:(?:and|or) )?[(\[]?(?:[A-J](?!\w)|[a-j](?=[)\]]|$))"
)


class Equivalence(Protocol):
    """What grading needs of `programs.judge.AnswerJudge`."""

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are equal; symmetric."""

    def correct(self, gold: str, answer: str) -> bool:
        """Whether `answer` is equal to the gold answer."""


class Grader:
    """Verdicts of one kind of answer. Grading again gives the same verdicts."""

    def __init__(self, kind: AnswerKind, checker: Equivalence) -> None:
        self.kind = kind
        self._checker = checker

    def correct(self, gold: str, answer: str | None) -> bool:
        """Whether an answer is right; no answer is not."""
        if answer is None:
            return False
        if (read := READERS.get(self.kind)) is None:
            return self._checker.correct(gold, answer)
        value = read(answer)
        return value is not None and value == read(gold)

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers share a vote."""
        if a == b:
            return True
        if (read := READERS.get(self.kind)) is None:
            return self._checker.equivalent(a, b)
        value = read(a)
        return value is not None and value == read(b)


def as_integer(text: str) -> int | None:
    r"""The integer from 0 to 999 that `text` states, None where it states none.

    Leading zeros, its name (`m+n = 33`), a degree or percent sign, brackets, `\text{}` with or
    without it, a decimal part of zeros and a full stop are no part of the number.
    """
    if len(text) > MAX_READ:
        return None
    bare = _MARKED_TEXT.sub(_keep_digits, _NAME.sub("", text))
    match = _INTEGER.fullmatch(_SIGNS.sub("", bare))
    return int(match[1]) if match else None


def as_choice(text: str) -> str | None:
    r"""The letter that `text` chooses, as `B`, `(B)`, `\text{B}`, `b`, `B) because …` and `option
    B` do. None where it chooses none, as a number or a word does, or two.
    """
    bare = " ".join(_MARKUP.sub("", text[:MAX_READ]).split())
    match = _LETTER.match(bare)
    if match is None or _SECOND_LETTER.match(bare, match.end()):
        return None
    return match[1].upper()


def _keep_digits(marked: re.Match[str]) -> str:
    return marked[1] if re.search(r"\d", marked[1]) else ""


READERS: Mapping[AnswerKind, Callable[[str], int | str | None]] = {
    AnswerKind.INTEGER: as_integer,
    AnswerKind.CHOICE: as_choice,
}
"""Kinds that are read before they are compared; all others are math-verify's."""
