"""Real SGLang servers on the CPU: started as a user does it, asked over HTTP, ended as a tree."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.e2e.client import Client

SGLANG = (sys.executable, "-m", "sglang.launch_server")
LIM_SERVE = (sys.executable, "-m", "lim_sglang", "serve")

ON_CPU = (
    *("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3"),
    # Room for ten long requests at once, and chunks that cut each of their prompts.
    *("--max-total-tokens", "16384", "--max-running-requests", "16", "--context-length", "4096"),
    *("--chunked-prefill-size", "512", "--sleep-on-idle"),
)

READY_TIMEOUT_S = 300


@contextmanager
def serving(
    command: Sequence[str], *, folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[Client]:
    """Run a server on a free port until the block ends.

    Its output goes to `folder`/server.log, its kept sets to `folder`/trace.

    Raises:
        AssertionError: it ended, or was not ready in time; the text holds the end of its log.
    """
    port, log, trace = free_port(), folder / "server.log", folder / "trace"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=clean_environment({"LIM_TRACE": str(trace), **(settings or {})}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = Client(f"http://127.0.0.1:{port}", trace)
    try:
        _wait_until_ready(client, process, log)
        yield client
    finally:
        end_tree(process)


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment; what steers SGLang and lim is replaced by `settings`."""
    steering = ("LIM_", "SGLANG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering) or k == "LIM_CACHE"}
    return {**kept, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", **settings}


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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


def _tail(log: Path) -> str:
    return log.read_text()[-4000:]
