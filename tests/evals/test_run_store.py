"""The run's folder: what is written stays, a torn write is dropped, other settings are refused, and
readers get complete lines with the newest verdicts.
"""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import (
    Failure,
    GradedSample,
    RunFolder,
    RunRecord,
    load_run,
    open_run,
    read_record,
    read_samples,
)
from lim_sglang.programs.schema import SampleState
from tests.builders import make_graded, make_sample

SETTINGS: dict[str, Any] = {
    "task": "math500",
    "num_samples": 2,
    "questions": {"asked": 2},
    "lim": {"config": {"policy": "lessismore", "budget": 256, "dense_layers": (0, 1)}},
}
AWKWARD = "so \\boxed{4}\n\u2028 ½"


def graded(index: int = 0, question_id: str = "q", **changes: Any) -> GradedSample:
    """Return a sample whose text has a newline and a line separator."""
    return make_graded(index, question_id, **{"text": AWKWARD, **changes})


def question(question_id: str, of: int = 3) -> list[GradedSample]:
    """Return the samples of a question that are written together; the last has no vote."""
    return [
        replace(graded(index, question_id), written_together=of, late=index == of - 1)
        for index in range(of)
    ]


def begin(path: Path, settings: dict[str, Any] = SETTINGS) -> RunFolder:
    return open_run(path, RunRecord("math500-x", settings, {"url": "http://here"}))


def write_run(path: Path, *samples: GradedSample) -> None:
    """Store samples, each in a write of its own."""
    with begin(path) as folder:
        for sample in samples:
            folder.append(sample)


def write_a_little(descriptor: int, data: memoryview, write: Any = os.write) -> int:
    """Write as a disk does that is full soon."""
    if len(data) < 100:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, data[:50])


PLAIN = GradedSample("q", "4", True, make_sample(2, "4"))
TOGETHER = GradedSample(
    "q", "4", False, make_sample(0, "5", SampleState.TRUNCATED), late=True, written_together=2
)


@pytest.mark.parametrize("graded", [PLAIN, TOGETHER])
def test_a_sample_comes_back_from_its_row(graded: GradedSample) -> None:
    assert GradedSample.from_row(graded.to_row()) == graded


def test_only_rows_of_questions_that_are_written_together_say_how_many_belong_together() -> None:
    assert not {"late", "of"} & PLAIN.to_row().keys()
    assert TOGETHER.to_row()["of"] == 2
    assert TOGETHER.to_row()["late"] is True


def test_an_unknown_field_of_a_row_is_ignored() -> None:
    assert GradedSample.from_row(PLAIN.to_row() | {"later": 1}) == PLAIN


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([1], "expected an object"),
        ({"question": "q"}, "has no gold, no correct, no index"),
        (PLAIN.to_row() | {"state": "asleep"}, "unknown state 'asleep'; expected finished"),
        *(
            (PLAIN.to_row() | {"of": of}, "of must be a number of lines, not ")
            for of in (0, -1, "3", True, 2.0)
        ),
    ],
)
def test_a_row_without_a_sample_is_refused(row: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        GradedSample.from_row(row)


def test_a_failure_comes_back_from_its_row() -> None:
    failure = Failure("q", 3, "HTTP 400")
    assert Failure.from_row(failure.to_row()) == failure
    assert failure.key == ("q", 3)
    with pytest.raises(DataError, match="has no error"):
        Failure.from_row({"question": "q", "index": 1})


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    written = [graded(0), graded(1, state=SampleState.TRUNCATED, answer=None), graded(0, "r")]
    with begin(tmp_path / "run") as folder:
        for sample in written:
            folder.append(sample)
    with begin(tmp_path / "run") as folder:
        assert folder.samples == written


def test_lines_that_are_older_than_a_field_have_its_default(tmp_path: Path) -> None:
    write_run(tmp_path)
    row = graded(0).to_row()
    added = {"error": None, "num_reasoning_tokens": 0, "confidence": None}
    old = {name: value for name, value in row.items() if name not in added}
    assert row == old | added
    (tmp_path / "samples.jsonl").write_text(json.dumps(old) + "\n")
    with begin(tmp_path) as folder:
        assert folder.samples == [graded(0)]
        folder.append(graded(1, num_reasoning_tokens=9, confidence=17.25))
    with begin(tmp_path) as folder:
        assert folder.samples[1].sample.confidence == 17.25


def test_a_sample_is_synced_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with begin(tmp_path) as folder:
        folder.append(graded(0))
        folder.append(graded(1))
    assert synced[-1] == (tmp_path / "samples.jsonl").stat().st_size
    assert synced[-2] == (tmp_path / "samples.jsonl").read_bytes().index(b"\n") + 1


@pytest.mark.parametrize("cut", [1, 2, 60, 10_000])
def test_a_torn_last_line_is_dropped_and_can_be_redone(tmp_path: Path, cut: int) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded(0))
    file = tmp_path / "samples.jsonl"
    first = file.read_bytes()
    with begin(tmp_path) as folder:
        folder.append(graded(1))
    second = file.read_bytes()[len(first) :]
    file.write_bytes(first + second[:-cut])
    with begin(tmp_path) as folder:
        assert folder.samples == [graded(0)]
        folder.append(graded(1))
    assert file.read_bytes() == first + second


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded(0))
        folder.append(graded(1))
    file = tmp_path / "samples.jsonl"
    lines = file.read_text().split("\n")
    file.write_text("\n".join([lines[0], lines[1][:20], ""]))
    with pytest.raises(DataError, match=r"samples\.jsonl, line 2"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"state": "asleep"}, "unknown state 'asleep'; expected finished"),
        ({"rid": None, "drop": "rid"}, "has no rid"),
        ({"index": 0}, "occurs a second time"),
    ],
)
def test_a_damaged_or_repeated_sample_is_an_error(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded(0))
    row = {**graded(1).to_row(), **change}
    row.pop(row.pop("drop", ""), None)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=complaint):
        begin(tmp_path)


def test_a_run_of_other_settings_is_not_mixed_with(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = {**SETTINGS, "lim": {"config": {"policy": "full", "budget": 256}}}
    with pytest.raises(DataError) as caught:
        begin(tmp_path, other)
    message = str(caught.value)
    assert 'lim.config.policy was "lessismore" and is now "full"' in message
    assert "lim.config.dense_layers was [0, 1] and is now null" in message
    assert "budget" not in message
    assert "name another folder with --out" in message


def test_a_run_without_a_sampling_version_is_read_and_never_resumed(tmp_path: Path) -> None:
    old = {**SETTINGS, "code_sha256": {"chat.py": "0"}}
    write_run(tmp_path, graded())
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "settings": old, "about": {}}))
    assert load_run(tmp_path).samples == (graded(),)
    for settings in (SETTINGS, old):
        with pytest.raises(DataError, match=r"recorded no sampling version: .* but not resumed"):
            begin(tmp_path, settings)


def test_where_a_run_began_may_differ(tmp_path: Path) -> None:
    write_run(tmp_path)
    open_run(tmp_path, RunRecord("math500-x", SETTINGS, {"url": "http://there"})).close()
    assert read_record(tmp_path).about == {"url": "http://here"}


def test_samples_without_a_record_are_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"no run\.json"):
        begin(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "x"}'])
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match="is no record of a run"):
        begin(tmp_path)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with begin(tmp_path), pytest.raises(DataError, match="another lim eval is writing"):
        begin(tmp_path)
    write_run(tmp_path)


def test_a_full_disk_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded(0))
        before = (tmp_path / "samples.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_a_little)
            with pytest.raises(DataError, match=r"No space left on device\); make room"):
                folder.append(graded(1))
        assert (tmp_path / "samples.jsonl").read_bytes() == before
        assert folder.samples == [graded(0)]
        folder.append(graded(1))
    with begin(tmp_path) as folder:
        assert folder.samples == [graded(0), graded(1)]


def test_a_full_disk_stores_all_of_a_question_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_a_little)
            with pytest.raises(DataError, match="No space left"):
                folder.append(*question("r"))
        assert folder.samples == question("q")
    with begin(tmp_path) as folder:
        assert folder.samples == question("q")


def test_a_full_disk_before_the_first_sample_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(DataError, match=r"cannot write .*run\.json \(No space left"):
            begin(tmp_path)
    assert not (tmp_path / "run.json").exists()
    with begin(tmp_path) as folder:
        assert folder.samples == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name another folder with --out"):
        begin(tmp_path / "file" / "run")


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded(0, text="\ud83d"))
    with begin(tmp_path) as folder:
        assert folder.samples[0].sample.text == "?"


def test_a_question_that_is_written_together_comes_back_as_it_was(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
        folder.append(*question("r", of=1))
    with begin(tmp_path) as folder:
        assert folder.samples == [*question("q"), *question("r", of=1)]
        assert [each.late for each in folder.samples] == [False, False, True, True]


def test_a_question_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: memoryview) -> int:
        writes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
    assert writes == [(tmp_path / "samples.jsonl").stat().st_size]


def test_wherever_a_crash_tears_a_question_all_of_it_is_dropped(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
        kept = (tmp_path / "samples.jsonl").read_bytes()
        folder.append(*question("r"))
    file = tmp_path / "samples.jsonl"
    complete = file.read_bytes()
    line_ends = [n for n in range(len(kept), len(complete)) if complete[n : n + 1] == b"\n"]
    for size in {len(kept), len(kept) + 1, *(end + n for end in line_ends for n in (-1, 0, 1))}:
        if size == len(complete):
            continue
        file.write_bytes(complete[:size])
        with begin(tmp_path) as folder:
            assert folder.samples == question("q"), size
        assert file.read_bytes() == kept, size
    with begin(tmp_path) as folder:
        folder.append(*question("r"))
    assert file.read_bytes() == complete


def test_half_a_question_before_another_is_an_error_with_its_line(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(*question("q")[:2], *question("r"))
    with pytest.raises(DataError, match=r"line 3: the question 'q' has 2 lines before it, and sho"):
        begin(tmp_path)


def test_a_sample_that_a_question_has_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    first, second, _ = question("q")
    with begin(tmp_path) as folder:
        folder.append(first, second, second)
    with pytest.raises(DataError, match=r"line 3: sample \('q', 1\) occurs a second time"):
        begin(tmp_path)


def test_reading_leaves_a_file_as_it_is_while_another_process_writes(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
        size = file.stat().st_size
        folder.append(*question("r"))
        torn = file.read_bytes()[:-3]
        file.write_bytes(torn)
        assert read_samples(file) == (question("q"), size)
        assert file.read_bytes() == torn


def test_a_failure_is_remembered_until_the_sample_is_generated(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append_failure(Failure("q", 0, "HTTP 400"))
        folder.append_failure(Failure("q", 1, "HTTP 500"))
        folder.append_failure(Failure("q", 1, "HTTP 400: too long"))
    with begin(tmp_path) as folder:
        assert [str(each.error) for each in folder.failures.values()] == [
            "HTTP 400",
            "HTTP 400: too long",
        ]
        folder.append(graded(1))
        assert list(folder.failures) == [("q", 0)]
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0)]
        assert folder.samples == [graded(1)]


def test_a_failure_that_a_crash_tore_off_is_forgotten(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append_failure(Failure("q", 0, "HTTP 400"))
    file = tmp_path / "failures.jsonl"
    first = file.read_bytes()
    file.write_bytes(first + first[:20])
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0)]
        folder.append_failure(Failure("q", 1, "HTTP 400"))
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0), ("q", 1)]


def test_a_damaged_failure_is_an_error_with_its_number(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "failures.jsonl").write_text('{"question": "q", "index": 0}\n')
    with pytest.raises(DataError, match=r"failures\.jsonl, line 1: has no error"):
        begin(tmp_path)


def write_grades(path: Path, *rows: dict[str, Any]) -> None:
    (path / "grades.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    failure = Failure("r", 1, "HTTP 400")
    write_run(tmp_path, graded(0, "r"), graded(1))
    with begin(tmp_path) as folder:
        folder.append_failure(failure)
    run = load_run(tmp_path)
    assert run.path == tmp_path
    assert run.record == read_record(tmp_path)
    assert run.samples == (graded(0, "r"), graded(1))
    assert run.failures == (failure,)


def test_a_run_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded())
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"question": "r", ')
        assert load_run(tmp_path).samples == (graded(),)


def test_new_verdicts_and_answers_replace_the_old_ones(tmp_path: Path) -> None:
    write_run(tmp_path, graded(), make_graded(1, answer="5"), make_graded(0, "r", None))
    write_grades(
        tmp_path,
        {"question": "q", "index": 0, "answer": None, "correct": False},
        {"question": "q", "index": 1, "answer": "4.0", "correct": True, "more": 1},
        {"question": "z", "index": 7, "answer": "4", "correct": True},
    )
    first, second, third = load_run(tmp_path).samples
    assert (first.sample.answer, first.correct) == (None, False)
    assert (second.sample.answer, second.correct) == ("4.0", True)
    assert third == make_graded(0, "r", None)
    assert (first.gold, first.sample.text) == ("4", AWKWARD)


@pytest.mark.parametrize("row", ["[]", "{", '{"question": "q", "index": 0, "answer": "4"}'])
def test_a_damaged_verdict_is_an_error_with_the_way_out(tmp_path: Path, row: str) -> None:
    write_run(tmp_path, graded())
    (tmp_path / "grades.jsonl").write_text(f"{row}\n")
    with pytest.raises(DataError, match=r"grades\.jsonl, line 1 is no verdict.*lim grade"):
        load_run(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no record of a run"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "settings": {}, "about": {}}))
    with pytest.raises(DataError, match=r"cannot read .*samples\.jsonl"):
        load_run(tmp_path)


def test_a_run_is_complete_when_every_sample_is_there(tmp_path: Path) -> None:
    every = [graded(index, question_id) for question_id in "qr" for index in range(2)]
    write_run(tmp_path, *every[:3])
    assert not load_run(tmp_path).is_complete
    write_run(tmp_path, every[3])
    assert load_run(tmp_path).is_complete


def test_a_run_of_questions_that_are_written_together_is_complete_when_each_is_there(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, *question("q", of=1))
    assert not load_run(tmp_path).is_complete
    write_run(tmp_path, *question("r", of=1))
    assert load_run(tmp_path).is_complete
