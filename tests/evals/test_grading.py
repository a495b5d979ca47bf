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
from unittest.mock import Mock, call

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


def test_expressions_are_compared_by_the_checker_and_no_answer_is_wrong() -> None:
    checker = Mock(TextEquivalence)
    grader = Grader(AnswerKind.EXPRESSION, checker)
    assert grader.correct("1", "2") is checker.correct.return_value
    assert grader.equivalent("1", "2") is checker.equivalent.return_value
    assert not grader.correct("1", None)
    assert grader.equivalent("x", "x")
    assert checker.mock_calls == [call.correct("1", "2"), call.equivalent("1", "2")]


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
    return grade_run(path, grader, **{"num_threads": 2, **options})


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


def test_grading_again_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    grade_again(run)
    first = (run / "grades.jsonl").read_bytes()
    assert grade_again(run, num_threads=7).num_changed == 0
    assert (run / "grades.jsonl").read_bytes() == first


def checker_of(judge: Callable[[], object]) -> Mock:
    """Return a checker that finds every answer right and calls `judge` before."""
    return Mock(TextEquivalence, correct=Mock(side_effect=lambda *_: judge() or True))


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
    assert checker.correct.call_count <= 5 + 2
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
