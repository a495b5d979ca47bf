"""The vote: the same whatever order samples end in, and each sample counted exactly once."""

from collections.abc import Callable
from itertools import permutations

import pytest

from lim_sglang.programs.records import SampleState
from lim_sglang.programs.vote import Group, Tally, tally
from tests.unit.samples import make_sample

FINISHED, TRUNCATED, FAILED = SampleState


def as_numbers(a: str, b: str) -> bool:
    return float(a) == float(b)


def within_one(a: str, b: str) -> bool:
    """Equality that is symmetric but not transitive, as math-verify's is."""
    return abs(float(a) - float(b)) <= 1


def vote(*answers: str | None, same: Callable[[str, str], bool] = as_numbers) -> Tally:
    return tally([make_sample(index, answer) for index, answer in enumerate(answers)], same)


@pytest.mark.parametrize(
    ("answers", "winner", "votes"),
    [
        ((), None, 0),
        ((None, None), None, 0),
        (("5",), "5", 1),
        (("4", "5", "5"), "5", 2),
        (("4", "5.0", "5"), "5.0", 2),
        (("4", None, None, None), "4", 1),
    ],
)
def test_the_most_votes_win_in_the_words_of_the_earliest_sample(
    answers: tuple[str | None, ...], winner: str | None, votes: int
) -> None:
    result = vote(*answers)
    assert (result.winner, result.votes) == (winner, votes)


def test_at_a_tie_the_group_with_the_earlier_sample_wins() -> None:
    assert vote("7", "5", "5.0", "7.0", "9").groups == (
        Group("7", (0, 3)),
        Group("5", (1, 2)),
        Group("9", (4,)),
    )


@pytest.mark.parametrize("same", [as_numbers, within_one])
def test_the_order_in_which_samples_end_is_of_no_account(
    same: Callable[[str, str], bool],
) -> None:
    samples = [
        make_sample(0, "2"),
        make_sample(1, "3"),
        make_sample(2, "1.0", TRUNCATED),
        make_sample(3, None),
        make_sample(4, "3.0"),
        make_sample(5, None, FAILED),
    ]
    tallies = {tally(order, same) for order in permutations(samples)}
    assert len(tallies) == 1


def test_an_answer_joins_the_first_group_whose_earliest_answer_it_equals() -> None:
    # 2 equals both 1 and 3, which differ; 3 stays apart, though the first group holds a 2.
    assert vote("1", "3", "2", same=within_one).groups == (Group("1", (0, 2)), Group("3", (1,)))
    assert vote("1", "2", "3", same=within_one).groups == (Group("1", (0, 1)), Group("3", (2,)))


@pytest.mark.parametrize(
    ("state", "answer", "votes", "unanswered", "truncated", "failed"),
    [
        (FINISHED, "5", 1, 0, 0, 0),
        (FINISHED, None, 0, 1, 0, 0),
        (TRUNCATED, "5", 1, 0, 0, 0),
        (TRUNCATED, None, 0, 0, 1, 0),
        (FAILED, None, 0, 0, 0, 1),
        (FAILED, "5", 0, 0, 0, 1),
    ],
)
def test_each_sample_is_counted_once(
    state: SampleState,
    answer: str | None,
    votes: int,
    unanswered: int,
    truncated: int,
    failed: int,
) -> None:
    result = tally([make_sample(0, answer, state)], as_numbers)
    counts = (result.votes, result.unanswered, result.truncated, result.failed)
    assert counts == (votes, unanswered, truncated, failed)


def test_all_samples_are_somewhere_and_their_indices_need_not_begin_at_zero() -> None:
    samples = [
        make_sample(8, "5"),
        make_sample(3, "6", TRUNCATED),
        make_sample(5, None, TRUNCATED),
        make_sample(4, None, FAILED),
        make_sample(9, None),
        make_sample(6, "5.0"),
    ]
    result = tally(samples, as_numbers)
    assert result == Tally((Group("5.0", (6, 8)), Group("6", (3,))), 1, 1, 1)
    assert sum(g.votes for g in result.groups) + 3 == len(samples)


def test_equal_texts_are_one_group_without_asking() -> None:
    def never(a: str, b: str) -> bool:
        raise AssertionError((a, b))

    assert vote("5", "5", "5", same=never).votes == 3


def test_each_new_answer_is_asked_once_for_each_group() -> None:
    asked: list[tuple[str, str]] = []

    def same(a: str, b: str) -> bool:
        asked.append((a, b))
        return as_numbers(a, b)

    vote("1", "2", "1.0", "3", same=same)
    assert asked == [("1", "2"), ("1", "1.0"), ("1", "3"), ("2", "3")]
