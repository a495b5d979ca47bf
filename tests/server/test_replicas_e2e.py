"""Real replicas under a run of `lim eval`: a replica is killed, then the process that has them."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from signal import SIGKILL

import httpx
import pytest

from lim_sglang.config import lim_state
from tests.fakes.sglang_server import eventually
from tests.processes import LIM_SERVE, LocalServer, clean_environment, serving, still_running

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GONE_WITHIN_S = 10.0
RUN_WITHIN_S = 300.0
NUM_QUESTIONS, NUM_SAMPLES = 8, 4


def replicas_of(server: LocalServer) -> list[int]:
    """Return the requests in flight of each replica that serves."""
    info = httpx.get(f"{server.url}/server_info", timeout=30).raise_for_status().json()
    return [each["in_flight"] for each in info["replicas"] if each["serves"]]


def test_a_killed_replica_costs_a_run_nothing_and_a_killed_server_leaves_nothing(
    tiny_model: Path, tmp_path: Path, temporary: Path
) -> None:
    questions, run = tmp_path / "own.jsonl", tmp_path / "run"
    rows = [{"question": f"w9 w8 w{number + 20}", "answer": "1"} for number in range(NUM_QUESTIONS)]
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [*LIM_SERVE, str(tiny_model), "--lim-select-layers", "2,5", "--replicas", "2"]
    with serving(command, folder=tmp_path, settings={"TMPDIR": str(temporary)}) as server:
        tree = server.tree()
        options = ["--samples", str(NUM_SAMPLES), "--max-tokens", "400", "--out", str(run)]
        options += ["--url", server.url, "--program", "budget"]  # streamed
        options += ["--set", "tokens=1000000"]
        evaluation = subprocess.Popen(
            [sys.executable, "-m", "lim_sglang", "eval", f"file:{questions}", *options],
            env=clean_environment({}),
        )
        assert eventually(lambda: sum(replicas_of(server)) == NUM_QUESTIONS * NUM_SAMPLES, 60)
        time.sleep(2)
        victim = next(each for each in tree if "sglang::scheduler" in " ".join(each.cmdline()))
        os.kill(victim.pid, SIGKILL)
        assert eventually(lambda: len(replicas_of(server)) == 1, GONE_WITHIN_S)
        assert evaluation.wait(RUN_WITHIN_S) == 0
        state = lim_state(httpx.get(f"{server.url}/server_info", timeout=30).json()) or {}
        assert (state["replicas"], state["live_replicas"]) == (2, 1)
        os.kill(server.pid, SIGKILL)
        assert not still_running(tree, GONE_WITHIN_S)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    counts = Counter(each["question"] for each in samples)
    assert set(counts.values()) == {NUM_SAMPLES}
    assert len(counts) == NUM_QUESTIONS
    assert {each["state"] for each in samples} <= {"finished", "truncated"}
    assert list(temporary.iterdir()) == []
