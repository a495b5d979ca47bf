"""A run's summary: votes counted, texts left out, written and read again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.store import RunRecord
from lim_sglang.evals.summary import (
    Summary,
    published_name,
    read_summary,
    summarise,
    write_summary,
)
from lim_sglang.programs.records import SampleState
from tests.unit.samples import make_sample

SETTINGS: dict[str, Any] = {
    "task": "sums",
    "task_version": 2,
    "questions": {"asked": 2, "asked_digest": "d1", "digest": "d2", "revision": "r"},
    "prompt_sha256": "p",
    "system": "SECRET system prompt",
    "thinking": {"enabled": None, "budget": None},
    "program": {"name": "majority", "options": {}, "parallel": None},
    "num_samples": 4,
    "sampling": {
        "max_tokens": 100,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "seed": None,
        "seed_honoured": False,
    },
    "api": "sglang",
    "server": {"model_path": "/data/models/tiny/", "device_name": "GPU", "dtype": "bfloat16"},
    "lim": {
        "config": {
            "policy": "lessismore",
            "budget": 256,
            "ranking": "rank",
            "recent_ratio": 0.25,
            "sinks": 4,
        },
        "roles": ["full", "full", "select", "reuse", "select", "reuse"],
    },
    "versions": {"math_verify": "0.9.0"},
}
ABOUT = {"commit": "abc", "began": "2026-11-25T10:00:00+00:00", "client_versions": {"torch": "2"}}
RECORD = RunRecord("run-1", SETTINGS, ABOUT)


def graded(question: str, index: int, answer: str | None, **more: Any) -> GradedSample:
    late = more.pop("late", False)
    sample = make_sample(index, answer, **more)
    return GradedSample(question, "SECRET 4", answer == "4", sample, late=late)


def same(a: str, b: str) -> bool:
    return a.strip() == b.strip()


SAMPLES = [
    graded("b", 3, "5"),
    graded("b", 0, "5"),
    graded("a", 1, " 4"),
    graded("a", 0, "4", num_tokens=70),
    graded("b", 1, "4"),
    graded("b", 2, None, state=SampleState.TRUNCATED),
    graded("a", 2, "6"),
    graded("a", 3, "6", late=True),
]


def test_votes_are_counted_by_index_whoever_ended_first() -> None:
    b, a = summarise(RECORD, SAMPLES, same, num_failed=1).questions
    assert (a.question_id, a.indices, a.group, a.chosen) == ("a", (0, 1, 2, 3), (0, 0, 1, 1), 0)
    assert a.correct == (True, False, False, False)  # as they were graded
    assert a.tokens[0] == 70
    assert a.answer_correct
    assert (b.group, b.chosen, b.answer_correct) == ((0, 1, None, 0), 0, False)
    assert b.states[2] is SampleState.TRUNCATED


def test_a_late_sample_has_no_vote() -> None:
    late = [graded("q", 0, "4"), graded("q", 1, "6", late=True), graded("q", 2, "6", late=True)]
    (found,) = summarise(RECORD, late, same).questions
    assert (found.chosen, found.late) == (0, (False, True, True))
    heard = [replace(sample, late=False) for sample in late]
    assert summarise(RECORD, heard, same).questions[0].chosen == 1


@pytest.mark.parametrize(
    ("program", "chosen"), [("majority", 0), ("short", 1), ("confidence", 1)], ids=str
)
def test_each_program_ranks_its_groups_in_its_own_way(program: str, chosen: int) -> None:
    settings = {**SETTINGS, "program": {"name": program, "options": {}}}
    sure = program == "confidence"
    tie = [
        graded("q", 0, "4", num_tokens=50, confidence=1.0 if sure else None),
        graded("q", 1, "6", num_tokens=20, confidence=3.0 if sure else None),
    ]
    (found,) = summarise(RunRecord("r", settings, ABOUT), tie, same).questions
    assert found.chosen == chosen


def test_conditions_say_what_the_scores_hold_for() -> None:
    found = summarise(RECORD, SAMPLES, same).conditions
    assert found["model"] == "tiny"
    assert (found["policy"], found["budget"], found["select_layers"]) == (
        "lessismore",
        256,
        [2, 4],
    )
    assert (found["device_name"], found["commit"], found["date"]) == ("GPU", "abc", "2026-11-25")
    assert found["versions"] == {"torch": "2", "math_verify": "0.9.0"}


def test_a_dense_run_has_no_budget_though_its_config_has_one() -> None:
    config = {**SETTINGS["lim"]["config"], "policy": "full"}
    lim = {"config": config, "roles": ["full"] * 6}
    record = RunRecord("r", {**SETTINGS, "lim": lim}, ABOUT)
    found = summarise(record, SAMPLES, same).conditions
    assert (found["policy"], found["budget"], found["select_layers"]) == ("full", None, None)


def test_a_record_of_before_programs_could_be_chosen_is_of_majority() -> None:
    old = {k: v for k, v in SETTINGS.items() if k not in ("program", "thinking", "task_version")}
    found = summarise(RunRecord("r", old, {}), SAMPLES, same).conditions
    assert (found["program"], found["task_version"]) == ("majority", 1)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/data/models/tiny/", "tiny"),
        ("models/deep/tiny", "tiny"),
        ("./models/tiny", "tiny"),
        ("~/tiny", "tiny"),
        ("tiny", "tiny"),
    ],
)
def test_a_folder_of_this_machine_is_not_published(path: str, expected: str) -> None:
    assert published_name(path) == expected


def test_a_summary_is_read_as_it_was_written_and_holds_no_text(tmp_path: Path) -> None:
    found = summarise(RECORD, SAMPLES, same, num_failed=2)
    write_summary(found, tmp_path / "deep" / "s.json")
    assert read_summary(tmp_path / "deep" / "s.json") == found
    text = (tmp_path / "deep" / "s.json").read_text()
    assert "SECRET" not in text
    assert "It is" not in text  # what the samples say
    assert sum('"id"' in line for line in text.splitlines()) == 2  # a line a question


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_summary(Summary("r", {}, (), 0), tmp_path / "file" / "s.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.update(format=9), "format 9, expected 1"),
        (lambda found: found.pop("conditions"), "no summary of a run"),
        (lambda found: found["questions"][0]["tokens"].pop(), "differ in length"),
        (lambda found: found["questions"][0].pop("group"), "no summary of a run"),
        (lambda found: found["questions"][0].update(states=["lost"] * 4), "no summary of a run"),
    ],
    ids=["format", "no conditions", "lengths", "no groups", "unknown state"],
)
def test_what_is_no_summary_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    path = tmp_path / "s.json"
    write_summary(summarise(RECORD, SAMPLES, same), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=says):
        read_summary(path)
    with pytest.raises(DataError, match="no summary"):
        read_summary(tmp_path / "missing.json")
