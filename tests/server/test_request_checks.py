"""Reasons against a request, with made-up vocabularies: no server, no SGLang."""

import json
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy
import pytest

from lim_sglang.config import PROGRAM_NAMES
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.request_checks import (
    ALL_TOKENS,
    MAX_BODY_BYTES,
    MAX_NESTING,
    MAX_SAMPLES,
    Limits,
    reason_against_body,
    reasons_against_batch,
    reasons_against_model_name,
    reasons_against_request,
    recurs_without_end,
)

VOCAB_SIZE = 1000
LIMITS = Limits(
    vocab_size=VOCAB_SIZE,
    context=4096,
    hidden_size=2,
    grammar_backend="xgrammar",
    reads_media=False,
)
NAN, INFINITY = float("nan"), float("inf")


class Sampling(msgspec.Struct, kw_only=True):
    """Parameters as SGLang holds them once they are normalized."""

    max_new_tokens: int | None = 128
    n: int = 1
    stop_token_ids: set[int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = ALL_TOKENS
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    stream_interval: int | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    stop_regex_strs: list[str] | None = None
    custom_params: dict[str, str | int] | None = None


class Tokenized(msgspec.Struct, kw_only=True):
    """One prompt as SGLang is about to send it on."""

    input_ids: Any = msgspec.field(default_factory=lambda: array("q", [5, 6, 7]))
    input_embeds: list[list[float]] | None = None
    mm_inputs: Any = None
    sampling_params: Sampling = msgspec.field(default_factory=Sampling)
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] | None = None
    return_sampling_mask: bool = False
    multi_item_delimiter_indices: list[int] | None = None
    stream: bool = False
    priority: int | None = None


def against(**fields: Any) -> list[str]:
    """List the reasons against a request with these fields."""
    return reasons_against_request(Tokenized(**fields), LIMITS)


def against_sampling(**fields: Any) -> list[str]:
    """List the reasons against a request with these sampling parameters."""
    return against(sampling_params=Sampling(**fields))


def test_an_ordinary_request_passes() -> None:
    assert against() == []
    assert (
        against_sampling(
            stop_token_ids={0, VOCAB_SIZE - 1},
            logit_bias={"0": -100.0, str(VOCAB_SIZE - 1): 100},
            stop_regex_strs=[r"\d+\.", "(yes|no) *"],
            json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}}',
            top_k=1,
            temperature=0,
            sampling_seed=-1,
        )
        == []
    )


@pytest.mark.parametrize("ids", [[-1], [VOCAB_SIZE], [5, 10_000_000], [2**62], []])
def test_a_prompt_is_refused_whose_ids_are_none_of_the_vocabulary(ids: list[int]) -> None:
    (reason,) = against(input_ids=array("q", ids))
    assert "the prompt has" in reason
    assert all(str(each) in reason for each in ids[-1:] if each < 10**18)


@pytest.mark.parametrize(
    ("places", "refused"), [([0, 2], 0), (None, 0), ([3], 1), ([-1], 1), ([], 1)]
)
def test_delimiters_lie_in_the_prompt(places: list[int] | None, refused: int) -> None:
    assert len(against(multi_item_delimiter_indices=places)) == refused


def test_ids_of_a_prompt_with_media_or_embeddings_are_not_looked_at() -> None:
    ids = array("q", [VOCAB_SIZE + 5])
    assert against(input_ids=ids, mm_inputs=object()) == []
    assert against(input_ids=ids, input_embeds=[[0.5, 1.0]]) == []


@pytest.mark.parametrize("embeds", [[], [[0.5]], [[0.5, 1.0], [0.5]], [[0.5, NAN]], [[1e300, 0.0]]])
def test_embeddings_are_finite_and_as_wide_as_the_model(embeds: list[list[float]]) -> None:
    (reason,) = against(input_embeds=embeds)
    assert reason.startswith("input_embeds")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 1.5),
        ("max_new_tokens", "3"),
        ("max_new_tokens", True),
        ("temperature", None),
        ("temperature", [1.0]),
        ("top_k", NAN),
        ("stop_token_ids", {"a"}),
        ("logit_bias", {"5": "x"}),
        ("regex", 5),
        ("custom_params", {"a": object()}),
        ("stop_regex_strs", [5]),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(field: str, value: object) -> None:
    (reason,) = against_sampling(**{field: value})
    assert reason.startswith(f"sampling_params.{field}: expected")


@pytest.mark.parametrize(
    ("field", "value"), [("return_logprob", [True]), ("priority", "x"), ("stream", None)]
)
def test_types_are_checked_outside_the_sampling_parameters_too(field: str, value: object) -> None:
    (reason,) = against(**{field: value})
    assert reason.startswith(f"{field}: expected")


@pytest.mark.parametrize(
    ("field", "served", "refused"),
    [
        ("temperature", [0, 2.5, 1e30], [-1, NAN, INFINITY, -INFINITY, 1e39]),
        ("top_p", [1, 0.5, 1e-6], [0, -1, 1e-9, 1.01, NAN, INFINITY]),
        ("top_k", [1, VOCAB_SIZE, ALL_TOKENS], [0, -1, -2, ALL_TOKENS + 1, 2**31, 10**30]),
        ("repetition_penalty", [1e-3, 1, 2], [0, -1, 1e-300, 2.01, NAN, INFINITY]),
        ("min_new_tokens", [0, 10], [-1, 2**31, 10**30]),
        ("stream_interval", [None, 1, 100], [0, -1, 2**31]),
        ("sampling_seed", [None, -1, 2**63 - 1], [2**63, -(2**64), 10**30]),
        ("stop_token_ids", [None, {0}, {VOCAB_SIZE - 1}], [{-1}, {VOCAB_SIZE}, {5, 10**8}]),
        ("logit_bias", [None, {"5": -1e9}], [{"-1": 1}, {"a": 1}, {"²": 1}, {"1000": 1}]),
        ("logit_bias", [{}], [{"5": NAN}, {"5": INFINITY}, {"5": -INFINITY}, {"5": 1e10}]),
    ],
)
def test_a_sampling_parameter_is_served_within_its_bounds_only(
    field: str, served: list[Any], refused: list[Any]
) -> None:
    for value in served:
        assert against_sampling(**{field: value}) == [], value
    for value in refused:
        (reason,) = against_sampling(**{field: value})
        assert reason.startswith(field), value


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"top_logprobs_num": VOCAB_SIZE + 1}, "top_logprobs_num"),
        ({"top_logprobs_num": -1}, "top_logprobs_num"),
        ({"logprob_start_len": -2}, "logprob_start_len"),
        ({"logprob_start_len": 4}, "logprob_start_len"),
        ({"token_ids_logprob": [5, VOCAB_SIZE]}, "token_ids_logprob"),
        ({"token_ids_logprob": [-1]}, "token_ids_logprob"),
    ],
)
def test_logprobs_are_refused_outside_prompt_and_vocabulary(
    fields: dict[str, Any], word: str
) -> None:
    (reason,) = against(return_logprob=True, **fields)
    assert reason.startswith(word)


def test_logprobs_of_the_whole_vocabulary_are_served_unless_they_fill_the_memory() -> None:
    few, many = Sampling(max_new_tokens=8), Sampling(max_new_tokens=None)
    copies = Sampling(max_new_tokens=8, n=50)
    limits = replace(LIMITS, vocab_size=150_000, context=40_960)
    for sampling, number in ((few, 0), (many, 1), (copies, 1)):
        request = Tokenized(
            sampling_params=sampling, return_logprob=True, top_logprobs_num=limits.vocab_size
        )
        assert len(reasons_against_request(request, limits)) == number


@pytest.mark.parametrize(("top_k", "reasons"), [(VOCAB_SIZE, 0), (VOCAB_SIZE + 1, 1)])
def test_a_mask_of_more_tokens_than_there_are_is_refused(top_k: int, reasons: int) -> None:
    found = against(sampling_params=Sampling(top_k=top_k), return_sampling_mask=True)
    assert len(found) == reasons


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [("(?<=a+)b", True), ("(", True), ("(?:foo|bar)+", False), (r"(\d+,)+", False)],
)
def test_a_stop_pattern_is_refused_that_does_not_compile(pattern: str, refused: bool) -> None:
    assert len(against_sampling(stop_regex_strs=[pattern])) == refused


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "maximum": 2**63 - 1},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"const": 6.02e23},
    ],
    ids=str,
)
def test_ordinary_bounds_of_schemas_are_served(schema: dict[str, Any]) -> None:
    assert against_sampling(json_schema=json.dumps(schema)) == []


def test_a_character_nul_is_served_where_the_compiler_reads_it() -> None:
    sampling = Sampling(json_schema=json.dumps({"type": "string", "pattern": "[^\0-\x1f]*"}))
    request = Tokenized(sampling_params=sampling)
    assert len(reasons_against_request(request, LIMITS)) == 1
    assert reasons_against_request(request, replace(LIMITS, grammar_backend="llguidance")) == []


RECURSION = {
    "type": "object",
    "properties": {"next": {"$ref": "#"}, "name": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("schema", "endless"),
    [
        ({"$ref": "#"}, True),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#"}}}, True),
        ({"allOf": [{"type": "object"}, {"$ref": "#"}]}, True),
        ({"anyOf": [{"$ref": "#"}]}, True),
        ({"oneOf": [{"$ref": "#"}, {"$ref": "#/oneOf/0"}]}, True),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, False),
        (RECURSION, False),
        ({**RECURSION, "required": ["name"]}, False),
        ({**RECURSION, "required": ["name", "next"]}, True),
        ({"type": "array", "items": {"$ref": "#"}}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, True),
        ({"type": "array", "prefixItems": [True], "items": {"$ref": "#"}, "minItems": 2}, True),
        ({"type": "array", "prefixItems": [True], "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"$ref": "#/a~1b", "a/b": {"$ref": "#/a~1b"}}, True),
        ({"$ref": "#/nowhere"}, False),
        ({"$ref": "http://elsewhere/#"}, False),
        ({"allOf": [{"$ref": "#item"}], "$defs": {"a": {"$anchor": "item"}}}, False),
        ({"$ref": 5, "anyOf": 7, "allOf": None, "required": 3, "type": "object"}, False),
        (True, False),
        (5, False),
    ],
)
def test_a_schema_recurs_without_end_if_no_finite_value_matches_it(
    schema: Any, endless: bool
) -> None:
    assert recurs_without_end(schema) == endless
    reasons = against_sampling(json_schema=json.dumps(schema))
    assert ["recurs without end" in reason for reason in reasons] == [True] * endless


def test_a_long_chain_of_references_is_decided() -> None:
    links = 20_000
    chain: dict[str, Any] = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(links)}
    root = {"$ref": "#/$defs/0", "$defs": chain}
    chain[str(links)] = {"type": "null"}
    assert not recurs_without_end(root)
    chain[str(links)] = {"$ref": "#"}
    assert recurs_without_end(root)


@pytest.mark.parametrize(
    "grammar",
    [
        {"json_schema": "[" * (MAX_NESTING + 1)},
        {"json_schema": json.dumps({"type": "integer", "const": -(2**63)})},
        {"json_schema": json.dumps({"anyOf": [{"enum": [1, 2**64]}]})},
        {"json_schema": json.dumps({"const": "a\0"})},
        {"regex": "a\0"},
        {"ebnf": 'root ::= "\0"'},
        {"structural_tag": json.dumps({"structures": [{"schema": {"$ref": "#"}}]})},
    ],
    ids=str,
)
def test_a_grammar_is_refused_that_a_compiler_would_not_survive(grammar: dict[str, str]) -> None:
    (reason,) = against_sampling(**grammar)
    assert reason.startswith(next(iter(grammar)))


def test_a_grammar_that_is_no_json_is_left_to_its_compiler() -> None:
    assert against_sampling(json_schema="{", structural_tag="zz", regex="(") == []


def incoming(is_openai: bool = False, **fields: Any) -> list[str]:
    """List the reasons against a request as it came in."""
    return reasons_against_batch(SimpleNamespace(**fields), is_openai=is_openai)


@pytest.mark.parametrize("samples", [0, -1, MAX_SAMPLES + 1, 10**400, NAN, "3", [], {}, True, 1.0])
def test_a_number_of_samples_is_refused_before_lists_are_made_of_it(samples: Any) -> None:
    (reason,) = incoming(text="a", sampling_params={"n": samples})
    assert reason.startswith(f"n: expected 1 to {MAX_SAMPLES}")


WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "stream_interval", "sampling_seed")
PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")


@pytest.mark.parametrize(
    ("names", "expected", "wrong"),
    [
        (WHOLE, "a whole number", ["5", [5], {}, True, 5.0, ""]),
        (("temperature", "top_p", "min_p", *PENALTIES), "a number", ["0.5", [1], {}, False]),
        (("temperature", *PENALTIES), "a number", [10**400]),
        (("stop_token_ids",), "a list of token ids", ["5", 5, {}, True, [[5]], [True]]),
        (
            ("stop_token_ids",),
            "a list of token ids",
            [["a"], ["5.0"], [5.5], [INFINITY], [NAN], {5: 5}],
        ),
        (("stop", "stop_regex"), "a string, or a list of strings", [5, True, {}, [5], ["a", None]]),
        (("logit_bias",), "token ids as keys", ["5", [5], 5, {"a": 1.0}, {"": 1.0}]),
    ],
)
def test_a_sampling_parameter_of_another_type_is_refused_by_its_name(
    names: tuple[str, ...], expected: str, wrong: list[Any]
) -> None:
    for name in names:
        for value in wrong:
            (reason,) = incoming(text="a", sampling_params={name: value})
            assert reason.startswith(f"sampling_params.{name}: expected {expected}"), value
            assert ", got " in reason
        assert incoming(text="a", sampling_params={name: None}) == []
    (reason,) = incoming(text="a", sampling_params={"max_new_tokens": "5"})
    assert reason == "sampling_params.max_new_tokens: expected a whole number, got '5'"


def test_sampling_parameters_of_the_expected_types_pass() -> None:
    whole, numbers = dict.fromkeys(WHOLE, 5), dict.fromkeys(("temperature", *PENALTIES), 1)
    others = {"stop": ["a"], "stop_token_ids": [5, None], "logit_bias": {"5": -1}, "top_p": 0.5}
    assert incoming(text="a", sampling_params={**whole, **numbers, **others}) == []
    # SGLang makes integers of token ids.
    for ids in ([5.0], ["5"], (5,), range(5), {5}, numpy.arange(5), [numpy.float32(5)]):
        assert incoming(text="a", sampling_params={"stop_token_ids": ids}) == []


def test_samples_count_for_each_prompt() -> None:
    half = MAX_SAMPLES // 2
    assert incoming(text=["a", "b"], sampling_params={"n": half}) == []
    (reason,) = incoming(text=["a", "b", "c"], sampling_params={"n": half})
    assert f"{half} samples of 3 prompts" in reason
    assert incoming(text=["a"] * 2 * MAX_SAMPLES, sampling_params={"n": 1}) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_logprobs_num": [1]}, "top_logprobs_num has 1 values for 2 prompts"),
        ({"rid": ["a"] * 3}, "rid has 3 values for 2 prompts"),
        ({"token_ids_logprob": [[1]]}, "token_ids_logprob has 1 values"),
        ({"sampling_params": []}, "sampling_params has 0 values"),
        ({"sampling_params": [{}, 5]}, "sampling_params: expected an object, got 5"),
        ({"sampling_params": "x"}, "sampling_params: expected an object"),
        ({"sampling_params": {"is_normalized": True}}, "sampling_params.is_normalized"),
        ({"lora_id": "x"}, "lora_id"),
        ({"http_worker_ipc": "ipc:///tmp/x"}, "http_worker_ipc"),
    ],
)
def test_a_batch_is_refused_that_sglang_would_misread(fields: dict[str, Any], words: str) -> None:
    for prompts in ({"text": ["a", "b"]}, {"text": None, "input_ids": [[1], [2]]}):
        (reason,) = incoming(**prompts, **fields)
        assert reason.startswith(words)


@pytest.mark.parametrize(
    ("value", "refused"),
    [(None, 0), (object(), 0), ([None, object()], 0), ({}, 1), ([{}], 1), ([], 1), (5, 1), ("", 1)],
)
def test_tensors_for_positions_do_not_come_from_json(value: object, refused: int) -> None:
    assert len(incoming(text="a", positional_embed_overrides=value)) == refused


def test_lists_of_a_single_prompt_are_no_batch() -> None:
    assert incoming(text=None, input_ids=[1, 2, 3], token_ids_logprob=[1]) == []
    assert incoming(text="a", rid="b", token_ids_logprob=[1, 2]) == []


@pytest.mark.parametrize(("asked", "is_openai", "reasons"), [(20, 1, 0), (21, 1, 1), (21, 0, 0)])
def test_openai_routes_give_twenty_logprobs_a_token(
    asked: int, is_openai: int, reasons: int
) -> None:
    assert len(incoming(is_openai=bool(is_openai), text="a", top_logprobs_num=asked)) == reasons


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b"[" * MAX_NESTING + b"]" * MAX_NESTING, None),
        (b"[" * (MAX_NESTING + 1), "nested"),
        (b'{"a": "' + b"[" * 1000 + b'"}', None),
        (b'{"a": "\\"' + b"[" * 1000 + b'"}', None),
        (b"[" + b"[]," * 1000 + b"1]", None),
        (rb'{"a": "\ud83d b"}', "surrogate"),
        (rb'{"a\uDC00": 1}', "surrogate"),
        (rb'["\ud83d\ude00", "\ud83d"]', "surrogate"),
        (b'{"a": "\xed\xa0\xbd b"}', "UTF-8"),
        ('{"a": "b"}'.encode("utf-16"), "UTF-8"),
        ('{"a": "b"}'.encode("utf-16-le"), "UTF-8"),
        (rb'{"a": "\ud83d\ude00"}', None),
        (rb'{"a": "\\ud83d"}', None),
        (rb'{"a": "\ud83d', None),
        ('{"a": "😀"}'.encode(), None),
        (b"\xff", "UTF-8"),
        (b"", None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_body_is_refused_that_cannot_be_read(body: bytes, word: str | None) -> None:
    reason = reason_against_body(body)
    assert (word in reason) if word and reason else reason is word


def test_brackets_of_a_large_body_are_counted_in_time() -> None:
    body = json.dumps({"input_ids": [[1, 2, 3]] * 50_000, "text": "[" * 10**6}).encode()
    assert len(body) < MAX_BODY_BYTES
    assert reason_against_body(body) is None


@pytest.mark.parametrize(
    "model",
    [
        *("majority@8", "adaptive@40?confidence=0.9", "majorty@8", "nothing@8", "Majority@8"),
        *("majority @8", "openai/majority@8", "early-stop@3", "majority@", "majority@two"),
        *(
            "majority",
            "Majority",
            "majorty",
            "majority:8",
            "short",
            "openai/short",
            "budget?tokens=9",
        ),
    ],
)
def test_a_vote_is_sent_to_the_proxy(model: str) -> None:
    (reason,) = reasons_against_model_name(model, "org/Qwen3-8B")
    assert reason.startswith(f"model {model!r} is a vote")
    assert "lim proxy" in reason
    assert reason.endswith("or name the model of this server, org/Qwen3-8B")
    assert reasons_against_model_name(model) != []


def test_the_server_and_the_proxy_know_the_same_programs() -> None:
    assert set(PROGRAM_NAMES) == set(PROGRAMS)


@pytest.mark.parametrize(
    "model",
    [
        *("default", "Qwen/Qwen3-8B", "me@home", "org/x@v2", "claude-sonnet@20240620", None, 7),
        *("gpt-4", "qwn3", "base:adapter", "shortener", "", "@", "a" * 10**6),
    ],
)
def test_any_other_name_of_a_model_is_served(model: object) -> None:
    assert reasons_against_model_name(model) == []


@pytest.mark.parametrize("model", ["majority@8", "/models/short", "me/budget-8b"])
def test_a_model_that_is_called_like_a_vote_is_served(model: str) -> None:
    assert reasons_against_model_name(model, model) == []
    assert reasons_against_model_name(model.rpartition("/")[2], model) == []
