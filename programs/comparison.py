r"""Equality of two formulas by math-verify, mended where math-verify is too generous.

Runs in the workers of `equivalence.py`, since a pair may take seconds or gigabytes. math-verify
reads LaTeX into SymPy and compares sets, intervals, matrices and equations part by part. Five of
its functions are replaced here: its comparison of numbers ends in an absolute one, so that all tiny
numbers are equal; all equations without a solution are equal; sets and pairs are sorted; a name
alone is compared by its letters. Relations that are not solved are kept from it, since it would
solve them.
"""

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import math_verify.parser
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from latex2sympy2_extended.symbols import sympy_singleton_map
from math_verify import LatexExtractionConfig, grader, parse, verify
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.trigonometric import TrigonometricFunction
from sympy.logic.boolalg import BooleanAtom

from lim_sglang.programs import points
from lim_sglang.programs.grading.latex import MAX_READ
from lim_sglang.programs.grading.symbols import in_one_spelling, with_own_names
from lim_sglang.programs.grading.values import (
    SURE_DIGITS,
    decimal_digits,
    equal_numbers,
    percentages,
)

Formula = Any
"""SymPy's formulas and matrices, which have no common class."""
DIGITS = 60
"""Digits to which two numbers are computed that are not fractions."""
EQUAL_DIGITS = 45
"""Digits in which two such numbers must agree."""
LIMIT_S = 1.5
"""Seconds of computing in which a pair is decided; a pair that takes longer counts as different."""

_READING = [
    LatexExtractionConfig(
        # Units are split off before, by `values.py`: a number's last letters may be variables.
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True)
    )
]
_BUILDER = re.compile(
    r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid(?![a-z])|\||:)\s*"
    r"((?:(?!\\\}).)+?)\s*\\\}"
)
_EXCLUDED = re.compile(r"([a-zA-Z])\s*\\ne\s*([^,<>=]+(?:,[^,<>=\\]+)+)")
"""Numbers that a name does not have: `x \\ne 1, 2`."""
_ANY_REAL = re.compile(
    r"^\s*[a-zA-Z]\s*\\in\s*\\mathbb\{R\}\s*,|(?:,|\\text\{\s*and\s*\}|\\land)?\s*[a-zA-Z]\s*\\in\s*\\mathbb\{R\}$"
)
_SIZE_OF_SET = (
    r"(?:[a-zA-Z#]\s*(?:\\left)?\(|(?:\\left)?\|)[^=|()]*\\(?:cap|cup|setminus|times)(?![a-z])"
    r"[^=|()]*(?:\\right)?[|)]"
)
"""`|A \\cap B|` and `n(A \\cap B)`."""
_QUANTITY = re.compile(
    rf"\s*(?:(?:{_SIZE_OF_SET}"
    r"|(?:[eiIE](?:_(?:\w|\{[^{}]*\}))?|(?:\\(?:det|dim|gcd|lcm|max|min|deg|ker|rank|Pr|nabla|lim|operatorname|mathrm|vec|mathbf"
    r"|widehat|overline)(?![a-zA-Z])|\\?P\s*(?:\\left)?\(|\\mathbb\s*\{P\}|\\\||\\(?:left)?\\\|)[^=]*)"
    r"|(?:\\frac\s*\{\s*(?:d|\\partial)(?![a-zA-Z]{2})[^=|]*|[a-zA-Z](?:'+|\^\{[^{}]*\})?)"
    r"\|\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\w)|\[(?!\s*\d)[^=,\[\]]*[A-Z][^=,\[\]]*\])\s*)"
)
"""A quantity before its value, whose name math-verify takes for a constant or a relation."""
_PLUS_MINUS = re.compile(
    r"(\\?\w+\s*=\s*)?(?=[^,]*\{[^,]*\\pm(?![a-zA-Z])|\\pm(?![a-zA-Z])[^,]*[-+])([^,;=]+)"
)
r"""A value with `\pm` within a fraction or a root, or before a sum: `\frac{1\pm\sqrt{5}}{2}`."""
_CONNECTIVE = re.compile(
    r"\s*,?\s*(?:\\text\{\s*(or|and)\s*\}|\b(or|and)\b|\\(lor|land|cup|cap)(?![a-zA-Z])|([,;]))\s*"
)
_OPERATIONS = (AppliedUndef, sympy.Derivative, sympy.Integral, sympy.Limit, sympy.Sum)
"""Left sides that are a quantity and no unknown: f(3), an integral."""
_JOINED_NAME = re.compile(r"\s*((?:\\(?:neg|lnot)\s*|~)?[a-zA-Z])(?:_\{?\w+\}?)?\s*(?:=|\Z)")
"""Name in a part of a joint statement: the left side of an equation, or a statement or set."""
_UNIONS, _INTERSECTIONS = {"or", "lor", "cup"}, {"and", "land", "cap"}
_PAIR = re.compile(r"\(.*,.*\)", re.DOTALL)
_DESCENDING = re.compile(r"[^<>,;]+(?:(?:>|\\ge(?![a-zA-Z]))[^<>,;]+){2,}")
"""A chain from the largest value down, which is read from its end."""
_RANGE = re.compile(r"[<>(\[]|\\(?:le|ge|ne|in|cup|lor|mid)(?![a-zA-Z])")
"""A sign of a set of numbers that is no list."""
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")


def compare(a: str, b: str) -> bool:
    """Return True if two values in plain LaTeX are equal; symmetric. False if that is not decided
    within `LIMIT_S`.
    """
    try:
        with _stopped_after(LIMIT_S):
            return _are_equal(a, b)
    except _StoppedError:
        return False


class _StoppedError(BaseException):
    """The time is over; no `Exception`, which SymPy and math-verify would catch."""


@contextmanager
def _stopped_after(limit_s: float) -> Iterator[None]:
    """Stop what a block computes after as many seconds of the process's own, on a busy machine as
    on an idle one.
    """

    def stop(*_: object) -> None:
        raise _StoppedError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _are_equal(a: str, b: str) -> bool:
    if _differ_in_place(a, b) or _differ_in_joint(a, b):
        return False
    a, b = in_one_spelling(_without_quantity(a, b), _without_quantity(b, a))
    first, second = read(a), read(b)
    if any(_is_statement(part) for part in (*first, *second)):
        # A statement about numbers, as 3 > 5, is no value.
        return False
    if not _comparable(a, b) or _is_no_point(a, b) or _is_no_point(b, a):
        return False
    if any(_is_open(x) and not _RANGE.search(y) for x, y in ((a, b), (b, a))):
        return False
    return _verify(first, second) or _verify(second, first) or _same_set(first, second)


def _without_quantity(latex: str, other: str) -> str:
    """Return the value of `P(X > 2) = 0.3` or `e = 0.6`, where the other answer is a value, or one
    of the same quantity.
    """
    name, value = _quantity(latex)
    same, _ = _quantity(other)
    if not name or (not same and re.search(r"[=<>]|\\[lg]e", other)):
        return latex
    return latex if same not in ("", name) else value


def _quantity(latex: str) -> tuple[str, str]:
    """Return the name of a quantity, without spaces, and its value; an empty name for any other
    answer.
    """
    name, _, value = latex.rpartition("=")
    if len(name) > MAX_READ or not value.strip() or not _QUANTITY.fullmatch(name):
        return "", latex
    return re.sub(r"\s", "", name), value.lstrip()


def _differ_in_place(a: str, b: str) -> bool:
    """Return True for a derivative at two points, and for two concentrations, which math-verify
    takes for one.
    """
    names = [_quantity(each)[0] for each in (a, b)]
    return (
        all(names)
        and names[0] != names[1]
        and any(each[0] == "[" or "|_" in each for each in names)
    )


def _differ_in_joint(a: str, b: str) -> bool:
    r"""Return True where all statements of one answer hold, and one of the other's: `p \land q` and
    `p \lor q`, `x = 1, y = 2` and `x = 1 \lor y = 2`; False for values of one name.
    """
    return {_holds_jointly(a), _holds_jointly(b)} == {True, False}


def _holds_jointly(latex: str) -> bool | None:
    """Return True if all of several statements hold, False if one of them does; None for a list."""
    pieces = _CONNECTIVE.split(latex)
    joins = {join for n, join in enumerate(pieces) if n % 5 and join}
    named = [found for part in pieces[::5] if (found := _JOINED_NAME.match(part))]
    is_list = joins <= {",", ";"} and not all(each[0].endswith("=") for each in named)
    if is_list or len({each[1] for each in named}) < 2:
        return None
    return not joins <= _UNIONS


def _is_no_point(latex: str, other: str) -> bool:
    """Return True for equations that name no coordinates in their order, beside a pair of numbers:
    `y = 1, z = 2`, `x_2 = 1, x_1 = 2`, `x = 1 or y = 2`.
    """
    if not _PAIR.fullmatch(other):
        return False
    parts = getattr(read(latex)[0], "_unsorted_args", ())
    names = [str(part.lhs) for part in parts if isinstance(part, sympy.Eq)]
    if len(names) < 2 or len(names) < len(parts):
        return False
    is_choice = not _UNIONS.isdisjoint({*_CONNECTIVE.split(latex)})
    return is_choice or names != sorted({*names}) or names[0] in ("y", "z")


def _is_open(latex: str) -> bool:
    """Return True for an interval without ends, `1 < x < 2`, which math-verify takes for them."""
    return len(re.findall(r"[<>]", latex)) == 2


def _is_statement(formula: Formula) -> bool:
    return isinstance(formula, BooleanAtom) or (
        isinstance(formula, sympy.core.relational.Relational)
        and not formula.free_symbols
        and not formula.has(AppliedUndef)
    )


def _same_set(a: list[Formula], b: list[Formula]) -> bool:
    """Return True for two inequalities in one name that the same numbers satisfy."""
    if not (a and b and grader.is_relation(a[0]) and grader.is_relation(b[0])):
        return False
    symbols = a[0].free_symbols
    if (
        len(symbols) != 1
        or symbols != b[0].free_symbols
        or a[0].has(sympy.Eq)
        or b[0].has(sympy.Eq)
    ):
        return False
    return bool(a[0].as_set() == b[0].as_set())


def _verify(gold: list[Formula], answer: list[Formula]) -> bool:
    return bool(verify(gold, answer, allow_set_relation_comp=True))


@lru_cache(maxsize=1024)
def read(latex: str) -> list[Formula]:
    """Return what math-verify reads in LaTeX: a formula and its text, or the text alone."""
    if builder := _BUILDER.fullmatch(latex):
        latex = builder[2]
    latex = _ANY_REAL.sub("", latex) or latex
    if _DESCENDING.fullmatch(latex) and r"\text" not in latex:
        ends = re.split(r"(>|\\ge(?![a-zA-Z]))", latex)[::-1]
        latex = " ".join({">": "<", r"\ge": r"\le"}.get(end, end) for end in ends)
    if excluded := _EXCLUDED.fullmatch(latex):
        latex = ",".join(f"{excluded[1]} \\ne {value}" for value in excluded[2].split(","))
    if either := _PLUS_MINUS.fullmatch(latex):
        latex = (
            rf"{either[1] or ''}\{{{_with_sign(either[2], '+')}, {_with_sign(either[2], '-')}\}}"
        )
    solutions = _solution_set(latex, is_set=builder is not None)
    if solutions is not None:
        return [solutions]
    # In a box, where math-verify looks for LaTeX; plain expressions would take the last number of
    # any prose.
    listed = re.sub(r"\\l(?:or|and)(?![a-zA-Z])", ",", latex)
    found = parse(rf"\boxed{{{with_own_names(listed)}}}", _READING)
    return [part if isinstance(part, str) else _mended(part) for part in found]


def _with_sign(latex: str, sign: str) -> str:
    r"""Return a value with a sign for `\pm`, and the other one for `\mp`."""
    other = "-" if sign == "+" else "+"
    return re.sub(r"\\mp(?![a-zA-Z])", other, re.sub(r"\\pm(?![a-zA-Z])", sign, latex))


def _mended(formula: Formula) -> Formula:
    """Return a formula with decimals as fractions, i as the imaginary unit, the value of a
    calculation `2 + 3 = 5`, and `12 = 3x` as `3x = 12`.
    """
    if hasattr(formula, "_unsorted_args"):
        # A list or a chain of relations, in the order in which math-verify read it.
        parts = formula._unsorted_args
        if grader.is_equation(formula) and getattr(parts[0].lhs, "is_number", False):
            return _value_of_calculation(parts)
        if isinstance(formula, sympy.And):
            return type(formula)(*map(_exact, parts), evaluate=False)
        if (
            len(parts) == 1
            and not isinstance(parts[0], sympy.FiniteSet | sympy.Eq)
            and parts[0] != sympy.EmptySet
        ):
            return _mended(parts[0])
        return type(formula)(*map(_mended, parts))
    if isinstance(formula, sympy.Eq) and getattr(formula.lhs, "is_number", False):
        left, right = _exact(formula.lhs), _exact(formula.rhs)
        if right.free_symbols:
            return sympy.Eq(right, left, evaluate=False)
        return _value_of_calculation([formula])
    return _exact(formula)


def _value_of_calculation(equations: Sequence[Formula]) -> Formula:
    """Return the right side of `2 + 3 = 5`; of a false calculation, False."""
    sides = [_exact(side) for each in equations for side in (each.lhs, each.rhs)]
    if any(side.free_symbols for side in sides):
        return sides[-1]
    return sides[-1] if all(_equal_values(side, sides[-1]) for side in sides) else sympy.false


def _exact(formula: Formula) -> Formula:
    """Return a formula with decimals as fractions and i as the imaginary unit."""
    if isinstance(formula, sympy.core.relational.Relational):
        return type(formula)(_exact(formula.lhs), _exact(formula.rhs), evaluate=False)
    try:
        return formula.xreplace(
            {number: sympy.Rational(str(number)) for number in formula.atoms(sympy.Float)}
            | {each: sympy.I for each in formula.free_symbols if each.name == "i"}
            # A name would be constant, and its derivative zero.
            | {
                each: sympy.Symbol(str(each), real=True)
                for each in formula.atoms(sympy.Derivative)
                if each.expr.is_Symbol and each.expr not in each.variables
            }
        )
    except (AttributeError, TypeError, ValueError):
        return formula


def _solution_set(latex: str, *, is_set: bool) -> Formula | None:
    """Return the numbers that satisfy inequalities which are joined in one way; None for others.

    Args:
        is_set: a single inequality counts, too.
    """
    pieces = _CONNECTIVE.split(latex)
    parts, joins = pieces[::5], {join for n, join in enumerate(pieces) if n % 5 and join}
    if len(parts) < 2 - is_set or not all(_INEQUALITY.search(part) for part in parts):
        return None
    formulas = [
        parsed[0] for part in parts if (parsed := read(part)) and not isinstance(parsed[0], str)
    ]
    symbols = set().union(*(each.free_symbols for each in formulas))
    if len(formulas) < len(parts):
        return None
    if len(symbols) > 1:
        return sympy.Or(*formulas) if joins <= _UNIONS and len(parts) > 1 else None
    sets = [
        each if isinstance(each, sympy.Set) else grader.unwrap_fcs(each).as_set()
        for each in formulas
    ]
    if joins <= _UNIONS:
        return sympy.Union(*sets)
    common = sympy.Intersection(*sets)
    if joins <= _INTERSECTIONS:
        return common
    # Commas: `x > 2, x < 5` is what both allow, `x < 2, x > 5` what either allows.
    return sympy.Union(*sets) if common.is_empty else common


def _comparable(a: str, b: str) -> bool:
    r"""Return False for an unsolved relation and its solution: `x^2 = 4` and `\{-2, 2\}`.

    An equation in several unknowns is a curve, which may be solved for one of them; an equation
    whose left side is the quantity asked for, as m + n = 33, has its right side as its value.
    """
    for latex, other in ((a, b), (b, a)):
        unsolved = [each for each in _relations(latex) if not _is_solved(each)]
        if not unsolved or not all(map(_is_solved, _relations(other))):
            continue
        if _relations(other):
            return all(len(each.free_symbols) > 1 for each in unsolved)
        if len(_relations(latex)) > 1:
            return all(map(_has_name, unsolved))
        return any(_has_value(unsolved[0], value) for value in read(other)[:1])
    return True


@lru_cache(maxsize=1024)
def _relations(latex: str) -> tuple[Formula, ...]:
    """Return the equations and inequalities of which an answer consists; none for a value."""
    if builder := _BUILDER.fullmatch(latex):
        latex = builder[2]
    parts = _CONNECTIVE.split(latex)[::5]
    if len(parts) > 1 and all(map(_INEQUALITY.search, parts)):
        return tuple(relation for part in parts for relation in _relations(part))
    return tuple(relation for formula in read(latex)[:1] for relation in _flat(formula))


def _flat(formula: Formula) -> list[Formula]:
    """Return the relations of a list or a chain; a chain of equations is from end to end."""
    if isinstance(formula, sympy.core.relational.Relational):
        return [formula]
    if not isinstance(formula, sympy.FiniteSet | sympy.Tuple | sympy.And):
        return []
    parts = getattr(formula, "_unsorted_args", formula.args)
    if isinstance(formula, sympy.And) and grader.is_equation(formula):
        return [sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)]
    return [relation for part in parts for relation in _flat(part)]


def _is_solved(relation: Formula) -> bool:
    """Return True if one side of a relation is a name, or in an inequality its absolute value, and
    the other side is free of the name.
    """
    for side, other in ((relation.lhs, relation.rhs), (relation.rhs, relation.lhs)):
        if isinstance(side, sympy.Abs) and not isinstance(relation, sympy.Eq):
            side = side.args[0]
        if _is_name(side) and not (side.is_Symbol and other.has(side)):
            return True
    return False


def _is_name(side: Formula) -> bool:
    """Return True for x, f(3), dy/dx, a pair of names, and AB, which is read as a product."""
    if isinstance(side, sympy.Tuple) or (isinstance(side, sympy.Mul) and len(side.args) > 1):
        return all(each.is_Symbol for each in side.args)
    return isinstance(side, (sympy.Symbol, *_OPERATIONS))


def _has_name(relation: Formula) -> bool:
    """Return True for an equation whose left side is a quantity by its form, as sin A or |z|.

    A name counts even if the right side has it: math-verify reads A and a as one name.
    """
    left = relation.lhs
    return isinstance(relation, sympy.Eq) and (
        left.is_Symbol
        or left.has(AppliedUndef, TrigonometricFunction)
        or (isinstance(left, sympy.Abs) and left.args[0].is_Symbol)
        or left == sympy.Symbol("sigma", real=True) ** 2
    )


def _has_value(relation: Formula, value: Formula) -> bool:
    """Return True if an equation may be that of a quantity and its value, as m + n = 33."""
    if not isinstance(relation, sympy.Eq):
        return False
    left, right, is_set = relation.lhs, relation.rhs, sympy.Set | sympy.Tuple
    if isinstance(value, is_set) and not isinstance(right, is_set):
        return False
    if not isinstance(left, sympy.Expr):
        return True
    if isinstance(right, sympy.MatrixBase | sympy.Tuple | sympy.Interval) or _is_identity(relation):
        return True
    terms = left.as_coefficients_dict()
    if any(term.is_number or count != 1 for term, count in terms.items()):
        # 2x = 6 is not 6: a value has to be that of the name alone.
        return False
    return len(relation.free_symbols) > 1 or _has_name(relation)


def _is_identity(equation: Formula) -> bool:
    """Return True if both sides are equal at a few points, as in a calculation with letters."""
    if not equation.rhs.free_symbols:
        return False
    names = sorted(equation.free_symbols, key=str)
    points = [
        {name: sympy.Rational(sign * (7 + 2 * n), 5 + k) for n, name in enumerate(names)}
        for k, sign in ((0, 1), (3, 1), (6, -1))
    ]
    return all(_equal_values(equation.lhs.subs(p), equation.rhs.subs(p)) for p in points)


def _equal_values(a: Formula, b: Formula, *precision: int) -> bool:
    """Compare two formulas by their values, relative to their size; replaces math-verify's."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(
            grader.sympy_expr_eq(x, y, *precision) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return False
    percents = [grader.get_pct_val(x) for x in (a, b)]
    if percents[0] is not None and percents[1] is None:
        may_be = percentages(percents[0]) if percents[0].is_real else [percents[0] / 100]
        return any(_equal_values(number, b) for number in may_be)
    if percents[1] is not None and percents[0] is None:
        return _equal_values(b, a)
    if a.is_number and b.is_number and points.numbers_differ(a, b):
        return False
    x, y = grader.safe_sympy_doit(a), grader.safe_sympy_doit(b)
    if x == y:
        return True
    if not (x.is_number and y.is_number):
        return False
    if x.is_Rational and y.is_Rational:
        return equal_numbers(Fraction(x.p, x.q), Fraction(y.p, y.q))
    return _agree(x, y)


def _agree(x: Formula, y: Formula) -> bool:
    """Return True if two numbers have the same first digits: `EQUAL_DIGITS`, or `SURE_DIGITS` where
    one of them is a decimal.
    """
    left, right = x.evalf(DIGITS), y.evalf(DIGITS)
    if not (left.is_finite and right.is_finite):
        return bool(left == right)
    rational = x if x.is_Rational else y
    decimal = (rational.is_Rational and decimal_digits(Fraction(rational.p, rational.q))) or 0
    digits = SURE_DIGITS if decimal >= SURE_DIGITS else EQUAL_DIGITS
    return bool(abs(left - right) * 10**digits < max(abs(left), abs(right)))


def _same_solutions(a: Formula, b: Formula, *precision: int) -> bool:
    """Compare two equations or inequalities by their solutions; replaces math-verify's."""
    if not (a.free_symbols and b.free_symbols):
        return False
    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
        if isinstance(a.rhs, sympy.Set) and isinstance(b.rhs, sympy.Set):
            return a.lhs == b.lhs and bool(grader.sympy_expr_eq(a.rhs, b.rhs, *precision))
        if points.curves_differ(a, b):
            return False
        difference = sympy.simplify(a.lhs - a.rhs)
        if not difference.free_symbols:
            return False
        ratio = sympy.simplify(difference / (b.lhs - b.rhs))
        if ratio.is_number:
            return bool(ratio.is_finite and ratio != 0)
        if not (sympy.solve(a, a.free_symbols) and sympy.solve(b, b.free_symbols)):
            return False
    return bool(_solve_and_compare(a, b, *precision))


def _equal_members(a: Formula, b: Formula, *precision: int) -> bool:
    """Compare the members of two sets in any order, and of a pair or a list in theirs; replaces
    math-verify's, which sorts a list that it compares with a pair.
    """
    equal = partial(_equal, precision=precision)
    if len(a.args) != len(b.args):
        return False
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set):
        return _match(list(a.args), list(b.args), equal)
    left, right = (getattr(each, "_unsorted_args", each.args) for each in (a, b))
    return all(map(equal, left, right))


def _equal(a: Formula, b: Formula, precision: Sequence[int]) -> bool:
    return bool(grader.sympy_expr_eq(a, b, *precision))


def _match(
    left: list[Formula], right: list[Formula], equal: Callable[[Formula, Formula], bool]
) -> bool:
    """Return True if each of `left` equals another one of `right`."""
    for member in left:
        found = next((n for n, other in enumerate(right) if equal(member, other)), None)
        if found is None:
            return False
        del right[found]
    return True


def _proved_equal(a: Formula, b: Formula) -> bool:
    """Compare two formulas by simplification, unless both are numbers, whose digits tell, or their
    values differ.
    """
    if all(getattr(x, "is_number", False) for x in (a, b)) or points.differ(a, b):
        return False
    return bool(_symbolic_eq(a, b))


def _equal_to_name(a: Formula, b: Formula) -> bool:
    r"""Compare two formulas of which one is a name alone, `x` and `8x/8`, `ab` and `\text{ab}`;
    replaces math-verify's, which knows no capitals.
    """
    names = [_letters(each) for each in (a, b)]
    return (names[0] == names[1] != "") or _proved_equal(a, b)


def _letters(formula: Formula) -> str:
    """Return the letters of a name, or of names side by side; empty for any other formula."""
    factors = formula.args if isinstance(formula, sympy.Mul) else (formula,)
    if not all(each == sympy.E or isinstance(each, sympy.Symbol) for each in factors):
        return ""
    return "".join("e" if each == sympy.E else each.name for each in factors)


def _convert_factors(reader: Any, factors: Sequence[Any], place: int = 0) -> Any:
    """Read what stands side by side as a product; replaces math-verify's, which takes `3(2)` for a
    mixed number. Those are sums here (`with_own_names`).
    """
    first = reader.convert_postfix(factors[place])
    if place + 1 == len(factors) or not isinstance(first, sympy.Expr | sympy.MatrixBase):
        return _read_factors(reader, factors, place)
    if all(part.getText().strip().isdecimal() for part in factors[place : place + 2]):
        raise ValueError("two numbers without a sign are no product")
    rest = reader.convert_postfix_list(factors, place + 1)
    if isinstance(first, sympy.MatrixBase) or isinstance(rest, sympy.MatrixBase):
        return reader.mat_mul_flat(first, rest)
    return reader.mul_flat(first, rest)


_solve_and_compare, _symbolic_eq = grader.sympy_solve_and_compare, grader.sympy_symbolic_eq
grader.sympy_numeric_eq = _equal_values
grader.sympy_solve_and_compare = _same_solutions
grader.sympy_deep_compare_set_and_tuple = _equal_members
grader.sympy_symbolic_eq = _proved_equal
grader.sympy_compare_symbols = _equal_to_name
_read_factors = _Latex2Sympy.convert_postfix_list
_Latex2Sympy.convert_postfix_list = _convert_factors
math_verify.parser.latex2sympy = partial(
    latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False)
)
for _greek in ("gamma", "Gamma"):  # names here, which math-verify takes for Euler's constant
    sympy_singleton_map.pop(_greek, None)
