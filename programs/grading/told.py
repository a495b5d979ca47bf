r"""The only number or formula that a sentence states, as in `So she has 12 apples left.`"""

import re

from lim_sglang.programs.grading.denials import CONDITION, NEGATION
from lim_sglang.programs.grading.latex import tidy
from lim_sglang.programs.grading.stated import (
    NAME,
    WORD,
    calculated,
    is_value,
    listed,
)
from lim_sglang.programs.grading.units import (
    NUMBERS_IN_WORDS,
    TENS_IN_WORDS,
    read_unit,
    split_scale,
)
from lim_sglang.programs.grading.values import read_number

_FORMULA = re.compile(r"\$([^$\n]+)\$(?!\d)")
_COUNT = (
    r"(?:\\?\$|[£€])?[-+]?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\\[dt]?frac\{\d+\}\{\d+\})(?:\s?\\?%)?"
)
_TOLD = re.compile(
    rf"(?P<before>(?:[a-z][^\d\\$=<>:()]*\s)?)(?:[a-z]\s*=\s*)?(?P<value>{_COUNT})"
    r"(?P<second>\s[a-z]+,?\s(?:and\s)?\d+\s[a-z]+)?"
    r"(?P<rest>(?:\s(?![ap]\.?m\b)(?:[a-z]{2,}|[am])(?:['’/²³^-][a-z\d]*)*){0,10})",
    re.IGNORECASE,
)
"""A sentence with one number, or one in two units as `3 hours and 20 minutes`."""
_NUMBER = rf"{'|'.join([*NUMBERS_IN_WORDS, *TENS_IN_WORDS])}|dozens?|half|halves|quarters?"
_PART = (
    r"an? \w+(?:th|rd)|(?:part|portion|percentage|choice)s? of|others?|another|some\w*|any\w*"
    r"|either|both"
)
_ARITHMETIC = (
    r"negative|minus|plus|times|twice|thrice|(?:doubl|tripl|quadrupl|halv|invert|negat)\w*"
    r"|squared|cubed|factorial|transpose\w*|conjugate|reversed|reciprocal|inverse|opposite|additive"
    r"|(?:square|cube|power|multiple|log|logarithm|absolute value)s? of|pi|root(?= \d)"
    r"|choose|modulo|mod"
    r"|over(?! the| a)|divided|multiplied|raised|base|binary|hexadecimal|octal"
)
_SUPPOSITION = (
    rf"{CONDITION}|would|could|might|(?-i:may)|when(?:ever)?|while|whereas|until|till|otherwise"
    r"|provided|depend\w*|perhaps|maybe|possibl[ey]|probabl[ey]|likely|hypothetical\w*|because"
    r"|since|seem\w*|appear\w*|claim\w*|thinks?|thought|believ\w*|guess\w*|says?|said"
)
_BOUND = (
    r"least|most|than|less|fewer|within|below|above|under|between|beneath|inside|outside"
    r"|near(?:ly)?|close|almost|exceed\w*|surpass\w*|bound\w*|limit\w*|up to|off|or"
)
_EXCEPTION = r"but|except\w*|besides|save for|instead|rather|apart|aside"
_RELATIVE = r"whose|which|who|whom|where|that (?:is|are|was|were|has|have|had|gives?|equals?)"
_LIMITS = re.compile(
    rf"\b(?:{_NUMBER}|{_PART}|{_ARITHMETIC}|{NEGATION}|{_SUPPOSITION}|{_BOUND}|{_EXCEPTION}"
    rf"|{_RELATIVE})\b|n['’]t\b|\d.*\b(?:before|after|originally|initially)\b",
    re.IGNORECASE,
)
"""A word of a closed class anywhere in a sentence, that makes of its number a part, a bound, an
operand, a condition, a denial or the property of something else."""
RESULT = (
    r"(?:the|our)\s+(?:(?:final|total|overall|correct|requested|required|desired|expected)\s+)?"
    r"(?:answer|result|solution|value|total|sum|product|difference|number|probability|area|volume"
    r"|perimeter)(?:\s+of\s+(?:(?:the|all|this)\s+)?\w+)?"
)
"""The name of what a question asks for; no `first angle`, and no `circle`."""
_CONCLUDED = re.compile(rf"(?:\w+,?\s+)?{RESULT}", re.IGNORECASE)
_LEFT_OVER = re.compile(r"\bleft ?over\b", re.IGNORECASE)
_NOT_TELLING = re.compile(
    r"\W*(?:let|note|recall|consider|set|does|do|is|are|check|use)\b", re.IGNORECASE
)
"""The beginning of a sentence that asks, or that begins a thought."""
_TO = r"(?:comes?|came|amounts?|adds up|sums?|works out|evaluates|simplifies|reduces|equal)\sto"
_EQUALS = rf"(?:is|are|was|were|be|equals?|totals?|becomes?|gives?|yields?|{_TO})"
_ADVERB = (
    r"(?:a total of|exactly|equal to|given by|only|just|now|still|about|approximately|indeed|simply"
    r"|also|therefore|thus|then|the|an?)"
)
_STATING = re.compile(
    rf"(?:^|\s)(?:{_EQUALS}|has|have|had|gets?|got|costs?|ma[dk]es?|needs?|takes?|took|sold"
    r"|earn(?:s|ed)?|spen[dt]s?|paid|pays?|weighs?|obtain(?:ed)?|f[io]und)"
    rf"\s(?:{_ADVERB}\s)*\Z",
    re.IGNORECASE,
)
"""A verb that states the number behind it, of which nothing is counted."""
_NO_VERB = re.compile(
    r"(?:^|\s)(?:in|on|at|by|for|of|to|from|with|into|over|under|after|before|during|per|than|within"
    r"|until|since|through|against|towards?|across|versus|and|or|but|as|plus|if|this|that|these"
    r"|those|his|her|hers|its|their|our|ours|my|your|each|every|all|both|some|any|which|who|number"
    r"|numbered|step|case|part|question|problem|option|example|figure|page|day|week|month|year|not"
    rf"|be|been|being|\w+ly)\s(?:{_ADVERB}\s)*\Z",
    re.IGNORECASE,
)
"""A word before a number that is no verb: the number belongs to it, or to a phrase of its own."""
_SUBJECT = re.compile(r"\w\W+(?:\w+\s)*\w")
"""Two words: a subject and its verb."""
_INDEFINITE = re.compile(r"^(?:so\s|thus\s)?an?\s[^,]*\s(?:is|was)\s\Z", re.IGNORECASE)
"""A sentence about one of several values: `a root is`."""
_COUNTED = re.compile(
    r"\s(?!(?:in|to|by|of|for|at|on|per|with|out|from|into|as|is|are|was|were|has|too|and|[a-z]+ly)\b)"
    r"[a-z]",
    re.IGNORECASE,
)
"""The beginning of a noun behind a number."""
_LEFT = re.compile(r"\s(?:in (?:total|all)|altogether|left|each|remaining|overall)", re.IGNORECASE)
"""Words behind a number of which nothing is counted."""
_COUNTED_FIRST = re.compile(
    r"(?:\s[a-z]+){1,3}\s(?:are|were|will|can|remain|have|had|did|[a-z]+ed)\b.*", re.IGNORECASE
)
"""The rest of a sentence that begins with its number: `12 students passed`."""
_PURPOSE = re.compile(r"\s([a-z]+) to [a-z]+", re.IGNORECASE)
_SAYS_MORE = re.compile(
    r"\b(?:is|are|was|were)\b(?!\s(?:left|remaining|needed|required|used|sold|missing|in\stotal)\b)"
    r"|\bto the\b"
    r"|\band\b(?!\s[A-Z])"
)
"""Words behind a number that say something of it, as `5 is prime`, or begin another statement."""
_REMAINDER = re.compile(
    r"\bremainder (?:when|if|of) \S.{0,80}? (?:is )?divided by (?:\$[^$]{1,40}\$|\d+)(?= is\b)"
)
"""The name of a remainder, whose condition limits nothing."""
_CALCULATION = re.compile(
    r"(?:(?:the|of|and|by|a|square|cube|root|half|third|quarter|twice|double|triple|sum"
    r"|product|difference|quotient|between|percent|times|plus|minus|divided|multiplied|over"
    r"|squared|cubed|factorial)\b|\d[\d,]*+(?:\.\d+)?+(?![a-z])|\\?[%$]|[-+*/×·÷√^()=]|\s)+?"
    r"(?=\s(?:is|equals|gives|makes)\s(?:(?:exactly|equal\sto|simply|just)\s)?[-\\$£€]{0,2}\d)",
    re.IGNORECASE,
)
"""A calculation as subject of a sentence: `half of 9`, `the square root of 144`."""
_OF_EQUATION = re.compile(
    r"(?<=\w)\s(?:to|of|for)\s(?:the|this|our)\s(?:(?:given|original|linear|quadratic)\s)?"
    r"(?:equation|expression|calculation|sum|inequality)\s(?:\$[^$\n]{1,80}\$|[^.;:?!$a-z]*?"
    r"(?:[a-z](?![a-z])[^.;:?!$a-z]*?){0,4})(?=\s(?:is|are|equals)\s)",
    re.IGNORECASE,
)
"""The equation that a sentence names and solves."""
_PRICE_OF = re.compile(
    r"\d+(?:\s[a-z]+){1,3}?\s(?:would\s|will\s)?costs?\s(?=(?:\\?\$|[£€])?\d)", re.IGNORECASE
)
"""A number of things up to what they cost."""
_OF_NUMBERS = re.compile(
    r"(?P<noun>(?:the|our)\s(?:[a-z]+\s){0,2}?(?:probability|chance|sum|product|difference|area"
    r"|volume|perimeter|circumference|length|width|height|distance|hypotenuse|cost|price|number"
    r"|total|mean|average|median|angle|remainder|largest|smallest|greatest|least))\s"
    r"(?P<of>(?:of|that|for|with|in|from|between|when)\s[^.;:?!=]{1,80}?)(?=\s(?:is|equals)\s"
    r"(?:(?:exactly|equal\sto|simply|just)\s)?(?:\$[^$]{1,40}\$|[-\\$£€]{0,2}\d[^\s]*)[^.;,]{0,20}\Z)",
    re.IGNORECASE,
)
"""A quantity as subject of a sentence, and what it is of: `the area of a square with side 6`."""
_NO_COMPLEMENT = re.compile(
    rf"\b(?:{NEGATION}|{_SUPPOSITION.replace('|may', '')}|{_EXCEPTION}|is|are|was|were|first|second"
    rf"|third|other|another)\b|n['’]t\b",
    re.IGNORECASE,
)
"""A word by which what a quantity is of makes it another one than is asked for."""
_THERE_ARE = re.compile(
    r"(?P<count>there\s(?:are|is)\s(?:(?:exactly|only|a\stotal\sof)\s)?\d[\d,]*\s(?:[a-z]+\s){0,2}?"
    r"(?:ways?|pairs?|arrangements?|subsets?|numbers?|integers?|solutions?|outcomes?|possibilities))"
    r"\s(?:to|of|in\swhich|for)\s[^.;:?!]{1,80}",
    re.IGNORECASE,
)
"""A count of ways, and what they are ways of."""
_BEFORE_FORMULA = re.compile(
    rf"\A(?P<before>[a-z][^\d\\$=<>:()]*?)\s(?:{_EQUALS})\s"
    rf"(?:{_ADVERB}\s)*(?=[^a-z\s]|[a-z]\b)",
    re.IGNORECASE,
)
"""The beginning of a sentence up to the formula that it states."""
_DIGIT = re.compile(r"\d")
_IS_SOLUTION = re.compile(
    r"\s+is\s(?:the|our|a)\s(?:(?:only|unique|final|correct|desired)\s)*(?:solution|value|result|answer)",
    re.IGNORECASE,
)
_SUMMED = re.compile(
    r"(?<![\d.,^])(?P<left>(?:\d[\d.,]*\s*[-+*/×·÷]\s*)+\d[\d.,]*)\s*="
    r"\s*(?P<result>\d(?:[\d.,]*\d)?)(?![\d^])"
)
"""A calculation within a sentence, and its result: `48 + 24 = 72`."""


def with_plain_subject(sentence: str) -> str:
    """Return a sentence without the numbers that its result is of: `The result is 4.5` for `Half of
    9 is 4.5`, and for `The area of a square with side 6 is 36` `The result is 36`.
    """
    sentence = _OF_EQUATION.sub("", sentence, count=1)
    calculation = _CALCULATION.match(sentence)
    if calculation and _DIGIT.search(calculation[0]):
        return f"The result{sentence[calculation.end() :]}"
    quantity = _OF_NUMBERS.match(sentence)
    if quantity and _DIGIT.search(quantity["of"]) and not _NO_COMPLEMENT.search(quantity["of"]):
        return f"The result{sentence[quantity.end() :]}"
    if ways := _THERE_ARE.fullmatch(sentence.rstrip(".")):
        return ways["count"]
    price = _PRICE_OF.match(sentence)
    return f"They cost {sentence[price.end() :]}" if price else sentence


def told_value(sentence: str, *, plainly: bool = False) -> str | None:
    """Return the only number that a sentence states, with its unit of measurement, as `She has 42
    apples left`, or the formula that it ends in, as `The derivative is $2x$`. None for a sentence
    that states none or two, or that holds a word that limits what it states.

    Args:
        plainly: only a number behind a verb.
    """
    sentence = _REMAINDER.sub("remainder", sentence.strip().rstrip("."))
    sentence = with_plain_subject(sentence)
    sentence = _SUMMED.sub(_result, sentence)
    if sentence.startswith("$"):
        sentence = _IS_SOLUTION.sub("", sentence)
    if whole := _FORMULA.fullmatch(sentence):
        return None if plainly else _equation(whole[1])
    words = _FORMULA.sub(r"\1", sentence)
    told = _TOLD.fullmatch(words)
    text = _LEFT_OVER.sub("left", words if told else _FORMULA.sub(" ", sentence))
    if _NOT_TELLING.match(text) or _LIMITS.search(text):
        return None
    if told is None:
        return None if plainly else _told_formula(sentence)
    if not _is_told(told, plainly=plainly):
        return None
    value = told["value"] + (told["second"] or "")
    rest = told["rest"].split()
    for count in range(len(rest), -1, -1):
        measured = " ".join([value, *rest[:count]])
        number = read_number(measured)
        if number and number[1] and number[1].dimensions:
            return measured
    if rest[:1] == ["percent"]:
        return f"{value} percent"
    return None if told["second"] else value


def _result(calculation: re.Match[str]) -> str:
    """Return the result of a calculation that is right, and any other calculation as it is."""
    number = read_number(calculation["result"])
    is_right = number is not None and calculated(calculation["left"]) == number[0]
    return calculation["result"] if is_right else calculation[0]


def _is_told(told: re.Match[str], *, plainly: bool) -> bool:
    """Return True if a verb before the number states it, or if it is a number of counted things at
    the beginning.
    """
    before, value, rest = told["before"], told["value"], told["rest"]
    if split_scale(rest.strip())[0] or split_scale(" ".join(rest.split()[:1]))[0]:
        return False
    if _SAYS_MORE.search(rest):
        return False
    if not before:
        is_told = _COUNTED_FIRST.fullmatch(rest)
        if purpose := _PURPOSE.match(rest):
            unit = read_unit(purpose[1])
            is_told = purpose if unit and unit.dimensions else is_told
        return not plainly and bool(is_told)
    is_counted = bool(_COUNTED.match(rest)) or re.search(r"[$£€%]", value) is not None
    if _STATING.search(before):
        is_bare = not rest or bool(_LEFT.match(rest))
        return (is_counted or is_bare) and not _INDEFINITE.match(before)
    is_ours = re.match(r"(?:we|I)\b", before, re.IGNORECASE)
    has_verb = _SUBJECT.search(before) and not _NO_VERB.search(before)
    return is_counted and not (plainly or is_ours) and bool(has_verb)


def _told_formula(sentence: str) -> str | None:
    """Return the formula that a sentence ends in, or several that are alike; None for a formula in
    words, and for one of several.
    """
    sentence = re.sub(rf"\$({NAME})\$(?=\s[a-z])", "it", sentence)
    begin = _BEFORE_FORMULA.match(sentence)
    if begin is None or _INDEFINITE.match(f"{begin['before']} is "):
        return None
    rest = sentence[begin.end() :]
    formulas = _FORMULA.findall(rest)
    if len(formulas) > 1:
        return listed(_FORMULA.sub(r"\1", rest))
    if formulas:
        behind = _FORMULA.sub("", rest).strip()
        unit = read_unit(behind) if behind else None
        if not rest.startswith("$") or (behind and not (unit and not unit.words)):
            return None
    value = tidy(formulas[0] if formulas else rest)
    if _CONCLUDED.fullmatch(begin["before"]) and (number := _end_of_chain(value)):
        return number
    is_one = len(value) > 1 and not WORD.search(value)
    return value if is_one and value.count("=") < 2 and is_value(value) else None


def _equation(formula: str) -> str | None:
    """Return an equation, or the number at the end of a chain of equations that begins with a
    name: `N = 2^{10} - 951 = 73`.
    """
    sides = formula.split("=")
    if WORD.search(formula) or len(sides) < 2:
        return None
    if len(sides) == 2:
        return tidy(formula)
    return _end_of_chain(formula) if re.fullmatch(rf"\s*{NAME}\s*", sides[0]) else None


def _end_of_chain(formula: str) -> str | None:
    """Return the number that a chain of equations ends in; None without two equations or more, and
    for a chain of names, as `x = y = 3`.
    """
    _, *sides = formula.split("=")
    last = tidy(sides[-1]) if len(sides) > 1 else ""
    return last if all(map(_DIGIT.search, sides)) and read_number(last) else None
