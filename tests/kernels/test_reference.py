"""The definition: exact sets, ties, edges, and facts that hold for any scores."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lim_sglang.kernels.reference import (
    BudgetSplit,
    attend_lists,
    attend_runs,
    attend_tokens,
    keep_by_turns,
    keep_tokens,
    rank_tokens,
    score_tokens,
    select_tokens,
    split_budget,
    turns_of_rank,
    unite_rankings,
)

VECTORS = Path(__file__).parents[3] / "shared" / "oracle" / "vectors.json"
GOLDEN = Path(__file__).parents[1] / "golden" / "selection.json"


@dataclass(frozen=True)
class Case:
    """One request: raw scores by head and position, and the split of its budget."""

    scores: list[list[float]]
    budget: int
    recent_ratio: float = 0.25
    sinks: int = 4


def random_case(rng: random.Random) -> Case:
    """Generate a case whose scores are multiples of 1/8, so that ties are real in every dtype."""
    heads, length = rng.randint(1, 12), rng.randint(1, 120)
    levels = rng.choice([0, 1, 4, 64])
    scores = [[rng.randint(-levels, levels) / 8 for _ in range(length)] for _ in range(heads)]
    ratio = rng.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, rng.random()])
    return Case(scores, rng.randint(1, 60), ratio, rng.randint(0, 8))


def kept_by_plain_lists(case: Case) -> list[int]:
    """Select as the paper words it, sorting lists; shares no code with the reference in torch."""
    length = len(case.scores[0])
    if length <= case.budget:
        return list(range(length))
    selected = int(case.budget * (1 - case.recent_ratio) + 1e-9)
    share = case.budget - selected
    sinks = max(0, min(case.sinks, share - 1))
    recent = share - sinks
    if not share:
        selected, recent = case.budget - 1, 1
    candidates = list(range(sinks, length - recent))
    rankings = [sorted(candidates, key=lambda t, row=row: (-row[t], t)) for row in case.scores]
    chosen: list[int] = []
    for turn in range(len(candidates) * len(rankings)):
        token = rankings[turn % len(rankings)][turn // len(rankings)]
        if len(chosen) < selected and token not in chosen:
            chosen.append(token)
    return sorted([*range(sinks), *chosen, *range(length - recent, length)])


def select(case: Case, dtype: torch.dtype = torch.float32) -> list[int]:
    """Return the reference's answer to a case."""
    kept = select_tokens(
        torch.tensor(case.scores, dtype=dtype),
        budget=case.budget,
        recent_ratio=case.recent_ratio,
        sinks=case.sinks,
    )
    assert kept.dtype == torch.int64
    return [int(position) for position in kept]


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Read cases with their names and expected sets; none if there is no such file."""
    cases: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return cases


def check_case(row: dict[str, Any]) -> None:
    """Check that the reference reproduces a recorded case."""
    case = Case(row["scores"], row["budget"], row["recent_ratio"], row["sinks"])
    assert select(case) == row["kept"]


@pytest.mark.parametrize("row", read_cases(GOLDEN), ids=lambda row: row["name"])
def test_own_vectors_are_reproduced(row: dict[str, Any]) -> None:
    check_case(row)


@pytest.mark.skipif(not VECTORS.exists(), reason="the shared vectors are not beside this checkout")
def test_shared_vectors_are_reproduced() -> None:
    rows = read_cases(VECTORS)
    assert rows
    for row in rows:
        check_case(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(40))
def test_equals_plain_lists_on_random_cases(seed: int, dtype: torch.dtype) -> None:
    case = random_case(random.Random(seed))
    assert select(case, dtype) == kept_by_plain_lists(case)


@pytest.mark.parametrize(
    ("budget", "ratio", "sinks", "expected"),
    [
        (2048, 0.25, 4, (4, 1536, 508)),
        (10, 0.1, 4, (0, 9, 1)),
        (100, 0.0, 4, (0, 99, 1)),
        (100, 1.0, 4, (4, 0, 96)),
        (8, 0.25, 4, (1, 6, 1)),
        (1, 0.25, 4, (0, 0, 1)),
        (2, 0.25, 4, (0, 1, 1)),
        (1, 0.0, 4, (0, 0, 1)),
        (40, 0.9, 0, (0, 4, 36)),
    ],
)
def test_the_parts_add_up_to_the_budget(
    budget: int, ratio: float, sinks: int, expected: tuple[int, int, int]
) -> None:
    assert split_budget(budget, ratio, sinks) == BudgetSplit(*expected)
    assert sum(expected) == budget


def test_heads_take_turns_and_skip_repeats() -> None:
    ranking = torch.tensor([[3, 1, 0, 2], [3, 2, 1, 0]])
    assert unite_rankings(ranking, 3).tolist() == [3, 1, 2]


def test_a_rank_lists_its_tokens_with_their_turns_among_all_heads() -> None:
    split = BudgetSplit(sinks=1, selected=3, recent=1)
    # Behind a sink, the candidates in the order of the second rank's heads: 3, 0, 1, 2 and 3, 2, 0.
    scores = torch.tensor([[9.0, 3, 2, 1, 4, 0], [9.0, 2, 1, 3, 4, 0]])
    found = turns_of_rank(scores, split, rank=1, num_ranks=2)
    # Heads 2 and 3 of 4: turns 2 and 3, then 6 and 7.
    assert found.tolist() == [[3, 2], [0, 6], [2, 7]]


def scores_of_kind(kind: str, heads: int, length: int, seed: int) -> torch.Tensor:
    """Return scores [heads, length] of heads that agree more or less."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(heads, length, generator=generator)
    common = torch.randn(length, generator=generator)
    if kind == "ties":
        return (own * 4).round() / 8
    if kind == "alike":
        return common.repeat(heads, 1)
    if kind == "related":
        return 2 * common + own
    if kind == "not finite":
        choices = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0])
        return choices[torch.randint(len(choices), (heads, length), generator=generator)]
    return own


def kept_by_ranks(
    scores: torch.Tensor, split: BudgetSplit, num_ranks: int, order: tuple[int, ...] = ()
) -> list[int]:
    """Share heads out among ranks; return what they keep together.

    Args:
        order: the rank that each one takes itself for.
    """
    parts = [
        turns_of_rank(own, split, (order or range(num_ranks))[rank], num_ranks)
        for rank, own in enumerate(scores.chunk(num_ranks))
    ]
    assert all(part.shape == (split.selected, 2) for part in parts)
    kept: list[int] = keep_by_turns(torch.stack(parts), scores.shape[1], split).tolist()
    return kept


RANKS = [(1, 1), (2, 2), (4, 2), (4, 4), (6, 3), (9, 3), (14, 2), (14, 7), (32, 8)]


@pytest.mark.parametrize("kind", ["own", "ties", "alike", "related", "not finite"])
@pytest.mark.parametrize(("heads", "num_ranks"), RANKS)
def test_ranks_keep_together_what_all_heads_keep(heads: int, num_ranks: int, kind: str) -> None:
    rng = random.Random(heads * 100 + num_ranks)
    for seed in range(12):
        length = rng.randint(2, 90)
        split = split_budget(rng.randint(1, length - 1), rng.choice([0, 0.25, 0.9, 1]), 4)
        scores = scores_of_kind(kind, heads, length, seed)
        assert kept_by_ranks(scores, split, num_ranks) == keep_tokens(scores, split).tolist()


def test_the_order_of_ranks_is_the_order_of_heads() -> None:
    split, scores = BudgetSplit(4, 20, 8), scores_of_kind("own", 4, 90, seed=1)
    assert kept_by_ranks(scores, split, 2) != kept_by_ranks(scores, split, 2, order=(1, 0))


def test_equal_scores_put_the_older_token_first() -> None:
    assert rank_tokens(torch.tensor([[1.0, 2.0, 1.0, 2.0]])).tolist() == [[1, 3, 0, 2]]


def test_negative_zero_ties_with_zero() -> None:
    assert rank_tokens(torch.tensor([[-0.0, 0.0, -0.0]])).tolist() == [[0, 1, 2]]


def test_infinities_rank_at_the_ends_and_nan_last() -> None:
    scores = torch.tensor([[math.nan, -1.0, math.inf, 3.0, -1e38]])
    assert rank_tokens(scores).tolist() == [[2, 3, 1, 4, 0]]


def test_a_larger_selected_share_contains_the_smaller_set() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(6, 200, generator=generator)
    small = keep_tokens(scores, BudgetSplit(sinks=4, selected=20, recent=16))
    large = keep_tokens(scores, BudgetSplit(sinks=4, selected=50, recent=16))
    assert set(small.tolist()) < set(large.tolist())


def test_scores_are_raw_products_of_each_query_head() -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys = torch.randn(6, 8, generator=generator), torch.randn(5, 2, 8, generator=generator)
    scores = score_tokens(query, keys)
    assert scores.shape == (6, 5)
    assert scores[4, 3].item() == pytest.approx((query[4] @ keys[3, 1]).item(), rel=1e-5)


def test_attention_over_everything_is_dense_attention() -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(4, 8, generator=generator)
    keys, values = torch.randn(2, 9, 2, 8, generator=generator).unbind()
    output = attend_tokens(query, keys, values, torch.arange(9), scale=0.3)
    for head in range(4):
        weights = (keys[:, head // 2] @ query[head] * 0.3).softmax(0)
        torch.testing.assert_close(output[head], weights @ values[:, head // 2])


def test_attention_reads_only_the_kept_tokens() -> None:
    keys, values = torch.full((2, 6, 1, 4), math.nan).unbind()
    keys[[1, 4]], values[[1, 4]] = 1.0, 2.0
    output = attend_tokens(torch.ones(3, 4), keys, values, torch.tensor([1, 4]), scale=1.0)
    torch.testing.assert_close(output, torch.full((3, 4), 2.0))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 2.0}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": 4, "sinks": -1}, "sinks"),
        ({"budget": 4, "sinks": 0.5}, "sinks"),
        ({"budget": 4, "recent_ratio": -0.01}, "recent_ratio"),
        ({"budget": 4, "recent_ratio": 1.5}, "recent_ratio"),
        ({"budget": 4, "recent_ratio": math.nan}, "recent_ratio"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        select_tokens(torch.zeros(2, 9), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("length", [3, 50])
def test_non_finite_scores_are_refused_at_any_length(value: float, length: int) -> None:
    scores = torch.zeros(2, length)
    scores[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        select_tokens(scores, budget=8)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_an_empty_request_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        select_tokens(torch.zeros(shape), budget=8)


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(1, 2, 3), torch.ones(2, 3).int()])
def test_scores_of_another_form_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float tensor"):
        select_tokens(scores, budget=8)


@pytest.mark.parametrize("lists", [1, 2, 6])
def test_attention_over_lists_is_each_heads_attention_over_its_own(lists: int) -> None:
    generator = torch.Generator().manual_seed(lists)
    query = torch.randn(6, 8, generator=generator)
    keys, values = torch.randn(2, 40, 2, 8, generator=generator)
    orders = torch.rand(lists, 40, generator=generator).argsort(dim=1)
    kept = orders[:, :9].sort(dim=1).values
    found = attend_lists(query, keys, values, kept, 0.5)
    for head in range(6):
        mine, group = kept[head * lists // 6], slice(head // 3, head // 3 + 1)
        alone = attend_tokens(query[head : head + 1], keys[:, group], values[:, group], mine, 0.5)
        assert torch.allclose(found[head], alone[0], atol=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_each_row_of_a_run_attends_to_the_tokens_up_to_its_own(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    lengths = [7, width, 12]
    query = torch.randn(3 * width, 6, 8, generator=generator)
    keys, values = torch.randn(2, 40, 2, 8, generator=generator)
    slots = torch.randperm(40, generator=generator)
    indptr = torch.tensor([0, *lengths]).cumsum(0)
    found = attend_runs(query, keys, values, slots, indptr, width=width, scale=0.5)
    for request, (first, length) in enumerate(zip(indptr.tolist(), lengths, strict=False)):
        for row in range(width):
            own = slots[first : first + length - width + row + 1]
            index = request * width + row
            alone = attend_tokens(query[index], keys, values, own, 0.5)
            assert torch.allclose(found[index], alone, atol=1e-6)


def test_scores_of_a_run_may_be_capped() -> None:
    query, keys = torch.full((1, 1, 1), 9.0), torch.tensor([1.0, -1.0]).view(2, 1, 1)
    values = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    slots, indptr = torch.arange(2), torch.tensor([0, 2])
    found = attend_runs(query, keys, values, slots, indptr, width=1, scale=1.0, soft_cap=0.5)
    capped = 0.5 * math.tanh(9.0 / 0.5)
    assert found.item() == pytest.approx(1 / (1 + math.exp(-2 * capped)))


def test_a_row_of_a_run_without_tokens_gives_zeros() -> None:
    query, cache = torch.ones(6, 1, 4), torch.ones(5, 1, 4)
    indptr = torch.tensor([0, 0, 2])
    found = attend_runs(query, cache, cache, torch.arange(2), indptr, width=3, scale=1.0)
    assert found[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]
