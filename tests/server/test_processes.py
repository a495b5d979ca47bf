"""Processes of the tests: signals reach those that run, and no others."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.forked_commands import forking
from tests.processes import Ending, LocalServer


def test_a_signal_reaches_a_command_that_runs_and_no_process_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import time\ntime.sleep(60)\n")
    with forking(()) as parent:
        command = parent.start(tmp_path, str(script))
        command.send_signal(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        monkeypatch.setattr("os.kill", lambda *_: pytest.fail("the id may be another's"))
        command.send_signal(signal.SIGKILL)


def test_a_server_that_ends_before_the_signal_passes_it_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        server = LocalServer(1, tmp_path, None, process)
        monkeypatch.setattr(server, "tree", list)
        monkeypatch.setattr("os.kill", lambda *_: pytest.fail("the id may be another's"))
        assert server.end_by(signal.SIGTERM, 1) == Ending(0, ())
