"""Scores against numbers worked out by hand."""

import io
import math
import random

import pytest
from rich.console import Console

from lim_sglang.errors import DataError
from lim_sglang.evals.grade import AnswerKind, Grader
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.score import Estimate, estimate, score_samples
from lim_sglang.evals.table import score_table
from lim_sglang.programs.records import Sample, SampleState

GOLD = "4"


def samples_of(question_id: str, *answers: str | None) -> list[GradedSample]:
    """Samples that gave these answers, in this order, of 10, 20, … tokens; no answer: truncated."""
    return [
        GradedSample(
            question_id,
            GOLD,
            answer == GOLD,
            Sample(
                index=index,
                state=SampleState.TRUNCATED if answer is None else SampleState.FINISHED,
                text="",
                answer=answer,
                num_tokens=10 * (index + 1),
                latency_s=1.0,
                seed=None,
                seed_honoured=False,
                rid="",
            ),
        )
        for index, answer in enumerate(answers)
    ]


def same(a: str, b: str) -> bool:
    return a == b


SAMPLES = [
    *samples_of("all right", "4", "4", "4", "4"),
    *samples_of("right by vote", "5", "4", "4", None),
    *samples_of("wrong by vote", "5", "5", "4", "6"),
    *samples_of("silent", None, None, None, None),
]


def test_scores_equal_those_worked_out_by_hand() -> None:
    score = score_samples(SAMPLES, same)
    # pass@1 by question: 1, 1/2, 1/4, 0; their mean is 7/16, and so on for the vote: 1, 1, 0, 0.
    assert score.pass_at_1.value == pytest.approx(7 / 16)
    squares = [(share - 7 / 16) ** 2 for share in (1, 1 / 2, 1 / 4, 0)]
    assert score.pass_at_1.error == pytest.approx(math.sqrt(sum(squares) / 3 / 4))
    assert score.majority.value == 0.5
    assert score.majority.error == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    assert (score.num_questions, score.num_samples) == (4, 16)
    assert score.truncated == score.answerless == 5 / 16
    assert score.mean_tokens == 25


def test_the_order_in_which_samples_ended_changes_nothing() -> None:
    shuffled = SAMPLES.copy()
    random.Random(3).shuffle(shuffled)
    assert score_samples(shuffled, same) == score_samples(SAMPLES, same)


def test_each_question_weighs_the_same_however_many_samples_it_has() -> None:
    samples = [*samples_of("many", "4", "4", "4"), *samples_of("one", "5")]
    assert score_samples(samples, same).pass_at_1.value == 0.5


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("4", "5"), True),
        (("5", "4"), False),
        (("5", "4", "4.0"), True),
        (("5", None, None), False),
        ((None, None, "4"), True),
        ((None,), False),
    ],
)
def test_a_vote_counts_equal_answers_and_breaks_ties_by_the_earlier(
    answers: tuple[str | None, ...], right: bool
) -> None:
    score = score_samples(samples_of("q", *answers), lambda a, b: float(a) == float(b))
    assert score.majority == Estimate(float(right), None)


def test_one_question_shows_no_error() -> None:
    assert estimate([0.25]) == Estimate(0.25, None)


def test_nothing_finished_is_an_error_not_a_zero() -> None:
    with pytest.raises(DataError, match="no sample is finished"):
        score_samples([], same)


def test_the_table_shows_scores_with_their_conditions() -> None:
    settings = {
        "task": "math500",
        "num_samples": 4,
        "server": {"model_path": "/models/tiny/"},
        "lim": {"config": {"policy": "lessismore", "budget": 256}},
    }
    text = io.StringIO()
    table = score_table(settings, score_samples(SAMPLES, same), num_failed=3)
    Console(file=text, width=80).print(table)
    shown = " ".join(text.getvalue().split())
    for expected in [
        "math500, tiny, lessismore-256",
        "pass@1 │ 43.8 ± 21.3 %",
        "maj@4 │ 50.0 ± 28.9 %",
        "truncated │ 31.2 %",
        "mean tokens │ 25",
        "failed, not scored │ 3",
    ]:
        assert expected in shown


class LoudJudge:
    """Tells when it is asked."""

    def same(self, a: str, b: str) -> bool:
        raise AssertionError("asked although there was no need")

    correct = same


def test_no_answer_is_not_right_and_the_judge_is_not_asked() -> None:
    assert not Grader(AnswerKind.EXPRESSION, LoudJudge()).correct("4", None)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("25", "25", True),
        ("25", "025", True),
        ("025", "25", True),
        ("25", "$25$.", True),
        ("25", "26", False),
        ("25", "25x", False),
        ("25", r"\frac{50}{2}", False),
    ],
)
def test_aime_answers_are_integers(gold: str, answer: str, right: bool) -> None:
    grader = Grader(AnswerKind.INTEGER, LoudJudge())
    assert grader.correct(gold, answer) is right
    assert grader.same(gold, answer) is right
