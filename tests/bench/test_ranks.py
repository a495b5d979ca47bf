"""Ranks of tensor parallelism in a benchmark, without a GPU: who is heard, and how all end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lim_sglang.bench import ranks
from lim_sglang.bench.ranks import run_ranks
from lim_sglang.errors import LimError, ServerError
from lim_sglang.launch.supervisor import is_running
from tests.bench.rank_functions import BUDGET, act, decode_on_cpu, set_nothing_up
from tests.fakes.sglang_server import eventually
from tests.server.tiny_model import build_tiny_qwen2

DEADLINE_S = 30
"""Most time in which ranks start, fail and end on a busy machine; a rank that waits never does."""


def running(folder: Path) -> list[int]:
    """Return the processes that have named themselves in a folder and still run."""
    found = [int(path.name) for path in folder.iterdir()]
    return [pid for pid in found if psutil.pid_exists(pid) and is_running(psutil.Process(pid))]


def run(folder: Path, ends: dict[int, str], shown: list[str]) -> Any:
    """Run two ranks that end like this."""
    return run_ranks(act, (str(folder), ends), 2, shown.append, set_nothing_up)


def test_the_first_rank_is_heard_alone_and_all_end(tmp_path: Path) -> None:
    shown: list[str] = []
    assert list(run(tmp_path, {}, shown)) == [(0, 1), (0, 2)]
    assert shown == ["rank 0 of 2"]
    assert (len(list(tmp_path.iterdir())), running(tmp_path)) == (2, [])


@pytest.mark.parametrize(
    ("ends", "kind", "words"),
    [
        ({0: "wait", 1: "no room"}, LimError, "rank 1: no room"),
        ({0: "no room", 1: "no room"}, LimError, "no room"),
        (
            {0: "row 3", 1: "row 4"},
            LimError,
            "several ranks failed:\n  - rank 0: row 3\n  - rank 1: row 4",
        ),
        ({0: "connection closed!", 1: "row 4"}, LimError, "rank 1: row 4"),
        ({0: "wait", 1: "bug!"}, ServerError, "rank 1: RuntimeError: bug!"),
        ({0: "wait", 1: "die"}, ServerError, "rank 1: died with exit code -9: see its output"),
        ({0: "die", 1: "wait"}, ServerError, "rank 0: died with exit code -9: see its output"),
    ],
)
def test_a_rank_that_fails_ends_the_run_in_words(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ends: dict[int, str],
    kind: type[LimError],
    words: str,
) -> None:
    if "wait" in ends.values():  # for ever, so nothing else is to be heard
        monkeypatch.setattr(ranks, "OTHERS_WITHIN_S", 0.1)
    begin = time.monotonic()
    with pytest.raises(LimError) as caught:
        list(run(tmp_path, ends, []))
    assert (type(caught.value), str(caught.value), running(tmp_path)) == (kind, words, [])
    assert time.monotonic() - begin < DEADLINE_S


def test_ranks_end_when_nobody_wants_further_items(tmp_path: Path) -> None:
    items = run(tmp_path, {0: "wait", 1: "wait"}, [])
    assert next(items) == (0, 1)
    items.close()
    assert running(tmp_path) == []


def test_ranks_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.rank_functions", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        begun = eventually(lambda: len(running(tmp_path)) == 2, DEADLINE_S)
        parent.kill()
        ended = eventually(lambda: running(tmp_path) == [], DEADLINE_S)
    for pid in running(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert (begun, ended) == (True, True)


@pytest.mark.e2e
@pytest.mark.slow
def test_ranks_decode_together_on_heads_of_their_own(tmp_path: Path) -> None:
    model = build_tiny_qwen2(tmp_path / "model")
    (found,) = run_ranks(decode_on_cpu, (str(model),), 2, lambda _: None, set_nothing_up)
    assert found["same"] == {"keys": False, "slots": True, "logits": True, "kept": True}
    assert (found["ranks"], found["heads"]) == ([0, 1], (2, 1))
    assert (found["kept"], found["finite"], found["sparse_rows"]) == (BUDGET, True, 1)
