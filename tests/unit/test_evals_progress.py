"""What a run shows while it goes on."""

import io

import pytest
from rich.console import Console

from lim_sglang.evals.progress import BarProgress, LineProgress, Pace, show_progress
from lim_sglang.evals.records import GradedSample
from lim_sglang.programs.records import Sample, SampleState


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def graded(correct: bool) -> GradedSample:
    sample = Sample(0, SampleState.FINISHED, "", "4", 50, 1.0, None, False, "")
    return GradedSample("q", "4", correct, sample)


def test_pace_tells_accuracy_speed_and_time_left() -> None:
    clock = Clock()
    pace = Pace(10, [], clock)
    assert pace.describe() == "0/10 samples"
    clock.now_s += 4
    pace.count(graded(True))
    pace.count(graded(False))
    assert pace.describe() == "2/10 samples, 50.0 % right, 25 tokens/s, 16s left"


def test_resumed_samples_count_for_accuracy_and_not_for_speed() -> None:
    clock = Clock()
    pace = Pace(5000, [graded(True)] * 3, clock)
    assert pace.describe() == "3/5000 samples, 100.0 % right"
    clock.now_s += 2
    pace.count(graded(False))
    assert pace.describe() == "4/5000 samples, 75.0 % right, 25 tokens/s, 2h46m left"


def test_failures_are_counted_apart() -> None:
    pace = Pace(4, [graded(True)], Clock())
    pace.count(None)
    assert pace.describe() == "1/4 samples, 100.0 % right, 1 failed"


def test_without_a_terminal_a_line_comes_every_ten_seconds() -> None:
    clock = Clock()
    text = io.StringIO()
    with LineProgress(Console(file=text), Pace(4, [], clock), clock) as progress:
        for _ in range(4):
            clock.now_s += 6
            progress.update(graded(True))
    starts = [line.split(",")[0] for line in text.getvalue().splitlines()]
    assert starts == ["0/4 samples", "2/4 samples", "4/4 samples"]


@pytest.mark.parametrize(("terminal", "kind"), [(True, BarProgress), (False, LineProgress)])
def test_the_console_decides_the_display(terminal: bool, kind: type) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with show_progress(console, Pace(2, [], Clock())) as progress:
        progress.update(graded(True))
        progress.update(None)
    assert isinstance(progress, kind)
