"""Ways to write a value: ordinals, decimals that go on, compositions of functions, minutes of an
angle, nouns around a value, as in `profit of $15`, and rows of equations.
"""

import calendar
import re
from fractions import Fraction
from functools import lru_cache

from lim_sglang.programs.grading.latex import MAX_READ, TEXT_COMMAND
from lim_sglang.programs.grading.units import read_unit, split_scale

_REPEATING = re.compile(
    r"(?<![\d.,])(\d*\.\d{0,5}?)(?:(\d)\2{2,}|(\d\d)\3{2,})"
    r"\s*(?:\.{3,}|…|\\[lc]?dots[bc]?(?![a-zA-Z]))(?!\s*(?:\d|\\(?!%)))",
    re.ASCII,
)
"""A decimal that ends in three equal digits, or pairs of digits, and dots."""
_EXTREME = re.compile(r"_\s*(\{)?\s*\\(max|min)(?![a-zA-Z])\s*(?(1)\})")
_COMPOSED = re.compile(
    r"((?:\\left\s*)?\()?\s*([a-zA-Z](?:\^\{-1\})?(?:\s*\\circ\s*[a-zA-Z](?:\^\{-1\})?)+)"
    r"\s*(?(1)(?:\\right\s*)?\))\s*\(([^()]{1,50})\)(?=\s*=)"
)
_ORDINAL = re.compile(
    r"(?:the\s+|[a-z]\s*=\s*)?(\d{1,9})\s*(?:(\^)\s*(\{)?\s*)?(st|nd|rd|th)\b\s*(?(3)\})((?:\s+[a-z]+){0,3})[\s.]*",
    re.IGNORECASE | re.ASCII,
)
_SUFFIXES = {1: "st", 2: "nd", 3: "rd"}
_NO_NOUN = frozenset(
    name.lower()
    for name in (*calendar.month_name, *calendar.month_abbr, "part", "derivative", "share")
)
"""Words behind an ordinal that make of it a day, a fraction or a function."""
_UP = r"increase[sd]?|rises?|rose|gains?|growth|profits?|higher"
_DOWN = (
    r"decrease[sd]?|reductions?|reduced|drops?|dropped|falls?|fell|declined?|declines|loss|lower"
)
_QUANTITIES_TEXT = (
    "total cost price amount revenue income salary interest tax tip discount savings distance "
    "length height width depth radius diameter area volume perimeter circumference speed velocity "
    "mass weight force pressure temperature probability chance average mean median minimum maximum "
    "score age"
)
_NOUN = rf"(?P<up>{_UP})|(?P<down>{_DOWN})|(?:{'|'.join(_QUANTITIES_TEXT.split())})"
_SYNONYMS = {"mean": "average", "chance": "probability"}
_NUMBER = (
    r"[-+]?(?:\\?[$€£]\s*)?(?:\d[\d,]*(?:\.\d+)?|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})"
    r"\s*(?:\\?%|per\s?cent|[a-z/]{1,12})?"
)
_ARTICLE = r"(?:(?:an?|the|net|overall)\s+)*"
_NOUN_BEFORE = re.compile(
    rf"{_ARTICLE}(?P<noun>{_NOUN})(?:\s+(?:of|by)\s+|\s*:\s*)(?P<value>{_NUMBER})[\s.]*",
    re.IGNORECASE | re.ASCII,
)
_NOUN_BEHIND = re.compile(
    rf"{_ARTICLE}(?P<value>{_NUMBER})\s*\b(?P<noun>{_NOUN})(?:\s+in(?:\s+[a-z]+){{1,3}})?[\s.]*",
    re.IGNORECASE | re.ASCII,
)
_WORDS_BEHIND = re.compile(r".*?[\d%}]\s*([a-z]+(?: [a-z]+)*)[\s.]*", re.IGNORECASE | re.ASCII)
_ANGLE = re.compile(
    r"(\d+)\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*(?:\\[,;: ])?\s*(\d+)"
    r"\s*(?:['′’]|\^\s*\{?\s*\\prime\s*\}?)"
    r"(?:\s*(?:\\[,;: ])?(\d+)\s*(?:''|[\"″”]))?",
    re.ASCII,
)
"""Degrees, minutes and perhaps seconds of an angle."""
_INDEX = r"\{?(\w+)\}?"
_CHOSEN = re.compile(
    rf"(?:\{{\s*\}}|(?:(?<=\A)|(?<=[-+=*/({{$]))(?:\\[,;:!])?)\s*[\^_]\s*{_INDEX}\s*"
    rf"(?:\\(?:text|mathrm)\s*\{{\s*)?([CP])\s*\}}?\s*_\s*{_INDEX}",
    re.ASCII,
)
"""Numbers of choices and orders with the larger number before the letter: `{}_5C_2`, `^5P_2`."""


def rewritten(answer: str) -> str:
    r"""Return an answer as it is read: `0.1666…` as `0.1\overline{6}`, `15^{\text{th}}` as 15,
    `(f \circ g)(2) = 7` as `f(g(2)) = 7`, `x_{\max}` as a name, `profit of $15` as `$15`,
    `{}_5C_2` as a binomial coefficient, and `30^\circ 15'` in degrees.
    """
    if len(answer) > MAX_READ:
        return answer
    if answer.count("=") < 2:  # a chain may end in the decimal of another value
        answer = _REPEATING.sub(_recurring, answer)
    answer = _ANGLE.sub(_in_degrees, _CHOSEN.sub(_binomial, answer))
    answer = _COMPOSED.sub(_nested, _EXTREME.sub(r"_{\\text{\2}}", answer))
    return _value_of_noun(answer)[1] or _cardinal(answer) or answer


def without_nouns(a: str, b: str) -> tuple[str, str] | None:
    """Return two answers, a change that only one of them names with its sign: `loss of $15` is
    `-$15`; None for values of two quantities, as an increase and a decrease of 15 %.
    """
    (noun, value), (other_noun, other_value) = _value_of_noun(a), _value_of_noun(b)
    if noun and other_noun:
        return (a, b) if noun == other_noun else None
    if noun in ("up", "down"):
        signed = _signed(noun, value, b)
        return None if signed is None else (signed, b)
    if other_noun in ("up", "down"):
        signed = _signed(other_noun, other_value, a)
        return None if signed is None else (a, signed)
    return a, b


def _signed(direction: str, value: str, other: str) -> str | None:
    """Return a change as a number; None beside words, which do not tell the direction, and for an
    amount beside a percentage.
    """
    words = _WORDS_BEHIND.fullmatch(flat := _flat(other))
    unit = read_unit(words[1]) if words else None
    if is_ordinal(other) or (words and (unit is None or unit.words)):
        return None
    if ("%" in flat and "%" not in value) or value[0] in "-+":
        return None
    return f"-{value}" if direction == "down" else value


def is_ordinal(answer: str) -> bool:
    """Return True for an ordinal with or without a noun: `the 15th floor`."""
    return _cardinal(answer) is not None


def _recurring(decimal: re.Match[str]) -> str:
    return rf"{decimal[1]}\overline{{{decimal[2] or decimal[3]}}}"


def _nested(composed: re.Match[str]) -> str:
    names = [name.strip() for name in composed[2].split(r"\circ")]
    return "(".join(names) + f"({composed[3]}" + ")" * len(names)


def _in_degrees(angle: re.Match[str]) -> str:
    whole, minutes, seconds = (int(part or 0) for part in angle.groups())
    number = whole + Fraction(minutes, 60) + Fraction(seconds, 3600)
    return rf"\frac{{{number.numerator}}}{{{number.denominator}}}^\circ"


def _binomial(chosen: re.Match[str]) -> str:
    n, letter, k = chosen.groups()
    return rf"\binom{{{n}}}{{{k}}}" if letter == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


def _flat(answer: str) -> str:
    """Return an answer without commands for text."""
    return " ".join(re.sub(r"\\[,;:! ]|~", " ", TEXT_COMMAND.sub(r" \1 ", answer)).split())


def _cardinal(answer: str) -> str | None:
    """Return the number of an ordinal, with the noun behind it as its unit, which is none of a
    quantity; None for any other answer, and for `3rd root` and `3rd quarter`.
    """
    raised = answer.replace(r"\textsuperscript", "^")
    ordinal = _ORDINAL.fullmatch(_flat(raised).replace("{ ", "{").replace(" }", "}"))
    if ordinal is None:
        return None
    number, words = int(ordinal[1]), ordinal[5].lower().split()
    suffix = "th" if number % 100 in (11, 12, 13) else _SUFFIXES.get(number % 10, "th")
    if ordinal[4].lower() != suffix or not _NO_NOUN.isdisjoint(words):
        return None
    noun = " ".join(words)
    unit = read_unit(noun) if noun else None
    if noun and (unit is None or unit.pi or split_scale(noun)[0] is not None):
        return None
    return rf"{ordinal[1]} \text{{{' '.join(['ordinal', *words])}}}"


@lru_cache(maxsize=4096)
def _value_of_noun(answer: str) -> tuple[str, str]:
    """Return the noun of a value, `up` and `down` for a change, and the value; empty for others."""
    if len(answer) > MAX_READ:
        return "", ""
    flat = _flat(answer)
    found = _NOUN_BEFORE.fullmatch(flat) or _NOUN_BEHIND.fullmatch(flat)
    if found is None:
        return "", ""
    noun = found["noun"].lower()
    direction = "up" if found["up"] else "down" if found["down"] else ""
    return direction or _SYNONYMS.get(noun, noun), found["value"]


_ENDLESS = re.compile(
    r"(?:infinitely many|(?:infinite|unlimited)(?: number of| amount of)?)"
    r"(?: (?!of\b)(\w+(?: \w+)??))?(?: exist)?"
)


def are_endless(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Return True if words say that there are infinitely many of the same things, which one of them
    may leave out: `infinitely many`, `infinite solutions`.
    """
    first, second = (_ENDLESS.fullmatch(" ".join(words)) for words in (a, b))
    return bool(first and second and (not first[1] or not second[1] or first[1] == second[1]))


_JOINT = re.compile(r"\s*(?:,(?:\s*and\b)?|\\text\{\s*,?\s*and\s*\}|\band\b)\s*")
"""Signs between equations that hold together."""
_AROUND_ROWS = re.compile(
    r"\A\\\{|\\begin\{(?:array|matrix|[dr]?cases)\}(?:\{[lcr|\s]*\})?"
    r"|\\end\{(?:array|matrix|[dr]?cases)\}|\\\}\Z"
)
"""The brace before rows, and the environment that they stand in."""
_AROUND_EQUATION = re.compile(
    r"\A(?:[\s,.;]|\\text\{\s*,?\s*and\s*\})+|(?:[\s,.;]|\\text\{\s*,?\s*and\s*\}|\band\b)+\Z"
)
_EQUATION = re.compile(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*=\s*[^=<>&]+")


def in_order(text: str) -> str:
    """Return `x = 1, y = 2` for rows of equations, and for `y = 2, x = 1`, whose values are a
    point; any other text as it is.
    """
    equations = _equations(text)
    if {each.partition("=")[0].strip() for each in equations} <= {*"xyz"}:
        equations.sort()
    return ", ".join(equations) or text


def _equations(text: str) -> list[str]:
    """Return the equations of rows or of a list, each with a name of its own on the left; none for
    any other text.
    """
    if "=" not in text or len(text) > MAX_READ:
        return []
    rows = _AROUND_ROWS.sub("", text).split(r"\\")
    if len(rows) == 1:
        parts = _JOINT.split(text)
    else:
        parts = [_AROUND_EQUATION.sub("", row.replace("&", "")) for row in rows]
    parts = [*filter(None, parts)]
    equations = [*map(_EQUATION.fullmatch, parts)]
    names = [equation[1] for equation in equations if equation]
    if len(names) < 2 or not len(equations) == len(set(names)) == len(names):
        return []
    return parts
