"""Times of an extraction at two lengths, whose ratio says whether it is linear."""

import time
from collections.abc import Callable

import pytest

from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.grading.latex import plain


def seconds(text: str, read: Callable[[str], object] = extract_answer) -> float:
    """Return the least time of three extractions."""

    def once() -> float:
        began = time.process_time()
        read(text)
        return time.process_time() - began

    return min(once() for _ in range(3))


@pytest.mark.parametrize(
    "piece",
    [
        *("1,", "10,", "1.", ".3", "1/2/", "$1 ", "1%", "x=", "1+", "-1", "wait ", "half of "),
        *(r"\boxed{5}+", r"\boxed{1", "a = ", "12 and ", "the answer is 5. No, ", "I forgot "),
        *("I change my answer to ", "the problem asks for 2 + ", "I exclude ", "**5** "),
        *("the answer is 5. Check: 6, not 5. ", "I hope you like it. ", "is half of the sum of 3 "),
        *("<answer>5</answer> No, ", "</answer>", "only C remains, ", "eliminating A, "),
    ],
)
@pytest.mark.parametrize("frame", ["{}", r"\boxed{{{}1}}", "So we get {}", r"$\boxed{{5}}{}$"])
def test_four_times_the_characters_take_four_times_as_long(piece: str, frame: str) -> None:
    short, long = (
        seconds(frame.format(piece * (number // len(piece)))) for number in (20_000, 80_000)
    )
    assert long < 10 * short + 0.02


@pytest.mark.parametrize("piece", ["'", '"', "` ", "a' ", "'a"])
def test_quotation_marks_in_an_answer_take_four_times_as_long(piece: str) -> None:
    short, long = (seconds("x" + piece * (n // len(piece)), plain) for n in (20_000, 80_000))
    assert long < 10 * short + 0.02
