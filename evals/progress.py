"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lim_sglang.evals.records import GradedSample

LINE_INTERVAL_S = 10.0


class Pace:
    """Counts of a run, and the speed of this session of it."""

    def __init__(
        self,
        total: int,
        there: list[GradedSample],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin at the samples that are there already, out of `total`."""
        self.total = total
        self.done = len(there)
        self.failed = 0
        self._correct = sum(graded.correct for graded in there)
        self._new_samples = 0
        self._new_tokens = 0
        self._clock = clock
        self._start_s = clock()

    def count(self, graded: GradedSample | None) -> None:
        """Count one sample, or a failure where it is None."""
        if graded is None:
            self.failed += 1
            return
        self.done += 1
        self._correct += graded.correct
        self._new_samples += 1
        self._new_tokens += graded.sample.num_tokens

    def describe(self) -> str:
        """Samples, accuracy so far, tokens per second and time left, in one line."""
        parts = [f"{self.done}/{self.total} samples"]
        if self.done:
            parts.append(f"{100 * self._correct / self.done:.1f} % right")
        elapsed_s = self._clock() - self._start_s
        if self._new_samples and elapsed_s > 0:
            left = self.total - self.done - self.failed
            parts.append(f"{self._new_tokens / elapsed_s:.0f} tokens/s")
            parts.append(f"{_duration(left * elapsed_s / self._new_samples)} left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


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

    def update(self, graded: GradedSample | None) -> None:
        """Show one sample more, or one failure more where it is None."""
        self._pace.count(graded)
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

    def update(self, graded: GradedSample | None) -> None:
        """Count one sample, or one failure where it is None."""
        self._pace.count(graded)
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
