"""The words behind an answer that take it back: `. Wait, that is wrong`, `: 15, not 12.`"""

import re
from collections import deque

from lim_sglang.programs.grading.denials import FORGOT
from lim_sglang.programs.grading.units import NUMBER_IN_WORDS

_RIGHT = r"\s+(?:(?:the|an?)\s+)?(?:right|correct|possible|valid|answer)"
_APPEARS = r"(?:look|seem|sound|feel)"
_DOES_NOT = (
    r"do(?:es)?(?:n['’]t|\s+not)\s+(?:work|fit|hold|satisfy|match|solve|check\s+out|add\s+up"
    r"|make\s+(?:any\s+|much\s+)?sense"
    rf"|{_APPEARS}(?:\s+to\s+be)?{_RIGHT})"
)
_UNLIMITED = r"\b(?!-|\s+(?:to(?!\s+me\b)|for|if|unless|when|that|of|otherwise)\b)"
IS_WRONG = (
    rf"(?:(?:['’]s|is|was|{_APPEARS}s|(?:must|would)\s+be)(?:\s+\w+ly)?\s+(?:(?:the\s+|an?\s+)?"
    rf"(?:wrong|incorrect|mistaken|impossible|false|invalid|mistake|error|off)|not{_RIGHT})"
    rf"|(?:(?:is|was)n['’]t|(?:can(?:not|['’]t)|could(?:n['’]t|\s+not))\s+be){_RIGHT}"
    r"|(?:is|was|must\s+be)(?:\s+\w+ly)?\s+(?:extraneous|rejected|excluded|discarded|ruled\s+out)"
    r"|(?:contradict|violate|fail)s"
    rf"|{_DOES_NOT}){_UNLIMITED}"
)
_ITSELF = (
    r"(?:(?:(?:this|that|the|my|our)\s+)?(?:(?:above|previous|last|boxed|final)\s+)*"
    r"(?:answer|result|value|solution|conclusion|box)(?:\s+above)?|that|this|it|which)"
)
"""Words for the answer before: `the above answer`, `this`."""
_MISTAKE = (
    r"(?:(?:I|we)(?:['’]ve)?\s+(?:(?:have|just|now|think|see|realize|notice|believe|that|I|we)\s+)*"
    r"(?:made\s+an?\s+(?:\w+\s+)?(?:mistake|error|slip(?!\s+(?:of\s+paper|for\b)))\b(?!\?)"
    r"|(?:misread|miscounted|miscalculated|overlooked|misinterpreted)\b"
    rf"|{FORGOT})"
    r"|there\s+(?:was|is)\s+an?\s+(?:\w+\s+)?(?:mistake|error)\b"
    r"|(?:whoops|oops)\b[\s,.:;!—–-]+(?=[a-z]{2}))"
    r"(?![^.\n]*\b(?:at\s+first|before|earlier|first|initial(?:ly)?|previous(?:ly)?|original(?:ly)?"
    r"|fine|right|correct|ok(?:ay)?|fixed|corrected|cancels|unaffected|notation)\b)"
)
"""A mistake that the writer owns up to, and that is not an earlier one."""
BEHIND = r"(?:[\s$()\[\]*_]|\\[)\]]|</answer>)*+"
_PAUSE = (
    rf"(?:{BEHIND}[.,;!?—–-])*+{BEHIND}"
    r"(?:(?:no|wait|hm+|but|however|oh|ah|actually|oops|sorry|apologies|nope|never\s*mind|hold\s+on"
    r"|on\s+second\s+thought)\b[\s,.!…—–-]*)*"
)
_RECONSIDERS = (
    r"(?:let(?:['’]s|\s+me|\s+us)|I(?:['’]ll|\s+(?:will|should|must|need\s+to)))\s+(?:\w+\s+)?"
    r"(?:re-?(?:check|calculate|compute|count|consider|do|think|examine|evaluate|verify)"
    r"|(?:double-?\s?)?check|verify|try|redo|think|see|test)\b"
)
"""Words by which a writer begins to check an answer."""
TAKEN_BACK = re.compile(
    rf"{_PAUSE}(?:{_ITSELF}\s*{IS_WRONG}|{_MISTAKE}"
    rf"|(?:this|that)\s+is\s+not\s+the\s+answer\s+to\b|{_DOES_NOT}{_UNLIMITED}|scratch\s+that\b"
    rf"|(?:(?:wrong|incorrect|not{_RIGHT})|I\s+doubt\s+(?:it|this|that))(?=[.!]|\s*\Z)"
    r"|(?:(?:that|this|it)\s+should\s+(?:read|have\s+(?:been|read))"
    r"|(?:sorry|oops|correction|typo|my\s+mistake)\b[\s,.:;!—–-]*"
    r"(?:(?:that|this|it)\s+)?should\s+be)"
    r"(?=[\s*_\"“:]+[-+({\[$]*(?:\d|\\|(?!a\s)[a-z](?![a-z])"
    rf"|{NUMBER_IN_WORDS}))"
    r"|(?:wait|hm+|oh|actually|hold\s+on)\b[\s,.!…—–-]*no(?:pe)?(?=[.!]+(?:\s|\Z)|\s*\Z)"
    r"|(?:but|wait|however|actually)\b[\s,]+(?:actually,?\s+)?(?:we|I)\s+"
    r"(?:must|(?:still\s+)?(?:need|have)\s+to|should)\s+(?:(?:still|also)\s+)?"
    r"(?:add|subtract|multiply|divide|double(?![\s-]*check)|halve|square|exclude|include"
    r"|account|remove|take)\b"
    rf"|{_ITSELF}\s*(?:['’]s|is|{_APPEARS}s)\s+(?:(?:far|much|way|a\s+bit)\s+)?"
    rf"too\s+(?:small|large|big|low|high|few|many)\b[\s,.!…—–-]*{_RECONSIDERS})"
    rf"|{BEHIND}\?\s*no\b",
    re.IGNORECASE,
)
"""The words behind an answer that take it back: `. Wait, that is wrong`, `? No`."""
_NAMED_WRONG = re.compile(
    rf"{_PAUSE}(?:(?:the\s+)?(?:option|choice|answer)\s+)?[$*_(]*"
    r"(?P<value>(?-i:[A-J](?![a-zA-Z]))|-?\d[\d,/]*(?:\.\d+)?)[$*_)]*\s*"
    rf"(?:{IS_WRONG}|(?P<is_not>is(?:n['’]t|\s+not)\b(?!\s+(?:the\s+)?(?:only|just)\b)))"
    rf"|{_PAUSE}not\s+(?:option\s+)?[$*_(]*"
    r"(?P<denied>(?-i:[A-J](?![a-zA-Z]))|-?\d[\d,/]*(?:\.\d+)?)[$*_)]*(?=[.!]|\s*\Z)",
    re.IGNORECASE,
)
"""The words behind an answer that call it wrong by its name: `. But B is wrong`."""
_STOPS = re.compile(r"\b(?:wait|hm+|hold\s+on|oops)\b", re.IGNORECASE)
"""Words before a property that the answer lacks: `. Wait, B is not prime`."""
OWN_MISTAKE = re.compile(r"wait|hmm|oops|mistake|error|scratch|should", re.IGNORECASE)

_CALLED_WRONG = re.compile(BEHIND + IS_WRONG, re.IGNORECASE)
MAX_CHECK = 600
"""Characters behind an answer in which a check of it is looked for."""
_CHECKS = re.compile(
    rf"\b(?:{_RECONSIDERS}|(?:double-?\s?)?check(?:ing)?\b|verif(?:y|ying|ication)\b|wait\b"
    r"|hm+\b|hold\s+on\b|on\s+second\s+thoughts?\b|actually\b)",
    re.IGNORECASE,
)
"""The beginning of a check."""
_OTHER_CASE = re.compile(
    r"\b(?:if|unless|whether|would|could|might|may|suppos\w+|assum\w+|common|some(?:one)?|many|people"
    r"|students?|mistakes?|tempting|instead\s+of|trap|distractors?)\b",
    re.IGNORECASE,
)
"""A word by which a sentence is about another case than the answer's."""
_CHECKED_QUESTION = re.compile(rf"{BEHIND}\?\s*{_RECONSIDERS}", re.IGNORECASE)
_CONCLUDED = re.compile(
    r"\b(?:so|thus|hence|therefore)\b,?\s+(?:it(?:['’]s|\s+(?:is|must\s+be))\s+)?"
    r"[$*(\\]*(?:-?\d[\d,/.]*|(?-i:[A-J]))[\s$*)\\.!]*\Z",
    re.IGNORECASE,
)
"""A last clause that is nothing but another value: `So 24.`"""
_NOT_IT = re.compile(
    r"\d[^;:]*?(?:[\s,;—–-]|\b(?:which|that|it)(?:\s+is|['’]s))\s*(?:and\s+)?not\s+"
    r"(?:equal\s+to\s+)?[\s$*({\[\\]*\Z"
)
"""A number, and words before the one in whose place it was found: `3*5 = 15, not`."""
_CLAUSE = re.compile(
    r"(?:\A|[,;:—–]|\b(?:so|thus|hence|therefore|then|that|and|but|means|option|choice|answer))"
    r"[\s$*({\[\\]*\Z",
    re.IGNORECASE,
)
"""The beginning of a clause about a value: `that gives 15, so`."""
_CLAUSE_ENDS = re.compile(r"[\s$*)\]}\\]*(?:\s[a-z]+)?[\s*]*(?:[.,;!?]|\Z)")
_ENDS_SENTENCE = re.compile(r"[.!?](?!\d)|\n")
_SHORT = re.compile(r"-?\d[\d,]*(?:\.\d+)?|[A-J](?![a-zA-Z])")
"""A number or a letter that a check may name."""


def is_taken_back(text: str, end: int, answer: str) -> bool:
    """Return True if the words behind an answer take it back, or call it wrong by its name."""
    named = _NAMED_WRONG.match(text, end)
    bare = re.sub(r"\\text|[^\w,./-]", "", answer).rstrip(".")
    if named and bare in (named["value"], named["denied"]):
        return not named["is_not"] or bool(_STOPS.search(named[0]))
    return bool(TAKEN_BACK.match(text, end)) or _is_refuted(text, end, bare)


def _is_refuted(text: str, end: int, answer: str) -> bool:
    """Return True if a check behind a number or a letter finds another one in its place, as in
    `Check: 3*5 = 15, not 12.`, and the answer is not named again.
    """
    short = _SHORT.match(answer)
    check = _CHECKS.search(text, end, end + MAX_CHECK) if short else None
    if short is None or check is None:
        return False
    named = re.compile(rf"(?<![\w.,/^-]){re.escape(short[0])}(?![\w^/]|[.,]\d)")
    last = deque(named.finditer(text, check.start(), check.start() + MAX_CHECK), maxlen=1)
    if not last:
        is_replaced = _CHECKED_QUESTION.match(text, end) and _CONCLUDED.search(text, check.end())
        return bool(is_replaced) and not named.search(text, end)
    begin = max(
        (each.end() for each in _ENDS_SENTENCE.finditer(text, check.start(), last[0].start())),
        default=check.start(),
    )
    before, behind = text[begin : last[0].start()], last[0].end()
    closes = _ENDS_SENTENCE.search(text, behind)
    if _OTHER_CASE.search(text, begin, closes.start() if closes else len(text)):
        return False
    is_operand = re.search(rf"(?<!\w){re.escape(short[0])}(?!\w)", before)
    if is_operand or named.search(text, behind):
        return False
    is_other = _NOT_IT.search(before) and _CLAUSE_ENDS.match(text, behind)
    is_wrong = _CLAUSE.search(before) and _CALLED_WRONG.match(text, behind)
    return bool(is_other or is_wrong)
