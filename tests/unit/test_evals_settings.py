"""What a run depends on, and the id that follows from it."""

from dataclasses import replace
from typing import Any

import pytest

from lim_sglang.evals import settings as settings_module
from lim_sglang.evals.settings import describe_policy, differences, run_id, run_settings
from lim_sglang.evals.tasks import TASKS, Question
from lim_sglang.programs.records import Sampling

QUESTIONS = (Question("0", "Add 1 and 2.", "3"), Question("1", "Add 2 and 2.", "4"))


def server_info(**changes: Any) -> dict[str, Any]:
    """What a LessIsMore server with a budget of 256 says, as far as a run reads it."""
    lim = {
        "config": {"policy": "lessismore", "budget": 256},
        "roles": ["full", "full", "select", "reuse"],
        "decode_steps": 17,
        "version": "0.1.0",
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
        "task": TASKS["math500"],
        "questions": QUESTIONS,
        "digest": "d",
        "num_samples": 4,
        "sampling": Sampling(),
        "prompt": "{question}",
        "server_info": server_info(),
    }
    arguments.update(changes)
    return run_settings(arguments.pop("task"), arguments.pop("questions"), **arguments)


@pytest.fixture(autouse=True)
def _one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "code_digest", lambda: "c0ffee")


@pytest.mark.parametrize(
    "changes",
    [
        {"task": TASKS["aime24"]},
        {"task": replace(TASKS["math500"], digest="d")},
        {"questions": QUESTIONS[:1]},
        {"questions": (QUESTIONS[0], replace(QUESTIONS[1], gold="5"))},
        {"digest": "e"},
        {"num_samples": 8},
        {"sampling": Sampling(max_tokens=400)},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": Sampling(top_p=1.0)},
        {"sampling": Sampling(seed=7)},
        {"prompt": "{question} Think."},
        {"server_info": server_info(model_path="/models/other")},
        {"server_info": server_info(dtype="bfloat16")},
        {"server_info": server_info(version="0.5.17")},
        {"server_info": server_info(internal_states=lim_state(config={"policy": "full"}))},
        {"server_info": server_info(internal_states=lim_state(roles=["full"] * 4))},
        {"server_info": server_info(internal_states=[{}])},
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
    ],
)
def test_what_cannot_change_the_result_keeps_the_id(changes: dict[str, Any]) -> None:
    assert run_id(settings(**changes)) == run_id(settings())
    assert not list(differences(settings(), settings(**changes)))


def test_other_code_of_samples_and_verdicts_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    monkeypatch.setattr(settings_module, "code_digest", lambda: "decade")
    assert list(differences(before, settings())) == ['code_sha256 was "c0ffee" and is now "decade"']


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
    task = TASKS["math500"]
    assert settings(digest=task.digest)["questions"]["revision"] == task.revision
    assert settings(digest="d")["questions"]["revision"] is None
