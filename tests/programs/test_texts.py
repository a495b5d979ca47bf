r"""Answers that are texts: how they are trimmed, and where a reply states them."""

import pytest

from lim_sglang.evals.grading import Grader
from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.grading.kinds import AnswerKind, fault_of_reference
from lim_sglang.programs.grading.texts import as_text
from lim_sglang.programs.schema import Sample, SampleState
from lim_sglang.programs.vote import tally


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        ("blue lamp", "blue lamp"),
        (" blue\n  lamp\t", "blue lamp"),
        ("**blue lamp.**", "blue lamp"),
        ('"blue lamp."', "blue lamp"),
        ("“blue lamp”", "blue lamp"),
        ("`blue lamp`;", "blue lamp"),
        ("$blue lamp$", "blue lamp"),
        (r"\text{blue lamp}", "blue lamp"),
        (r"\textbf{ blue lamp. }", "blue lamp"),
        (r"\mathrm{\text{blue lamp}}", r"\mathrm{\text{blue lamp}}"),
        ("Blue Lamp", "Blue Lamp"),
        ("blue_lamp_", "blue_lamp_"),
        ("(blue) lamp!", "(blue) lamp!"),
        ('"blue lamp', '"blue lamp'),
        ("**blue lamp", "**blue lamp"),
        ("blue lamp`", "blue lamp`"),
        ("'blue lamp\"", "'blue lamp\""),
        ("$5", "$5"),
        ("the dogs'", "the dogs'"),
        ("'the dog's lamp'", "the dog's lamp"),
        ("'the dogs' lamp'", "the dogs' lamp"),
        ("'rock 'n' roll'", "rock 'n' roll"),
        ("'the dog' and 'the cat'", "'the dog' and 'the cat'"),
        ('"blue" and "red"', '"blue" and "red"'),
        ("007", "007"),
        ("a, b", "a, b"),
        (" . ", None),
        ("", None),
        (r"\text{}", None),
    ],
)
def test_white_space_pairs_of_quotes_and_stops_are_trimmed_and_nothing_else(
    text: str, trimmed: str | None
) -> None:
    assert as_text(text) == trimmed


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"So \boxed{\text{blue lamp}}.", "blue lamp"),
        (r"\boxed{red} and then, in the end, \boxed{blue lamp}", "blue lamp"),
        (r"\boxed{blue lamp} is what I found. The answer is below.", "blue lamp"),
        (r"\boxed{x + 1}", "x + 1"),
        ("The answer is blue lamp. It stood there.", "blue lamp"),
        ("The answer is red.\nThe final answer is: **blue lamp**", "blue lamp"),
        ("**Answer:** blue lamp", "blue lamp"),
        ("**Answer: blue lamp**", "blue lamp"),
        ('"The answer is blue lamp"', "blue lamp"),
        ('The answer is blue lamp"', 'blue lamp"'),
        (r"\boxed{**blue lamp}", "**blue lamp"),
        (r"\boxed{$5}", "$5"),
        ("The answer to question 3 is v1.5 now.", "v1.5 now"),
        ("Some steps.\n#### blue lamp", "blue lamp"),
        ("Look: <answer>blue\nlamp</answer>", "blue lamp"),
        ("blue lamp", "blue lamp"),
        (" 'blue lamp.' \n", "blue lamp"),
        ("D)", "D)"),
        ("I saw it.\nIt was somewhere.", None),
        (r"\boxed{}", None),
        ("The answer is not red", "The answer is not red"),
        (r"\boxed{red} is wrong. Let me see", None),
        (r"The answer is \boxed{blue la", None),
        ("", None),
        ("<think>The answer is red.</think>\\boxed{blue lamp}", "blue lamp"),
        ("<think>I take \\boxed{blue lamp}.</think>\nThat was it.\nBye.", "blue lamp"),
        ("blue lamp<|im_end|>", "blue lamp"),
    ],
)
def test_a_text_is_read_from_a_box_a_statement_or_a_whole_reply(
    reply: str, answer: str | None
) -> None:
    assert extract_answer(reply, AnswerKind.TEXT) == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("blue la", None),
        ("The answer is blue la", None),
        ("The answer is blue lamp. It st", "blue lamp"),
        ("The answer is blue lamp\nIt st", "blue lamp"),
        (r"\boxed{blue lamp} it st", "blue lamp"),
    ],
)
def test_of_a_reply_that_was_cut_off_an_ended_statement_counts(
    reply: str, answer: str | None
) -> None:
    assert extract_answer(reply, AnswerKind.TEXT, cut_off=True) == answer


def test_texts_are_equal_only_if_nothing_but_trimming_tells_them_apart() -> None:
    with EquivalenceChecker() as checker:
        grader = Grader(AnswerKind.TEXT, checker)
        assert grader.correct("0.5", "0.5")
        assert not grader.correct("0.5", r"\frac12")
        assert not grader.correct("48213", "48,213")
        assert not grader.correct("Blue lamp", "blue lamp")
        assert grader.correct("blue lamp", ' "blue  lamp." ')
        assert not grader.correct("blue lamp", None)
        assert not grader.equivalent("...", "---")


def test_texts_vote_together_if_they_are_equal() -> None:
    def sample(index: int, answer: str) -> Sample:
        state = SampleState.FINISHED
        return Sample(index, state, answer, answer, 5, 0.1, None, seed_honoured=False, rid="r")

    with EquivalenceChecker() as checker:
        answers = ["1/2", "0.5", '"0.5"', "Half"]
        vote = tally(
            [sample(n, answer) for n, answer in enumerate(answers)],
            Grader(AnswerKind.TEXT, checker).equivalent,
        )
    assert [(group.answer, group.votes) for group in vote.groups] == [
        ("0.5", 2),
        ("1/2", 1),
        ("Half", 1),
    ]


@pytest.mark.parametrize(
    ("answer", "is_refused"),
    [("blue lamp", False), ("(", False), ('"."', True), (" ", True)]
    + [(sign, True) for sign in ("*", '"', "**", "$", "'")],
)
def test_a_reference_must_leave_something_after_trimming(answer: str, is_refused: bool) -> None:
    fault = fault_of_reference(answer, AnswerKind.TEXT)
    assert (fault is not None) is is_refused
