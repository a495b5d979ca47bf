r"""Vectors in any notation as their coordinates: `3\hat{i} - \mathbf{k}`, columns,
`\langle 3, 0, -1 \rangle`, `(1,2,3) + t(4,5,6)`.
"""

import re
from dataclasses import dataclass

from lim_sglang.programs.grading.latex import MAX_READ

_STYLE = r"\\(?:hat|widehat|vec|overrightarrow|mathbf|boldsymbol|bm|textbf)(?![a-zA-Z])"
_UNITS = {"i": "\ue011", "j": "\ue012", "k": "\ue013"}
"""Characters that stand for the unit vectors."""
_ANY_UNIT = "".join(_UNITS.values())
_STYLED = re.compile(
    rf"{_STYLE}\s*(?:\{{\s*(?:\\?([ijk])(?:math)?|([{_ANY_UNIT}]))\s*\}}"
    rf"|\\?([ijk])(?:math)?(?![a-zA-Z])|([{_ANY_UNIT}]))"
)
_BARE = re.compile(r"(?<![a-zA-Z\\])([ijk])(?![a-zA-Z])")
_HATS = (("î", _UNITS["i"]), ("ĵ", _UNITS["j"]), ("k\u0302", _UNITS["k"]))
_VECTOR_NAME = (
    rf"{_STYLE}\s*(?:\{{\s*(?:{_STYLE}\s*)?\{{?\s*[a-zA-Z]{{1,2}}\s*\}}?\s*\}}"
    r"|[a-zA-Z](?![a-zA-Z]))"
)
_NAME = re.compile(
    rf"\s*(?:{_VECTOR_NAME}|\\nabla\s*[a-zA-Z])(?:_\{{?\w\}}?)?'{{0,2}}\s*"
    r"(?:\([a-zA-Z\d, ]{1,20}\))?\s*="
)
r"""The name of a vector, as `\mathbf{r}(t) =`."""
_COLUMN = re.compile(
    r"(?:\\left\s*[(\[]\s*)?\\begin\{([pb]?matrix|array)\}(?:\{[lcr]\})?((?:(?!\\begin|\\end|&).)+)"
    r"\\end\{\1\}(?:\s*\\right\s*[)\]])?",
    re.DOTALL,
)
_TRANSPOSED = re.compile(
    r"\s*[(\[]([^()\[\]]*,[^()\[\]]*)[)\]]\s*\^\s*\{?\s*(?:\\(?:text|mathrm|mathsf)\s*)?"
    r"\{?(?:T|\\top|\\intercal)\}?\s*\}?\s*"
)
"""A row that stands for a column: `(1,2)^T`."""
_ROW_END = re.compile(r"\\\\(?:\s*\[[^\[\]]*\])?|\\cr(?![a-zA-Z])")
_SPACE = re.compile(r"\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])")
_UNIT_BEHIND = re.compile(r"\s*(\\(?:text|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?)\s*\Z")
_OPENING = {")": "(", "⟩": "⟨", "⟧": "⟦"}
_TIMES = re.compile(r"\s*(?:\\cdot|\\times|\*)\s*\Z")
_NO_FACTOR = re.compile(
    r"[=<>,;|&]|\\(?:text|in|le|ge|ne|cup|cap|times|to)(?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{4,}"
    r"|(?:gcd|lcm|max|min|det|Pr)\Z"
)


@dataclass(frozen=True)
class _Vector:
    coordinates: tuple[str, ...]
    notation: str
    """`tuple` and `column` for these alone, `units` for a sum of unit vectors, else `sum`."""
    name: str = ""
    behind: str = ""
    """The unit of measurement."""

    def padded(self, length: int) -> tuple[str, ...] | None:
        """Return as many coordinates; None if there are fewer or more of them."""
        if self.notation == "units" and len(self.coordinates) == 2 and length == 3:
            return (*self.coordinates, "0")
        return self.coordinates if len(self.coordinates) == length else None


def as_coordinates(a: str, b: str) -> tuple[str, str]:
    """Return two vectors that are written in different ways as tuples; other answers as they are.

    Without a `k`, `3i + 4j` has two coordinates, or three beside a vector of three. Letters without
    a style are unit vectors beside styled ones only.
    """
    if max(len(a), len(b)) > MAX_READ:
        return a, b
    first, second = _read(a), _read(b)
    if first and first.notation == "units" and second is None:
        second = _read(b, bare=True)
    elif second and second.notation == "units" and first is None:
        first = _read(a, bare=True)
    if (
        first is None
        or second is None
        or (first.name and second.name and first.name != second.name)
    ):
        return a, b
    if first.notation == second.notation and first.notation in ("tuple", "column"):
        return a, b
    length = max(len(first.coordinates), len(second.coordinates))
    left, right = first.padded(length), second.padded(length)
    if left is None or right is None:
        return a, b
    return f"({','.join(left)}){first.behind}", f"({','.join(right)}){second.behind}"


def _read(answer: str, *, bare: bool = False) -> _Vector | None:
    """Read a vector; None for any other answer.

    Args:
        bare: letters without a style are unit vectors.
    """
    name = _NAME.match(answer)
    text = _COLUMN.sub(_bracketed_column, answer[name.end() :] if name else answer)
    text = _SPACE.sub(" ", text)
    if transposed := _TRANSPOSED.fullmatch(text):
        text = f"({transposed[1]})"
    for hat, unit in _HATS:
        text = text.replace(hat, unit)
    for _ in range(3):
        text = _STYLED.sub(_unit_of, text)
    if bare:
        text = _BARE.sub(lambda letter: _UNITS[letter[1]], text)
    has_units = any(unit in text for unit in _ANY_UNIT)
    if not has_units and not re.search(r"[)⟧]|\\rangle", text):
        return None
    behind = ""
    if (measured := _UNIT_BEHIND.search(text)) and measured.start():
        text, behind = text[: measured.start()], measured[1]
    text = text.replace(r"\langle", "⟨").replace(r"\rangle", "⟩")
    total = _sum(text.strip())
    if total is None:
        return None
    coordinates, notation = total
    if (name or transposed) and notation in ("tuple", "column"):
        notation = "sum"
    return _Vector(
        coordinates,
        notation,
        name=re.sub(r"[\s{}]", "", name[0]) if name else "",
        behind=behind,
    )


def _bracketed_column(column: re.Match[str]) -> str:
    """Return the rows of a column with commas between them, in brackets of its own."""
    rows = _ROW_END.split(column[2].strip())
    return f"⟦{','.join(rows if rows[-1].strip() else rows[:-1])}⟧"


def _unit_of(found: re.Match[str]) -> str:
    letter = found[1] or found[3]
    return _UNITS[letter] if letter else (found[2] or found[4])


def _sum(text: str) -> tuple[tuple[str, ...], str] | None:
    """Return the coordinates of a sum of vectors, and its notation; None for any other text."""
    terms = _split(text, "+-")
    if terms is None or not any(term for _, term in terms):
        return None
    parts = [(sign, *(_term(term) or ("", (), ""))) for sign, term in terms if term or sign]
    notations = {notation for *_, notation in parts}
    if "" in notations or (len(notations) > 1 and "units" in notations):
        return None
    length = max(len(vector) for _, _, vector, _ in parts)
    if notations == {"units"}:
        # Two coordinates, unless one term needs a third.
        parts = [
            (sign, factor, (*vector, *["0"] * (length - len(vector))), notation)
            for sign, factor, vector, notation in parts
        ]
    if any(len(vector) != length for _, _, vector, _ in parts) or length < 2:
        return None
    (sign, factor, vector, notation), *others = parts
    if not (others or sign or factor):
        return vector, notation
    if not others and notation == "tuple" and factor[-1:].isalpha():
        return None  # a point P(1, 2), or a function of two numbers
    columns = zip(*(_scaled(*part[:3]) for part in parts), strict=True)
    coordinates = tuple(
        "".join(filter(None, column)).removeprefix("+") or "0" for column in columns
    )
    return coordinates, "units" if notations == {"units"} else "sum"


def _scaled(sign: str, factor: str, vector: tuple[str, ...]) -> list[str]:
    """Return the coordinates of a term with their signs; empty for a zero."""
    scaled = []
    for part in vector:
        product = part if not factor else factor if part == "1" else rf"({factor}) \cdot ({part})"
        is_sum = re.search(r"[-+]", product)
        scaled.append(
            "" if part == "0" else (sign or "+") + (f"({product})" if is_sum else product)
        )
    return scaled


def _term(term: str) -> tuple[str, tuple[str, ...], str] | None:
    """Return factor, coordinates and notation of a vector with a factor before it."""
    for number, unit in enumerate(_ANY_UNIT):
        if term.endswith(unit):
            factor = _factor(term[:-1])
            if factor is None or re.search(f"[{_ANY_UNIT}]", factor):
                return None
            length = 3 if number == 2 else 2
            return factor, tuple("1" if n == number else "0" for n in range(length)), "units"
    if fraction := re.fullmatch(
        r"\\[dt]?frac\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", term
    ):
        inner = _sum(fraction[1].strip())
        return (rf"\frac{{1}}{{{fraction[2]}}}", *inner) if inner else None
    return _bracketed(term)


def _bracketed(term: str) -> tuple[str, tuple[str, ...], str] | None:
    r"""Return the same of `t(4,5,6)`, `t \langle 4,5,6 \rangle`, a column and a sum in brackets."""
    begin = _opening(term)
    if begin is None:
        return None
    factor, content = _factor(term[:begin]), term[begin + 1 : -1]
    if factor is None:
        return None
    parts = _split(content, ",")
    if parts and len(parts) > 1:
        vector = tuple(part.strip() for _, part in parts)
        is_known = all(vector) and not re.search(f"[{_ANY_UNIT}]", content)
        return (factor, vector, "column" if term[-1] == "⟧" else "tuple") if is_known else None
    inner = _sum(content.strip()) if term[-1] == ")" else None
    return (factor, *inner) if inner else None


def _opening(term: str) -> int | None:
    """Return the place of the bracket that the last character closes; None without such a pair."""
    opening = _OPENING.get(term[-1:])
    depth = 0
    for place in range(len(term) - 1, -1, -1) if opening else ():
        depth += (term[place] == term[-1]) - (term[place] == opening)
        if depth == 0:
            return place
    return None


def _factor(text: str) -> str | None:
    """Return a factor before a vector, without a sign of multiplication; None for the name of a
    function, a relation and words.
    """
    factor = _TIMES.sub("", text).strip()
    return None if _NO_FACTOR.search(factor) else factor


def _split(text: str, signs: str) -> list[tuple[str, str]] | None:
    """Return the parts between signs outside of all brackets, each with the sign before it; None
    where brackets are not paired.
    """
    parts, sign, begin, open_ones = [], "", 0, []
    for place, character in enumerate(text):
        if character in "([{⟨⟦":
            open_ones.append(character)
        elif character in ")]}⟩⟧":
            if not open_ones:
                return None
            open_ones.pop()
        elif character in signs and not (
            open_ones or text[begin:place].rstrip().endswith(("^", "_"))
        ):
            parts.append((sign, text[begin:place].strip()))
            sign, begin = character, place + 1
    parts.append((sign, text[begin:].strip()))
    return None if open_ones else parts
