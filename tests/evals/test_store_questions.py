"""The run folder beside single samples: questions that are written at once, and failures."""

import json
import os
from pathlib import Path

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.run_store import Failure, read_samples
from tests.evals.stored import begin, graded, question


def test_a_question_that_is_written_at_once_comes_back_as_it_was(tmp_path: Path) -> None:
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
    whole = file.read_bytes()
    for size in range(len(kept), len(whole)):
        file.write_bytes(whole[:size])
        with begin(tmp_path) as folder:
            assert folder.samples == question("q"), size
        assert file.read_bytes() == kept, size
    with begin(tmp_path) as folder:
        folder.append(*question("r"))
    assert file.read_bytes() == whole


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


@pytest.mark.parametrize("of", [0, -1, "3", True, 2.0])
def test_a_number_of_lines_that_cannot_be_is_an_error(tmp_path: Path, of: object) -> None:
    with begin(tmp_path) as folder:
        folder.append(graded(0))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**graded(1).to_row(), "of": of}) + "\n")
    with pytest.raises(DataError, match="line 2: of must be a number of lines"):
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


def test_a_failure_is_remembered_until_the_sample_is_drawn(tmp_path: Path) -> None:
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
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0)]
        folder.append_failure(Failure("q", 1, "HTTP 400"))
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0), ("q", 1)]


def test_a_damaged_failure_is_an_error_with_its_number(tmp_path: Path) -> None:
    begin(tmp_path).__exit__(None, None, None)
    (tmp_path / "failures.jsonl").write_text('{"question": "q", "index": 0}\n')
    with pytest.raises(DataError, match=r"failures\.jsonl, line 1: has no error"):
        begin(tmp_path)
