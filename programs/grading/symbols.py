r"""Names and products in LaTeX that math-verify reads otherwise than a reader does.

math-verify takes `I` for the imaginary unit, reads no `E_0`, drops the exponent of `2^T`, and keeps
`\phi` and `\varphi` apart.
"""

import re

_TOKEN = re.compile(
    r"\\(?:text|mathrm|mathbb|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+"
    r"|(?<=\d)E[-+]?\d|[a-zA-Z]"
)
"""Words, commands, powers of ten, and letters that are names."""
_TRANSPOSE = re.compile(r"(?<!matrix\})(?<=[\w)}])\s*\^\s*(?:T(?![a-zA-Z])|\{\s*T\s*\})")
"""An exponent T of a number, a name or a bracket, which math-verify drops as a transpose's sign."""
_MIXED = re.compile(
    r"(\\begin\s*\{\w+\}\s*|\\[a-zA-Z]+\s*|(?<![\w.^}]))(\d+)\s*(\{)?(\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})(?(3)\})",
    re.ASCII,
)
"""A whole number and a fraction side by side."""
_PI_BEFORE_BRACKET = re.compile(r"(\\pi)\s*(?=\()")
"""A factor, which math-verify takes for a function."""
_SPELLINGS = (
    *((rf"\var{name}", rf"\{name}") for name in ("phi", "epsilon", "theta", "rho", "sigma")),
    *((letter.upper(), letter) for letter in "xyz"),
)
"""Two ways to write one name, unless a formula has both: Greek letters, and unknowns. Other capital
and small letters are two quantities, as are R and r, N and n, or an angle C and a side c.
"""
_ADDED_CONSTANT = re.compile(r"\+\s*([Cc])(?!\s*[\w({^\\])")
"""The constant of an integral."""
_NUMBERED_CONSTANT = re.compile(r"(?<![\\a-zA-Z])[Cc](?=_\{?\d)")
"""A constant of a general solution: `C_1`."""
_CONSTANT = re.compile(r"(?<![\\a-zA-Z])[Cc](?![a-zA-Z])")
_LOGARITHM = re.compile(r"\\(?:ln|log)(?![a-zA-Z])(?:\s*_)?")
"""A logarithm, with the sign of its base."""
_PRIME = re.compile(r"(?<=[a-zA-Z)}])(?:'+|\^\s*\{?(?:\\prime\s*)+\}?)")
"""The sign of a derivative, or of another name, which math-verify drops."""


def with_own_names(latex: str) -> str:
    r"""Return LaTeX in which math-verify reads E, I and an exponent T as names, and `3\frac13`, but
    not `3(\frac13)`, as a sum.
    """
    latex = _PI_BEFORE_BRACKET.sub(r"\1\\cdot ", latex)
    latex = _PRIME.sub(lambda prime: rf"_{{\text{{p{'p' * _num_primes(prime[0])}}}}}", latex)
    latex = _MIXED.sub(r"\1(\2+\4)", _TRANSPOSE.sub(r"^{\\text{T}}", latex))
    return _TOKEN.sub(
        lambda token: rf"\text{{{token[0]}}}" if token[0] in "EI" else token[0], latex
    )


def _num_primes(signs: str) -> int:
    return signs.count("'") + signs.count(r"\prime")


def in_one_spelling(a: str, b: str) -> tuple[str, str]:
    r"""Return two formulas with one of two ways to write a name: `\phi` for `\varphi`, x for X,
    `\ln` for a `\log` without a base; as they are where one of them has both.
    """
    logarithms = [{*_LOGARITHM.findall(latex)} for latex in (a, b)]
    if all(len(each) == 1 for each in logarithms) and set.union(*logarithms) == {r"\ln", r"\log"}:
        a, b = (_LOGARITHM.sub(r"\\ln", latex) for latex in (a, b))
    names = [{token[0] for token in _TOKEN.finditer(latex)} for latex in (a, b)]
    to_new = {
        old: new for old, new in _SPELLINGS if not any({old, new} <= known for known in names)
    }
    constants = [_ADDED_CONSTANT.findall(latex) for latex in (a, b)]
    if all(len(found) == 1 for found in constants) and not any({"C", "c"} <= x for x in names):
        to_new["C"] = "c"
    if all(len(_NUMBERED_CONSTANT.findall(x)) == len(_CONSTANT.findall(x)) > 0 for x in (a, b)):
        to_new["C"] = "c"
    first, second = (
        _TOKEN.sub(lambda token: to_new.get(token[0], token[0]), latex) for latex in (a, b)
    )
    return first, second
