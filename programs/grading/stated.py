r"""The value of an answer that a sentence states, without what the sentence says of it."""

import math
import re
from fractions import Fraction

from lim_sglang.programs.grading.denials import NEGATION
from lim_sglang.programs.grading.forms import rewritten
from lim_sglang.programs.grading.kinds import PRONOUN, without_name
from lim_sglang.programs.grading.latex import FUNCTION, is_unbalanced, plain, tidy
from lim_sglang.programs.grading.units import Unit
from lim_sglang.programs.grading.values import (
    decide,
    equal_numbers,
    is_complement,
    read_number,
    read_value,
    without_decimal,
    without_reason,
)
from lim_sglang.programs.grading.withdrawals import IS_WRONG

MAX_WORDS = 4
"""Most words of an answer without a box; a longer one is a sentence about the answer."""
MAX_SENTENCE = 100
"""Characters of the longest sentence in which a noun of a value is looked for."""
MAX_STATED = 1000
"""Characters of the longest answer without a box."""
NAME = r"(?:[a-zA-Z](?:_\{?\w\}?)?|[A-Z]{2}|[fghP]\((?:-?\d+|[A-Z])\)|\\[a-z]{2,7})"
r"""The name of a value: `x`, `x_1`, `AB`, `f(3)`, `\alpha`."""
ASSERTED = (
    r"[\s,;(—–]*\b(?:which|that|this) (?:is|was|are|equals|gives|makes|totals"
    r"|(?:comes|works out|adds up|amounts|simplifies|reduces|evaluates) to)"
    r"(?: equal to| exactly| simply| just)?\b,?"
    r"|[\s,;(—–]+(?:i\.e\.|equivalently\b|(?:equal|equivalent) to\b"
    r"|(?:equalling|giving|making)\b),?"
)
"""Words that give the value of the expression before: `, which is 5`, `, i.e. 5`."""
_FOUND = r"(?:obtain(?:ed)?|found|find|got(?:ten)?|get|calculated|computed|derived|reached)"
_SAID = (
    rf"[\s,;(—–]+(?:(?:which (?:we|you|I|one) )?{_FOUND} (?:by|from|as|using|via|when)\b"
    r"|which (?:comes from|results from|represents|corresponds to)\b"
    r"|(?:(?:and |but )?not|rather than|instead of)(?=\s+[-+$\\(]*\d))"
    r"|\s*[,(—–]\s*the [a-z]+ of\b"
)
"""Words about the number before: `, obtained by multiplying`, `, the sum of 5 and 7`, `, not 8`."""
_DENIED = re.compile(
    r"\s*(?:not|no|never|wrong|incorrect|false|impossible)\b"
    r"|.*?(?:\b(?:but|so|thus|hence|therefore|then|wait|actually|rather|instead|should|if|unless"
    r"|otherwise|except|correction)\b|[,;—–]\s*(?:and|or|no|not)\b)",
    re.IGNORECASE | re.DOTALL,
)
"""Words of a remark that takes a number back, limits it, or goes on to another one."""
_WRONG = re.compile(
    rf"\b(?:which|that|this|it)\s*{IS_WRONG}|\bI doubt (?:it|this|that)\b", re.IGNORECASE
)
_OTHER_IS_WRONG = re.compile(
    r"(?P<kept>.+?)\s*(?:[;(—–]|,(?!.* are ))\s*(?:(?:and|but|while|whereas|since|as)\s+)?"
    r"(?P<other>[^,;()—–]{1,60}?)\s+(?:is|was|are|would be)(?:"
    r"\s+(?:(?:clearly|obviously|simply|just|also|therefore|thus|hence)\s+)?(?:(?:the|a)\s+)?"
    r"(?:wrong|incorrect|false|impossible|invalid|extraneous|too (?:small|large|big|low|high))"
    r"|(?:n['’]t|\s+not)\s+(?:the\s+)?(?:right|correct|valid|possible|answer)\b)"
    r"(?:\s+(?:answer|result|choice|value))?\)?(?:\s+(?:because|since|as)\b.*)?",
    re.DOTALL | re.IGNORECASE,
)
"""An answer and another value that is rejected: `7; 8 is wrong`."""
_AND_OR = re.compile(r"\b(?:and|or)\b")
_NUMBER_DENIED = re.compile(rf"\d(?:[.,/]?\d)*\s+(?:[a-z]+\s+)?{NEGATION}\b", re.IGNORECASE)
"""A number and a word behind it that denies the number: `12 fails`."""
_BRACKETS = re.compile(r"([^()]+?)\s+\((?!.*\bor\b)([^()]*\d[^()]*)\)", re.DOTALL)
"""A value and a remark in brackets: `391 (17 times 23)`."""
_NO_REMARK = re.compile(rf"{FUNCTION.pattern}|base|modulo")
"""Words of a bracket that belongs to the number before."""
_FACTOR = r"\d+(?:\.\d+|/[1-9]\d*)?"
_TERM = rf"{_FACTOR}(?:\*{_FACTOR})*"
_SIGNS = [
    (re.compile(words), sign)
    for words, sign in (
        (r"(?<=\d) (?:times|multiplied by) (?=[-+\d])", " * "),
        (r"(?<=\d) plus (?=\d)", " + "),
        (r"(?<=\d) minus (?=\d)", " - "),
        (r"(?<=\d) (?:divided by|over) (?=\d)", " / "),
        (r"(?<![\d./])(\d+(?:\.\d+)?) squared\b", r"\1 * \1"),
        (r"(?<=\d)(?:\\?%| ?percent) of (?=\d)", "/100 * "),
        (r"(?<=/\d) of (?=\d)", " * "),
        (r"\bhalf of (?=\d)", "1/2 * "),
    )
]
"""Words between the numbers of a calculation, and their signs."""
_DASH = re.compile(
    rf"(?<=[^\s-])\s+-{{1,3}}\s+(?=not\s|[a-z]+,?\s+[a-z]{{2}})(?!.*\b(?:{FUNCTION.pattern})\b)",
    re.DOTALL,
)
"""A hyphen as a dash before words: `12 - which is even`; no minus, as in `12 - ab`."""
_OTHERWISE = r"[\s,;(—–]*\bor(?: (?:equivalently|simply|just))?\b,?"
"""Words before the same value in another form, or before a second value."""
_OPERATOR = re.compile(r"[-+*/^×·÷−!]|\\[a-zA-Z]")
_TIMES = r"[-+*/×·÷]|\\(?:times|cdot|div)(?![a-z])|(?<=\d)x(?=\d)|(?<= )x(?= \d)"
_CALCULATED = re.compile(
    rf"\$?(?=[^=]*\d\s*(?:{_TIMES}|\())(?:{_TIMES}|[\d.,\s()=]|\$(?=\d))+=\s*([^=]+)"
)
"""A calculation of numbers alone and its result: `17 * 20 + 17 * 3 = 391`."""
_COMPARED = re.compile(r"\b(?:and|or)\b|[=<>≤≥≠]|\\(?:[lg]eq?|[lg]t|neq?|lor|land)(?![a-z])")
"""Signs of two values, or of a statement about one."""
_RESTATED = re.compile(
    rf"(?P<first>(?:[^,;]|,(?=\d{{3}}))*?)"
    rf"(?:{ASSERTED}|(?P<said>{_SAID})|(?P<otherwise>{_OTHERWISE}))\s+(?P<second>.*)",
    re.DOTALL,
)
_SMALL_TALK = re.compile(
    r"(?:[\s,;(—–-]*\b(?:I (?:think|believe|guess|suppose|hope)|if I(?:['’]m| am) not mistaken"
    r"|I(?:['’]m| am) (?:\w+ )?(?:sure|confident|certain)|as (?:required|desired|needed)"
    r"|in (?:total|all)|altogether|and (?:we(?:['’]re| are) done|that(?:['’]s| is) (?:it|all))"
    r"|(?:rounded )?to \w+ (?:decimal places?|significant (?:figures?|digits?)))\b\)?"
    r"|[\s*_]*[\u2600-\u27bf\U0001f300-\U0001faff]\ufe0f?)+[\s.!*_]*\Z"
)
"""Words, and pictures, behind a value that say nothing of it."""
_LEAD_IN = re.compile(
    r"\A(?:(?:only|just|simply|exactly|equal to|found to be|given by"
    r"|the (?:set|interval|number|point|year|(?:ordered )?(?:pair|triple)))\s+)+(?=[-+$\\({\[\d])"
)
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_SENTENCE = re.compile(r"[a-z]+\s(?:[a-z]+\s)+[a-z'’\s]*[$\\(\d]", re.IGNORECASE)
_CALCULATION_BEGINS = re.compile(
    r"(?:(?:the|of|square|cube|root|half|twice|pi|over|plus|minus|times|negative|divided|by|sum|product)"
    r"\s+)+[$\\(\d]",
    re.IGNORECASE,
)
"""The words of a calculation before its first number: `the square root of 3`."""
_REMARK = re.compile(r"\s*[,;(—–]\s*[^\d\\$]*$")
"""Words without a number behind a comma or in brackets: "72 clips, altogether"."""
_CALCULATION = re.compile(r"\s*\((?!.*\bor\b)[^()]*\)$")
"""A remark in brackets: "72 clips (48 + 24)"."""
_VALUE_WORDS = frozenset(
    ("yes", "no", "true", "false", "even", "odd", "none", "undefined", "infinite", "infinity")
)
"""Words that are an answer without a box."""
_ENDS_EARLY = re.compile(r"(?:[*/=<>×·÷]|(?:^|\s)[-+]|\^|\\(?:cdot|times|div|[dt]?frac|sqrt))\s*\Z")
"""A sign behind which a value goes on."""
_WORD_AND_REASON = re.compile(
    rf"((?:{'|'.join(sorted(_VALUE_WORDS))}|no (?:real )?solutions?)\b)[\s,;:(—–]+"
    r"(?:because|since|as|due to)\b.*",
    re.DOTALL | re.IGNORECASE,
)


def is_measured(answer: str) -> bool:
    """Return True for a number with no more than a unit, or one counted thing."""
    number = read_number(without_name(answer))
    return number is not None and (number[1] is None or len(number[1].words) < 2)


_NO_VALUE = re.compile(
    rf"{PRONOUN}|an? (?:\w+ )?(?:integer|number|fraction|decimal|multiple|power|value)\b"
    r"|in (?:the|simplest|lowest|terms)\b|(?:given|rounded|expressed|written|accurate|within)\b"
)
"""The beginning of a sentence about an answer: `an integer from 0 to 999`."""
_NOT_BUT = re.compile(r"not\s+(\S+?),?\s+but\s+(?:rather\s+)?(.+)", re.DOTALL)
"""`not 12 but 13`."""


def stated_value(answer: str) -> str | None:
    """Return an answer without a box, less the remark behind it; None if it is words alone."""
    if len(answer) > MAX_STATED or _NO_VALUE.match(answer) or _WRONG.search(answer):
        return None
    if (corrected := _NOT_BUT.fullmatch(answer)) and read_number(corrected[1]):
        answer = corrected[2]
    if rejecting := _OTHER_IS_WRONG.fullmatch(answer):
        kept = tidy(rejecting["kept"])
        others = [without_name(tidy(part)) for part in _AND_OR.split(rejecting["other"])]
        if _is_single(kept) and all(map(read_number, others)):
            is_kept = any(are_one(without_name(kept), other) for other in others)
            return None if is_kept else kept
    answer = tidy(_LEAD_IN.sub("", _SMALL_TALK.sub("", _DASH.sub(" — ", answer))))
    answer = re.sub(r"^(?:minus|negative)\s+\$?(?=[\d.\\])", "-", answer)
    answer = _WORD_AND_REASON.sub(r"\1", result(without_reason(_settled(answer))))
    answer = _without_bracket(answer)
    if _is_about(answer):
        return None
    for words in (answer, _REMARK.sub("", answer), _CALCULATION.sub("", answer)):
        is_short = len(WORD.findall(words)) <= MAX_WORDS or is_complement(words)
        if words and is_short and is_value(words) and not _NUMBER_DENIED.search(words):
            return words
    return None


def _is_about(answer: str) -> bool:
    """Return True for a sentence that says more of a number or formula than what it is."""
    if not is_sentence(answer) or _CALCULATION_BEGINS.match(answer):
        return False
    return len(answer) > MAX_SENTENCE or is_sentence(rewritten(answer))


def is_sentence(answer: str) -> bool:
    """Return True if two words or more stand before the first number or formula of an answer."""
    return bool(_SENTENCE.match(answer))


def listed(answer: str) -> str | None:
    """Return the values of a list as `x = 1 and x = 3`, with commas and without the name that they
    share; None for one value, and for a list that says more.
    """
    comma = r",(?!\d{3}\b|[^()]*\))"
    joint = r"\band\b" if re.search(r"\band\b", answer) else r"\bor\b"
    values = [
        re.sub(r"(?<=\d),(?=\d{3}\b)", "", tidy(part))
        for part in re.split(rf"(?:{comma}\s*)?{joint}|{comma}", answer)
    ]
    bare = [without_name(value) for value in values]
    names = {value.removesuffix(right) for value, right in zip(values, bare, strict=True)}
    is_named = all(re.fullmatch(rf"(?:{NAME}\s*=\s*)?", name) for name in names)
    if len(values) < 2 or not is_named or not all(map(_is_listable, bare)):
        return None
    return ", ".join(map(str.strip, bare if len(names) == 1 else values))


def _is_listable(value: str) -> bool:
    """Return True for a value of a list: a number, with a unit of measurement or none, or a formula
    that is no inequality.
    """
    number = read_number(value)
    if number and number[1]:
        return bool(number[1].dimensions)
    return not (WORD.search(value) or _COMPARED.search(value)) and is_value(value)


def _without_bracket(answer: str) -> str:
    r"""Return a number without the bracket behind it that says how it was found, as in
    `391 (17 times 23)` and `391 (17 * 23)`, or the same number in another form, as in
    `4.5 (\frac{9}{2})`; any other answer as it is.
    """
    parts = _BRACKETS.fullmatch(answer)
    number = read_number(parts[1]) if parts else None
    if parts is None or number is None:
        return answer
    words = WORD.findall(parts[2])
    if words or parts[2].startswith("="):
        kept = any(map(_NO_REMARK.fullmatch, words)) or bool(_DENIED.match(parts[2]))
    else:
        same = read_number(tidy(parts[2])) == number
        kept = not same and calculated(parts[2].partition("=")[0]) != number[0]
    return answer if kept else parts[1]


def calculated(text: str) -> Fraction | None:
    """Return the value of a sum of products of numbers, also in words, as `7 times 8`; None for any
    other text.
    """
    text = plain(_in_signs(text.replace("$", "")))
    text = re.sub(r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=\d)", "*", text)
    text = re.sub(r"\\?\$|(?<=\d),(?=\d{3})|\s", "", text)
    if not re.fullmatch(rf"[-+]?{_TERM}(?:[-+]{_TERM})*", text):
        return None
    total = Fraction(0)
    for sign, term in re.findall(rf"([-+]?)({_TERM})", text):
        total += int(f"{sign}1") * math.prod(map(Fraction, term.split("*")))
    return total


def _in_signs(text: str) -> str:
    """Return a calculation with signs for the words between its numbers, as `7 * 8`."""
    for words, sign in _SIGNS:
        text = words.sub(sign, text)
    return text


def result(answer: str) -> str:
    """Return the number that a calculation without names ends in, as in `10 + 5 = 15`, the fraction
    before its own decimal, or else the answer."""
    calculation = _CALCULATED.fullmatch(_in_signs(answer))
    if calculation is None or read_number(calculation[1]) is None:
        return answer
    exact = without_decimal(answer)
    if exact == answer and r"\ldots" in answer and answer.count("=") > 1:
        return answer  # the decimal is another value's
    return calculation[1] if exact == answer else exact


def _settled(answer: str) -> str:
    """Return the value of an answer that is stated twice, as in `2 + 3, which is 5`.

    A number stays, whatever is said of it, as in `12, which is 50%` and `12, which is 3 times 4`,
    unless it is denied. An expression gives way to a number behind it, but not to its rounding.
    After "or", numbers are one if they are equal.
    Any other answer, as `2 or 3` and a list, is returned as it is.
    """
    restated = _RESTATED.fullmatch(answer)
    if restated is None:
        return answer
    first, second = (
        tidy(re.sub(r"\\[()\[\]]", "", restated[side])) for side in ("first", "second")
    )
    second = tidy(_REMARK.sub("", without_reason(_settled(second))).rstrip(")"))
    number = read_number(second)
    if _is_single(first):
        if restated["otherwise"]:
            value = read_number(without_name(first))
            is_one = (number and are_one(first, second)) or (
                value and value[0] == calculated(second)
            )
            return first if is_one else answer
        return first if number or not _DENIED.match(restated["second"]) else answer
    if number is None or restated["said"]:
        return answer
    total = calculated(first.removesuffix(re.sub(r"^.*?(?=[ a-z]*$)", "", second)))
    if total == number[0]:
        return second
    is_value = not restated["otherwise"] and _gives(first, second, number[1])
    return second if is_value else answer


def _is_single(answer: str) -> bool:
    """Return True for a number, also with its name, for a date and for a time of day."""
    value = read_value(answer)
    is_date = value.words[:1] == ("date",) or value.clock
    return bool(is_date or read_number(without_name(answer)))


def _gives(expression: str, number: str, unit: Unit | None) -> bool:
    """Return True if a number that is said to be an expression can be its value."""
    if not _OPERATOR.search(expression) or _COMPARED.search(without_name(expression)):
        return False
    if "." in number and "." not in expression:
        return False  # may be rounded
    # A noun of its own, as in `which is 2 factors`, counts something else.
    is_measured = unit is None or bool(unit.dimensions)
    return is_measured or set(WORD.findall(number)) <= set(WORD.findall(expression))


def are_one(first: str, second: str) -> bool:
    """Return True if two numbers are surely equal."""
    equal = decide(read_value(first), read_value(second))
    if isinstance(equal, bool):
        return equal
    numbers = [read_number(side) for side in equal]
    return all(numbers) and equal_numbers(*(number[0] for number in numbers if number))


def is_value(answer: str) -> bool:
    """Return True if an answer can be read as a value or a choice, and False for other words."""
    if is_unbalanced(answer) or _ENDS_EARLY.search(answer):
        return False
    if re.search(r"[,;(—–]\s*[a-z][^\d\\$]*$", answer) and re.match(r"[^,;(]*\d", answer):
        return False
    value = read_value(answer)
    if not value.words:
        bare = plain(answer)
        return bool(re.search(r"\d|\\|[=<>+^]|^\W*\w\W*$", bare)) or value.latex != bare
    is_counted = value.words[0] == "ratio" or any(map(str.isdigit, value.words[0]))
    return (
        is_counted
        or value.words[0] in ("date", "digits", "remainder")
        or (value.words[-1] in _VALUE_WORDS and len(value.words) < 3)
    )
