"""The fake server answers as SGLang does, compared with SGLang's own code."""

import json
from threading import Thread
from typing import Any

import httpx
import pytest
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from sglang.srt.entrypoints.openai.sse_utils import build_sse_content

from lim_sglang.programs.chat import thinking_switch
from tests.fakes.sglang_server import (
    END_OF_TURN,
    Chain,
    FakeServer,
    endless,
    eventually,
    serving,
)

USAGE = {"include_usage": True, "continuous_usage_stats": True}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
STREAM = {"rid": "r", "model": "m", "stream": True, "stream_options": USAGE}


def complete(fake: FakeServer, body: dict[str, Any]) -> httpx.Response:
    """Ask for a chat completion."""
    return httpx.post(f"{fake.url}/v1/chat/completions", json=body, timeout=20)


def abort(fake: FakeServer, rid: str) -> None:
    """Abort a request."""
    assert httpx.post(f"{fake.url}/abort_request", json={"rid": rid}).status_code == 200


def test_a_stream_has_the_events_of_sglang() -> None:
    with serving(lambda _: Chain(("so ", "", "é\u2028"))) as fake:
        events = complete(fake, {**STREAM, **LOGPROBS}).text.split("\n\n")
    tokens = [json.loads(event.removeprefix("data: ")) for event in events[1:3]]
    usages = [token["usage"] for token in tokens]
    logprobs = [token["choices"][0]["logprobs"] for token in tokens]
    of = {"chunk_id": "r", "created": 1, "model": "m", "index": 0}
    theirs = [
        build_sse_content(**of, role="assistant", content=""),
        build_sse_content(**of, content="so ", logprobs=logprobs[0], usage=usages[0]),
        build_sse_content(**of, content="é\u2028", logprobs=logprobs[1], usage=usages[1]),
        build_sse_content(**of, finish_reason="stop", matched_stop=END_OF_TURN),
    ]
    assert [f"{event}\n\n" for event in events[:4]] == theirs
    assert [usage["completion_tokens"] for usage in usages] == [1, 3]
    assert len(logprobs[0]["content"][0]["top_logprobs"]) == 2
    last = ChatCompletionStreamResponse.model_validate_json(events[4].removeprefix("data: "))
    assert not last.choices
    assert last.usage is not None
    assert last.usage.completion_tokens == 3
    assert events[5:] == ["data: [DONE]", ""]


def test_an_answer_has_the_fields_of_sglang() -> None:
    with serving(lambda _: Chain(("so ", "391"), reason="length")) as fake:
        found = complete(fake, {"rid": "r", "model": "m", **LOGPROBS}).json()
    theirs = ChatCompletionResponse.model_validate(found).model_dump()
    assert found == {name: theirs[name] for name in found}
    assert found["choices"][0]["message"]["content"] == "so 391"
    assert found["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_ends_all_that_begin_with_a_known_id(stream: bool) -> None:
    chains = {"a": endless("some"), "ab": endless("some", "more"), "b": Chain(("b",))}
    found: dict[str, str] = {}

    def ask(rid: str) -> None:
        found[rid] = complete(fake, {"rid": rid, "model": "m", "stream": stream}).text

    with serving(lambda body: chains[body["rid"]]) as fake:
        threads = [Thread(target=ask, args=(rid,)) for rid in ("a", "ab")]
        for thread in threads:
            thread.start()
        assert eventually(lambda: fake.in_flight == 2)
        abort(fake, "unknown")
        abort(fake, "")
        ask("b")
        assert eventually(lambda: fake.in_flight == 2)  # its answer comes before its end
        abort(fake, "a")
        for thread in threads:
            thread.join(5)
    assert '"finish_reason":"stop"' in found["b"].replace(" ", "")
    assert all('"finish_reason":"abort"' in found[r].replace(" ", "") for r in ("a", "ab"))
    assert fake.in_flight == 0
    assert not fake.disconnected


@pytest.mark.parametrize("thinking", [True, False])
def test_the_tokenizer_takes_the_requests_of_sglangs(thinking: bool) -> None:
    messages = [{"role": "user", "content": "Do you think?"}]
    bodies = [
        {"prompt": "<think> hm </think>", "add_special_tokens": False},
        {"messages": messages, **thinking_switch(thinking)},
    ]
    with serving(lambda _: Chain(())) as fake:
        found = [httpx.post(f"{fake.url}/v1/tokenize", json=body).json() for body in bodies]
    text, rendered = (TokenizeRequest.model_validate(body) for body in bodies)
    assert not text.add_special_tokens
    asked = rendered.to_chat_completion_request()
    assert asked.chat_template_kwargs == {"enable_thinking": thinking}
    assert set(TokenizeResponse.model_fields) == {*found[0], "max_model_len"}
    assert [answer["count"] for answer in found] == [3, 4]
