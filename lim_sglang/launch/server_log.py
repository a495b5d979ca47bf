"""SGLang's log: its newest line while a server starts, and the cause when a server fails."""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lim_sglang.models import cache_folder
from lim_sglang.progress import print_plain, repeated

POLL_S = 1.0
"""Pause between two looks at the log of a server that starts."""
FIRST_LINE_S, LINE_INTERVAL_S = 5.0, 30.0
"""Seconds until the first line of a start that no terminal shows, and between two lines."""
NO_LINE = "SGLang has logged nothing yet"
USUAL_ON_CPU = "usually 30 to 120 s on a CPU"
TAIL_BYTES = 20_000
"""The part of a log that has its newest line, from that line's beginning: SGLang's longest line, of
its options, has about 5,000 bytes."""
MAX_LINE = 100
"""Most characters of a log's line that are shown; the words beyond are left out."""
CAUSE_BYTES = 100_000
"""The part of a log that is searched for the cause of a failure."""
KILLS_ITSELF = "Received sigquit from a child process"
"""Words of SGLang's main process before it kills itself and all others."""
NUM_KEPT_LOGS = 5
NUM_ERRORS, NUM_LAST_LINES = 3, 5
"""Errors of a log, or lines of a log without errors, that a message quotes."""

REFUSAL = re.compile(r"(?:[\w.-]+: )?error: ")
"""Begins a message for the user: ours, or that of SGLang's parser of options."""
TIMESTAMP = re.compile(r"\[\d{4}-\d\d-\d\d [^]]*\] ?")
NO_PROGRESS = re.compile(
    r"\s|Ignore import error |Fail to set RLIMIT|INFO: +[\w.:[\]-]+ - \"[A-Z]+ /"
    r"|\S+:\d+: \w*Warning: |W\d{4} \d\d:\d\d:|INFO: +Uvicorn running on "
)
"""Begins a line that says nothing about the progress of a start: a part of a warning or a
traceback, a module of another device or model, our own requests, a warning of Python or torch, an
address that does not answer yet."""
EXCEPTION = re.compile(r"(?:\[[^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception)\b: .*)")
"""A traceback's last line."""


@contextmanager
def start_shown(
    title: str, logs: Mapping[str, Path | None], console: Console, *, on_cpu: bool = False
) -> Iterator[Callable[[str], None]]:
    """Show a start until the block ends: the seconds, and the newest line of each log.

    On a terminal the lines are redrawn in place; elsewhere one is printed now and then. Without a
    log, whose lines are shown anyway, only beginning and end are told.

    Args:
        logs: by the name of the server, which is empty for a server that starts alone.
        on_cpu: say how long a start usually takes there.

    Yields:
        A function that tells the name of a server which is ready.
    """
    opening = f"Starting a server: {title}"
    if len(logs) > 1:
        opening = f"Starting {len(logs)} servers: {title}"
    if on_cpu:
        opening += f" ({USUAL_ON_CPU})"
    for name, log in logs.items():
        if log:
            print_plain(console, f"SGLang's log{name and f' of {name}'}: {log}", whole=True)
    starting = {name: log for name, log in logs.items() if log}
    began_s = time.monotonic()

    def tell_ready(name: str) -> None:
        starting.pop(name, None)
        server = name and f"{name[:1].upper()}{name[1:]}"
        print_plain(console, f"{server or 'The server'} is ready after {_seconds(began_s)}")

    def tell() -> None:
        for name, log in list(starting.items()):
            line = f"{name and f'{name}: '}{shown_line(log) or NO_LINE}"
            print_plain(console, f"  {_seconds(began_s)} {line}")

    if not starting:
        print_plain(console, opening)
        yield tell_ready
    elif console.is_terminal:
        with (
            console.status(Text(opening)) as status,
            repeated(
                lambda: status.update(_progress(opening, began_s, dict(starting), console.width)),
                POLL_S,
            ),
        ):
            yield tell_ready
    else:
        print_plain(console, opening)
        with repeated(tell, LINE_INTERVAL_S, first_s=FIRST_LINE_S):
            yield tell_ready


def _seconds(began_s: float) -> str:
    return f"{time.monotonic() - began_s:.0f} s"


def _progress(opening: str, began_s: float, logs: Mapping[str, Path], width: int) -> Text:
    # As Text: a log may hold what looks like markup.
    text = Text(f"{opening} {_seconds(began_s)}")
    for name, log in logs.items():
        start = name and f"{name}: "
        text += Text(f"\n  {start}{shown_line(log, width - 2 - len(start))}", style="dim")
    return text


def shown_line(log: Path, width: int = MAX_LINE) -> str:
    """Return the newest line of a log; of one over the width the first words and an ellipsis."""
    line, width = newest_line(log), min(width, MAX_LINE)
    if len(line) <= width:
        return line
    words = line[:width].rpartition(" ")[0]
    return f"{words or line[: width - 1]}…"


def newest_line(log: Path) -> str:
    """Return the last line about progress, without colours and timestamp; of a progress bar the
    last state.

    A refusal is left to the message at the end of the server, which tells it whole.
    """
    lines = (TIMESTAMP.sub("", line, count=1) for line in reversed(_lines(log, TAIL_BYTES)))
    told = (line for line in lines if line and not NO_PROGRESS.match(line))
    return next((line for line in told if not REFUSAL.match(line)), "")


def _lines(log: Path, num_bytes: int) -> list[str]:
    """Return the lines with text at the end of a log, without colours, also while it is written.

    Empty if the log is gone: a supervisor that was told to stop has removed it.
    """
    try:
        with log.open("rb") as file:
            begin = file.seek(max(0, log.stat().st_size - num_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    whole_lines = text.partition("\n")[2]
    if begin and whole_lines.strip():
        text = whole_lines  # the line before may have lost its beginning
    plain = (Text.from_ansi(line).plain.rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in plain if line.strip()]


def cause_of_failure(log: Path) -> str:
    """Return what a log says about the end of its server.

    That is SGLang's own message to the user, or the last errors of its tracebacks, or, where there
    are neither, its last lines.
    """
    lines = _lines(log, CAUSE_BYTES)
    refusals = [number for number, line in enumerate(lines) if REFUSAL.match(line)]
    if refusals:
        first, *rest = lines[refusals[-1] :]
        items = takewhile(lambda line: line.startswith("  "), rest)
        return "\n".join([REFUSAL.sub("", first), *items])
    errors = dict.fromkeys(match[1] for line in lines if (match := EXCEPTION.match(line)))
    cause = list(errors)[-NUM_ERRORS:] or lines[-NUM_LAST_LINES:]
    return "\n".join(cause) or "(which is empty)"


def ended_itself(log: Path) -> bool:
    """Return True if SGLang killed its processes after an error in one, as its log then says."""
    return any(KILLS_ITSELF in line for line in _lines(log, CAUSE_BYTES))


def keep_log(log: Path) -> Path:
    """Move the log of a server that failed out of its temporary folder; return the new path.

    The newest few are kept. A log that cannot be kept stays where it is, for as long as it can.
    """
    kept = cache_folder() / "logs" / f"{log.parent.name}.log"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(log, kept)
    except OSError:
        return log
    with suppress(OSError):
        by_age = sorted(kept.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-NUM_KEPT_LOGS]:
            old.unlink()
    return kept
