"""A server for the length of a run: started as `lim serve` does it, ended whatever happens."""

import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lim_sglang.errors import ServerError

SHOWN_S = 1.0
"""Between two looks at the log of a server that is starting."""
LOG_TAIL = 2000
"""Characters of a log that an error quotes."""


@dataclass(frozen=True)
class ServerSpec:
    """What is to be served."""

    model: str
    """Folder or hub id."""
    lim_flags: Mapping[str, str] = field(default_factory=dict)
    """`--lim-policy`, `--lim-budget`, … as `lim serve` has them."""
    sglang_options: tuple[str, ...] = ()
    """Passed on to SGLang."""
    api_key: str | None = None

    def __str__(self) -> str:
        flags = " ".join(f"{flag} {text}" for flag, text in self.lim_flags.items())
        return f"{self.model} {flags}".rstrip()


@contextmanager
def serving(spec: ServerSpec, console: Console) -> Iterator[str]:
    """The address of a server that is ready, and proved to decode with LessIsMore as asked.

    It is ended with the block, its children too, also by Ctrl-C, SIGTERM and SIGHUP.

    Args:
        console: shows how far the start is.

    Raises:
        RefusedError: no server can be started so.
        ServerError: it did not start, or broke down later; the end of its log comes with it.
    """
    from lim_sglang.serve import server_options
    from lim_sglang.server import Server, free_port

    options = server_options(
        spec.model, spec.lim_flags, spec.sglang_options, port=free_port(), api_key=spec.api_key
    )
    with tempfile.TemporaryDirectory(prefix="lim-server-") as folder, _signals_interrupt():
        path = Path(folder) / "server.log"
        with path.open("wb") as log:
            server = Server(options, log=log.fileno())
            try:
                server.start()
                with _start_shown(spec, path, console):
                    server.wait_until_ready()
                yield server.url
            except ServerError as error:
                raise ServerError(f"{error}\n{_end_of(path)}".rstrip()) from None
            finally:
                server.stop()


@contextmanager
def _start_shown(spec: ServerSpec, log: Path, console: Console) -> Iterator[None]:
    """Show the newest line of a log, until the block ends; on no terminal, say once what starts."""
    opening = f"Starting a server: {spec}"
    if not console.is_terminal:
        console.print(opening, highlight=False, soft_wrap=True)
        yield
        return
    ended = threading.Event()
    with console.status(opening) as status:

        def follow() -> None:
            while not ended.wait(SHOWN_S):
                lines = _end_of(log).split("\n")
                status.update(f"{opening}\n  {lines[-1][: console.width - 4]}")

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _end_of(log: Path) -> str:
    """The last lines, also of one that is being written."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        return file.read().decode(errors="replace").rstrip()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let a service manager's signals end a block as Ctrl-C does, since a server outlives us."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
