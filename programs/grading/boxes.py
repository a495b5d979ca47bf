r"""The answer that a text puts into boxes: the last one, with those that belong to it."""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator

from lim_sglang.programs.grading.latex import plain, tidy
from lim_sglang.programs.grading.units import NUMBERS_IN_WORDS, TENS_IN_WORDS

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
    r"|\b(?:doubt|don['’]t (?:think|believe))\s+(?:that\s+)?(?:it|this|that|the answer)\s+is"
    r"|\b(?:wrong|incorrect)\s+(?:answer|result|value)\s+(?:is|would be))"
    r"\s+(?:equal\s+to\s+|the\s+answer\s+)?[$*({\[\\\s]*\Z",
    re.IGNORECASE,
)
"""Words before a box that deny what it holds."""
NUMBER_IN_WORDS = (
    rf"\b(?:(?:{'|'.join(TENS_IN_WORDS)})(?:[ -](?:{'|'.join(NUMBERS_IN_WORDS[1:10])}))?"
    rf"|{'|'.join(NUMBERS_IN_WORDS)})\b"
)
"""A number below a hundred in words."""
_RIGHT = r"\s+(?:(?:the|an?)\s+)?(?:right|correct|possible|valid|answer)"
_APPEARS = r"(?:look|seem|sound|feel)"
_DOES_NOT = (
    r"do(?:es)?(?:n['’]t|\s+not)\s+(?:work|make\s+(?:any\s+|much\s+)?sense|add\s+up"
    rf"|{_APPEARS}(?:\s+to\s+be)?{_RIGHT})"
)
_UNLIMITED = r"\b(?!-|\s+(?:to(?!\s+me\b)|for|if|unless|when|that|of|otherwise)\b)"
IS_WRONG = (
    rf"(?:(?:['’]s|is|was|{_APPEARS}s|(?:must|would)\s+be)(?:\s+\w+ly)?\s+(?:(?:the\s+|an?\s+)?"
    rf"(?:wrong|incorrect|mistaken|impossible|false|invalid|mistake|error|off)|not{_RIGHT})"
    rf"|(?:(?:is|was)n['’]t|(?:can(?:not|['’]t)|could(?:n['’]t|\s+not))\s+be){_RIGHT}"
    rf"|{_DOES_NOT}){_UNLIMITED}"
)
_BEHIND = r"(?:[\s$()\[\]*_]|\\[)\]])*+"
_PAUSE = (
    rf"(?:{_BEHIND}[.,;!?—–-])*+{_BEHIND}"
    r"(?:(?:no|wait|hm+|but|however|oh|ah|actually|oops|sorry|nope|never\s*mind|hold\s+on|on\s+second\s+thought)\b"
    r"[\s,.!…—–-]*)*"
)
TAKEN_BACK = re.compile(
    rf"{_PAUSE}(?:(?:that|this|it|which)\s*{IS_WRONG}|{_DOES_NOT}{_UNLIMITED}|scratch\s+that\b"
    rf"|(?:(?:wrong|incorrect|not{_RIGHT})|I\s+doubt\s+(?:it|this|that))(?=[.!]|\s*\Z)"
    r"|(?:(?:that|this|it)\s+should\s+(?:read|have\s+(?:been|read))"
    r"|(?:sorry|oops|correction|typo|my\s+mistake)\b[\s,.:;!—–-]*(?:(?:that|this|it)\s+)?should\s+be)"
    r"(?=[\s*_\"“:]+[-+({\[$]*(?:\d|\\|(?!a\s)[a-z](?![a-z])"
    rf"|{NUMBER_IN_WORDS}))"
    r"|I\s+made\s+an?\s+(?:\w+\s+)?(?:mistake|error)\b(?!\s+(?:at|before|earlier|above)\b))"
    rf"|{_BEHIND}\?\s*no\b",
    re.IGNORECASE,
)
"""The words behind an answer that take it back: `. Wait, that is wrong`, `? No`."""
_NAMED_WRONG = re.compile(
    rf"{_PAUSE}(?:(?:the\s+)?(?:option|choice|answer)\s+)?[$*_(]*"
    r"(?P<value>(?-i:[A-J](?![a-zA-Z]))|-?\d[\d,/]*(?:\.\d+)?)[$*_)]*\s*"
    rf"(?:{IS_WRONG}|(?P<is_not>is(?:n['’]t|\s+not)\b(?!\s+(?:the\s+)?(?:only|just)\b)))",
    re.IGNORECASE,
)
"""The words behind an answer that call it wrong by its name: `. But B is wrong`."""
_STOPS = re.compile(r"\b(?:wait|hm+|hold\s+on|oops)\b", re.IGNORECASE)
"""Words before a property that the answer lacks: `. Wait, B is not prime`."""
_OWN_MISTAKE = re.compile(r"wait|hmm|oops|mistake|error|scratch|should", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}")
_BOX_IS_WRONG = re.compile(_BEHIND + IS_WRONG, re.IGNORECASE)
"""The rest of a sentence that calls the box before it wrong."""
_SAYS_WHAT_IT_IS_NOT = re.compile(
    rf"\b(?:answer|value|result|solution|it)\s+{_IS_NOT}(?![a-zA-Z])|\banswer:?\s+not\b",
    re.IGNORECASE,
)
"""Words of a box that say what the answer is not."""
_SIGN_BEFORE = re.compile(r"(?:(?:[$=(\[{]|\\[(\[])[ \t]*[-−][ \t]*|:[ \t]*[-−])\Z")
"""A sign before a box, in the formula that it is part of; no item of a list."""


Box = tuple[int, int, str]
"""Beginning, end and content."""


def is_taken_back(text: str, end: int, answer: str) -> bool:
    """Return True if the words behind an answer take it back, or call it wrong by its name."""
    named = _NAMED_WRONG.match(text, end)
    if named and named["value"] == re.sub(r"\\text|[^\w,./-]", "", answer).rstrip("."):
        return not named["is_not"] or bool(_STOPS.search(named[0]))
    return bool(TAKEN_BACK.match(text, end))


def last_boxes(text: str) -> Collection[Box]:
    """Return the last boxes of a text, of those that are closed and not empty."""
    return deque(_boxes(text), maxlen=MAX_JOINED)


def last_box(boxes: Collection[Box], text: str, cut_off: bool = False) -> tuple[str, int] | None:
    """Return the content of the box that begins last, together with the boxes of the same list, and
    their end. None if there is none, all are denied, or the list was cut off.
    """
    if cut_off and boxes and _UNFINISHED.match(text, [*boxes][-1][1]):
        return None
    denied = denied_boxes(boxes, text)
    asserted = [each for each in boxes if each not in denied]
    found = _join(asserted, text)
    if not found or _is_denied_after(found, text, asserted[-1][1]):
        return None
    return found, asserted[-1][1]


def without(boxes: Collection[Box], text: str) -> str:
    """Return a text with spaces in the place of some boxes."""
    for begin, end, _ in boxes:
        text = text[:begin] + " " * (end - begin) + text[end:]
    return text


def denied_boxes(boxes: Collection[Box], text: str) -> list[Box]:
    """Return the boxes that are denied; of equal ones the last says whether all of them are."""
    is_denied = {each: _is_denied(text, *each) for each in boxes}
    by_content = {each[2]: denied for each, denied in is_denied.items()}
    return [each for each, denied in is_denied.items() if denied or by_content[each[2]]]


def _is_denied(text: str, begin: int, end: int, content: str) -> bool:
    """Return True if the words before or behind a box deny what it holds."""
    if _BOX_DENIED.search(text, max(0, begin - MAX_BETWEEN), begin):
        return True
    taken_back = TAKEN_BACK.match(text, end)
    if taken_back and (content == "0" or _WORD.search(content)):
        # In `0. That is impossible` and `No. This is wrong`, the question is meant.
        return bool(_OWN_MISTAKE.search(taken_back[0]))
    return is_taken_back(text, end, content) or bool(_BOX_IS_WRONG.match(text, end))


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
    r"""Return False for a box without an answer: an empty one, and one with a sign that an answer
    is complete, as `\checkmark`.
    """
    if len(content) >= MAX_BETWEEN:
        return True
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
