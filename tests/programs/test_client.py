"""The HTTP client against a real server on this machine: each failure in words, none for ever."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lim_sglang.errors import ServerError
from lim_sglang.programs import http_client as client_module
from lim_sglang.programs.http_client import (
    Client,
    RequestError,
    RequestTimeoutError,
    check_server,
    normalise_url,
)


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `/status/N` with status N and the body that was sent."""

    protocol_version = "HTTP/1.1"
    gone = threading.Event()
    """Set when the other side of `/slow` has hung up."""

    def do_GET(self) -> None:
        match self.path.split("/")[1:]:
            case ["model_info"]:
                self.reply(200, b'{"model_path": "m"}')
            case ["key"]:
                right = self.headers["Authorization"] == "Bearer secret"
                self.reply(200 if right else 401, b"{}")
            case ["text"]:
                self.reply(200, b"<html>hello</html>")
            case ["binary"]:
                self.reply(500, b"\xff\xfe\xfa")
            case ["gzip"]:
                self.reply(200, b"no gzip", ("Content-Encoding", "gzip"))
            case ["lost"]:
                self.reply(200, b'{"a":', ("Content-Length", "100"))
                self.close_connection = True
            case ["silent"]:
                self.close_connection = True
            case ["slow"]:
                self.rfile.read(1)
                self.gone.set()
            case _:
                self.reply(404, b'{"detail": "Not Found"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = int(self.path.split("/")[-1])
        self.reply(status, body)

    def reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in dict([("Content-Length", str(len(body))), *headers]).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as opened:
        yield opened


def fails(client: Client, method: str, path: str, body: Any = None, timeout_s: float = 5) -> Any:
    """The `RequestError` of one request."""
    with pytest.raises(RequestError) as caught:
        client.start(client.fetch(method, path, body, timeout_s=timeout_s)).result(timeout=10)
    return caught.value


def test_an_answer_is_read_as_json(client: Client) -> None:
    assert client.get("/model_info") == {"model_path": "m"}
    echo = client.start(client.fetch("POST", "/status/200", {"a": [1, "é"]}, timeout_s=5))
    assert echo.result() == {"a": [1, "é"]}


def test_a_server_that_answers_is_fine_and_another_says_what_it_is(url: str) -> None:
    check_server(url)
    with pytest.raises(ServerError, match="is it a SGLang server"):
        check_server(f"{url}/elsewhere")


def test_the_api_key_is_sent_and_its_refusal_says_what_to_give(url: str) -> None:
    with Client(url, api_key="secret") as client:
        assert client.get("/key") == {}
    with Client(url, api_key="wrong") as client:
        error = fails(client, "GET", "/key")
    assert "refuses the API key (HTTP 401)" in str(error)
    assert "wrong" not in str(error)
    assert not error.retryable


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "secret "])
def test_a_key_that_no_header_can_hold_is_refused_unseen(url: str, key: str) -> None:
    with pytest.raises(ServerError, match="API key") as caught:
        Client(url, api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "message", "retryable"),
    [
        (400, {"error": {"message": "too long"}}, "HTTP 400: too long", False),
        (400, {"object": "error", "message": "no such model"}, "HTTP 400: no such model", False),
        (422, {"detail": [{"loc": ["top_p"]}]}, "HTTP 422: [{'loc': ['top_p']}]", False),
        (403, {}, "refuses the API key (HTTP 403)", False),
        (404, {}, "has no /status/404: is it a SGLang server?", False),
        (408, {}, "HTTP 408", False),
        (429, {"error": "queue is full"}, "HTTP 429: queue is full", True),
        (500, {"error": {"code": 500}}, "HTTP 500: {'error': {'code': 500}}", True),
        (503, ["busy"], "HTTP 503: ['busy']", True),
    ],
)
def test_a_status_says_why_and_whether_to_try_again(
    client: Client, status: int, body: Any, message: str, retryable: bool
) -> None:
    error = fails(client, "POST", f"/status/{status}", body)
    assert message in str(error)
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("path", "message", "retryable"),
    [
        ("/text", "something other than JSON: '<html>hello</html>'", False),
        ("/binary", "HTTP 500", True),
        ("/gzip", "was lost (DecodingError)", True),
        ("/lost", "was lost (RemoteProtocolError)", True),
        ("/silent", "was lost (RemoteProtocolError)", True),
        ("/nowhere", "has no /nowhere", False),
    ],
)
def test_a_broken_answer_is_an_error_in_words(
    client: Client, path: str, message: str, retryable: bool
) -> None:
    error = fails(client, "GET", path)
    assert message in str(error)
    assert error.retryable is retryable
    assert client.get("/model_info")


def test_where_nothing_listens_the_error_says_how_to_start_a_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with Client(f"127.0.0.1:{port}") as client:
            error = fails(client, "GET", "/model_info")
    assert "start one with `lim serve`" in str(error)
    assert error.retryable


def test_a_request_out_of_time_is_an_error_of_its_own_and_hangs_up(client: Client) -> None:
    Handler.gone.clear()
    error = fails(client, "GET", "/slow", timeout_s=0.2)
    assert isinstance(error, RequestTimeoutError)
    assert "did not answer within 0.2 seconds" in str(error)
    assert not error.retryable
    assert Handler.gone.wait(5)


def test_cancelling_a_future_hangs_up(client: Client) -> None:
    Handler.gone.clear()
    future = client.start(client.fetch("GET", "/slow", timeout_s=60))
    time.sleep(0.1)
    assert future.cancel()
    assert Handler.gone.wait(5)


def test_closing_cancels_what_runs_and_refuses_what_comes(url: str) -> None:
    client = Client(url)
    running = [client.start(client.fetch("GET", "/slow", timeout_s=60)) for _ in range(20)]
    time.sleep(0.1)
    began = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - began < 2
    for future in running:
        with pytest.raises(CancelledError):
            future.result(timeout=1)
    with pytest.raises(RequestError, match="is closed"):
        client.get("/model_info")


def test_closing_lets_a_task_say_goodbye(url: str) -> None:
    said: list[Any] = []

    async def ask_and_say_goodbye(client: Client) -> None:
        try:
            await client.fetch("GET", "/slow", timeout_s=60)
        finally:
            said.append(await client.fetch("GET", "/model_info", timeout_s=5))

    with Client(url) as client:
        client.start(ask_and_say_goodbye(client))
        time.sleep(0.1)
    assert said == [{"model_path": "m"}]


def test_a_goodbye_without_end_is_cut_short(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CLOSE_TIMEOUT_S", 0.2)

    async def never_end() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(60)

    with Client(url) as client:
        future = client.start(never_end())
        time.sleep(0.1)
    with pytest.raises(CancelledError):
        future.result(timeout=1)


def test_threads_share_one_client(client: Client) -> None:
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.get("/model_info")))
        for _ in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [{"model_path": "m"}] * 32


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:30000", "http://localhost:30000"),
        ("http://127.0.0.1:30000/", "http://127.0.0.1:30000"),
        ("https://example.org/prefix//", "https://example.org/prefix"),
        ("[::1]:30000", "http://[::1]:30000"),
        ("HTTP://Host", "HTTP://Host"),
    ],
)
def test_an_address_is_completed(url: str, expected: str) -> None:
    assert normalise_url(url) == expected
    Client(url).close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        ":30000",
        "/model",
        "ftp://host",
        "http://host:0",
        "http://host:99999",
        "http://host:port",
        "http://[::1",
        "http://ho st",
        "http://host\n",
        "http://\x00:1",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ServerError, match=r"write one like http://127\.0\.0\.1:30000"):
        Client(url)


def test_no_proxy_stands_before_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    check_server(url)
    check_server(url.replace("127.0.0.1", "localhost"))
