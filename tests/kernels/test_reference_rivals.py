"""The rival policies' definitions: exact sets, edges, and facts that hold for any request."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lim_sglang.kernels.reference import (
    BudgetSplit,
    keep_tokens,
    score_tokens,
    split_budget,
)
from lim_sglang.kernels.reference_rivals import (
    BlockGate,
    compress_blocks,
    gate_logits,
    keep_by_max_mass,
    keep_by_position,
    keep_pages,
    keep_per_head,
    max_mass,
    page_bounds,
    page_mass,
    project_query,
    rotate,
    rotate_back,
    share_scores,
    summarize_blocks,
    summarize_pages,
)

VECTORS = Path(__file__).parent / "vectors_rivals.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = [(9, 3), (4, 4), (4, 1), (12, 2)]
"""Query heads and KV heads: groups of 3, 1, 4 and 6."""


def rope_table(length: int, dim: int, theta: float = 10_000.0, factor: float = 1.0) -> Tensor:
    """Return [length, dim] float32: cosines, then sines, times YaRN's factor."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * factor).float()


def streaming(case: Mapping[str, Any]) -> Tensor:
    """Select by position."""
    return keep_by_position(case["length"], case["budget"], case.get("sinks", 4))


def tidal(case: Mapping[str, Any]) -> Tensor:
    """Select each head's own tokens."""
    split = split_budget(case["budget"], case.get("recent_ratio", 0.0), case.get("sinks", 0))
    return keep_per_head(case["scores"], split)


def quest(case: Mapping[str, Any]) -> Tensor:
    """Select pages by the bounds of their keys."""
    keys, block = case["keys"], case["block"]
    bounds = page_bounds(case["query"], *summarize_pages(keys, block))
    shared = share_scores(bounds, case["shared_by"], keys.shape[1])
    return keep_pages(shared, keys.shape[0], case["budget"], block)


def delta(case: Mapping[str, Any]) -> Tensor:
    """Select pages by their mass, beside a window."""
    scores, block = case["scores"], case["block"]
    mass = page_mass(max_mass(scores, case["scale"]), block)
    return keep_pages(mass[None], scores.shape[1], case["budget"], block, case["window_pages"])


def omnikv(case: Mapping[str, Any]) -> Tensor:
    """Select tokens by their mass."""
    return keep_by_max_mass(max_mass(case["scores"], case["scale"]), case["budget"])


def seer(case: Mapping[str, Any]) -> Tensor:
    """Select blocks by a trained gate."""
    keys, block = case["keys"], case["block"]
    length, _, dim = keys.shape
    gate = BlockGate(
        case["gate_q"], case["gate_k"], case.get("gate_qnorm"), case.get("gate_knorm"), block
    )
    table = rope_table(length, dim, case["rope_theta"])
    logits = gate_logits(case["query"], summarize_blocks(keys, block), gate, length - 1, table)
    return keep_pages(logits, length, case["budget"], block)


POLICIES: Mapping[str, Callable[[Mapping[str, Any]], Tensor]] = {
    each.__name__: each for each in (streaming, tidal, quest, delta, omnikv, seer)
}


def generator(seed: int) -> torch.Generator:
    """Return torch's random numbers from a seed."""
    return torch.Generator().manual_seed(seed)


def integers(*shape: int, seed: int, most: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random integers from -most to most, so that ties are real and sums are exact."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).to(dtype)


def random_gate(
    groups: int, group: int, dim: int, seed: int, *, has_norm: bool = True, block: int = 8
) -> BlockGate:
    """Return a gate with random weights."""
    source = generator(seed)
    norms = torch.rand(2, dim, generator=source) + 0.5 if has_norm else (None, None)
    return BlockGate(
        torch.randn(groups, group, dim, dim, generator=source),
        torch.randn(groups, 3 * dim, dim, generator=source),
        *norms,
        block=block,
    )


def random_case(policy: str, length: int, seed: int, heads: tuple[int, int] = (9, 3)) -> Any:
    """Return a case of a policy at budget 24 and pages of 8, in the form of the vectors."""
    num_heads, groups = heads
    dim, budget, block = 8, 24, 8
    query, keys = integers(num_heads, dim, seed=seed), integers(length, groups, dim, seed=seed + 1)
    gate = random_gate(groups, num_heads // groups, dim, seed, has_norm=seed % 2 == 0)
    return {
        "budget": budget,
        "length": length,
        "scores": score_tokens(query, keys),
        "scale": 0.25,
        "query": query,
        "keys": keys,
        "block": block,
        "shared_by": ("query_head", "kv_head", "all")[seed % 3],
        "window_pages": 2 if policy == "delta" else 1,
        "gate_q": gate.query_weight,
        "gate_k": gate.key_weight,
        "gate_qnorm": gate.query_norm,
        "gate_knorm": gate.key_norm,
        "rope_theta": 10_000.0,
    }


def read_vectors() -> list[dict[str, Any]]:
    """Read the oracle's cases; none without the file."""
    cases: list[dict[str, Any]] = json.loads(VECTORS.read_text()) if VECTORS.exists() else []
    return cases


@pytest.mark.parametrize("row", read_vectors(), ids=lambda row: row["name"])
def test_vectors_are_reproduced(row: dict[str, Any]) -> None:
    case = {
        name: torch.tensor(value, dtype=torch.float32) if isinstance(value, list) else value
        for name, value in row.items()
        if name != "kept"
    }
    assert POLICIES[row["policy"]](case).tolist() == row["kept"]


@pytest.mark.skipif(not VECTORS.exists(), reason="the vectors are not written yet")
def test_vectors_cover_every_policy() -> None:
    assert {row["policy"] for row in read_vectors()} == set(POLICIES)


@pytest.mark.parametrize("length", [1, 23, 24, 25, 31, 32, 33, 40, 64, 71])
@pytest.mark.parametrize("policy", POLICIES)
def test_lists_ascend_to_the_newest_token_within_the_budget(policy: str, length: int) -> None:
    case = random_case(policy, length, seed=length)
    kept = POLICIES[policy](case)
    by_page = policy in ("quest", "delta", "seer")
    tokens = 24 if length > 24 else length
    if by_page and length > 24:
        tokens = 24 - 8 + (length - 1) % 8 + 1
    lists = {
        "tidal": 9,
        "seer": 3,
        "quest": {"query_head": 9, "kv_head": 3, "all": 1}[case["shared_by"]],
    }
    assert kept.dtype == torch.int64
    assert kept.shape == (lists.get(policy, 1), tokens)
    assert (kept.diff(dim=1) > 0).all()
    assert (kept[:, -1] == length - 1).all()
    assert (kept[:, 0] >= 0).all()


@pytest.mark.parametrize("policy", ["quest", "delta", "seer"])
@pytest.mark.parametrize("length", [25, 32, 40, 71])
def test_pages_are_kept_whole(policy: str, length: int) -> None:
    for row in POLICIES[policy](random_case(policy, length, seed=length)):
        for page in (row // 8).unique().tolist():
            expected = list(range(page * 8, min(page * 8 + 8, length)))
            assert row[row // 8 == page].tolist() == expected


@pytest.mark.parametrize(
    ("length", "budget", "sinks", "expected"),
    [
        (3, 3, 4, [0, 1, 2]),
        (9, 1, 4, [8]),
        (9, 4, 4, [0, 1, 2, 8]),
        (9, 5, 4, [0, 1, 2, 3, 8]),
        (9, 5, 0, [4, 5, 6, 7, 8]),
        (12, 6, 4, [0, 1, 2, 3, 10, 11]),
        (7, 6, 4, [0, 1, 2, 3, 5, 6]),
    ],
)
def test_streaming_keeps_sinks_and_the_newest(
    length: int, budget: int, sinks: int, expected: list[int]
) -> None:
    assert keep_by_position(length, budget, sinks).tolist() == [expected]


@pytest.mark.parametrize("budget", [1, 4, 5, 20])
@pytest.mark.parametrize("length", [1, 5, 20, 21, 40])
def test_streaming_is_lessismore_with_only_recent_tokens(length: int, budget: int) -> None:
    scores = integers(3, length, seed=length)
    expected = keep_tokens(scores, split_budget(budget, 1.0, 4))
    assert keep_by_position(length, budget).tolist() == [expected.tolist()]


def test_a_further_token_replaces_the_oldest_of_the_window() -> None:
    before, after = (set(keep_by_position(length, 10)[0].tolist()) for length in (30, 31))
    assert (before - after, after - before) == ({24}, {30})


@pytest.mark.parametrize(
    ("scores", "split", "expected"),
    [
        ([[9, 1, 1, 0], [0, 1, 9, -9]], BudgetSplit(0, 1, 1), [[0, 3], [2, 3]]),
        ([[1, 2, 2, 2, 0]], BudgetSplit(0, 2, 1), [[1, 2, 4]]),
        ([[-0.0, 0.0, 0.0, 5]], BudgetSplit(0, 1, 1), [[0, 3]]),
        ([[math.nan, -math.inf, -1.0, 5]], BudgetSplit(0, 2, 1), [[1, 2, 3]]),
        ([[9, 1, 8, 7, 0, 0]], BudgetSplit(0, 0, 1), [[5]]),
        ([[0, 1, 8, 7, 9, 0]], BudgetSplit(1, 1, 2), [[0, 2, 4, 5]]),
        ([[1, 2], [2, 1]], BudgetSplit(0, 1, 1), [[0, 1], [0, 1]]),
    ],
)
def test_each_head_keeps_its_own_best(
    scores: list[list[float]], split: BudgetSplit, expected: list[list[int]]
) -> None:
    assert keep_per_head(torch.tensor(scores, dtype=torch.float32), split).tolist() == expected


@pytest.mark.parametrize("split", [BudgetSplit(0, 19, 1), BudgetSplit(4, 15, 1)])
@pytest.mark.parametrize("length", [12, 20, 21, 90])
def test_heads_do_not_see_each_other(length: int, split: BudgetSplit) -> None:
    scores = integers(6, length, seed=length)
    for head, kept in enumerate(keep_per_head(scores, split).tolist()):
        assert kept == keep_tokens(scores[head : head + 1], split).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_heads_together_keep_what_lessismore_keeps(seed: int) -> None:
    scores, split = integers(6, 200, seed=seed, most=9), split_budget(30, 0.0, 0)
    together = set(keep_per_head(scores, split).flatten().tolist())
    assert set(keep_tokens(scores, split).tolist()) <= together


def test_a_larger_budget_contains_the_smaller_head_by_head() -> None:
    scores = integers(6, 200, seed=3)
    small, large = (keep_per_head(scores, split_budget(k, 0.0, 0)).tolist() for k in (20, 50))
    assert all(set(s) < set(b) for s, b in zip(small, large, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_a_bound_is_the_larger_product_in_each_dimension(
    heads: int, groups: int, dtype: torch.dtype
) -> None:
    query = integers(heads, 16, seed=1, dtype=dtype)
    keys = integers(50, groups, 16, seed=2, most=9, dtype=dtype)
    bounds = page_bounds(query, *summarize_pages(keys, 8))
    assert bounds.shape == (heads, 6)
    for head in range(heads):
        for page in range(6):
            own = keys[page * 8 : page * 8 + 8, head // (heads // groups)].float()
            products = query[head].float() * own
            assert bounds[head, page] == products.amax(dim=0).sum()
            assert bounds[head, page] >= products.sum(dim=1).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_page_summaries_are_exact_in_the_keys_dtype(dtype: torch.dtype) -> None:
    keys = torch.randn(17, 2, 4, generator=generator(1)).to(dtype)
    least, most = summarize_pages(keys, 8)
    assert least.dtype == most.dtype == dtype
    assert torch.equal(least, torch.stack([keys[:8].amin(0), keys[8:16].amin(0)]))
    assert torch.equal(most, torch.stack([keys[:8].amax(0), keys[8:16].amax(0)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [8, 64])
def test_summaries_are_the_same_after_prefill_chunks_and_decode(
    block: int, dtype: torch.dtype
) -> None:
    keys = torch.randn(3 * block + 5, 2, 16, generator=generator(4)).to(dtype)
    for length in (0, 1, block - 1, block, block + 1, 3 * block - 1, 3 * block):
        for summarize in (lambda k: torch.cat(summarize_pages(k, block), -1), summarize_blocks):
            arguments = () if summarize is not summarize_blocks else (block,)
            whole = summarize(keys, *arguments)
            assert torch.equal(summarize(keys[:length], *arguments), whole[: length // block])
            rest = summarize(keys[length // block * block :], *arguments)
            assert torch.equal(rest, whole[length // block :])


def test_pages_of_equal_keys_are_ranked_by_score() -> None:
    query = integers(6, 8, seed=1)
    keys = integers(10, 2, 8, seed=2)
    bounds = page_bounds(query, *summarize_pages(keys.repeat_interleave(4, dim=0), 4))
    assert torch.equal(bounds, score_tokens(query, keys))


@pytest.mark.parametrize("length", [20, 21, 90])
def test_pages_of_one_token_are_the_heads_own_tokens(length: int) -> None:
    query, keys = integers(6, 8, seed=length), integers(length, 2, 8, seed=2)
    case = {"query": query, "keys": keys, "block": 1, "budget": 20, "shared_by": "query_head"}
    expected = tidal({"scores": score_tokens(query, keys), "budget": 20})
    assert torch.equal(quest(case), expected)


@pytest.mark.parametrize("policy", ["quest", "seer"])
@pytest.mark.parametrize("length", [32, 33, 47, 71])
def test_order_within_complete_pages_changes_nothing(policy: str, length: int) -> None:
    case = random_case(policy, length, seed=length)
    order = torch.arange(length)
    complete = length // 8 * 8
    order[:complete] = order[:complete].view(-1, 8).flip(1).flatten()
    permuted = {**case, "keys": case["keys"][order]}
    assert torch.equal(POLICIES[policy](permuted), POLICIES[policy](case))


@pytest.mark.parametrize("policy", ["quest", "seer"])
@pytest.mark.parametrize("length", [32, 33, 47, 72])
def test_keys_of_the_newest_page_change_nothing(policy: str, length: int) -> None:
    case = random_case(policy, length, seed=length)
    keys = case["keys"].clone()
    keys[(length - 1) // 8 * 8 :] = 1e3
    assert torch.equal(POLICIES[policy]({**case, "keys": keys}), POLICIES[policy](case))


@pytest.mark.parametrize("shared_by", ["query_head", "kv_head", "all"])
def test_a_query_of_zeros_keeps_the_first_pages(shared_by: str) -> None:
    case = random_case("quest", 61, seed=1)
    kept = quest({**case, "query": torch.zeros(9, 8), "shared_by": shared_by})
    assert kept.tolist() == [[*range(16), *range(56, 61)]] * len(kept)


def test_a_page_wins_by_a_corner_that_none_of_its_tokens_meets() -> None:
    keys = torch.tensor([[3, 3], [3, 3], [5, 0], [0, 5], [0, 0], [0, 0], [9, 9]])[:, None].float()
    case = {"query": torch.ones(1, 2), "keys": keys, "budget": 4, "block": 2}
    assert quest({**case, "shared_by": "all"}).tolist() == [[2, 3, 6]]
    assert quest({**case, "query": -torch.ones(1, 2), "shared_by": "all"}).tolist() == [[2, 3, 6]]


@pytest.mark.parametrize(
    ("shared_by", "expected"),
    [
        ("query_head", [[1, 9], [2, 3], [7, 0], [4, 5]]),
        ("kv_head", [[2, 9], [7, 5]]),
        ("all", [[7, 9]]),
    ],
)
def test_heads_that_share_a_list_share_their_largest_score(
    shared_by: str, expected: list[list[float]]
) -> None:
    scores = torch.tensor([[1.0, 9], [2, 3], [7, 0], [4, 5]])
    assert share_scores(scores, shared_by, 2).tolist() == expected


@pytest.mark.parametrize(
    ("scores", "length", "budget", "forced_pages", "expected"),
    [
        ([1, 3, 2], 8, 4, 1, [2, 3, 6, 7]),
        ([1, 3, 2], 7, 4, 1, [2, 3, 6]),
        ([2, 1], 5, 4, 1, [0, 1, 4]),
        ([1, 1, 1], 8, 6, 1, [0, 1, 2, 3, 6, 7]),
        ([-0.0, 0.0, -1], 8, 4, 1, [0, 1, 6, 7]),
        ([math.nan, -math.inf, math.nan], 8, 4, 1, [2, 3, 6, 7]),
        ([1, 3, 2], 10, 6, 2, [2, 3, 6, 7, 8, 9]),
        ([1, 3, 2, 9, 9], 10, 6, 2, [2, 3, 6, 7, 8, 9]),
        ([1, 3, 2, 9], 8, 4, 1, [2, 3, 6, 7]),
        ([], 4, 4, 1, [0, 1, 2, 3]),
    ],
)
def test_the_newest_pages_and_the_best_others_are_kept(
    scores: list[float], length: int, budget: int, forced_pages: int, expected: list[int]
) -> None:
    kept = keep_pages(torch.tensor([scores], dtype=torch.float32), length, budget, 2, forced_pages)
    assert kept.tolist() == [expected]


def test_mass_is_the_largest_weight_over_the_heads() -> None:
    scores = torch.tensor([[0.0, 2, 2], [4, 0, 0]])
    weights = [(row * 0.5).softmax(0) for row in scores]
    torch.testing.assert_close(max_mass(scores, 0.5), torch.maximum(*weights))


@pytest.mark.parametrize(("length", "expected"), [(8, [4, 4]), (9, [4, 4, 1]), (3, [3])])
def test_the_mass_of_a_page_is_the_sum_of_its_tokens(length: int, expected: list[float]) -> None:
    assert page_mass(torch.ones(length), 4).tolist() == expected


@pytest.mark.parametrize("length", [33, 40, 71])
def test_delta_of_equal_heads_ranks_pages_of_one_softmax(length: int) -> None:
    case = random_case("delta", length, seed=length)
    one = case["scores"][:1]
    pages = page_mass((one * 0.25).softmax(1)[0], 8)[: -(-length // 8) - 2]
    best = int(pages.argmax())
    kept = delta({**case, "scores": one.repeat(5, 1)})[0]
    newest = (length - 1) // 8
    assert (kept // 8).unique().tolist() == [best, newest - 1, newest]


def test_delta_at_its_least_budget_keeps_the_window_and_the_best_page() -> None:
    scores = torch.zeros(2, 200)
    scores[0, 35] = 4.0
    case = {"scores": scores, "scale": 1.0, "budget": 144, "block": 16, "window_pages": 8}
    assert delta(case).tolist() == [[*range(32, 48), *range(80, 200)]]


def test_many_tokens_of_some_mass_win_over_one_of_more() -> None:
    mass = torch.tensor([5.0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0])
    scores = (mass + 1e-9).log()[None]
    case = {"scores": scores, "scale": 1.0, "budget": 8, "block": 4, "window_pages": 1}
    assert delta(case).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("weights", "budget", "expected"),
    [
        ([[0.6, 0.1, 0.2, 0.1], [0.05, 0.35, 0.5, 0.1]], 2, [0, 3]),  # the sum is largest at 2
        ([[0.3, 0.3, 0.3, 0.1]], 3, [0, 1, 3]),
        ([[0.1, 0.2, 0.2, 0.5]], 2, [1, 3]),
        ([[0.01, 0.19, 0.2, 0.2, 0.2, 0.1, 0.1]], 5, [1, 2, 3, 4, 6]),
        ([[0.1, 0.2, 0.2, 0.5]], 1, [3]),
        ([[0.1, 0.2, 0.2, 0.5]], 4, [0, 1, 2, 3]),
    ],
)
def test_omnikv_keeps_the_newest_and_the_heaviest(
    weights: list[list[float]], budget: int, expected: list[int]
) -> None:
    assert keep_by_max_mass(max_mass(torch.tensor(weights).log(), 1.0), budget).tolist() == [
        expected
    ]


@pytest.mark.parametrize("statistic", range(3), ids=["max", "min", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_can_see_one_statistic_of_a_block(statistic: int, dtype: torch.dtype) -> None:
    keys = integers(20, 2, 4, seed=6, dtype=dtype)
    weight = torch.zeros(2, 12, 4)
    weight[:, statistic * 4 : statistic * 4 + 4] = torch.eye(4)
    gate = BlockGate(torch.zeros(2, 1, 4, 4), weight, block=8)
    unrotated = torch.tensor([1.0, 1, 0, 0]).repeat(20, 1)
    blocks = keys[:16].float().view(2, 8, 2, 4)
    expected = (blocks.amax(1), blocks.amin(1), blocks.mean(1))[statistic]
    compressed = compress_blocks(summarize_blocks(keys, 8), gate, unrotated)
    assert torch.equal(compressed, expected)


def plain_logit(
    query: Tensor, block: Tensor, gate: BlockGate, group: int, distance: int, theta: float
) -> float:
    """Compute one KV head's logit of one block in f64, rotating complex numbers by a distance."""
    dim = query.shape[1]
    projected = torch.stack([q @ w for q, w in zip(query, gate.query_weight[group], strict=True)])
    pooled = torch.cat([block.amax(0), block.amin(0), block.mean(0)])
    sides = []
    for side, norm in (
        (projected.double().sum(0), gate.query_norm),
        (pooled.double() @ gate.key_weight[group].double(), gate.key_norm),
    ):
        scaled = side
        if norm is not None:
            scaled = side / (side.square().mean() + 1e-6).sqrt() * norm.double()
        sides.append(torch.complex(scaled[: dim // 2], scaled[dim // 2 :]))
    angles = distance * theta ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    turned = sides[0] * torch.polar(torch.ones_like(angles), angles)
    return float((turned * sides[1].conj()).real.sum() / math.sqrt(dim))


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_a_logit_is_a_product_rotated_by_the_distance_to_the_block_s_start(
    heads: int, groups: int, has_norm: bool
) -> None:
    length, dim, theta, group = 45, 16, 100.0, heads // groups
    source = generator(9)
    query = torch.randn(heads, dim, generator=source)
    keys = torch.randn(length, groups, dim, generator=source)
    gate = random_gate(groups, group, dim, 3, has_norm=has_norm)
    table = rope_table(length, dim, theta)
    logits = gate_logits(query, summarize_blocks(keys, 8), gate, length - 1, table)
    expected = [
        [
            plain_logit(
                query[g * group : g * group + group],
                keys[start : start + 8, g],
                gate,
                g,
                length - 1 - start,
                theta,
            )
            for start in range(0, 40, 8)
        ]
        for g in range(groups)
    ]
    assert logits.shape == (groups, 5)
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_gate_of_zeros_keeps_the_first_blocks_and_the_newest() -> None:
    case = random_case("seer", 61, seed=1)
    kept = seer({**case, "gate_q": torch.zeros(3, 3, 8, 8)})
    assert kept.tolist() == [[*range(16), *range(56, 61)]] * 3


def test_a_positive_factor_on_a_kv_head_s_logits_changes_no_choice() -> None:
    case = random_case("seer", 90, seed=1)
    factors = torch.tensor([4.0, 1.0, 0.25])[:, None, None, None]
    assert torch.equal(seer({**case, "gate_q": case["gate_q"] * factors}), seer(case))


def test_a_norm_takes_the_length_of_a_projection_away() -> None:
    gate = random_gate(2, 3, 8, seed=5)
    longer = BlockGate(
        gate.query_weight * 8, gate.key_weight * 8, gate.query_norm, gate.key_norm, gate.block
    )
    query, keys = integers(6, 8, seed=1), integers(24, 2, 8, seed=2)
    table, summaries = rope_table(24, 8), summarize_blocks(keys, 8)
    for function in (
        lambda each: project_query(query, each, 23, table),
        lambda each: compress_blocks(summaries, each, table),
    ):
        torch.testing.assert_close(function(longer), function(gate), rtol=1e-5, atol=1e-5)


def test_the_halves_of_a_vector_are_rotated_against_each_other() -> None:
    table = rope_table(8, 4, theta=100.0)
    vectors = torch.tensor([1.0, 0, 0, 2]).repeat(8, 1, 1)
    for position, (rotated,) in enumerate(rotate(vectors, table)):
        fast, slow = float(position), position / 10
        expected = [math.cos(fast), -2 * math.sin(slow), math.sin(fast), 2 * math.cos(slow)]
        torch.testing.assert_close(rotated, torch.tensor(expected))


@pytest.mark.parametrize("factor", [1.0, 1.37], ids=["rope", "yarn"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_rotating_back_undoes_a_rotation(table_dtype: torch.dtype, factor: float) -> None:
    keys = torch.randn(300, 2, 64, generator=generator(8))
    table = rope_table(300, 64, factor=factor).to(table_dtype)
    torch.testing.assert_close(rotate_back(rotate(keys, table), table), keys, rtol=1e-5, atol=1e-5)


def test_keys_stored_in_bf16_lose_only_its_rounding() -> None:
    keys = torch.randn(300, 2, 64, generator=generator(8)).bfloat16()
    table = rope_table(300, 64)
    error = rotate_back(rotate(keys, table).bfloat16(), table) - keys.float()
    assert error.norm() < 4e-3 * keys.float().norm()


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ({"query_weight": torch.zeros(2, 3, 4)}, "query_weight"),
        ({"query_weight": torch.zeros(2, 3, 4, 6)}, "query_weight"),
        ({"query_weight": torch.zeros(2, 3, 5, 5)}, "query_weight"),
        ({"key_weight": torch.zeros(3, 12, 4)}, r"key_weight must be \[2, 12, 4\]"),
        ({"key_weight": torch.zeros(2, 8, 4)}, r"key_weight must be \[2, 12, 4\]"),
        ({"query_norm": torch.zeros(3)}, r"query_norm must be \[4\], not \[3\]"),
        ({"key_norm": torch.zeros(4, 1)}, "key_norm"),
        ({"block": 0}, "block"),
        ({"key_weight": torch.zeros(1), "key_norm": torch.zeros(1)}, "key_weight.*key_norm"),
    ],
)
def test_a_gate_of_other_shapes_is_refused(weights: dict[str, Any], word: str) -> None:
    fitting = {"query_weight": torch.zeros(2, 3, 4, 4), "key_weight": torch.zeros(2, 12, 4)}
    BlockGate(**fitting)
    with pytest.raises(ValueError, match=word):
        BlockGate(**fitting | weights)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"budget": 30}, "budget must be a multiple of 4"),
        ({"forced_pages": 5}, "budget must be at least 20"),
        ({"forced_pages": 0}, "forced_pages"),
        ({"budget": 16.0}, "budget"),
        ({"block": 0}, "block"),
        ({"length": 0}, "length"),
        ({"scores": torch.zeros(1, 8)}, "9 to 10 pages for 40 tokens, not of 8"),
        ({"scores": torch.zeros(1, 11)}, "9 to 10 pages for 40 tokens, not of 11"),
        ({"scores": torch.zeros(9)}, "scores must be a float tensor"),
        ({"scores": torch.zeros(1, 9).int()}, "scores must be a float tensor"),
    ],
)
def test_a_bad_argument_of_pages_is_named(arguments: dict[str, Any], word: str) -> None:
    fitting = {"scores": torch.zeros(1, 9), "length": 40, "budget": 16, "block": 4}
    keep_pages(**fitting)
    with pytest.raises(ValueError, match=word):
        keep_pages(**fitting | arguments)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: keep_by_position(0, 4), "length"),
        (lambda: keep_by_position(9, 0), "budget"),
        (lambda: keep_by_position(9, 4, -1), "sinks"),
        (lambda: keep_by_position(9, True), "budget"),
        (lambda: keep_by_max_mass(torch.zeros(9), 0), "budget"),
        (lambda: share_scores(torch.zeros(1, 9), "head", 1), "shared_by"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_named(call: Callable[[], Tensor], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
