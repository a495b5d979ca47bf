"""A run that is killed again and again ends as one that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

from tests.evals.evaluating import (
    answering,
    comparable,
    keys,
    rows,
    run,
    words_for,
    write_questions,
)
from tests.fakes.sglang_server import FakeServer, eventually, serving
from tests.forked_commands import ROOT, Forker

NUM_LINES = 40 * 4
PACE_S = 0.01
"""Before each of seven tokens."""
WAIT_S = 120.0


def kill_again_and_again(
    forker: Forker, fake: FakeServer, folder: Path, words: list[str], *, times: int
) -> list[int]:
    """Start the command and kill it at a random moment; the lines that there were after each.

    Moments are told by what the server was asked for, so that a slow machine is as random: some
    before it is asked at all, the others up to eight samples later.
    """
    moments = random.Random(20261125)
    out = Path(words[words.index("--out") + 1])
    counts = []
    for _ in range(times):
        asked_before, wanted = len(fake.requests), moments.randrange(9)
        command = forker.start(Path(mkdtemp(dir=folder)), *words)
        assert eventually(partial(_has_asked, fake, asked_before + wanted), WAIT_S), command.error
        time.sleep(moments.uniform(0.0, 0.2))
        os.kill(command.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, f"it had ended before: {command.error}"
        stored = keys(out) if (out / "samples.jsonl").exists() else []
        assert len(stored) == len(set(stored))
        counts.append(len(stored))
    return counts


def _has_asked(fake: FakeServer, count: int) -> bool:
    return len(fake.requests) >= count


def in_a_new_process(words: list[str]) -> str:
    """What the command prints when it is left alone."""
    done = subprocess.run(
        [sys.executable, "-m", "lim_sglang", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_twenty_times_each_sample_is_there_once_and_the_scores_are_the_same(
    forker: Forker, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path, 40)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with serving(answering(PACE_S)) as fake:
        words = [*words_for(questions, killed, fake), "--concurrency", "2"]
        counts = kill_again_and_again(forker, fake, tmp_path, words, times=20)
        # Killed before a sample was there, and between two of them: else nothing was shown.
        grown = [after - before for before, after in pairwise([0, *counts])]
        assert sum(count > 0 for count in grown) >= 6
        assert sum(count == 0 for count in grown) >= 1
        assert counts[-1] < NUM_LINES
        last = in_a_new_process(words)
        drawn_twice = len(fake.requests) - NUM_LINES
        fast = [*words_for(questions, whole, fake), "--concurrency", "32"]
        assert run(forker, tmp_path, *fast).output == last
    assert sorted(set(keys(killed))) == sorted(keys(killed)) == sorted(keys(whole))
    assert len(keys(killed)) == NUM_LINES
    assert comparable(killed) == comparable(whole)
    # No more than what was in flight, or about to be written, when it was killed.
    assert 0 < drawn_twice <= 20 * 4


def test_a_program_that_stops_by_itself_begins_a_question_anew_when_it_is_killed(
    forker: Forker, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path, 16)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    program = ["--program", "early_stop", "--set", "window=2"]
    with serving(answering(PACE_S)) as fake:
        words = [*words_for(questions, killed, fake, samples=6), *program, "--concurrency", "4"]
        counts = kill_again_and_again(forker, fake, tmp_path, words, times=6)
        assert counts[-1] > 0
        last = run(forker, tmp_path, *words)
        fast = [*words_for(questions, whole, fake, samples=6), *program, "--concurrency", "4"]
        assert run(forker, tmp_path, *fast).output == last.output
    assert comparable(killed) == comparable(whole)
    for question in {row["question"] for row in rows(killed)}:
        lines = [row for row in rows(killed) if row["question"] == question]
        assert {row["of"] for row in lines} == {len(lines)}
        assert [row["index"] for row in lines] == list(range(len(lines)))
