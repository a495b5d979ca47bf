r"""The answer that the last line of a reply shows: a letter or a number that stands alone, a bold
sentence, or the value that a last clause settles on."""

import re

from lim_sglang.programs.grading.denials import CONDITION, DOUBT, rules_out
from lim_sglang.programs.grading.latex import tidy
from lim_sglang.programs.grading.stated import are_one, calculated, is_measured
from lim_sglang.programs.grading.statements import ONLY
from lim_sglang.programs.grading.told import RESULT, told_value
from lim_sglang.programs.grading.values import read_number

MAX_LINE = 1000
"""Characters at the end of a reply in which its last lines are looked for."""
_SHOWN = (
    r"(?:(?:\*\*|__)?(?:\$\$?|\\\[|\\\()|\*\*|__)\s*(?P<shown>[^\n*$]{1,60}?)\s*"
    r"(?:(?:\$\$?|\\\]|\\\))\.?(?:\*\*|__)?|\*\*|__)\.?"
)
"""A value in bold or as a formula."""
_BEFORE = r"(?:\A|\n)[ \t]*(?P<before>\S[^\n]*?)[ \t]*\n\s*+"
"""The last line before the one that stands alone."""
_STYLE = r"\\(?:text|textbf|mathrm|mathbf|mathsf|boldsymbol|bm)\s*"
_LAST_LETTER = re.compile(
    rf"{_BEFORE}(?:{_SHOWN}|(?P<bare>\(?[A-HJ]\)?|{_STYLE}\{{\(?[A-J]\)?\}})\.?)\s*\Z"
)
_LAST_VALUE = re.compile(rf"{_BEFORE}{_SHOWN}\s*\Z")
_LETTER = re.compile(rf"(?:{_STYLE}\{{(?:{_STYLE}\{{)?)?\s*\(?([A-J])\)?\s*\}}{{0,2}}\.?")
_SENTENCE_ENDS = re.compile(r"(?:[.!]|\\\]|\$\$)[)\"”*_]*\Z")
"""The end of a line that leaves nothing open."""
_INTRODUCES = re.compile(
    r"\b(?:therefore|thus|hence|so|answer|result|total|altogether|finally|conclu\w+)\b[^:]*:[*_]*\Z"
    r"|\b(?:is|are|equals|get|obtain|have)\s*:[*_]*\Z",
    re.IGNORECASE,
)
"""A line that leads to the one below: `Therefore, the number of ways is:`."""
_NO_RESULT = re.compile(
    rf"\b(?:input|example|sample|check|test|try|instance|{CONDITION}|when|other\w*)\b",
    re.IGNORECASE,
)
"""A word of an introduction by which the line below is no result."""
_UNSETTLED = re.compile(
    rf"\b(?:{CONDITION}|first|next|steps?|case|consider|let|guess\w*|approximation|students?"
    r"|distractors?|except|least\s+likely)\b",
    re.IGNORECASE,
)
"""A word of a sentence by which the line below is no result."""
_OTHERS = re.compile(r"\bothers?\b", re.IGNORECASE)
"""A word of a sentence that denies all but the answer: `The other options are wrong.`"""
_ITEM = re.compile(r"[\s*_#>$(\[-]*(?:[A-Ja-j]|\d+)(?:[)\].:*_$]|\s*\Z)")
"""A line that is an item of a list, or alone like the one below."""
_BOLD_SENTENCE = re.compile(r"(?:\A|\n)[ \t]*\*\*(?P<sentence>[^*\n]{1,200})\*\*\.?\s*\Z")
_BOLD_VALUE = re.compile(
    rf"\s*(?P<sentence>{RESULT}\s+(?:is|are|equals)\s+\*\*(?P<value>[^*\n]{{1,40}})\*\*)\.?\s*\Z",
    re.IGNORECASE,
)
"""A reply of one sentence with its value in bold."""
_BOLD_RESULT = re.compile(
    r"(?P<calculation>half of \d[^*\n]{0,60}?)\s(?:is|equals)\s"
    r"\*\*(?P<value>[^*\n]{1,40})\*\*\.?\s*\Z",
    re.IGNORECASE,
)
"""A reply of one sentence with the result of its calculation in bold: `Half of 9 is **4.5**.`"""
_OTHER_FORM = re.compile(
    r"\*\*(?P<value>[^*\n]{1,40})\*\*(?P<bracket>\s*\(\s*(?:(?:or|i\.e\.|=|equivalently|that is)"
    r"(?![a-z]),?\s*)?(?P<other>[^()*\n]{1,60})\))[\s.]*\Z"
)
"""A value in bold at the end, and a value in brackets behind it: `**4.5** (or 9/2)`."""
_THAT_IS = re.compile(
    r"\s(?P<value>\$[^$\n]{1,60}\$|[^\s$]{1,40})(?P<bracket>,?\s(?:i\.e\.|that\sis|equivalently),?\s"
    r"(?P<other>[^\n,;]{1,40}?))[\s.]*\Z"
)
"""A value at the end, and the same in another form behind it: `3/8, i.e. 37.5%`."""
_GOING_WITH = re.compile(
    r"(?:(?:\A|[.!?][*_]*\s|\n)[\s*_]*|,\s+(?=(?:so|and|thus|hence|therefore)\b))"
    r"(?:(?:so|and|thus|hence|therefore|finally)\b,?\s+)?"
    r"(?:I|we)(?:['’](?:m|re|ll|d)|\s+(?:am|are|will|would))\s+(?:going\s+with|go\s+with)\s+"
    r"(?P<value>[^\n,;:?!]{1,60}?)[\s.!*_]*\Z",
    re.IGNORECASE,
)
"""The last clause of a reply, as `, so I'm going with 120.`"""
_WHICH_IS_OPTION = re.compile(
    r"(?P<before>\b(?:I|we|my|our|this|that|the)\b(?:[^.\n]|\.(?=\d))*"
    r"\b(?:is|are|gives?|yields?|equals?|get|find|obtain)\s+(?:about|approximately|roughly)?"
    r"[\s$(\\]*(?:[a-zA-Z]\s*=\s*)?[^\w\s]?\d(?:[^.,\n]|\.(?=\d))*),\s+which\s+"
    r"(?:is|matches|corresponds\s+to|agrees\s+with)\s+(?:(?:answer|option|choice)\s+)+"
    r"[*_$(\[]*(?P<letter>(?-i:[A-J]))[)\]*_$.!\s]*\Z",
    re.IGNORECASE,
)
"""A last sentence whose result is an option: `My calculation gives 2, which is option B.`"""
_OPTION = r"[*_]*(?P<{}>(?-i:[(\[]?[A-J][)\]]?|\([a-j]\)))[*_]*"
_LAST_ONE = (
    r"(?:(?:only|last)\s+(?:\w+\s+)?(?:option|choice|answer|possibility|one)\s+"
    r"(?:left(?:\s+standing)?|remaining|that\s+(?:remains|is\s+left))"
    r"|(?:(?:only|last)\s+)?remaining\s+(?:option|choice|answer|possibility|one))"
)
_ELIMINATING = (
    r"(?:(?:the\s+)?process\s+of\s+elimination"
    r"|(?:(?:eliminat|exclud|discard)ing|ruling\s+out)\s[^.]*?)"
)
_REMAINING = re.compile(
    r"(?!.*\b(?:at first|initially)\b)(?:(?P<before>.*),\s+)?[\s*_]*"
    r"(?P<so>(?:so|thus|hence|therefore)\b,?\s+(?:that\s+)?)?"
    rf"(?:(?P<only>only\s+)?(?P<noun>(?:option|choice|answer)\s+)?{_OPTION.format('option')}\s+"
    rf"(?:remains|is\s+left(?:\s+over)?|is\s+the\s+(?P<last>{_LAST_ONE}))"
    rf"|(?:(?:the|our|my)\s+{_LAST_ONE}\s+is|(?P<ruling>{_ELIMINATING})\s+leaves(?:\s+us)?(?:\s+(?:only|just|with))*)"
    rf"\s+(?:(?:option|choice)\s+)?{_OPTION.format('one')})",
    re.IGNORECASE,
)
"""A last sentence that leaves one option: `By elimination, C remains.`, `Only option C is left.`,
`The only remaining option is C.`, `Eliminating the others leaves C.`"""
_UNREAL = re.compile(r"\b(?:would|could|might|may|trap|student|someone|tempt\w+)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][*_]*\s|\n")


def last_letter(reply: str) -> str | None:
    """Return the letter that is alone in the last line of a reply, or that its last sentence calls
    the option of a result, or the only one left; None behind an open sentence, and for the last
    item of a list.
    """
    end = reply[-MAX_LINE:]
    last = _LAST_LETTER.search(end)
    letter = _LETTER.fullmatch(last["shown"] or last["bare"]) if last else None
    if last and letter and _leads_to_last(last["before"], letter[1]):
        return letter[1]
    *earlier, sentence = map(str.strip, _SENTENCE_END.split(end.rstrip(".!*_ \n")))
    if _UNREAL.search(sentence) or not (earlier or len(reply) <= MAX_LINE):
        return None
    option = _WHICH_IS_OPTION.fullmatch(sentence)
    if option and not DOUBT.search(option["before"]):
        return option["letter"]
    return _remaining(sentence)


def _remaining(sentence: str) -> str | None:
    """Return the letter of the option that a sentence leaves, unless something limits that."""
    remaining = _REMAINING.fullmatch(sentence)
    if remaining is None:
        return None
    before = remaining["before"] or ""
    ruling = remaining["ruling"]
    is_last = remaining["only"] or remaining["last"] or remaining["one"]
    if ruling and not (ruling.endswith("elimination") or rules_out(ruling)):
        return None
    if not (is_last or (remaining["so"] and remaining["noun"]) or rules_out(before)):
        return None
    if DOUBT.search(f"{ONLY.sub('', before)},"):
        return None
    return (remaining["option"] or remaining["one"]).strip("()[]").upper()


def last_value(reply: str) -> str | None:
    """Return the number that is alone in the last line of a reply, in bold or as a formula, that a
    bold last line states, or that the last clause settles on.
    """
    end = reply[-MAX_LINE:]
    last = _LAST_VALUE.search(end)
    value = tidy(last["shown"]) if last else ""
    if last and is_measured(value):
        is_led_to = _leads_to_last(last["before"], value)
        # An equation as `r = 12` may be a result on the way.
        is_led_to = is_led_to and ("=" not in value or bool(_INTRODUCES.search(last["before"])))
        return value if is_led_to else None
    if going := _GOING_WITH.search(end):
        before = _SENTENCE_END.split(end[: going.start() + 1])[-1]
        value = tidy(going["value"])
        is_supposed = re.search(rf"\b{CONDITION}\b", before, re.IGNORECASE)
        return value if is_measured(value) and not is_supposed else None
    if bold := _BOLD_SENTENCE.search(end) or _BOLD_VALUE.fullmatch(reply):
        sentence = bold["sentence"].replace("*", "").strip()
        return None if DOUBT.search(sentence) else told_value(sentence, plainly=True)
    if result := _BOLD_RESULT.fullmatch(reply):
        value = tidy(result["value"])
        total = calculated(result["calculation"].lower())
        return value if total is not None and read_number(value) == (total, None) else None
    return None


def without_other_form(reply: str) -> str:
    """Return a reply without the words at its end that repeat the number before in another form, as
    in `Half of 9 is **4.5** (or 9/2).` and `It is 3/8, i.e. 37.5%.`; any other reply as it is.
    """
    begin = max(0, len(reply) - MAX_LINE)
    found = _OTHER_FORM.search(reply, begin) or _THAT_IS.search(reply, begin)
    sides = [tidy(found[side]) for side in ("value", "other")] if found else []
    if found is None or not all(map(is_measured, sides)) or not are_one(*sides):
        return reply
    return reply[: found.start("bracket")] + reply[found.end("bracket") :]


def _leads_to_last(line: str, value: str) -> bool:
    """Return True if a line leaves the answer to the next one: its sentence has ended, or leads to
    a result, and nothing in it limits the answer, unless it ends in the same value.
    """
    sentence = ONLY.sub("", _SENTENCE_END.split(line.rstrip(".!*_$ "))[-1])
    if _ITEM.match(line) or (DOUBT.search(sentence) and not _OTHERS.search(sentence)):
        return False
    if _SENTENCE_ENDS.search(line):
        return sentence.endswith(value) or not _UNSETTLED.search(sentence)
    return bool(_INTRODUCES.search(line)) and not _NO_RESULT.search(line)
