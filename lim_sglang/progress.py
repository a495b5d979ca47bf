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


def speed(count: float, elapsed_s: float) -> str:
    """Return a number per second in words: `121`, below 10 with one decimal, as `0.4`."""
    per_s = count / max(elapsed_s, 1e-3)
    return f"{per_s:,.0f}" if per_s >= 9.95 else f"{per_s:.1f}"


@contextmanager
def show_progress(
    console: Console,
    total: float,
    text: str,
    *,
    completed: float = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[float, str], None]]:
    """Show progress until the block ends; yield the function that updates the display.

    On a terminal, a bar is redrawn in place. Elsewhere a line is printed at the start, at most
    every ten seconds, and at the end.

    Args:
        total: amount of work, in any unit.
        text: description shown at the start.
        completed: work done before.

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

            yield redraw
        return

    shown, latest, shown_s = "", text, clock()

    def print_line() -> None:
        nonlocal shown, shown_s
        print_plain(console, latest)
        shown, shown_s = latest, clock()

    def update(completed: float, text: str) -> None:
        nonlocal latest
        latest = text
        if clock() - shown_s >= LINE_INTERVAL_S:
            print_line()

    print_line()
    try:
        yield update
    finally:
        if latest != shown:
            print_line()
