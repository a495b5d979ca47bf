"""The proxy: a fake server behind it, OpenAI's own client before it."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.proxy import app as proxy_module
from tests.fakes.sglang_server import (
    PROMPT_TOKENS,
    Answerer,
    Chain,
    completion,
    endless,
    eventually,
    words,
)
from tests.programs.proxy_harness import QUESTION, proxied

HEARTBEAT_S = 0.1
THREE = ("so \\boxed{391}", "no \\boxed{390}", "thus \\boxed{391}")


@pytest.fixture(autouse=True)
def _quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "HEARTBEAT_S", HEARTBEAT_S)


def by_seed(*texts: str, num_tokens: int = 7) -> Answerer:
    """Answer sample i with text i."""
    return lambda body: Chain(words(texts[body["seed"]], num_tokens))


def test_a_client_gets_a_vote_by_its_model_string() -> None:
    with proxied(by_seed("no \\boxed{390}", *THREE[::2])) as (fake, served):
        found = served.ask("majority@3", seed=0, temperature=0.3, max_tokens=50)
    assert found.choices[0].message.content == "so \\boxed{391}"
    assert (found.choices[0].finish_reason, found.model) == ("stop", "majority@3")
    assert found.usage.completion_tokens == 21
    assert found.usage.prompt_tokens == PROMPT_TOKENS
    vote = found.lim
    assert (vote["answer"], vote["margin"], vote["tokens_spent"]) == ("391", 1, 21)
    assert vote["votes"][0] == {"answer": "391", "votes": 2, "weight": 2.0}
    assert (vote["shown"], vote["settled_early"], len(vote["samples"])) == (1, False, 3)
    assert not any(sample["seed_honoured"] for sample in vote["samples"])
    assert all(request["messages"] == QUESTION for request in fake.requests)
    assert {(r["temperature"], r["max_tokens"], r["top_k"]) for r in fake.requests} == {
        (0.3, 50, 20)
    }


def test_a_stream_begins_before_the_vote_and_ends_with_it() -> None:
    settled = threading.Event()
    long = "word " * 200 + "\\boxed{391}"
    with proxied(lambda _: Chain(words(long, 5), after=settled)) as (_, served):
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


def test_a_stream_without_usage_has_the_vote_in_its_last_chunk() -> None:
    with proxied(by_seed(*THREE)) as (_, served):
        *_, last = served.ask("majority@3", seed=0, stream=True)
    assert last.choices[0].finish_reason == "stop"
    assert last.lim["answer"] == "391"


def test_heartbeats_are_comments() -> None:
    settled = threading.Event()
    body = {"model": "majority@2", "messages": QUESTION, "stream": True}
    with (
        proxied(lambda _: Chain(words("\\boxed{1}", 1), after=settled)) as (_, served),
        served.post(body, timeout=1.0) as answer,
    ):
        lines = answer.iter_lines()
        beats = [line for line, _ in zip(lines, range(12), strict=False) if line[:1] == ":"]
        settled.set()
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert beats[0] == ": 0 of 2 samples have ended"
    assert len(beats) > 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "texts", "sentence"),
    [
        (
            "majority@3",
            ("cut", "no", "no"),
            "No sample states an answer: 1 of 3 samples cut off after 1 token without an answer; "
            "2 of 3 samples ended with no answer in a form that is read.",
        ),
        (
            "budget@1",
            ("cut \\boxed{391}",),
            "No sample states an answer that counts: 1 of 1 sample cut off after 1 token with an "
            "answer that has no vote, since the program budget counts none of these.",
        ),
    ],
)
def test_without_a_vote_the_content_says_so_and_why(
    model: str, texts: tuple[str, ...], sentence: str, stream: bool
) -> None:
    def answer(body: dict[str, Any]) -> Chain:
        text = texts[body["seed"]]
        return Chain((text,), "length" if text.startswith("cut") else "stop")

    with proxied(answer) as (_, served):
        found = served.ask(model, seed=0, stream=stream)
        if stream:
            *pieces, last = found
            content = "".join(chunk.choices[0].delta.content for chunk in pieces)
        else:
            last, content = found, found.choices[0].message.content
    assert content == sentence
    assert extract_answer(content) is None
    all_cut = all(text.startswith("cut") for text in texts)
    assert last.choices[0].finish_reason == ("length" if all_cut else "stop")
    assert (last.lim["answer"], last.lim["shown"]) == (None, None)


def test_a_settled_vote_aborts_the_rest() -> None:
    def answer(body: dict[str, Any]) -> Chain:
        assert eventually(lambda: len(fake.requests) == 6)
        return Chain(("\\boxed{1}",)) if body["seed"] < 3 else endless("let me")

    with proxied(answer) as (fake, served):
        found = served.ask("adaptive@6?confidence=0.9", seed=0)
        assert found.lim["settled_early"]
        assert found.lim["options"] == {"confidence": 0.9}
        assert {sample["state"] for sample in found.lim["samples"]} == {"finished", "aborted"}
        assert len(set(fake.aborted)) == 3


def test_requests_for_other_models_are_forwarded() -> None:
    with proxied(lambda _: Chain(("one ", "two"))) as (fake, served):
        complete = served.ask("Qwen/Qwen3-8B", n=2, extra_body={"min_p": 0.1})
        streamed = [
            chunk.choices[0].delta.content or ""
            for chunk in served.ask("Qwen/Qwen3-8B", stream=True)
        ]
    assert complete.choices[0].message.content == "one two"
    assert "".join(streamed) == "one two"
    sent = fake.requests[0]
    assert sent == {"model": "Qwen/Qwen3-8B", "messages": QUESTION, "n": 2, "min_p": 0.1}


def test_the_servers_errors_are_forwarded() -> None:
    with proxied(lambda _: (418, {"message": "a teapot"})) as (_, served):
        with pytest.raises(openai.APIStatusError) as refused:
            served.ask("default")
        assert refused.value.status_code == 418
        with pytest.raises(openai.NotFoundError):  # of the fake server, which has no embeddings
            served.client().embeddings.create(model="default", input="x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 3}, r"n: a vote cannot honour 3 \(use @SAMPLES in"),
        ({"model": "adaptive?patience=3"}, "no option patience"),
        ({"model": "adaptive?confidence=0.2"}, "confidence: expected above 0.5"),
        ({"model": "adaptive?confidence=0.2", "stream": True}, "confidence: expected above 0.5"),
        ({"max_tokens": 30}, "a thinking budget of 30 tokens leaves"),
        ({"max_tokens": 30, "stream": True}, "a thinking budget of 30 tokens leaves"),
    ],
)
def test_refusals_come_before_any_sample(fields: dict[str, Any], words: str) -> None:
    with proxied(by_seed(*THREE), thinking_budget=30) as (fake, served):
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            served.ask(**{"model": "majority", **fields})
        assert not fake.requests
    assert refused.value.type == "invalid_request_error"


def test_a_body_that_is_no_json_is_refused() -> None:
    with proxied(by_seed(*THREE)) as (_, served):
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=b"{")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is no JSON")


def test_the_key_is_the_servers() -> None:
    with proxied(by_seed(*THREE), api_key="s3cret") as (fake, served):
        for model in ("majority@3", "default"):
            for key in ("wrong", "s3cret2"):
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    served.client(key).chat.completions.create(model=model, messages=QUESTION)
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert not fake.requests
        right = served.client("s3cret").chat.completions
        assert right.create(model="majority@1", messages=QUESTION, seed=0)


TOO_LONG = {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["majority@3", "majority@64", "budget@8", "default"])
def test_a_refusal_by_the_server_is_the_votes_answer(
    model: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "HEARTBEAT_S", 10)
    with proxied(lambda _: (400, TOO_LONG)) as (fake, served):
        body = {"model": model, "messages": QUESTION, "stream": stream}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=20)
        assert (answer.status_code, answer.json()) == (400, TOO_LONG)
        assert answer.headers["content-type"] == "application/json"
        with pytest.raises(openai.BadRequestError, match="too long"):
            served.ask(model, stream=stream)
    assert len(fake.requests) <= 2 * 64


def test_a_vote_whose_samples_are_all_refused_is_given_up() -> None:
    with (
        proxied(lambda _: (400, TOO_LONG)) as (fake, served),
        pytest.raises(openai.BadRequestError, match="too long"),
    ):
        served.ask("majority@200", extra_body={"lim": {"parallel": 2}})
    assert len(fake.requests) <= 8 + 2


@pytest.mark.parametrize("status", [429, 503])
def test_the_servers_wish_for_a_pause_is_kept(status: int) -> None:
    busy = (status, {"message": "busy"}, {"Retry-After": "90"})
    with proxied(lambda _: busy) as (_, served), pytest.raises(openai.APIStatusError) as refused:
        served.ask("majority@2")
    assert refused.value.status_code == status
    assert refused.value.response.headers["retry-after"] == "90"


def test_a_late_refusal_is_an_event_of_the_stream() -> None:
    late = threading.Event()

    def refuse(_: dict[str, Any]) -> Any:
        late.wait(10)
        return 400, TOO_LONG

    with proxied(refuse) as (_, served):
        chunks = iter(served.ask("majority@2", stream=True))
        assert next(chunks).choices[0].delta.role == "assistant"
        late.set()
        with pytest.raises(openai.APIError, match="too long"):
            list(chunks)


def test_a_vote_is_over_the_samples_that_the_server_did_not_refuse() -> None:
    def answer(body: dict[str, Any]) -> Any:
        return (400, TOO_LONG) if body["seed"] == 1 else Chain(("\\boxed{391}",))

    with proxied(answer) as (_, served):
        vote = served.ask("majority@3", seed=0).lim
    assert (vote["answer"], vote["without_vote"]["failed"]) == ("391", 1)
    assert "too long" in vote["samples"][1]["error"]


def test_a_vote_without_a_server_is_a_502() -> None:
    with proxied(by_seed(*THREE)) as (fake, served):
        fake.kill()
        with pytest.raises(openai.InternalServerError, match="failed all 2 samples") as failed:
            served.ask("majority@2")
        assert failed.value.status_code == 502


@pytest.mark.parametrize("model", ["majority@4", "default"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_leaves_nothing_at_the_server(model: str, stream: bool) -> None:
    body = {"model": model, "messages": QUESTION, "stream": stream}
    wanted = 4 if "@" in model else 1
    with proxied(lambda _: endless("let me")) as (fake, served):
        with suppress(httpx.ReadTimeout), served.post(body, timeout=0.5) as answer:
            assert eventually(lambda: fake.in_flight == wanted)
            assert any(line for line in answer.iter_lines())
        assert fake.most_running == wanted
        assert eventually(lambda: fake.in_flight == 0, 2.0)
        assert eventually(lambda: served.queue.num_open == 0, 2.0)


def test_no_sample_is_begun_after_the_client_has_disconnected() -> None:
    body = {"model": "majority", "messages": QUESTION, "lim": {"samples": 50, "parallel": 2}}
    with proxied(lambda _: endless("let me")) as (fake, served):
        with pytest.raises(httpx.ReadTimeout), served.post(body, timeout=0.5):
            pass
        assert eventually(lambda: fake.in_flight == 0 and served.queue.num_open == 0)
        assert len(fake.requests) == 2


def test_questions_wait_and_further_ones_are_refused() -> None:
    go_on = threading.Event()
    answer = lambda _: Chain(("\\boxed{1}",), after=go_on)  # noqa: E731 - short
    with (
        proxied(answer, max_questions=1, max_waiting=1) as (fake, served),
        ThreadPoolExecutor() as pool,
    ):
        asked = [pool.submit(served.ask, "majority@2") for _ in range(2)]
        assert eventually(lambda: served.queue.num_open == 2 and fake.in_flight == 2)
        with pytest.raises(openai.RateLimitError) as busy:
            served.ask("majority@2")
        assert int(busy.value.response.headers["retry-after"]) >= 1
        go_on.set()
        assert {question.result(10).lim["answer"] for question in asked} == {"1"}
        assert fake.most_running == 2
        assert served.ask("majority@2").lim["answer"] == "1"


def test_a_question_that_waits_can_be_given_up() -> None:
    with proxied(lambda _: endless(), max_questions=1) as (fake, served):
        body = {"model": "majority@2", "messages": QUESTION, "stream": True}
        with served.post(body, timeout=5):
            assert eventually(lambda: fake.in_flight == 2)
            with served.post(body, timeout=5):
                assert served.queue.num_open == 2
            assert eventually(lambda: served.queue.num_open == 1)
        assert eventually(lambda: served.queue.num_open == 0)
        assert len(fake.requests) == 2


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_waits_gets_an_error_as_soon_as_the_proxy_stops(has_begun: bool) -> None:
    body = {"model": "majority@2", "messages": QUESTION, "stream": has_begun}
    with (
        proxied(lambda _: endless(), forgets_aborts=2) as (fake, served),
        ThreadPoolExecutor() as pool,
    ):
        asked = pool.submit(httpx.post, f"{served.url}/v1/chat/completions", json=body)
        assert eventually(lambda: fake.in_flight == 2)
        if has_begun:
            time.sleep(3 * HEARTBEAT_S)
        served.queue.close()
        answer = asked.result(0.4)
        assert fake.in_flight == 2  # the answer does not wait for the aborts
        assert "the proxy is being stopped" in answer.text
        assert answer.status_code == (200 if has_begun else 503)
        with pytest.raises(openai.InternalServerError, match="being stopped"):
            served.ask("majority@2")


def test_programs_are_listed_as_models() -> None:
    with proxied(by_seed(*THREE)) as (_, served):
        names = [model.id for model in served.client().models.list()]
        assert httpx.get(f"{served.url}/health").status_code == 503  # the fake server has none
    assert names == [f"{program.name}@{program.samples}" for program in PROGRAMS.values()]


THOUGHTS = "17 * 23, so " + "hm " * 200 + "391"
REPLY = "It is \\boxed{391}."
TEXT = f"<think>\n{THOUGHTS}\n</think>\n\n{REPLY}"


def saying(text: str) -> Answerer:
    """Answer every sample with one text."""
    return lambda _: Chain(words(text, 9))


@pytest.mark.parametrize(
    ("text", "reason", "thoughts", "content"),
    [
        (TEXT, "stop", THOUGHTS, REPLY),
        (TEXT.removeprefix("<think>\n"), "stop", THOUGHTS, REPLY),
        (TEXT, "length", THOUGHTS, REPLY),
        (f"  {REPLY}\n", "stop", None, f"  {REPLY}\n"),  # as it was written
    ],
)
def test_thoughts_of_the_shown_sample_are_apart_from_the_content(
    text: str, reason: str, thoughts: str | None, content: str
) -> None:
    with proxied(lambda _: completion(text, reason=reason)) as (_, served):
        found = served.ask("majority@2")
    message = found.choices[0].message
    assert (message.content, found.choices[0].finish_reason) == (content, reason)
    assert (message.model_extra or {}).get("reasoning_content") == thoughts
    assert (found.usage.completion_tokens_details.reasoning_tokens > 0) == bool(thoughts)


def test_a_stream_has_the_thoughts_first_and_apart() -> None:
    with proxied(saying(TEXT)) as (_, served):
        chunks = list(served.ask("majority@2", stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    replies = [delta.content or "" for delta in deltas]
    assert "".join(thoughts) == THOUGHTS
    assert "".join(replies) == REPLY
    last_thought = max(place for place, piece in enumerate(thoughts) if piece)
    assert all(place > last_thought for place, piece in enumerate(replies) if piece)
    assert sum(map(bool, thoughts)) > 1


def test_an_answer_with_thoughts_may_be_a_turn_of_the_next_question() -> None:
    with proxied(saying(TEXT)) as (fake, served):
        answer = served.ask("single").choices[0].message
        served.ask("single", messages=[*QUESTION, answer, {"role": "user", "content": "Sure?"}])
    assert fake.requests[-1]["messages"][1] == {"role": "assistant", "content": REPLY}


def thinking(body: dict[str, Any]) -> Any:
    """Think until the limit, and answer once the thoughts are closed."""
    if body.get("continue_final_message"):
        return completion(REPLY, num_tokens=5)
    return completion("<think>\nhm hm", num_tokens=body["max_tokens"], reason="length")


def test_the_proxys_budget_closes_the_thoughts() -> None:
    with proxied(thinking, thinking_budget=30) as (fake, served):
        found = served.ask("majority@2", max_tokens=100)
    message = found.choices[0].message
    assert message.content == REPLY
    assert message.reasoning_content.startswith("hm hm")
    assert found.usage.completion_tokens == 2 * 35
    assert found.usage.completion_tokens_details.reasoning_tokens == 2 * 30
    assert sorted(request["max_tokens"] for request in fake.requests) == [30, 30, 70, 70]


def test_60_questions_at_once_have_no_more_threads_than_the_proxy_says() -> None:
    chain = Chain(("so ", "\\boxed{391}"), pace_s=0.1)
    body = {"model": "majority@8", "messages": QUESTION}
    most = 0

    def new_threads() -> int:
        """Count the threads since the start, without the fake server's own."""
        new = set(threading.enumerate()) - before
        return sum(not thread.name.startswith("ThreadPoolExecutor") for thread in new)

    async def ask_all(url: str) -> list[dict[str, Any]]:
        nonlocal most
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            posts = [http.post(f"{url}/v1/chat/completions", json=body) for _ in range(60)]
            answers = asyncio.ensure_future(asyncio.gather(*posts))
            while not answers.done():
                most = max(most, new_threads())
                await asyncio.sleep(0.01)
            return [answer.json() for answer in answers.result()]

    with proxied(lambda _: chain, max_questions=16, max_waiting=60) as (fake, served):
        before = set(threading.enumerate())
        answers = asyncio.run(ask_all(served.url))
    assert {answer["lim"]["answer"] for answer in answers} == {"391"}
    assert len(fake.requests) == 60 * 8
    assert fake.most_running == 64
    assert served.queue.max_threads == 3 * 16 + 64
    assert 64 < most <= served.queue.max_threads
