"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lim_sglang.evals.run_store import Failure, GradedSample
from lim_sglang.evals.scheduler import Event, ServerLost
from lim_sglang.programs.schema import COMPLETED_STATES

LINE_INTERVAL_S = 10.0


class Pace:
    """Counts of a run, and the speed of this session of it."""

    def __init__(
        self,
        total: int,
        there: Sequence[GradedSample],
        clock: Callable[[], float] = time.monotonic,
        *,
        name: str = "",
        by_question: bool = False,
        num_failed: int = 0,
    ) -> None:
        """Begin at the samples that are there already.

        Args:
            total: of samples, or of questions.
            name: of the run, before everything else.
            by_question: questions are counted, whose samples come together, as many as it takes.
            num_failed: samples or questions that failed before and are left out.
        """
        self.total = total
        self.done = len({graded.question_id for graded in there}) if by_question else len(there)
        self.failed = num_failed
        self.unit = "questions" if by_question else "samples"
        self._head = f"{name}: " if name else ""
        self._by_question = by_question
        self._num_judged = self._correct = 0
        self._checker(there)
        self._new = 0
        self._new_tokens = 0
        self._clock = clock
        self._start_s = clock()

    def count(self, event: Event) -> None:
        """Count samples that came together, or a failure."""
        if isinstance(event, Failure):
            self.failed += 1
        elif not isinstance(event, ServerLost):
            new = 1 if self._by_question else len(event)
            self.done += new
            self._new += new
            self._checker(event)
            self._new_tokens += sum(graded.sample.num_tokens for graded in event)

    def describe(self) -> str:
        """How far, accuracy so far, tokens per second and time left, in one line."""
        parts = [f"{self._head}{self.done}/{self.total} {self.unit}"]
        if self._num_judged:
            of = " of samples" if self._by_question else ""
            parts.append(f"{100 * self._correct / self._num_judged:.1f} %{of} right")
        elapsed_s = self._clock() - self._start_s
        if self._new and elapsed_s > 0:
            left = self.total - self.done - self.failed
            parts.append(f"{self._new_tokens / elapsed_s:.0f} tokens/s")
            parts.append(f"{_duration(left * elapsed_s / self._new)} left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)

    def _checker(self, samples: Sequence[GradedSample]) -> None:
        """Count those that ended by themselves; an aborted one is neither right nor wrong."""
        whole = [graded for graded in samples if graded.sample.state in COMPLETED_STATES]
        self._num_judged += len(whole)
        self._correct += sum(graded.correct for graded in whole)


class BarProgress:
    """A bar that is redrawn in place."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self._pace = pace
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._bar = self._progress.add_task(pace.describe(), total=pace.total, completed=pace.done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, event: Event) -> None:
        """Show samples more, or a failure more."""
        self._pace.count(event)
        self._progress.update(
            self._bar, completed=self._pace.done, description=self._pace.describe()
        )


class LineProgress:
    """A line at the start, every ten seconds, and at the end: for logs and pipes."""

    def __init__(
        self, console: Console, pace: Pace, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._pace = pace
        self._clock = clock
        self._shown_s = clock()
        self._is_news = True

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_news:
            self._show()

    def update(self, event: Event) -> None:
        """Count samples, or a failure."""
        self._pace.count(event)
        self._is_news = True
        if self._clock() - self._shown_s >= LINE_INTERVAL_S:
            self._show()

    def _show(self) -> None:
        self._shown_s = self._clock()
        self._is_news = False
        self._console.print(self._pace.describe(), highlight=False, soft_wrap=True)


def show_progress(console: Console, pace: Pace) -> BarProgress | LineProgress:
    """The display that suits the console."""
    return BarProgress(console, pace) if console.is_terminal else LineProgress(console, pace)


def _duration(seconds: float) -> str:
    """`1h02m`, `3m07s` or `12s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
