"""What the proxy passes on is what the client sent, and what it returns is what the server sent."""

import gzip
import json
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest

from lim_sglang.programs.proxy.upstream import end_to_end
from tests.fakes.http import served
from tests.fakes.sglang_server import Chain
from tests.programs.proxy_harness import QUESTION, Served, proxied, proxy_at

SERVED = ("Qwen/Qwen3-8B", "majority", "early@3")
TEAPOT = b'{"message": "a teapot"}'


@dataclass
class Recorder:
    """A server that notes each request, and gives each the same answer."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b"{}"
    missing: int = 0
    """Bytes of the body that it announces and never sends."""
    requests: list[tuple[str, str, list[tuple[str, str]], bytes]] = field(default_factory=list)
    """Method, target, headers in order and body of each request."""


class _RecordingHandler(BaseHTTPRequestHandler):
    recorder: Recorder
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        recorder = self.recorder
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        recorder.requests.append((self.command, self.path, self.headers.items(), body))
        self.send_response(recorder.status)
        for name, value in recorder.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(recorder.body) + recorder.missing))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(recorder.body)
        self.close_connection = bool(recorder.missing)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def recorded(**answer: Any) -> Iterator[tuple[Recorder, str]]:
    """Run a recording server and a proxy in front of it; yield the proxy's address, too."""
    recorder = Recorder(**answer)
    handler = type("Handler", (_RecordingHandler,), {"recorder": recorder})
    with served(handler) as url, proxy_at(url) as proxy:
        yield recorder, proxy.url


def send(url: str, request: bytes) -> bytes:
    """Send bytes to the proxy and return the answer, until the connection ends."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as peer:
        peer.sendall(request)
        return b"".join(iter(lambda: peer.recv(65536), b""))


def header_values(answer: bytes, name: str) -> list[str]:
    """Return the values of one header of an answer."""
    lines = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return [value for key, value in (line.split(": ", 1) for line in lines) if key.lower() == name]


def test_headers_of_one_connection_are_not_passed_on() -> None:
    headers = [
        (b"Connection", b"close, X-Mine"),
        (b"x-mine", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"TE", b"trailers"),
        (b"Trailer", b"x"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"Proxy-Authorization", b"x"),
        (b"Proxy-Connection", b"close"),
        (b"X-Two", b"1"),
        (b"x-two", b"2"),
    ]
    assert end_to_end(headers) == [(b"x-two", b"1"), (b"x-two", b"2")]


def test_the_server_sees_what_the_client_sent() -> None:
    head = (
        "POST /v1/completions?a=%2F&b=x%20y HTTP/1.1\r\nHost: proxy\r\nX-Two: 1\r\nX-Two: 2\r\n"
        "Connection: close, X-Mine\r\nX-Mine: 1\r\nTE: trailers\r\nCookie: c=\xe4\r\n"
        "Content-Type: text/plain\r\nContent-Length: 9\r\n\r\n"
    )
    with recorded() as (recorder, url):
        send(url, head.encode("latin-1") + b'{"a": 1} ')
    [(method, target, headers, body)] = recorder.requests
    assert (method, target, body) == ("POST", "/v1/completions?a=%2F&b=x%20y", b'{"a": 1} ')
    assert sorted((name.lower(), value) for name, value in headers if name != "Host") == [
        ("content-length", "9"),
        ("content-type", "text/plain"),
        ("cookie", "c=\xe4"),
        ("x-two", "1"),
        ("x-two", "2"),
    ]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_methods_are_kept(method: str) -> None:
    with recorded(status=418, body=TEAPOT) as (recorder, url):
        answer = httpx.request(method, f"{url}/v1/x//y/../z%2F?q")
    assert [request[:2] for request in recorder.requests] == [(method, "/v1/x//z%2F?q")]
    assert (answer.status_code, answer.headers["content-length"]) == (418, str(len(TEAPOT)))
    assert answer.content == (b"" if method == "HEAD" else TEAPOT)


def test_a_path_does_not_leave_v1() -> None:
    with recorded() as (recorder, url):
        send(url, b"GET /v1/../flush_cache HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert [request[1] for request in recorder.requests] == ["/v1/../flush_cache"]


def test_the_client_sees_what_the_server_sent() -> None:
    packed = gzip.compress(b"{}" * 1000)
    sent = (("Content-Encoding", "gzip"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))
    hop = (("Keep-Alive", "timeout=5"), ("Connection", "x-mine"), ("X-Mine", "1"))
    with recorded(headers=(*sent, *hop), body=packed) as (recorder, url):
        request = b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = send(url, request)
        send(url, request)
    assert answer.endswith(packed)
    assert header_values(answer, "set-cookie") == ["a=1", "b=2"]
    assert [len(header_values(answer, name)) for name in ("date", "server")] == [1, 1]
    assert header_values(answer, "server")[0].startswith("BaseHTTP")
    assert not header_values(answer, "x-mine") + header_values(answer, "keep-alive")
    assert [request[2] for request in recorder.requests] == [
        [("Host", recorder_host(recorder))]
    ] * 2


def recorder_host(recorder: Recorder) -> str:
    """Return the server's own name, which takes the place of the proxy's."""
    return dict(recorder.requests[0][2])["Host"]


def test_an_answer_that_breaks_off_is_no_complete_answer(caplog: pytest.LogCaptureFixture) -> None:
    with recorded(missing=9) as (_, url):
        answer = send(url, b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert header_values(answer, "content-length") == ["11"]
    assert answer.endswith(b"\r\n\r\n{}")
    assert "the server broke an answer off" in caplog.text
    assert "Traceback" not in caplog.text


PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def test_a_page_may_ask_the_proxy() -> None:
    with proxied(lambda _: Chain(("\\boxed{1}",)), api_key="s3cret") as (fake, proxy):
        url = f"{proxy.url}/v1/chat/completions"
        allowed = httpx.options(url, headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        origin, key = {"Origin": "https://page.example"}, {"Authorization": "bearer s3cret"}
        for status, body, sent in (
            (401, {}, origin),
            (400, {"model": "majority@x"}, origin | key),
            (200, {"model": "majority@1", "messages": QUESTION}, origin | key),
            (200, {"model": "majority@1", "messages": QUESTION, "stream": True}, origin | key),
            (200, {"model": "default", "messages": QUESTION}, origin | key),
        ):
            answer = httpx.post(url, json=body, headers=sent)
            assert answer.status_code == status
            for answered in (answer, allowed):
                assert answered.headers["access-control-allow-origin"] == "https://page.example"
                assert answered.headers["access-control-allow-credentials"] == "true"
        assert len(fake.requests) == 3


@pytest.mark.parametrize("route", ["completions", "responses", "embeddings", "score", "tokenize"])
@pytest.mark.parametrize(
    "fields", [{"model": "Majority@3"}, {"model": "majorty@3"}, {"model": "x", "lim": {}}]
)
def test_a_route_without_votes_refuses_them(route: str, fields: dict[str, Any]) -> None:
    with recorded() as (recorder, url):
        answer = httpx.post(f"{url}/v1/{route}", json={**fields, "prompt": "2 + 2?"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "known: single" in error["message"] or "ask POST /v1/chat" in error["message"]
    assert not [request for request in recorder.requests if request[0] == "POST"]


def test_anthropics_route_refuses_votes_in_its_own_shape() -> None:
    with recorded() as (_, url):
        answer = httpx.post(f"{url}/v1/messages?beta=true", json={"model": "majority@3"})
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert "/v1/chat/completions" in body["error"]["message"]


def test_routes_beside_the_api_are_not_passed_on() -> None:
    with recorded() as (recorder, url):
        answer = httpx.post(f"{url}/generate", json={"model": "majority@3"})
    assert answer.status_code == 404
    assert "votes on POST /v1/chat/completions" in answer.json()["error"]["message"]
    assert not recorder.requests


def test_a_key_may_hold_any_bytes() -> None:
    with proxied(lambda _: Chain(()), models=SERVED) as (_, proxy):
        answer = httpx.get(f"{proxy.url}/v1/models", headers=[(b"Authorization", b"\xff")])
    assert answer.status_code == 200
    names = [card["id"] for card in answer.json()["data"]]
    assert names[: len(SERVED)] == [*SERVED]  # before the votes: many clients take the first name
    assert "majority@8" in names


def test_an_id_that_the_server_lists_stays_the_servers() -> None:
    with proxied(lambda _: Chain(("\\boxed{1}",)), models=SERVED) as (fake, proxy):
        for model in SERVED:
            assert not hasattr(proxy.ask(model), "lim")
        assert proxy.ask("majority@1").lim["answer"] == "1"
        assert proxy.ask("openai/majority", extra_body={"lim": {"samples": 1}}).lim
        assert fake.paths.count("/v1/models") == 1


@pytest.mark.parametrize(
    "name",
    [
        "majority@8",
        "openai/Majority@3",
        "early-stop",
        "adaptive@8%3Fconfidence%3D0.9",
        "adaptive@8?confidence=0.9",
        *SERVED,
    ],
)
def test_a_model_is_found_by_its_id(name: str) -> None:
    with proxied(lambda _: Chain(()), models=SERVED) as (_, proxy):
        answer = httpx.get(f"{proxy.url}/v1/models/{name}")
    assert answer.status_code == 200
    assert answer.json()["id"] == name.replace("%3F", "?").replace("%3D", "=")
    assert answer.json()["object"] == "model"


@pytest.mark.parametrize("route", ["chat/completions", "completions", "embeddings"])
def test_a_model_that_nobody_lists_is_not_found_and_known_ones_cost_no_question(route: str) -> None:
    def ask(model: str) -> httpx.Response:
        body = {"model": model, "messages": QUESTION, "input": "x"}
        return httpx.post(f"{proxy.url}/v1/{route}", json=body)

    with proxied(lambda _: Chain(("1",)), models=SERVED) as (fake, proxy):
        asked = [ask(name) for name in ("nonsense", "gpt-4", "Qwen/Qwen3-8", "")]
        num_lists = fake.paths.count("/v1/models")
        for name in ("default", *SERVED[:1], "Qwen/Qwen3-8B:my-adapter"):
            assert "does not exist" not in ask(name).text
        assert fake.paths.count("/v1/models") == num_lists == len(asked)
        fake.models += ("new-adapter",)
        assert "does not exist" not in ask("new-adapter").text
    for answer in asked:
        error = answer.json()["error"]
        found = (answer.status_code, error["type"], error["param"], error["code"])
        assert found == (404, "invalid_request_error", "model", "model_not_found")
        assert all(name in error["message"] for name in ("majority@8", "adaptive@40", *SERVED))


@pytest.mark.parametrize(
    ("served", "name", "is_found"),
    [
        ("/cache/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", True),
        ("/cache/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "other/SmolLM2-135M-Instruct", False),
        ("/cache/SmolLM2-135M-Instruct", "SmolLM2-135M", False),
    ],
)
def test_a_model_is_known_by_the_last_part_of_its_id_or_folder(
    served: str, name: str, is_found: bool
) -> None:
    body = {"model": name, "messages": QUESTION}
    with proxied(lambda _: Chain(("1",)), models=(served,)) as (_, proxy):
        asked = httpx.post(f"{proxy.url}/v1/chat/completions", json=body)
        card = httpx.get(f"{proxy.url}/v1/models/{name}")
    assert [asked.status_code, card.status_code] == [200 if is_found else 404] * 2
    assert not is_found or card.json()["id"] == served


def test_a_server_without_a_list_and_anthropics_route_take_any_model() -> None:
    with proxied(lambda _: Chain(("1",))) as (_, proxy):
        assert proxy.ask("gpt-4").choices[0].message.content == "1"
    with proxied(lambda _: Chain(("1",)), models=SERVED) as (fake, proxy):
        httpx.post(f"{proxy.url}/v1/messages", json={"model": "claude"})
        assert fake.paths == ["/v1/messages"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_the_chat_route_refuses_other_methods_as_the_proxy_refuses_all_else(method: str) -> None:
    with recorded() as (recorder, url):
        answer = httpx.request(method, f"{url}/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "send POST" in answer.json()["error"]["message"]
    assert not recorder.requests


@pytest.mark.parametrize(
    "name", ["nobody", "majority@0", "majorty@8", "adaptive@8?x=1", "single@3", "a/b"]
)
def test_a_model_that_does_not_exist_is_not_found(name: str) -> None:
    with proxied(lambda _: Chain(()), models=SERVED) as (_, proxy):
        answer = httpx.get(f"{proxy.url}/v1/models/{name}")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


ODD: list[Any] = [None, True, -1, 0, 1, 10**9, 2**63, 10**400, 1e308, float("nan"), float("inf")]
ODD += ["", "x", "a\ud83d b", "\x00", [], [[]], {}, {"x": 1}, [None], [QUESTION[0]] * 2]
FIELDS = ["model", "messages", "lim", "stream", "stream_options", "max_tokens", "temperature"]
FIELDS += ["top_p", "top_k", "seed", "n", "stop", "logprobs", "tools", "response_format", "x"]
NESTED = ["program", "samples", "parallel", "options", "template"]
BODIES = [b"", b"[]", b"null", b"{", b"\xff\xfe", b'"\xff"', b"[" * 100_000, b"\xef\xbb\xbf{}"]
BODIES += [b"NaN", b"9" * 5000, b'{"model":"majority@3","model":1}', b"[" * 900 + b"]" * 900]
ROUTES = ["chat/completions", "completions", "messages", "responses", "embeddings", "models/x"]


def mutated(chance: random.Random) -> bytes:
    """Return a vote with one to three fields replaced, or its bytes damaged."""
    body: dict[str, Any] = {"model": "majority@2", "messages": QUESTION, "lim": {"samples": 2}}
    for _ in range(chance.randint(1, 3)):
        where = chance.choice([body, body, cast("dict[str, Any]", body["lim"] or {})])
        names = FIELDS if where is body else NESTED
        if isinstance(where, dict):
            where[chance.choice(names)] = chance.choice(ODD)
        body.setdefault("lim", None)
    content = bytearray(json.dumps(body).encode())
    if chance.random() < 0.3:
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def test_no_body_ends_the_proxy_or_is_its_own_failure() -> None:
    chance = random.Random(7)
    bodies = [*BODIES, *(mutated(chance) for _ in range(300))]
    with proxied(lambda _: Chain(("\\boxed{1}",))) as (_, proxy), httpx.Client(timeout=20) as http:
        statuses = [post(http, proxy, body, chance.choice(ROUTES)) for body in bodies]
        assert proxy.ask("majority@2").lim["answer"] == "1"
    assert set(statuses) <= {200, 400, 404}
    assert {200, 400} <= set(statuses)


def post(http: httpx.Client, proxy: Served, body: bytes, route: str) -> int:
    """Send a body and return the status of the answer."""
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"{proxy.url}/v1/{route}", content=body, headers=headers)
    assert "Traceback" not in answer.text
    return answer.status_code
