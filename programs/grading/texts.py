r"""Answers that are texts, compared word for word: trimmed, and read from a reply."""

import re
from collections import deque

from lim_sglang.programs.grading.boxes import last_box, last_boxes
from lim_sglang.programs.grading.latex import tidy

MAX_WHOLE = 1000
"""Characters of the longest line that is an answer as a whole reply."""
_QUOTES = "\"'“”‘’`"
_STYLED = re.compile(
    r"\\(?:text|mathrm|mbox)(?:bf|it|tt)?\s*\{([^{}]*)\}|\\math(?:bf|tt)\{([^{}]*)\}"
)
_TAGGED = re.compile(r"<answer>((?:(?!</?answer).)+)</answer>", re.DOTALL | re.IGNORECASE)
_STATED = re.compile(
    r"(?:\banswer\b[^\n.:]{0,40}?(?:\bis\b(?! not\b)|:)|^####)[*:\s]*"
    r"(?P<answer>(?:[^\n.]|\.(?=\S))+)(?P<end>\.?\s)?",
    re.MULTILINE | re.IGNORECASE,
)
"""A statement, to the end of its sentence or line."""


def as_text(text: str) -> str | None:
    r"""Trim an answer: white space, quotes, backticks, `$` and `*` at both ends, `.,;:?` and
    backslashes at the end, and a `\text{}` around the whole. White space within is one space each.
    None if nothing is left.
    """
    before, trimmed = "", text
    while before != trimmed:
        before = trimmed
        trimmed = tidy(trimmed).strip(_QUOTES)
        if styled := _STYLED.fullmatch(trimmed):
            trimmed = styled[1] or styled[2] or ""
    return " ".join(trimmed.split()) or None


def stated_text(text: str, *, cut_off: bool) -> str | None:
    r"""Return the text that a reply states, trimmed: its last box, else what `<answer>` encloses,
    else its last `The answer is …`, `Answer: …` or `#### …` up to the end of the sentence or line,
    else the whole reply if it is one line. None if it states none.

    The part behind the last `</think>` counts first, then the thoughts.

    Args:
        cut_off: the text reached a limit of tokens: a statement counts only if it has ended, and a
            whole reply does not.
    """
    thoughts, _, reply = text.rpartition("</think>")
    found = _stated(reply, cut_off=cut_off)
    if found is None and not cut_off and "\n" not in reply.strip() and len(reply) <= MAX_WHOLE:
        found = None if r"\boxed" in reply else as_text(reply)
    return found or _stated(thoughts, cut_off=False)


def _stated(text: str, *, cut_off: bool) -> str | None:
    """Return what a part of a text states in a box, in tags or in a sentence."""
    if boxed := last_box(last_boxes(text), text, cut_off):
        return as_text(boxed[0])
    if tags := deque(_TAGGED.finditer(text), maxlen=1):
        return as_text(tags[0][1])
    statements = deque(_STATED.finditer(text), maxlen=1)
    if not statements or r"\boxed" in statements[0]["answer"]:
        return None
    return as_text(statements[0]["answer"]) if statements[0]["end"] or not cut_off else None
