r"""The answer that a text puts into boxes: the last one, with those that belong to it."""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from lim_sglang.programs.grading.denials import is_asked, is_denied, is_hypothetical
from lim_sglang.programs.grading.latex import is_unbalanced, plain, tidy
from lim_sglang.programs.grading.withdrawals import (
    BEHIND,
    IS_WRONG,
    OWN_MISTAKE,
    TAKEN_BACK,
    is_taken_back,
)

BOX = r"\\{1,2}(?:boxed|fbox)"
"""The command of a box."""
BOX_OR_BRACE = re.compile(
    rf"{BOX}\s*(?P<box>\{{)|{BOX}\s*(?P<number>[-+]?\.?\d[^\s$]{{,99}})|\\.|[{{}}]", re.DOTALL
)
"""The beginning of a box, and every brace; an escaped character is skipped."""
_NO_BOX = -1
_FILLER = re.compile(r"[\s$*]|\\(?:[()\[\],;: ]|quad\b|qquad\b)")
_NEXT_BOX = re.compile(
    r" *+(?:(?:,|;|&|\\\\|\\lor\b|\\land\b|\\text *\{ *,? *(?:and|or) *\}|\b(?:and|or)\b) *+)++"
    r"(?:(?P<name>[a-zA-Z](?:_\{?\w\}?)? *&?=)"
    r"|(?:the )?(?:other|second|third|larger|smaller|next|last)(?: [a-z]+)? (?:is|equals|=))? *+"
)
"""Text between two boxes that are one answer: commas, `and`, `or`, the name of a value, and words
as `and the other root is`."""
MAX_JOINED = 30
"""Most boxes that are one answer."""
MAX_BETWEEN = 100
"""Most characters between two boxes that are one answer."""
_UNFINISHED = re.compile(
    r"(?:[\s$*&)\]]|\\[)\]])*(?:(?:,|;|\b(?:and|or)\b)(?:[\s$*(\[]|\\[(\[])*)+(?:\w\s*=?\s*)?"
    r"(?:\\{1,2}(?:boxed|fbox)|(?:\\+[a-z]*)?\Z)"
)
"""A sign behind a box that another box follows, which is not there."""
_NAME_BEFORE = re.compile(r"([a-zA-Z](?:_\{?\w\}?)?)\s*&?=\s*$")
_IS_NOT = r"(?:(?:is|was)(?:n['’]t|\s+(?:definitely\s+|certainly\s+)?not)|can(?:not|['’]t)\s+be)"
_BOX_DENIED = re.compile(
    rf"(?:\b(?:not|rather than|instead of)|\b(?:it|that|this|answer)\s+{_IS_NOT}"
    r"|\b(?:(?<!no )(?<!not )(?<!n't )doubt|don['’]t (?:think|believe))\s+(?:that\s+)?"
    r"(?:it|this|that|the answer)\s+is"
    r"|\b(?:wrong|incorrect)\s+(?:answer|result|value)\s+(?:is|would be))"
    r"\s+(?:equal\s+to\s+|the\s+answer\s+)?[$*({\[\\\s]*\Z|(?:\\neq?(?![a-z])|≠|!=)[\s{]*\Z",
    re.IGNORECASE,
)
"""Words before a box that deny what it holds."""
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}")
_BOX_IS_WRONG = re.compile(BEHIND + IS_WRONG, re.IGNORECASE)
"""The rest of a sentence that calls the box before it wrong."""
_PROMPTED = re.compile(
    r"(?:\\text\s*\{)?[\s<\[]*(?:(?:your|the|my|final|correct)[\s_-]+)*"
    r"(?:answer|result|letter|value|number|choice)(?:\s+here)?[\s>\]}]*",
    re.IGNORECASE,
)
"""The words for an answer in the prompt's own box."""
_SAYS_WHAT_IT_IS_NOT = re.compile(
    rf"\b(?:answer|value|result|solution|it)\s+{_IS_NOT}(?![a-zA-Z])|\banswer:?\s+not\b",
    re.IGNORECASE,
)
"""Words of a box that say what the answer is not."""
_SIGN_BEFORE = re.compile(r"(?:(?:[$=(\[{]|\\[(\[])[ \t]*[-−][ \t]*|:[ \t]*[-−])\Z")
"""A sign before a box, in the formula that it is part of; no item of a list."""

_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n\s*\n")
_STATING = re.compile(
    r"(?:\b(?:(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)*(?:answer|value|result)|it|this|that)"
    r"(?:['’]s|\s+(?:is|was|were|would\s+be|equals))(?:\s+equal\s+to)?)?"
    r"[\s$*({\[\\]*(?:[a-zA-Z]\s*=\s*)?\Z",
    re.IGNORECASE,
)
"""Words before a box that state what it holds."""
_REJECTING = re.compile(
    r"\b(?:rul(?:e|es|ed|ing)\s+out|(?:rul(?:e|es|ed|ing)\s+out"
    r"|(?:reject|exclud|discard|eliminat|dismiss|disprov|refut)\w*)"
    r"\s+(?:the\s+)?(?:case|value|solution|root|answer|possibility)(?:\s+of)?"
    r"|(?:wrong|incorrect)\s+(?:formula|approach|method|rule)\b[^.;]*\bwould\b[^.;]*"
    r"|(?:suppose|supposing|assume|assuming|imagine|pretend)\b[^.,;]*\b(?:answer|value|result)"
    r"\s+(?:is|was|were)"
    r"|(?:previous|earlier|old|former|initial|naive|wrong|incorrect)\s+(?:\w+\s+)?"
    r"(?:version|answer|attempt|draft|formula|approach|method|calculation|guess)s?"
    r"\s+(?:said|was|gave|gives|had|would\s+give|yields|read)|naively\b(?:(?!\bbut\b)[^.;])*)"
    r"[\s$*({\[\\]*(?:[a-zA-Z]\s*=\s*)?\Z",
    re.IGNORECASE,
)
"""Words before a box, in its sentence, that reject what it holds, or suppose it."""
_REJECTS = re.compile(
    r"(?:\A|[,;:—–]|\b(?:so|thus|hence|therefore|then|and|but|that|why))[\s*_]*\b(?:I|we)\s+"
    r"(?:(?:must|should|can|will|now|also|then|thus|therefore|have\s+to|need\s+to)\s+)*"
    r"(?:reject|discard|exclude|eliminate)\s+[$*({\[\\]*(?:[a-zA-Z]\s*=\s*)?\Z",
    re.IGNORECASE,
)
"""A clause directly before a box that may reject what it holds: `so I reject`."""
_REASON = re.compile(
    rf"{BEHIND}(?:(?:,\s*)?(?:(?:since|as|because)\s+(?:it|this|that|[$(\\]*-?\d)|and\s+conclude)"
    r"|[,;]\s+(?:and\s+)?\S{1,20}\s+remains\b)",
    re.IGNORECASE,
)
"""Words behind a box by which it is rejected and not counted: `We discard 3 since it is even`."""
_CHANGED_FROM = re.compile(
    r"\b(?:chang\w+\s+(?:my|the|our)\s+answer|(?:my|the|our)\s+answer\s+chang\w+)\s+"
    r"(?:to\s+\S{1,30}\s+)?from\s+[$*({\[\\]*\Z",
    re.IGNORECASE,
)
"""Words before a box that is an earlier answer: `my answer changes to 8 from`."""
_NO_TERM = re.compile(r"[=,<>;]|\\(?:text|[gl]eq?|approx|pm)(?![a-z])|(?<![\\a-zA-Z])[a-zA-Z]{3}")
"""A sign of a box that holds more than a term of a formula."""
_LETTER = re.compile(r"\(?[A-J]\)?")
"""An option, which is no factor."""
_ONE_TERM = re.compile(r"[\w.]+|\\[a-zA-Z]+(?:\{[^{}]*\})*")
"""A term that needs no brackets in a formula."""
_POWER_NEXT = re.compile(r"\s*\^")
_SEPARATOR = re.compile(
    r"=|\\(?:approx|equiv|cong|sim|in|(?:q?quad|Right|right|Long(?:right)?|long(?:right)?)"
    r"(?:arrow)?|implies|iff|therefore|because|to|leadsto|tag|begin|end)(?![a-z])(?:\{[^{}]*\})?"
    r"|\\\\|[,;&\n]"
)
"""A sign between the sides of a formula, and between formulas."""
_ARITHMETIC = re.compile(
    r"(?:\d|\.\d|[a-zA-Z](?![a-zA-Z])"
    r"|\\(?:sqrt|[dt]?frac|pi|cdot|times|div|pm|mp|left|right)(?![a-z])"
    r"|[-+*/^_(){}:!±√×·−]|\s)*"
)
"""Signs that can be part of a value beside a box; with any other the box stands alone."""
_APART_BEFORE, _APART_BEHIND = re.compile(r"[\w)}]\s+\Z"), re.compile(r"\s+[\w(]")
"""A number, a name or a bracket that a space parts from a box."""
_NO_OPERAND = re.compile(
    r"\A(?:[*/^_]|\\(?:cdot|times|div)(?![a-z]))|(?:[-+*/^_]|\\(?:cdot|times|div))\s*\Z"
)
"""A sign of calculation at the end of a side, beside which nothing stands."""
_EQUALS_NEXT = re.compile(r"=|\\(?:approx|equiv)(?![a-z])")
_STYLED = r"\\(?:text|math|mbox|operatorname)[a-z]*\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?"
_BESIDE = re.compile(
    rf"/?{_STYLED}|\^\s*\{{?\s*\\circ\s*\}}?|\\?[%$]|[°*~£€]"
    r"|\\(?:displaystyle|left|right|[bB]igg?[lr]?|[lL]arge|LARGE|[hH]uge|square|blacksquare|Box"
    r"|checkmark|bf|bm|boldsymbol|underline|color\s*\{\w+\}|textcolor\s*\{\w+\}|p?mod\s*\{?\d*\}?)"
    r"(?![a-z])|\\[,;:! ]|\s+"
)
"""Signs beside a value that say nothing of it: units, styles, spaces."""
_LEADING = re.compile(rf"\A(?:{_BESIDE.pattern})+")
_TRAILING = re.compile(rf"(?:{_BESIDE.pattern})++\Z")
_LABEL_BEFORE = re.compile(r"\A[a-zA-Z]*:|\A[^\w\\({\[|+−√-]+")
"""The name of a value before its formula."""
_OPENED = re.compile(r"(?<![\w}^])(?:\\\{|[({\[])\Z")
"""A bracket that opens at the beginning of a side."""
_CLOSED = re.compile(r"\A(?:\\\}|[)}\]])")
_DELIMITER = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
"""A sign that opens or closes a formula."""
_PAIRS = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_RUN_BEHIND = re.compile(r"(?:[-+/^]\d|\\(?:sqrt|pi|frac|cdot|times)(?![a-z]))[^\s*$]{0,40}")
"""Signs without a space behind a box outside of a formula."""
_FACTOR_BEFORE = re.compile(
    r"\b((?P<sign>minus|negative)|(?:(?:a|one|two|three)[ -])?(?:half|twice|double|triple|thirds?"
    r"|quarters?|fourths?|fifths?|\w+ times)(?: of)?)\s+[$*({\[\\]*\Z",
    re.IGNORECASE,
)
"""Words before a box that make another number of it: `half of`."""
_SCALE_BEHIND = re.compile(
    r"[\s$*]*+(?:\\text\s*\{\s*)?"
    r"((?:hundred|thousand|million|billion|trillion|lakh|crore|dozen|factorial)s?\b"
    r"|(?:squared|cubed)\b(?!\s+[a-z])"
    r"|and\s+(?:a|one|two|three|four)\s+(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?"
    r"|eighths?|tenths?)\b(?!\s+of\b))\}?",
    re.IGNORECASE,
)
"""Words behind a box that make another number of it: `thousand`, `and a half`."""


Box = tuple[int, int, str]
"""Beginning, end and content."""


def last_boxes(text: str) -> Collection[Box]:
    """Return the last boxes of a text, of those that are closed and not empty, each with what its
    formula or sentence adds to the value: `\\boxed{5}\\pi`, `\\boxed{6} thousand`.
    """
    boxes = [*deque(_boxes(text), maxlen=MAX_JOINED)]
    whole: list[Box] = []
    for box in boxes:
        if whole and box[1] <= whole[-1][1]:
            continue
        whole.append(_in_words(text, _in_formula(text, box, boxes)))
    return whole


def _in_formula(text: str, box: Box, boxes: Sequence[Box]) -> Box:
    """Return the side of the formula that a box is in, without the braces of boxes; the box itself
    where the side has no more than that, or another side follows.
    """
    begin, end, content = box
    if len(content) > MAX_BETWEEN or _NO_TERM.search(content) or _LETTER.fullmatch(content):
        return box
    if _BOX_DENIED.search(text, max(0, begin - MAX_BETWEEN), begin):
        return box
    around = _formula_around(text, begin, end)
    if around is None:
        return box
    before = _after_last(_SEPARATOR, text[around[0] : begin])
    if not re.search(BOX, before):  # else a ratio
        before = before.rpartition(":")[2]
    behind = text[end : around[1]]
    stop = _SEPARATOR.search(behind)
    if stop and _EQUALS_NEXT.match(stop[0]):
        return box
    behind = behind[: stop.start()] if stop else behind
    first, last = begin - len(before), end + len(behind)
    inner = [each for each in boxes if first <= each[0] and each[1] <= last]
    if any(later[0] - each[1] < 1 for each, later in pairwise(inner)):
        return box
    pieces = [""]
    at = first
    for each in inner:
        pieces[-1] += text[at : each[0]]
        is_one = _ONE_TERM.fullmatch(each[2]) and not re.search(r"\w\s*\Z", pieces[-1])
        is_one = is_one and (each[2].isalnum() or not _POWER_NEXT.match(text, each[1]))
        pieces += [each[2] if is_one else f"({each[2]})", ""]
        at = each[1]
    pieces[-1] += text[at:last]
    pieces[0] = _LABEL_BEFORE.sub("", _LEADING.sub("", pieces[0]))
    pieces[-1] = _TRAILING.sub("", pieces[-1])
    if _APART_BEFORE.search(pieces[0]) or _APART_BEHIND.match(pieces[-1]):
        return box
    if not all(map(_ARITHMETIC.fullmatch, pieces[::2])):
        return box
    while opened := _OPENED.search(pieces[0]):
        pieces[0], pieces[-1] = pieces[0][: opened.start()], _CLOSED.sub("", pieces[-1])
    while len(pieces) == 3 and not pieces[0] and _CLOSED.match(pieces[-1]):
        pieces[-1] = _CLOSED.sub("", pieces[-1])
    side = "".join(pieces).strip(" .")
    if len(pieces) == 3 and not (pieces[0] + pieces[-1]).strip(" ."):
        return box
    if is_unbalanced(side) or _NO_OPERAND.search(side) or re.search(BOX, side):
        return box
    return first, last, tidy(side)


def _after_last(pattern: re.Pattern[str], text: str) -> str:
    """Return what stands behind the last match in a text; all of it without a match."""
    last = deque(pattern.finditer(text), maxlen=1)
    return text[last[0].end() :] if last else text


def _formula_around(text: str, begin: int, end: int) -> tuple[int, int] | None:
    """Return beginning and end of the formula, or of the run of signs without a space, that a box
    is in; None if words stand in it.
    """
    earliest = max(0, begin - MAX_BETWEEN)
    opened = deque(_DELIMITER.finditer(text, earliest, begin), maxlen=1)
    closed = _DELIMITER.search(text, end, end + MAX_BETWEEN)
    first = last = None
    if opened and closed and _PAIRS.get(opened[0][0]) == closed[0]:
        line = text.rfind("\n\n", 0, begin) + 1
        count = len(_DELIMITER.findall(text, max(line, begin - 10 * MAX_BETWEEN), begin))
        if closed[0] not in ("$", "$$") or count % 2:
            first, last = opened[0].end(), closed.start()
    if first is None or last is None:
        first = begin
        run = _RUN_BEHIND.match(text, end, end + MAX_BETWEEN)
        last = run.end() if run else end
    has_words = _WORD.search(_BESIDE.sub("", text[first:begin] + " " + text[end:last]))
    return None if has_words else (first, last)


def _in_words(text: str, box: Box) -> Box:
    """Return a box with the words beside it that make another number of what it holds."""
    begin, end, content = box
    if before := _FACTOR_BEFORE.search(text, max(0, begin - MAX_BETWEEN), begin):
        words = "-" if before["sign"] else f"{before[1]} "
        return before.start(), end, f"{words}{content}"
    if behind := _SCALE_BEHIND.match(text, end):
        return begin, behind.end(), f"{content} {behind[1]}"
    return box


def last_box(
    boxes: Collection[Box], denied: Collection[Box], text: str, cut_off: bool = False
) -> tuple[str, int] | None:
    """Return the content of the box that begins last, together with the boxes of the same list, and
    their end. None if there is none, all are denied, or the list was cut off.

    Args:
        denied: those of `denied_boxes`.
    """
    if cut_off and boxes and _UNFINISHED.match(text, [*boxes][-1][1]):
        return None
    asserted = [each for each in boxes if each not in denied]
    found = _join(asserted, text)
    if not found:
        return None
    _, end, content = asserted[-1]
    # `denied_boxes` has looked for a denial of one box's content.
    return None if found != content and _is_denied_after(found, text, end) else (found, end)


def without(boxes: Collection[Box], text: str) -> str:
    """Return a text with spaces in the place of some boxes."""
    for begin, end, _ in boxes:
        text = text[:begin] + " " * (end - begin) + text[end:]
    return text


def denied_boxes(boxes: Collection[Box], text: str) -> list[Box]:
    """Return the boxes that are denied; of equal ones the last says whether all of them are. A box
    that is asked or would be right in another case says nothing of the others.
    """
    supposed = {each for each in boxes if _is_supposed(text, *each)}
    is_denied = {each: _is_denied(text, *each) for each in boxes if each not in supposed}
    by_content = {each[2]: denied for each, denied in is_denied.items()}
    return [each for each in boxes if each in supposed or is_denied[each] or by_content[each[2]]]


def _is_supposed(text: str, begin: int, end: int, content: str) -> bool:
    """Return True if a box is asked, or its sentence says what would be right in another case."""
    before = _SENTENCE_END.split(text[max(0, begin - 3 * MAX_BETWEEN) : begin])[-1]
    return is_asked(text, end, before) or is_hypothetical(before, text[end : end + MAX_BETWEEN])


def _is_denied(text: str, begin: int, end: int, content: str) -> bool:
    """Return True if the words before or behind a box deny what it holds."""
    if _BOX_DENIED.search(text, max(0, begin - MAX_BETWEEN), begin):
        return True
    if _in_denial(text, begin, end):
        return True
    taken_back = TAKEN_BACK.match(text, end)
    if taken_back and (content == "0" or _WORD.search(content)):
        # In `0. That is impossible` and `No. This is wrong`, the question is meant.
        return bool(OWN_MISTAKE.search(taken_back[0]))
    is_wrong = bool(_BOX_IS_WRONG.match(text, end)) or _is_denied_after(content, text, end)
    return is_wrong or is_taken_back(text, end, content)


def _in_denial(text: str, begin: int, end: int) -> bool:
    """Return True if the sentence before a box denies or supposes what the box holds."""
    before = _SENTENCE_END.split(text[max(0, begin - 3 * MAX_BETWEEN) : begin])[-1]
    if _REJECTING.search(before) or _CHANGED_FROM.search(before):
        return True
    if _REJECTS.search(before) and _REASON.match(text, end):
        return True
    clause = _STATING.sub("", before)
    return clause != before and is_denied(clause)


def _is_denied_after(answer: str, text: str, end: int) -> bool:
    """Return True if "the answer is not 7" follows an answer of 7 in a box."""
    if len(answer) > MAX_BETWEEN:
        return False
    denied = (
        rf"\banswer\s+{_IS_NOT}\s+[$*({{\[\\]*(?:{BOX}\s*\{{)?\s*{re.escape(answer)}(?![\w.,]*\w)"
    )
    return bool(re.search(denied, text[end:], re.IGNORECASE))


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield beginning, end and content of the boxes, each with a later beginning than the last."""
    start = -1
    # The beginning of each open box, and that of its content; no match objects, since there may be
    # millions.
    open_braces: list[tuple[int, int]] = []
    for token in BOX_OR_BRACE.finditer(text):
        if token["number"]:
            start = token.start("number")
            yield token.start(), token.end(), tidy(token["number"])
        elif token["box"] or token[0] == "{":
            open_braces.append((token.start(), token.end() if token["box"] else _NO_BOX))
        elif token[0] == "}" and open_braces:
            outside, begin = open_braces.pop()
            # An outer box ends later but begins earlier.
            if begin > start and _shows(content := tidy(text[begin : token.start()])):
                start = begin
                yield outside, token.end(), content


def _shows(content: str) -> bool:
    r"""Return False for a box without an answer: an empty one, one with the prompt's own words, and
    one with a sign that an answer is complete, as `\checkmark`.
    """
    if len(content) >= MAX_BETWEEN or content.isdecimal():
        return True
    if _PROMPTED.fullmatch(content):
        return False
    return bool(plain(content)) and not _SAYS_WHAT_IT_IS_NOT.search(content)


def _join(boxes: Iterable[tuple[int, int, str]], text: str) -> str:
    """Return the last of the boxes, with those before it that commas, `and` or `or` join to it."""
    joined: list[tuple[str, str]] = []
    last_end = 0
    for begin, end, content in boxes:
        between = None
        if joined and begin - last_end < MAX_BETWEEN:
            between = _NEXT_BOX.fullmatch(_FILLER.sub(" ", text[last_end:begin]))
        if between is None:
            before = _NAME_BEFORE.search(text, max(0, begin - 20), begin)
            if _SIGN_BEFORE.search(text, max(0, begin - 20), begin):
                content = f"-{content}" if re.match(r"[\w\\.]", content) else f"-({content})"
            joined = [(before[1] if before else "", content)]
        else:
            name = (between["name"] or "").rstrip(" =&")
            if (name, content) not in joined:
                joined.append((name, content))
        last_end = end
    names = {name for name, _ in joined}
    if len(joined) > 1 and len(names) == len(joined):
        # Different names: the values have an order.
        return ", ".join(f"{name}={content}" if name else content for name, content in joined)
    return ", ".join(content for _, content in joined)
