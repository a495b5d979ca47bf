r"""Ratios of three parts and more, in any numbers and names: `1:\sqrt{3}:2`, `x:y:z = 3:2:1`.

math-verify divides their parts one after the other, so that `6:3:1` would be 2, and `2:1`.
"""

import re

_RATIO = re.compile(
    r"(?:(?P<names>[a-zA-Z]+(?:\s*:\s*[a-zA-Z]+)+)\s*=\s*)?"
    r"(?P<parts>(?!.*(?:\\\{|\\(?:text|to|in|mid)(?![a-zA-Z])))[^:=,;<>|]+(?::[^:=,;<>|]+)*)",
    re.DOTALL,
)


def compare_ratios(a: str, b: str) -> bool | tuple[str, str] | None:
    """Compare two values of which one is a ratio of three parts or more.

    Returns:
        None if none is one; False for two ratios of other lengths, and of other names; else two
        points, which are equal if the ratios are.
    """
    ratios = [_RATIO.fullmatch(latex.strip()) for latex in (a, b)]
    parts = [ratio["parts"].split(":") if ratio else [] for ratio in ratios]
    if max(map(len, parts)) < 3:
        return None
    names = {re.sub(r"\s", "", ratio["names"]) for ratio in ratios if ratio and ratio["names"]}
    if len(parts[0]) != len(parts[1]) or len(names) > 1:
        return False
    # Three coordinates at least, since math-verify reads two as an interval.
    first, second = (f"(1,{','.join(map(_quotient, x[1:], x))})" for x in parts)
    return min(first, second), max(first, second)


def _quotient(part: str, before: str) -> str:
    return rf"\frac{{{part.strip()}}}{{{before.strip()}}}"
