r"""Answers that are words: dates, counted things, ratios, names of sets, numbers that are spelt."""

import calendar
import math
import re
from fractions import Fraction

from lim_sglang.programs.grading.latex import FUNCTION
from lim_sglang.programs.grading.units import NUMBERS_IN_WORDS, TENS_IN_WORDS, read_unit

TEXT = re.compile(r"\\text\{([^{}]*)\}")
_ISO_DATE = re.compile(r"(\d{4})[-–](0[1-9]|1[0-2])[-–](0[1-9]|[12]\d|3[01])", re.ASCII)
_CODE = re.compile(r"(?=.*\b0\d)\d+(?:\s*[-–]\s*\d+)+|(?:(?:\d-)?\d{3}-)?\d{3}-\d{4}", re.ASCII)
"""Digits that are no numbers: with zeros in front, as `10-05`, or of a telephone, `555-1234`."""
_REMAINDER = re.compile(
    r"(?:quotient\b[:=]?\s*)?(-?\d+)\s*,?\s*(?:(?:and|with)\s+)?(?:a\s+)?"
    r"(?:r|(?:rem\b\.?|remainder\b)(?:\s+of\b|\s+is\b|\s*[:=])?)\s*(\d+)",
    re.ASCII | re.IGNORECASE,
)
"""The result of a division of whole numbers: `5 R 2`, `5 with a remainder of 2`."""
_PHRASES = {
    r"\emptyset": "no solution|no solutions|no real solution|no real solutions|empty set|none",
    r"\mathbb{R} \setminus \{0\}": "all nonzero real numbers|all non zero real numbers"
    "|nonzero real numbers|non zero real numbers|all nonzero reals|all non zero reals",
    r"\mathbb{R}": "all real numbers|all reals|all real number|real numbers|all real values",
    r"\mathbb{Z}": "all integers|integers",
    r"\infty": "infinity|positive infinity|plus infinity",
    r"-\infty": "negative infinity|minus infinity",
}
_TRUTH_AND_NUMBER = re.compile(r"\A(yes|no|true|false)\s+\([-+$\d.,/\s=]*\d\s*\)\Z", re.IGNORECASE)
"""A truth value and a number that explains it: `Yes (7)`."""
_LATEX_OF = {words: latex for latex, phrases in _PHRASES.items() for words in phrases.split("|")}
_DENOMINATORS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5} | {
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "hundredth": 100,
}
_SCALES_IN_WORDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
OPERATIONS = frozenset(
    (
        *("times", "plus", "minus", "over", "divided", "multiplied", "squared", "cubed", "to"),
        *("mod", "modulo", "choose", "not", "is", "are", "percent", "base", "dozen", "below"),
        *("hundred", "thousand", "million", "billion", "half", "halves", "thirds", "quarters"),
        *("fifths", "tenths", "hundredths", "factorial", "root", "pi", "power", "in", "by"),
    )
)
"""Words behind a number that make a calculation, another number or a statement of it."""
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)
_COUNTED = re.compile(r"(?:[\w\s,.'’]|(?<=[^\W\d_]{2})-(?=[^\W\d_]))+")
_COUNTED_WORD = re.compile(rf"{_NUMBER.pattern}|[^\W\d_]+")
AND_OR_LIST = re.compile(r"\s*(?:,(?!\d{3}\b)\s*(?:\b(?:and|or)\b)?|\b(?:and|or)\b)\s*")
"""Words and commas of a list; no comma within a number."""
_MONTHS = [name.lower() for name in calendar.month_name[1:]]

_VARIABLE = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_DROPPED = frozenset(("there", "are")) | frozenset(["a", "an", "the", "is", "it"])


def read_digits(text: str) -> tuple[str, ...]:
    """Return the words of a date as `2024-01-02`, the numbers of a division with remainder, or the
    digits of a code; empty for a number.
    """
    if division := _REMAINDER.fullmatch(TEXT.sub(r" \1 ", text).strip()):
        return ("remainder", *(str(int(number)) for number in division.groups()))
    if date := _ISO_DATE.fullmatch(text):
        return _canonical([_MONTHS[int(date[2]) - 1], date[3], date[1]])
    return ("digits", *re.findall(r"\d+", text)) if _CODE.fullmatch(text) else ()


def read_words(text: str) -> tuple[str, ...] | str:
    """Return the words of an answer without formulas; the LaTeX of words that name a value; empty
    if the answer is no text.
    """
    bare = _TRUTH_AND_NUMBER.sub(r"\1", TEXT.sub(r" \1 ", text).strip())
    if not re.fullmatch(r"[^\W_][\w\s,.;:'’()&/-]*", bare) or "\\" in bare:
        return ""
    if bare != text and _VARIABLE.search(TEXT.sub(" ", text)):
        return ""
    words = re.findall(r"[^\W_]+", re.sub(r"\bdne\b", "does not exist", bare.casefold()))
    names = [word for word in words if word.isalpha()]
    if words[0].isdigit() and not any(_month(word) for word in words):
        return ""
    marked = bool(TEXT.search(text)) and max(map(len, names), default=0) > 1
    if (
        not marked
        and (max(map(len, names), default=0) < 3 or all(map(FUNCTION.fullmatch, names)))
        and words != ["no"]
    ):
        return (
            ""
            if not re.fullmatch(r"\(?[A-J]\)?(?:\s*,\s*\(?[A-J]\)?)+", bare.strip())
            else tuple(sorted(words))
        )
    if not marked and re.search(r"\d|[()/=+]", bare) and not any(_month(word) for word in words):
        return ""
    phrase = " ".join(word for word in words if word not in _DROPPED)
    if phrase in _LATEX_OF:
        return _LATEX_OF[phrase]
    sign = words[0] in ("minus", "negative") and len(words) > 1
    number: Fraction | int | None = number_in_words(bare[len(words[0]) :] if sign else bare)
    if number is None:
        number = _fraction_in_words(words[sign:])
    if number is not None:
        return in_latex(Fraction(-number if sign else number))
    return _canonical(words)


def _canonical(words: list[str]) -> tuple[str, ...]:
    """Return words as they are compared: a date without order, a list of letters sorted."""
    months = [_month(word) for word in words if _month(word)]
    rest = [re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", word) for word in words if not _month(word)]
    if months and all(word.isdigit() or word == "of" for word in rest):
        days = sorted(word.lstrip("0") for word in rest if word.isdigit())
        return ("date", *months, *days)
    kept = [word for word in words if word not in _DROPPED]
    if all(len(word) == 1 for word in words):
        return tuple(sorted(words))
    return tuple(kept or words)


def _month(word: str) -> str:
    """Return a month by its name or first letters; empty for another word."""
    found = [
        month
        for month in _MONTHS
        if word == month or (len(word) in (3, 4) and month.startswith(word))
    ]
    return found[0] if found else ""


def number_in_words(text: str) -> int | None:
    """Return the number that words spell: `seventy two`, `two thousand and five`; None for other
    words, and for two numbers, as `one, two`.
    """
    if not re.fullmatch(r"[\s\w-]*|\w+ thousand,[\s\w-]*", text):
        return None
    total = part = 0
    # The next word's number has to be below the limit, as the words of a number become smaller.
    limit = 1000
    for word in re.findall(r"\w+", text.casefold()):
        if word in NUMBERS_IN_WORDS:
            value, bound = NUMBERS_IN_WORDS.index(word), 1
        elif word in TENS_IN_WORDS:
            value, bound = 10 * (TENS_IN_WORDS.index(word) + 2), 10
        elif word == "hundred" and part < 100:
            part, limit = (part or 1) * 100, 100
            continue
        elif word in _SCALES_IN_WORDS and (scale := _SCALES_IN_WORDS[word]) < (total or scale + 1):
            total, part, limit = total + (part or 1) * scale, 0, 1000
            continue
        elif word == "and":
            continue
        else:
            return None
        if value >= limit:
            return None
        part, limit = part + value, bound
    return total + part


def _fraction_in_words(words: list[str]) -> Fraction | None:
    """Return the number that words spell which end in a fraction: `one half`, `two and a half`;
    None for other words.
    """
    *others, name = words
    denominator = _DENOMINATORS.get(name.removesuffix("s"))
    if denominator is None:
        return None
    *others, last = others or ["one" if denominator == 2 else ""]
    numerator = 1 if last in ("a", "an") else number_in_words(last)
    if not numerator or numerator >= 20:
        return None
    whole = number_in_words(" ".join(others[:-1])) if others[-1:] == ["and"] else 0
    is_fraction = not others or (
        others[-1] == "and" and len(others) > 1 and numerator < denominator
    )
    return whole + Fraction(numerator, denominator) if is_fraction and whole is not None else None


def read_counted(text: str) -> tuple[str, ...]:
    """Return the parts of words with several numbers, `3 red and 2 blue`, in no order; empty for
    formulas, quantities and lists of numbers.
    """
    bare = TEXT.sub(r" \1 ", text).strip()
    if not _COUNTED.fullmatch(bare) or len(_NUMBER.findall(bare)) < 2:
        return ()
    parts = [_COUNTED_WORD.findall(part) for part in AND_OR_LIST.split(bare)]
    names = [[word for word in part if word[0].isalpha()] for part in parts]
    if any(len(part) in (0, len(words)) for part, words in zip(names, parts, strict=True)):
        return ()
    if any(len(name) < 2 or _is_no_name(name) for part in names for name in part):
        return ()
    return tuple(sorted(" ".join(map(_canonical_word, words)) for words in parts))


def _canonical_word(word: str) -> str:
    """Return a word in lower case, or a number without the zeros and commas that say nothing."""
    return word.casefold() if word[0].isalpha() else in_latex(Fraction(word.replace(",", "")))


def _is_no_name(word: str) -> bool:
    """Return True for a month, a unit of measurement and a word of a calculation."""
    unit, lower = read_unit(word), word.lower()
    return bool(_month(lower) or lower in OPERATIONS or (unit and unit.dimensions))


def read_ratio(text: str) -> tuple[str, ...]:
    """Return a ratio of three numbers or more in lowest terms; empty for another answer."""
    if not re.fullmatch(r"\d+(?:\s*:\s*\d+){2,}", text, re.ASCII):
        return ()
    terms = [int(term) for term in re.findall(r"\d+", text)]
    common = math.gcd(*terms) or 1
    return ("ratio", *(str(term // common) for term in terms))


def in_latex(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    return rf"\frac{{{number.numerator}}}{{{number.denominator}}}"
