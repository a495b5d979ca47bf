"""Grading again: from the texts alone, all of a run or nothing of it, and always the same."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.grading import GRADING_VERSION, AnswerKind, Grader
from lim_sglang.evals.regrade import Regraded, grade_run
from lim_sglang.evals.run_store import GradedSample, RunRecord, load_run, open_run
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

TEXTS = {
    ("q", 0): r"\boxed{4}",
    ("q", 1): r"\boxed{5}",
    ("r", 0): "It is 4.",
    ("r", 1): r"\boxed{4",
}
ANSWERS = {("q", 0): "4", ("q", 1): "5", ("r", 0): None, ("r", 1): None}


class TextJudge:
    """Finds equal what is the same text; `on_asked` is called before."""

    def __init__(self, on_asked: Callable[[], object] = lambda: None) -> None:
        self.on_asked = on_asked
        self.asked = 0

    def equivalent(self, a: str, b: str) -> bool:
        return a == b

    def correct(self, gold: str, answer: str) -> bool:
        self.asked += 1
        self.on_asked()
        return gold == answer


def write_run(path: Path, texts: dict[tuple[str, int], str] = TEXTS) -> Path:
    """Samples with gold answer 4, all of them stored as wrong and with another answer."""
    with open_run(path, RunRecord("math500-x", {"task": "math500"}, {})) as folder:
        for (question, index), text in texts.items():
            sample = replace(make_sample(index, "stale"), text=text)
            folder.append(GradedSample(question, "4", False, sample))
    return path


def regrade(path: Path, checker: TextJudge | None = None, **options: Any) -> Regraded:
    grader = Grader(AnswerKind.EXPRESSION, checker or TextJudge())
    return grade_run(path, grader, **{"num_threads": 2, **options})


def test_answers_and_verdicts_come_from_the_texts_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    before = (run / "samples.jsonl").read_bytes()
    assert regrade(run) == Regraded(num_samples=4, num_changed=1, num_right=1)
    found = {graded.key: (graded.sample.answer, graded.correct) for graded in load_run(run).samples}
    assert found == {key: (answer, answer == "4") for key, answer in ANSWERS.items()}
    assert (run / "samples.jsonl").read_bytes() == before


def test_an_aborted_sample_has_a_verdict_and_is_not_counted(tmp_path: Path) -> None:
    with open_run(tmp_path, RunRecord("math500-x", {"task": "math500"}, {})) as folder:
        for index, state in enumerate((SampleState.FINISHED, SampleState.ABORTED)):
            sample = replace(make_sample(index, "4"), text=r"\boxed{4}", state=state)
            folder.append(GradedSample("q", "4", False, sample))
    assert regrade(tmp_path) == Regraded(num_samples=1, num_changed=1, num_right=1)
    assert len((tmp_path / "grades.jsonl").read_text().splitlines()) == 2


def test_each_verdict_says_who_gave_it(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    regrade(run)
    rows = [json.loads(line) for line in (run / "grades.jsonl").read_text().splitlines()]
    assert [(row["question"], row["index"]) for row in rows] == list(TEXTS)
    assert [set(row) for row in rows] == [{"question", "index", "answer", "correct", "by"}] * 4
    (by,) = {row["by"] for row in rows}
    assert by == f"math-verify 0.9.0, grading {GRADING_VERSION}"


def test_grading_again_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    regrade(run)
    first = (run / "grades.jsonl").read_bytes()
    assert regrade(run, num_threads=7) == Regraded(num_samples=4, num_changed=0, num_right=1)
    assert (run / "grades.jsonl").read_bytes() == first


def test_verdicts_are_given_side_by_side_and_counted_as_they_come(tmp_path: Path) -> None:
    run = write_run(tmp_path, {("q", index): r"\boxed{4}" for index in range(8)})
    meeting = threading.Barrier(4, timeout=10)
    seen: list[int] = []
    regrade(run, TextJudge(meeting.wait), num_threads=4, on_graded=seen.append)
    assert seen == list(range(1, 9))


def test_an_interruption_leaves_the_verdicts_of_before_and_does_not_go_on(tmp_path: Path) -> None:
    run = write_run(tmp_path, {("q", index): r"\boxed{4}" for index in range(200)})
    (run / "grades.jsonl").write_text("")
    checker = TextJudge(lambda: time.sleep(0.02))

    def interrupt(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regrade(run, checker, on_graded=interrupt)
    assert checker.asked < 50
    time.sleep(0.1)  # what is being judged ends
    asked = checker.asked
    time.sleep(0.2)
    assert checker.asked == asked
    assert {path.name for path in run.iterdir()} == {"run.json", "samples.jsonl", "grades.jsonl"}
    assert (run / "grades.jsonl").read_text() == ""


def test_a_full_disk_leaves_the_verdicts_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path)
    regrade(run)
    before = (run / "grades.jsonl").read_bytes()

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        DataError, match=r"cannot write .*grades\.jsonl \(No space left on device\)"
    ):
        regrade(run)
    assert (run / "grades.jsonl").read_bytes() == before


def test_a_file_of_verdicts_that_is_damaged_is_not_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "grades.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"is no verdict.*delete the file"):
        regrade(run)


def test_no_run_no_verdicts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no record of a run"):
        regrade(tmp_path)
    assert list(tmp_path.iterdir()) == []
