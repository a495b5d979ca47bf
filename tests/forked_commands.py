"""`lim` commands in processes of their own that share one import of SGLang's frontend: 10 s.

As a script, this is the process that has imported it and forks for each command.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Command:
    """A command that was started."""

    parent: "Forker"
    pid: int
    folder: Path

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.send(signal.SIGINT)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command and its children."""
        os.killpg(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Return the exit code; fails the test if the command has not ended in time."""
        deadline = time.monotonic() + timeout_s
        while (code := self.parent.ask({"poll": self.pid})) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still runs after {timeout_s} s: {self.error}")
            time.sleep(0.02)
        assert isinstance(code, int)
        return code

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return (self.folder / "stdout").read_text()

    @property
    def error(self) -> str:
        """Its standard error so far."""
        return (self.folder / "stderr").read_text()


class Forker:
    """The process that forks."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, folder: Path, *words: str) -> Command:
        """Run `lim` with these words, or the script that is the first of them."""
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        return Command(self, self.ask({"words": words, "folder": str(folder)}), folder)

    def run(self, folder: Path, *words: str, timeout_s: float = 60.0) -> tuple[int, Command]:
        """Run a command to its end; return its exit code, too."""
        command = self.start(folder, *words)
        return command.wait(timeout_s), command

    def ask(self, order: dict[str, Any]) -> Any:
        """Return the answer to an order."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def forking() -> Iterator[Forker]:
    """Import the frontend once, in a process that forks until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forked_commands"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        yield Forker(process)
        assert process.stdin
        process.stdin.close()


def _serve() -> None:
    import lim_sglang.cli
    import lim_sglang.programs.sampler  # noqa: F401 - imports the frontend

    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            _answer(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        pid = os.fork()
        if pid == 0:
            _become(Path(order["folder"]))
            _end(_run(order["words"]))
        _answer(pid)
    _end(0)


def _answer(content: int | None) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _become(folder: Path) -> None:
    """Take a process group, streams, and Python's reaction to Ctrl-C."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, (name, flags) in enumerate(
        (
            ("/dev/null", os.O_RDONLY),
            (str(folder / "stdout"), os.O_WRONLY),
            (str(folder / "stderr"), os.O_WRONLY),
        )
    ):
        os.dup2(os.open(name, flags, 0o600), stream)


def _run(words: list[str]) -> int:
    """Run a command and return the exit code that Python would give it."""
    from lim_sglang.cli import main

    try:
        if words[0].endswith(".py"):
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            sys.argv = ["lim", *words]
            main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """Wait for all threads, as Python does, but skip the two seconds of freeing the modules."""
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
