"""From an address to a backend."""

import threading
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs.connect import choose_model, connect
from lim_sglang.programs.schema import Access, Api
from tests.fakes.openai_server import Streamed, serving_openai
from tests.fakes.sglang_server import Reply, completion, serving
from tests.programs.drawn import run_on

CONSOLE = Console(quiet=True)


def test_a_server_is_not_given_more_than_it_says_it_runs() -> None:
    pair = threading.Barrier(2)

    def answer(_: dict[str, Any]) -> Reply:
        pair.wait(5)
        return completion("")

    with serving(answer, max_running_requests=2) as fake:
        backend = connect(Access(fake.url, timeout_s=20, max_concurrency=64), CONSOLE)
        run_on(backend, 8)
        backend.close()
    assert len(fake.requests) == 8
    assert fake.most_running == 2


def test_what_is_not_there_is_said_before_the_frontend_is_loaded() -> None:
    with pytest.raises(ServerError, match="no server answers"):
        connect(Access("http://127.0.0.1:9", timeout_s=20, max_concurrency=1), CONSOLE)


def test_a_model_is_refused_where_the_server_has_but_one() -> None:
    with pytest.raises(ConfigError, match="--model goes with --api openai"):
        connect(
            Access("http://127.0.0.1:9", timeout_s=20, max_concurrency=1, model="small"), CONSOLE
        )


def test_openais_api_is_spoken_to_the_only_model() -> None:
    with serving_openai(lambda _: Streamed(("so",), num_tokens=1), models=("small",)) as fake:
        backend = connect(
            *(fake.url, None, CONSOLE), timeout_s=20, max_concurrency=4, api=Api.OPENAI
        )
        run_on(backend, 2, top_k=-1)
        assert backend.server_info() == {"api": "openai", "model_path": "small"}
        backend.close()
    assert {request["model"] for request in fake.requests} == {"small"}


@pytest.mark.parametrize("thinking", [True, False])
def test_a_switch_is_refused_where_the_template_has_none(thinking: bool) -> None:
    with serving(lambda _: completion(""), switches_thoughts=False) as fake:
        with pytest.raises(ConfigError, match="has no enable_thinking to switch") as refused:
            connect(Access(fake.url, timeout_s=20, max_concurrency=1, thinking=thinking), CONSOLE)
        assert not fake.requests
    assert str(refused.value).startswith("--thinking" if thinking else "--no-thinking")


def test_a_switch_is_sent_where_the_template_has_one() -> None:
    with serving(lambda _: completion("")) as fake:
        backend = connect(
            Access(fake.url, timeout_s=20, max_concurrency=1, thinking=False), CONSOLE
        )
        run_on(backend, 1)
        backend.close()
    assert fake.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_without_a_switch_nobody_is_asked_for_one() -> None:
    with serving(lambda _: completion(""), tokenizes=False) as fake:
        connect(Access(fake.url, timeout_s=20, max_concurrency=1), CONSOLE).close()
        assert "/v1/tokenize" not in fake.paths


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/v1"])
def test_openais_api_is_looked_for_before_the_frontend_is_loaded(url: str) -> None:
    with pytest.raises(ServerError, match="no server answers"):
        connect(Access(url, timeout_s=20, max_concurrency=1, api=Api.OPENAI, model="m"), CONSOLE)


@pytest.mark.parametrize(
    ("given", "listed", "chosen"),
    [
        ("majority@16", ("small",), "majority@16"),
        ("small", None, "small"),
        (None, ("small",), "small"),
    ],
)
def test_a_given_model_is_taken_or_else_the_only_one(
    given: str | None, listed: tuple[str, ...] | None, chosen: str
) -> None:
    assert choose_model(given, listed, "http://here/v1") == chosen


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (None, "does not list its models: name one with --model"),
        ((), "has 0 models: choose one with --model$"),
        (("a", "b"), "has 2 models: choose one with --model from a, b$"),
        (tuple("abcdefghijkl"), "from a, b, c, d, e, f, g, h, i, j, …$"),
    ],
)
def test_a_model_must_be_chosen_where_there_is_not_exactly_one(
    listed: tuple[str, ...] | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_model(None, listed, "http://here/v1")
