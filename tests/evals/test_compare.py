"""Two runs against each other: pairs, what is different, what may be said of it."""

import math
from dataclasses import replace

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import MINUS, Interval, compare, mcnemar, names_of, sentence
from lim_sglang.evals.metrics import Summary
from lim_sglang.programs.schema import SampleState
from tests.evals.results import result, summary

ABORTED = SampleState.ABORTED


def run_of(*shares: tuple[int, int], policy: str = "full", length: int = 100) -> Summary:
    """Questions with so many right of so many samples; the vote is right where most are."""
    questions = (
        result(
            f"q{n}",
            [0] * right + [1] * (total - right),
            tokens=[length + n] * total,
            chosen=0 if 2 * right >= total else 1,
        )
        for n, (right, total) in enumerate(shares)
    )
    return summary(*questions, policy=policy)


A = run_of((4, 4), (2, 4), (1, 4), (0, 4), (3, 4))
B = run_of((4, 4), (1, 4), (1, 4), (0, 4), (1, 4), policy="lim", length=150)


def test_the_difference_is_that_of_the_questions_means() -> None:
    found = compare(A, B)
    assert found.difference.value == pytest.approx((0 - 1 / 4 + 0 + 0 - 2 / 4) / 5)
    assert found.difference.low < found.difference.value < found.difference.high
    assert found.answers.value == pytest.approx(-2 / 5)
    assert found.length_ratio.value == pytest.approx(152 / 102)
    assert 1.4 < found.length_ratio.low < found.length_ratio.value < found.length_ratio.high < 1.6
    assert found.spent_ratio.value == pytest.approx(152 / 102)
    assert (found.a, found.b, found.num_questions) == ("full", "lim", 5)
    assert (found.mcnemar.only_a, found.mcnemar.only_b, found.mcnemar.p) == (2, 0, 0.5)
    assert found.other_differences == ()


def test_questions_count_alike_however_many_samples_they_have() -> None:
    few = run_of((1, 1), (0, 4), policy="lim")
    many = run_of((0, 4), (1, 1))
    assert compare(many, few).difference.value == 0
    assert compare(run_of((4, 4), (0, 1)), run_of((1, 1), (4, 4))).difference.value == 1 / 2


def test_the_other_way_round_everything_is_mirrored() -> None:
    there, back = compare(A, B), compare(B, A)
    assert back.difference.value == -there.difference.value
    assert back.difference.low == pytest.approx(-there.difference.high, abs=0.02)
    assert back.length_ratio.value == pytest.approx(1 / there.length_ratio.value)
    assert (back.mcnemar.only_a, back.mcnemar.only_b) == (0, 2)


def test_the_order_of_the_questions_changes_nothing_that_counts() -> None:
    turned = replace(B, questions=B.questions[::-1])
    assert compare(A, turned).difference == compare(A, B).difference
    assert compare(A, turned).mcnemar == compare(A, B).mcnemar


def test_a_run_compared_with_itself_leaves_room_for_what_was_not_seen() -> None:
    found = compare(A, A)
    assert found.difference.value == 0
    assert -0.6 < found.difference.low < -0.3  # of five questions, one in three may be different
    assert found.difference.high == pytest.approx(-found.difference.low, abs=0.05)
    assert found.mcnemar.p == 1.0
    assert found.length_ratio == Interval(1.0, 1.0, 1.0)
    assert "right in as many of its samples as" in found.sentence
    assert "do not show a difference" in found.sentence


def test_no_interval_goes_beyond_what_can_be() -> None:
    found = compare(run_of(*[(4, 4)] * 3), run_of(*[(0, 4)] * 3, policy="lim"))
    assert found.difference.value == found.difference.low == -1
    assert found.difference.high > -1
    back = compare(run_of(*[(0, 4)] * 3), run_of(*[(4, 4)] * 3, policy="lim"))
    assert back.difference.value == back.difference.high == 1
    assert back.difference.low < 1


def test_a_program_that_stops_by_itself_is_compared_by_its_answers() -> None:
    early = summary(
        *(
            result(
                question.question_id,
                [*question.group[:2], None],
                tokens=[10, 10, 31],
                states={2: ABORTED},
                chosen=0 if n < 3 else None,
            )
            for n, question in enumerate(A.questions)
        ),
        program="adaptive",
    )
    found = compare(A, early)
    assert found.stops_by_itself
    assert found.answers.value == 0
    assert found.length_ratio.value == pytest.approx(10 / 102)
    assert found.spent_ratio.value == pytest.approx(51 / 408)
    low, high = found.spent_ratio.low, found.spent_ratio.high
    assert found.sentence.startswith(
        "full adaptive answers as many questions rightly as full majority (95 % interval "
    )
    assert found.sentence.endswith(
        f"it spends 0.12 times as many tokens a question ({low:.2f} to {high:.2f})."
    )


def test_a_question_that_was_aborted_altogether_has_no_share_but_no_right_answer() -> None:
    gone = result("q4", [None], states={0: ABORTED}, tokens=[5])
    stopped = replace(B, questions=(*B.questions[:4], gone))
    found = compare(A, stopped)
    assert found.num_questions == 5
    assert found.difference.value == pytest.approx(-1 / 4 / 4)
    assert found.answers.value == pytest.approx(-2 / 5)
    assert found.length_ratio.value == pytest.approx(151.5 / 101.5)
    assert found.spent_ratio.value == pytest.approx((4 * 606 + 5) / (4 * 510))
    nothing = tuple(replace(gone, question_id=f"q{n}") for n in range(1, 5))
    with pytest.raises(DataError, match="share 1 questions with samples that ended"):
        compare(A, replace(B, questions=(B.questions[0], *nothing)))


def test_mcnemar_looks_at_questions_that_one_run_alone_answers() -> None:
    answers = [(True, False)] * 3 + [(False, True)] * 9 + [(True, True)] * 5 + [(False, False)]
    found = mcnemar(answers)
    assert (found.only_a, found.only_b) == (3, 9)
    # 1 + 12 + 66 + 220 of 2^12 ways, on both sides.
    assert found.p == pytest.approx(2 * 299 / 4096)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (
            Interval(-0.052, -0.08, -0.02),
            "b is right in 5.2 points fewer of its samples than a "
            "(95 % interval -8.0 to -2.0): the data show a loss; ",
        ),
        (
            Interval(0.04, 0.01, 0.07),
            "b is right in 4.0 points more of its samples than a "
            "(95 % interval +1.0 to +7.0): the data show a gain; ",
        ),
        (
            Interval(-0.012, -0.031, 0.007),
            "b is right in 1.2 points fewer of its samples than a (95 % interval -3.1 to +0.7): "
            "the data do not show a difference, and exclude a loss of more than 3.1 points and "
            "a gain of more than 0.7; ",
        ),
        (
            Interval(0.0004, -0.02, 0.02),
            "b is right in as many of its samples as a (95 % interval -2.0 to +2.0): "
            "the data do not show a difference, and exclude a loss of more than 2.0 points and "
            "a gain of more than 2.0; ",
        ),
    ],
    ids=["loss", "gain", "neither", "nothing"],
)
def test_the_sentence_says_what_the_data_support(difference: Interval, said: str) -> None:
    ratio = Interval(1.02, 0.99, 1.05)
    long = "its samples are 1.02 times as long (0.99 to 1.05)."
    assert sentence("a", "b", difference, ratio) == said.replace(" -", f" {MINUS}") + long


def test_runs_of_other_tasks_or_questions_are_not_compared() -> None:
    with pytest.raises(DataError, match="of sums and run of other"):
        compare(A, summary(*A.questions, task="other"))
    with pytest.raises(DataError, match="their digests are not equal"):
        compare(A, summary(*A.questions, questions="changed"))
    with pytest.raises(DataError, match=r"1 are in one only: q4.*--common"):
        compare(A, summary(*A.questions[:4]))
    with pytest.raises(DataError, match=r"8 are in one only: q2, q3, q4, q5, q6, …"):
        compare(run_of(*[(1, 1)] * 10), run_of((1, 1), (1, 1)))


def test_what_both_have_is_compared_on_demand() -> None:
    found = compare(A, summary(*B.questions[:2], questions="fewer"), common=True)
    assert found.num_questions == 2
    assert found.difference.value == pytest.approx(-1 / 8)
    assert found.other_differences == ("questions: 'digest' and 'fewer'",)
    with pytest.raises(DataError, match="share 1 questions"):
        compare(A, summary(A.questions[0]), common=True)


def test_conditions_that_differ_beside_the_policy_are_named() -> None:
    here, there = (
        summary(
            *A.questions,
            **{"policy": policy, "budget": budget, "dense_layers": [budget], "commit": policy},
            **{"max_tokens": tokens, "versions": {"torch": torch, "sglang": "1"}},
            **{"prompt_sha256": digit * 64},
        )
        for policy, budget, tokens, torch, digit in (
            ("full", None, 10, "2", "a"),
            ("lim", 256, 20, "3", "b"),
        )
    )
    assert compare(here, there).other_differences == (
        "max_tokens: 10 and 20",
        "prompt_sha256: 'aaaaaaaa…' and 'bbbbbbbb…'",
        "versions.torch: '2' and '3'",
    )


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([{}, {"policy": "lim", "budget": 256}], ("full", "lim-256")),
        ([{}, {"program": "adaptive"}], ("full majority", "full adaptive")),
        ([{}, {"model": "big"}], ("tiny full", "big full")),
        ([{}, {}], ("run (1)", "run (2)")),
    ],
    ids=["policy", "program", "model", "nothing"],
)
def test_runs_are_called_by_what_tells_them_apart(
    changes: list[dict[str, object]], names: tuple[str, ...]
) -> None:
    assert names_of([summary(**change) for change in changes]) == names


def test_runs_of_the_same_conditions_are_called_by_their_ids() -> None:
    assert names_of([replace(A, run_id=name) for name in ("x", "y")]) == ("x", "y")


def test_ratios_are_of_means_not_means_of_ratios() -> None:
    a, b = run_of((1, 1), (1, 1), length=100), run_of((1, 1), (1, 1), policy="lim")
    b = replace(
        b,
        questions=tuple(
            replace(q, tokens=(n,)) for q, n in zip(b.questions, (400, 1), strict=True)
        ),
    )
    assert compare(a, b).length_ratio.value == pytest.approx(401 / 201)
    assert math.isfinite(compare(a, b).length_ratio.low)


def test_a_question_without_a_token_counts_one_so_that_every_resample_has_a_ratio() -> None:
    a, b = run_of((0, 1), (0, 1)), run_of((0, 1), (0, 1), policy="lim")
    a, b = (
        replace(run, questions=tuple(replace(q, tokens=(0,)) for q in run.questions))
        for run in (a, b)
    )
    assert compare(a, b).spent_ratio == compare(a, b).length_ratio == Interval(1.0, 1.0, 1.0)
