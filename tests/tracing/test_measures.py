"""Measures of kept sets, on lists that can be read."""

import itertools
import random

import pytest
import torch

from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.tracing.measures import (
    attention_recall,
    mean_jaccard,
    own_sets,
    ranks_deep,
    share_kept,
)

SPLIT = BudgetSplit(sinks=1, selected=2, recent=2)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([[0, 1]], (0.3 + 1.0 + 0.5 + 0.9) / 4),  # a list for all heads
        ([[0, 1], [2, 3]], (0.3 + 1.0 + 0.5 + 0.1) / 4),  # for each KV head, of two query heads
        ([[3], [0], [2], [1]], (0.4 + 0.5 + 0.25 + 0.8) / 4),  # for each query head
        ([[0, 1, 2, 3]], 1.0),
    ],
)
def test_recall_is_each_heads_mass_in_its_own_list(kept: list[list[int]], expected: float) -> None:
    weights = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0, 0], [0.25] * 4, [0.1, 0.8, 0.05, 0.05]]
    found = attention_recall(torch.tensor(weights), torch.tensor(kept))
    assert found == pytest.approx(expected)


def test_the_share_that_stays_is_of_the_new_set_list_by_list() -> None:
    kept = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert share_kept(kept, torch.tensor([[0, 1, 2, 9], [4, 5, 6, 7]])) == (0.5 + 0.25) / 2
    assert share_kept(kept[:1], torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])) == 1.0


def test_jaccard_is_common_tokens_over_all_for_each_pair_of_heads() -> None:
    generator = random.Random(0)
    sets = [generator.sample(range(20), 6) for _ in range(5)]
    pairs = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in itertools.combinations(sets, 2)]
    assert mean_jaccard(torch.tensor(sets)) == pytest.approx(sum(pairs) / len(pairs))
    assert mean_jaccard(torch.tensor([[3, 5], [5, 3]])) == 1.0


def test_nothing_overlaps_for_one_head_or_empty_sets() -> None:
    assert mean_jaccard(torch.tensor([[1, 2]])) is None
    assert mean_jaccard(torch.empty(2, 0, dtype=torch.int64)) is None


def test_own_sets_have_sinks_and_newest_tokens_or_the_ranked_tokens_alone() -> None:
    scores = torch.tensor([[9, 1, 5, 7, 2, 9, 9], [0, 8, 1, 2, 6, 0, 0]], dtype=torch.float32)
    whole, ranked = own_sets(scores, SPLIT)
    assert whole.tolist() == [[0, 2, 3, 5, 6], [0, 1, 4, 5, 6]]
    assert ranked.tolist() == [[1, 2], [0, 3]]  # tokens 2 and 3, and 1 and 4, behind the sink
    assert mean_jaccard(whole) == pytest.approx(3 / 7)
    assert mean_jaccard(ranked) == 0.0


@pytest.mark.parametrize(
    ("scores", "deep"),
    [
        ([[0, 4, 3, 2, 0, 0], [0, 2, 3, 4, 0, 0]], 1),  # both heads name another token first
        ([[0, 4, 3, 2, 0, 0], [0, 4, 3, 2, 0, 0]], 2),  # they agree: one token a rank
        ([[0, 4, 3, 2, 0, 0], [0, 4, 2, 3, 0, 0]], 2),
    ],
)
def test_the_union_goes_as_deep_as_its_last_token(scores: list[list[float]], deep: int) -> None:
    assert ranks_deep(torch.tensor(scores, dtype=torch.float32), SPLIT) == deep
