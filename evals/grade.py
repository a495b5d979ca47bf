"""Is an answer right, and are two answers the same: by math-verify, or as integers for the AIME."""

import re
from enum import StrEnum
from typing import Protocol


class AnswerKind(StrEnum):
    """How an answer is compared with the gold one."""

    EXPRESSION = "expression"
    """Mathematical equality, judged by math-verify."""
    INTEGER = "integer"
    """An integer from 0 to 999, as the AIME asks for."""


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
        if self.kind is AnswerKind.INTEGER:
            value = as_integer(answer)
            return value is not None and value == as_integer(gold)
        return self._judge.correct(gold, answer)

    def same(self, a: str, b: str) -> bool:
        """Whether two answers share a vote."""
        if a == b:
            return True
        if self.kind is AnswerKind.INTEGER:
            value = as_integer(a)
            return value is not None and value == as_integer(b)
        return self._judge.same(a, b)


def as_integer(text: str) -> int | None:
    r"""The integer from 0 to 999 that `text` states, None where it states none.

    Leading zeros, dollar signs, `\text{}` and a final full stop are no part of the number.
    """
    bare = re.sub(r"\\(?:text|textbf|mathbf|mathrm)\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(r"[\s$]*0*(\d{1,3})(?:\.0*)?[\s$.]*", bare, re.ASCII)
    return int(match[1]) if match else None
