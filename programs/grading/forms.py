"""Ways to write a value: ordinals, decimals that go on, compositions of functions, nouns around it,
as in `profit of $15`, and rows of equations.
"""

import calendar
import re
from functools import lru_cache

from lim_sglang.programs.grading.latex import TEXT_COMMAND
from lim_sglang.programs.grading.units import read_unit, split_scale

MAX_LENGTH = 200
"""Characters of the longest answer that is written in another way."""
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
_UP = frozenset(
    (
        *("increase", "increases", "increased", "rise", "rises", "rose", "gain", "growth"),
        "profit",
    )
)
_DOWN = frozenset(
    (
        *("decrease", "decreases", "decreased", "reduction", "reduced", "drop", "drops"),
        *("dropped", "fall", "falls", "fell", "decline", "declines", "declined", "loss"),
    )
)
_QUANTITIES_TEXT = (
    "total cost price amount revenue income salary interest tax tip discount savings distance "
    "length height width depth radius diameter area volume perimeter circumference speed velocity "
    "mass weight force pressure temperature probability chance average mean median minimum maximum "
    "score age"
)
_CHANGES = "|".join(sorted(_UP | _DOWN, reverse=True))
_QUANTITIES = "|".join(_QUANTITIES_TEXT.split())
_NUMBER = (
    r"[-+]?(?:\\?[$€£]\s*)?(?:\d[\d,]*(?:\.\d+)?|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})"
    r"\s*(?:\\?%|per\s?cent|[a-z]{1,12})?"
)
_ARTICLE = r"(?:(?:an?|the|net|overall)\s+)*"
_NOUN_BEFORE = re.compile(
    rf"{_ARTICLE}(?P<noun>{_CHANGES}|{_QUANTITIES})(?:\s+(?:of|by)\s+|\s*:\s*)(?P<value>{_NUMBER})[\s.]*",
    re.IGNORECASE | re.ASCII,
)
_NOUN_BEHIND = re.compile(
    rf"{_ARTICLE}(?P<value>{_NUMBER})\s*\b(?P<noun>{_CHANGES})(?:\s+in(?:\s+[a-z]+){{1,3}})?[\s.]*",
    re.IGNORECASE | re.ASCII,
)


def rewritten(answer: str) -> str:
    r"""Return an answer as it is read: `0.1666…` as `0.1\overline{6}`, `15^{\text{th}}` as 15,
    `(f \circ g)(2) = 7` as `f(g(2)) = 7`, `x_{\max}` as a name, and `profit of $15` as `$15`.
    """
    if len(answer) > MAX_LENGTH:
        return answer
    if answer.count("=") < 2:  # a chain may end in the decimal of another value
        answer = _REPEATING.sub(_recurring, answer)
    answer = _COMPOSED.sub(_nested, _EXTREME.sub(r"_{\\text{\2}}", answer))
    return _value_of_noun(answer)[1] or _cardinal(answer) or answer


def differ_in_noun(a: str, b: str) -> bool:
    """Return True for values of two quantities, as an increase and a decrease of 15 %."""
    first, second = _value_of_noun(a)[0], _value_of_noun(b)[0]
    return bool(first and second and first != second)


def is_ordinal(answer: str) -> bool:
    """Return True for an ordinal with or without a noun: `the 15th floor`."""
    return _cardinal(answer) is not None


def _recurring(decimal: re.Match[str]) -> str:
    return rf"{decimal[1]}\overline{{{decimal[2] or decimal[3]}}}"


def _nested(composed: re.Match[str]) -> str:
    names = [name.strip() for name in composed[2].split(r"\circ")]
    return "(".join(names) + f"({composed[3]}" + ")" * len(names)


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
    if len(answer) > MAX_LENGTH:
        return "", ""
    flat = _flat(answer)
    found = _NOUN_BEFORE.fullmatch(flat) or _NOUN_BEHIND.fullmatch(flat)
    if found is None:
        return "", ""
    noun = found["noun"].lower()
    return "up" if noun in _UP else "down" if noun in _DOWN else noun, found["value"]


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


MAX_EQUATIONS = 500
"""Characters of the longest answer that is read as equations."""
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
    if "=" not in text or len(text) > MAX_EQUATIONS:
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
