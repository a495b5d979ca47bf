"""What a benchmark is doing: a line redrawn on a terminal, elsewhere a line each with its time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

TABLE_WIDTH = 160
"""Columns of a table that is written to a file or a pipe."""
BAR_WIDTH = 30
LINE_INTERVAL_S = 10.0
"""How often a log or a pipe is told how far something is."""


@dataclass(frozen=True)
class Progress:
    """Says on standard error what is going on."""

    doing: Callable[[str], None]
    done: Callable[[str], None]
    advancing: Callable[[float, str], None]
    """How far something is, from 0 to 1, and how it goes; may be told as often as one likes."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Show what is done until the block ends."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("Starting") as status:
            yield Progress(
                status.update,
                lambda text: console.print(text, highlight=False),
                lambda share, text: status.update(bar(share, text)),
            )
        return
    yield lines(console)


def lines(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """The display of a log or a pipe: a line each, with the seconds since the start."""
    start_s = clock()
    shown_s = start_s

    def tell(text: str) -> None:
        nonlocal shown_s
        shown_s = clock()
        line = f"{shown_s - start_s:6.1f} s  {text}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def advancing(share: float, text: str) -> None:
        if clock() - shown_s >= LINE_INTERVAL_S:
            tell(f"{100 * share:.0f} %, {text}")

    return Progress(tell, tell, advancing)


def bar(share: float, text: str) -> Table:
    """A bar with its text, in one line."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(completed=100 * share, width=BAR_WIDTH), f"{100 * share:3.0f} %", text)
    return grid


def wide_console() -> Console:
    """Standard output, wide enough for a table where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)
