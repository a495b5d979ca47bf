r"""Answers as they are compared: value and unit, time of day, words, or a letter of a choice.

`decide` compares two of them where no mathematics is needed, which is most answers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

from lim_sglang.programs.grading.forms import are_endless, in_order, rewritten
from lim_sglang.programs.grading.latex import FUNCTION, MAX_READ, TRIGONOMETRY, as_latex, plain
from lim_sglang.programs.grading.ratios import compare_ratios
from lim_sglang.programs.grading.size import too_large
from lim_sglang.programs.grading.units import (
    SPACED_UNIT_LETTERS,
    UNIT_LETTERS,
    Unit,
    read_power_of_unit,
    read_unit,
    split_scale,
)
from lim_sglang.programs.grading.words import (
    AND_OR_LIST,
    TEXT,
    in_latex,
    number_in_words,
    read_counted,
    read_digits,
    read_ratio,
    read_words,
)


@dataclass(frozen=True)
class Value:
    """An answer, read."""

    latex: str
    """The answer as math-verify reads it, without unit."""
    unit: Unit | None = None
    """The unit; None if the answer states none."""
    words: tuple[str, ...] = ()
    """The words of an answer that is no formula, in lower case."""
    clock: "Clock | None" = None
    """A time of day."""
    choice: str = ""
    """The letter of an option, which the answer is or which stands before a value."""
    quantity: "Value | None" = None
    """The value and the unit of a formula whose letters may be a unit or variables: `5 N m`."""


@dataclass(frozen=True)
class Clock:
    """A time of day."""

    seconds: int
    """Seconds since midnight, or since the last noon where the half of the day is not known."""
    knows_half: bool
    has_half: bool = False
    """True if `am` or `pm` stands behind the time; without it, `3:10` may be a ratio."""

    def equals(self, other: "Clock") -> bool:
        """Return True for the same time; `3:10` is also the time of either half that another clock
        with `am` or `pm` shows.
        """
        known = self.knows_half and other.knows_half
        if known or not (self.has_half or other.has_half):
            return self.seconds == other.seconds
        return self.seconds % 43_200 == other.seconds % 43_200


Question = tuple[str, str]
"""Two values in LaTeX whose equality is left to math-verify."""

_AND_OR = r"\b(?:and|or)\b"
_WORD = r"[A-Za-z]++(?:[-'’][A-Za-z]++)*+"
_UNIT_TEXT = r"\\text\{[^{}0-9=<>^]*+(?:\^-?\d[^{}0-9=<>^]*+)*+\}"
_UNIT_TAIL = re.compile(
    rf"(?P<text>{_UNIT_TEXT}|°|(?<![\\A-Za-z_]){_WORD}|[$£¥¢฿元円\u20a0-\u20cfΩµ]|\\(?:Omega|mu)(?![a-zA-Z]))"
    rf"(?:\s*+(?:{_UNIT_TEXT}|°|{_WORD}|\\(?:cdot|times|Omega)(?![a-zA-Z])|[/*.]"
    r"|\^\s*+(?:-?\d|\{\s*-?\d\s*\})|\((?!.*\bor\b)(?:[\w .+*/=-]|\\cdot(?![a-z]))*\)))*+\s*+$"
)
"""Words, signs and powers at the end of an answer; possessive, so that no text takes long."""
_CURRENCY = (
    r"(?:\\\$|[A-Z]{1,2}\s*\\?\$|[$£¥฿\u20a0-\u20cf]|\\text\{[$£¥฿\u20a0-\u20cf]\}"
    r"|(?:\\text\{)?\b(?:Rs|USD|EUR|INR|GBP|CHF|JPY|CNY|AUD|CAD)\b\.?\}?)"
)
_PREFIX = re.compile(rf"([-+]?)\s*({_CURRENCY})\s*(?=[-+]?\s*[\d.\\({{])")
_ENDS_VALUE = re.compile(r"(?:[\d)}\]!%]|\\pi|\\infty|\|)\s*$")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_PART = r"(\d++(?:\.\d++)?+)\s*+([A-Za-z]++)\.?+"
_SUM = re.compile(rf"{_PART}(?:\s*+,?+\s*+(?:and\s++)?+{_PART})+", re.IGNORECASE)
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2})(?::(\d{2}))?)?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_ODDS = re.compile(r"\d+(?:\s+to\s+\d+)+|\d+(?:\s+(?:in|out of)\s+)\d+", re.IGNORECASE | re.ASCII)
"""Odds, ratios and shares in words: `3 to 1`, `1 in 6`, `75 out of 100`."""
_DENIED = re.compile(
    r"(?<![\\a-zA-Z])(?:no|not|never|neither|except|excluding|without|unless|other than)"
    r"(?![a-zA-Z,]).*="
)
"""A word before an equation that denies the equation."""
_TEMPERATURE = re.compile(
    r"(?:°|\bdegrees?)\s*(C|F)(?:elsius|ahrenheit)?\b|\bdegrees?\s+(?=centigrade)", re.IGNORECASE
)
_IN_WORDS = re.compile(r"^([-+]?[\d.,]+)\s*\([a-z -]{3,}\)$")
"""A number once more in words: `40 (forty)`."""
_MODULUS = re.compile(
    r"\s*\(?\s*(?:\\text\{)?\s*\(?\s*(?:\\(?:pmod|bmod|mod|pod)(?![a-zA-Z])|\bmod(?:ulo)?\b)\s*[{}]?\s*(\w+)\s*[})\s]*$"
)
_LISTED_UNIT = re.compile(
    r"(?<=[\d}])\s*(\\text\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?)(?=\s*(?:,|\)|\]|\\\}|\\text\{(?:and|or)\}|$))"
)
_ANY_GROUPS = re.compile(r"[-+]?\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?", re.ASCII)
"""Digits in groups, as money is written in any country."""
REASON_WORDS = r"because|since|as|where|when|due to|given"
"""Words that begin a reason or a condition behind an answer."""
_REASON = re.compile(
    rf"\s*[,;(—–]*\s*(?:\\text\{{\s*\(?\s*)?\b(?:{REASON_WORDS}|for all)\b.*$", re.DOTALL
)
_RELATION = re.compile(r"[<>]|\\[lg]e(?![a-zA-Z])")
_WHERE = re.compile(r"\\text\{\s*,?\s*(?:where|when)\s*\}|\b(?:where|when)\b")
_REJECTING = re.compile(
    r"(.*?[\d}])(?:\s*,?\s*\\text\{\s*\(?|\s*[,(—–])\s*not\b\s*\}?\s*[-+$]*\d[\d.,/]*[)}\s]*",
    re.DOTALL,
)
"""A value and another one that it is not: `8 \\text{ (not 7)}`."""
_COUNTED = re.compile(r"\\?\$?\d[\d.,/]*(?:\s+[a-zA-Z]+){1,4}\s*")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_FRACTION = re.compile(
    r"([-+]?)\s*(?:\\frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))", re.ASCII
)
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(\\frac\{\d+\}\{\d+\})", re.ASCII)
"""A whole number and a fraction."""
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)", re.ASCII)
_GROUPED_DIGITS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_OPTION = re.compile(r"\\text\{\s*\(\s*([A-J])\s*\)\s*\}|\(?\s*([A-J])\s*\)$")
"""A letter in brackets as text before a value; or before one bracket, without a value."""
_PAIR = re.compile(r"\([^()]*,[^()]*\)")
_SET = re.compile(r"\\\{(?!.*(?:[|:<>]|\\(?:mid|in|le|ge)(?![a-z])))[^()]*,[^()]*\\\}")
_INTERVAL = r"[(\[][^()\[\],]+,[^()\[\],]+[)\]]"
_INTERVALS = re.compile(rf"{_INTERVAL}(?:\s*,\s*{_INTERVAL})+")
_BASED = re.compile(r"[\dA-F.]+_\{(\d+)\}")
_EXCEPT = re.compile(
    r"(?:all|every) (?:real numbers?|reals|real values?(?: of [a-z])?),?(?: [a-z])? "
    r"(?:except|excluding|other than|but|besides|apart from)(?: for)?:? +(.{1,100})",
    re.IGNORECASE,
)
"""All real numbers without a few."""
_SPACES = re.compile(r"(?<![0-9a-zA-Z])\s+|\s+(?![0-9a-zA-Z])")
"""Spaces that part no two numbers or words."""
_DEGREE = read_unit("°") or Unit()
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
SURE_DIGITS = 10
"""Digits to which a decimal must be equal to a value that has no finite decimal."""
MAX_DECIMAL_PLACES = 400


@lru_cache(maxsize=65_536)
def read_value(answer: str) -> Value:
    """Read an answer."""
    text, choice = _split_choice(in_order(plain(_as_one(without_decimal(rewritten(answer))))))
    bare = " ".join(TEXT.sub(r" \1 ", text).split())
    if _ODDS.fullmatch(bare):
        text = (":" if "to" in bare.lower() else "/").join(re.findall(r"\d+", bare))
    if choice and not text:
        return Value(choice, choice=choice)
    if excepted := _EXCEPT.fullmatch(bare):
        points = [_point(point) for point in AND_OR_LIST.split(excepted[1])]
        if all(points):
            return Value(rf"\mathbb{{R}} \setminus \{{{','.join(points)}\}}")
    if clock := _read_clock(text):
        return Value(as_latex(text), clock=clock)
    if words := read_digits(text) or read_counted(text) or read_words(text):
        return Value(as_latex(text), words=words) if isinstance(words, tuple) else Value(words)
    if total := _read_sum(text):
        return total
    if words := read_ratio(text):
        return Value(as_latex(text), words=words)
    value, unit = split_unit(text)
    if _DENIED.search(value):
        return Value(as_latex(value), words=("denied", *bare.lower().split()))
    quantity = _read_quantity(value) if unit is None else None
    return Value(as_latex(value), unit, choice=choice, quantity=quantity)


_DECIMAL_BEHIND = re.compile(
    r"(?:\s*=\s*(?P<begun>[-+]?\d*\.\d+)\s*(?:\\[lc]?dots[bc]?(?![a-z])|…)"
    r"|(?:\s*,\s*(?:or\s+)?|\s+or\s+)(?:about|approximately|roughly|around|≈|\\approx(?![a-z]))"
    r"\s*(?P<rounded>[-+]?\d*\.?\d+)\s*(?P<percent>\\?%|per\s?cent)?)\s*\Z",
    re.ASCII,
)
"""The decimal of the value before, which goes on or is rounded."""


def without_decimal(answer: str) -> str:
    r"""Return a fraction without its own decimal behind it, as in `\frac13 = 0.333\ldots` and
    `2/3, or about 66.67 %`; any other answer as it is.
    """
    if len(answer) > MAX_READ:
        return answer
    bare = TEXT.sub(r" \1 ", answer)
    found = _DECIMAL_BEHIND.search(bare)
    if found is None:
        return answer
    exact = bare[: found.start()]
    sides = [*map(read_number, exact.split("="))]
    number = sides[-1]
    # Other sides are names or the same number.
    if number is None or number[1] or not {*sides} <= {None, number}:
        return answer
    digits = found["begun"] or found["rounded"]
    shown, places = Fraction(Decimal(digits)), len(digits.partition(".")[2])
    if found["percent"]:
        shown, places = shown / 100, places + 2
    difference, last = number[0] - shown, Fraction(1, 10**places)
    if found["begun"]:
        is_own = abs(difference) < last and difference * number[0] >= 0
    else:
        is_own = places > 0 and 2 * abs(difference) <= last
    return exact if is_own else answer


_ALTERNATIVES = re.compile(
    r"(?P<first>[^,()=]+?)\s*(?:,?\s*\bor\b|=|\()\s*(?P<second>[^,()=]+?)\s*\)?[\s.]*"
)


def _as_one(answer: str) -> str:
    r"""Return the number of `0.25 \text{ or } 25\%` and of `25\% = \frac14`, which are one value;
    any other answer as it is.
    """
    if "%" not in answer or len(answer) > MAX_READ:
        return answer
    both = _ALTERNATIVES.fullmatch(TEXT.sub(r" \1 ", answer))
    sides = (both["first"], both["second"]) if both else ()
    shares = [side for side in sides if side.rstrip(" .").endswith("%")]
    others = [side for side in sides if side not in shares]
    if len(shares) != 1 or len(others) != 1:
        return answer
    share, number = (
        _exact(as_latex(plain(side).removesuffix(r"\%").rstrip()))
        for side in (shares[0], others[0])
    )
    return others[0] if number is not None and share == 100 * number else answer


def is_complement(answer: str) -> bool:
    """Return True for all real numbers without a few, in words."""
    return bool(_EXCEPT.fullmatch(answer))


def _point(text: str) -> str:
    """Return the LaTeX of a rational number, also in words or behind `x =`; empty for others."""
    bare = re.sub(r"^[a-z]\s*=", "", text.strip()).strip()
    number = _exact(as_latex(bare))
    if number is None and (spelt := number_in_words(bare)) is not None and bare:
        number = Fraction(spelt)
    return "" if number is None else in_latex(number)


def _split_choice(text: str) -> tuple[str, str]:
    r"""Return an answer without the letter of an option, as in `(B)` and `\text{(B)} 17`."""
    letter = _OPTION.match(text)
    if letter is None:
        return text, ""
    return text[letter.end() :].strip(), letter[1] or letter[2]


def without_reason(text: str) -> str:
    """Return an answer without the reason behind it, as in `18 eggs, since 9 + 9 = 18`."""
    rejecting = _REJECTING.fullmatch(text)
    if rejecting and _exact(rejecting[1]) is not None:
        return rejecting[1]
    value = _REASON.sub("", text)
    if _RELATION.search(value) and _RELATION.search(text, len(value)):
        # A second bound: `x < 3 where x > 0`.
        return _WHERE.sub(r"\\text{ and }", text)
    return value if _ENDS_VALUE.search(value) or _COUNTED.fullmatch(value) else text


def split_unit(text: str) -> tuple[str, Unit | None]:
    """Return value and unit of an answer in plain LaTeX."""
    text, unit = _split_currency(without_reason(text))
    if modulus := _MODULUS.search(text):
        return text[: modulus.start()].rstrip(" ("), Unit((("modulus " + modulus[1], 1),))
    if "," in text and (listed := _split_listed(text)):
        return listed
    tail = _find_tail(_IN_WORDS.sub(r"\1", text), _may_be_unit)
    if tail is None:
        return _IN_WORDS.sub(r"\1", text), unit
    value, words = tail
    scale, words = split_scale(words)
    if scale is not None:
        number = _exact(value)
        value = rf"{value} \times {in_latex(scale)}" if number is None else in_latex(number * scale)
    behind = read_unit(words)
    if behind == Unit():
        behind = read_power_of_unit(words)
    if behind is None or not (behind.words or behind.dimensions):
        return value, unit
    return value, behind if unit is None else _product(unit, words, behind)


def _split_currency(text: str) -> tuple[str, Unit | None]:
    """Return an answer without signs of money, and the money that stands before its beginning."""
    prefix = _PREFIX.search(text)
    if prefix is None:
        return text, None
    leads = not text[: prefix.start()].strip()
    symbol = re.sub(r"\\text|[\\{}.\s]|[A-Z]+(?=\$)", "", prefix[2])
    text = _PREFIX.sub(r"\1", text)
    if leads and _ANY_GROUPS.fullmatch(text.strip()):
        text = text.replace(",", "")
    return text.strip(), read_unit(symbol) if leads else None


def _split_listed(text: str) -> tuple[str, Unit] | None:
    r"""Return a list or a pair without the unit that follows each of its values."""
    units = {read_unit(_flat(found)) for found in _LISTED_UNIT.findall(text)}
    if len(units) != 1 or len(_LISTED_UNIT.findall(text)) < 2:
        return None
    unit = units.pop()
    return (_LISTED_UNIT.sub("", text), unit) if unit and unit.dimensions else None


def _product(currency: Unit, behind: str, unit: Unit) -> Unit:
    """Return the unit of `$5 per hour`; in `$5 dollars` and `$5 profit` it is the currency."""
    rate = re.match(r"[\s(]*(?:/|per\b)\s*", behind)
    return (read_unit(f"$ {behind}") or currency) if rate and unit.dimensions else currency


_E_NOTATION = re.compile(r"\d[eE][-+]?\d")
"""A power of ten in a number, behind which no formula goes on: `1.6e-19`."""
_NAME_OF_QUANTITY = re.compile(
    r"\A(?:\\Delta\s*)?(?:[a-zA-Z]|\\[a-z]{2,7})(?:_(?:\w|\{(?:\\text\{)?\w+\}?\}))?\s*=\s*(?=\S)"
)
"""The name before a quantity, as in `v_0 = 3 metres`."""
_TIME_WITHOUT_ARGUMENT = re.compile(r"(?:min|sec)(?: ?/.*| per .*)?")
"""A unit of time that is called like a function: nothing follows that could be an argument."""


def _read_quantity(text: str) -> Value | None:
    """Read a number and the letters behind it, also behind a name, as value and unit: `E = -2 J`;
    None if the letters are no unit.
    """
    found = _find_tail(text, _may_be_quantity) if len(text) <= MAX_READ else None
    if found is None:
        return None
    return Value(as_latex(_NAME_OF_QUANTITY.sub("", found[0])), read_unit(found[1]))


def _may_be_quantity(tail: re.Match[str], value: str, words: str) -> bool:
    """Return True if the words behind a number may be its unit, though they may be variables."""
    unit, number = read_unit(words), _exact(as_latex(_NAME_OF_QUANTITY.sub("", value)))
    return bool(tail.start() > len(value) and unit and unit.dimensions and number is not None)


def _find_tail(
    text: str, may_be: Callable[[re.Match[str], str, str], bool]
) -> tuple[str, str] | None:
    """Return the value and the words behind it, where these may be a unit."""
    start = 0
    while tail := _UNIT_TAIL.search(text, start):
        value = (
            text[: tail.start()].rstrip(" ~-")
            if tail["text"][:1] == "\\"
            else text[: tail.start()].rstrip()
        )
        words = " ".join(re.sub(r"\\(?:cdot|times)(?![a-zA-Z])|[*{}]", " ", _flat(tail[0])).split())
        if value and may_be(tail, value, words):
            return value, words
        start = tail.end("text")
    return None


def _flat(text: str) -> str:
    """Return the words of a unit without commands, and without remarks in brackets."""
    text = TEXT.sub(r" \1 ", text).replace(r"\Omega", "Ω").replace(r"\mu", "µ").replace(r"\$", "$")
    text = re.sub(r"\([^()]*\)", " ", re.sub(r"/\s*\(([^()]*)\)", r"/\1", text))
    text = re.sub(r"(?<=µ)\s+|(?<=\b[kMm])\s+(?=Ω)", "", text)
    return _TEMPERATURE.sub(lambda found: f"°{found[1].upper()}", text)


def _may_be_unit(tail: re.Match[str], value: str, words: str) -> bool:
    """Return True if the words behind a value are its unit, and no variables or second value."""
    if not words:
        return "(" in tail[0]
    scale, rest = split_scale(words)
    unit = read_unit(rest) if scale is None or rest else Unit()
    if unit is None or re.search(_AND_OR, words) or words in _ORDINALS:
        return False
    measured = bool(unit.dimensions) and not unit.words
    if "°" in tail[0] and TRIGONOMETRY.search(value):
        return False
    if not tail["text"][0].isalpha():
        return _marked_unit(value, words, measured)
    spaced = tail.start() > len(value)
    first = re.split(r"[^A-Za-z]", words)[0]
    bare = _NAME_OF_QUANTITY.sub("", value)
    if not (_is_numeric(bare) and _ENDS_VALUE.search(value)):
        return False
    if bare != value:
        # Fewer letters, as in `F = 2 mg` and `E = -2 J`, may be variables.
        return spaced and measured and len(first) > 3
    if FUNCTION.fullmatch(first.lower()) and not _TIME_WITHOUT_ARGUMENT.fullmatch(words):
        return False
    if len(first) == 1:
        # A letter is a variable, as a rule: 6s^2, 2t.
        letters = SPACED_UNIT_LETTERS if spaced else UNIT_LETTERS
        power = words[0] == "m" and "^" in words
        scientific = words[0].isupper() and _E_NOTATION.search(value)
        is_told = "/" in words or (spaced and (power or scientific))
        return words in letters or bool(measured and is_told)
    if value.endswith("}") and re.fullmatch(r"[A-Za-z]{2} ?\^ ?\d", words):
        return [*dict(unit.dimensions)] == ["length"]  # else variables: `\frac12 CV^2`
    if first == "of":
        return True
    return measured or len(first) > (2 if spaced else 3)


def _marked_unit(value: str, words: str, measured: bool) -> bool:
    """Return True if words in a command for text, or a sign, are the unit of a value."""
    if _ENDS_VALUE.search(value):
        return measured or len(words) > 1 or not _is_numeric(value)
    return measured


_POWER_OF_TEN = re.compile(r"(?<=\d)(?:[eE](?=[-+]?\d)| ?x ?(?=10 ?\^))")
"""Signs of a number that are no variables: `3e8`, `3 x 10^8`."""


def _is_numeric(value: str) -> bool:
    """Return True if a value has no variable."""
    bare = _POWER_OF_TEN.sub("", _COMMAND.sub("", value).replace("e^", ""))
    return not re.search(r"[A-Za-z]", bare)


def _read_clock(text: str) -> Clock | None:
    bare = " ".join(TEXT.sub(r" \1 ", text).split())
    bare = {"noon": "12 pm", "midnight": "12 am"}.get(bare.lower(), bare)
    time = _CLOCK.fullmatch(re.sub(r"\s*:\s*", ":", bare))
    if time is None or not (time[2] or time[4]):
        return None
    hour, minute, second = (int(time[part] or 0) for part in (1, 2, 3))
    half = (time[4] or "").lower()
    if max(minute, second) > 59 or hour > (12 if half else 24) or (half and hour == 0):
        return None
    past = minute * 60 + second
    if hour == 24 and past:
        return None
    if half:
        return Clock((hour % 12 + (12 if half == "p" else 0)) * 3600 + past, True, True)
    # From 13 on, and at 0, the clock has 24 hours.
    return Clock(hour * 3600 + past, hour > 12 or hour == 0)


def _read_sum(text: str) -> Value | None:
    """Read a quantity in several units, as `3 h 20 min`, in the largest of them."""
    bare = " ".join(TEXT.sub(r" \1 ", text).split())
    if not _SUM.fullmatch(bare):
        return None
    parts = [(Fraction(number), read_unit(name)) for number, name in re.findall(_PART, bare)]
    units = [unit for _, unit in parts if unit is not None]
    if (
        len(units) < len(parts)
        or not units[0].dimensions
        or any(not units[0].agrees(unit) for unit in units)
    ):
        return None
    largest = max(units, key=lambda unit: unit.factor)
    total = sum((number * unit.factor for number, unit in parts if unit), Fraction(0))
    return Value(in_latex(total / largest.factor), largest)


def decide(a: Value, b: Value) -> bool | Question:
    """Return True or False where equality needs no math-verify, else the two values to compare."""
    if {a.choice, b.choice} & {a.latex, b.latex}:
        return (a.choice or a.latex) == (b.choice or b.latex)
    if a.clock and b.clock:
        return a.clock.equals(b.clock)
    if a.words and b.words:
        return a.words == b.words or are_endless(a.words, b.words)
    if {"date", "digits", "remainder", "denied"} & {*a.words[:1], *b.words[:1]}:
        return False
    if not any(x.clock and x.clock.has_half for x in (a, b)):
        verdict = compare_ratios(a.latex, b.latex)
        if verdict is not None:
            return verdict
    if (a.clock is None) != (b.clock is None):
        timed, other = (a, b) if a.clock else (b, a)
        return _equals_clock(timed, other)
    if (a.quantity and b.unit) or (b.quantity and a.unit):
        a, b = a.quantity or a, b.quantity or b
    if not _units_agree(a, b) or _is_share_and_quantity(a, b) or _is_share_and_quantity(b, a):
        return False
    left, right = _in_radians(a, b) or _in_one_unit(a, b)
    if left == right or _SPACES.sub("", left) == _SPACES.sub("", right):
        return True
    first, second = _percent(left), _percent(right)
    if first and second:
        # Two percentages are compared as they are.
        pairs = product(first, second) if len(first) != len(second) else [(first[0], second[0])]
        return any(equal_numbers(x, y) for x, y in pairs)
    if not _bases_agree(left, right) or _is_pair_and_set(left, right):
        return False
    left, right = _as_union(left, right), _as_union(right, left)
    if too_large(left) or too_large(right):
        return False
    return min(left, right), max(left, right)


def _as_union(latex: str, other: str) -> str:
    """Return a list of intervals as their union, where the other value is a union."""
    if r"\cup" not in other or not _INTERVALS.fullmatch(latex):
        return latex
    return re.sub(r"(?<=[)\]])\s*,", r" \\cup ", latex)


def _equals_clock(timed: Value, other: Value) -> bool | Question:
    """Compare a time of day with another value: `12:30` with the ratio `2:5`, `3 pm` with `3`."""
    assert timed.clock
    if ":" not in timed.latex:
        hour = timed.clock.seconds // 3600
        return other.unit is None and other.latex in {str(hour), str((hour - 1) % 12 + 1)}
    if timed.clock.has_half or ":" not in other.latex:
        return False
    return min(timed.latex, other.latex), max(timed.latex, other.latex)


def _is_share_and_quantity(a: Value, b: Value) -> bool:
    """Return True for a percentage and a number of a unit: `20\\%` and `20 kg`."""
    is_share = a.latex.endswith(r"\%") and not b.latex.endswith(r"\%")
    return bool(is_share and b.unit and (b.unit.dimensions or b.unit.words))


def _units_agree(a: Value, b: Value) -> bool:
    return a.unit is None or b.unit is None or a.unit.agrees(b.unit)


def _in_one_unit(a: Value, b: Value) -> Question:
    if a.unit is None or b.unit is None or (a.unit.factor, a.unit.pi) == (b.unit.factor, b.unit.pi):
        return a.latex, b.latex
    return _scaled(a.latex, a.unit), _scaled(b.latex, b.unit)


_MULTIPLE_OF_PI = re.compile(
    r"[-+]?\s*(?:(?:\d+|\\frac\s*\{\d+\}\s*\{\d+\})?\s*\\pi\s*(?:/\s*\d+)?"
    r"|\\frac\s*\{\s*\d*\s*\\pi\s*\}\s*\{\s*\d+\s*\})"
)


def _in_radians(a: Value, b: Value) -> Question | None:
    """Return an angle in degrees and a multiple of pi as two angles in radians; None for others."""
    for degrees, other in ((a, b), (b, a)):
        if degrees.unit == _DEGREE and other.unit is None:
            angle, multiple = (_NAME_OF_QUANTITY.sub("", each.latex) for each in (degrees, other))
            names = {degrees.latex.removesuffix(angle), other.latex.removesuffix(multiple)} - {""}
            if _exact(angle) is not None and _MULTIPLE_OF_PI.fullmatch(multiple):
                return (_scaled(angle, _DEGREE), multiple) if len(names) < 2 else None
    return None


def _scaled(latex: str, unit: Unit) -> str:
    """Return a value in base units."""
    number = _exact(latex)
    if number is not None and not unit.pi:
        return in_latex(number * unit.factor)
    pi = rf" \cdot \pi^{{{unit.pi}}}" if unit.pi else ""
    return rf"\left({latex}\right) \cdot {in_latex(unit.factor)}{pi}"


def read_number(answer: str) -> tuple[Fraction, Unit | None] | None:
    """Return number and unit of an answer that is nothing else; None for any other answer."""
    value = read_value(answer)
    number = _exact(value.latex.removesuffix(r"\%").rstrip())
    return None if number is None else (number, value.unit)


def _exact(latex: str) -> Fraction | None:
    """Return the number that a decimal or a fraction of integers is."""
    if _NUMBER.fullmatch(latex):
        return Fraction(Decimal(latex))
    if _GROUPED_DIGITS.fullmatch(latex):
        return Fraction(Decimal(latex.replace(",", "")))
    latex = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", latex)
    if (mixed := _MIXED.fullmatch(latex)) and (part := _exact(mixed[3])) is not None:
        return (int(mixed[2]) + part) * (-1 if mixed[1] == "-" else 1)
    if parts := _FRACTION.fullmatch(latex):
        numerator, denominator = parts[2] or parts[4], int(parts[3] or parts[5])
        sign = -1 if parts[1] == "-" else 1
        return sign * Fraction(int(numerator), denominator) if denominator else None
    return None


def _percent(latex: str) -> list[Fraction]:
    """Return the number that a value is; the share and the number of a percentage; else nothing."""
    number = _exact(as_latex(latex.removesuffix(r"\%").rstrip()))
    if number is None:
        return []
    return percentages(number) if latex.endswith(r"\%") else [number]


def percentages(number: Any) -> list[Any]:
    r"""Return the numbers that `50\%` is equal to: 0.5, and 50, since the question may ask for
    percent. `0.5\%` is not 0.5, which would be a share.
    """
    return [number / 100, number] if abs(number) > 1 else [number / 100]


def equal_numbers(a: Fraction, b: Fraction) -> bool:
    """Return True if two numbers are equal, or one is a long decimal close to the other.

    A number without a finite decimal, as 1/3, has to be met to `SURE_DIGITS` digits.
    """
    if a == b:
        return True
    digits = decimal_digits(a), decimal_digits(b)
    if (digits[0] is None) == (digits[1] is None) or max(
        digits[0] or 0, digits[1] or 0
    ) < SURE_DIGITS:
        return False
    return abs(a - b) * 10**SURE_DIGITS < max(abs(a), abs(b))


def decimal_digits(number: Fraction) -> int | None:
    """Return the significant digits of a number's decimal; None if the decimal has no end."""
    denominator, powers = number.denominator, []
    for prime in (2, 5):
        powers.append(0)
        while denominator % prime == 0:
            denominator //= prime
            powers[-1] += 1
    if denominator != 1 or max(powers) > MAX_DECIMAL_PLACES:
        return None
    return len(str(abs(number.numerator * 10 ** max(powers) // number.denominator)).rstrip("0"))


def _bases_agree(a: str, b: str) -> bool:
    """Return False for `12_5` and `12_7`; a number without a base has that of the question."""
    bases = {found[1] for answer in (a, b) if (found := _BASED.fullmatch(answer))}
    return len(bases) < 2


def _is_pair_and_set(a: str, b: str) -> bool:
    r"""Return True for `(3,4)` and `\{3,4\}`, which math-verify takes for equal."""
    return any(_PAIR.fullmatch(x) and _SET.fullmatch(y) for x, y in ((a, b), (b, a)))
