"""A summary as a file: written and read again, without any text of the run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.metrics import Summary, load_summaries, read_summary, summarise, write_summary
from lim_sglang.evals.run_store import GRADES_FILE, Failure, RunRecord, open_run
from tests.evals.test_summary import ABOUT, RECORD, SAMPLES, SETTINGS, equivalent, graded


def test_a_summary_is_read_as_it_was_written_and_holds_no_text(tmp_path: Path) -> None:
    found = summarise(RECORD, SAMPLES, equivalent, num_failed=2)
    write_summary(found, tmp_path / "deep" / "s.json")
    assert read_summary(tmp_path / "deep" / "s.json") == found
    text = (tmp_path / "deep" / "s.json").read_text()
    assert sum('"id"' in line for line in text.splitlines()) == 2  # a line a question
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["s.json"]


def test_a_summary_holds_nothing_of_what_was_asked_and_said(tmp_path: Path) -> None:
    secret = [
        replace(each, gold="SECRET gold", sample=replace(each.sample, **texts))
        for each, texts in (
            (graded("q", 0, "4"), {"answer": "SECRET answer", "text": "SECRET text"}),
            (graded("q", 1, None), {"text": "SECRET thoughts", "error": "SECRET error"}),
        )
    ]
    write_summary(summarise(RECORD, secret, equivalent), tmp_path / "s.json")
    assert "SECRET" not in (tmp_path / "s.json").read_text()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_summary(Summary("r", {}, (), 0), tmp_path / "file" / "s.json")


def in_question(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change what a summary says of its first question."""
    return lambda content: content["questions"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.update(format=9), "of format 9, expected 1"),
        (lambda found: found.pop("format"), "is no summary of a run"),
        (lambda found: found.pop("conditions"), "it has no 'conditions'"),
        (lambda found: found["questions"][0].pop("group"), "it has no 'group'"),
        (lambda found: found["questions"][0]["tokens"].pop(), "the lists of question a differ"),
        (in_question(states=["lost"] * 4), "'lost' is not a valid SampleState"),
        (in_question(id="b"), "a question is there twice"),
        (in_question(indices=[0, 2, 1, 3]), "ascending indices"),
        (in_question(indices=[0, 1, 1, 3]), "ascending indices"),
        (in_question(tokens=[1, 2, 3, "4"]), "whole tokens"),
        (in_question(chosen=2), "chose a group without a vote"),
        (in_question(late=[True, True, False, False]), "chose a group without a vote"),
    ],
    ids=[
        *("format", "no format", "no conditions", "no groups", "lengths", "unknown state"),
        *("twice", "not ascending", "index twice", "tokens", "chosen", "chosen late"),
    ],
)
def test_what_is_no_summary_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    path = tmp_path / "s.json"
    write_summary(summarise(RECORD, SAMPLES, equivalent), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"s.json.*{says}"):
        read_summary(path)


def test_another_file_is_refused_by_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*missing.json \(No such file"):
        read_summary(tmp_path / "missing.json")
    for content, says in (("{", "is no JSON"), ("[1]", "is no summary"), ("\xff", "is no JSON")):
        (tmp_path / "s.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=says):
            read_summary(tmp_path / "s.json")


INTEGERS = RunRecord("run-2", {**SETTINGS, "task": "aime24"}, ABOUT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's, with a sample that failed and one whose verdict has been renewed."""
    with open_run(tmp_path / "run", INTEGERS) as run:
        run.append(*(replace(each, written_together=None) for each in SAMPLES if not each.late))
        run.append_failure(Failure("a", 3, "connection refused"))
    renewed = {"question": "b", "index": 2, "answer": "005", "correct": True}
    (tmp_path / "run" / GRADES_FILE).write_text(json.dumps(renewed) + "\n")
    return tmp_path / "run"


def test_a_runs_folder_is_summarised_with_the_verdicts_of_today(folder: Path) -> None:
    (found,) = load_summaries([folder])
    a, b = found.questions
    assert (found.run_id, found.num_failed) == ("run-2", 1)
    assert a.group == (0, 0, 1)  # " 4" is the integer 4
    assert (b.group, b.correct, b.chosen) == ((0, 1, 0, 0), (False, True, True, False), 0)
    write_summary(found, folder / "s.json")
    assert load_summaries([folder, folder / "s.json"]) == [found, found]


def test_a_run_without_a_sample_is_no_summary_yet(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", INTEGERS):
        pass
    with pytest.raises(DataError, match="has no sample yet"):
        load_summaries([tmp_path / "run"])
    with pytest.raises(DataError, match="no record of a run"):
        load_summaries([tmp_path])
