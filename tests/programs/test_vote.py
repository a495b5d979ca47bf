"""The vote: the same in whatever order samples end, and each sample counted exactly once."""

import random
from collections.abc import Callable
from itertools import permutations

import pytest

from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.schema import Sample, SampleState
from lim_sglang.programs.vote import Group, Order, Tally, tally
from tests.builders import make_sample

FINISHED, TRUNCATED, FAILED, ABORTED = SampleState


def as_numbers(a: str, b: str) -> bool:
    return float(a) == float(b)


def within_one(a: str, b: str) -> bool:
    """Compare symmetrically but not transitively, as math-verify does."""
    return abs(float(a) - float(b)) <= 1


def vote(*answers: str | None, equivalent: Callable[[str, str], bool] = as_numbers) -> Tally:
    return tally([make_sample(index, answer) for index, answer in enumerate(answers)], equivalent)


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
        Group("7", (0, 3), 2.0, 10),
        Group("5", (1, 2), 2.0, 10),
        Group("9", (4,), 1.0, 10),
    )


def of_order(order: Order, *samples: tuple[str, int, float | None]) -> str:
    """Return the answers of a vote as an order ranks them."""
    made = [
        make_sample(index, answer, num_tokens=num_tokens, confidence=confidence)
        for index, (answer, num_tokens, confidence) in enumerate(samples)
    ]
    return "".join(group.answer for group in tally(made, str.__eq__, order).groups)


@pytest.mark.parametrize(
    ("samples", "by_votes", "by_confidence", "shorter_first"),
    [
        # Votes against weight: two doubtful chains and a sure one.
        ((("A", 9, 2.0), ("B", 9, 9.0), ("A", 9, 3.0)), "AB", "BA", "AB"),
        # A tie in votes: by weight, by the shortest chain of a group, else the earlier sample.
        ((("A", 30, 5.0), ("B", 20, 6.0)), "BA", "BA", "BA"),
        ((("A", 30, 6.0), ("B", 20, 5.0)), "AB", "AB", "BA"),
        ((("A", 30, 5.0), ("B", 30, 5.0)), "AB", "AB", "AB"),
        ((("B", 9, 1.0), ("A", 9, 1.0), ("A", 50, 1.0), ("B", 7, 1.0)), "BA", "BA", "BA"),
        ((("A", 8, 1.0), ("B", 9, 1.0), ("B", 7, 1.0), ("A", 90, 1.0)), "AB", "AB", "BA"),
        # A tie in weight: by votes.
        ((("A", 9, 4.0), ("B", 9, 2.0), ("B", 9, 2.0)), "BA", "BA", "BA"),
        # One vote without a confidence: weights are votes.
        ((("A", 9, 99.0), ("B", 9, None), ("B", 9, 1.0)), "BA", "BA", "BA"),
        ((("A", 9, 1.0), ("B", 9, 99.0), ("C", 9, None)), "ABC", "ABC", "ABC"),
        # Sums that differ in their last bit only where they are added up one by one.
        ((*[("A", 9, 0.1)] * 10, *[("B", 9, w) for w in (0.5, 0.5)]), "AB", "AB", "AB"),
    ],
)
def test_an_order_ranks_the_groups(
    samples: tuple[tuple[str, int, float | None], ...],
    by_votes: str,
    by_confidence: str,
    shorter_first: str,
) -> None:
    expected = dict(zip(Order, (by_votes, by_confidence, shorter_first), strict=True))
    assert {order: of_order(order, *samples) for order in Order} == expected


@pytest.mark.parametrize(
    ("answers", "order", "margin"),
    [
        ("", Order.BY_VOTES, 0),
        ("A", Order.BY_VOTES, 1),
        ("AAAB", Order.BY_VOTES, 2),
        ("ABBA", Order.BY_VOTES, 0),
        ("ABBBCC", Order.BY_VOTES, 1),
        ("ABB", Order.BY_CONFIDENCE, -1),
    ],
)
def test_the_margin_is_between_the_first_two_groups(
    answers: str, order: Order, margin: int
) -> None:
    # An A is surer than two Bs.
    samples = [
        make_sample(i, a, confidence=9.0 if a == "A" else 1.0) for i, a in enumerate(answers)
    ]
    assert tally(samples, str.__eq__, order).margin == margin


def test_the_weight_is_the_sum_of_the_confidences_of_those_who_vote() -> None:
    samples = [
        make_sample(0, "5", confidence=2.5),
        make_sample(1, None),
        make_sample(2, "5.0", TRUNCATED, confidence=1.25, num_tokens=7),
        make_sample(3, "5", ABORTED),
        make_sample(4, "5", FAILED, confidence=100.0),
    ]
    assert tally(samples, as_numbers).groups == (Group("5", (0, 2), 3.75, 7),)


@pytest.mark.parametrize("equivalent", [as_numbers, within_one])
def test_the_order_in_which_samples_end_is_of_no_account(
    equivalent: Callable[[str, str], bool],
) -> None:
    samples = [
        make_sample(0, "2"),
        make_sample(1, "3"),
        make_sample(2, "1.0", TRUNCATED),
        make_sample(3, None),
        make_sample(4, "3.0"),
        make_sample(5, "4", ABORTED),
    ]
    tallies = {tally(order, equivalent) for order in permutations(samples)}
    assert len(tallies) == 1


@pytest.mark.parametrize("order", Order)
def test_weights_do_not_depend_on_the_order_in_which_they_come(order: Order) -> None:
    rng = random.Random(0)
    samples: list[Sample] = [
        make_sample(i, rng.choice("123"), num_tokens=rng.randrange(99), confidence=rng.random())
        for i in range(30)
    ]
    tallies = set()
    for _ in range(50):
        rng.shuffle(samples)
        tallies.add(tally(samples, as_numbers, order))
    assert len(tallies) == 1


def test_an_answer_joins_the_first_group_of_which_it_equals_all_answers() -> None:
    # 2 equals both 1 and 3, which differ, and are never in one group, not even behind a 2.
    found = [vote(*answers, equivalent=within_one).groups for answers in ("132", "123", "2132")]
    assert [[group.indices for group in groups] for groups in found] == [
        [(0, 2), (1,)],
        [(0, 1), (2,)],
        [(0, 1, 3), (2,)],
    ]


@pytest.mark.parametrize(
    ("first", "vague", "second"),
    [
        (r"15\% \text{ decrease}", r"15\%", r"15\% \text{ increase}"),
        (r"\text{area of } 15", "15", r"\text{perimeter of } 15"),
        ("x^2, x > 0", "x^2", "x^2, x < 0"),
        ("0.5", r"50\%", "50"),
    ],
)
def test_incompatible_answers_are_not_counted_together_through_a_vague_one(
    first: str, vague: str, second: str
) -> None:
    with EquivalenceChecker(num_workers=1) as checker:
        for answers in permutations((first, vague, second)):
            groups = vote(*answers, equivalent=checker.equivalent).groups
            together = [{answers[n] for n in group.indices} for group in groups]
            assert not any({first, second} <= members for members in together)


@pytest.mark.parametrize(
    ("state", "answer", "expected"),
    [
        (FINISHED, "5", "votes"),
        (FINISHED, None, "unanswered"),
        (TRUNCATED, "5", "votes"),
        (TRUNCATED, None, "truncated"),
        (FAILED, None, "failed"),
        (FAILED, "5", "failed"),
        (ABORTED, None, "aborted"),
        (ABORTED, "5", "aborted"),
    ],
)
def test_each_sample_is_counted_once(state: SampleState, answer: str | None, expected: str) -> None:
    result = tally([make_sample(0, answer, state)], as_numbers)
    names = ("votes", "unanswered", "truncated", "failed", "aborted")
    assert {name: getattr(result, name) for name in names} == {
        name: int(name == expected) for name in names
    }


def test_equal_texts_are_one_group_without_asking() -> None:
    def never(a: str, b: str) -> bool:
        raise AssertionError((a, b))

    assert vote("5", "5", "5", equivalent=never).votes == 3


def test_each_new_answer_is_asked_once_for_each_group() -> None:
    asked: list[tuple[str, str]] = []

    def equivalent(a: str, b: str) -> bool:
        asked.append((a, b))
        return as_numbers(a, b)

    vote("1", "2", "1.0", "3", equivalent=equivalent)
    assert asked == [("1", "2"), ("1", "1.0"), ("1", "3"), ("2", "3")]
