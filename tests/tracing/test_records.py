"""The file of a trace: written, read, completed after an interruption."""

import json
from pathlib import Path

import pytest

from lim_sglang.errors import DataError
from lim_sglang.tracing.records import FILE, Trace, add_question, begin_trace, read_trace
from tests.tracing.traces import CONDITIONS, TRACE, question


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "trace"
    assert begin_trace(folder, CONDITIONS) == Trace(CONDITIONS, ())
    for each in TRACE.questions:
        add_question(folder, each)
    assert read_trace(folder / FILE) == TRACE
    assert len((folder / FILE).read_text().splitlines()) == 3


def test_a_question_that_was_cut_off_is_forgotten_and_may_be_added_again(tmp_path: Path) -> None:
    begin_trace(tmp_path, CONDITIONS)
    add_question(tmp_path, question("a"))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"question": "b", "lay')
    later = CONDITIONS | {"date": "2026-12-01T00:00:00+00:00", "commit": None}
    assert begin_trace(tmp_path, later) == Trace(CONDITIONS, (question("a"),))
    add_question(tmp_path, question("b"))
    assert [each.question for each in read_trace(tmp_path / FILE).questions] == ["a", "b"]


def test_a_folder_with_a_trace_of_other_conditions_is_refused(tmp_path: Path) -> None:
    begin_trace(tmp_path, CONDITIONS)
    add_question(tmp_path, question("a"))
    before = (tmp_path / FILE).read_text()
    with pytest.raises(DataError, match=r"a trace of other settings \(budget, every\)"):
        begin_trace(tmp_path, CONDITIONS | {"every": 4, "budget": 32})
    assert (tmp_path / FILE).read_text() == before


def test_a_trace_without_a_question_is_begun_anew(tmp_path: Path) -> None:
    begin_trace(tmp_path, CONDITIONS | {"layers": [99]})
    begin_trace(tmp_path, CONDITIONS)
    assert read_trace(tmp_path / FILE) == Trace(CONDITIONS, ())


def test_conditions_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    begin_trace(tmp_path, CONDITIONS | {"layers": (2, 3)})
    add_question(tmp_path, question("a"))
    again = begin_trace(tmp_path, CONDITIONS | {"layers": (2, 3)})
    assert again.questions == (question("a"),)


@pytest.mark.parametrize(
    "text",
    ["no json\n", "no json", '{"other": 1}\n', json.dumps({"conditions": {}}) + '\n{"a": 1}\n'],
)
def test_another_file_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"is no trace of `lim trace` \(.*\): name another"):
        begin_trace(tmp_path, CONDITIONS)
    assert (tmp_path / FILE).read_text() == text


@pytest.mark.parametrize("text", ["", '{"con', '{"conditions": {"date": '])
def test_a_trace_that_was_cut_off_in_its_first_line_is_begun_anew(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / FILE).write_text(text)
    assert begin_trace(tmp_path, CONDITIONS) == Trace(CONDITIONS, ())
    assert read_trace(tmp_path / FILE) == Trace(CONDITIONS, ())


def test_a_trace_with_a_question_twice_is_refused(tmp_path: Path) -> None:
    begin_trace(tmp_path, CONDITIONS)
    for name in ("a", "b", "a"):
        add_question(tmp_path, question(name))
    with pytest.raises(DataError, match="it has question a 2 times"):
        read_trace(tmp_path / FILE)


def test_a_disk_that_takes_nothing_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file cannot be written .* name another --out"):
        begin_trace(tmp_path / "file", CONDITIONS)
    with pytest.raises(DataError, match="none cannot be written"):
        add_question(tmp_path / "none", question("a"))
