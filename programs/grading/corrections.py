r"""Corrections that need an answer before them: `It should be 13.`, `is wrong, it is 13`."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lim_sglang.programs.grading.denials import CONDITION, FORGOT
from lim_sglang.programs.grading.units import NUMBER_IN_WORDS
from lim_sglang.programs.grading.withdrawals import IS_WRONG

MAX_BEFORE = 200
"""Characters before a correction that are read for what it corrects."""
FORMULA = (
    r"(?:\$\$[^$]{1,500}\$\$|\$(?!\s)[^$]{1,500}(?<!\s)\$(?!\d)"
    r"|\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\])"
)
_ARGUMENT = r"\{(?:[^{}\n]|\{[^{}\n]{0,30}\}){1,50}\}"
_LATEX = rf"\\(?:[dt]?frac\s*(?:\d\s?\d|{_ARGUMENT}\s*{_ARGUMENT})|sqrt\s*(?:\d|{_ARGUMENT})|pi\b)"
_NUMBER = rf"(?:{FORMULA}|[-+−]?\$?(?:\d+(?:[.,/]\d+)*+|{_LATEX}){{1,2}}\$?(?:\s?\\?%)?)"
_TUPLE = r"(?:\\?[(\[{](?=[^()\[\]{}\n]{0,60},)[^()\[\]{}\n]{3,100}[)\]}])"
_LETTER = r"(?-i:\(?(?<![a-zA-Z])[A-J](?![a-zA-Z])\)?)"
_NO_UNIT = r"(?!(?:less|more|fewer|times|too|left|or|and|to|is|in|of|by|per|if|plus|minus|mod)\b)"
_UNIT = rf"(?:\s+{_NO_UNIT}[a-z]+(?:\^?[23]|[²³])?)?"
VALUE = rf"(?:(?:[a-z]\s*=\s*)?(?:{_NUMBER}{_UNIT}|{_TUPLE}|{NUMBER_IN_WORDS})|{_LETTER})"
ENDS_SENTENCE = r"[*_)\]\"”]*(?:[.!](?=[\s)\]]|\Z)|\s*(?:\n|\Z))"
_ENDS = (
    rf"(?:{ENDS_SENTENCE}|[*_)\"”]*"
    r"(?:[,;—–-]?\s*\b(?:because|since|as|not|rather\s+than|instead|i\.e\.)(?!\w)|;\s))"
)
_PRONOUN = r"(?:it|that|this)"
_STRESS = r"(?:(?:actually|really|rather|instead|simply|just|of\s+course|in\s+fact)\s+)?"
SHOULD = (
    rf"(?:{_PRONOUN}\s+)?(?:should|ought\s+to)\s+{_STRESS}(?:be|read|say|have\s+(?:been|read|said))"
)
"""Words that put another value in the place of the one before."""
MEANT = r"(?:I\s+meant?|meant)(?:\s+to\s+(?:say|write|type|put))?\b"
AMENDED = (
    r"(?:(?P<should>"
    rf"(?:(?P<old>(?<![\d.,/])\d+(?:[.,/]\d+)*+\$?|{_LETTER})\s+)?{SHOULD}|make\s+{_PRONOUN}|{MEANT}"
    r"|no(?:pe)?(?=[\s,.:;!—–-])|on\s+second\s+thoughts?(?=,)|(?:edit|erratum|update)(?=:)"
    rf"|please\s+read|read(?=\s+{VALUE}\s+instead\b)"
    r"|(?:the\s+)?(?:correct|right|true|actual)\s+(?:value|result|number|one)\s+(?:is|should\s+be)"
    rf"|{_PRONOUN}(?:['’]s|\s+is)\s+(?:actually|really|rather|in\s+fact))"
    r"|(?:it(?:['’]s|\s+(?:is|was|must\s+be))|but(?:\s+rather)?"
    r"|(?P<wrong>wrong|incorrect|mistaken|mistake|typo|right|correct)[.,;:!—–-]*"
    rf"(?=\s+(?:{_NUMBER}\s+is\s+(?:the\s+)?(?:correct|right)\b|{VALUE}{_ENDS}))))"
    rf"[\s,.:;!*_\"“—–]*(?:-{{1,3}}\s+)?{_STRESS}"
    rf"(?=(?:{VALUE}|{_NUMBER}\s+is\s+(?:the\s+)?(?:correct|right)\b){_ENDS})"
)
"""Words before a value that correct an answer, if `is_correction` finds one before them."""
REPLACED = rf"{SHOULD}[\s,:*_\"“]*(?={VALUE}{_ENDS})"
"""Words that correct an answer, if an apology is before them: `sorry, that should read`."""
_OWN_ANSWER = r"(?:my|the|our)\s+(?:final\s+)?(?:answer|choice|response)"
_I_WILL = (
    r"(?:I|we)(?:['’](?:d|ll|m|ve|re))?\s+(?:(?:would|will|am|are|have|must|should|need|want|going"
    r"|like|to|now|thus|therefore|hence|instead)\s+)*|let\s+me\s+|(?=changing\b)"
)
CHANGED = (
    rf"(?:(?:{_I_WILL})(?:chang|revis|updat|amend|switch)(?:e|ing|ed)?\s+{_OWN_ANSWER}"
    r"|my\s+answer\s+(?:now\s+|therefore\s+)?changes)"
    r"\s+(?:from\s+(?:[^\s.]+\s+)?)?to:?\s+(?:be\s+)?[*_\"“]*(?:(?:option|choice)\s+)?"
)
"""Words before the value that takes the place of the own answer: `I change my answer to`."""
_OPENS = re.compile(
    r"(?:.*[,;:—–]\s+(?=(?:so|thus|hence|therefore)\b))?"
    r"(?:[\s*_#>.,:;…—–-]|\b(?:so|thus|hence|therefore|and|but|now|hmm+|oh|oops|sorry|wait|no"
    r"|actually|given\s+(?:that|this)|on\s+(?:second\s+thoughts?|reflection))\b)*+",
    re.IGNORECASE | re.DOTALL,
)
"""The beginning of a sentence up to a clause that nothing limits."""
_OTHER_CASE = re.compile(rf"\b(?:would|could|might|may|when|{CONDITION})\b", re.IGNORECASE)
"""A word by which a sentence is about another case."""
APOLOGY = (
    r"(?:(?:sorry|I\s+apologi[sz]e|(?:my\s+)?apologies)"
    r"(?:\s+(?:about|for)\s+(?:that|this|(?:the|my)\s+(?:confusion|error|mistake|slip|typo)))?"
    r"|oops|whoops|typo|scratch\s+that|my\s+(?:bad|mistake|error)"
    r"|I\s+(?:misspoke|mistyped|miscounted|misread(?:\s+it)?)"
    r"|I\s+made\s+an?\s+(?:\w+\s+)?(?:mistake|error|slip|typo))"
)
_EDIT = r"(?:correction|edit|erratum|update|on\s+second\s+thoughts?)"
_FILLER = (
    r"(?:[\s$*_\"'“”()\[\].,;:!?…—–>→-]|\\[()\[\],;!]"
    rf"|\b(?:{APOLOGY}|{_EDIT}|so|thus|hence|therefore|then|and|but|no(?:pe)?|wait|actually|hmm|oh|ah|well"
    r"|rather|instead|in\s+fact|of\s+course|hold\s+on"
    rf"|let\s+me\s+correct\s+(?:{_PRONOUN}|myself)|is\s+{_PRONOUN}\s+(?:right|correct|true)"
    rf"|I\s+(?:now\s+)?(?:think|believe|see|realize)(?:\s+(?:that|now))?)\b)*+"
)
"""Text between an answer and its correction that is about nothing else."""
_ADMITTED = re.compile(rf"\b(?:{APOLOGY}|{_EDIT})\b", re.IGNORECASE)
_DIRECTLY = re.compile(
    rf"[\s$}}]*(?:\\text\s*\{{[^{{}}]{{1,30}}\}}|[a-z]+\b(?=[\s$]*[.,;:(\n—–-]))?{_FILLER}",
    re.IGNORECASE,
)
"""Text between an answer, or its unit, and a correction."""
_WRONG = (
    rf"(?:{IS_WRONG}|(?:['’]s|is|was)\s+(?:\w+ly\s+)?"
    r"(?:too\s+(?:small|large|big|low|high|few|many)|off(?:\s+by\s+\w+)?|a\s+typo)\b)"
)
_IS_WRONG = re.compile(rf"[\s$*_)\]}}\\]*{_WRONG}{_FILLER}", re.IGNORECASE)
"""Words directly behind an answer that reject it."""
_REJECTED = re.compile(
    rf"(?:(?P<pronoun>\b(?:{_PRONOUN}|which))|(?P<number>(?<![\w.{{]){_NUMBER}|{_LETTER})"
    r"|\b(?:my|the|this|that|our)\s+(?:(?:first|earlier|previous|boxed|final)\s+)?"
    rf"(?:answer|result|box)(?:\s+above)?)\s*{_WRONG}{_FILLER}\Z"
    rf"|\b(?:(?P<answer>answer)|{_PRONOUN})\s*"
    r"(?:(?:is|was)(?:n['’]t|\s+(?:\w+ly\s+)?not)|['’]s\s+not|(?:can|could)(?:not|n['’]t|\s+not)\s+be)"
    rf"\s+(?:the\s+answer\s+)?(?P<not>{_NUMBER}{_UNIT}|{_LETTER}){_FILLER}\Z",
    re.IGNORECASE,
)
"""Words before a correction that reject an answer, or a value that they name."""
_SUPPOSED = re.compile(
    r"\b(?:if|whether|unless|suppos\w+|assum\w+|imagine|why|when|may|might|would|could|says?"
    r"|claims?|(?<!\bI )thinks?)\b[^.,;]*\Z",
    re.IGNORECASE,
)
_OWN_MISTAKE = re.compile(
    r"\bI\s+(?:(?:missed|overlooked|misread|miscounted|miscalculated|dropped|omitted|skipped|swapped"
    r"|mixed\s+up|double[- ]counted)\b|made\s+an?\s+(?:\w+\s+)?(?:mistake|error|slip)\b"
    rf"|{FORGOT})"
    rf"[^\n]*(?:[.,;:—–-]|\bso\b)\s*{_FILLER}\Z",
    re.IGNORECASE,
)
"""A mistake that the writer owns up to, up to the beginning of a clause."""
_BEGINS = re.compile(rf"(?:not\s+)?(?:{_NUMBER}|{_LETTER})")
_SENTENCE = re.compile(r"[.!?]\s|\n")
_REST = re.compile(r"(?:[^\n.!?]|\.(?=\d))*[\s.!*_$)]*\Z")
"""The rest of a last sentence."""
_SO = re.compile(r"[\s*_]*(?:(?:so|thus|hence|therefore|then|and)\b[\s,]*)*", re.IGNORECASE)
_LAST_VALUE = re.compile(rf"[*_$(\\]*{VALUE}[\s.!*_$)\\]*\Z", re.IGNORECASE)
_CLOSER = re.compile(r"[\s.!*_]*[)\]][\s.!*_]*\Z")
_TAIL = re.compile(
    r"\s+(?:instead|though|after\s+all|actually)$|\s+from\b.*|\s+is\s+(?:the\s+)?(?:correct|right)\b.*|;\s.*",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True)
class Given:
    """The answer before a correction."""

    value: str
    end: int
    """End of the value in the text."""
    is_denied: bool = False


def amended_value(words: str) -> str:
    """Return the value of a correction without the words behind it, as `13 instead`, and without
    the end of a sentence in brackets.
    """
    num_opened, num_closed = (len(re.findall(signs, words)) for signs in (r"[(\[]", r"[)\]]"))
    return _TAIL.sub("", _CLOSER.sub("", words) if num_closed > num_opened else words)


def is_formula(words: str) -> bool:
    """Return True for words that begin with a formula, or with values in brackets."""
    return bool(re.match(rf"{FORMULA}|{_TUPLE}|[-+]?\d*{_LATEX}", words))


def value_end(text: str, begin: int) -> int | None:
    """Return the end of a number or a letter that begins somewhere; None if none begins there."""
    value = _BEGINS.match(text, begin)
    return value.end() if value else None


def is_correction(
    lead: re.Match[str], given: Given | None, same: Callable[[str, str], bool]
) -> bool:
    """Return True if the words before a value correct an answer: they follow it directly, or reject
    it, as `is wrong, it is`, `The answer isn't 7, it's` and `I forgot one, so it should be`, or
    name it, as `12 should read`.

    Args:
        lead: a match of `AMENDED`.
        given: the last answer before the lead.
        same: equality of two values.
    """
    text, begin = lead.string, lead.start()
    earliest = max(0, begin - MAX_BEFORE)
    until = lead.end() if lead["wrong"] else begin
    if lead["old"]:
        sign = "-" if text[begin - 1 : begin] in ("-", "−") else ""
        return bool(given and same(sign + lead["old"], given.value))
    if given and earliest <= given.end <= begin:
        is_strong = lead["should"] or _ADMITTED.search(text, given.end, begin)
        is_strong = is_strong or (given.is_denied and not lead["wrong"])
        if is_strong and _DIRECTLY.fullmatch(text, given.end, begin):
            return True
        if _IS_WRONG.fullmatch(text, given.end, until):
            return True
    if given and given.is_denied and not lead["wrong"] and _is_conclusion(lead):
        return True
    rejected = _REJECTED.search(text, earliest, until)
    if rejected and not is_supposed(text, rejected.start()):
        if value := rejected["not"] or rejected["number"]:
            return bool(rejected["answer"] or (given and same(value, given.value)))
        if rejected["pronoun"]:
            at = rejected.start()
            return bool(given and given.end <= at and _DIRECTLY.fullmatch(text, given.end, at))
        return given is not None
    is_own = lead["should"] and given and _OWN_MISTAKE.search(text, max(earliest, given.end), begin)
    return bool(is_own and _REST.match(text, lead.end()))


def _is_conclusion(lead: re.Match[str]) -> bool:
    """Return True if the words before a value are its whole sentence, which is the last one: `So it
    is 15.`
    """
    before = _SENTENCE.split(lead.string[max(0, lead.start() - MAX_BEFORE) : lead.start()])[-1]
    return bool(_SO.fullmatch(before) and _LAST_VALUE.match(lead.string, lead.end()))


def is_changed(text: str, begin: int) -> bool:
    """Return True if `I change my answer to` begins a clause that nothing limits."""
    before = _SENTENCE.split(text[max(0, begin - MAX_BEFORE) : begin])[-1]
    return bool(_OPENS.fullmatch(before)) and not _OTHER_CASE.search(before)


def is_supposed(text: str, begin: int) -> bool:
    """Return True if the beginning of a sentence supposes what follows, or has it from others."""
    before = _SENTENCE.split(text[max(0, begin - MAX_BEFORE) : begin])[-1]
    return bool(_SUPPOSED.search(before))
