"""Units of measurement and counted things: what follows the number of an answer."""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import prod

Dimensions = tuple[tuple[str, int], ...]
"""Base quantities with their powers, sorted: `(("length", 1), ("time", -1))` for a speed."""


@dataclass(frozen=True)
class Unit:
    """A unit of measurement, or a noun that is counted."""

    dimensions: Dimensions = ()
    factor: Fraction = Fraction(1)
    """Number of base units in one of this unit."""
    pi: int = 0
    """Power of pi in the factor, for degrees."""
    words: frozenset[str] = frozenset()
    """Words of a counted thing in the singular; empty for a unit of measurement."""

    def agrees(self, other: "Unit") -> bool:
        """Return True if values in the two units can be equal.

        Counted things agree where one adds adjectives to the other: `ways`, `different ways`.
        """
        if self.words or other.words:
            both = (self.words, other.words)
            return all(both) and (self.words <= other.words or self.words >= other.words)
        return self.dimensions == other.dimensions


_LENGTH, _MASS, _TIME = (("length", 1),), (("mass", 1),), (("time", 1),)
_MONEY: Dimensions = (("dollar", 1),)
_INCH, _POUND, _GALLON = Fraction("0.0254"), Fraction("0.45359237"), Fraction("0.003785411784")
_ENERGY = (("length", 2), ("mass", 1), ("time", -2))

_MEASURES: dict[str, tuple[Fraction | int, Dimensions]] = {
    "inch inches in": (_INCH, _LENGTH),
    "foot feet ft": (12 * _INCH, _LENGTH),
    "yard yd": (36 * _INCH, _LENGTH),
    "mile mi": (63360 * _INCH, _LENGTH),
    "hectare ha": (10_000, (("length", 2),)),
    "acre": (Fraction("4046.8564224"), (("length", 2),)),
    "gallon gal": (_GALLON, (("length", 3),)),
    "quart qt": (_GALLON / 4, (("length", 3),)),
    "pint pt": (_GALLON / 8, (("length", 3),)),
    "cc": (Fraction(1, 10**6), (("length", 3),)),
    "tonne ton": (1000, _MASS),
    "pound lb lbs £": (_POUND, _MASS),
    "ounce oz": (_POUND / 16, _MASS),
    "minute min mins": (60, _TIME),
    "hour h hr hrs": (3600, _TIME),
    "day": (86_400, _TIME),
    "week wk": (604_800, _TIME),
    "month": (1, (("month", 1),)),
    "year yr yrs": (12, (("month", 1),)),
    "decade": (120, (("month", 1),)),
    "century centuries": (1200, (("month", 1),)),
    "kWh": (3_600_000, _ENERGY),
    "mph": (Fraction(63360, 3600) * _INCH, (("length", 1), ("time", -1))),
    "kph kmh kmph": (Fraction(1000, 3600), (("length", 1), ("time", -1))),
    "M molar": (1000, (("length", -3), ("mole", 1))),
    "unit": (1, (("unit", 1),)),
    "radian rad": (1, (("angle", 1),)),
    "dollar $ usd buck": (1, _MONEY),
    "cent ¢ penny pennies": (Fraction(1, 100), _MONEY),
    "euro € eur": (1, (("euro", 1),)),
    "yen ¥ 円 jpy JPY": (1, (("yen", 1),)),
    "rupee ₹ rs Rs inr": (1, (("rupee", 1),)),
    "won ₩ krw": (1, (("won", 1),)),
    "rouble ruble ₽ rub": (1, (("rouble", 1),)),
    "yuan 元 rmb cny": (1, (("yuan", 1),)),
    "krone kr": (1, (("krone", 1),)),
    "celsius centigrade °C": (1, (("celsius", 1),)),
    "fahrenheit °F": (1, (("fahrenheit", 1),)),
}
_METRIC: dict[str, tuple[Fraction | int, Dimensions]] = {
    "m meter metre": (1, _LENGTH),
    "g gram gramme": (Fraction(1, 1000), _MASS),
    "s sec second secs": (1, _TIME),
    "L l liter litre": (Fraction(1, 1000), (("length", 3),)),
    "N newton": (1, (("length", 1), ("mass", 1), ("time", -2))),
    "J joule": (1, _ENERGY),
    "W watt": (1, (("length", 2), ("mass", 1), ("time", -3))),
    "Pa pascal": (1, (("length", -1), ("mass", 1), ("time", -2))),
    "Hz hertz": (1, (("time", -1),)),
    "eV electronvolt": (Fraction("1.602176634e-19"), _ENERGY),
    "A ampere amp": (1, (("ampere", 1),)),
    "C coulomb": (1, (("ampere", 1), ("time", 1))),
    "V volt": (1, (("ampere", -1), ("length", 2), ("mass", 1), ("time", -3))),
    "Ω ohm": (1, (("ampere", -2), ("length", 2), ("mass", 1), ("time", -3))),
    "T tesla": (1, (("ampere", -1), ("mass", 1), ("time", -2))),
    "K kelvin": (1, (("kelvin", 1),)),
    "mol mole": (1, (("mole", 1),)),
}
"""Units that take prefixes."""
_PREFIXES = {
    "n nano": -9,
    "u µ micro": -6,
    "m milli": -3,
    "c centi": -2,
    "d deci": -1,
    "k kilo": 3,
    "M mega": 6,
    "G giga": 9,
}
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "tens": 10,
    "score": 20,
    "lakh": 10**5,
    "crore": 10**7,
    "bn": 10**9,
}
"""Numbers that stand behind another one as words."""
_ORDINAL_FRACTIONS = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "eleventh": 11,
    "twelfth": 12,
    "twentieth": 20,
    "hundredth": 100,
    "thousandth": 1000,
    "millionth": 10**6,
    "billionth": 10**9,
}
_FRACTIONS = {f"{name}s": Fraction(1, n) for name, n in _ORDINAL_FRACTIONS.items()} | {
    "halves": Fraction(1, 2)
}
_NUMBERS_IN_WORDS_TEXT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
NUMBERS_IN_WORDS = _NUMBERS_IN_WORDS_TEXT.split()
TENS_IN_WORDS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_IN_WORDS = (
    rf"\b(?:(?:{'|'.join(TENS_IN_WORDS)})(?:[ -](?:{'|'.join(NUMBERS_IN_WORDS[1:10])}))?"
    rf"|{'|'.join(NUMBERS_IN_WORDS)})\b"
)
"""A number below a hundred in words."""
_VALUE_WORDS_TEXT = (
    "squared cubed factorial doubled tripled quadrupled halved negative plus minus over out "
    "divided multiplied power root inverse reciprocal below beneath under less is isn't are was "
    "not no never cannot wrong incorrect false too mil x y z n k"
)
_VALUE_WORDS = frozenset(
    [*_VALUE_WORDS_TEXT.split(), *_SCALES, *_FRACTIONS, *NUMBERS_IN_WORDS, *TENS_IN_WORDS]
)
"""Words that change or deny the number before them, so that they name no counted thing."""
_MULTIPLIED = frozenset(("the", "as", "this", "that", "its", "his", "her", "their", "what"))
"""Words behind "times" that name another value: `3 times the first`, unlike `3 times a day`."""


def _known_units() -> dict[str, Unit]:
    known: dict[str, Unit] = {}
    for names, (factor, dimensions) in (_METRIC | _MEASURES).items():
        known |= dict.fromkeys(names.split(), Unit(dimensions, Fraction(factor)))
    for prefixes, power in _PREFIXES.items():
        *shorts, long = prefixes.split()
        for names, (factor, dimensions) in _METRIC.items():
            unit = Unit(dimensions, factor * Fraction(10) ** power)
            symbol, *words = names.split()
            symbols = [symbol, *(word for word in words if len(word) == 1)]
            for name in (short + each for short in shorts for each in symbols):
                known.setdefault(name, unit)
            for word in words:
                known.setdefault(long + word, unit)
    for name in ("degree", "deg", "°", "º"):
        known[name] = Unit((("angle", 1),), Fraction(1, 180), pi=1)
    for name in ("revolution", "rev", "turn"):
        known[name] = Unit((("angle", 1),), Fraction(2), pi=1)
    return known


def _without_case(known: dict[str, Unit]) -> dict[str, Unit]:
    """Return the units by their names in lower case, less those that differ by case, as mg, Mg."""
    folded: dict[str, set[Unit]] = {}
    for name, unit in known.items():
        folded.setdefault(name.lower(), set()).add(unit)
    return {
        name: next(iter(units))
        for name, units in folded.items()
        if len(units) == 1 and len(name) > 1
    }


_UNITS = _known_units()
_UNITS_WITHOUT_CASE = _without_case(_UNITS)
UNIT_LETTERS = "mgs"
"""Letters that are a unit directly behind a number; any other letter is a variable."""
SPACED_UNIT_LETTERS = "mgshLJNWVAK"
"""Letters that are a unit behind a number and a space."""
_IRREGULAR = {
    "buses": "bus",
    "gas": "gas",
    "gases": "gas",
    "quizzes": "quiz",
    "lens": "lens",
    "lenses": "lens",
    "children": "child",
    "people": "person",
    "men": "man",
    "women": "woman",
    "mice": "mouse",
    "geese": "goose",
    "teeth": "tooth",
    "dice": "die",
    "knives": "knife",
    "leaves": "leaf",
    "loaves": "loaf",
    "halves": "half",
    "shelves": "shelf",
    "vertices": "vertex",
    "indices": "index",
    "matrices": "matrix",
}
_FILLERS_TEXT = (
    "a an the of in total old each altogether exactly only about more left long high tall wide "
    "deep away apart unit units square squared cubic cubed sq cu"
)
_FILLERS = frozenset(_FILLERS_TEXT.split())
"""Words that say nothing about what is counted."""
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_LATER_POWERS = {"squared": 2, "cubed": 3}
_TOKEN = re.compile(
    r"\^\s*\{?\s*([-+]?\d)\s*\}?|([A-Za-zΩµ°º$£¥¢฿元円\u20a0-\u20cf]+(?:[-'’][A-Za-z]+)*)|(/)|[\s.,()]"
)

_IN_TOTAL = re.compile(r"\bin (?:total|all|length|width|height|area|volume)\b")


def is_unit(name: str) -> bool:
    """Return True for the name or symbol of a unit of measurement."""
    return _known(name) is not None


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """Read the words and symbols behind a number, as `km/h`, `square metres` or `red apples`.

    Returns:
        None if the text is no unit, as it holds digits, signs or no word at all; an empty unit
        where the words say nothing, as `units` or `in total`.
    """
    tokens = _tokens(_IN_TOTAL.sub("total", text))
    if tokens is None or not any(word for _, word, _ in tokens):
        return None
    unit = _measure(tokens)
    if unit is not None and "unit" not in dict(unit.dimensions):
        return unit
    return _counted([word.lower() for _, word, _ in tokens if word])


def read_power_of_unit(text: str) -> Unit:
    """Read `square units` and `cubic units`, which differ; an empty unit for other words."""
    unit = _measure(_tokens(_IN_TOTAL.sub("total", text)) or [])
    return unit if unit and unit.dimensions in ((("unit", 2),), (("unit", 3),)) else Unit()


def _tokens(text: str) -> list[tuple[str, str, str]] | None:
    """Return the powers, words and slashes of a unit; None if there is anything else."""
    found, end = [], 0
    for token in _TOKEN.finditer(text):
        if token.start() != end:
            return None
        end = token.end()
        if any(token.groups()):
            found.append((token[1] or "", token[2] or "", token[3] or ""))
    return found if end == len(text) else None


def _measure(tokens: list[tuple[str, str, str]]) -> Unit | None:
    """Return the product of known units; None if a word is unknown."""
    factors: list[tuple[Unit, int]] = []
    sign = power = 1
    for exponent, symbol, slash in tokens:
        word = symbol if symbol == "A" else symbol.lower()  # ampere, no article
        if slash or (word in ("per", "a", "an") and factors):
            sign = -1
        elif exponent or word in _LATER_POWERS:
            if not factors:
                return None
            factors[-1] = factors[-1][0], sign * (int(exponent or 0) or _LATER_POWERS.get(word, 0))
        elif word in _POWERS:
            power = _POWERS[word]
        elif word == "of" and factors:
            break
        elif factors and word in _FILLERS and word != "in":
            continue
        elif (unit := _known(symbol)) is not None:
            factors.append((unit, sign * power))
            power = 1
        else:
            return None
        is_whole = not slash and word not in ("per", "a", "an")
    return _multiply(factors) if factors and is_whole else None


def _multiply(factors: list[tuple[Unit, int]]) -> Unit:
    """Return the product of units with their powers."""
    dimensions: Counter[str] = Counter()
    for unit, power in factors:
        for base, exponent in unit.dimensions:
            dimensions[base] += exponent * power
    return Unit(
        tuple(sorted((base, power) for base, power in dimensions.items() if power)),
        prod((unit.factor**power for unit, power in factors), start=Fraction(1)),
        sum(unit.pi * power for unit, power in factors),
    )


def _counted(words: list[str]) -> Unit | None:
    """Return the counted thing that words name; None if a word changes the number."""
    if not _VALUE_WORDS.isdisjoint(words) or words[-1] in _ORDINAL_FRACTIONS:
        return None
    if words[0] == "times" and not _MULTIPLIED.isdisjoint(words[1:2]):
        return None
    return Unit(words=frozenset(map(singular, words)) - _FILLERS)


def split_scale(words: str) -> tuple[Fraction | None, str]:
    """Return the number that the first of the words behind a number multiplies it by, as in
    `3 million dollars` and `3 quarters`, and the other words; no number for other words.
    """
    first, _, rest = words.partition(" ")
    name = first.lower()
    if not rest and name in _ORDINAL_FRACTIONS:
        name = f"{name}s"
    scale = _SCALES.get(name) or _SCALES.get(name.removesuffix("s")) or _FRACTIONS.get(name)
    return (None, words) if scale is None else (Fraction(scale), rest)


def _known(word: str) -> Unit | None:
    names = (word, word.lower(), singular(word.lower())) if len(word) > 2 else (word,)
    exact = next((_UNITS[name] for name in names if name in _UNITS), None)
    return exact or _UNITS_WITHOUT_CASE.get(word.lower())


def singular(noun: str) -> str:
    """Return the singular of a noun in lower case; a guess for all but the commonest plurals."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith("ies") and len(noun) > 4:
        return f"{noun[:-3]}y"
    if re.search(r"(?:ss|x|zz|tz|ch|sh)es$", noun):
        return noun[:-2]
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is")) and len(noun) > 2:
        return noun[:-1]
    return noun
