"""What is shown of SGLang's log: its newest line, and the cause of a failure."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.launch.server import StartError, explained
from lim_sglang.launch.server_log import (
    MAX_LINE,
    NUM_KEPT_LOGS,
    cause_of_failure,
    keep_log,
    newest_line,
    shown_line,
)
from lim_sglang.launch.supervisor import Ending

TRACEBACK = """\
[2026-11-28 17:00:01] Scheduler hit an exception: Traceback (most recent call last):
  File "scheduler.py", line 4, in run_scheduler_process
    scheduler = Scheduler(
RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.

[2026-11-28 17:00:02] Received sigquit from a child process. It usually means the child failed.
"""


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"first\nsecond", "second"),
        (b"first\nsecond\n\n", "second"),
        (b"loading\n/a/b.py:7: UserWarning: so\n  warnings.warn(\n", "loading"),
        (b"[2026-11-29 09:05:36 TP0] Load weight begin.\n", "Load weight begin."),
        (b"loading\n[2026-11-29 09:05:36]\n[2026-11-29 09:05:36] \n", "loading"),
        (b"loading\n[2026-11-29 09:05:36] Ignore import error when loading a.b: no c\n", "loading"),
        (b"loading\n[2026-11-29 09:05:36] Fail to set RLIMIT_NOFILE: too high\n", "loading"),
        (
            b"[2026-11-29 09:05:36] INFO:     Waiting for application startup.\n"
            b'[2026-11-29 09:05:36] INFO:     127.0.0.1:4281 - "GET /health HTTP/1.1" 503 No\n',
            "INFO:     Waiting for application startup.",
        ),
        (b"loading\n[2026-11-29 09:05:36] INFO:     Uvicorn running on http://a:1\n", "loading"),
        (b"loading\nW1129 10:16:57.047000 2223 a.py:140] No CUDA runtime is found\n", "loading"),
        (b"loading\nerror: Bad options.\n- `a`: no\n  - `b`: no\n", "- `a`: no"),
        (b"Loading: 10%\rLoading: 20%\r", "Loading: 20%"),
        (b"\x1b[31mred\x1b[0m [bold]\n", "red [bold]"),
        (
            b"\xff" + b"x" * 3000 + b"\nlast \xc3\xa4\n",
            "last \N{LATIN SMALL LETTER A WITH DIAERESIS}",
        ),
    ],
)
def test_the_newest_line_of_a_log(log: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(log)
    assert newest_line(path) == line


@pytest.mark.parametrize(
    ("log", "width", "line"),
    [
        ("Loading weights", 20, "Loading weights"),
        ("Loading weights of layers", 20, "Loading weights of…"),
        ("Loading-weights-of-layers", 20, "Loading-weights-of-…"),
        (
            "server_args=" + "name='value', " * 300 + "\n",
            40,
            "server_args=name='value', name='value',…",
        ),
        ("x" * 30_000 + "\n" + "[17:00] args " + "name='value', " * 500, 20, "[17:00] args…"),
        ("cut " * 30_000 + "\nlast\n", 20, "last"),
    ],
)
def test_a_long_line_of_a_log_is_shown_from_its_beginning_in_whole_words(
    log: str, width: int, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "server.log"
    path.write_text(log)
    assert shown_line(path, width) == line
    assert len(shown_line(path)) <= MAX_LINE


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", "(which is empty)"),
        (
            "".join(f"line {number}\n" for number in range(9)),
            "line 4\nline 5\nline 6\nline 7\nline 8",
        ),
        (
            "a warning\nerror: lim cannot serve with these settings:\n  - --pp-size 2: why\n"
            "  - another reason\nresource_tracker: there appear to be leaked objects\n",
            "lim cannot serve with these settings:\n  - --pp-size 2: why\n  - another reason",
        ),
        (
            "usage: launch_server.py [-h]\n   [--dtype]\n"
            "launch_server.py: error: argument --dtype: invalid choice: 'f'\n",
            "argument --dtype: invalid choice: 'f'",
        ),
        (
            TRACEBACK,
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
        ),
        (TRACEBACK + TRACEBACK, TRACEBACK.splitlines()[3]),
        (
            "".join(f"a.b.Bad{n}Error: {n}\n" for n in range(5)),
            "\n".join(f"a.b.Bad{n}Error: {n}" for n in (2, 3, 4)),
        ),
        ("[2026-11-28 17:00:01] Error: it is full\n", "Error: it is full"),
    ],
)
def test_the_cause_of_a_failure_is_what_the_log_says_in_words(
    log: str, cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "server.log"
    path.write_text(log)
    assert cause_of_failure(path) == cause


def test_the_logs_of_the_last_failures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIM_CACHE", str(tmp_path / "cache"))
    kept = []
    for number in range(NUM_KEPT_LOGS + 2):
        folder = tmp_path / f"lim-server-{number}"
        folder.mkdir()
        (folder / "server.log").write_text(str(number))
        os.utime(folder / "server.log", (number, number))
        kept.append(keep_log(folder / "server.log"))
    assert [path.name for path in kept if path.exists()] == [
        f"lim-server-{number}.log" for number in range(2, NUM_KEPT_LOGS + 2)
    ]
    assert kept[-1].read_text() == str(NUM_KEPT_LOGS + 1)


def test_a_log_that_cannot_be_kept_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("LIM_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "server.log"
    log.write_text("words")
    assert keep_log(log) == log
    assert log.read_text() == "words"


def test_a_log_that_is_gone_says_nothing(tmp_path: Path) -> None:
    assert newest_line(tmp_path / "server.log") == ""
    assert cause_of_failure(tmp_path / "server.log") == "(which is empty)"


@pytest.mark.parametrize(
    ("log", "told", "untold"),
    [
        ("RuntimeError: no room\n[…] Received sigquit from a child process. It", "itself", "dmesg"),
        ("RuntimeError: no room\n", "dmesg", "itself"),
    ],
)
def test_memory_is_not_blamed_where_sglang_killed_itself(
    log: str, told: str, untold: str, tmp_path: Path
) -> None:
    """A child that fails asks the main process to kill all, by SIGKILL."""
    path = tmp_path / "server.log"
    path.write_text(log)
    server: Any = SimpleNamespace(poll=lambda: Ending(137), log=path)
    text = explained(StartError(Ending(137)), server, is_temporary=False)
    assert "killed by signal 9 (SIGKILL) before it was ready" in text
    assert "RuntimeError: no room" in text
    assert (told in text, untold in text) == (True, False)
