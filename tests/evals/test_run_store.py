"""The run folder: what is written stays, what is torn is redone, what differs is not mixed."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import RunRecord, open_run, read_record
from lim_sglang.programs.schema import SampleState
from tests.evals.stored import SETTINGS, begin, graded, question, write_a_little


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    written = [graded(0), graded(1, state=SampleState.TRUNCATED, answer=None), graded(0, "r")]
    with begin(tmp_path / "run") as folder:
        for sample in written:
            folder.append(sample)
    with begin(tmp_path / "run") as folder:
        assert folder.samples == written


def test_lines_from_before_a_field_was_there_have_its_default(tmp_path: Path) -> None:
    begin(tmp_path).__exit__(None, None, None)
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


def test_a_sample_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded())
        assert json.loads((tmp_path / "samples.jsonl").read_text())["question"] == "q"


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
    whole = file.read_bytes()
    with begin(tmp_path) as folder:
        folder.append(graded(1))
    second = file.read_bytes()[len(whole) :]
    file.write_bytes(whole + second[:-cut])
    with begin(tmp_path) as folder:
        assert folder.samples == [graded(0)]
        folder.append(graded(1))
    assert file.read_bytes() == whole + second


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
def test_a_line_that_is_no_new_sample_is_an_error(
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
    begin(tmp_path).__exit__(None, None, None)
    other = {"task": "math500", "lim": {"config": {"policy": "full", "budget": 256}}}
    with pytest.raises(DataError) as caught:
        begin(tmp_path, other)
    message = str(caught.value)
    assert 'lim.config.policy was "lessismore" and is now "full"' in message
    assert "lim.config.dense_layers was [0, 1] and is now null" in message
    assert "budget" not in message
    assert "name another folder with --out" in message


def test_where_a_run_began_may_differ(tmp_path: Path) -> None:
    begin(tmp_path).__exit__(None, None, None)
    open_run(tmp_path, RunRecord("math500-x", SETTINGS, {"url": "http://there"}))
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
    begin(tmp_path).__exit__(None, None, None)


def test_a_full_disk_is_a_sentence_and_loses_nothing(
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


def test_a_full_disk_keeps_a_question_out_as_a_whole(
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
