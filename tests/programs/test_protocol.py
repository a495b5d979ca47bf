"""`lim proxy` reads chat completions."""

from typing import Any

import httpx
import pytest

from lim_sglang.errors import ConfigError
from lim_sglang.programs.proxy.protocol import (
    NoJsonError,
    VoteRequest,
    parse_body,
    read_model,
    read_request,
    refusal_body,
)
from lim_sglang.programs.schema import Sampling

PROGRAMS = {"single": 1, "majority": 8, "adaptive": 40, "early_stop": 40}
DEFAULTS = Sampling(max_tokens=100)


def read(**fields: Any) -> VoteRequest:
    """Read the request of one question."""
    body = {"messages": [{"role": "user", "content": "2 + 2?"}], **fields}
    named = read_model(body.get("model"), PROGRAMS)
    return read_request(body, named, PROGRAMS, DEFAULTS)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("majority", ("majority", None, {})),
        ("majority@16", ("majority", 16, {})),
        ("adaptive@40?confidence=0.9", ("adaptive", 40, {"confidence": 0.9})),
        ("adaptive?confidence=0.9&window=5", ("adaptive", None, {"confidence": 0.9, "window": 5})),
        ("majority@16?", ("majority", 16, {})),
        ("Majority@3", ("majority", 3, {})),
        (" majority @ 3 ", ("majority", 3, {})),
        ("openai/majority@3", ("majority", 3, {})),
        ("hosted_vllm/openai/MAJORITY", ("majority", None, {})),
        ("early-stop@3", ("early_stop", 3, {})),
        ("EARLY_STOP@3", ("early_stop", 3, {})),
        ("Early Stop", ("early_stop", None, {})),
        ("EarlyStop@3", ("early_stop", 3, {})),
        ("Adaptive@8 ? Confidence = 0.9", ("adaptive", 8, {"confidence": 0.9})),
        ("default", None),
        ("mine@home", None),
        ("Qwen/Qwen3-8B", None),
        ("Qwen/Qwen3-8B:my-adapter", None),
        ("claude-3-5-sonnet@20240620", None),
        ("text-bison@001", None),
        ("my/adapter", None),
        ("single-node-7b", None),
        ("", None),
        ("@", None),
        (None, None),
        (3, None),
        (["majority@3"], None),
    ],
)
def test_a_model_string_names_a_program_or_a_model(model: Any, expected: Any) -> None:
    assert read_model(model, PROGRAMS) == expected


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "majorty@16",
            "unknown program 'majorty'; did you mean majority\\? known: single, majority, adaptive",
        ),
        ("majorty@three", "unknown program 'majorty'"),
        ("openai/Majorty", "unknown program 'Majorty'"),
        ("vote@3", "unknown program 'vote'.* such as majority@8"),
        ("Qwen/Qwen3-8B@8", "unknown program 'Qwen3-8B'"),
        ("adaptve?confidence=0.9", "unknown program 'adaptve'"),
        ("majority:3", "unknown program 'majority:3'"),
        ("majority-3", "unknown program 'majority-3'"),
        ("majority\uff203", "unknown program 'majority"),
        ("'majority@3'", "unknown program"),
        ("majority%403", "unknown program"),
        ("majority\u200b@3", "unknown program"),
        ("\ud83dmajority@3", "unknown program"),
        ("majority@3@3", "unknown program"),
        ("majority@three", "1 to 1024"),
        ("majority@-3", "1 to 1024"),
        ("majority@3.0", "1 to 1024"),
        ("majority@3/", "1 to 1024"),
        ("majority@0", "1 to 1024"),
        ("majority@1025", "1 to 1024"),
        ("majority@", "1 to 1024"),
        ("majority@²", "1 to 1024"),
        ("majority@" + "9" * 5000, "1 to 1024"),
        ("adaptive?confidence", "name=number"),
        ("adaptive?confidence=high", "name=number"),
        ("adaptive?confidence=0.9&confidence=0.8", "each name once"),
    ],
)
def test_a_typing_error_in_a_model_string_is_refused(model: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(model, PROGRAMS)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", NoJsonError, "no JSON"),
        (b"{", NoJsonError, "no JSON"),
        (b'{"model": "\xff"}', NoJsonError, "UTF-8"),
        (b"9" * 5000, NoJsonError, "no JSON"),  # more digits than Python reads
        (b"[" * 100_000, ConfigError, "nested too deeply"),
        (b'{"x":' * 100_000, ConfigError, "nested too deeply"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    content: bytes, error: type[ConfigError], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse_body(content)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "a\ud83d b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]},
        {"user": "\ud83d"},
        {"\ud83d": 1},
    ],
)
def test_half_a_surrogate_pair_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"half of a surrogate pair"):
        read(model="majority", **fields)


def test_a_field_asks_for_the_same_as_a_model_string() -> None:
    field = {"program": "adaptive", "samples": 40, "parallel": 4, "options": {"confidence": 0.9}}
    by_field, by_string = read(lim=field), read(model="adaptive@40?confidence=0.9")
    for name in ("program", "samples", "options", "messages", "sampling"):
        assert getattr(by_field, name) == getattr(by_string, name)
    assert by_field.parallel == 4


def test_an_empty_field_asks_for_the_default_vote() -> None:
    asked = read(model="Qwen/Qwen3-8B", lim={})
    assert (asked.program, asked.samples, asked.model) == ("majority", 8, "Qwen/Qwen3-8B")
    assert (read(model="single").samples, read(model="adaptive").samples) == (1, 40)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lim": {"program": "single", "samples": 3}}, "single takes 1 sample of a question"),
        ({"model": "single@3"}, "single takes 1 sample of a question"),
        ({"model": "early-stop@4?window=5"}, "window=5 cannot stop before it has 5 samples"),
        ({"model": "majority?window=3"}, "majority has no option window"),
    ],
)
def test_options_and_samples_without_effect_are_refused(fields: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(**fields)


def test_model_string_and_field_may_not_differ() -> None:
    assert read(model="majority@4", lim={"samples": 4, "program": "majority"}).samples == 4
    with pytest.raises(ConfigError, match="differ in program, samples"):
        read(model="majority@4", lim={"samples": 5, "program": "adaptive"})


def test_sampling_parameters_are_the_requests_then_the_proxys() -> None:
    asked = read(model="majority", temperature=0, top_k=-1, max_completion_tokens=7, seed=0)
    assert asked.sampling == Sampling(max_tokens=7, temperature=0, top_k=-1, seed=0)
    assert read(model="majority", max_tokens=9).sampling.max_tokens == 9
    assert read(model="majority", max_tokens=None).sampling == DEFAULTS


def test_messages_are_passed_in_system_turns_and_texts_without_thoughts() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "{x}"},
        {"role": "assistant", "content": "y", "reasoning_content": "hm"},
        {"role": "user", "content": parts},
    ]
    assert list(read(model="majority", messages=turns).messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{x}"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "2 + 2?"},
    ]


def test_the_projects_instruction_is_added_on_request() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "{2} + 2?"}]
    system, user = read(messages=turns, lim={"template": "math"}).messages
    assert system["content"] == "s"
    assert user["content"].startswith("{2} + 2?\n\nPlease reason")
    assert user["content"].endswith("\\boxed{}.")
    with pytest.raises(ConfigError, match="last message"):
        read(messages=[{"role": "assistant", "content": "4"}], lim={"template": "math"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "n: a vote cannot honour 2 .use @SAMPLES in the model's name"),
        ({"n": 0}, "n: a vote cannot honour 0"),
        ({"tools": ["x" * 60]}, r'tools: a vote cannot honour \["x{58}… \('),
        ({"n": True}, "n: a vote cannot honour true"),
        ({"logprobs": 0}, "logprobs: a vote cannot honour 0"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage: "),
        ({"max_tokens": 2**31}, "max_tokens: "),
        ({"max_tokens": "9"}, "max_tokens: "),
        ({"seed": 2**63}, "seed: "),
        ({"top_k": 10**30}, "top_k: "),
        ({"messages": "2 + 2?"}, "messages: "),
        ({"messages": [None]}, "messages.0: "),
        ({"lim": []}, "lim: "),
        ({"lim": {"options": {"confidence": 10**400}}}, r"confidence: expected a number up to"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format: a vote cannot honour .*own model may",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            'chat_template_kwargs: a vote cannot honour {"enable_thinking": false}',
        ),
        ({"separate_reasoning": False}, "separate_reasoning: a vote cannot honour false"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        (
            {"mirostat": 1},
            "mirostat: a vote does not know this field .a request to the server's own",
        ),
        ({"temperature": 3}, "temperature: must be at most 2, not 3"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"top_p": 0}, "top_p: must be more than 0, not 0"),
        ({"top_k": 0}, "top_k: 0 leaves no token"),
        ({"seed": -1}, "seed: "),
        ({"stream": "yes"}, "stream: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"^messages\.0\.content\.0\.type: ",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, r"^messages\.0\.content: "),
        ({"max_token": 5}, r"max_token: .* know this field \(did you mean max_tokens\?\)"),
        ({"temprature": 1}, r"temprature: .* \(did you mean temperature\?\)"),
        ({"lim": {"programme": "majority"}}, r"lim.programme: not .* \(did you mean program\?\)"),
        ({"lim": {"votes": 3}}, r"lim.votes: not a field of lim \(program, samples, .* template"),
        ({"lim": {"program": "majorty"}, "model": "x"}, "lim.program: unknown program 'majorty'"),
        ({"lim": {"samples": 0}}, "lim.samples: "),
        ({"lim": {"options": {"confidence": "0.9"}}}, "lim.options.confidence"),
        ({"lim": {"template": "poem"}}, "lim.template: "),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_in_words(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(**{"model": "majority", **fields})


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(ConfigError, match=r"n: .*; tools: .*; temperature: "):
        read(model="majority", n=2, tools=[1], temperature=9)


def test_fields_that_ask_for_nothing_are_ignored() -> None:
    neutral = {"n": 1, "tools": [], "logprobs": False, "stop": None, "presence_penalty": 0}
    neutral |= {"separate_reasoning": True, "chat_template_kwargs": {}}
    assert read(model="majority", user="me", response_format={"type": "text"}, **neutral)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"error": {"message": "no"}}, {"error": {"message": "no"}}),
        ({"object": "error", "message": "no"}, {"error": {"object": "error", "message": "no"}}),
    ],
)
def test_a_refusal_in_a_stream_has_an_error_field(content: Any, expected: Any) -> None:
    assert refusal_body(httpx.Response(400, json=content)) == expected


def test_a_refusal_in_a_stream_may_be_no_json() -> None:
    error = refusal_body(httpx.Response(413, text="too large"))["error"]
    assert (error["message"], error["code"]) == ("too large", 413)
