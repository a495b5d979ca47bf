"""The selection by sorting plain lists, one step after the other as the paper words it.

It shares nothing with the tensor implementation that it judges.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One request: raw scores by head and position, and how much of it may be kept."""

    scores: list[list[float]]
    budget: int
    recent_ratio: float = 0.25
    sinks: int = 4


def draw_case(rng: random.Random) -> Case:
    """A random case whose scores are multiples of 1/8, so that ties are real in every dtype."""
    heads, length = rng.randint(1, 12), rng.randint(1, 120)
    spread = rng.choice([0, 1, 4, 64])
    scores = [[rng.randint(-spread, spread) / 8 for _ in range(length)] for _ in range(heads)]
    ratio = rng.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, rng.random()])
    return Case(scores, rng.randint(1, 60), ratio, rng.randint(0, 8))


def kept_positions(case: Case) -> list[int]:
    """Ascending positions that the request keeps."""
    length = len(case.scores[0])
    if length <= case.budget:
        return list(range(length))
    sinks, selected, recent = budget_split(case)
    candidates = list(range(sinks, length - recent))
    orders = [sorted(candidates, key=lambda t, row=row: (-row[t], t)) for row in case.scores]
    chosen: list[int] = []
    for turn in range(len(candidates) * len(orders)):
        token = orders[turn % len(orders)][turn // len(orders)]
        if len(chosen) < selected and token not in chosen:
            chosen.append(token)
    return sorted([*range(sinks), *chosen, *range(length - recent, length)])


def budget_split(case: Case) -> tuple[int, int, int]:
    """Sinks, selected and recent tokens."""
    selected = int(case.budget * (1 - case.recent_ratio) + 1e-9)
    rest = case.budget - selected
    if not rest:
        return 0, case.budget - 1, 1
    sinks = min(case.sinks, rest - 1)
    return sinks, selected, rest - sinks
