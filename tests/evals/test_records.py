"""Lines of a run's files: what is written is read back, what cannot be is refused."""

from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import Failure, GradedSample
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

PLAIN = GradedSample("q", "4", True, make_sample(2, "4"))
TOGETHER = GradedSample(
    "q", "4", False, make_sample(0, "5", SampleState.TRUNCATED), late=True, of=2
)


@pytest.mark.parametrize("graded", [PLAIN, TOGETHER])
def test_a_sample_comes_back_from_its_row(graded: GradedSample) -> None:
    assert GradedSample.from_row(graded.to_row()) == graded


def test_rows_of_programs_that_draw_everything_are_as_they_always_were() -> None:
    assert not {"late", "of"} & PLAIN.to_row().keys()
    assert TOGETHER.to_row()["of"] == 2
    assert TOGETHER.to_row()["late"] is True


def test_what_is_not_known_of_a_row_is_not_in_the_way() -> None:
    assert GradedSample.from_row(PLAIN.to_row() | {"later": 1}) == PLAIN


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([1], "expected an object"),
        ({"question": "q"}, "has no gold, no correct, no index"),
        (PLAIN.to_row() | {"state": "asleep"}, "unknown state 'asleep'; expected finished"),
        (PLAIN.to_row() | {"of": 0}, "of must be a number of lines, not 0"),
    ],
)
def test_a_row_that_is_no_sample_is_refused(row: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        GradedSample.from_row(row)


def test_a_failure_comes_back_from_its_row() -> None:
    failure = Failure("q", 3, "HTTP 400")
    assert Failure.from_row(failure.to_row()) == failure
    assert failure.key == ("q", 3)
    with pytest.raises(DataError, match="has no error"):
        Failure.from_row({"question": "q", "index": 1})
