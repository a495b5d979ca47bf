"""`lim ask` and `lim eval` on real servers, one of which is killed in the middle of a run."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lim_sglang.evals.servers import sampling_of
from lim_sglang.programs.options import NO_ANSWER
from lim_sglang.programs.schema import Sampling
from tests.processes import LIM_SERVE, Ending, LocalServer, clean_environment, serving

pytestmark = pytest.mark.e2e

API_KEY = "a-key-of-the-tests"
NUM_QUESTIONS, NUM_SAMPLES = 2, 4
LONG, SHORT = "100", "24"
"""Tokens a sample: enough for a server to die meanwhile; few for a quick vote."""
WAIT_S = 240.0
ENDS_WITHIN_S = 20.0


@dataclass(frozen=True)
class Interrupted:
    """A run before and after its server was killed."""

    code: int
    error: str
    stored: list[str]
    """Lines when the first command had ended."""
    second: subprocess.CompletedProcess[str]
    final: list[str]
    run_record: dict
    ask: subprocess.CompletedProcess[str]
    """`lim ask` on the second server."""
    ending: Ending
    """End of the second server, after Ctrl-C."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with questions of our own in the place of a benchmark's."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [{"problem": f"w{n + 9} w{n + 10}", "answer": n} for n in range(NUM_QUESTIONS + 2)]
    (folder / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lim(*arguments: str, server: LocalServer) -> list[str]:
    """Return a `lim` command against a server."""
    return [sys.executable, "-m", "lim_sglang", *arguments, "--url", server.url]


def evaluating(questions: Path, out: Path, server: LocalServer) -> list[str]:
    """Return the command that is given twice."""
    return lim(
        *("eval", "math500", "--data-dir", str(questions), "--out", str(out)),
        *("--limit", str(NUM_QUESTIONS), "--samples", str(NUM_SAMPLES)),
        *("--max-tokens", LONG, "--temperature", "0.8", "--seed", "1", "--concurrency", "3"),
        server=server,
    )


def environment() -> dict[str, str]:
    """Return the environment of a client that knows the key."""
    return clean_environment({"LIM_API_KEY": API_KEY})


@pytest.fixture(scope="module")
def interrupted(
    tiny_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Interrupted:
    """Begin a run, kill its server after some samples, and resume the run with a new server."""
    out = tmp_path_factory.mktemp("run")
    command = [*LIM_SERVE, str(tiny_model), "--budget", "64", "--lim-select-layers", "2,5"]
    settings = {"LIM_API_KEY": API_KEY}
    with serving(command, folder=tmp_path_factory.mktemp("first"), settings=settings) as server:
        first = subprocess.Popen(
            evaluating(questions, out, server),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_lines(out / "samples.jsonl", 2, first)
        server.kill()
        _, error = first.communicate(timeout=WAIT_S)
    stored = (out / "samples.jsonl").read_text().splitlines()
    with serving(command, folder=tmp_path_factory.mktemp("second"), settings=settings) as server:
        second = run(evaluating(questions, out, server))
        ask = run(lim("ask", "w7 w8", "--samples", "3", "--max-tokens", SHORT, server=server))
        ending = server.end_by(signal.SIGINT, ENDS_WITHIN_S)
    return Interrupted(
        first.returncode,
        error,
        stored,
        second,
        (out / "samples.jsonl").read_text().splitlines(),
        json.loads((out / "run.json").read_text()),
        ask,
        ending,
    )


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=WAIT_S
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a number of samples is stored."""
    deadline = time.monotonic() + WAIT_S
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no samples were stored"
        time.sleep(0.1)


def test_a_killed_server_ends_the_evaluation_with_a_clear_error(interrupted: Interrupted) -> None:
    assert interrupted.code == 1
    assert "error: no server answers at" in interrupted.error
    assert "the same command resumes the run" in interrupted.error
    assert "Traceback" not in interrupted.error


def test_finished_samples_are_kept_and_the_same_command_resumes(interrupted: Interrupted) -> None:
    assert 2 <= len(interrupted.stored) < NUM_QUESTIONS * NUM_SAMPLES
    assert interrupted.second.returncode == 0, interrupted.second.stderr
    assert (
        f"resuming at {len(interrupted.stored)} of {NUM_QUESTIONS * NUM_SAMPLES} samples"
        in interrupted.second.stderr
    )
    assert interrupted.final[: len(interrupted.stored)] == interrupted.stored
    samples = [json.loads(line) for line in interrupted.final]
    assert len({(s["question"], s["index"]) for s in samples}) == NUM_QUESTIONS * NUM_SAMPLES


def test_the_table_and_the_record_name_the_run(interrupted: Interrupted) -> None:
    table = interrupted.second.stdout
    assert "LessIsMore 64" in table
    assert "pass@1" in table
    assert f"right votes of {NUM_SAMPLES}" in table
    settings = interrupted.run_record["settings"]
    assert settings["lim"]["config"]["budget"] == 64
    assert settings["sampling"]["seed_honoured"] is False
    assert settings["server"]["device_name"] == "CPU"
    assert settings["program"] == {"name": "majority", "options": {}, "parallel": None}


def test_samples_hold_the_seed_that_was_sent_and_was_not_honoured(
    interrupted: Interrupted,
) -> None:
    samples = [json.loads(line) for line in interrupted.final]
    seeds = {(s["question"], s["seed"] - s["index"]) for s in samples}
    assert seeds == {(name, sampling_of(Sampling(seed=1), name).seed) for name, _ in seeds}
    assert not any(s["seed_honoured"] for s in samples)


def test_a_vote_is_shown_sample_by_sample_and_ends_in_one_line(interrupted: Interrupted) -> None:
    ask = interrupted.ask
    assert ask.returncode == NO_ANSWER, ask.stderr  # random words are no votes
    shown = [line for line in ask.stderr.splitlines() if " tokens, " in line]
    assert [line[:3] for line in shown if line[0].isdigit()] == ["1/3", "2/3", "3/3"]
    assert "without an answer" in ask.stderr
    (last,) = ask.stdout.splitlines()
    assert "no answer  (0 votes of 3 samples" in last
    assert "tokens" in last


def test_ctrl_c_ends_the_whole_process_tree(interrupted: Interrupted) -> None:
    assert interrupted.ending == Ending(0, ())
