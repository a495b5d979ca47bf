"""Any OpenAI-compatible server as a backend: what it offers, what it lacks, failures in words."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.openai_backend import (
    OpenAIBackend,
    OpenAIClient,
    base_url,
    choose_model,
)
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import Access, Api, SampleState
from lim_sglang.programs.sglang_backend import connect
from tests.fakes.openai_server import Answerer, Complete, FakeOpenAI, Streamed, serving_openai
from tests.fakes.sglang_server import eventually
from tests.programs.harness import MESSAGES, SAMPLING, WAIT_S, begin, generate, run_on, states

NOBODY = "http://127.0.0.1:9"
ANSWER = Streamed(("so ", "\\boxed{391}"), num_tokens=12)
ENDLESS = Streamed(("a",) * 500, pace_s=0.02)
COMPLETE = {
    "id": "chatcmpl-8",
    "choices": [{"message": {"role": "assistant", "content": "391"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 5},
}


@contextmanager
def serve(answer: Answerer, **access: Any) -> Iterator[tuple[FakeOpenAI, OpenAIBackend]]:
    """Run a fake server, and a backend for its model."""
    with (
        serving_openai(answer) as fake,
        closing(OpenAIBackend(Access(fake.url, model="small", **access))) as backend,
    ):
        yield fake, backend


def ask(answer: Answerer, **access: Any) -> tuple[Generation, list[dict[str, Any]]]:
    """Generate once; return the requests, too."""
    with serve(answer, **access) as (fake, backend):
        return generate(backend), fake.requests


def in_turn(*replies: Any) -> Answerer:
    """Send one reply after the other, and the last again and again."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def refusal(status: int, message: str = "busy", **error: Any) -> Complete:
    """Return an error as OpenAI's API has it."""
    return Complete(status, {"error": {"message": message, **error}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://host/openai/v1/", "https://host/openai/v1"),
        ("http://host:1/v1/chat/completions", "http://host:1/v1"),
    ],
)
def test_a_host_gets_the_version(given: str, expected: str) -> None:
    assert base_url(given) == expected


@pytest.mark.parametrize("models", [None, (), ("a", "b")])
def test_models_are_listed_if_the_server_lists_them(models: tuple[str, ...] | None) -> None:
    with (
        serving_openai(lambda _: Streamed(()), models=models) as fake,
        OpenAIClient(fake.url) as client,
    ):
        assert client.models() == models


@pytest.mark.parametrize(
    ("given", "listed", "chosen"),
    [
        ("small", None, "small"),
        (None, ("small",), "small"),
    ],
)
def test_a_given_model_is_taken_or_else_the_only_one(
    given: str | None, listed: tuple[str, ...] | None, chosen: str
) -> None:
    assert choose_model(given, listed, "http://here/v1") == chosen


def test_a_model_that_the_server_neither_lists_nor_describes_is_refused_with_the_names() -> None:
    console = Console(quiet=True)
    with serving_openai(lambda _: ANSWER, models=("small", "big"), aliases=("tiny@3",)) as fake:
        for known in ("big", "tiny@3"):
            connect(Access(fake.url, Api.OPENAI, known), console).close()
        with pytest.raises(ConfigError, match=r"no model 'nope': .* --model from small, big$"):
            connect(Access(fake.url, Api.OPENAI, "nope"), console)
        fake.models = None
        connect(Access(fake.url, Api.OPENAI, "nope"), console).close()


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (None, "does not list its models: name one with --model"),
        ((), "has 0 models: choose one with --model$"),
        (("a", "b"), "has 2 models: choose one with --model from a, b$"),
        (tuple("abcdefghijkl"), "from a, b, c, d, e, f, g, h, i, j, …$"),
    ],
)
def test_a_model_must_be_chosen_unless_there_is_exactly_one(
    listed: tuple[str, ...] | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_model(None, listed, "http://here/v1")


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_generation_carries_what_the_server_says(reason: str) -> None:
    found, _ = ask(lambda _: replace(ANSWER, reason=reason))
    assert (found.text, found.num_tokens) == ("so \\boxed{391}", 12)
    assert found.truncated == (reason == "length")
    assert (found.rid, found.error) == ("chatcmpl-7", None)
    assert found.latency_s > 0


@pytest.mark.parametrize(
    ("sampling", "seed", "thinking", "expected"),
    [
        ({"top_k": -1}, None, None, {}),
        ({"top_k": 20}, None, None, {"top_k": 20}),
        ({"top_k": -1}, 0, None, {"seed": 0}),
        ({"top_k": -1}, None, False, {"chat_template_kwargs": {"enable_thinking": False}}),
    ],
)
def test_the_request_holds_only_what_the_api_has_or_the_user_asked_for(
    sampling: dict[str, Any], seed: int | None, thinking: bool | None, expected: dict[str, Any]
) -> None:
    with serve(lambda _: ANSWER, thinking=thinking) as (fake, backend):
        backend.generate(MESSAGES, replace(SAMPLING, **sampling), InFlightSample(0, seed=seed))
    usual = {
        "model": "small",
        "messages": MESSAGES,
        "max_tokens": 64,
        "temperature": 0.6,
        "top_p": 0.95,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert fake.requests == [usual | expected]


@pytest.mark.parametrize(
    ("reply", "text", "num_tokens"),
    [
        (Streamed(("a", "b", "c")), "abc", 3),  # pieces, as the server counts nothing
        (Complete(200, COMPLETE), "391", 5),  # a server that does not stream
        (Streamed(("hm", "m"), field="reasoning_content"), "<think>\nhmm", 2),
        (Streamed(("hm", "m"), field="reasoning"), "<think>\nhmm", 2),
    ],
)
def test_an_answer_is_read_in_each_of_its_shapes(reply: Any, text: str, num_tokens: int) -> None:
    found, _ = ask(lambda _: reply)
    assert (found.text, found.num_tokens, found.error) == (text, num_tokens, None)


def test_no_try_comes_before_the_server_wants_one() -> None:
    busy = Complete(429, {}, headers=(("Retry-After", "1"),))
    start_s = time.monotonic()
    found, _ = ask(in_turn(busy, ANSWER))
    assert found.error is None
    assert time.monotonic() - start_s >= 1.0


@pytest.mark.parametrize(
    ("reply", "words", "num_requests"),
    [
        (refusal(503), "HTTP 503: busy", 3),
        (refusal(400, "no such thing"), "HTTP 400: no such thing", 1),
        (refusal(401), "refuses the API key", 1),
        (
            refusal(404, "The model `small` does not exist"),
            "refuses the model (HTTP 404): The model `small` does not exist",
            1,
        ),
        (Complete(404), "does the base URL end in /v1?", 1),
        (Streamed(("so",), reason=None), "ended the stream before the answer", 3),
        (Streamed(("so",), reason=None, raw="data: {oops\n\n"), "no chat completion", 3),
        (Streamed(("so",), reason=None, raw="data: 5\n\n"), "no chat completion", 3),
        (Streamed((), reason=None, raw='data: {"error": {"message": "bad"}}\n\n'), "bad", 3),
        (Complete(200, {"choices": []}), "before the answer", 3),
        (Complete(200, []), "no chat completion", 3),
    ],
)
def test_a_failure_is_told_in_words_after_as_many_tries_as_make_sense(
    reply: Any, words: str, num_requests: int
) -> None:
    found, requests = ask(lambda _: reply)
    assert words in str(found.error)
    assert len(requests) == num_requests


def test_a_server_that_is_not_there_is_an_error_in_words() -> None:
    access = Access(NOBODY, Api.OPENAI, model="small")
    with closing(OpenAIBackend(access)) as backend:
        assert f"no server answers at {NOBODY}/v1" in str(generate(backend).error)
    with pytest.raises(ServerError, match=f"no server answers at {NOBODY}/v1"):
        connect(access, Console(quiet=True))


def test_newer_models_get_the_limit_under_its_newer_name() -> None:
    message = "Unsupported parameter: use 'max_completion_tokens' instead."

    def answer(body: dict[str, Any]) -> Any:
        return refusal(400, message, param="max_tokens") if "max_tokens" in body else ANSWER

    found, requests = ask(answer)
    assert found.error is None
    assert requests[1]["max_completion_tokens"] == 64


def test_a_time_out_is_a_failure_and_closes_the_connection() -> None:
    with serve(lambda _: ENDLESS, timeout_s=0.2) as (fake, backend):
        assert "within 0.2 seconds" in str(generate(backend).error)
        assert eventually(lambda: fake.num_disconnected == 1)


def test_a_cancel_closes_the_connection_and_counts_the_tokens_so_far() -> None:
    in_flight = InFlightSample(0)
    with serve(lambda _: ENDLESS) as (fake, backend):
        future = begin(backend, in_flight)
        assert eventually(lambda: in_flight.num_tokens >= 3)
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.num_disconnected == 1)
    assert found.aborted
    assert 3 <= found.num_tokens == len(found.text) < 100
    assert found.tokens_at_least


def test_closing_ends_the_generations_in_flight_with_an_error() -> None:
    with serve(lambda _: ENDLESS) as (fake, backend):
        future = begin(backend)
        assert eventually(lambda: bool(fake.requests))
        backend.close()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.num_disconnected == 1)
    assert found.error
    assert found.tokens_at_least


def test_a_program_ends_its_samples_early() -> None:
    def answer(body: dict[str, Any]) -> Streamed:
        assert eventually(lambda: len(fake.requests) == 5)
        return ANSWER if body["seed"] < 3 else ENDLESS

    with serve(answer) as (fake, backend):
        options = {"wanted": 3}
        outcome = run_on(backend, 5, program=PROGRAMS["short"], options=options, seed=0, top_k=-1)
        assert eventually(lambda: fake.num_disconnected == 2)
    assert states(outcome) == [SampleState.FINISHED] * 3 + [SampleState.ABORTED] * 2


def test_confidence_comes_from_logprobs() -> None:
    with serve(lambda _: Streamed(("a", "b"), num_tokens=2, logprob=-3.5)) as (fake, backend):
        options = {"warm_up": 2, "window": 1}
        outcome = run_on(backend, 2, program=PROGRAMS["confidence"], options=options, top_k=-1)
    assert [sample.confidence for sample in outcome.samples] == [3.5, 3.5]
    assert {request["top_logprobs"] for request in fake.requests} == {20}
