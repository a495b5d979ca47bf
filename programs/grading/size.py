r"""The size of the numbers in a formula, found before SymPy computes them: `10^{10^{10}}`."""

import math
import re
from dataclasses import dataclass

MAX_DIGITS = 20_000
"""Digits of the largest power, factorial or binomial coefficient that is computed."""
MAX_TERMS = 250
"""Terms of the longest power of a sum with names that is expanded."""
MAX_STEPS = 1000
"""Most terms of a sum, and factors of a product, that are computed one by one."""
MAX_DEPTH = 60
"""Brackets within brackets."""

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\S", re.DOTALL)
_CLOSING = {"{": "}", "(": ")", "[": "]"}
_CONSTANTS = {"e": math.e, r"\pi": math.pi}
_UNKNOWN = math.nan
"""The value of a name, and of all that is computed with one."""


class _TooLargeError(Exception):
    """A number has too many digits, or a formula too many parts."""


def too_large(latex: str) -> bool:
    """Return True if a formula in plain LaTeX has a number that takes long to compute: a power, a
    factorial, a binomial coefficient, or a sum of many terms.
    """
    if not re.search(r"\^|!|\\(?:binom|Gamma|sum|prod)(?![a-zA-Z])", latex):
        return False
    try:
        _Formula(_TOKEN.findall(latex)).read_all()
    except _TooLargeError:
        return True
    return False


@dataclass(frozen=True)
class _Part:
    """A part of a formula."""

    value: float
    """Its value, rounded; NaN where it is not known."""
    digits: float = 0.0
    """Digits of its numerals."""
    terms: int = 1
    """Terms of a sum with names."""


class _Formula:
    """A formula that is read from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def read_all(self) -> None:
        """Read the formula.

        Raises:
            _TooLargeError: one of its numbers is too large.
        """
        while self._at < len(self._tokens):
            self._sum("")
            self._at += 1  # a bracket that was not opened

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self._at += 1
        return token

    def _sum(self, closing: str) -> _Part:
        """Read terms up to a closing bracket, which stays."""
        total, term, digits, terms, divides = 0.0, 0.0, 0.0, 0, False
        sign, is_empty = 1.0, True
        while (token := self._next()) and token != closing and token not in ")]}":
            if token in ("+", "-"):
                total, term, is_empty = total + term, 0.0, True
                sign = -1.0 if token == "-" else 1.0
                self._at += 1
                continue
            if token in (r"\cdot", r"\times", "*", "/"):
                divides = token == "/"
                self._at += 1
                continue
            part = self._power()
            digits += part.digits
            if is_empty:
                term, terms, is_empty = sign * part.value, terms + 1, False
            elif divides:
                term = term / part.value if part.value else _UNKNOWN
            else:
                term *= part.value
            divides = False
        value = total + term
        return _Part(value, digits, terms if math.isnan(value) else 1)

    def _power(self) -> _Part:
        """Read a part with its exponents and factorial signs."""
        part = self._part()
        while self._next() in ("^", "!", "_"):
            sign = self._take()
            if sign == "!":
                part = _factorial(part.value)
            elif sign == "^":
                part = _raised(part, self._part_with_powers())
            else:
                self._part()
                part = _Part(_UNKNOWN)
        return part

    def _part_with_powers(self) -> _Part:
        """Read an exponent, also as in `10^10^10`, which has no braces."""
        parts = [self._part()]
        while self._next() == "^":
            self._at += 1
            parts.append(self._part())
        power = parts.pop()
        while parts:
            power = _raised(parts.pop(), power)
        return power

    def _part(self) -> _Part:
        """Read a number, a name, a bracket, or a command with its arguments."""
        token = self._take()
        if token in _CLOSING:
            return self._bracket(_CLOSING[token])
        if token[-1:].isdecimal() and token[0] != "\\":
            return _Part(float(token), len(token) - ("." in token))
        if token in _CONSTANTS:
            return _Part(_CONSTANTS[token], 1.0)
        if token in (r"\frac", r"\binom") and self._next() == "{":
            first, second = self._part(), self._part()
            digits = first.digits + second.digits
            if token == r"\binom":
                return _binomial(first.value, second.value)
            return _Part(first.value / second.value if second.value else _UNKNOWN, digits)
        if token == r"\sqrt" and self._next() == "{":
            inner = self._part()
            return _Part(math.sqrt(inner.value) if inner.value >= 0 else _UNKNOWN, inner.digits)
        if token == r"\Gamma" and self._next() in ("(", "{"):
            return _factorial(self._part().value)
        if token in (r"\sum", r"\prod"):
            return self._many()
        return _Part(_UNKNOWN)

    def _bracket(self, closing: str) -> _Part:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooLargeError
        part = self._sum(closing)
        self._depth -= 1
        self._at += 1
        return part

    def _many(self) -> _Part:
        """Read the limits of a sum or a product."""
        while self._next() in ("_", "^"):
            if self._take() == "_":
                self._part()
            else:
                _check(self._part_with_powers().value, MAX_STEPS)
        return _Part(_UNKNOWN)


def _raised(base: _Part, exponent: _Part) -> _Part:
    times = abs(exponent.value)
    if base.terms > 1:
        _check(times, MAX_TERMS)
        if times <= MAX_TERMS:  # neither larger nor unknown
            _check(math.comb(int(times) + base.terms - 1, base.terms - 1), MAX_TERMS)
    _check(max(base.digits, _digits(base.value)) * times, MAX_DIGITS)
    try:
        value = base.value**exponent.value
    except (OverflowError, ZeroDivisionError):
        value = math.inf
    return _Part(_UNKNOWN if isinstance(value, complex) else value, base.digits * max(times, 1))


def _digits(value: float) -> float:
    return abs(math.log10(abs(value))) if value else 0.0


def _factorial(value: float) -> _Part:
    _check(_log_factorial(abs(value)) / math.log(10), MAX_DIGITS)
    return _Part(math.exp(min(_log_factorial(abs(value)), 700.0)))


def _binomial(n: float, k: float) -> _Part:
    logarithm = (
        _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k) if 0 <= k <= n else _UNKNOWN
    )
    _check(logarithm / math.log(10), MAX_DIGITS)
    return _Part(math.exp(min(logarithm, 700.0)))


def _log_factorial(value: float) -> float:
    return math.inf if value > 1e300 else math.lgamma(value + 1)


def _check(size: float, limit: float) -> None:
    """Raise `_TooLargeError` if a size that is known is over its limit."""
    if size > limit:
        raise _TooLargeError
