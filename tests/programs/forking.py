"""Commands in processes of their own that need not load SGLang's frontend anew: seconds each.

As a script, this is the process that has loaded it; it forks for each command.
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

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Command:
    """One that was started."""

    parent: "Forker"
    pid: int
    folder: Path

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code; fails the test where it has not ended in time."""
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
        """What it has printed."""
        return (self.folder / "stdout").read_text()

    @property
    def error(self) -> str:
        """What it has said beside that."""
        return (self.folder / "stderr").read_text()


class Forker:
    """The process that forks."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, folder: Path, *words: str) -> Command:
        """Run `lim` with these words, or the script that is the first of them."""
        return Command(self, self.ask({"words": words, "folder": str(folder)}), folder)

    def ask(self, order: dict[str, Any]) -> Any:
        """What it answers to an order."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def forking() -> Iterator[Forker]:
    """Load the frontend once."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.programs.forking"],
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
    import lim_sglang.programs.sampler  # noqa: F401 - what takes so long

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


def _answer(content: int | None) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _become(folder: Path) -> None:
    """A process with its own group, streams and Ctrl-C."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, (name, flags) in enumerate(
        (
            ("/dev/null", os.O_RDONLY),
            (str(folder / "stdout"), os.O_WRONLY | os.O_CREAT),
            (str(folder / "stderr"), os.O_WRONLY | os.O_CREAT),
        )
    ):
        os.dup2(os.open(name, flags, 0o600), stream)


def _run(words: list[str]) -> int:
    """The exit code that Python would give it."""
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
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """Wait for all threads, as Python does, but do not take two seconds to free the modules."""
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
