"""Scores against numbers worked out by hand, and against all subsets counted one by one."""

import math
import operator
import random
import time
from dataclasses import replace
from itertools import combinations

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.metrics import (
    Estimate,
    estimate,
    majority_at_k,
    pass_at_k,
    percentile,
    score,
    winning_subsets,
)
from lim_sglang.programs.schema import SampleState
from lim_sglang.programs.vote import tally
from tests.builders import make_sample
from tests.evals.results import result, summary

FINISHED, TRUNCATED, ABORTED = SampleState.FINISHED, SampleState.TRUNCATED, SampleState.ABORTED
FOUR = summary(
    result("all right", [0, 0, 0, 0], chosen=0),
    result("right by vote", [0, 1, 1, None], 1, states={3: TRUNCATED}, chosen=1),
    result("wrong by vote", [0, 0, 1, 2], 1, chosen=0),
    result("silent", [None] * 4, states=dict.fromkeys(range(4), TRUNCATED)),
    num_failed=3,
)


def test_scores_equal_those_worked_out_by_hand() -> None:
    found = score(FOUR)
    # pass@1 by question: 1, 1/2, 1/4, 0; the vote: 1, 1, 0, 0.
    assert found.pass_at_1 == found.pass_at[1]
    assert found.pass_at_1.value == pytest.approx(7 / 16)
    squares = [(share - 7 / 16) ** 2 for share in (1, 1 / 2, 1 / 4, 0)]
    assert found.pass_at_1.error == pytest.approx(math.sqrt(sum(squares) / 3 / 4))
    assert found.pass_at[4].value == 3 / 4
    assert found.pass_at[2].value == pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4)
    assert found.majority_at[4].value == found.answered.value == 1 / 2
    assert found.answered.error == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    assert (found.num_questions, found.num_samples, found.num_failed) == (4, 16, 3)
    assert found.truncated == found.answerless == 5 / 16
    assert found.aborted == 0
    assert found.mean_tokens == 25
    # Four samples each of 10, 20, 30 and 40 tokens.
    assert found.percentiles == pytest.approx({50: 25, 90: 40, 99: 40})
    assert found.questions_at == {1: 4, 2: 4, 4: 4}
    assert found.tokens_per_question == 100
    assert found.tokens_per_correct == 400 / 7


def test_an_aborted_sample_costs_tokens_and_is_neither_right_nor_wrong() -> None:
    ended = result("q", [0, 1, None], states={2: ABORTED}, tokens=[10, 20, 70], chosen=0)
    found = score(summary(ended))
    assert found.pass_at_1.value == 1 / 2
    assert (found.num_samples, found.aborted) == (2, 1 / 3)
    assert (found.mean_tokens, found.tokens_per_question) == (15, 100)
    assert found.tokens_per_correct == 100
    assert found.answerless == 0
    silent = score(
        summary(replace(ended, group=(0, None, None), states=(FINISHED, TRUNCATED, ABORTED)))
    )
    assert silent.truncated == silent.answerless == 1 / 2


def test_a_late_sample_counts_for_pass_and_has_no_vote() -> None:
    asked = summary(result("q", [0, 1, 1], 1, late=[2], chosen=0))
    assert pass_at_k(asked, 1).value == pytest.approx(2 / 3)
    assert pass_at_k(asked, 3).value == 1
    assert majority_at_k(asked, 2).value == 0  # one vote each, the earlier one wins
    with pytest.raises(DataError, match="no question with 3"):
        majority_at_k(asked, 3)


def test_questions_with_too_few_samples_are_left_out_of_larger_k_only() -> None:
    asked = summary(result("long", [1, 0, 0]), result("short", [1]))
    found = score(asked)
    assert found.pass_at_1.value == pytest.approx((2 / 3 + 0) / 2)
    assert found.pass_at[3] == Estimate(1.0, None)
    assert list(found.pass_at) == list(found.majority_at) == [1, 2, 3]
    assert found.questions_at == {1: 2, 2: 1, 3: 1}


def test_a_question_without_any_sample_that_ended_has_no_share_and_no_answer() -> None:
    asked = summary(result("q", [0], chosen=0), result("gone", [None], states={0: ABORTED}))
    found = score(asked)
    assert found.pass_at_1 == Estimate(1.0, None)
    assert found.answered.value == 1 / 2
    assert (found.num_questions, found.num_samples, found.aborted) == (2, 1, 1 / 2)
    assert found.tokens_per_question == (10 + 10) / 2


def test_nothing_right_has_no_cost_for_each_right_sample() -> None:
    assert score(summary(result("q", [1, 1]))).tokens_per_correct is None


@pytest.mark.parametrize(
    ("groups", "right", "expected"),
    [
        ([0, 1], 0, 1.0),
        ([0, 1], 1, 0.0),
        ([0, 1, 1], 1, 1.0),
        ([None, 0], 0, 1.0),
        ([None, None], 0, 0.0),
        ([0, 1, 1, 0], 1, 0.0),
        ([1, 0, 0, 1], 1, 1.0),
    ],
    ids=["tie", "tie lost", "more votes", "silence has no vote", "all silent", "2:2", "2:2 won"],
)
def test_the_vote_of_all_samples(groups: list[int | None], right: int, expected: float) -> None:
    asked = summary(result("q", groups, right))
    assert majority_at_k(asked, len(groups)).value == expected


def test_the_answer_is_that_of_the_earliest_vote_for_it() -> None:
    """Equality is not transitive: a group may hold answers that are graded differently."""
    assert winning_subsets((0, 0, 1), (True, False, False)) == (0, 1, 2, 1)
    assert winning_subsets((0, 0, 1), (False, True, False)) == (0, 1, 1, 0)
    assert winning_subsets((0, 1, 2, 2), (True, True, False, False))[1] == 2


def _vote_of(groups: list[int | None], subset: tuple[int, ...]) -> int | None:
    """Where the answer of the subset stands."""
    votes: dict[int, list[int]] = {}
    for place in subset:
        if (group := groups[place]) is not None:
            votes.setdefault(group, []).append(place)
    return min(votes.values(), key=lambda voters: (-len(voters), voters[0]))[0] if votes else None


@pytest.mark.parametrize("mixed", [False, True], ids=["one group is right", "any sample may be"])
@pytest.mark.parametrize("seed", range(6))
def test_both_scores_of_k_samples_equal_the_mean_over_all_subsets(seed: int, mixed: bool) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        groups = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(1, 9))]
        asked = result("q", groups, rng.choice([0, 1, 2]))
        if mixed:
            correct = tuple(group is not None and rng.random() < 0.5 for group in groups)
            asked = replace(asked, correct=correct)
        k = rng.randint(1, len(groups))
        subsets = list(combinations(range(len(groups)), k))
        passed = sum(any(asked.correct[n] for n in subset) for subset in subsets)
        winners = [_vote_of(groups, subset) for subset in subsets]
        voted = sum(n is not None and asked.correct[n] for n in winners)
        of = summary(asked)
        assert pass_at_k(of, k).value == pytest.approx(passed / len(subsets), abs=1e-12)
        assert majority_at_k(of, k).value == pytest.approx(voted / len(subsets), abs=1e-12)


def test_the_vote_counted_here_is_the_one_that_programs_take() -> None:
    rng = random.Random(11)
    for _ in range(200):
        groups = [rng.choice([None, 0, 1, 2]) for _ in range(rng.randint(1, 8))]
        samples = [make_sample(n, None if g is None else str(g)) for n, g in enumerate(groups)]
        winner = tally(samples, operator.eq).winner
        asked = summary(result("q", groups, 1))
        assert majority_at_k(asked, len(groups)).value == float(winner == "1")


def test_votes_of_64_samples_are_counted_exactly_and_in_time() -> None:
    rng = random.Random(4)
    groups = tuple(rng.choice([None, 0, 0, 0, 1, 1, 2, 3, 4, 5]) for _ in range(64))
    began_s = time.process_time()
    right, wrong = (
        winning_subsets(groups, tuple(g is not None and (g == 0) == is_right for g in groups))
        for is_right in (True, False)
    )
    assert time.process_time() - began_s < 1
    silent = groups.count(None)
    for k in range(65):  # each subset is right, wrong or silent
        assert right[k] + wrong[k] + math.comb(silent, k) == math.comb(64, k)
    assert 0.5 < right[32] / math.comb(64, 32) < 1


def test_no_sample_is_no_score() -> None:
    with pytest.raises(DataError, match="nothing to score"):
        score(summary(result("q", [None], states={0: ABORTED})))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], Estimate(1.0, None)),
        ([0.0, 1.0], Estimate(0.5, 0.5)),
        ([0.5, 0.5, 0.5], Estimate(0.5, 0.0)),
    ],
    ids=["one question", "two", "no spread"],
)
def test_the_error_is_of_the_mean_between_questions(
    values: list[float], expected: Estimate
) -> None:
    found = estimate(values)
    assert found.value == expected.value
    assert found.error == (None if expected.error is None else pytest.approx(expected.error))


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)], ids=str)
def test_percentiles_lie_between_neighbours(percent: int, expected: float) -> None:
    assert percentile([1, 2, 3, 4], percent) == pytest.approx(expected)
