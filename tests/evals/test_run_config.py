"""Configuration of a run, the settings that its results depend on, and the id of these."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.config import honours_seeds
from lim_sglang.errors import ConfigError
from lim_sglang.evals import run_config as run_config_module
from lim_sglang.evals.run_config import (
    RunConfig,
    describe_policy,
    run_id,
    run_settings,
    server_settings,
    task_settings,
)
from lim_sglang.evals.settings import differences
from lim_sglang.evals.tasks import TASKS, Question, Task, questions_digest
from lim_sglang.programs.schema import Sampling

MATH = TASKS["math500"]
CONFIG = RunConfig("math500")
ADAPTIVE = RunConfig("math500", "adaptive", {"confidence": 0.95})
QUESTIONS = (Question("0", "Add 1 and 2.", "3"), Question("1", "Add 2 and 2.", "4"))


def server_info(**changes: Any) -> dict[str, Any]:
    """Return what a run reads of the `/server_info` of LessIsMore with a budget of 256."""
    lim = {
        "config": {"policy": "lessismore", "budget": 256},
        "roles": ["full", "full", "select", "reuse"],
        "decode_steps": 17,
        "version": "0.1.0",
        "device_name": "NVIDIA H100 80GB HBM3",
    }
    return {
        "model_path": "/models/tiny",
        "dtype": "float32",
        "version": "0.5.16",
        "random_seed": 1,
        "enable_deterministic_inference": False,
        "internal_states": [{"lim": lim}],
        **changes,
    }


def lim_state(**changes: Any) -> list[dict[str, Any]]:
    lim = server_info()["internal_states"][0]["lim"]
    return [{"lim": {**lim, **changes}}]


def settings(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "task": MATH,
        "benchmark": QUESTIONS,
        "parallel": 4,
        "sampling": Sampling(),
        "server_info": server_info(),
        **changes,
    }
    return run_settings(**arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": TASKS["aime24"]},
        {"task": replace(MATH, digest=questions_digest(QUESTIONS))},
        {"task": replace(MATH, version=99)},
        {"task": replace(MATH, prompt=r"{question} Think.")},
        {"config": replace(CONFIG, limit=1)},
        {"benchmark": (QUESTIONS[0], replace(QUESTIONS[1], gold="5"))},
        {"benchmark": QUESTIONS[:1]},
        {"config": replace(CONFIG, num_samples=8)},
        {"config": replace(CONFIG, system="Be brief.")},
        {"config": replace(CONFIG, thinking=False)},
        {"config": replace(CONFIG, thinking_budget=1000)},
        {"config": replace(CONFIG, program="single")},
        {"config": ADAPTIVE},
        {"sampling": Sampling(max_tokens=400)},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": Sampling(top_p=1.0)},
        {"sampling": Sampling(seed=7)},
        {"server_info": server_info(model_path="/models/other")},
        {"server_info": server_info(dtype="bfloat16")},
        {"server_info": server_info(version="0.5.17")},
        {"server_info": server_info(internal_states=lim_state(config={"policy": "full"}))},
        {"server_info": server_info(internal_states=lim_state(roles=["full"] * 4))},
        {"server_info": server_info(internal_states=[{}])},
        {"server_info": server_info(internal_states=lim_state(gate_sha256="0123"))},
        {"server_info": server_info(internal_states=lim_state(device_name="NVIDIA H200"))},
        {"server_info": server_info(revision="abc")},
        {"server_info": server_info(api="openai")},
    ],
)
def test_whatever_can_change_the_result_changes_the_id(changes: dict[str, Any]) -> None:
    assert run_id(settings(**changes)) != run_id(settings())
    assert list(differences(settings(), settings(**changes)))


def test_what_decides_when_a_program_stops_changes_the_id() -> None:
    configs = [replace(ADAPTIVE, options={"confidence": 0.9}), replace(ADAPTIVE, num_samples=20)]
    found = [settings(config=each, parallel=8) for each in (ADAPTIVE, *configs)]
    found.append(settings(config=ADAPTIVE, parallel=2))
    assert len({run_id(each) for each in found}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"server_info": server_info(random_seed=2)},
        {"server_info": server_info(internal_states=lim_state(decode_steps=99))},
        {"server_info": server_info(port=31000)},
        {"parallel": 2},
    ],
)
def test_what_cannot_change_the_result_keeps_the_id(changes: dict[str, Any]) -> None:
    assert run_id(settings(**changes)) == run_id(settings())
    assert not list(differences(settings(), settings(**changes)))


@pytest.mark.parametrize(
    ("config", "version", "changed"),
    [
        (CONFIG, "SAMPLING_VERSION", ["sampling_version"]),
        (CONFIG, "GRADING_VERSION", []),
        (ADAPTIVE, "GRADING_VERSION", ["grading_version"]),
    ],
)
def test_a_new_version_of_sampling_or_of_verdicts_that_stop_it_is_another_run(
    config: RunConfig, version: str, changed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = settings(config=config)
    monkeypatch.setattr(run_config_module, version, 99)
    found = [difference.name for difference in differences(before, settings(config=config))]
    assert found == changed
    assert (run_id(before) != run_id(settings(config=config))) is bool(changed)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (server_info(), "lessismore-256"),
        (server_info(internal_states=lim_state(config={"policy": "full", "budget": 9})), "full"),
        (server_info(internal_states=[{}]), "sglang"),
        (server_info(internal_states=[]), "sglang"),
    ],
)
def test_the_id_names_task_and_policy(info: dict[str, Any], expected: str) -> None:
    found = settings(server_info=info)
    assert describe_policy(found) == expected
    assert run_id(found).startswith(f"math500-{expected}-")


@pytest.mark.parametrize(
    ("seed", "deterministic", "honoured"),
    [(None, True, False), (7, False, False), (7, True, True)],
)
def test_a_seed_is_honoured_only_by_a_deterministic_server(
    seed: int | None, deterministic: bool, honoured: bool
) -> None:
    info = server_info(enable_deterministic_inference=deterministic)
    found = settings(sampling=Sampling(seed=seed), server_info=info)
    assert honours_seeds({"internal_states": [{"lim": {"seeds_honoured": True}}]})
    assert found["sampling"]["seed"] == seed
    assert found["sampling"]["seed_honoured"] is honoured


def test_the_revision_is_recorded_only_of_the_known_questions() -> None:
    known = replace(MATH, digest=questions_digest(QUESTIONS))
    assert settings(task=known)["questions"]["revision"] == MATH.revision
    assert settings()["questions"]["revision"] is None


def test_a_run_is_named_by_what_a_folder_can_be_called(tmp_path: Path) -> None:
    task: Task = replace(MATH, name="file:/data/my questions.jsonl")
    name = run_id(settings(task=task))
    assert name.startswith("file-data-my-questions.jsonl-lessismore-256-")
    (tmp_path / name).mkdir()


def test_the_settings_known_without_a_server_and_those_of_the_server_are_all_but_versions() -> None:
    before = task_settings(CONFIG, MATH, QUESTIONS)
    later = server_settings(server_info(), Sampling())
    assert not before.keys() & later.keys()
    rest = settings().keys() - before.keys() - later.keys()
    assert rest == {"sampling_version", "grading_version"}
    assert task_settings(CONFIG, MATH).keys() == before.keys() - {"questions"}


@pytest.mark.parametrize(
    ("program", "given", "expected"),
    [
        ("majority", None, 4),
        ("single", None, 1),
        ("short", None, 8),
        ("confidence", None, 32),
        ("budget", None, 40),
        ("budget", 12, 12),
    ],
)
def test_each_program_has_its_default_number_of_samples(
    program: str, given: int | None, expected: int
) -> None:
    assert RunConfig("math500", program, num_samples=given).samples_per_question == expected


@pytest.mark.parametrize(
    ("config", "concurrency", "expected"),
    [
        (CONFIG, 64, 4),
        (replace(CONFIG, num_samples=500), 1000, 64),
        (replace(CONFIG, num_samples=16), 3, 3),
        (ADAPTIVE, 64, 8),
        (replace(ADAPTIVE, num_samples=5), 64, 5),
        (RunConfig("math500", "early_stop"), 64, 40),
    ],
)
def test_samples_of_one_question_in_flight_fit_program_number_and_server(
    config: RunConfig, concurrency: int, expected: int
) -> None:
    assert config.samples_in_flight(concurrency) == expected


def test_a_program_that_stops_early_is_recorded_with_all_its_options() -> None:
    options = ADAPTIVE.all_options()
    assert options == RunConfig("math500", "adaptive").all_options()
    assert replace(ADAPTIVE, options={"confidence": 0.6}).all_options()["confidence"] == 0.6
    assert CONFIG.all_options() == {}
    assert RunConfig("math500", "Early-Stop").program == "early_stop"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": "oracle"}, "unknown program 'oracle'"),
        ({"program": "single", "num_samples": 2}, "single takes 1 sample of a question, not 2"),
        ({"program": "short", "num_samples": 2}, "short with wanted=3 .* has 3 samples, and may"),
        ({"options": {"window": 3}}, "the program majority has no option window"),
        ({"thinking_budget": 2048}, "leaves nothing of max_tokens 2,048"),
        ({"thinking_budget": 9, "sampling": {"max_tokens": 9}}, "leaves nothing of max_tokens 9"),
    ],
)
def test_impossible_choices_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig("math500", **changes)
