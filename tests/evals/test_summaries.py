"""Summaries in files: written, read, found in folders, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.metrics import Summary, summarise
from lim_sglang.evals.run_store import (
    GRADES_FILE,
    RUN_FILE,
    AskedQuestion,
    Failure,
    RunRecord,
    open_run,
    write_questions,
)
from lim_sglang.evals.summaries import (
    find_runs,
    load_asked,
    load_summaries,
    read_summary,
    rename_models,
    write_summaries,
    write_summary,
)
from lim_sglang.evals.tasks import TASKS
from tests.evals.summaries import ABOUT, RECORD, SAMPLES, SETTINGS, equivalent, run


def test_models_are_renamed_and_unknown_names_refused() -> None:
    runs = [run(model="tiny"), run(model="other")]
    renamed = rename_models(runs, {"tiny": "a/b"})
    assert [summary.conditions["model"] for summary in renamed] == ["a/b", "other"]
    with pytest.raises(ConfigError, match=r"--name big: no run has .*models are tiny, other"):
        rename_models(runs, {"big": "a/b"})


def test_a_summary_is_read_as_it_was_written_and_holds_no_text(tmp_path: Path) -> None:
    texts = {"text": "SECRET thoughts", "error": "SECRET error"}
    samples = [replace(each, sample=replace(each.sample, **texts)) for each in SAMPLES]
    found = summarise(RECORD, samples, equivalent, num_failed=2)
    path = tmp_path / "deep" / "s.json"
    write_summary(found, path)
    assert read_summary(path) == found
    assert "SECRET" not in path.read_text()
    assert sum('"id"' in line for line in path.read_text().splitlines()) == 2  # a line a question
    assert list(path.parent.iterdir()) == [path]


def test_summaries_are_named_by_their_runs_and_stay_in_the_folder(tmp_path: Path) -> None:
    sly = Summary("../../sly/run", {}, (), 0)
    written = write_summaries([sly], tmp_path / "kept")
    assert written == list(tmp_path.rglob("*.json")) == [tmp_path / "kept" / "-..-sly-run.json"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_summary(sly, tmp_path / "file" / "s.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 9, "has format 9, expected 1"),
        ("format", None, "is not the summary of a run"),
        ("conditions", None, "'conditions' is missing"),
        ("group", None, "'group' is missing"),
        ("tokens", [1, 2, 3], "the lists of question a differ"),
        ("tokens", [1, 2, 3, "4"], "integer tokens"),
        ("states", ["lost"] * 4, "'lost' is not a valid SampleState"),
        ("id", "b", "a question occurs twice"),
        ("indices", [0, 2, 1, 3], "ascending indices"),
        ("indices", [0, 1, 1, 3], "ascending indices"),
        ("chosen", 2, "chose a group without a vote"),
        ("late", [True, True, False, False], "chose a group without a vote"),
    ],
)
def test_a_damaged_summary_is_refused(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    path = tmp_path / "s.json"
    write_summary(summarise(RECORD, SAMPLES, equivalent), path)
    content = json.loads(path.read_text())
    part = content if field in content else content["questions"][0]
    part[field] = value
    if value is None:
        del part[field]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"s.json.*{message}"):
        read_summary(path)


def test_what_holds_no_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json.*No such file"):
        read_summary(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="holds no run and no summary"):
        find_runs([tmp_path])
    with open_run(tmp_path / "run", RECORD), pytest.raises(DataError, match="has no sample yet"):
        load_summaries([tmp_path / "run"])
    for part in (RUN_FILE, "samples.jsonl"):
        with pytest.raises(DataError, match=rf"{part} is a part of a run; name its folder, .*run$"):
            read_summary(tmp_path / "run" / part)
    for content, message in (("{", "is not JSON"), ("[1]", "is not the"), ("\xff", "is not JSON")):
        (tmp_path / "s.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=rf"s\.json.*{message}"):
            read_summary(tmp_path / "s.json")


def test_the_folder_of_a_run_is_summarised_with_its_newest_verdicts(tmp_path: Path) -> None:
    folder = tmp_path / "run-1"
    with open_run(folder, RECORD) as opened:
        opened.append(*(each for each in SAMPLES if not each.late))
        opened.append_failure(Failure("a", 3, "connection refused"))
    newer = {"question": "b", "index": 2, "answer": "005", "correct": True}
    (folder / GRADES_FILE).write_text(json.dumps(newer) + "\n")
    (found,) = load_summaries([folder])
    a, b = found.questions
    assert (found.run_id, found.num_failed) == ("run-1", 1)
    assert a.group == (0, 0, 1)  # " 4" is the integer 4
    assert (b.group, b.correct, b.chosen) == ((0, 1, 0, 0), (False, True, True, False), 0)
    write_summary(found, tmp_path / "s.json")
    (tmp_path / "notes.txt").touch()
    assert load_summaries(find_runs([tmp_path])) == [found, found]
    folder.rename(tmp_path / "deeper")  # as `lim eval` stores several tasks
    (tmp_path / "pair").mkdir()
    folder = (tmp_path / "deeper").rename(tmp_path / "pair" / "run-1")
    write_summary(found, tmp_path / "pair" / "a copy of it.json")
    assert find_runs([tmp_path]) == [folder, tmp_path / "s.json"]
    assert find_runs([folder]) == [folder]
    log = tmp_path / "server.log"
    assert find_runs([folder, log]) == [folder]
    assert find_runs([log]) == [log]  # refused in words when it is read


@pytest.mark.parametrize(
    ("task", "digest", "source", "title"),
    [
        ("aime24", "d2", None, "aime24 (own questions)"),
        ("aime24", TASKS["aime24"].digest, None, "aime24"),
        ("aime25", "d2", "math-ai/aime25", "aime25"),
        ("aime25", "d2", "mine/aime25.jsonl", "aime25 (unverified questions)"),
        ("file:six", "d2", "six.jsonl", "file:six"),
    ],
)
def test_a_run_of_an_earlier_version_is_named_by_what_it_asked(
    task: str, digest: str, source: str | None, title: str, tmp_path: Path
) -> None:
    questions = {**SETTINGS["questions"], "digest": digest}
    record = RunRecord(
        "r", {**SETTINGS, "task": task, "questions": questions}, {**ABOUT, "questions_from": source}
    )
    found = summarise(record, SAMPLES, equivalent)
    assert found.conditions["task"] == title
    write_summary(found, tmp_path / "s.json")
    assert read_summary(tmp_path / "s.json") == found


def test_an_old_summary_is_named_by_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    write_summary(summarise(RECORD, SAMPLES, equivalent), path)
    content = json.loads(path.read_text())
    del content["conditions"]["origin"]
    content["conditions"]["task"] = "aime24"
    path.write_text(json.dumps(content))
    assert read_summary(path).conditions["task"] == "aime24 (own questions)"


def test_the_questions_of_runs_are_found_by_their_digest(tmp_path: Path) -> None:
    stored = {"a": AskedQuestion("4", "What is 2 + 2?"), "b": AskedQuestion("9", "a\u2028b")}
    with open_run(tmp_path / "with", RECORD):
        write_questions(tmp_path / "with", stored)
    assert load_asked([tmp_path / "with", tmp_path / "s.json"]) == {"d1": stored}
    with open_run(tmp_path / "without", RECORD) as opened:
        opened.append(*(each for each in SAMPLES if not each.late))
    bare = {name: AskedQuestion("SECRET gold", None) for name in "ba"}
    assert load_asked([tmp_path / "without"]) == {"d1": bare}
    assert load_asked([tmp_path / "without", tmp_path / "with"]) == {"d1": stored}
    assert load_asked([tmp_path / "with", tmp_path / "without"]) == {"d1": stored}
