r"""Answers that are texts, compared word for word: trimmed, and read from a reply."""

import re
from collections import deque

from lim_sglang.programs.grading.boxes import (
    BOX,
    denied_boxes,
    last_box,
    last_boxes,
    without,
)
from lim_sglang.programs.grading.corrections import CHANGED, is_changed
from lim_sglang.programs.grading.denials import is_asked, is_denied
from lim_sglang.programs.grading.withdrawals import is_taken_back

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
_NAME = (
    r"(?!(?:The|It|Its|This|That|These|Those|There|They|Their|He|His|She|Her|We|I|You|My|Our|Your"
    r"|So|Because|Since|As|If|For|In|On|At|By|To|From|With|And|But|Or|Not|No|Yes|All|Both|Each|Some"
    r"|However|Therefore|Thus|Hence|Then|When|Where|Why|How|What|Which|Who|Here|Note|Let|First"
    r"|Also|Option|Answer|Choice|Wait|Actually|Explanation|Others?|Only)\b)[A-Z][\w'’-]+"
)
"""A word with a capital letter that is unlikely to begin a sentence."""
_ABBREVIATION = (
    rf"(?-i:(?:(?<=\b(?:St|Dr|Mt|Ft|Mr|Ms|Lt))|(?<=\b(?:Ste|Mrs|Gen|Sen|Gov|Rev|Col|Sgt|Maj|Adm))"
    rf"|(?<=\bProf)|(?<=\bCapt))\.(?=[ ]{_NAME})"
    r"|(?:(?<=\bis [A-Z])|(?<=: [A-Z])|(?<=\b[A-Z]\. [A-Z]))"
    rf"\.(?=[ ](?:[A-Z]\.[ ]){{0,3}}{_NAME}(?:[ ]{_NAME}){{0,3}}"
    r"(?:[.,;]|[*_ ]*(?:\n|\Z)))"
    r"|(?<=\w[ ]No)(?<!\bis[ ]No)\.(?=[ ]\d))"
)
"""A full stop within a name: `St. Petersburg`, `J. R. R. Tolkien`, `Symphony No. 5`."""
_STATED = re.compile(
    r"(?:\banswer\b[^\n.:]{0,40}?(?:\bis\b(?! not\b)|:)|^####)(?P<lead>[*:\s]*)"
    rf"(?P<answer>(?:[^\n.]|\.(?=\S)|{_ABBREVIATION})+)(?P<end>\.?\s)?",
    re.MULTILINE | re.IGNORECASE,
)
"""A statement, to the end of its sentence or line."""
_SENTENCE_BEGIN = re.compile(r"[.!?][*_]*\s|\n")
_WRONG_ONE = re.compile(r"\b(?:wrong|incorrect|mistaken|false)\s+\Z", re.IGNORECASE)
"""Words before "answer" that name another one than the right one."""
_GIVES_REASON = re.compile(r"answer\s+to\b.*\b(?:since|because|which)\b", re.IGNORECASE)
"""The beginning of no statement: `I change my answer to Paris, since it is`."""
_INTERROGATIVE = re.compile(r"\W*(?:who|whom|whose|what|which|when|where|why|how)\b", re.IGNORECASE)
_OTHER = (
    rf"(?-i:(?:[Tt]he\s+)?{_NAME}"
    rf"(?:\s+(?:(?:of|the|and|de|la|von|van|du|da)\s+)*{_NAME}){{0,3}}|\d[\d,]*(?:\.\d+)?)"
)
"""A name or a number that takes the place of another one."""
_OPENED = r"[*_$\"“]*"
_ENDS = r"(?=[*_$\"”]*(?:[.!]?(?:\s*\Z|\s*\n)|[.!]\s|,?\s+(?:because|since|not)\b))"
_IT_IS = r"(?:(?:it(?:['’]s|\s+(?:is|should\s+be|must\s+be))|I\s+meant?)\s+(?:actually\s+)?)"
_THE_ONE_IS = rf"(?:{_IT_IS}|the\s+(?:\w+\s+){{1,4}}?(?:is|should\s+be)\s+)"
_ACTUALLY = r"(?:actually|on\s+second\s+thought)\b"
_WAIT = (
    r"(?:(?:wait|hm+|oh|sorry|oops|hold\s+on|(?:my\s+)?apologies|my\s+mistake"
    rf"|{_ACTUALLY})\b[\s,.!…—–-]*+)"
)
_CORRECTION = re.compile(
    r"(?:[\s.,;:!?*_$)\]}\"”—–-]|</answer>)*+"
    rf"(?:{_WAIT}*+no(?:pe)?(?:[,:—–]\s*{_THE_ONE_IS}?|[.;!]\s*{_THE_ONE_IS})"
    rf"|(?P<named>correction\s*[:—–]\s*){_THE_ONE_IS}?|{_WAIT}++{_IT_IS}"
    rf"|{_ACTUALLY}[,:]?\s*){_OPENED}"
    rf"(?P<other>(?!(?:none|typo|fixed)\b)(?:{_OTHER}|(?(named)[a-z]+|(?!)))){_ENDS}",
    re.IGNORECASE,
)
"""A sentence behind an answer that names another one: `. Wait, no, it is Paris`, `. No, Paris`."""
_CHANGED = re.compile(
    rf"\b{CHANGED}{_OPENED}(?P<other>{_OTHER}|(?<!\bbe )[a-z]+)"
    rf"(?:{_ENDS}|(?=[*_\"”]*(?:,|\s+(?:from\b|\())))",
    re.IGNORECASE,
)
MAX_STATEMENTS = 100
"""Statements that are looked at, from the end of the text: a limit of the time."""


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
        found = None if r"\boxed" in reply or _TAGGED.search(reply) else as_text(reply)
    if found is None:
        found = _stated(thoughts, cut_off=False)
    return found or None


def _stated(text: str, *, cut_off: bool) -> str | None:
    """Return what a part of a text states in a box, in tags or in a sentence; empty if it rejects
    all that it states.
    """
    boxes = last_boxes(text)
    denied = denied_boxes(boxes, text)
    if boxed := last_box(boxes, denied, text, cut_off):
        # As written: the content of a box has lost signs on one side.
        alone = (text[begin:end] for begin, end, content in boxes if (content, end) == boxed)
        written = _BOX.fullmatch(next(alone, ""))
        answer = as_text(written[1] if written else boxed[0])
        return _corrected(answer, text, boxed[1])
    if tags := deque(_TAGGED.finditer(text), maxlen=1):
        tag = (*tags[0].span(), as_text(tags[0][1]) or "")
        if not denied_boxes([tag], text):
            return _corrected(tag[2] or None, text, tag[1])
        text = without([tag], text)
    rejected: set[str | None] = set()
    for statement in reversed(deque(_STATED.finditer(text), maxlen=MAX_STATEMENTS)):
        if r"\boxed" in statement["answer"]:
            return None
        answer = as_text(_without_half(statement))
        if not _is_rejected(statement):
            has_ended = statement["end"] or not cut_off
            answer = answer if has_ended and answer not in rejected else None
            return _corrected(answer, text, statement.end("answer"))
        rejected.add(answer)
    return "" if rejected or denied else None


def _corrected(answer: str | None, text: str, end: int) -> str | None:
    """Return an answer, or the one of the same form by which the words behind it replace it.

    Args:
        end: end of the answer in the text.
    """
    if answer is None:
        return None
    for changed in reversed([*_CHANGED.finditer(text, end)]):
        if _form(changed["other"]) == _form(answer) and is_changed(text, changed.start()):
            return as_text(changed["other"])
    while correction := _CORRECTION.match(text, end):
        if _form(correction["other"]) != _form(answer):
            break
        answer, end = correction["other"], correction.end()
    return as_text(answer)


def _form(text: str) -> tuple[bool, bool]:
    """Return whether a text begins with a digit, and whether it has a capital letter."""
    return text[:1].isdigit(), text != text.lower()


def _is_rejected(statement: re.Match[str]) -> bool:
    """Return True if the words around a statement deny, suppose or ask what it states."""
    text, begin, end = statement.string, statement.start(), statement.end("answer")
    before = _SENTENCE_BEGIN.split(text[max(0, begin - MAX_WHOLE) : begin])[-1]
    if statement[0].startswith("#"):
        return False
    answer = statement["answer"].rstrip("*_ ")
    if is_taken_back(text, end, answer) or is_denied(before) or _WRONG_ONE.search(before):
        return True
    if _GIVES_REASON.match(text, begin, statement.start("answer")):
        return True
    asks = answer.endswith("?") and not _INTERROGATIVE.match(answer)
    return asks and is_asked(text, statement.start("answer") + len(answer) - 1, before)


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
