"""Runs as others read them: whole lines only, with the verdicts that were renewed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import Failure, GradedSample, RunRecord, load_run, open_run
from tests.builders import make_sample

SETTINGS: dict[str, Any] = {"task": "math500", "num_samples": 2, "questions": {"asked": 2}}
RECORD = RunRecord("math500-x", SETTINGS, {"urls": ["http://here"]})


def graded(question_id: str, index: int, answer: str | None = "4") -> GradedSample:
    return GradedSample(question_id, "4", answer == "4", make_sample(index, answer))


def write(path: Path, *samples: GradedSample, failures: tuple[Failure, ...] = ()) -> None:
    """A run with these samples, each for itself."""
    with open_run(path, RECORD) as folder:
        for sample in samples:
            folder.append(sample)
        for failure in failures:
            folder.append_failure(failure)


def write_grades(path: Path, *rows: dict[str, Any]) -> None:
    (path / "grades.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    failure = Failure("r", 1, "HTTP 400")
    write(tmp_path, graded("r", 0), graded("q", 1), failures=(failure,))
    run = load_run(tmp_path)
    assert run.path == tmp_path
    assert run.record == RECORD
    assert run.samples == (graded("r", 0), graded("q", 1))
    assert run.failures == (failure,)


def test_a_run_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with open_run(tmp_path, RECORD) as folder:
        folder.append(graded("q", 0))
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"question": "r", ')
        assert load_run(tmp_path).samples == (graded("q", 0),)


def test_renewed_verdicts_and_answers_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    write(tmp_path, graded("q", 0), graded("q", 1, "5"), graded("r", 0, None))
    write_grades(
        tmp_path,
        {"question": "q", "index": 0, "answer": None, "correct": False},
        {"question": "q", "index": 1, "answer": "4.0", "correct": True, "more": 1},
        {"question": "z", "index": 7, "answer": "4", "correct": True},
    )
    first, second, third = load_run(tmp_path).samples
    assert (first.sample.answer, first.correct) == (None, False)
    assert (second.sample.answer, second.correct) == ("4.0", True)
    assert third == graded("r", 0, None)
    assert (first.gold, first.sample.text) == ("4", graded("q", 0).sample.text)


@pytest.mark.parametrize("row", ["[]", "{", '{"question": "q", "index": 0, "answer": "4"}'])
def test_a_damaged_verdict_is_an_error_with_the_way_out(tmp_path: Path, row: str) -> None:
    write(tmp_path, graded("q", 0))
    (tmp_path / "grades.jsonl").write_text(f"{row}\n")
    with pytest.raises(DataError, match=r"grades\.jsonl, line 1 is no verdict.*lim grade"):
        load_run(tmp_path)


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no record of a run"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "settings": {}, "about": {}}))
    with pytest.raises(DataError, match=r"cannot read .*samples\.jsonl"):
        load_run(tmp_path)


def test_a_run_is_complete_when_every_sample_is_there(tmp_path: Path) -> None:
    every = [graded(question, index) for question in ("q", "r") for index in range(2)]
    write(tmp_path, *every[:3])
    assert not load_run(tmp_path).is_complete
    write(tmp_path, every[3])
    assert load_run(tmp_path).is_complete


def test_a_run_of_whole_questions_is_complete_when_each_is_there(tmp_path: Path) -> None:
    def whole(question_id: str) -> GradedSample:
        return replace(graded(question_id, 0), of=1)

    write(tmp_path, whole("q"))
    assert not load_run(tmp_path).is_complete
    write(tmp_path, whole("r"))
    assert load_run(tmp_path).is_complete
