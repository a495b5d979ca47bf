"""`lim grade` as a command line."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner

from lim_sglang.errors import DataError
from lim_sglang.evals.commands import grade
from lim_sglang.evals.run_store import GradedSample, RunRecord, open_run
from tests.builders import make_sample

LIM = "import sys; from lim_sglang.cli import main; main()"
SLOW = "10^{10^{8}}"
"""math-verify works on it until it gives up after five seconds."""


def write_run(path: Path, task: str, gold: str, *texts: str) -> Path:
    """A run whose samples are all stored as wrong."""
    with open_run(path, RunRecord(path.name, {"task": task}, {})) as folder:
        for index, text in enumerate(texts):
            sample = replace(make_sample(index, None), text=text)
            folder.append(GradedSample("q", gold, False, sample))
    return path


def lim_grade(*words: object) -> Any:
    """Call the command as the command line does; an error comes through."""
    app = typer.Typer()
    app.command()(grade)
    found = CliRunner().invoke(app, [*map(str, words)])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def verdicts(run: Path) -> list[bool]:
    return [json.loads(line)["correct"] for line in (run / "grades.jsonl").read_text().splitlines()]


def test_each_run_is_graded_by_the_kind_of_its_task(tmp_path: Path) -> None:
    maths = write_run(tmp_path / "maths", "math500", r"\frac{1}{2}", r"\boxed{0.5}", r"\boxed{B}")
    choices = write_run(tmp_path / "own", "file:mine:choice", "B", r"\boxed{B) 0.5}", r"\boxed{C}")
    sheet = write_run(tmp_path / "sheet", "aime24", "7", r"\boxed{007}", r"\boxed{7.5}", "7")
    found = lim_grade(maths, choices, sheet, "--workers", 1)
    assert found.exit_code == 0
    assert found.stdout.splitlines() == [
        f"{maths}: 1 of 2 right, 1 changed",
        f"{choices}: 1 of 2 right, 1 changed",
        f"{sheet}: 2 of 3 right, 2 changed",
    ]
    assert verdicts(maths) == [True, False]
    assert verdicts(choices) == [True, False]
    assert verdicts(sheet) == [True, False, True]
    again = lim_grade(maths, choices, sheet, "--workers", 1)
    assert again.stdout.count(" 0 changed") == 3


def test_a_folder_that_is_no_run_is_refused_before_any_is_graded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "aime24", "7", r"\boxed{7}")
    with pytest.raises(DataError, match="name the folder of a run"):
        lim_grade(run, tmp_path)
    assert not (run / "grades.jsonl").exists()


def test_a_run_of_a_task_that_is_gone_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "aime1924", "7", r"\boxed{7}")
    with pytest.raises(DataError, match="unknown task 'aime1924'; the tasks are math500"):
        lim_grade(run)


@pytest.mark.parametrize("words", [["--workers", "0", "x"], []])
def test_words_that_make_no_sense_are_refused(words: list[str]) -> None:
    assert lim_grade(*words).exit_code == 2


def test_ctrl_c_ends_it_at_once_with_its_workers_and_without_verdicts(tmp_path: Path) -> None:
    texts = [rf"\boxed{{{SLOW}+{number}}}" for number in range(20)]
    run = write_run(tmp_path / "run", "math500", "1", *texts)
    words = [sys.executable, "-c", LIM, "grade", str(run), "--workers", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as lim:
        deadline = time.monotonic() + 60
        while not (workers := psutil.Process(lim.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lim.send_signal(signal.SIGINT)
        output, error = lim.communicate(timeout=10)
    assert lim.returncode == 130
    assert output == ""
    assert "Traceback" not in error
    assert not (run / "grades.jsonl").exists()
    assert not any(worker.is_running() for worker in workers)
