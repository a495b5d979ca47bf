r"""The reference answer at the end of a whole solution: behind `####`, or in a box."""

import re

from lim_sglang.errors import DataError
from lim_sglang.programs.grading.answers import extract_answer

MAX_ANSWER_WORDS = 20
"""Most words of a reference answer; a longer one is prose."""
_WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{2,}")
_BOX = r"\boxed"
_MARK = "####"
_MARKED_ANSWER = re.compile(rf"{_MARK}[ \t]*([^\s#][^\n#]*?)\s*\Z")
"""End of GSM8K's solutions, `#### 72`."""
_GROUPED_QUANTITY = re.compile(r"[-+]?[$€£¥]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!,).*")
_PRICE = re.compile(r"\A(\$ ?\d[\d.,]*)\Z")
"""A price, whose sign would be taken for the beginning of a formula."""
_GROUP_COMMA = re.compile(r"(?<=\d),(?=\d{3})")


_STATED_ANSWER = re.compile(
    r"((?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is\b(?:\s*:)?|\s*:))"
    r"\s*(?!(?:not|see)\b)([^\s:].*?)\.*",
    re.IGNORECASE,
)
"""A sentence that is nothing but the statement of an answer."""


def reference_answer(answer: str) -> tuple[str, str | None]:
    """Return the reference in an answer, which may be a whole solution, and the mark before it.

    Raises:
        DataError: a solution in prose that does not mark its answer.
    """
    if found := _MARKED_ANSWER.search(answer):
        number = (
            _GROUP_COMMA.sub("", found[1]) if _GROUPED_QUANTITY.fullmatch(found[1]) else found[1]
        )
        return number, _MARK
    if _BOX in answer and (boxed := extract_answer(answer)):
        is_alone = answer.lstrip("$ ").startswith(_BOX)
        return boxed, None if is_alone else f"{_BOX}{{}}"
    if len(_WORD.findall(answer)) > MAX_ANSWER_WORDS or _MARK in answer:
        raise DataError(
            f"answer is a text of {len(answer):,} characters, to which no reply can be equal: give "
            f"the final answer alone, or end the solution with {_MARK} and the answer, or put the "
            f"answer into {_BOX}{{}}"
        )
    if found := _STATED_ANSWER.fullmatch(answer.strip()):
        return found[2], found[1]
    return _PRICE.sub(r"\\\1", answer), None
