"""What a benchmark is doing: a line redrawn on a terminal, elsewhere a line each with its time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

TABLE_WIDTH = 160
"""Columns of a table that is written to a file or a pipe."""


@dataclass(frozen=True)
class Progress:
    """Says on standard error what is going on."""

    doing: Callable[[str], None]
    done: Callable[[str], None]


@contextmanager
def progress() -> Iterator[Progress]:
    """Show what is done until the block ends."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("Starting") as status:
            yield Progress(status.update, lambda text: console.print(text, highlight=False))
        return
    start_s = time.monotonic()

    def tell(text: str) -> None:
        elapsed_s = time.monotonic() - start_s
        console.print(f"{elapsed_s:6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    yield Progress(tell, tell)


def wide_console() -> Console:
    """Standard output, wide enough for a table where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)
