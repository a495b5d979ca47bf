"""A run's summary: its votes counted, its conditions told."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from lim_sglang.evals.metrics import published_name, summarise
from lim_sglang.evals.run_store import GradedSample, RunRecord
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

SETTINGS: dict[str, Any] = {
    "task": "sums",
    "task_version": 2,
    "questions": {"asked": 2, "asked_digest": "d1", "digest": "d2", "revision": "r"},
    "prompt_sha256": "p",
    "system": "SECRET system prompt",
    "thinking": {"enabled": True, "budget": 50},
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
    "server": {
        "model_path": "/data/models/tiny/",
        "tokenizer_path": "/data/models/tiny/",
        "chat_template": None,
        "json_model_override_args": "{}",
        "tp_size": 1,
        "revision": "main",
        "device_name": "GPU",
        "dtype": "bfloat16",
    },
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
    sample = replace(make_sample(index, answer, **more), rid="SECRET rid")
    return GradedSample(question, "SECRET 4", answer == "4", sample, late=late)


def equivalent(a: str, b: str) -> bool:
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
    a, b = summarise(RECORD, SAMPLES, equivalent, num_failed=1).questions
    assert (a.question_id, a.indices, a.group, a.chosen) == ("a", (0, 1, 2, 3), (0, 0, 1, 1), 0)
    assert a.correct == (True, False, False, False)  # as they were graded
    assert a.tokens[0] == 70
    assert a.answer_correct
    assert (b.group, b.chosen, b.answer_correct) == ((0, 1, None, 0), 0, False)
    assert b.states[2] is SampleState.TRUNCATED


def test_it_makes_no_difference_which_sample_ended_first() -> None:
    assert summarise(RECORD, SAMPLES[::-1], equivalent) == summarise(RECORD, SAMPLES, equivalent)


def test_the_answer_is_the_first_voters_own() -> None:
    """Equality is not transitive: what shares a vote may be graded differently."""
    mixed = [
        graded("q", 0, " 4", late=True),  # wrong, as it was graded
        graded("q", 1, "4"),
        graded("q", 2, " 4"),
        graded("q", 3, "5"),
    ]
    (found,) = summarise(RECORD, mixed, equivalent).questions
    assert (found.group, found.chosen, found.answer_correct) == ((0, 0, 0, 1), 0, True)
    assert found.voters == (1, 2, 3)
    (first_wrong,) = summarise(RECORD, mixed[2:], equivalent).questions
    assert not first_wrong.answer_correct


def test_an_aborted_sample_has_no_vote_and_no_share() -> None:
    ended = [
        graded("q", 0, None, state=SampleState.ABORTED, num_tokens=7),
        graded("q", 1, "4", state=SampleState.TRUNCATED),
    ]
    (found,) = summarise(RECORD, ended, equivalent).questions
    assert (found.group, found.chosen, found.whole) == ((None, 0), 0, (1,))
    assert found.share_correct == 1
    assert found.tokens == (7, 10)
    (nothing,) = summarise(RECORD, ended[:1], equivalent).questions
    assert (nothing.share_correct, nothing.chosen, nothing.answer_correct) == (None, None, False)


def test_a_late_sample_has_no_vote() -> None:
    late = [graded("q", 0, "4"), graded("q", 1, "6", late=True), graded("q", 2, "6", late=True)]
    (found,) = summarise(RECORD, late, equivalent).questions
    assert (found.chosen, found.late) == (0, (False, True, True))
    heard = [replace(sample, late=False) for sample in late]
    assert summarise(RECORD, heard, equivalent).questions[0].chosen == 1


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
    (found,) = summarise(RunRecord("r", settings, ABOUT), tie, equivalent).questions
    assert found.chosen == chosen


def test_conditions_say_what_the_scores_hold_for() -> None:
    found = summarise(RECORD, SAMPLES, equivalent).conditions
    system_sha256 = hashlib.sha256(b"SECRET system prompt").hexdigest()
    expected = {
        "task": "sums",
        "task_version": 2,
        "questions": "d1",
        "benchmark": "d2",
        "asked": 2,
        "revision": "r",
        "prompt_sha256": "p",
        "system_sha256": system_sha256,
        "model": "tiny",
        "model_revision": "main",
        "policy": "lessismore",
        "budget": 256,
        "ranking": "rank",
        "recent_ratio": 0.25,
        "sinks": 4,
        "dense_layers": [0, 1],
        "select_layers": [2, 4],
        "program": "majority",
        "options": {},
        "parallel": None,
        "samples": 4,
        "thinking": True,
        "thinking_budget": 50,
        "max_tokens": 100,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "seed": None,
        "seed_honoured": False,
        "api": "sglang",
        "device_name": "GPU",
        "dtype": "bfloat16",
        "kv_cache_dtype": None,
        "quantization": None,
        "server": {"tokenizer_path": "tiny", "tp_size": 1},
        "versions": {"torch": "2", "math_verify": "0.9.0"},
        "code_sha256": None,
        "sampling_version": None,
        "commit": "abc",
        "date": "2026-11-25",
    }
    assert found == expected
    assert list(found) == list(expected)  # as a reader looks for them


def test_a_server_without_lessismore_is_called_by_how_it_was_asked() -> None:
    found = summarise(
        RunRecord("r", {**SETTINGS, "lim": None, "api": "openai"}, ABOUT), [], equivalent
    )
    assert (found.conditions["policy"], found.conditions["budget"]) == ("openai", None)
    assert found.conditions["dense_layers"] is found.conditions["select_layers"] is None


def test_a_dense_run_has_no_budget_though_its_config_has_one() -> None:
    config = {**SETTINGS["lim"]["config"], "policy": "full"}
    lim = {"config": config, "roles": ["full"] * 6}
    record = RunRecord("r", {**SETTINGS, "lim": lim}, ABOUT)
    found = summarise(record, SAMPLES, equivalent).conditions
    assert (found["policy"], found["budget"], found["select_layers"]) == ("full", None, None)


def test_a_record_of_before_programs_could_be_chosen_is_of_majority() -> None:
    old = {k: v for k, v in SETTINGS.items() if k not in ("program", "thinking", "task_version")}
    found = summarise(RunRecord("r", old, {}), SAMPLES, equivalent).conditions
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
