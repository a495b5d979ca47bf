"""Where a server and the oracle disagree, in words."""

from collections.abc import Sequence

from tests.server.client import Answer, Client
from tests.server.oracle import KeptSets, OracleRun


def disagreements(
    server: Client, answers: Sequence[Answer], runs: Sequence[OracleRun]
) -> list[str]:
    """A line for each request whose tokens or kept sets are not exactly the oracle's."""
    found = []
    for answer, run in zip(answers, runs, strict=True):
        differences = [
            *token_differences(answer.tokens, run.tokens),
            *set_differences(server.kept_sets(answer), run.kept),
        ]
        found += [f"prompt of {answer.prompt_tokens} tokens: {text}" for text in differences]
    return found


def token_differences(served: Sequence[int], expected: Sequence[int]) -> list[str]:
    """At most one line: the first place where two outputs part."""
    if tuple(served) == tuple(expected):
        return []
    same = [left == right for left, right in zip(served, expected, strict=False)]
    place = same.index(False) if False in same else len(same)
    return [f"tokens part at {place} ({len(served)} against {len(expected)})"]


def set_differences(served: KeptSets, expected: KeptSets) -> list[str]:
    """At most one line: the first sparse row that was missing, too much, or kept other tokens."""
    wrong = sorted(
        row for row in served.keys() | expected.keys() if served.get(row) != expected.get(row)
    )
    if not wrong:
        return []
    length, layer = wrong[0]
    odd = sorted(set(served.get(wrong[0], ())) ^ set(expected.get(wrong[0], ())))
    return [
        f"{len(wrong)} of {len(expected)} sets differ, first at length {length}, layer {layer}: "
        f"positions {odd[:8]}"
    ]
