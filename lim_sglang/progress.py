"""Progress on a console: a bar on a terminal, a line now and then in a log or a pipe."""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

LINE_INTERVAL_S = 10.0
"""Least time between two lines in a log or a pipe."""
FIRST_WAIT_S = 3.0
"""Time until the first line about a wait, in a log or a pipe."""
LATE_S = 2.0
"""Time after which a wait that is seldom noticed is told."""
REDRAW_INTERVAL_S = 1.0
"""Time between two descriptions on a terminal while no work is completed."""
LINE_START = re.compile(r"\s*(?:\S+\s{2,}|- )?")
"""Indentation of a line, with a name before two spaces or the mark of a list."""
KNOWN_AFTER_S, KNOWN_AFTER_TOKENS = 5.0, 32
"""Seconds and tokens of a running sample from which its speed is taken to be known."""
FAR_BEYOND = 2.5
"""Times the median ended sample that a running one has taken when lengths predict no end of it."""


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints every text as it is: names may hold brackets and colons."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_plain(console: Console, text: str, *, whole: bool = False) -> None:
    """Print a text as it is: on a terminal lines are wrapped at spaces, elsewhere they are whole.

    Args:
        whole: lines are whole on a terminal, too, since a command in them may be copied.
    """
    text = printable(text)
    if console.file.isatty() and not whole:
        text = "\n".join(wrapped(line, console.width) for line in text.split("\n"))
    console.print(Text(text), highlight=False, soft_wrap=True)


def wrapped(line: str, width: int) -> str:
    """Return a line with breaks at spaces; a word that is wider than the columns, such as a path,
    stays whole. Further lines begin below the text behind indentation, name or mark.
    """
    start = LINE_START.match(line)
    indent = start.end() if start and start.end() < width // 2 else 0
    lines = [line[:indent]]
    for number, word in enumerate(line[indent:].split(" ")):
        joined = f"{lines[-1]}{' ' * (number > 0)}{word}"
        if cell_len(joined) > width and number:
            lines.append(f"{' ' * indent}{word}")
        else:
            lines[-1] = joined
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return a text without the characters that could command a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def shortened(name: str, width: int) -> str:
    """Return a name, without its middle if the name takes more than `width` terminal columns."""
    text, kept = name, len(name)
    while cell_len(text) > width and kept > 1:
        kept -= 1
        text = f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"
    return text


def fitting(figures: Mapping[str, str], room: Mapping[str, int], width: int) -> list[str]:
    """Return the figures, in their order, that fit into columns, each behind a comma.

    A figure that does not fit takes those of less importance along.

    Args:
        room: least columns for each figure, the most important first.
    """
    fit = set()
    for name in filter(figures.__contains__, room):
        width -= max(room[name], len(figures[name])) + len(", ")
        if width >= 0:
            fit.add(name)
    return [text for name, text in figures.items() if name in fit]


@contextmanager
def repeated(
    action: Callable[[], None], interval_s: float, *, first_s: float | None = None
) -> Iterator[None]:
    """Repeat an action in a thread until the block ends.

    Args:
        first_s: time until the first; None: the interval.
    """
    ended = threading.Event()

    def repeat() -> None:
        pause_s = interval_s if first_s is None else first_s
        while not ended.wait(pause_s):
            action()
            pause_s = interval_s

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Return `1h02m`, `3m07s` or `12 s`."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{rest_minutes:02}m"
    return f"{minutes}m{rest_s:02}s" if minutes else f"{rest_s} s"


def rate(amount: float, elapsed_s: float) -> str:
    """Return an amount a second: `1,403`, `25`, or `0.4` below 10."""
    value = amount / max(elapsed_s, 1e-3)
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def seconds_left(
    ended_s: Sequence[float],
    running_s: Sequence[float],
    num_waiting: int,
    limit_s: float = math.inf,
) -> float:
    """Estimate the seconds until the last of several jobs ends, of which some run side by side.

    Rayleigh: durations are taken to follow this distribution, whose squares are memoryless. Their
    mean square is the sum of squares of all jobs so far, the running ones included, over the number
    that have ended: jobs that are short end first, and their mean alone would promise too much. The
    longest of n running jobs has its square grow by the n-th harmonic number of mean squares. Jobs
    that wait have the running ones' places, one after the other.

    Args:
        ended_s: seconds of each job that has ended.
        running_s: seconds of each running job so far.
        num_waiting: jobs that have not begun.
        limit_s: most seconds of a job; taken for every job before the first has ended.

    Returns:
        The estimate; infinity if no job has ended and there is no limit.
    """
    num_at_once = max(len(running_s), 1)
    squares = sum(seconds**2 for seconds in [*ended_s, *running_s])
    mean_square = squares / len(ended_s) if ended_s else math.inf
    mean_s = min(math.sqrt(math.pi / 4 * mean_square), limit_s)
    queue_s = num_waiting * mean_s / num_at_once if num_waiting else 0.0
    if not running_s:
        return queue_s
    age_s = math.sqrt(fmean(seconds**2 for seconds in running_s))
    harmonic = sum(1 / rank for rank in range(1, num_at_once + 1))
    longest_s = math.sqrt(age_s**2 + mean_square * harmonic) - age_s
    return queue_s + min(longest_s, max(limit_s - min(running_s), 0.0))


def time_left(
    ended_s: Sequence[float],
    running_s: Sequence[float],
    num_waiting: int,
    *,
    num_tokens: float,
    spent_s: float,
    max_tokens: float,
) -> str:
    """Return the time left in words; empty as long as nothing is known.

    A first ended sample gives an estimate (`seconds_left`), until the last samples run far longer
    than those that ended. Where no sample waits, the token limit gives a bound, which a sample that
    runs to the limit does not change, as soon as the speed of the running samples is known.

    Args:
        ended_s: seconds of each sample that has ended by itself.
        running_s: seconds of each running sample so far.
        num_waiting: samples that have not begun.
        num_tokens: tokens of all samples so far, however they ended.
        spent_s: seconds of the samples that generated them.
        max_tokens: token limit of a sample; infinity for none.
    """
    limit_s = max_tokens * spent_s / num_tokens if num_tokens else math.inf
    bound_s = seconds_left([], running_s, num_waiting, limit_s)
    num_running = max(len(running_s), 1)
    is_known = spent_s >= KNOWN_AFTER_S * num_running
    is_known &= num_tokens >= KNOWN_AFTER_TOKENS * num_running and math.isfinite(bound_s)
    is_beyond = not num_waiting and max(running_s, default=0) > FAR_BEYOND * median(ended_s or [0])
    if ended_s and not is_beyond:
        left_s = seconds_left(ended_s, running_s, num_waiting, limit_s)
        is_bounded = is_known and not num_waiting and bound_s > left_s
        at_most = f", at most {duration(bound_s)}" if is_bounded else ""
        return f"about {duration(left_s)} left{at_most}"
    if not is_known:
        return ""
    return f"at most {duration(bound_s)} left, if all samples run to --max-tokens"


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Show what the block waits for, and for how long: in place on a terminal, elsewhere a line at
    the start, one after three seconds, and one now and then.
    """
    print_plain(console, text)
    began_s = time.monotonic()

    def line() -> str:
        return f"  waiting, {duration(time.monotonic() - began_s)}"

    if console.is_terminal:
        with (
            console.status(line()) as status,
            repeated(lambda: status.update(line()), REDRAW_INTERVAL_S),
        ):
            yield
        return
    with repeated(lambda: print_plain(console, line()), LINE_INTERVAL_S, first_s=FIRST_WAIT_S):
        yield


@contextmanager
def told_if_late(console: Console, text: str) -> Iterator[None]:
    """Print what the block waits for, unless the block ends within `LATE_S`."""
    notice = threading.Timer(LATE_S, print_plain, (console, text))
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


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
        with Progress(*_bar_columns(), console=console, expand=True) as bars:
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


def _bar_columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a bar: only the description, whose lines wrap, gives way."""
    whole = Column(no_wrap=True)
    return (
        BarColumn(bar_width=8, table_column=whole),
        TaskProgressColumn(table_column=whole),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00"))),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
    )


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
