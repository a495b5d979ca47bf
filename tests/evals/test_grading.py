"""Grading: integers and letters are parsed, other answers are math-verify's; a stored run is graded
again from its texts alone, completely or not at all.
"""

import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.grading import (
    GRADING_VERSION,
    MAX_PARSED_CHARS,
    AnswerKind,
    Grader,
    GradingResult,
    as_choice,
    as_integer,
    grade_run,
)
from lim_sglang.evals.run_store import GradedSample, RunRecord, load_run, open_run
from lim_sglang.programs.schema import SampleState
from tests.builders import TextEquivalence, make_sample


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("204", 204),
        ("023", 23),
        ("000", 0),
        ("999", 999),
        (" $104$. ", 104),
        ("(7)", 7),
        (r"\left(7\right)", 7),
        (r"\textbf{45}", 45),
        (r"\boxed{45}", 45),
        (r"45 \text{ cm}", 45),
        (r"45^\circ", 45),
        (r"45^{\circ}", 45),
        ("45°", 45),
        (r"45\%", 45),
        ("45.00", 45),
        ("m + n = 45", 45),
        ("a+b = 40+5 = 45", 45),
        (r"\text{area} = 45", 45),
        ("45.5", None),
        ("1204", None),
        ("-4", None),
        ("4!", None),
        ("2^3", None),
        ("40 + 5", None),
        ("4 5", None),
        ("4,5", None),
        ("x=4, y=5", None),
        ("x=4 and y=5", None),
        (r"x=4 \text{ or } x=5", None),
        (r"\frac{8}{2}", None),
        ("7th", None),
        ("two", None),
        ("", None),
        ("=", None),
        ("٣", None),
        ("0" * (MAX_PARSED_CHARS - 1) + "5", 5),
        ("0" * MAX_PARSED_CHARS + "5", None),
    ],
)
def test_as_integer_reads_answers_of_the_aime(text: str, expected: int | None) -> None:
    assert as_integer(text) == expected


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
@pytest.mark.parametrize("form", ["{}", " {} ", "({})", "[{}]", "{})", "{}.", "**{}**", "${}$"])
def test_a_letter_is_chosen_with_and_without_brackets(letter: str, form: str) -> None:
    assert as_choice(form.format(letter)) == letter
    assert as_choice(form.format(letter.lower())) == letter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\text{B}", "B"),
        (r"\textbf{(B)}", "B"),
        (r"\mathrm{ B }", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\text{B) }4.2", "B"),
        ("B) because it is heavier", "B"),
        ("b) because it is heavier", "B"),
        ("B. 4.2 eV", "B"),
        ("B: C is too small", "B"),
        ("B, a noble gas", "B"),
        ("(B)\n4.2 eV", "B"),
        ("option B", "B"),
        ("The correct option is (B)", "B"),
        ("final answer: b", "B"),
        ("K", None),
        ("BC", None),
        ("b, c", None),
        ("B, C", None),
        ("B/C", None),
        ("A or B", None),
        ("(A) and (B)", None),
        ("a) and b)", None),
        ("A, B, or C", None),
        ("a number", None),
        ("A number", None),
        ("not B", None),
        ("Boron", None),
        ("4.2", None),
        ("x+1", None),
        (r"\frac{1}{2}", None),
        ("", None),
    ],
)
def test_as_choice_reads_one_letter(text: str, expected: str | None) -> None:
    assert as_choice(text) == expected


class Recorder:
    """Records the questions it is asked, and finds everything equal."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def equivalent(self, a: str, b: str) -> bool:
        self.asked.append(("equivalent", a, b))
        return True

    def correct(self, gold: str, answer: str) -> bool:
        self.asked.append(("correct", gold, answer))
        return True


def test_expressions_are_compared_by_the_checker_and_no_answer_is_wrong() -> None:
    checker = Recorder()
    grader = Grader(AnswerKind.EXPRESSION, checker)
    assert grader.correct("1", "2")
    assert grader.equivalent("1", "2")
    assert not grader.correct("1", None)
    assert grader.equivalent("x", "x")
    assert checker.asked == [("correct", "1", "2"), ("equivalent", "1", "2")]


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
    checker = Recorder()
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
    assert checker.asked == []


@pytest.mark.parametrize(
    ("kind", "gold", "answer"),
    [
        (AnswerKind.INTEGER, "204", "20"),
        (AnswerKind.INTEGER, "20", "204"),
        (AnswerKind.INTEGER, "7", "7, 8"),
        (AnswerKind.CHOICE, "B", "BC"),
        (AnswerKind.CHOICE, "B", "Boron"),
    ],
)
def test_a_prefix_of_the_answer_is_wrong(kind: AnswerKind, gold: str, answer: str) -> None:
    assert not Grader(kind, Recorder()).correct(gold, answer)


TEXTS = {
    ("q", 0): r"\boxed{4}",
    ("q", 1): r"\boxed{5}",
    ("r", 0): "It is 4.",
    ("r", 1): r"\boxed{4",
}
ANSWERS = {("q", 0): "4", ("q", 1): "5", ("r", 0): None, ("r", 1): None}


class CountingEquivalence(TextEquivalence):
    """Counts its verdicts; calls `on_asked` before each."""

    def __init__(self, on_asked: Callable[[], object] = lambda: None) -> None:
        self.on_asked = on_asked
        self.num_asked = 0

    def correct(self, gold: str, answer: str) -> bool:
        self.num_asked += 1
        self.on_asked()
        return super().correct(gold, answer)


def write_run(path: Path, texts: dict[tuple[str, int], str] = TEXTS) -> Path:
    """Store samples with gold answer 4, all of them as wrong and with another answer."""
    with open_run(path, RunRecord("math500-x", {"task": "math500"}, {})) as folder:
        for (question, index), text in texts.items():
            sample = replace(make_sample(index, "stale"), text=text)
            folder.append(GradedSample(question, "4", False, sample))
    return path


def grade_again(
    path: Path, checker: TextEquivalence | None = None, **options: Any
) -> GradingResult:
    grader = Grader(AnswerKind.EXPRESSION, checker or TextEquivalence())
    return grade_run(path, grader, **{"num_threads": 2, **options})


def test_answers_and_verdicts_come_from_the_texts_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    before = (run / "samples.jsonl").read_bytes()
    assert grade_again(run) == GradingResult(num_samples=4, num_changed=1, num_right=1)
    found = {graded.key: (graded.sample.answer, graded.correct) for graded in load_run(run).samples}
    assert found == {key: (answer, answer == "4") for key, answer in ANSWERS.items()}
    assert (run / "samples.jsonl").read_bytes() == before


def test_an_aborted_sample_has_a_verdict_and_is_not_counted(tmp_path: Path) -> None:
    with open_run(tmp_path, RunRecord("math500-x", {"task": "math500"}, {})) as folder:
        for index, state in enumerate((SampleState.FINISHED, SampleState.ABORTED)):
            sample = replace(make_sample(index, "4"), text=r"\boxed{4}", state=state)
            folder.append(GradedSample("q", "4", False, sample))
    assert grade_again(tmp_path) == GradingResult(num_samples=1, num_changed=1, num_right=1)
    assert len((tmp_path / "grades.jsonl").read_text().splitlines()) == 2


def test_each_verdict_says_who_gave_it(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    grade_again(run)
    rows = [json.loads(line) for line in (run / "grades.jsonl").read_text().splitlines()]
    assert [(row["question"], row["index"]) for row in rows] == list(TEXTS)
    assert [set(row) for row in rows] == [{"question", "index", "answer", "correct", "by"}] * 4
    (by,) = {row["by"] for row in rows}
    assert by == f"math-verify 0.9.0, grading {GRADING_VERSION}"


def test_grading_again_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    grade_again(run)
    first = (run / "grades.jsonl").read_bytes()
    assert grade_again(run, num_threads=7) == GradingResult(
        num_samples=4, num_changed=0, num_right=1
    )
    assert (run / "grades.jsonl").read_bytes() == first


def test_verdicts_are_given_side_by_side_and_counted_as_they_come(tmp_path: Path) -> None:
    run = write_run(tmp_path, {("q", index): r"\boxed{4}" for index in range(8)})
    meeting = threading.Barrier(4, timeout=10)
    seen: list[int] = []
    grade_again(run, CountingEquivalence(meeting.wait), num_threads=4, on_graded=seen.append)
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

    checker = CountingEquivalence(wait)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        grade_again(run, checker, on_graded=interrupt)
    released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert checker.num_asked <= 5 + 2
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


def test_no_run_no_verdicts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no record of a run"):
        grade_again(tmp_path)
    assert list(tmp_path.iterdir()) == []
