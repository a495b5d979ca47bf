"""The rivals' oracle: the committed cases, a second way to each, and the policies' facts."""

import cmath
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import make_vectors_rivals as oracle
from tests.kernels.test_reference import Case, kept_by_plain_lists

VECTORS = Path(__file__).with_name("vectors_rivals.json")
SEEDS = (1, 2, 3)
Cases = dict[str, dict[str, Any]]


def solve(seed: int) -> Cases:
    """Return the cases of a seed by name."""
    cases = json.loads(oracle.write(seed))
    named = {case["name"]: case for case in cases}
    assert len(named) == len(cases), "two cases have one name"
    return named


SOLVED = {seed: solve(seed) for seed in SEEDS}


def length_of(case: dict[str, Any]) -> int:
    """Return a case's length."""
    return case.get("length") or len(case.get("keys") or case["scores"][0])


def kept_as_pages(case: dict[str, Any]) -> list[set[int]]:
    """Return the pages that each set keeps whole, and the newest."""
    return [{position // case["block"] for position in row} for row in case["kept"]]


def test_the_committed_file_is_what_seed_1_gives() -> None:
    program = [sys.executable, oracle.__file__, "1"]
    assert subprocess.run(program, capture_output=True, text=True).stdout == VECTORS.read_text()
    assert VECTORS.stat().st_size < 300_000


def test_every_policy_has_cases() -> None:
    assert {case["policy"] for case in SOLVED[1].values()} == set(oracle.POLICIES)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_choice_hangs_on_rounding(seed: int) -> None:
    assert not [name for name, case in SOLVED[seed].items() if not oracle.is_clear(case)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_set_is_ascending_of_one_size_and_holds_the_newest(seed: int) -> None:
    for name, case in SOLVED[seed].items():
        length, budget, block = length_of(case), case["budget"], case.get("block", 1)
        size = length if length <= budget else budget - block + (length - 1) % block + 1
        for row in case["kept"]:
            assert len(row) == size, name
            assert row == sorted(set(row)), name
            assert row[-1] == length - 1, name
            assert row[0] >= 0, name


def beaten(values: list[float], count: int) -> set[int]:
    """Return the values that fewer than `count` others beat, by counting; the older wins a tie."""
    return {
        i
        for i, mine in enumerate(values)
        if sum(other > mine or (other == mine and j < i) for j, other in enumerate(values)) < count
    }


def log_masses(case: dict[str, Any]) -> list[float]:
    """Compute each token's log mass from log-sum-exps, without a shift by the largest score."""
    rows = [[x * case["scale"] for x in row] for row in case["scores"]]
    sums = [math.log(math.fsum(map(math.exp, row))) for row in rows]
    return [
        max(row[t] - total for row, total in zip(rows, sums, strict=True))
        for t in range(len(rows[0]))
    ]


def corner_bounds(case: dict[str, Any], head: int, older: int) -> list[float]:
    """Take the best corner of each page's box, which grows one token at a time, as at decode."""
    query, keys, block = case["query"], case["keys"], case["block"]
    group = len(query) // len(keys[0])
    bounds = []
    for page in range(older):
        box = [(math.inf, -math.inf)] * len(query[head])
        for token in keys[page * block : (page + 1) * block]:
            key = token[head // group]
            box = [(min(low, x), max(high, x)) for (low, high), x in zip(box, key, strict=True)]
        corners = itertools.product(*box)
        bounds.append(max(math.fsum(map(float.__mul__, query[head], c)) for c in corners))
    return bounds


def complex_logits(case: dict[str, Any], kv_head: int, older: int) -> list[float]:
    """Compute a gate's logits with complex pairs: by the distance from each block's start alone."""
    query, keys, block = case["query"], case["keys"], case["block"]
    group, half = len(query) // len(keys[0]), len(query[0]) // 2

    def pairs(row: list[float], gain: list[float] | None) -> list[complex]:
        root = math.sqrt(math.fsum(x * x for x in row) / len(row) + 1e-6)
        row = [x * g / root for x, g in zip(row, gain, strict=True)] if gain else row
        return [complex(row[i], row[i + half]) for i in range(half)]

    def weigh(terms: list[tuple[float, list[float]]]) -> list[float]:
        return [math.fsum(x * row[out] for x, row in terms) for out in range(2 * half)]

    heads = zip(
        query[kv_head * group : (kv_head + 1) * group], case["gate_q"][kv_head], strict=True
    )
    terms = [term for row, weight in heads for term in zip(row, weight, strict=True)]
    q = pairs(weigh(terms), case.get("gate_qnorm"))
    logits = []
    for index in range(older):
        tokens = [token[kv_head] for token in keys[index * block : (index + 1) * block]]
        columns = [sorted(column) for column in zip(*tokens, strict=True)]
        summary = [column[-1] for column in columns] + [column[0] for column in columns]
        summary += [math.fsum(column) / block for column in columns]
        terms = list(zip(summary, case["gate_k"][kv_head], strict=True))
        c = pairs(weigh(terms), case.get("gate_knorm"))
        distance = len(keys) - 1 - index * block
        turns = [cmath.exp(1j * distance * case["rope_theta"] ** (-i / half)) for i in range(half)]
        products = [a * b.conjugate() * turn for a, b, turn in zip(q, c, turns, strict=True)]
        logits.append(sum(products).real)
    return logits


def again(case: dict[str, Any]) -> list[set[int]]:
    """Recompute a case with none of the oracle's functions."""
    policy, budget, length = case["policy"], case["budget"], length_of(case)
    block, window = case.get("block", 1), case.get("window_pages", 1)
    older = max(-(-length // block) - window, 0)
    everything = set(range(length))
    if policy == "streaming":
        sinks = [t for t in range(length) if t < case.get("sinks", 4)][: budget - 1]
        newest = range(length - 1, -1, -1)
        rows = [[*sinks, *(t for t in newest if t not in sinks)][:budget]]
        return [everything if length <= budget else set(row) for row in rows]
    if policy == "tidal":
        ratio = case.get("recent_ratio", 0.0)
        sinks = case.get("sinks", 0)
        heads = [[row] for row in case["scores"]]
        return [set(kept_by_plain_lists(Case(head, budget, ratio, sinks))) for head in heads]
    if policy == "omnikv":
        values = [log_masses(case)[:-1]]
    elif policy == "delta":
        shares = [math.exp(x) for x in log_masses(case)]
        values = [[math.fsum(shares[j * block : (j + 1) * block]) for j in range(older)]]
    elif policy == "seer":
        values = [complex_logits(case, head, older) for head in range(len(case["keys"][0]))]
        peak = max((abs(x) for row in values for x in row), default=0.0)
        values = [[round(x / (peak or 1.0), 9) for x in row] for row in values]
    else:
        bounds = [corner_bounds(case, head, older) for head in range(len(case["query"]))]
        lists = {"query_head": len(bounds), "kv_head": len(case["keys"][0]), "all": 1}
        size = len(bounds) // lists[case["shared_by"]]
        groups = [bounds[first : first + size] for first in range(0, len(bounds), size)]
        values = [[max(column) for column in zip(*rows, strict=True)] for rows in groups]
    chosen = [beaten(row, budget // block - window) for row in values]
    sets = [{t for t in everything if t // block >= older or t // block in own} for own in chosen]
    return [everything if length <= budget else row for row in sets]


@pytest.mark.parametrize("seed", SEEDS)
def test_another_way_gives_the_same_sets(seed: int) -> None:
    for name, case in SOLVED[seed].items():
        assert [set(row) for row in case["kept"]] == again(case), name


def all_of(cases: Cases, policy: str) -> list[dict[str, Any]]:
    """Return a policy's cases."""
    return [case for case in cases.values() if case["policy"] == policy]


def same(cases: Cases, *names: str) -> bool:
    """Return True if cases have the same sets; they have to be longer than their budget."""
    first, *others = [cases[name] for name in names]
    longer = all(length_of(case) > case["budget"] for case in (first, *others))
    return longer and all(case["kept"] == first["kept"] for case in others)


def contained(cases: Cases, *names: str) -> bool:
    """Return True if each case's sets contain those of the case before, set by set."""
    return all(
        set(small) <= set(large)
        for before, after in itertools.pairwise(names)
        for small, large in zip(cases[before]["kept"], cases[after]["kept"], strict=True)
    )


def united(case: dict[str, Any]) -> set[int]:
    """Return the positions that any set of a case keeps."""
    return {position for row in case["kept"] for position in row}


def by_lessismore(case: dict[str, Any], ratio: float = 0.0, sinks: int = 0) -> set[int]:
    """Return LessIsMore's set of a case's scores."""
    return set(kept_by_plain_lists(Case(case["scores"], case["budget"], ratio, sinks)))


def exchanged(cases: Cases, before: str, after: str) -> bool:
    """Return True if one more token drops one position and adds one."""
    old, new = united(cases[before]), united(cases[after])
    return len(old - new) == len(new - old) == 1


def lowest_and_newest(cases: Cases, *names: str) -> bool:
    """Return True if each set is pages 0 … P - 2 and the newest."""
    return all(
        pages
        == {*range(case["budget"] // case["block"] - 1), (length_of(case) - 1) // case["block"]}
        for case in (cases[name] for name in names)
        for pages in kept_as_pages(case)
    )


def whole_but_the_newest(case: dict[str, Any]) -> bool:
    """Return True if every older page of a set is kept whole."""
    newest = (length_of(case) - 1) // case["block"]
    counts = [sum(t // case["block"] == p for t in case["kept"][0]) for p in range(newest)]
    return set(counts) <= {0, case["block"]}


def bounded(case: dict[str, Any]) -> bool:
    """Return True if every page's bound reaches the largest q·k in the page."""
    bounds = oracle.page_bounds(case["query"], case["keys"], case["block"])
    group = len(case["query"]) // len(case["keys"][0])
    return all(
        bounds[head][t // case["block"]] >= math.fsum(map(float.__mul__, row, key[head // group]))
        for head, row in enumerate(case["query"])
        for t, key in enumerate(case["keys"][: len(bounds[0]) * case["block"]])
    )


def bound_by_score(case: dict[str, Any]) -> bool:
    """Return True if the pages' bounds are their first tokens' q·k, in a case of one KV head."""
    older = (length_of(case) - 1) // case["block"]
    firsts = [case["keys"][page * case["block"]][0] for page in range(older)]
    scores = [[math.fsum(map(float.__mul__, row, key)) for key in firsts] for row in case["query"]]
    return oracle.page_bounds(case["query"], case["keys"], case["block"]) == scores


def window_and_one_more(case: dict[str, Any]) -> bool:
    """Return True if a case keeps the window's pages and one older page."""
    pages, newest = kept_as_pages(case)[0], (length_of(case) - 1) // case["block"]
    window = set(range(newest - case["window_pages"] + 1, newest + 1))
    return window < pages and len(pages - window) == 1


FACTS: dict[str, Callable[[Cases], bool]] = {
    "streaming: the set depends on the length alone": lambda cases: all(
        case.keys() <= {"name", "policy", "budget", "length", "sinks", "kept"}
        for case in all_of(cases, "streaming")
    ),
    "streaming: equals lessismore at recent_ratio 1": lambda cases: all(
        united(case)
        == by_lessismore({"scores": [[0.0] * case["length"]], **case}, 1.0, case.get("sinks", 4))
        for case in all_of(cases, "streaming")
    ),
    "streaming: one more token drops one and adds one": lambda cases: exchanged(
        cases, "streaming: ragged rows, length 90", "streaming: ragged rows, length 91"
    ),
    "tidal: one head equals lessismore at recent_ratio 0": lambda cases: (
        united(case := cases["tidal: one head is lessismore at ratio 0"]) == by_lessismore(case)
    ),
    "tidal: the heads' union contains lessismore's set at recent_ratio 0": lambda cases: all(
        united(case) >= by_lessismore(case)
        for case in all_of(cases, "tidal")
        if not case.get("recent_ratio")
    ),
    "tidal: larger budgets contain smaller": lambda cases: contained(
        cases, *(f"tidal: budget {budget} of the same scores" for budget in (1, 2, 4, 5, 20))
    ),
    "tidal: equal heads keep equal sets": lambda cases: (
        len(set(map(tuple, cases["tidal: equal favourites"]["kept"]))) == 1
    ),
    "tidal: all of the budget recent is streaming": lambda cases: all(
        [row] == oracle.keep_streaming(16, 60)
        for row in cases["tidal: all of the budget recent is streaming"]["kept"]
    ),
    "quest: a bound reaches the page's largest score": lambda cases: all(
        map(bounded, all_of(cases, "quest"))
    ),
    "quest: with equal keys in each page, the bound is the score": lambda cases: bound_by_score(
        cases["quest: equal keys in each page"]
    ),
    "quest: pages of one token are tidal": lambda cases: same(
        cases, "quest: pages of one token are tidal", "tidal: quest's pages of one token"
    ),
    "quest: permuting a complete page's tokens changes nothing": lambda cases: same(
        cases, "quest: before a change", "quest: tokens of a complete page permuted"
    ),
    "quest: the newest page's keys change nothing": lambda cases: (
        same(
            cases,
            "quest: before a change",
            "quest: the newest page changed to the best",
            "quest: the newest page changed to the worst",
        )
        and same(
            cases,
            "quest: before a change, newest page complete",
            "quest: a key of a complete newest page changed",
        )
    ),
    "quest: a query of 0 keeps the lowest pages": lambda cases: lowest_and_newest(
        cases, "quest: q is 0", "quest: q is 0 of both signs"
    ),
    "quest: one set a head, a KV head, or in all": lambda cases: (
        [
            len(cases[f"quest: 8 query heads, 2 KV heads, one set for {by}"]["kept"])
            for by in oracle.SHARES
        ]
        == [8, 2, 1]
    ),
    "delta: equal heads are one softmax": lambda cases: same(
        cases, "delta: one head", "delta: equal heads"
    ),
    "delta: a set is whole pages but for the newest": lambda cases: all(
        map(whole_but_the_newest, all_of(cases, "delta"))
    ),
    "delta: a budget of 144 is the window and the best page": lambda cases: all(
        window_and_one_more(case) for case in all_of(cases, "delta") if case["budget"] == 144
    ),
    "delta: the scale decides between one token and many": lambda cases: (
        kept_as_pages(cases["delta: a page wins by many tokens"]) == [{1, 6, 7}]
        and kept_as_pages(cases["delta: a page wins by one token"]) == [{4, 6, 7}]
    ),
    "omnikv: one head is tidal": lambda cases: same(
        cases, "omnikv: one head is tidal", "tidal: omnikv's one head", "omnikv: equal heads"
    ),
    "omnikv: equal masses keep the older": lambda cases: (
        cases["omnikv: every score equal"]["kept"] == [[0, 1, 2, 3, 4, 5, 6, 39]]
    ),
    "seer: the heads of a group read one set": lambda cases: all(
        len(case["kept"]) == len(case["keys"][0]) for case in all_of(cases, "seer")
    ),
    "seer: a positive factor on a KV head's logits changes nothing": lambda cases: same(
        cases, "seer: before a scaling", "seer: one KV head's logits tripled"
    ),
    "seer: zero weights keep the lowest blocks": lambda cases: lowest_and_newest(
        cases, *(f"seer: zero weights {where}" for where in ("of q", "of k", "under norms"))
    ),
    "seer: permuting a block's tokens or changing the newest changes nothing": lambda cases: same(
        cases,
        "seer: before a change",
        "seer: tokens of a complete block permuted",
        "seer: the newest block changed",
    ),
    "seer: the newest block never competes": lambda cases: same(
        cases, *(f"seer: the newest block is the {name}" for name in ("best", "worst"))
    ),
    "seer: equal logits keep the lower block": lambda cases: (
        kept_as_pages(cases["seer: logits of 0 of both signs"]) == [{0, 1, 2, 3, 15}]
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fact", FACTS)
def test_facts(fact: str, seed: int) -> None:
    assert FACTS[fact](SOLVED[seed])


def best_of_ties_last(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -i))[:count]


def best_by_bits(scores: list[float], count: int) -> list[int]:
    """Rank -0.0 below +0.0."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], math.copysign(1, -scores[i]), i))[
        :count
    ]


def raw_max(scores: list[list[float]], scale: float) -> list[float]:
    return [max(column) for column in zip(*scores, strict=True)]


def summed_mass(scores: list[list[float]], scale: float) -> list[float]:
    return [sum(c) for c in zip(*(oracle.softmax(row, scale) for row in scores), strict=True)]


def one_corner(query: list[float], keys: list[list[float]]) -> float:
    return sum(q * max(c) for q, c in zip(query, zip(*keys, strict=True), strict=True))


def largest_score(query: list[float], keys: list[list[float]]) -> float:
    return max(oracle.dot(query, key) for key in keys)


def rotated_in_neighbours(row: list[float], position: int, theta: float) -> list[float]:
    order = [*range(0, len(row), 2), *range(1, len(row), 2)]
    return oracle_rotate([row[i] for i in order], position, theta)


def mean_first(keys: list[list[float]]) -> list[float]:
    summary, size = oracle_summarize(keys), len(keys[0])
    return [*summary[2 * size :], *summary[: 2 * size]]


def summed_over_the_group(bounds: list[list[float]], kv_heads: int, by: str) -> list[list[float]]:
    size = {"query_head": 1, "kv_head": len(bounds) // kv_heads, "all": len(bounds)}[by]
    groups = [bounds[first : first + size] for first in range(0, len(bounds), size)]
    return [[sum(column) for column in zip(*rows, strict=True)] for rows in groups]


oracle_rotate, oracle_summarize = oracle.rotate, oracle.summarize

DEFECTS: dict[str, tuple[str, Any, set[str]]] = {
    "ties go to the higher": ("best", best_of_ties_last, {*oracle.POLICIES} - {"streaming"}),
    "-0.0 below +0.0": ("best", best_by_bits, {"tidal"}),
    "heads interleaved over KV heads": ("kv_head_of", lambda h, _, g: h % g, {"quest", "seer"}),
    "one more page than there is": (
        "count_pages",
        lambda s, b: s // b + 1,
        {"quest", "delta", "seer"},
    ),
    "the newest competes": ("split", lambda budget, *_: (0, budget, 0), {"tidal"}),
    "the sum or mean of a group": ("share_bounds", summed_over_the_group, {"quest"}),
    "only the upper corner": ("page_bound", one_corner, {"quest"}),
    "a page's score, not its bound": ("page_bound", largest_score, {"quest"}),
    "summed over the heads": ("max_mass", summed_mass, {"delta", "omnikv"}),
    "pooled before the softmax": ("max_mass", raw_max, {"delta", "omnikv"}),
    "no norm": ("normalise", lambda row, _: row, {"seer"}),
    "no rotation": ("rotate", lambda row, *_: row, {"seer"}),
    "neighbours rotated": ("rotate", rotated_in_neighbours, {"seer"}),
    "a block's last position": ("block_position", lambda j, b: j * b + b - 1, {"seer"}),
    "a query one position late": ("block_position", lambda j, b: j * b - 1, {"seer"}),
    "mean, max, min": ("summarize", mean_first, {"seer"}),
}
"""By name: the function of the oracle, a wrong one, the policies whose cases have to change."""


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_wrong_reading_changes_a_case(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, wrong, policies = DEFECTS[defect]
    monkeypatch.setattr(oracle, function, wrong)
    changed = set()
    for case in SOLVED[1].values():
        inputs = {key: case[key] for key in case.keys() - {"name", "policy", "kept"}}
        if oracle.POLICIES[case["policy"]](**inputs) != case["kept"]:
            changed.add(case["policy"])
    assert changed == policies
