"""Real SGLang servers on the CPU: started as a user does it, asked over HTTP, ended as a tree."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lim_sglang.server import free_port
from tests.server.client import Client
from tests.server.prompts import BUDGET
from tests.server.tiny_models import SELECT_LAYERS

SGLANG = (sys.executable, "-m", "sglang.launch_server")
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
LIM_SERVE = (sys.executable, "-m", "lim_sglang", "serve")
LAUNCH = (str(Path(__file__).parents[1] / "launch.sh"), "--no-install")
"""`lim serve` by the python3 on the PATH, which is the one that runs the tests."""

ON_CPU = (
    *("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3"),
    # Room for ten long requests at once, and chunks that cut each of their prompts.
    *("--max-total-tokens", "16384", "--max-running-requests", "16", "--context-length", "4096"),
    *("--chunked-prefill-size", "512", "--sleep-on-idle"),
)

WITH_LIM = (
    *("--attention-backend", "lim", "--lim-budget", str(BUDGET)),
    *("--lim-select-layers", ",".join(map(str, SELECT_LAYERS))),
)
"""Options for the tiny model."""

READY_TIMEOUT_S = 300


@dataclass(frozen=True)
class Ending:
    """How a server took a polite request to end."""

    code: int | None
    """Exit code of its main process; None where that did not end."""
    left: tuple[str, ...]
    """What was left of its process tree."""


class LocalServer(Client):
    """A client whose server is a child of this process."""

    def __init__(
        self, port: int, trace: Path, api_key: str | None, process: subprocess.Popen[bytes]
    ) -> None:
        super().__init__(f"http://127.0.0.1:{port}", trace, api_key)
        self.port = port
        self._process = process

    def kill(self) -> None:
        """End the whole process tree at once, as a crash would."""
        end_tree(self._process)

    def end_by_sigterm(self, timeout_s: float) -> Ending:
        """Send SIGTERM to the main process; see `end_by`."""
        return self.end_by(signal.SIGTERM, timeout_s)

    def end_by(self, number: signal.Signals, timeout_s: float) -> Ending:
        """Send a signal to the main process; wait until nothing is left, or the time is over."""
        main = psutil.Process(self._process.pid)
        tree = [main, *main.children(recursive=True)]
        deadline = time.monotonic() + timeout_s
        self._process.send_signal(number)
        while (left := [member for member in tree if _runs(member)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        for member in left:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        return Ending(self._process.poll(), tuple(map(str, left)))


@contextmanager
def serving(
    command: Sequence[str], *, folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[LocalServer]:
    """Run a server on a free port until the block ends.

    Its output goes to `folder`/server.log, its kept sets to `folder`/trace. `LIM_API_KEY` among the
    settings is sent with each request.

    Raises:
        AssertionError: it ended, or was not ready in time; the text holds the end of its log.
    """
    settings = settings or {}
    port, log, trace = free_port(), folder / "server.log", folder / "trace"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=clean_environment({"LIM_TRACE": str(trace), **settings}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = LocalServer(port, trace, settings.get("LIM_API_KEY"), process)
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        end_tree(process)


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment; what steers SGLang and lim is replaced by `settings`."""
    steering = ("LIM_", "SGLANG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering) or k == "LIM_CACHE"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    steered = {"PATH": path, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **steered, **settings}


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its own session, and every process that it started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    with suppress(ProcessLookupError):  # what a process that died before has left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not client.is_ready():
        ended = process.poll() is not None
        assert not ended, f"the server ended with code {process.returncode}:\n{_tail(log)}"
        assert time.monotonic() < deadline, f"not ready in {READY_TIMEOUT_S} s:\n{_tail(log)}"
        time.sleep(0.5)


def _runs(member: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    return False


def _tail(log: Path) -> str:
    return log.read_text()[-4000:]
