"""Any OpenAI-compatible server as a backend: what it offers, what it lacks, failures in words."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import ServerError
from lim_sglang.programs import backend
from lim_sglang.programs.backend import IN_FLIGHT, SEED, InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.http_client import Backoff
from lim_sglang.programs.openai_backend import OpenAIBackend, openai_request
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import SampleState
from tests.fakes.openai_server import Answerer, FakeOpenAI, Refusal, Streamed, serving_openai
from tests.fakes.sglang_server import eventually
from tests.programs.drawn import run_on

CONFIDENCE = PROGRAMS["confidence"]
SHORT = PROGRAMS["short"]

PARAMS = SimpleNamespace(max_new_tokens=64, temperature=0.6, top_p=0.95, top_k=-1, stop=[])
MESSAGES = [{"role": "user", "content": "What is 17 * 23?"}]
ANSWER = Streamed(("so ", "\\boxed{391}"), num_tokens=12)
WHOLE = {
    "id": "chatcmpl-8",
    "choices": [{"message": {"role": "assistant", "content": "391"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 5},
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKOFF", Backoff(tries=3, first_s=0.01))


def generate(backend: OpenAIBackend, **variables: Any) -> Generation:
    """One generation, as the frontend asks for it."""
    state = SimpleNamespace(messages_=MESSAGES, variables=variables)
    text, found = backend.generate(state, PARAMS)
    assert text == found.text
    return found


def ask(fake: FakeOpenAI, *, timeout_s: float = 20.0, **variables: Any) -> Generation:
    """One generation from an endpoint of its own."""
    backend = OpenAIBackend(fake.url, "small", timeout_s=timeout_s)
    try:
        return generate(backend, **variables)
    finally:
        backend.close()


def in_turn(*replies: Any) -> Answerer:
    """One reply after the other; the last again and again."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def refusal(status: int, message: str = "busy", **error: Any) -> Refusal:
    return Refusal(status, {"error": {"message": message, **error}})


def test_a_generation_carries_what_the_server_says() -> None:
    with serving_openai(lambda _: ANSWER) as fake:
        found = ask(fake)
    assert (found.text, found.num_tokens, found.truncated) == ("so \\boxed{391}", 12, False)
    assert (found.rid, found.error) == ("chatcmpl-7", None)
    assert found.latency_s > 0


def test_the_request_holds_nothing_that_the_api_does_not_have() -> None:
    with serving_openai(lambda _: ANSWER) as fake:
        ask(fake)
    assert fake.requests == [
        {
            "model": "small",
            "messages": MESSAGES,
            "max_tokens": 64,
            "temperature": 0.6,
            "top_p": 0.95,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"top_k": 20}, {"top_k": 20}),
        ({"seed": 0}, {"seed": 0}),
        ({"stop": ["END"]}, {"stop": ["END"]}),
        ({"thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
    ],
)
def test_what_is_asked_for_is_sent(wish: dict[str, Any], expected: dict[str, Any]) -> None:
    given = {"seed": None, "thinking": None, **wish}
    params = SimpleNamespace(
        **{**vars(PARAMS), **{n: v for n, v in wish.items() if n in vars(PARAMS)}}
    )
    plain = openai_request("small", MESSAGES, PARAMS, None)
    found = openai_request(*("small", MESSAGES, params, given["seed"]), thinking=given["thinking"])
    assert {name: value for name, value in found.items() if name not in plain} == expected


def test_the_seed_of_a_branch_is_sent() -> None:
    with serving_openai(lambda _: ANSWER) as fake:
        ask(fake, **{SEED: 7})
        assert not OpenAIBackend(fake.url, "small").honours_seeds
    assert fake.requests[0]["seed"] == 7


@pytest.mark.parametrize(("said", "counted"), [(None, 3), (9, 9)])
def test_pieces_are_counted_until_the_server_says_how_many(said: int | None, counted: int) -> None:
    with serving_openai(lambda _: Streamed(("a", "b", "c"), num_tokens=said)) as fake:
        assert ask(fake).num_tokens == counted


def test_a_server_that_does_not_stream_is_read_whole() -> None:
    with serving_openai(lambda _: Refusal(200, WHOLE)) as fake:
        found = ask(fake)
    assert (found.text, found.num_tokens, found.error) == ("391", 5, None)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_that_are_told_apart_are_put_back(name: str) -> None:
    with serving_openai(lambda _: Streamed(("hm", "m"), field=name)) as fake:
        assert ask(fake).text == "<think>\nhmm"


def test_reaching_the_limit_is_no_failure() -> None:
    with serving_openai(lambda _: Streamed(("so",), reason="length")) as fake:
        found = ask(fake)
    assert (found.truncated, found.error) == (True, None)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_succeed_later_is_tried_again(status: int) -> None:
    with serving_openai(in_turn(refusal(status), refusal(status), ANSWER)) as fake:
        assert ask(fake).error is None
    assert len(fake.requests) == 3


def test_tries_come_to_an_end() -> None:
    with serving_openai(lambda _: refusal(503)) as fake:
        assert "HTTP 503: busy" in str(ask(fake).error)
    assert len(fake.requests) == 3


def test_a_server_says_how_long_it_wants_no_other_try() -> None:
    busy = Refusal(429, {}, headers=(("Retry-After", "1"),))
    start_s = time.monotonic()
    with serving_openai(in_turn(busy, ANSWER)) as fake:
        assert ask(fake).error is None
    assert time.monotonic() - start_s >= 1.0


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (refusal(400, "no such thing"), "HTTP 400: no such thing"),
        (refusal(401), "refuses the API key"),
        (
            refusal(404, "The model `small` does not exist"),
            "refuses the model (HTTP 404): The model `small` does not exist",
        ),
        (Refusal(404), "does the base URL end in /v1?"),
    ],
)
def test_what_will_not_succeed_later_is_not_tried_again(reply: Refusal, words: str) -> None:
    with serving_openai(lambda _: reply) as fake:
        assert words in str(ask(fake).error)
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Streamed(("so",), reason=None), "ended the stream before the answer"),
        (Streamed(("so",), reason=None, raw="data: {oops\n\n"), "no chat completion"),
        (Streamed(("so",), reason=None, raw="data: 5\n\n"), "no chat completion"),
        (Streamed((), reason=None, raw='data: {"error": {"message": "bad luck"}}\n\n'), "bad luck"),
        (Refusal(200, {"choices": []}), "before the answer"),
        (Refusal(200, []), "no chat completion"),
    ],
)
def test_a_broken_stream_is_a_failure_after_some_tries(reply: Any, words: str) -> None:
    with serving_openai(lambda _: reply) as fake:
        assert words in str(ask(fake).error)
    assert len(fake.requests) == 3


def test_a_time_out_is_a_failure_and_closes_the_connection() -> None:
    with serving_openai(lambda _: Streamed(("a",) * 200, pace_s=0.02)) as fake:
        assert "within 0.2 seconds" in str(ask(fake, timeout_s=0.2).error)
        assert eventually(lambda: fake.hung_up == 1)


def test_a_server_that_is_not_there_is_said() -> None:
    backend = OpenAIBackend("http://127.0.0.1:9", "small")
    assert "no server answers at http://127.0.0.1:9/v1" in str(generate(backend).error)
    with pytest.raises(ServerError, match="no server answers"):
        backend.server_info()
    backend.close()


def test_newer_models_get_the_limit_under_its_newer_name() -> None:
    message = "Unsupported parameter: use 'max_completion_tokens' instead."

    def answer(body: dict[str, Any]) -> Any:
        return refusal(400, message, param="max_tokens") if "max_tokens" in body else ANSWER

    with serving_openai(answer) as fake:
        assert ask(fake).error is None
    assert fake.requests[1]["max_completion_tokens"] == 64


def test_cancelling_closes_the_connection_and_counts_what_there_was() -> None:
    in_flight = InFlightSample(0)
    with serving_openai(lambda _: Streamed(("a",) * 500, pace_s=0.02)) as fake:
        backend = OpenAIBackend(fake.url, "small")
        found: list[Generation] = []
        thread = threading.Thread(
            target=lambda: found.append(generate(backend, **{IN_FLIGHT: in_flight}))
        )
        thread.start()
        assert eventually(lambda: in_flight.num_tokens >= 3)
        in_flight.cancel()
        thread.join(5.0)
        assert eventually(lambda: fake.hung_up == 1)
        backend.close()
    assert found[0].aborted
    assert 3 <= found[0].num_tokens == len(found[0].text) < 100
    assert found[0].tokens_at_least


def test_closing_frees_who_waits() -> None:
    found: list[Generation] = []
    with serving_openai(lambda _: Streamed(("a",) * 500, pace_s=0.02)) as fake:
        backend = OpenAIBackend(fake.url, "small", max_concurrency=1)
        threads = [
            threading.Thread(target=lambda: found.append(generate(backend))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert eventually(lambda: bool(fake.requests))
        backend.close()
        for thread in threads:
            thread.join(5.0)
        assert eventually(lambda: fake.hung_up == 1)
    assert [generation.error is not None for generation in found] == [True] * 3
    # One was under way.
    assert sorted(generation.tokens_at_least for generation in found) == [False, False, True]
    assert len(fake.requests) == 1


def test_a_program_ends_its_samples_early() -> None:
    def answer(body: dict[str, Any]) -> Streamed:
        return ANSWER if body["seed"] < 3 else Streamed(("a",) * 500, pace_s=0.02)

    with serving_openai(answer) as fake:
        backend = OpenAIBackend(fake.url, "small")
        outcome = run_on(backend, 5, program=SHORT, options={"wanted": 3}, seed=0, top_k=-1)
        assert eventually(lambda: fake.hung_up == 2)
        backend.close()
    states = [sample.state for sample in outcome.samples]
    assert states == [SampleState.FINISHED] * 3 + [SampleState.ABORTED] * 2


def test_confidence_comes_from_logprobs() -> None:
    with serving_openai(lambda _: Streamed(("a", "b"), num_tokens=2, logprob=-3.5)) as fake:
        backend = OpenAIBackend(fake.url, "small")
        outcome = run_on(
            backend, 2, program=CONFIDENCE, options={"warm_up": 2, "window": 1}, top_k=-1
        )
        backend.close()
    assert [sample.confidence for sample in outcome.samples] == [3.5, 3.5]
    assert {request["top_logprobs"] for request in fake.requests} == {20}


def test_it_says_what_it_cannot_do() -> None:
    backend = OpenAIBackend("somewhere:8000", "small")
    about = backend.about()
    assert (about["api"], about["model_path"]) == ("openai", "small")
    assert about["aborts"] == "connection closed"
    assert backend.sampling_defaults() == {"top_k": -1}
    backend.close()
