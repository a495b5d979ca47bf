"""A server does not outlive what started it, whoever ends that and how often they say so."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evals.tiny_servers import none_left, running
from tests.evals.tiny_sglang import NUM_PROCESSES
from tests.fakes.sglang_server import eventually

ROOT = Path(__file__).parents[2]
IN_PROCESS = """
import sys, time
from pathlib import Path
from rich.console import Console
from lim_sglang import server
from lim_sglang.evals import serving
from tests.fakes.sglang_server import eventually
from tests.evals.tiny_servers import spec, tiny_options

server.GRACE_S = float(sys.argv[3])
serving.server_options = tiny_options
try:
    with serving.serving(spec(Path(sys.argv[1]), sys.argv[2]), Console()):
        print("inside", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the processes leave their ids; none of them may be left."""
    with none_left(tmp_path) as folder:
        yield folder


def start(folder: Path, manner: str, grace_s: float = 0.2, **options: Any) -> subprocess.Popen[str]:
    """A process with a server for the length of a minute."""
    return subprocess.Popen(
        [sys.executable, "-c", IN_PROCESS, str(folder), manner, str(grace_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_until_begun(process: subprocess.Popen[str], folder: Path, *, inside: bool) -> None:
    """Until all processes run, and the block has begun where it ever does."""
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < NUM_PROCESSES:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert process.stdout
    while inside and "inside" not in process.stdout.readline():
        assert process.poll() is None


@pytest.mark.parametrize(
    ("number", "manner"),
    [
        (signal.SIGINT, "serve"),
        (signal.SIGTERM, "serve"),
        (signal.SIGHUP, "serve"),
        (signal.SIGTERM, "hang"),
    ],
)
def test_a_signal_ends_the_server_while_it_starts_and_while_it_serves(
    number: int, manner: str, folder: Path
) -> None:
    process = start(folder, manner)
    wait_until_begun(process, folder, inside=manner == "serve")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert output.endswith("interrupted\n")
    assert running(folder) == []


def test_who_is_impatient_leaves_no_server_behind(folder: Path) -> None:
    process = start(folder, "serve", grace_s=1.0)
    wait_until_begun(process, folder, inside=True)
    process.send_signal(signal.SIGINT)
    for _ in range(20):  # while it waits for processes that do not heed SIGTERM
        time.sleep(0.04)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert running(folder) == []
    assert "inside" not in output


def test_under_nohup_a_closed_terminal_is_no_end(folder: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(folder, "serve")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until_begun(process, folder, inside=True)
    process.send_signal(signal.SIGHUP)
    assert not eventually(lambda: process.poll() is not None, 1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert running(folder) == []
