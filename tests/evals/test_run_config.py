"""What a run depends on, and the id that follows from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.evals import run_config as settings_module
from lim_sglang.evals.grading import GRADING_VERSION
from lim_sglang.evals.run_config import (
    Method,
    describe_policy,
    differences,
    run_id,
    run_settings,
)
from lim_sglang.evals.tasks import TASKS, Question, Task
from lim_sglang.programs.program import SAMPLING_VERSION
from lim_sglang.programs.schema import Sampling

MATH = TASKS["math500"]
ADAPTIVE = Method(40, "adaptive", {"confidence": 0.95})
QUESTIONS = (Question("0", "Add 1 and 2.", "3"), Question("1", "Add 2 and 2.", "4"))


def server_info(**changes: Any) -> dict[str, Any]:
    """What a LessIsMore server with a budget of 256 says, as far as a run reads it."""
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
        "task": MATH,
        "questions": QUESTIONS,
        "digest": "d",
        "method": Method(),
        "parallel": 4,
        "sampling": Sampling(),
        "server_info": server_info(),
    }
    arguments.update(changes)
    return run_settings(arguments.pop("task"), arguments.pop("questions"), **arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": TASKS["aime24"]},
        {"task": replace(MATH, digest="d")},
        {"task": replace(MATH, version=99)},
        {"task": replace(MATH, prompt=r"{question} Think.")},
        {"questions": QUESTIONS[:1]},
        {"questions": (QUESTIONS[0], replace(QUESTIONS[1], gold="5"))},
        {"digest": "e"},
        {"method": Method(8)},
        {"method": Method(system="Be brief.")},
        {"method": Method(thinking=False)},
        {"method": Method(thinking_budget=1000)},
        {"method": Method(program="single")},
        {"method": ADAPTIVE},
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
        {"server_info": server_info(internal_states=lim_state(device_name="NVIDIA H200"))},
        {"server_info": server_info(revision="abc")},
        {"server_info": server_info(api="openai")},
    ],
)
def test_whatever_can_change_the_result_changes_the_id(changes: dict[str, Any]) -> None:
    assert run_id(settings(**changes)) != run_id(settings())
    assert list(differences(settings(), settings(**changes)))


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
    "changes",
    [
        {"parallel": 2},
        {"method": replace(ADAPTIVE, options={"confidence": 0.9})},
        {"method": replace(ADAPTIVE, num_samples=20)},
    ],
)
def test_what_decides_when_a_program_stops_changes_the_id(changes: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"method": ADAPTIVE, "parallel": 8}
    assert run_id(settings(**{**usual, **changes})) != run_id(settings(**usual))


def test_another_sampling_version_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    monkeypatch.setattr(settings_module, "SAMPLING_VERSION", SAMPLING_VERSION + 1)
    found = [difference.name for difference in differences(before, settings())]
    assert found == ["sampling_version"]
    assert run_id(before) != run_id(settings())


@pytest.mark.parametrize(("method", "changed"), [(Method(), []), (ADAPTIVE, ["grading_version"])])
def test_another_grading_version_is_another_run_only_where_verdicts_stop_it(
    method: Method, changed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = settings(method=method)
    monkeypatch.setattr(settings_module, "GRADING_VERSION", GRADING_VERSION + 1)
    found = [difference.name for difference in differences(before, settings(method=method))]
    assert found == changed


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
    assert found["sampling"]["seed"] == seed
    assert found["sampling"]["seed_honoured"] is honoured


def test_the_revision_is_recorded_only_of_the_known_questions() -> None:
    assert settings(digest=MATH.digest)["questions"]["revision"] == MATH.revision
    assert settings(digest="d")["questions"]["revision"] is None


def test_a_run_is_named_by_what_a_folder_can_be_called(tmp_path: Path) -> None:
    task: Task = replace(MATH, name="file:/data/my questions.jsonl")
    name = run_id(settings(task=task))
    assert name.startswith("file-data-my-questions.jsonl-lessismore-256-")
    (tmp_path / name).mkdir()
