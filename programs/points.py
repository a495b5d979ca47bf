"""Differences between formulas that show at points, before SymPy proves or solves anything.

Each function returns True only if two formulas surely differ; False leaves the question open.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mpmath
import sympy
from sympy.core.function import AppliedUndef

Formula = Any
"""SymPy's formulas, which have no common class."""
_Function = Callable[..., Any]
DIGITS = 30
"""Digits of a value at a point."""
TOLERANCE = mpmath.mpf(10) ** -12
"""Relative difference of two values that are equal."""
NUM_POINTS = 5
_SEED = 1
_STEPS = [10 ** mpmath.mpf(0.4 * n) for n in range(-4, 12)]
_GRID = [*(-step for step in reversed(_STEPS)), mpmath.mpf(0), *_STEPS]
"""Values between whose signs a root is looked for."""
_ERRORS = (ArithmeticError, ValueError, TypeError, NameError, AttributeError, NotImplementedError)
"""Errors of mpmath outside of a function's domain, and of SymPy where mpmath lacks a function."""
_UNSAMPLED = (sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)


def differ(a: Formula, b: Formula) -> bool:
    """Return True if two formulas have other values at two points, whose coordinates are positive,
    so that no branch of a root or a logarithm matters.
    """
    names = _names(a, b)
    f, g = (_function(each, names) for each in (a, b))
    if f is None or g is None or not names:
        return False
    differences = 0
    with mpmath.workdps(DIGITS):
        for point in _points(len(names)):
            x, y = _value(f, point), _value(g, point)
            if x is not None and y is not None:
                differences += abs(x - y) > TOLERANCE * max(abs(x), abs(y))
    return differences > 1


def curves_differ(a: Formula, b: Formula) -> bool:
    """Return True if a point satisfies one of two equations and misses the other one."""
    sides = [each.lhs - each.rhs for each in (a, b)]
    unknown = {each: sympy.Dummy() for side in sides for each in side.atoms(AppliedUndef)}
    first, second = (side.xreplace(unknown) for side in sides)
    names = _names(first, second)
    f, g = (_function(each, names) for each in (first, second))
    if f is None or g is None:
        return False
    with mpmath.workdps(DIGITS):
        return any(
            _misses(one, other, point, place)
            for point in _points(len(names))[:2]
            for place in range(len(names))
            for one, other in ((f, g), (g, f))
        )


def numbers_differ(a: Formula, b: Formula) -> bool:
    """Return True if two numbers, of which one is an integral, a sum or a limit, have other values
    by numerical integration, which has to come to the same value with more digits. No integral to
    infinity, over which an integrand may oscillate.
    """
    if not any(each.has(*_UNSAMPLED) for each in (a, b)):
        return False
    integrals = [integral for each in (a, b) for integral in each.atoms(sympy.Integral)]
    if any(limit.has(sympy.oo) for integral in integrals for limit in integral.limits):
        return False
    try:
        values = [each.evalf(digits) for digits in (15, DIGITS) for each in (a, b)]
        if not all(value.is_Float or value.is_Integer for value in values):
            return False
        x, y, exact_x, exact_y = map(abs, (*values[:2], *values[2:]))
        is_sure = _are_close(x, exact_x) and _are_close(y, exact_y)
        return is_sure and not _are_close(values[2], values[3])
    except _ERRORS:
        return False


def _are_close(x: Any, y: Any) -> bool:
    return bool(abs(x - y) <= 1e-8 * max(abs(x), abs(y)))


def _names(a: Formula, b: Formula) -> list[Formula]:
    return sorted(a.free_symbols | b.free_symbols, key=str)


def _function(formula: Formula, names: Sequence[Formula]) -> _Function | None:
    """Return a formula as a function of its names; None if SymPy alone can compute its values."""
    if not isinstance(formula, sympy.Expr) or formula.has(*_UNSAMPLED, AppliedUndef):
        return None
    try:
        function: _Function = sympy.lambdify(names, formula, "mpmath", dummify=True)
    except _ERRORS:
        return None
    return function


def _points(num_names: int) -> list[list[Any]]:
    draws = random.Random(_SEED)
    return [
        [mpmath.mpf(draws.uniform(0.2, 3)) for _ in range(num_names)] for _ in range(NUM_POINTS)
    ]


def _value(function: _Function, point: Sequence[Any]) -> Any:
    """Return the value at a point; None outside of the function's domain."""
    try:
        value = mpmath.mpmathify(function(*point))
    except _ERRORS:
        return None
    return value if mpmath.isfinite(value) else None


def _misses(f: _Function, g: _Function, point: Sequence[Any], place: int) -> bool:
    """Return True if a root of `f`, along one name from a point, is none of `g`."""

    def at(function: _Function, x: Any) -> Any:
        value = _value(function, [*point[:place], x, *point[place + 1 :]])
        return None if value is None or isinstance(value, mpmath.mpc) else value

    values = [at(f, x) for x in _GRID]
    for n, (left, right) in enumerate(pairwise(values)):
        if left is None or right is None or left * right >= 0:
            continue
        root = _bisected(lambda x: at(f, x), _GRID[n], _GRID[n + 1], left)
        if root is None:
            continue
        missed = at(g, root)
        near = [value for x in (_GRID[n], _GRID[n + 1]) if (value := at(g, x)) is not None]
        if missed is not None and len(near) == 2 and abs(missed) > 1e-6 * max(map(abs, near)):
            return True
    return False


def _bisected(f: _Function, low: Any, high: Any, left: Any) -> Any:
    """Return a root between two points of different signs; None for a pole and a gap."""
    bound = abs(left)
    for _ in range(70):
        middle = (low + high) / 2
        value = f(middle)
        if value is None:
            return None
        if value == 0:
            return middle
        low, high = (middle, high) if (value > 0) == (left > 0) else (low, middle)
    return middle if abs(value) < TOLERANCE * bound else None
