"""Grading: integers and letters are parsed, other answers are math-verify's; a stored run is graded
again from its texts alone, completely or not at all.
"""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals import grading
from lim_sglang.evals.grading import (
    GRADING_VERSION,
    Grader,
    GradingResult,
    grade_run,
)
from lim_sglang.evals.run_store import GradedSample, RunRecord, load_run, open_run
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import SampleState
from tests.builders import TextEquivalence, make_sample


def test_expressions_are_compared_by_the_checker_and_no_answer_is_wrong() -> None:
    checker = Mock(TextEquivalence)
    grader = Grader(AnswerKind.EXPRESSION, checker)
    assert grader.correct("1", "2") is checker.equivalent.return_value
    assert grader.equivalent("1", "2") is checker.equivalent.return_value
    assert not grader.correct("1", None)
    assert grader.equivalent("x", "x")
    assert checker.mock_calls == [call.equivalent("1", "2")] * 2


@pytest.mark.parametrize(
    ("kind", "equal", "other", "unreadable"),
    [
        (AnswerKind.INTEGER, ("025", "25.0"), "26", "25x"),
        (AnswerKind.CHOICE, ("(B)", "B) since"), "C", "x+1"),
    ],
)
def test_integers_and_letters_are_compared_without_the_checker(
    kind: AnswerKind, equal: tuple[str, str], other: str, unreadable: str
) -> None:
    checker = Mock(TextEquivalence)
    grader = Grader(kind, checker)
    gold, answer = equal
    assert grader.correct(gold, answer)
    assert grader.equivalent(gold, answer)
    for wrong in (other, unreadable):
        assert not grader.correct(gold, wrong)
        assert not grader.equivalent(gold, wrong)
    # An unreadable answer is never right, but it is a vote for its own text.
    assert not grader.correct(unreadable, unreadable)
    assert grader.equivalent(unreadable, unreadable)
    assert not grader.equivalent(unreadable, f"{unreadable} ")
    assert checker.mock_calls == []


ANSWERS = {
    ("q", 0): (r"\boxed{4}", "4"),
    ("q", 1): (r"\boxed{5}", "5"),
    ("r", 0): ("It is 4.", None),
    ("r", 1): (r"\boxed{4", None),
}
"""Texts and the answers in them."""
TEXTS = {key: text for key, (text, _) in ANSWERS.items()}


def write_run(path: Path, texts: dict[tuple[str, int], str] = TEXTS) -> Path:
    """Store samples with gold answer 4, all of them as wrong and with another answer."""
    with open_run(path, RunRecord("math500-x", {"task": "math500"}, {})) as folder:
        for (question, index), text in texts.items():
            sample = replace(make_sample(index, "stale"), text=text)
            folder.append(GradedSample(question, "4", False, sample))
    return path


def grade_again(
    path: Path, checker: TextEquivalence | Mock | None = None, **options: Any
) -> GradingResult:
    grader = Grader(AnswerKind.EXPRESSION, checker or TextEquivalence())
    return grade_run(load_run(path), grader, **{"num_threads": 2, **options})


def test_answers_and_verdicts_come_from_the_texts_alone_with_who_gave_them(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    before = (run / "samples.jsonl").read_bytes()
    assert grade_again(run) == GradingResult(num_samples=4, num_changed=1, num_right=1)
    found = {graded.key: (graded.sample.answer, graded.correct) for graded in load_run(run).samples}
    assert found == {key: (answer, answer == "4") for key, (_, answer) in ANSWERS.items()}
    assert (run / "samples.jsonl").read_bytes() == before
    rows = [json.loads(line) for line in (run / "grades.jsonl").read_text().splitlines()]
    by = f"math-verify 0.9.0, grading {GRADING_VERSION}"
    assert rows == [
        {"question": question, "index": n, "answer": answer, "correct": answer == "4", "by": by}
        for (question, n), (_, answer) in ANSWERS.items()
    ]


def test_an_aborted_sample_has_a_verdict_and_is_not_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path, {("q", 0): r"\boxed{4}"})
    with open_run(run, load_run(run).record) as folder:
        aborted = replace(folder.samples[0].sample, index=1, state=SampleState.ABORTED)
        folder.append(GradedSample("q", "4", False, aborted))
    assert grade_again(run) == GradingResult(num_samples=1, num_changed=1, num_right=1)
    assert len((run / "grades.jsonl").read_text().splitlines()) == 2


def test_a_sample_that_is_stored_during_grading_is_not_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path, {("q", 0): r"\boxed{4}"})
    run = load_run(path)
    with open_run(path, run.record) as folder:
        folder.append(GradedSample("r", "4", False, make_sample(0, "4")))
    seen: list[int] = []
    grader = Grader(AnswerKind.EXPRESSION, TextEquivalence())
    found = grade_run(run, grader, num_threads=1, on_graded=seen.append)
    assert found.num_samples == len(seen) == 1
    assert len(load_run(path).samples) == 2


def test_grading_again_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    grade_again(run)
    first = (run / "grades.jsonl").read_bytes()
    assert grade_again(run, num_threads=7).num_changed == 0
    assert (run / "grades.jsonl").read_bytes() == first


def checker_of(judge: Callable[[], object]) -> Mock:
    """Return a checker that finds every answer right and calls `judge` before."""
    return Mock(TextEquivalence, equivalent=Mock(side_effect=lambda *_: judge() or True))


def test_verdicts_are_given_side_by_side_and_counted_as_they_come(tmp_path: Path) -> None:
    run = write_run(tmp_path, {("q", index): r"\boxed{4}" for index in range(8)})
    meeting = threading.Barrier(4, timeout=10)
    seen: list[int] = []
    grade_again(run, checker_of(meeting.wait), num_threads=4, on_graded=seen.append)
    assert seen == list(range(1, 9))


def test_an_interruption_leaves_the_verdicts_as_they_were_and_stops_grading(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path, {("q", index): r"\boxed{4}" for index in range(50)})
    (run / "grades.jsonl").write_text("")
    released = threading.Event()
    # Five verdicts are given; the threads then hold one each until the interruption is over.
    allowed = threading.Semaphore(5)

    def wait() -> None:
        if not allowed.acquire(blocking=False):
            released.wait(10)

    def interrupt(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    checker = checker_of(wait)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        grade_again(run, checker, on_graded=interrupt)
    released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert checker.equivalent.call_count <= 5 + 2
    assert {path.name for path in run.iterdir()} == {"run.json", "samples.jsonl", "grades.jsonl"}
    assert (run / "grades.jsonl").read_text() == ""


def test_a_full_disk_leaves_the_verdicts_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path)
    grade_again(run)
    before = (run / "grades.jsonl").read_bytes()

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        DataError, match=r"cannot write .*grades\.jsonl \(No space left on device\)"
    ):
        grade_again(run)
    assert (run / "grades.jsonl").read_bytes() == before


def test_ctrl_c_is_heeded_on_whichever_thread_the_signal_lands() -> None:
    """The kernel may hand a signal of the process to a thread that waits for a verdict."""
    asked, released = threading.Event(), threading.Event()
    threads: list[int] = []

    def extract(*_: object) -> None:
        threads.append(threading.get_ident())
        asked.set()
        released.wait(20)

    def interrupt() -> None:
        asked.wait(20)
        time.sleep(0.3)
        signal.pthread_kill(threads[0], signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    grader = Mock(extract=extract, correct=lambda *_: False)
    began_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(grading._verdicts([GradedSample("q", "4", False, make_sample(0, "4"))], grader, 1))
        assert time.monotonic() - began_s < 15
    finally:
        released.set()
        interrupting.join()
