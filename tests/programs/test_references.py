"""Reference answers at the end of whole solutions."""

import pytest

from lim_sglang.errors import DataError
from lim_sglang.programs.grading.references import reference_answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("72", ("72", None)),
        ("48 + 24 = 72\n#### 72", ("72", "####")),
        ("so 3. #### 1,234", ("1234", "####")),
        (r"The answer is \boxed{3}", ("3", r"\boxed{}")),
        (r"\boxed{3}", ("3", None)),
        ("$12", (r"\$12", None)),  # a price, not the beginning of a formula
        ("$12$", ("$12$", None)),
        ("$x$", ("$x$", None)),
        ("The answer is 4", ("4", "The answer is")),
        (r"The final answer is: $\frac12$.", (r"$\frac12$", "The final answer is:")),
        ("Answer: 3.5", ("3.5", "Answer:")),
        ("The answers are 3 and 4", ("The answers are 3 and 4", None)),
        ("no answer is known", ("no answer is known", None)),
    ],
)
def test_the_answer_is_taken_out_of_its_solution(
    answer: str, expected: tuple[str, str | None]
) -> None:
    assert reference_answer(answer) == expected


@pytest.mark.parametrize("answer", ["one two three " * 7, "#### 3 and more\nof it"])
def test_prose_without_a_mark_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match="no reply can be equal"):
        reference_answer(answer)
