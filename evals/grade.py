"""Is an answer right, and are two answers the same: by math-verify, as integers for the AIME, as
letters where one is to be chosen.
"""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol


class AnswerKind(StrEnum):
    """How an answer is compared with the gold one."""

    EXPRESSION = "expression"
    """Mathematical equality, judged by math-verify."""
    INTEGER = "integer"
    """An integer from 0 to 999, as the AIME asks for."""
    CHOICE = "choice"
    """The letter of an option, A to J."""


CHOICES = "ABCDEFGHIJ"


class Judge(Protocol):
    """What grading needs of `programs.judge.AnswerJudge`."""

    def same(self, a: str, b: str) -> bool:
        """Whether two answers are equal; symmetric."""

    def correct(self, gold: str, answer: str) -> bool:
        """Whether `answer` is equal to the gold answer."""


class Grader:
    """Verdicts of one kind of answer. Grading again gives the same verdicts."""

    def __init__(self, kind: AnswerKind, judge: Judge) -> None:
        self.kind = kind
        self._judge = judge

    def correct(self, gold: str, answer: str | None) -> bool:
        """Whether an answer is right; no answer is not."""
        if answer is None:
            return False
        if (read := READERS.get(self.kind)) is None:
            return self._judge.correct(gold, answer)
        value = read(answer)
        return value is not None and value == read(gold)

    def same(self, a: str, b: str) -> bool:
        """Whether two answers share a vote."""
        if a == b:
            return True
        if (read := READERS.get(self.kind)) is None:
            return self._judge.same(a, b)
        value = read(a)
        return value is not None and value == read(b)


def as_integer(text: str) -> int | None:
    r"""The integer from 0 to 999 that `text` states, None where it states none.

    Leading zeros, dollar signs, `\text{}` and a final full stop are no part of the number.
    """
    bare = re.sub(r"\\(?:text|textbf|mathbf|mathrm)\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(r"[\s$]*0*(\d{1,3})(?:\.0*)?[\s$.]*", bare, re.ASCII)
    return int(match[1]) if match else None


def as_choice(text: str) -> str | None:
    r"""The letter that `text` chooses, as `B`, `(B)`, `\text{B}`, `b`, `B) because …` and `option B`
    do; None where it chooses none, as a number or a word does.
    """
    bare = re.sub(r"\\(?:text|textbf|mathbf|mathrm|boxed)\{([^{}]*)\}", r"\1", text).strip(" $*.")
    lead = r"(?:(?:the\s+)?(?:option|choice|answer)\s*(?:is)?:?\s*)?"
    match = re.match(rf"{lead}\(?\s*([A-Ja-j])(?:\s*$|\s*[).:,])", bare, re.IGNORECASE)
    return match[1].upper() if match else None


READERS: Mapping[AnswerKind, Callable[[str], int | str | None]] = {
    AnswerKind.INTEGER: as_integer,
    AnswerKind.CHOICE: as_choice,
}
"""Kinds that are read before they are compared; all others are math-verify's."""
