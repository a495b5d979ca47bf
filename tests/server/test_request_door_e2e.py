"""Requests from public bug reports and made-up ones, on a real server: it answers all of them.

`url` is a server or a proxy in front of it; both have to survive the same requests.
"""

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from lim_sglang.launch.server import free_port
from lim_sglang.request_checks import MAX_SAMPLES
from tests.fakes.sglang_server import eventually
from tests.processes import ROOT, LocalServer, clean_environment, end_tree
from tests.server.tiny_model import MAX_LENGTH, VOCAB_SIZE

pytestmark = pytest.mark.e2e

FUZZED = (
    *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/tokenize", "/abort_request", "/v1/models", "/v1/models/{model}", "/server_info"),
)
"""Routes that clients use."""
EXCLUDED = {
    "/pause_generation": "stops all requests until /continue_generation",
    "/release_memory_occupation": "frees the weights and the KV cache",
    "/update_weights_from_disk": "replaces the model",
    "/update_weights_from_tensor": "replaces the model, by a pickle",
    "/update_weights_from_distributed": "replaces the model",
    "/update_weights_from_ipc": "replaces the model",
    "/set_internal_state": "changes the scheduler's options",
    "/slow_down": "makes each step wait",
    "/configure_logging": "writes requests to a folder of the server",
}
"""Routes of an administrator that stop or change a server by design, for which see limits.md."""

MOST_TOKENS = 3
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
TIMEOUT_S = 120.0
NAN, INFINITY = float("nan"), float("inf")
MESSAGES = [{"role": "user", "content": "w5 w6"}]
NATIVE = {"text": "w5 w6 w7", "sampling_params": {"max_new_tokens": MOST_TOKENS}}
CHAT = {"model": "m", "messages": MESSAGES, "max_tokens": MOST_TOKENS}
COMPLETION = {"model": "m", "prompt": "w5 w6", "max_tokens": MOST_TOKENS}
RESPONSE = {"model": "m", "input": "w5 w6", "max_output_tokens": MOST_TOKENS}
ROUTES: Mapping[str, Mapping[str, Any]] = {
    "/generate": NATIVE,
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/messages": CHAT,
}


@pytest.fixture
def url(tiny_server: LocalServer) -> str:
    """Return the address of the session's server."""
    return tiny_server.url


@pytest.fixture(scope="module")
def proxy_url(tiny_server: LocalServer) -> Iterator[str]:
    """Return the address of a proxy in front of the session's server."""
    port = free_port()
    command = ("proxy", "--url", tiny_server.url, "--port", str(port))
    proxy = subprocess.Popen(
        [sys.executable, "-m", "lim_sglang", *command],
        env=clean_environment({}),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    found = f"http://127.0.0.1:{port}"
    try:
        assert eventually(lambda: answers(found), 120)
        yield found
    finally:
        end_tree(proxy)


def answers(url: str) -> bool:
    """Return True if a server lists its models."""
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).is_success
    except httpx.HTTPError:
        return False


def post(url: str, path: str, body: Any) -> httpx.Response:
    """Send bytes as they are, anything else as JSON with Python's NaN and Infinity."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}{path}", content=content, headers=headers, timeout=TIMEOUT_S)


def assert_alive(url: str) -> None:
    """Check that a server still generates."""
    sampling = {**NATIVE["sampling_params"], "ignore_eos": True}
    answer = post(url, "/generate", {**NATIVE, "sampling_params": sampling})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["output_ids"]) == MOST_TOKENS


def native(**sampling: Any) -> tuple[str, dict[str, Any]]:
    """Return a request of `/generate` with these sampling parameters."""
    given = {"max_new_tokens": MOST_TOKENS, **sampling}
    return "/generate", {**NATIVE, "sampling_params": given}


REFUSED: Mapping[str, tuple[str, Any]] = {
    "logprobs of chat": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}),
    "logprobs of completions": ("/v1/completions", {**COMPLETION, "logprobs": 100_000}),
    "logprobs": ("/generate", {**NATIVE, "return_logprob": True, "top_logprobs_num": 513}),
    "ids": ("/generate", {"input_ids": [10_000_000]}),
    "negative ids": ("/generate", {"input_ids": [5, -1]}),
    "ids in a batch": ("/generate", {"input_ids": [[5], [VOCAB_SIZE]]}),
    "huge ids": ("/generate", {"input_ids": [2**63]}),
    "no ids": ("/generate", {"input_ids": [[5], []]}),
    "ids of completions": ("/v1/completions", {**COMPLETION, "prompt": [VOCAB_SIZE]}),
    "lists of ids": ("/v1/completions", {**COMPLETION, "prompt": [[5], [-1]]}),
    "stop ids": native(stop_token_ids=[100_000_000], min_new_tokens=2),
    "stop ids of chat": ("/v1/chat/completions", {**CHAT, "stop_token_ids": [-1], "min_tokens": 2}),
    "too short a list": (
        "/generate",
        {"text": ["w5", "w6"], "return_logprob": True, "top_logprobs_num": [1]},
    ),
    "images for a model of text": ("/generate", {**NATIVE, "image_data": "AAAA"}),
    "an internal field": ("/generate", {**NATIVE, "http_worker_ipc": "ipc:///tmp/none"}),
    "a schema without end": native(json_schema='{"$ref": "#"}'),
    "a schema without end in chat": (
        "/v1/chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"$ref": "#"}},
            },
        },
    ),
    "a stop pattern that does not compile": native(stop_regex="(?<=a+)b"),
    "half of a pair": ("/v1/chat/completions", rb'{"messages": "a\ud83d b"}'),
    "half of a pair in a stop": ("/generate", rb'{"text": "a", "sampling_params": "\ud83d"}'),
    "brackets": ("/v1/completions", b"[" * 100_000),
}
"""Requests that ended SGLang 0.5.16, hung it, or gave a 500."""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_served_is_a_400_and_ends_nothing(
    url: str, case: str, stream: bool
) -> None:
    path, body = REFUSED[case]
    if not isinstance(body, bytes):
        body = {**body, "stream": stream}
    answer = post(url, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() >= {"param", "code"}
    assert_alive(url)


VALUES = (-1, 0, 1, 1.5, 10**9, 2**63, 10**30, NAN, INFINITY, -INFINITY, "x", None, [], [1], {})
SAMPLING_BOUNDS = {
    "max_new_tokens": MAX_LENGTH,
    "temperature": 2,
    "top_p": 1,
    "top_k": 2**30,
    "min_p": 1,
    "frequency_penalty": 2,
    "presence_penalty": 2,
    "repetition_penalty": 2,
    "min_new_tokens": MOST_TOKENS,
    "n": MAX_SAMPLES,
    "stream_interval": 2**31 - 1,
    "sampling_seed": 2**63 - 1,
    "stop_token_ids": VOCAB_SIZE,
    "logit_bias": 100,
}
"""Fields of sampling parameters that hold numbers, with the largest number served."""
NATIVE_BOUNDS = {
    "top_logprobs_num": VOCAB_SIZE,
    "logprob_start_len": 3,
    "token_ids_logprob": VOCAB_SIZE,
    "input_ids": VOCAB_SIZE,
    "priority": 2**63,
    "routed_dp_rank": 0,
    "bootstrap_room": 2**63,
}
OPENAI_BOUNDS = {
    **{k: v for k, v in SAMPLING_BOUNDS.items() if k not in ("max_new_tokens", "n")},
    **dict.fromkeys(TOKEN_FIELDS, MAX_LENGTH),
    **{"n": 128, "top_logprobs": 20, "logprobs": 20, "min_tokens": MOST_TOKENS, "seed": 2**63 - 1},
}


def numeric_requests(values: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each numeric field of each route above its bound and at these values."""
    for field, bound in SAMPLING_BOUNDS.items():
        for value in (*values, bound + 1):
            yield native(**{field: value})
    for field, bound in NATIVE_BOUNDS.items():
        for value in (*values, bound, bound + 1):
            body = {**NATIVE, "return_logprob": True, field: value}
            if field == "input_ids":
                del body["text"]
            yield "/generate", body
    for path, base in ROUTES.items():
        if path != "/generate":
            for field, bound in OPENAI_BOUNDS.items():
                for value in (*values, bound + 1):
                    yield path, {**base, field: value}


@pytest.mark.parametrize(
    "values", [(-1, NAN, "x"), pytest.param(VALUES, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_number_out_of_bounds_is_no_more_than_a_400(url: str, values: Sequence[Any]) -> None:
    cases = [case for case in numeric_requests(values) if not is_long(case[1])]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: post(url, *case).status_code, cases))
    bad = [(*case, code) for case, code in zip(cases, found, strict=True) if code not in (200, 400)]
    assert not bad
    assert found.count(400) > len(cases) // 4
    assert_alive(url)


def is_long(body: Mapping[str, Any]) -> bool:
    """Return True if a request gets the longest answer that the model can give.

    `/v1/responses` cuts a larger number down to that.
    """
    asked = (body.get("sampling_params") or {}).get("max_new_tokens", MOST_TOKENS)
    most = body.get("max_output_tokens", MOST_TOKENS)
    is_cut = isinstance(most, int | float) and most > MOST_TOKENS
    return asked is None or is_cut or any(body.get(name, 1) is None for name in TOKEN_FIELDS)


@pytest.mark.parametrize("field", ["top_logprobs_num", "token_ids_logprob"])
def test_the_last_token_of_the_vocabulary_is_served(url: str, field: str) -> None:
    value = VOCAB_SIZE if field == "top_logprobs_num" else [VOCAB_SIZE - 1]
    body = {"input_ids": [VOCAB_SIZE - 1], "return_logprob": True, field: value}
    answer = post(url, "/generate", {**body, "sampling_params": {"max_new_tokens": 2}})
    assert answer.status_code == 200, answer.text


def fuzz(
    url: str, schema_url: str, number: int, paths: tuple[str, ...], vote: str | None = None
) -> Counter[str]:
    """Send about `number` requests made from a server's OpenAPI document; count them by status.

    Each route gets the same number, but one without inputs a single request.

    Args:
        vote: the model that every second request names which names any; None: all as they are made.
    """
    document = httpx.get(f"{schema_url}/openapi.json", timeout=TIMEOUT_S).json()
    document["paths"]["/tokenize"] = document["paths"]["/v1/tokenize"]  # its name outside of it
    schema: Any = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [each for each in operations if each.path in paths]
    assert {each.path for each in operations} == set(paths)
    statuses: Counter[str] = Counter()
    votes = itertools.cycle([vote, None])
    with requests.Session() as session:
        for operation in operations:
            strategy = st.one_of(*map(operation.as_strategy, GenerationMode))

            @settings(
                max_examples=-(-number // len(operations)),
                phases=[Phase.generate],
                database=None,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def send(case: Any) -> None:
                case.body = shortened(case.body)
                if isinstance(case.body, dict) and "model" in case.body and (model := next(votes)):
                    case.body["model"] = model
                reply = case.call(base_url=url, session=session, timeout=TIMEOUT_S)
                statuses[f"{case.method} {case.operation.path} {reply.status_code}"] += 1
                assert reply.status_code < 500, f"{case.as_curl_command()}\n{reply.text}"

            send()
    return statuses


def shortened(body: Any) -> Any:
    """Return a body that asks for a few tokens only, where it asks for any that are served."""
    if not isinstance(body, dict):
        return body
    body = {**body, "n": 2} if isinstance(body.get("n"), int) and body["n"] > 2 else body
    for name in TOKEN_FIELDS:
        if isinstance(body.get(name, MAX_LENGTH), int | None):
            body = {**body, name: MOST_TOKENS}
    sampling = body.get("sampling_params")
    if isinstance(sampling, dict | None):
        body = {**body, "sampling_params": {**(sampling or {}), "max_new_tokens": MOST_TOKENS}}
    return body


@pytest.mark.slow
@pytest.mark.parametrize("target", ["url", "proxy_url"])
def test_thousands_of_requests_get_no_5xx(
    target: str, url: str, request: pytest.FixtureRequest
) -> None:
    proxied = tuple(path for path in FUZZED if path.startswith("/v1/"))
    number, paths, vote = (2500, FUZZED, None) if target == "url" else (1500, proxied, "majority@2")
    statuses = fuzz(request.getfixturevalue(target), url, number, paths, vote)
    print(json.dumps(statuses, indent=1))  # noqa: T201
    assert statuses.total() >= 0.8 * number
    assert_alive(url)


def test_excluded_routes_are_the_servers_and_documented(url: str) -> None:
    text = (ROOT / "docs" / "limits.md").read_text()
    assert not [path for path in EXCLUDED if f"`{path}`" not in text]
    paths = httpx.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()["paths"]
    assert set(EXCLUDED) <= set(paths)
