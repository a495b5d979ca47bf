"""A server for the length of a run: started as `lim serve` does it, ended whatever happens."""

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lim_sglang.errors import DataError, ServerError
from lim_sglang.serve import server_options
from lim_sglang.server import on_signals

SHOWN_S = 1.0
"""Between two looks at the log of a server that is starting."""
LOG_TAIL = 2000
"""Bytes of a log that an error quotes."""


@dataclass(frozen=True)
class ServerSpec:
    """What is to be served."""

    model: str | None
    """Folder or hub id; None for the default of this machine."""
    lim_flags: Mapping[str, str] = field(default_factory=dict)
    """`--lim-policy`, `--lim-budget`, … as `lim serve` has them."""
    sglang_options: tuple[str, ...] = ()
    """Passed on to SGLang."""
    api_key: str | None = None

    def __str__(self) -> str:
        flags = " ".join(f"{flag} {text}" for flag, text in self.lim_flags.items())
        return f"{self.model or 'the default model'} {flags}".rstrip()


@contextmanager
def serving(spec: ServerSpec, console: Console, log: Path | None = None) -> Iterator[str]:
    """The address of a server that is ready, and proved to decode with LessIsMore.

    It is ended with the block, its children too, also by Ctrl-C, SIGTERM and SIGHUP.

    Args:
        console: shows how far the start is.
        log: where SGLang's output goes; without one to a file that is only kept where the server
            fails.

    Raises:
        RefusedError: no server can be started so.
        ServerError: it did not start, or broke down later; the end of its log comes with it.
        DataError: the log cannot be written.
    """
    from lim_sglang.server import Server, free_port

    options = server_options(
        spec.model, spec.lim_flags, spec.sglang_options, port=free_port(), api_key=spec.api_key
    )
    with _log_file(log) as path, path.open("wb") as file, on_signals(signal.default_int_handler):
        server = Server(options, log=file.fileno())
        try:
            server.start()
            with _start_shown(spec, path, console):
                server.wait_until_ready()
            yield server.url
        except ServerError as error:
            end = _end_of(path).strip() or "(which is empty)"
            raise ServerError(f"{error} (log: {path})\n{end}") from None
        finally:
            server.stop()


@contextmanager
def _log_file(wanted: Path | None) -> Iterator[Path]:
    """An empty file that can be written. One that nobody wanted is removed, unless a `ServerError`
    names it.
    """
    try:
        if wanted:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            wanted.write_bytes(b"")
        else:
            handle, name = tempfile.mkstemp(prefix="lim-server-", suffix=".log")
            os.close(handle)
    except OSError as error:
        where = wanted or tempfile.gettempdir()
        raise DataError(f"cannot write a server's log to {where} ({error.strerror})") from None
    path = wanted or Path(name)
    is_kept = wanted is not None
    try:
        yield path
    except ServerError:
        is_kept = True
        raise
    finally:
        if not is_kept:
            path.unlink(missing_ok=True)


@contextmanager
def _start_shown(spec: ServerSpec, log: Path, console: Console) -> Iterator[None]:
    """Show a log's newest line until the block ends; on no terminal, say once what starts."""
    opening = f"Starting a server: {spec}"
    began_s = time.monotonic()
    if console.is_terminal:
        with _log_followed(opening, log, console):
            yield
    else:
        console.print(opening, markup=False, highlight=False, soft_wrap=True)
        yield
    took_s = time.monotonic() - began_s
    console.print(f"The server is ready after {took_s:.0f} s", highlight=False)


@contextmanager
def _log_followed(opening: str, log: Path, console: Console) -> Iterator[None]:
    ended = threading.Event()
    # As Text: what looks like markup in a log is none.
    with console.status(Text(opening)) as status:

        def follow() -> None:
            while not ended.wait(SHOWN_S):
                line = Text(f"\n  {newest_line(log)}", style="dim", no_wrap=True)
                line.truncate(console.width, overflow="ellipsis")
                status.update(Text(opening) + line)

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def newest_line(log: Path) -> str:
    """The last line that says something, as it looks on a terminal: without colours, and of a
    progress bar its last state.
    """
    lines = re.split(r"[\r\n]+", _end_of(log))
    found = (Text.from_ansi(line).plain.strip() for line in reversed(lines))
    return next(filter(None, found), "")


def _end_of(log: Path) -> str:
    """The last bytes as text, also of a log that is being written."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        return file.read().decode(errors="replace")
