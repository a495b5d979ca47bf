"""Progress on a console: a bar on a terminal, a line now and then in a log or a pipe."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

LINE_INTERVAL_S = 10.0
"""Least time between two lines in a log or a pipe."""
REDRAW_INTERVAL_S = 1.0
"""Time between two descriptions on a terminal while no work is completed."""


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints every text as it is: names may hold brackets and colons."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_plain(console: Console, text: str) -> None:
    """Print a text as it is on any console, each of its lines in one piece."""
    console.print(Text(printable(text)), highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Return a text without the characters that could command a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


@contextmanager
def repeated(action: Callable[[], None], interval_s: float) -> Iterator[None]:
    """Repeat an action in a thread until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Return `1h02m`, `3m07s` or `12s`."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{rest_minutes:02}m"
    return f"{minutes}m{rest_s:02}s" if minutes else f"{rest_s}s"


def rate(amount: float, elapsed_s: float) -> str:
    """Return an amount a second: `1,403`, `25`, or `0.4` below 10."""
    value = amount / max(elapsed_s, 1e-3)
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


@contextmanager
def show_progress(
    console: Console,
    total: float,
    text: str,
    *,
    completed: float = 0,
    refresh: Callable[[], str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[float, str], None]]:
    """Show progress until the block ends; yield the function that updates the display.

    On a terminal, a bar is redrawn in place. Elsewhere a line with the elapsed time is printed at
    the start, at most every ten seconds, and at the end.

    Args:
        total: amount of work, in any unit.
        text: description shown at the start.
        completed: work done before.
        refresh: returns the newest description; called from another thread, so that the display
            goes on while no work is completed. None: the description stays.

    Yields:
        A function of the completed amount of work and the new description.
    """
    if console.is_terminal:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        description = TextColumn("{task.description}", markup=False)
        with Progress(*columns, description, console=console) as bars:
            bar = bars.add_task(text, total=total)
            bars.update(bar, completed=completed)

            def redraw(completed: float, text: str) -> None:
                bars.update(bar, completed=completed, description=text)

            def redraw_text() -> None:
                if refresh:
                    bars.update(bar, description=refresh())

            with repeated(redraw_text, REDRAW_INTERVAL_S):
                yield redraw
        return

    lines = _ProgressLines(console, text, clock)

    def print_newest() -> None:
        if refresh:
            lines.update(refresh())

    try:
        with repeated(print_newest, LINE_INTERVAL_S / 2):
            yield lambda _, text: lines.update(text)
    finally:
        lines.end()


class _ProgressLines:
    """Lines about progress in a log or a pipe. Thread-safe."""

    def __init__(self, console: Console, text: str, clock: Callable[[], float]) -> None:
        """Print the first line."""
        self._console = console
        self._clock = clock
        self._lock = threading.Lock()
        self._start_s = self._shown_s = clock()
        self._shown = self._newest = text
        print_plain(console, text)

    def update(self, text: str) -> None:
        """Print a text if the last line is old enough, else keep the text for the end."""
        with self._lock:
            self._newest = text
            if self._clock() - self._shown_s >= LINE_INTERVAL_S:
                self._print()

    def end(self) -> None:
        """Print the newest text unless the last line shows it."""
        with self._lock:
            if self._newest != self._shown:
                self._print()

    def _print(self) -> None:
        self._shown, self._shown_s = self._newest, self._clock()
        elapsed = duration(self._shown_s - self._start_s)
        print_plain(self._console, f"{self._newest}; after {elapsed}")
