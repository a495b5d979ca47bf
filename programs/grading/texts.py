r"""Answers that are texts, compared word for word: trimmed, and read from a reply."""

import re
from collections import deque

from lim_sglang.programs.grading.boxes import BOX, denied_boxes, last_box, last_boxes

SIGNS = " \n\r\t\"'“”‘’`$*.,;:?\\。"
"""Signs that may be trimmed of a text; a text of nothing else is none."""
MAX_WHOLE = 1000
"""Characters of the longest line that is an answer as a whole reply."""
_BOX = re.compile(rf"{BOX}\s*\{{(.*)\}}", re.DOTALL)
_STYLED = re.compile(
    r"\\(?:text|mathrm|mbox)(?:bf|it|tt)?\s*\{([^{}]*)\}|\\math(?:bf|tt)\{([^{}]*)\}"
)
_WRAPPED = re.compile(
    r"(?P<sign>\$\$?|\*{1,3}|`{1,3})(?P<a>(?:(?!(?P=sign)).)+)(?P=sign)|\\\((?P<b>(?:(?!\\\)).)+)\\\)"
    r"|\\\[(?P<c>(?:(?!\\\]).)+)\\\]|[\"“”](?P<d>[^\"“”]+)[\"“”]|``(?P<e>[^`']+)''"
    r"|['‘’](?P<f>[^'‘’]|[^'‘’].*[^'‘’])['‘’]",
    re.DOTALL,
)
"""A text between two quotes, or two signs of a formula, of code or of emphasis."""
_CLOSING_QUOTE, _OPENING_QUOTE = re.compile(r"(?<=\S)['’](?!\w)"), re.compile(r"(?<!\w)['‘](?=\w)")
_TAGGED = re.compile(r"<answer>((?:(?!</?answer).)+)</answer>", re.DOTALL | re.IGNORECASE)
_STATED = re.compile(
    r"(?:\banswer\b[^\n.:]{0,40}?(?:\bis\b(?! not\b)|:)|^####)(?P<lead>[*:\s]*)"
    r"(?P<answer>(?:[^\n.]|\.(?=\S))+)(?P<end>\.?\s)?",
    re.MULTILINE | re.IGNORECASE,
)
"""A statement, to the end of its sentence or line."""


def as_text(text: str) -> str | None:
    r"""Trim an answer: white space, `.,;:?` and backslashes at the end, and pairs of quotes, of
    backticks, of `$` and of `*`, and a `\text{}`, around the whole. White space within is one space
    each. None if nothing is left.
    """
    before, trimmed = "", text
    while before != trimmed:
        before = trimmed
        trimmed = trimmed.strip()
        if within := _within_pair(trimmed):
            trimmed = within
        elif styled := _STYLED.fullmatch(trimmed):
            trimmed = styled[1] or styled[2] or ""
        else:
            trimmed = trimmed.rstrip(".,;:?\\。")
    return " ".join(trimmed.split()) or None


def _within_pair(text: str) -> str | None:
    """Return what stands between the two signs around a text; None if the first one closes before
    the last, as in `'a' or 'b'`.
    """
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is None:
        return None
    if (quoted := wrapped["f"]) and (closing := _CLOSING_QUOTE.search(quoted)):
        return None if _OPENING_QUOTE.search(quoted, closing.end()) else quoted
    return next(part for name, part in wrapped.groupdict().items() if part and name != "sign")


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
    boxes = last_boxes(text)
    if boxed := last_box(boxes, denied_boxes(boxes, text), text, cut_off):
        # As written: the content of a box has lost signs on one side.
        alone = (text[begin:end] for begin, end, content in boxes if (content, end) == boxed)
        written = _BOX.fullmatch(next(alone, ""))
        return as_text(written[1] if written else boxed[0])
    if tags := deque(_TAGGED.finditer(text), maxlen=1):
        return as_text(tags[0][1])
    statements = deque(_STATED.finditer(text), maxlen=1)
    if not statements or r"\boxed" in statements[0]["answer"]:
        return None
    return as_text(_without_half(statements[0])) if statements[0]["end"] or not cut_off else None


_HALVES = [(sign, sign) for sign in ("***", "**", "*", '"', "`", "$")] + [("“", "”")]


def _without_half(statement: re.Match[str]) -> str:
    """Return the answer of a statement without the sign behind it whose other half is before it, as
    in `**Answer: Paris**` and, between the words and the answer, `Answer: *Paris*`.
    """
    text, lead = statement.string, statement["lead"]
    answer = statement["answer"].rstrip().removesuffix(lead[len(lead.rstrip("*")) :])
    begin = text.rfind("\n", 0, statement.start()) + 1
    before = text[begin : statement.start("lead")]
    for opening, closing in _HALVES:
        if answer.endswith(closing) and (opening != closing or answer.count(closing) % 2):
            last = before.rfind(opening)
            around = f"{before[:last][-1:]}{before[last + len(opening) :][:1]}"
            if last >= 0 and re.fullmatch(r"[^\w*]?[^\s*]", around):
                return answer.removesuffix(closing)
    return answer
