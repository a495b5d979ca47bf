"""What a run shows while it goes on."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.evals.progress import BarProgress, LineProgress, Pace, show_progress
from lim_sglang.evals.run_store import Failure, GradedSample
from lim_sglang.evals.scheduler import ServerLost
from lim_sglang.programs.schema import Sample, SampleState

FAILURE = Failure("q", 1, "HTTP 400")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def graded(correct: bool, question_id: str = "q") -> GradedSample:
    sample = Sample(0, SampleState.FINISHED, "", "4", 50, 1.0, None, False, "")
    return GradedSample(question_id, "4", correct, sample)


def together(question_id: str, *verdicts: bool) -> tuple[GradedSample, ...]:
    """The samples of a question that come at once."""
    return tuple(replace(graded(each, question_id), of=len(verdicts)) for each in verdicts)


def test_pace_tells_accuracy_speed_and_time_left() -> None:
    clock = Clock()
    pace = Pace(10, [], clock)
    assert pace.describe() == "0/10 samples"
    clock.now_s += 4
    pace.count((graded(True),))
    pace.count((graded(False),))
    assert pace.describe() == "2/10 samples, 50.0 % right, 25 tokens/s, 16s left"


def test_several_runs_are_told_apart_by_their_name() -> None:
    assert Pace(10, [], Clock(), name="aime24").describe() == "aime24: 0/10 samples"


def test_resumed_samples_count_for_accuracy_and_not_for_speed() -> None:
    clock = Clock()
    pace = Pace(5000, [graded(True)] * 3, clock)
    assert pace.describe() == "3/5000 samples, 100.0 % right"
    clock.now_s += 2
    pace.count((graded(False),))
    assert pace.describe() == "4/5000 samples, 75.0 % right, 25 tokens/s, 2h46m left"


def test_a_program_that_stops_by_itself_is_told_by_the_question() -> None:
    clock = Clock()
    pace = Pace(10, together("a", True, True, False), clock, by_question=True)
    assert pace.describe() == "1/10 questions, 66.7 % of samples right"
    clock.now_s += 5
    pace.count(together("b", False))
    assert pace.describe() == "2/10 questions, 50.0 % of samples right, 10 tokens/s, 40s left"


def test_an_aborted_sample_is_neither_right_nor_wrong() -> None:
    aborted = graded(False)
    aborted = replace(aborted, sample=replace(aborted.sample, state=SampleState.ABORTED))
    pace = Pace(2, [], Clock(), by_question=True)
    pace.count((aborted, graded(True)))
    assert pace.describe() == "1/2 questions, 100.0 % of samples right"


def test_failures_are_counted_apart() -> None:
    pace = Pace(4, [graded(True)], Clock())
    pace.count(FAILURE)
    assert pace.describe() == "1/4 samples, 100.0 % right, 1 failed"


def test_nobody_waits_for_what_failed_before() -> None:
    clock = Clock()
    pace = Pace(4, [graded(True)], clock, num_failed=2)
    clock.now_s += 3
    pace.count((graded(True),))
    assert pace.describe() == "2/4 samples, 100.0 % right, 17 tokens/s, 0s left, 2 failed"


def test_a_server_less_is_no_sample() -> None:
    pace = Pace(4, [], Clock())
    pace.count(ServerLost("http://here", ServerError("no server answers")))
    assert pace.describe() == "0/4 samples"


def test_without_a_terminal_a_line_comes_every_ten_seconds() -> None:
    clock = Clock()
    text = io.StringIO()
    with LineProgress(Console(file=text), Pace(4, [], clock), clock) as progress:
        for _ in range(4):
            clock.now_s += 6
            progress.update((graded(True),))
    starts = [line.split(",")[0] for line in text.getvalue().splitlines()]
    assert starts == ["0/4 samples", "2/4 samples", "4/4 samples"]


@pytest.mark.parametrize(("terminal", "kind"), [(True, BarProgress), (False, LineProgress)])
def test_the_console_decides_the_display(terminal: bool, kind: type) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with show_progress(console, Pace(2, [], Clock())) as progress:
        progress.update((graded(True),))
        progress.update(FAILURE)
    assert isinstance(progress, kind)
