"""Processes of their own that share one import: of SGLang's frontend, 10 s, for `lim` commands, and
of its server, 25 s, for servers, whose processes are forked, too.

As a script, this is the process that has imported and forks; what it has forked ends with it.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
FRONTEND = ("lim_sglang.cli", "lim_sglang.programs.sampler")
SERVER = (
    *("sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler"),
    *("sglang.srt.managers.detokenizer_manager", "sglang.srt.models.registry"),
)
"""Modules that processes share."""


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

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the command alone, unless it has ended."""
        if self.poll() is None:  # asks the parent, who frees the id of an ended child
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return the exit code, None for a command that runs."""
        code: int | None = self.parent.ask({"poll": self.pid})
        return code

    def wait(self, timeout_s: float = 60.0) -> int:
        """Return the exit code; fails the test if the command has not ended in time."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still runs after {timeout_s} s: {self.error}")
            time.sleep(0.02)
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
        self._lock = threading.Lock()

    def start(
        self,
        folder: Path,
        *words: str,
        streams: tuple[str, str] = ("stdout", "stderr"),
        environment: Mapping[str, str] | None = None,
    ) -> Command:
        """Run `lim` with these words, the script that is the first of them, or a module after `-m`.

        Args:
            streams: files in the folder for standard output and error.
            environment: all variables; those of this process if None.
        """
        paths = [str(folder / name) for name in streams]
        for path in paths:
            Path(path).write_bytes(b"")
        order = {"words": words, "streams": paths, "environment": environment}
        return Command(self, self.ask(order), folder)

    def run(self, folder: Path, *words: str, timeout_s: float = 60.0) -> tuple[int, Command]:
        """Run a command to its end; return its exit code, too."""
        command = self.start(folder, *words)
        return command.wait(timeout_s), command

    def ask(self, order: dict[str, Any]) -> Any:
        """Return the answer to an order."""
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


@contextmanager
def forking(
    modules: Sequence[str] = FRONTEND, environment: Mapping[str, str] | None = None
) -> Iterator[Forker]:
    """Import modules once, in a process that forks until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forked_commands", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        yield Forker(process)
        assert process.stdin
        process.stdin.close()


def _serve(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid = order["poll"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            _answer(codes[pid])
            continue
        pid = os.fork()
        if pid == 0:
            _become(order["streams"], order["environment"])
            _end(_run(order["words"]))
        codes[pid] = None
        _answer(pid)
    for pid in (pid for pid, code in codes.items() if code is None):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _end(0)


def _answer(content: int | None) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _become(streams: Sequence[str], environment: Mapping[str, str] | None) -> None:
    """Take a process group, an environment, streams, and Python's reaction to Ctrl-C."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)


def _run(words: list[str]) -> int:
    """Run a command and return the exit code that Python would give it."""
    try:
        if words[0] == "-m":
            # SGLang asks for "spawn"; its children shall share what is imported here.
            multiprocessing.set_start_method("fork", force=True)
            multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0].endswith(".py"):
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            from lim_sglang.cli import main

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
    _serve(sys.argv[1:])
