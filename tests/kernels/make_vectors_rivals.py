"""Write exact cases of the rival policies, made from plain lists.

Deliberately unlike a tensor implementation: loops and `sorted`, no torch, nothing of the project.
Each `keep_…` returns the ascending positions that one request keeps, a list for each set: one set
for all heads, one a KV head or one a query head. S is the length, K the budget, H the query heads,
G the KV heads, D the head dimension. At S <= K every policy keeps all positions.

Scores, queries, keys and weights are small integers, so that sums are exact in float32 and ties are
real ties. Where a policy needs an exponential or a rotation, no choice is closer than `MARGIN`.

    python tests/kernels/make_vectors_rivals.py 1 > tests/kernels/vectors_rivals.json
"""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

Row = list[float]
Matrix = list[Row]
Inputs = dict[str, Any]
Kept = list[list[int]]

MARGIN = 0.01
"""Least distance at a cut of unequal values: log masses, or logits over the largest logit."""
STILL = 1e30
"""A RoPE base at which every pair of dimensions but the first keeps its direction."""


def best(scores: Row, count: int) -> list[int]:
    """Return the indices of the `count` largest scores; equal scores: the lower index first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def count_pages(length: int, block: int) -> int:
    """Count the pages of a request; the newest one may be partial."""
    return -(-length // block)


def keep_pages(page_scores: Row, length: int, budget: int, block: int, forced: int) -> list[int]:
    """Keep the `forced` newest pages, and of the older ones those with the largest scores.

    K / block pages in all; `page_scores` holds the older pages alone.
    """
    pages = set(best(page_scores, budget // block - forced))
    pages |= set(range(count_pages(length, block) - forced, count_pages(length, block)))
    return [position for position in range(length) if position // block in pages]


def kv_head_of(head: int, num_heads: int, num_kv_heads: int) -> int:
    """Return the KV head of a query head: h // g."""
    return head // (num_heads // num_kv_heads)


def dot(left: Row, right: Row) -> float:
    """Return the sum of the products."""
    return sum(a * b for a, b in zip(left, right, strict=True))


def keep_streaming(budget: int, length: int, sinks: int = 4) -> Kept:
    """Keep the first min(sinks, K - 1) positions and the newest, K in all."""
    if length <= budget:
        return [list(range(length))]
    sinks = min(sinks, budget - 1)
    recent = budget - sinks
    return [[t for t in range(length) if t < sinks or t >= length - recent]]


def split(budget: int, recent_ratio: float, sinks: int) -> tuple[int, int, int]:
    """Split a budget into sinks, selected and recent tokens."""
    selected = int(budget * (1 - recent_ratio) + 1e-9)
    share = budget - selected
    if share == 0:  # the newest token is always kept
        return 0, budget - 1, 1
    sinks = min(sinks, share - 1)
    return sinks, selected, share - sinks


def keep_tidal(budget: int, scores: Matrix, sinks: int = 0, recent_ratio: float = 0.0) -> Kept:
    """Keep, for each query head, sinks, the newest and the head's own best between them.

    `scores` are raw q·k, [H][S]. The paper's: the newest and the K - 1 best of the others.
    """
    length = len(scores[0])
    if length <= budget:
        return [list(range(length)) for _ in scores]
    first, selected, recent = split(budget, recent_ratio, sinks)
    kept = []
    for row in scores:
        chosen = [first + index for index in best(row[first : length - recent], selected)]
        kept.append(sorted([*range(first), *chosen, *range(length - recent, length)]))
    return kept


def page_bound(query: Row, keys: Matrix) -> float:
    """Bound q·k over a page: the sum over dimensions of max(q · least, q · most)."""
    return sum(
        max(q * min(column), q * max(column))
        for q, column in zip(query, zip(*keys, strict=True), strict=True)
    )


def page_bounds(query: Matrix, keys: list[Matrix], block: int) -> Matrix:
    """Bound every page but the newest, for each query head: [H][pages - 1]."""
    bounds = []
    for head, row in enumerate(query):
        kv_head = kv_head_of(head, len(query), len(keys[0]))
        own = [token[kv_head] for token in keys]
        older = range(count_pages(len(keys), block) - 1)
        bounds.append([page_bound(row, own[j * block : (j + 1) * block]) for j in older])
    return bounds


def share_bounds(bounds: Matrix, num_kv_heads: int, shared_by: str) -> Matrix:
    """Reduce bounds to one row for each set: the largest among the heads that share the set."""
    if shared_by == "query_head":
        return bounds
    sets: list[Matrix] = [[] for _ in range(num_kv_heads if shared_by == "kv_head" else 1)]
    for head, row in enumerate(bounds):
        sets[kv_head_of(head, len(bounds), len(sets))].append(row)
    return [[max(column) for column in zip(*rows, strict=True)] for rows in sets]


def keep_quest(
    budget: int, query: Matrix, keys: list[Matrix], block: int = 16, shared_by: str = "query_head"
) -> Kept:
    """Keep the newest page, complete or not, and the K / block - 1 others of largest bound.

    `query` [H][D], `keys` [S][G][D].
    """
    bounds = page_bounds(query, keys, block)
    sets = share_bounds(bounds, len(keys[0]), shared_by)
    if len(keys) <= budget:
        return [list(range(len(keys))) for _ in sets]
    return [keep_pages(row, len(keys), budget, block, forced=1) for row in sets]


def softmax(scores: Row, scale: float) -> Row:
    """Return the softmax of scaled scores."""
    largest = max(scores)
    weights = [math.exp((score - largest) * scale) for score in scores]
    return [weight / sum(weights) for weight in weights]


def max_mass(scores: Matrix, scale: float) -> Row:
    """Return each token's largest softmax among the query heads."""
    return [max(column) for column in zip(*(softmax(row, scale) for row in scores), strict=True)]


def page_masses(scores: Matrix, scale: float, block: int, window_pages: int) -> Row:
    """Sum the masses of the tokens of every page older than the window."""
    mass = max_mass(scores, scale)
    older = range(count_pages(len(mass), block) - window_pages)
    return [sum(mass[j * block : (j + 1) * block]) for j in older]


def keep_delta(
    budget: int, scores: Matrix, scale: float, block: int = 16, window_pages: int = 8
) -> Kept:
    """Keep the newest pages, the partial one among them, and the others with the most mass."""
    length = len(scores[0])
    if length <= budget:
        return [list(range(length))]
    masses = page_masses(scores, scale, block, window_pages)
    return [keep_pages(masses, length, budget, block, window_pages)]


def keep_omnikv(budget: int, scores: Matrix, scale: float) -> Kept:
    """Keep the newest token and the K - 1 others with the most mass."""
    length = len(scores[0])
    if length <= budget:
        return [list(range(length))]
    return [sorted([*best(max_mass(scores, scale)[:-1], budget - 1), length - 1])]


def project(row: Row, weight: Matrix) -> Row:
    """Return row @ weight; `weight` is [in][out]."""
    return [dot(row, list(column)) for column in zip(*weight, strict=True)]


def normalise(row: Row, gain: Row | None) -> Row:
    """Apply RMSNorm with an epsilon of 1e-6, where the gate has a gain."""
    if gain is None:
        return row
    root = math.sqrt(sum(x * x for x in row) / len(row) + 1e-6)
    return [x / root * g for x, g in zip(row, gain, strict=True)]


def rotate(row: Row, position: int, theta: float) -> Row:
    """Rotate dimension i with dimension i + Dg / 2 by position · theta^(-2i / Dg)."""
    half = len(row) // 2
    rotated = [0.0] * len(row)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(row))
        rotated[i] = row[i] * math.cos(angle) - row[i + half] * math.sin(angle)
        rotated[i + half] = row[i + half] * math.cos(angle) + row[i] * math.sin(angle)
    return rotated


def summarize(keys: Matrix) -> Row:
    """Concatenate the elementwise max, min and mean of the keys of a complete block: [3D]."""
    columns = list(zip(*keys, strict=True))
    means = [sum(column) / len(column) for column in columns]
    return [*map(max, columns), *map(min, columns), *means]


def block_position(index: int, block: int) -> int:
    """Return the position at which a block's compressed key is rotated: the block's start."""
    return index * block


def gate_logits(
    query: Matrix,
    keys: list[Matrix],
    gate_q: list[list[Matrix]],
    gate_k: list[Matrix],
    rope_theta: float,
    block: int,
    gate_qnorm: Row | None = None,
    gate_knorm: Row | None = None,
) -> Matrix:
    """Return each KV head's logits of every block but the newest: [G][blocks - 1].

    Project, normalise, rotate, multiply; the query's projections are summed over the group and the
    query is rotated by S - 1. Before RoPE: `query` [H][D], `keys` [S][G][D]. Weights of one layer:
    `gate_q` [G][g][D][Dg], `gate_k` [G][3D][Dg], `gate_qnorm` and `gate_knorm` [Dg].
    """
    logits = []
    for kv_head in range(len(keys[0])):
        mine = [h for h in range(len(query)) if kv_head_of(h, len(query), len(keys[0])) == kv_head]
        projected = [
            project(query[head], gate_q[kv_head][place]) for place, head in enumerate(mine)
        ]
        summed = [sum(column) for column in zip(*projected, strict=True)]
        q = rotate(normalise(summed, gate_qnorm), len(keys) - 1, rope_theta)
        row = []
        for j in range(count_pages(len(keys), block) - 1):
            summary = summarize([token[kv_head] for token in keys[j * block : (j + 1) * block]])
            compressed = normalise(project(summary, gate_k[kv_head]), gate_knorm)
            compressed = rotate(compressed, block_position(j, block), rope_theta)
            row.append(dot(q, compressed) / math.sqrt(len(q)))
        logits.append(row)
    return logits


def keep_seer(budget: int, keys: list[Matrix], block: int = 64, **gate: Any) -> Kept:
    """Keep, for each KV head, the newest block and the K / block - 1 others of largest logit.

    The arguments, but for the budget, are those of `gate_logits`.
    """
    if len(keys) <= budget:
        return [list(range(len(keys))) for _ in keys[0]]
    logits = gate_logits(keys=keys, block=block, **gate)
    return [keep_pages(row, len(keys), budget, block, forced=1) for row in logits]


SHARES = ("query_head", "kv_head", "all")
POLICIES: dict[str, Callable[..., Kept]] = {
    "streaming": keep_streaming,
    "tidal": keep_tidal,
    "quest": keep_quest,
    "delta": keep_delta,
    "omnikv": keep_omnikv,
    "seer": keep_seer,
}


def compared(case: Inputs) -> tuple[list[Row], int]:
    """Return the values that a case ranks, in `MARGIN`'s unit, and how many of them are chosen.

    Streaming, tidal and quest rank nothing, or sums that are exact.
    """
    inputs = {key: case[key] for key in case.keys() - {"name", "policy", "budget", "kept"}}
    if case["policy"] == "omnikv":
        mass = max_mass(**inputs)
        return [[math.log(share) for share in mass[:-1]]], case["budget"] - 1
    if case["policy"] == "delta":
        count = case["budget"] // case["block"] - case["window_pages"]
        return [[math.log(share) for share in page_masses(**inputs)]], count
    if case["policy"] == "seer":
        rows = gate_logits(**inputs)
        peaks = [max((abs(x) for x in row), default=0.0) or 1.0 for row in rows]
        shares = [[x / peak for x in row] for row, peak in zip(rows, peaks, strict=True)]
        return shares, case["budget"] // case["block"] - 1
    return [], 0


def is_clear(case: Inputs) -> bool:
    """Return True if values on the two sides of each cut are equal or `MARGIN` apart.

    Equal ones at the cut stand `MARGIN` apart from all others, too.
    """
    rows, count = compared(case)
    for row in rows:
        if 0 < count < len(row):
            low, high = sorted(row, reverse=True)[count - 1 : count + 1]
            near = [x for x in row if x != low and abs(x - low) <= MARGIN]
            if low - high <= MARGIN and (low != high or near):
                return False
    return True


def case(name: str, policy: str, **inputs: Any) -> Inputs:
    """Solve a case."""
    return {"name": name, "policy": policy, **inputs, "kept": POLICIES[policy](**inputs)}


def clear(make: Callable[[], list[Inputs]]) -> list[Inputs]:
    """Draw cases until each is clear."""
    while not all(map(is_clear, cases := make())):
        pass
    return cases


def grid(rng: random.Random, spread: int, *shape: int) -> Any:
    """Draw nested lists of whole numbers from -spread to spread."""
    if not shape:
        return float(rng.randint(-spread, spread))
    return [grid(rng, spread, *shape[1:]) for _ in range(shape[0])]


def signs(row: Row, size: float) -> Row:
    """Return `size` with the sign of each value: the key in a box that scores best."""
    return [-size if x < 0 else size for x in row]


def streaming_cases() -> Iterator[Inputs]:
    """Yield cases whose set depends on the length alone."""

    def streaming(name: str, budget: int, length: int, **sinks: int) -> Inputs:
        return case(name, "streaming", budget=budget, length=length, **sinks)

    for budget in (1, 4, 5):
        for length in sorted({budget, budget + 1, 2 * budget}):
            yield streaming(f"streaming: budget {budget}, length {length}", budget, length)
    for length in (20, 31, 32, 33, 90, 91):
        yield streaming(f"streaming: ragged rows, length {length}", 32, length)
    yield streaming("streaming: a padded row of a graph", 32, 1)
    yield streaming("streaming: no sinks", 8, 30, sinks=0)
    yield streaming("streaming: more sinks than fit", 5, 30, sinks=8)


def tidal_cases(rng: random.Random) -> Iterator[Inputs]:
    """Yield the paper's per-head sets, and those with sinks and a recent share."""

    def tidal(name: str, budget: int, scores: Matrix, **shares: float) -> Inputs:
        return case(f"tidal: {name}", "tidal", budget=budget, scores=scores, **shares)

    own = [[8.0 if t % 3 == head else 0.0 for t in range(30)] for head in range(3)]
    nested = [[8.0 if t % 3 == 0 and t < 9 * (h + 1) else 0.0 for t in range(30)] for h in range(3)]
    newest = grid(rng, 64, 4, 50)
    same = grid(rng, 16, 4, 60)
    alone = same[:1]
    yield tidal("disjoint favourites", 9, own)
    yield tidal("equal favourites", 9, own[:1] * 3)
    yield tidal("nested favourites", 9, nested)
    yield tidal("every score equal", 8, [[3.0] * 40] * 2)
    yield tidal("ties across the cut", 12, grid(rng, 1, 4, 60))
    yield tidal("-0.0 ties with +0.0", 4, [[-1.0, 0.0, -0.0, 0.0, -0.0, 0.0, 1.0, -2.0]])
    yield tidal("the newest scores worst", 10, [[*row[:-1], -99.0] for row in newest])
    yield tidal("the newest scores best", 10, [[*row[:-1], 99.0] for row in newest])
    for group in (1, 4, 6):
        yield tidal(f"{group} query heads, 1 KV head", 16, grid(rng, 64, group, 70))
    yield tidal("9 query heads, 3 KV heads", 13, grid(rng, 8, 9, 60))
    for length in (11, 12, 13):
        yield tidal(f"budget 12, length {length}", 12, grid(rng, 64, 3, length))
    for budget in (1, 2, 4, 5, 20):
        yield tidal(f"budget {budget} of the same scores", budget, same)
    yield tidal("sinks without a recent share are none", 20, same, sinks=4, recent_ratio=0.0)
    yield tidal("one head is lessismore at ratio 0", 20, alone)
    yield tidal("one head is lessismore at ratio 0.25", 20, alone, sinks=4, recent_ratio=0.25)
    for budget in (1, 2, 5, 8, 16, 32):
        name = f"sinks and a recent share, budget {budget}"
        yield tidal(name, budget, grid(rng, 8, 4, 70), sinks=4, recent_ratio=0.25)
    yield tidal("half of the budget recent", 16, same, sinks=4, recent_ratio=0.5)
    yield tidal("all of the budget recent is streaming", 16, same, sinks=4, recent_ratio=1.0)


def quest_cases(rng: random.Random) -> Iterator[Inputs]:
    """Yield pages by bound, for each query head, each KV head and all heads."""

    def quest(
        name: str, budget: int, block: int, query: Matrix, keys: list[Matrix], by: str = SHARES[0]
    ) -> Inputs:
        inputs = {"budget": budget, "block": block, "query": query, "keys": keys}
        return case(f"quest: {name}", "quest", **inputs, shared_by=by)

    def drawn(heads: int, kv_heads: int, length: int) -> tuple[Matrix, list[Matrix]]:
        return grid(rng, 4, heads, 4), grid(rng, 8, length, kv_heads, 4)

    for length in (48, 49, 63, 64, 65, 95, 96, 97):
        yield quest(f"pages of 16, budget 48, length {length}", 48, 16, *drawn(2, 1, length))
    for budget in (3, 4, 5):
        yield quest(f"pages of one token, budget {budget}", budget, 1, *drawn(3, 1, 20))
    for heads, kv_heads in ((2, 2), (8, 2), (12, 2), (9, 3)):
        inputs = drawn(heads, kv_heads, 46)
        for by in SHARES:
            name = f"{heads} query heads, {kv_heads} KV heads, one set for {by}"
            yield quest(name, 16, 4, *inputs, by)
    for by in SHARES:
        yield quest(f"within the budget, one set for {by}", 16, 4, *drawn(4, 2, 16), by)

    keys = [[[x, y]] for x, y in ((9.0, 0.0), (6.0, 6.0), (7.0, 0.0), (1.0, 1.0), (0.0, 0.0))]
    for by in SHARES[1:]:
        name = f"the largest bound counts, not the sum, one set for {by}"
        yield quest(name, 3, 1, [[1.0, 0.0], [0.0, 1.0]], keys, by)
    flat, near = [[[1.0, 1.0]]] * 2, [[[3.0, 3.0]]] * 2
    corner = [[[4.0, -4.0]], [[-4.0, 4.0]]]
    keys = [*flat, *near, *corner, *near, *flat, *flat]
    yield quest("a corner that no token meets wins", 6, 2, [[1.0, 1.0]], keys)

    query, keys = drawn(4, 2, 43)
    yield quest("all of q negative", 12, 4, [[-abs(x) - 1 for x in row] for row in query], keys)
    below = [[[-abs(x) - 1 for x in key] for key in token] for token in keys]
    yield quest("all of k negative", 12, 4, query, below)
    yield quest("q is 0", 12, 4, [[0.0] * 4] * 4, keys)
    yield quest("q is 0 of both signs", 12, 4, [[0.0, -0.0, 0.0, -0.0], [-0.0] * 4] * 2, keys)
    yield quest("ties across the cut", 12, 4, query, [keys[t // 4 % 2] for t in range(43)])
    yield quest("before a change", 12, 4, query, keys)
    permuted = [*keys[:8], keys[11], keys[8], keys[10], keys[9], *keys[12:]]
    yield quest("tokens of a complete page permuted", 12, 4, query, permuted)
    for name, size in (("best", 8.0), ("worst", -8.0)):
        pulled = [*keys[:-3], *[[signs(query[0], size), signs(query[2], size)]] * 3]
        yield quest(f"the newest page changed to the {name}", 12, 4, query, pulled)
    query, keys = drawn(4, 1, 40)
    yield quest("before a change, newest page complete", 12, 4, query, keys)
    pulled = [*keys[:-1], [signs(query[0], 8.0)]]
    yield quest("a key of a complete newest page changed", 12, 4, query, pulled)
    query, keys = drawn(3, 1, 42)
    yield quest("equal keys in each page", 20, 4, query, [keys[t // 4] for t in range(42)])
    query, keys = drawn(4, 2, 30)
    yield quest("pages of one token are tidal", 8, 1, query, keys)
    scores = [[dot(row, token[head // 2]) for token in keys] for head, row in enumerate(query)]
    yield case("tidal: quest's pages of one token", "tidal", budget=8, scores=scores)


def mass_cases(rng: random.Random) -> Iterator[Inputs]:
    """Yield the cases of delta and omnikv: sets by the largest softmax among the heads."""

    def delta(
        name: str,
        budget: int,
        scores: Matrix,
        scale: float = 0.125,
        block: int = 4,
        window: int = 2,
    ) -> Inputs:
        inputs = {"budget": budget, "scores": scores, "scale": scale}
        return case(f"delta: {name}", "delta", **inputs, block=block, window_pages=window)

    def omnikv(name: str, budget: int, scores: Matrix, scale: float = 0.125) -> Inputs:
        inputs = {"budget": budget, "scores": scores, "scale": scale}
        return case(f"omnikv: {name}", "omnikv", **inputs)

    def drawn(
        make: Callable[..., Inputs], name: str, budget: int, heads: int, length: int, **sizes: int
    ) -> Inputs:
        return clear(lambda: [make(name, budget, grid(rng, 32, heads, length), **sizes)])[0]

    paper = {"block": 16, "window": 8}
    for length in (144, 145, 159, 160, 161, 300):
        name = f"nine pages of 16, eight of them the window, length {length}"
        yield drawn(delta, name, 144, 2, length, **paper)
    yield drawn(delta, "two of 16 beside the window", 160, 3, 250, **paper)
    for length in (16, 17, 19, 20, 21, 60, 61, 63):
        yield drawn(delta, f"pages of 4, budget 16, length {length}", 16, 3, length)
    for heads in (1, 4, 6, 9):
        yield drawn(delta, f"{heads} query heads", 20, heads, 62)
    yield drawn(delta, "pages of one token", 8, 3, 50, block=1)
    yield drawn(delta, "a window of one page", 12, 3, 50, window=1)
    row = clear(lambda: [delta("", 20, grid(rng, 32, 1, 62))])[0]["scores"]
    yield delta("one head", 20, row)
    yield delta("equal heads", 20, row * 3)
    yield delta("every score equal", 20, [[3.0] * 62] * 2)
    yield delta("ties across the cut", 20, [[row[0][t % 8] for t in range(62)]] * 2)
    yield delta("-0.0 ties with +0.0", 12, [[(0.0, -0.0)[t // 4 % 2] for t in range(42)]])
    one, many = [24.0, 0.0, 0.0, 0.0], [16.0] * 4
    scores = [[*[0.0] * 4, *many, *[0.0] * 8, *one, *[0.0] * 10]]
    yield delta("a page wins by many tokens", 12, scores)
    yield delta("a page wins by one token", 12, scores, scale=1.0)
    # Three heads like page 1, one of them likes page 3 more: summed masses would take page 1.
    liked = [[*[0.0] * 4, *[10.0] * 4, *[0.0] * 22] for _ in range(3)]
    liked[1][12:16] = [20.0] * 4
    yield delta("one head's favourite before every head's second", 12, liked)
    yield delta(
        "mass in the window frees no page", 12, [[*[0.0] * 5, 8.0, *[0.0] * 20, 64.0, 64.0]]
    )

    for budget in (1, 2, 4, 5, 20):
        for length in (budget, budget + 1, 60):
            yield drawn(omnikv, f"budget {budget}, length {length}", budget, 4, length)
    for heads in (1, 6, 9):
        yield drawn(omnikv, f"{heads} query heads", 13, heads, 60)
    row = grid(rng, 32, 1, 60)
    yield omnikv("one head is tidal", 12, row)
    yield case("tidal: omnikv's one head", "tidal", budget=12, scores=row)
    yield omnikv("equal heads", 12, row * 3)
    yield omnikv("every score equal", 8, [[3.0] * 40] * 2)
    yield omnikv("ties across the cut: the older first", 12, grid(rng, 1, 1, 60) * 2)
    yield omnikv("-0.0 ties with +0.0", 4, [[-1.0, 0.0, -0.0, 0.0, -0.0, 0.0, 1.0, -2.0]])
    yield omnikv("the newest has the least mass", 12, [[*row[0][:-1], -40.0]])
    yield omnikv("the newest has the most mass", 12, [[*row[0][:-1], 40.0]])
    flat, peaked = [90.0 + t % 2 for t in range(20)], [0.0] * 20
    peaked[6:9] = [40.0, 39.0, 38.0]
    yield omnikv("large scores of a flat head are little mass", 4, [flat, peaked])
    halves = [[12.0 if t < 4 else 0.0 for t in range(30)] for _ in range(3)]
    halves[1][20:23] = [20.0] * 3
    yield omnikv("one head's favourites before every head's second", 4, halves)


def seer_cases(rng: random.Random) -> Iterator[Inputs]:
    """Yield blocks by a gate's logits, for each KV head."""

    def seer(name: str, budget: int, inputs: Inputs, **changes: Any) -> Inputs:
        return case(f"seer: {name}", "seer", budget=budget, **{**inputs, **changes})

    def drawn(group: int, kv_heads: int, length: int, block: int = 4) -> Inputs:
        return {
            "query": grid(rng, 4, group * kv_heads, 4),
            "keys": grid(rng, 8, length, kv_heads, 4),
            "gate_q": grid(rng, 2, kv_heads, group, 4, 4),
            "gate_k": grid(rng, 2, kv_heads, 12, 4),
            "rope_theta": 10000.0,
            "block": block,
        }

    def solved(name: str, budget: int, *shape: int) -> Inputs:
        return clear(lambda: [seer(name, budget, drawn(*shape))])[0]

    def norms() -> Inputs:
        return {"gate_qnorm": grid(rng, 3, 4), "gate_knorm": grid(rng, 3, 4)}

    for length in (192, 193, 255, 256):
        name = f"blocks of 64, budget 192, length {length}"
        yield solved(name, 192, 2, 1, length, 64)
    for length in (16, 17, 19, 20, 21, 51, 52, 53):
        name = f"blocks of 4, budget 16, length {length}"
        yield solved(name, 16, 1, 2, length)
    for group, kv_heads in ((1, 3), (4, 2), (6, 1), (3, 3)):
        name = f"{group * kv_heads} query heads, {kv_heads} KV heads"
        yield solved(name, 12, group, kv_heads, 46)
    for length in (1, 3, 4):
        yield seer(f"one block, length {length}", 4, drawn(2, 2, length))
    yield seer("a budget of one block", 4, drawn(2, 2, 30))

    def norm_on_and_off() -> list[Inputs]:
        inputs = drawn(2, 2, 50)
        off, on = seer("norm off", 16, inputs), seer("norm on", 16, inputs, **norms())
        return [off, on] if off["kept"] != on["kept"] else norm_on_and_off()

    yield from clear(norm_on_and_off)
    yield from clear(
        lambda: [seer("norm on, blocks of 64", 128, {**drawn(4, 1, 330, 64), **norms()})]
    )

    def scaled() -> list[Inputs]:
        inputs = drawn(2, 2, 50)
        first, second = inputs["gate_q"]
        tripled = [first, [[[3 * x for x in row] for row in head] for head in second]]
        return [
            seer("before a scaling", 16, inputs),
            seer("one KV head's logits tripled", 16, inputs, gate_q=tripled),
        ]

    yield from clear(scaled)

    def changed() -> list[Inputs]:
        inputs = drawn(2, 2, 51)
        keys = inputs["keys"]
        permuted = [*keys[:8], keys[11], keys[8], keys[10], keys[9], *keys[12:]]
        return [
            seer("before a change", 16, inputs),
            seer("tokens of a complete block permuted", 16, inputs, keys=permuted),
            seer("the newest block changed", 16, inputs, keys=[*keys[:-3], *grid(rng, 8, 3, 2, 4)]),
        ]

    yield from clear(changed)
    inputs = drawn(2, 2, 50)
    yield seer("zero weights of q", 16, inputs, gate_q=[[[[0.0] * 4] * 4] * 2] * 2)
    yield seer("zero weights of k", 16, inputs, gate_k=[[[0.0] * 4] * 12] * 2)
    yield seer("zero weights under norms", 16, {**inputs, **norms()}, gate_k=[[[0.0] * 4] * 12] * 2)

    # Weights into dimension 1 alone, and a base at which RoPE moves it by less than rounding: a
    # logit is q · (max, min or mean of k_0), half of it, exactly.
    def still(weights: Row) -> Inputs:
        gate_k = [[[0.0, weight, 0.0, 0.0] for weight in weights]]
        gate_q = [[[[0.0, float(d == 0), 0.0, 0.0] for d in range(4)]] * 2]
        return {**inputs, "gate_q": gate_q, "gate_k": gate_k, "rope_theta": STILL}

    inputs = {**drawn(2, 1, 62), "query": [[1.0, 5.0, -3.0, 2.0]] * 2}
    for place, name in enumerate(("max", "min", "mean")):
        weights = [float(row == 4 * place) for row in range(12)]
        yield seer(f"weights that see the {name} only", 20, still(weights))
    weights = [float(row in (0, 4, 8)) for row in range(12)]
    twice = [inputs["keys"][t // 4 % 3 * 4 + t % 4] for t in range(62)]
    yield seer("equal logits: the lower block", 20, still(weights), keys=twice)
    zero = [[[(0.0, -0.0)[t // 4 % 2]] * 4] for t in range(62)]
    yield seer("logits of 0 of both signs", 20, still(weights), keys=zero)
    for name, value in (("best", 99.0), ("worst", -99.0)):
        keys = [*inputs["keys"][:-2], *[[[value] * 4]] * 2]
        yield seer(f"the newest block is the {name}", 20, still(weights), keys=keys)


def write(seed: int) -> str:
    """Return all cases as a JSON list, one case a line."""
    rng = random.Random(seed)
    cases = [*streaming_cases(), *tidal_cases(rng), *quest_cases(rng)]
    cases += [*mass_cases(rng), *seer_cases(rng)]
    lines = (json.dumps(case, separators=(",", ":")) for case in cases)
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    sys.stdout.write(write(int(sys.argv[1])))
