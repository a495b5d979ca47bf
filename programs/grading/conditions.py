r"""Conditions behind a formula: `k \in \mathbb{Z}`, `x \neq 2`, `where C is a constant`.

A condition on one side alone is dropped where it is harmless; conditions on both sides have to
agree.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from lim_sglang.programs.grading.latex import FUNCTION, MAX_READ, TEXT_COMMAND

_INTEGERS, _NATURALS, _ANY = "integer", "natural", "any"
_SPACE = re.compile(r"\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\\(?:left|right)(?![a-zA-Z])|\s+")
_DOTS = r"(?:\\[lc]?dots|…|\.{2,})[\s.]*"
_SIGNS = [
    (re.compile(pattern), sign)
    for pattern, sign in (
        (r"\\(?:neq?(?![a-zA-Z])|not\s*=)", "≠"),
        (r"\\(?:le|leq|leqslant)(?![a-zA-Z])", "≤"),
        (r"\\(?:ge|geq|geqslant)(?![a-zA-Z])", "≥"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\in(?![a-zA-Z])", "∈"),
        (r"\\forall(?![a-zA-Z])", " for "),
        (r"\\(?:mathbb|mathbf|Bbb)\s*(?:\{\s*([ZNR])\s*\}|([ZNR]))", r"\\\1\2 "),
        (r"(?<=∈)\s*\\?Z\s*[\^_]\s*\{?\+\}?|(?<=∈)\s*(?:\\?N\b\s*(?:\^\s*\{?[*+]?\}?)?|ℕ)", "ℕ"),
        (r"(?<=∈)\s*\\?Z(?![a-zA-Z\d_^])", "ℤ"),
        (r"(?<=∈)\s*\\?R(?![a-zA-Z\d_^])", "ℝ"),
        (
            r"(?<![\\a-zA-Z])([a-zA-Z])\s*=\s*0\s*,\s*\\pm\s*1\s*,\s*\\pm\s*2[\s,.…]*"
            r"(?:\\pm\s*3[\s,.…]*)?(?:\\[lc]?dots[\s.]*)?$",
            r"\1∈ℤ",
        ),
        (rf"(?<![\\a-zA-Z])([a-zA-Z])\s*=\s*1\s*,\s*2\s*,[\s\d,]*{_DOTS}$", r"\1∈ℕ"),
        (rf"(?<![\\a-zA-Z])([a-zA-Z])\s*=\s*0\s*,\s*1\s*,[\s\d,]*{_DOTS}$", r"\1≥0"),
        (r"\s*(?:\\mid(?![a-zA-Z])|\|)(?=\s*[a-zA-Z]\s*∈\s*ℤ\s*$)", ","),
    )
]
_LETTER = r"(?:[a-zA-Z](?:_(?:\w|\{\w+\}))?|\\(?:alpha|beta|gamma|theta|phi|lambda|mu)(?![a-zA-Z]))"
_JOINT = r"\s*(?:,\s*and\b|,|\band\b)\s*"
_LISTED = re.compile(
    rf"((?:[,;(]|\b(?:where|for|with|constants|any|all))\s*)({_LETTER}(?:{_JOINT}{_LETTER}){{1,4}})"
    rf"(?=\s*(?:∈|(?:are|constants|integers)\b|[<>]\s*0\b))"
    rf"|(\b(?:constants|integers|numbers)\s+)({_LETTER}(?:{_JOINT}{_LETTER}){{1,4}})(?=[\s.)]*$)"
)
"""Names that share a condition: `C_1 and C_2 are`."""
_EXCLUDED = re.compile(r"(≠\s*[^,;<>=∈≠a-zA-Z]+),(?=\s*[^,;<>=∈≠a-zA-Z]+(?:[,)]|$))")
"""The first of several values that a name does not have: `x ≠ -3, 2`."""
_SEPARATOR = re.compile(
    r"[,;]?\s*\b(?:where|for|with|when|if|provided(?: that)?|given that)\b|[,;]|\b(?:and|or)\b"
)
_IN_BRACKETS = re.compile(r"(.*[^\s,;])\s*[,;]?\s*\(([^()]*)\)")
_QUANTIFIER = re.compile(
    r"(?:(?:for|where|with|domain:?|all|any|every|each|some|an?|the)\s+)+", re.IGNORECASE
)
_KIND = (
    r"(?:(?:arbitrary|any|some|real|fixed|non-?zero)\s+)*"
    r"(?P<sort>positive |natural |non-?negative |whole |even |odd |negative )?"
    r"(?P<kind>integers?|constants?(?: of integration)?|numbers?|reals?|real(?=\s)|parameters?)"
)
_NAMES = rf"(?P<names>{_LETTER}(?:&{_LETTER})*)"
_MEMBER = re.compile(rf"{_NAMES}\s*∈\s*(?P<set>[ℤℕℝ])")
_IS = re.compile(
    rf"{_NAMES}\s*(?:(?:is|are|be|denotes?)\s+)?(?:(?:an?|the)\s+)?{_KIND}", re.IGNORECASE
)
_OF = re.compile(rf"{_KIND}\s+{_NAMES}", re.IGNORECASE)
_OF_RELATION = re.compile(r"(?:positive |natural )?(?:integers?|numbers?)\s+(.*)", re.IGNORECASE)
_RELATION = re.compile(r"[^=≠<>≤≥∈]+(?:[≠<>≤≥][^=≠<>≤≥∈]+){1,2}")
_INTEGER_LETTERS = frozenset("ijklmn")
_MULTIPLE = re.compile(r"\\pi|π|°|\\circ")
_RELATION_SIGN = re.compile(r"[≠<>≤≥∈]")
_NOT_EQUAL = re.compile(r"([a-zA-Z])≠([^a-zA-Z≠<>=≤≥]*(?:\\pm[^a-zA-Z≠<>=≤≥]*)*)")
"""A name and the numbers that it does not have."""
_POSITIVE = re.compile(r"([i-n])(?:≥1|>0)")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_SET = re.compile(
    r"(?:[a-zA-Z]\s*[=∈]\s*)?\\\{(?:\s*[a-zA-Z]\s*(?:\\mid|\||:)\s*(?=[a-zA-Z]\s*=))?"
    r"([^|:]+?)\s*(?:\\mid|\||:|,)\s*([^|:]+)\\\}"
)
"""A set of values of a formula: `\\{n\\pi \\mid n ∈ ℤ\\}`."""


@dataclass(frozen=True)
class _Conditioned:
    """A formula and its conditions."""

    formula: str
    kinds: frozenset[tuple[str, str]] = frozenset()
    """Names of integers and natural numbers, with their kind."""
    free: frozenset[str] = frozenset()
    """Names of any numbers."""
    relations: tuple[str, ...] = ()
    """Inequalities, without spaces, sorted."""

    @property
    def has_any(self) -> bool:
        return bool(self.kinds or self.relations)


def without_conditions(a: str, b: str) -> list[tuple[str, str]]:
    """Return the pairs of values that have to be equal where two answers are: the answers, or their
    formulas and conditions; none if their conditions differ.
    """
    first, second = _read(a), _read(b)
    if not (first or second):
        return [(a, b)]
    left, right = first or _Conditioned(a), second or _Conditioned(b)
    if any(
        name in other.free for one, other in ((left, right), (right, left)) for name, _ in one.kinds
    ):
        return []
    left, right = _with_one_letter(left, right)
    if left.has_any != right.has_any:
        one = left if left.has_any else right
        return [(left.formula, right.formula) if _is_harmless(one) else (a, b)]
    if left.kinds != right.kinds or len(left.relations) != len(right.relations):
        return []
    return [(left.formula, right.formula), *zip(left.relations, right.relations, strict=True)]


def _is_harmless(answer: _Conditioned) -> bool:
    """Return True if conditions say no more than for which values of its names a formula holds.

    A multiple of pi is a general solution, whose integers are all of them. An arbitrary constant,
    a capital letter or c beside other names, is no integer, and of either sign.
    """
    letters = _letters(answer.formula)
    constants = {name for name in letters if name[0].isupper() or name[0] == "c"}
    if len(letters) == 1:
        constants = set()
    integers = {name for name, _ in answer.kinds} or letters & _INTEGER_LETTERS
    is_general = bool(_MULTIPLE.search(answer.formula) and letters & integers)
    for name, kind in answer.kinds:
        if name not in letters - constants or kind not in (_INTEGERS, _NATURALS):
            return False
        if is_general and kind != _INTEGERS:
            return False
        if kind == _INTEGERS and answer.relations:
            return False
    if is_general and answer.relations:
        return False
    for relation in answer.relations:
        names = _letters(relation)
        if not names or not names <= letters or ("≠" not in relation and names & constants):
            return False
    return not (answer.relations and _SEPARATOR.search(_outermost(answer.formula)))


def _with_one_letter(a: _Conditioned, b: _Conditioned) -> tuple[_Conditioned, _Conditioned]:
    """Return two answers with one name for their integer, if it is the only name of both; beside a
    multiple of pi, a name of integers needs no condition.
    """
    integers, taken = [], ""
    for one in (a, b):
        names = {name for name, _ in one.kinds}
        if not one.has_any and not one.free and _MULTIPLE.search(one.formula):
            names = _letters(one.formula) & _INTEGER_LETTERS
        if len(names) != 1 or names != _letters(one.formula) or one.relations:
            return a, b
        integers.append(re.compile(rf"(?<![a-zA-Z\\]){re.escape(*names)}(?![a-zA-Z])"))
        taken += integers[-1].sub("", one.formula)
    new = next((name for name in "nkjlqt" if name not in taken), None)  # no m, which is metres
    if new is None:
        return a, b
    first, second = (
        _Conditioned(integer.sub(new, one.formula), frozenset((new, kind) for _, kind in one.kinds))
        for one, integer in zip((a, b), integers, strict=True)
    )
    return first, second


def _letters(formula: str) -> set[str]:
    """Return the names on the right sides of equations, or in any other formula."""
    sides = [part.rpartition("=")[2] for part in _SEPARATOR.split(formula)]
    names = re.findall(rf"\\[a-zA-Z]+|{_LETTER}", " ".join(sides))
    return {name for name in names if name[0] != "\\" or re.fullmatch(_LETTER, name)}


@lru_cache(maxsize=4096)
def _read(answer: str) -> _Conditioned | None:
    """Return formula and conditions of an answer; None for an answer without any."""
    if len(answer) > MAX_READ:
        return None
    text = " ".join(_SPACE.sub(" ", TEXT_COMMAND.sub(r" \1 ", answer)).split())
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    text = _LISTED.sub(_joined, text)
    for _ in range(3):
        text = _EXCLUDED.sub(r"\1&", text)
    if bracketed := _IN_BRACKETS.fullmatch(text.rstrip(" .")):
        text = f"{bracketed[1]}, {bracketed[2]}" if _condition(bracketed[2]) else text
    elif (members := _SET.fullmatch(text)) and _MEMBER.fullmatch(members[2].strip()):
        text = f"{members[1]}, {members[2]}"
    outer, end = _outermost(text), len(text)
    kinds: set[tuple[str, str]] = set()
    relations: list[str] = []
    for separator in reversed(list(_SEPARATOR.finditer(outer))):
        found = _condition(text[separator.end() : end].strip(" ."))
        if found is None or separator[0] == "or":
            break
        if separator[0].endswith("if") and not all("≠" in relation for relation in found[1]):
            break  # one case of several
        end = separator.start()
        kinds |= found[0]
        relations += found[1]
    formula = text[:end].strip(" ,;")
    if end == len(text) or not formula or _RELATION_SIGN.search(formula):
        return None
    if not all(FUNCTION.fullmatch(word) for word in _WORD.findall(formula)):
        return None
    positive = {name[1] for each in relations if (name := _POSITIVE.fullmatch(each))}
    if positive and len(relations) == len(positive):
        relations, kinds = [], kinds | {(name, _NATURALS) for name in positive}
        kinds -= {(name, _INTEGERS) for name in positive}
    free = frozenset(name for name, kind in kinds if kind == _ANY)
    kept = frozenset(each for each in kinds if each[1] != _ANY)
    return _Conditioned(formula, kept, free, tuple(sorted(relations)))


def _joined(listed: re.Match[str]) -> str:
    """Return names with one sign between them, which is no separator of conditions."""
    before, names = (listed[1], listed[2]) if listed[2] else (listed[3], listed[4])
    return before + re.sub(_JOINT, "&", names)


def _outermost(text: str) -> str:
    """Return a text with spaces for all that stands in brackets."""
    depth, kept = 0, []
    for character in text:
        depth -= character in ")]}"
        kept.append(" " if depth > 0 else character)
        depth += character in "([{"
    return "".join(kept)


def _condition(text: str) -> tuple[set[tuple[str, str]], list[str]] | None:
    """Return the names of which a condition speaks with their kinds, and inequalities; None for
    any other text.
    """
    text = text.strip()
    if quantifier := _QUANTIFIER.match(text):
        text = text[quantifier.end() :]
    if member := _MEMBER.fullmatch(text):
        kind = {"ℤ": _INTEGERS, "ℕ": _NATURALS}.get(member["set"], _ANY)
        return {(name, kind) for name in member["names"].split("&")}, []
    if named := _IS.fullmatch(text) or _OF.fullmatch(text):
        return {(name, _kind(named)) for name in named["names"].split("&")}, []
    if related := _OF_RELATION.fullmatch(text):
        text = related[1]
    bare = re.sub(r"\s+", "", text)
    if excluded := _NOT_EQUAL.fullmatch(bare):
        values = (value for part in excluded[2].split("&") for value in _with_both_signs(part))
        return set(), [f"{excluded[1]}≠{value}" for value in values]
    if not _RELATION.fullmatch(bare) or _WORD.search(text) or not _letters(text):
        return None
    return set(), [bare.replace("&", ",")]


def _with_both_signs(value: str) -> list[str]:
    number = value.removeprefix(r"\pm").strip()
    return [value] if number == value else [number, f"-{number}"]


def _kind(found: re.Match[str]) -> str:
    """Return the kind of number that words name."""
    sort, noun = (found["sort"] or "").strip().lower(), found["kind"].lower()
    if sort in ("positive", "natural"):
        return _NATURALS if noun.startswith(("integer", "number")) else sort
    return sort or (_INTEGERS if noun.startswith("integer") else _ANY)
