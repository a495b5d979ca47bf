"""The served vote: a fake server behind it, OpenAI's own client before it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import openai
import pytest

from lim_sglang.programs import backend
from lim_sglang.programs import proxy as proxy_module
from lim_sglang.programs.http_client import Backoff
from tests.fakes.sglang_server import FakeServer, Reply, eventually, serving
from tests.programs.chains import PROMPT_TOKENS, Chain, endless, words
from tests.programs.proxied import QUESTION, Served, proxied

THREE = ("so \\boxed{391}", "no \\boxed{390}", "thus \\boxed{391}")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKOFF", Backoff(tries=3, first_s=0.01))
    monkeypatch.setattr(proxy_module, "HEARTBEAT_S", 0.05)


def by_seed(*texts: str, num_tokens: int = 7) -> Any:
    """Sample i says text i."""
    return lambda body: Chain(words(texts[body["seed"]], num_tokens))


@contextmanager
def both(answer: Any, **options: Any) -> Iterator[tuple[FakeServer, Served]]:
    """A fake server and a proxy in front of it."""
    forgets = options.pop("forgets_aborts", 0)
    with serving(answer, forgets_aborts=forgets) as fake, proxied(fake, **options) as served:
        yield fake, served


def test_a_client_gets_a_vote_by_its_model_string() -> None:
    with both(by_seed("no \\boxed{390}", *THREE[::2])) as (fake, served):
        found = served.ask("majority@3", seed=0, temperature=0.3, max_tokens=50)
    assert found.choices[0].message.content == "so \\boxed{391}"
    assert (found.choices[0].finish_reason, found.model) == ("stop", "majority@3")
    assert found.usage.completion_tokens == 21
    assert found.usage.prompt_tokens == PROMPT_TOKENS
    vote = found.lim
    assert (vote["answer"], vote["margin"], vote["tokens_spent"]) == ("391", 1, 21)
    assert vote["votes"][0] == {"answer": "391", "votes": 2, "weight": 2.0}
    assert (vote["shown"], vote["settled_early"], len(vote["samples"])) == (1, False, 3)
    assert all(request["messages"] == QUESTION for request in fake.requests)
    assert {(r["temperature"], r["max_tokens"], r["top_k"]) for r in fake.requests} == {
        (0.3, 50, 20)
    }


def test_the_same_by_a_field() -> None:
    field = {"program": "majority", "samples": 2, "parallel": 1, "template": "math"}
    with both(by_seed(*THREE)) as (fake, served):
        found = served.ask("whatever", seed=0, extra_body={"lim": field})
    assert found.lim["answer"] == "391"
    assert (len(fake.requests), fake.most_running) == (2, 1)
    assert fake.requests[0]["messages"][0]["content"].endswith("\\boxed{}.")


def test_a_stream_lives_while_samples_are_drawn_and_ends_with_the_vote() -> None:
    settled = threading.Event()
    long = "word " * 200 + "\\boxed{391}"
    with both(lambda _: Chain(words(long, 5), after=settled)) as (_, served):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = iter(served.ask("majority@2", **options))
        assert next(chunks).choices[0].delta.role == "assistant"
        settled.set()
        *pieces, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == long
    assert len(pieces) > 1
    assert last.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 10)
    assert usage.lim["answer"] == "391"


def test_a_stream_without_usage_tells_the_vote_when_it_finishes() -> None:
    with both(by_seed(*THREE)) as (_, served):
        *_, last = served.ask("majority@3", seed=0, stream=True)
    assert last.choices[0].finish_reason == "stop"
    assert last.lim["answer"] == "391"


def test_heartbeats_are_comments() -> None:
    settled = threading.Event()
    body = {"model": "majority@2", "messages": QUESTION, "stream": True}
    with (
        both(lambda _: Chain(words("\\boxed{1}", 1), after=settled)) as (_, served),
        served.post(body, timeout=1.0) as answer,
    ):
        lines = answer.iter_lines()
        beats = [line for line, _ in zip(lines, range(12), strict=False) if line[:1] == ":"]
        settled.set()
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert beats[0] == ": 0 of 2 samples have ended"
    assert len(beats) > 2


def test_without_a_vote_the_first_finished_sample_is_shown() -> None:
    def answer(body: dict[str, Any]) -> Chain:
        return Chain(("cut",), "length") if body["seed"] == 0 else Chain((f"no {body['seed']}",))

    with both(answer) as (_, served):
        found = served.ask("majority@3", seed=0)
    assert found.choices[0].message.content == "no 1"
    assert found.lim["answer"] is None


def test_a_settled_vote_aborts_the_rest() -> None:
    def answer(body: dict[str, Any]) -> Chain:
        return Chain(("\\boxed{1}",)) if body["seed"] < 4 else endless("let me")

    with both(answer) as (fake, served):
        found = served.ask("adaptive@6?confidence=0.9", seed=0)
        assert found.lim["settled_early"]
        assert found.lim["options"] == {"confidence": 0.9}
        assert {sample["state"] for sample in found.lim["samples"]} == {"finished", "aborted"}
        assert len(set(fake.aborted)) == 2


def test_other_models_are_the_servers() -> None:
    with both(lambda _: Chain(("one ", "two"))) as (fake, served):
        whole = served.ask("Qwen/Qwen3-8B", n=2, extra_body={"min_p": 0.1})
        streamed = [
            chunk.choices[0].delta.content or ""
            for chunk in served.ask("Qwen/Qwen3-8B", stream=True)
        ]
    assert whole.choices[0].message.content == "one two"
    assert "".join(streamed) == "one two"
    sent = fake.requests[0]
    assert sent == {"model": "Qwen/Qwen3-8B", "messages": QUESTION, "n": 2, "min_p": 0.1}


def test_the_servers_errors_are_passed_on() -> None:
    with both(lambda _: (418, {"message": "a teapot"})) as (_, served):
        with pytest.raises(openai.APIStatusError) as refused:
            served.ask("default")
        assert refused.value.status_code == 418
        with pytest.raises(openai.NotFoundError):  # of the fake server, which has no embeddings
            served.client().embeddings.create(model="default", input="x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 3}, "n: a vote cannot honour 3"),
        ({"model": "majorty@3"}, "unknown program"),
        ({"model": "adaptive?patience=3"}, "no option patience"),
        ({"model": "adaptive?confidence=0.2"}, "confidence: expected above 0.5"),
        ({"model": "adaptive?confidence=0.2", "stream": True}, "confidence: expected above 0.5"),
    ],
)
def test_refusals_come_before_any_sample(fields: dict[str, Any], words: str) -> None:
    with both(by_seed(*THREE)) as (fake, served):
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            served.ask(**{"model": "majority", **fields})
        assert not fake.requests
    assert refused.value.type == "invalid_request_error"


def test_a_body_that_is_no_json_is_refused() -> None:
    with both(by_seed(*THREE)) as (_, served):
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=b"{")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body is no JSON"


def test_the_key_is_the_servers() -> None:
    with both(by_seed(*THREE), api_key="s3cret") as (fake, served):
        for model in ("majority@3", "default"):
            for key in ("wrong", "s3cret2"):
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    served.client(key).chat.completions.create(model=model, messages=QUESTION)
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert not fake.requests
        right = served.client("s3cret").chat.completions
        assert right.create(model="majority@1", messages=QUESTION, seed=0)


def failing(_: dict[str, Any]) -> Reply:
    """No answer."""
    return 400, {"message": "the prompt is too long"}


def test_where_all_samples_fail_the_reason_is_told() -> None:
    with both(failing) as (_, served):
        with pytest.raises(openai.InternalServerError, match="the prompt is too long") as failed:
            served.ask("majority@2")
        assert failed.value.status_code == 502
        with pytest.raises(openai.APIError, match="all 2 samples failed"):
            list(served.ask("majority@2", stream=True))


@pytest.mark.parametrize("model", ["majority@4", "default"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_nothing_at_the_server(model: str, stream: bool) -> None:
    body = {"model": model, "messages": QUESTION, "stream": stream}
    wanted = 4 if "@" in model else 1
    with both(lambda _: endless("let me")) as (fake, served):
        with suppress(httpx.ReadTimeout), served.post(body, timeout=0.5) as answer:
            assert eventually(lambda: fake.in_flight == wanted)
            assert any(line for line in answer.iter_lines())
        assert fake.most_running == wanted
        assert eventually(lambda: fake.in_flight == 0, 2.0)
        assert eventually(lambda: not served.queue._open, 2.0)


def test_no_sample_is_begun_for_who_has_hung_up() -> None:
    body = {"model": "majority", "messages": QUESTION, "lim": {"samples": 50, "parallel": 2}}
    with both(lambda _: endless("let me")) as (fake, served):
        with pytest.raises(httpx.ReadTimeout), served.post(body, timeout=0.5):
            pass
        assert eventually(lambda: fake.in_flight == 0 and not served.queue._open)
        assert len(fake.requests) == 2


def test_questions_wait_and_then_are_turned_away() -> None:
    go_on = threading.Event()
    answer = lambda _: Chain(("\\boxed{1}",), after=go_on)  # noqa: E731 - short
    with (
        both(answer, max_questions=1, max_waiting=1) as (fake, served),
        ThreadPoolExecutor() as pool,
    ):
        asked = [pool.submit(served.ask, "majority@2") for _ in range(2)]
        assert eventually(lambda: len(served.queue._open) == 2 and fake.in_flight == 2)
        with pytest.raises(openai.RateLimitError) as busy:
            served.ask("majority@2")
        assert int(busy.value.response.headers["retry-after"]) >= 1
        go_on.set()
        assert {question.result(10).lim["answer"] for question in asked} == {"1"}
        assert fake.most_running == 2
        assert served.ask("majority@2").lim["answer"] == "1"


def test_a_waiting_question_can_be_given_up() -> None:
    with both(lambda _: endless(), max_questions=1) as (fake, served):
        body = {"model": "majority@2", "messages": QUESTION, "stream": True}
        with served.post(body, timeout=5):
            assert eventually(lambda: fake.in_flight == 2)
            with served.post(body, timeout=5):
                assert len(served.queue._open) == 2
            assert eventually(lambda: len(served.queue._open) == 1)
        assert eventually(lambda: not served.queue._open)
        assert len(fake.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_when_the_proxy_stops_is_told_at_once(stream: bool) -> None:
    body = {"model": "majority@2", "messages": QUESTION, "stream": stream}
    with (
        both(lambda _: endless(), forgets_aborts=2) as (fake, served),
        ThreadPoolExecutor() as pool,
    ):
        asked = pool.submit(httpx.post, f"{served.url}/v1/chat/completions", json=body)
        assert eventually(lambda: fake.in_flight == 2)
        served.queue.close()
        answer = asked.result(0.4)
        assert fake.in_flight == 2  # it lets the server go before the server has let go
        assert "the proxy is being stopped" in answer.text
        assert answer.status_code == (200 if stream else 503)
        with pytest.raises(openai.InternalServerError, match="being stopped"):
            served.ask("majority@2")


def test_programs_are_listed_as_models() -> None:
    with both(by_seed(*THREE)) as (_, served):
        names = [model.id for model in served.client().models.list()]
        assert httpx.get(f"{served.url}/health").status_code == 503  # the fake server has none
    assert {"single@1", "majority@8", "adaptive@8", "confidence@8"} <= set(names)


def test_an_answer_may_be_a_turn_of_the_next_question() -> None:
    with both(by_seed(*THREE)) as (fake, served):
        found = served.ask("majority@3", seed=0)
        turns = [*QUESTION, found.choices[0].message, {"role": "user", "content": "Sure?"}]
        again = served.ask("majority@2", messages=turns, seed=0)
    assert again.choices[0].message.content == "so \\boxed{391}"
    roles = [message["role"] for message in fake.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_a_developer_s_turn_is_the_systems() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    with both(by_seed(*THREE)) as (fake, served):
        served.ask("single", messages=turns, seed=0)
    assert fake.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
