"""The HTTP client against a server on this machine: each failure in words, none without an end."""

import asyncio
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from lim_sglang.errors import ConfigError
from lim_sglang.programs import http_client as client_module
from lim_sglang.programs.http_client import (
    INFO_TIMEOUT_S,
    Backoff,
    Client,
    RequestError,
    RequestTimeoutError,
    Retries,
    retry_after_s,
    root_url,
)
from tests.fakes.http import JsonHandler, served


class Handler(JsonHandler):
    """Answers by path; `/status/N` with status N and the body that was sent."""

    protocol_version = "HTTP/1.1"
    num_waiting = threading.Semaphore(0)
    """Released by each request for `/slow`."""
    gone = threading.Event()
    """Set when the client of `/slow` has disconnected."""

    def answer(self, body: Any) -> None:
        match self.path.split("/")[1:]:
            case ["model_info"]:
                self.send_json(200, {"model_path": "m"})
            case ["key"]:
                right = self.headers["Authorization"] == "Bearer secret"
                self.send_json(200 if right else 401, {})
            case ["text"]:
                self.send_body(200, b"<html>hello</html>")
            case ["binary"]:
                self.send_body(500, b"\xff\xfe\xfa")
            case ["gzip"]:
                self.send_body(200, b"no gzip", ("Content-Encoding", "gzip"))
            case ["lost"]:
                self.send_body(200, b'{"a":', ("Content-Length", "100"))
                self.close_connection = True
            case ["silent"]:
                self.close_connection = True
            case ["slow"]:
                self.num_waiting.release()
                self.rfile.read(1)
                self.gone.set()
            case ["status", status]:
                self.send_json(int(status), body)
            case _:
                self.send_json(404, {"detail": "Not Found"})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Handler) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as opened:
        yield opened


def wait_for_slow_requests(count: int) -> None:
    """Wait until this number of requests for `/slow` has come."""
    for _ in range(count):
        assert Handler.num_waiting.acquire(timeout=5)


def error_of(client: Client, method: str, path: str, body: Any = None, timeout_s: float = 5) -> Any:
    """Return the error of one request."""
    with pytest.raises(RequestError) as caught:
        client.start(client.fetch(method, path, body, timeout_s=timeout_s)).result(timeout=10)
    return caught.value


def test_an_answer_is_read_as_json(client: Client) -> None:
    assert client.get("/model_info") == {"model_path": "m"}
    assert client.post("/status/200", {"a": [1, "é"]}) == {"a": [1, "é"]}


def test_the_api_key_is_sent_and_its_refusal_says_what_to_give(url: str) -> None:
    with Client(url, api_key="secret") as client:
        assert client.get("/key") == {}
    with Client(url, api_key="wrong") as client:
        error = error_of(client, "GET", "/key")
    assert "refuses the API key (HTTP 401)" in str(error)
    assert "wrong" not in str(error)
    assert not error.retryable


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "secret "])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(url: str, key: str) -> None:
    with pytest.raises(ConfigError, match="API key") as caught:
        Client(url, api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body", "message", "retryable"),
    [
        ("/status/400", {"error": {"message": "too long"}}, "HTTP 400: too long", False),
        (
            "/status/400",
            {"object": "error", "message": "no model"},
            "HTTP 400: no model",
            False,
        ),
        ("/status/422", {"detail": [{"loc": ["top_p"]}]}, "HTTP 422: [{'loc': ['top_p']}]", False),
        ("/status/403", {}, "refuses the API key (HTTP 403)", False),
        ("/status/408", {}, "HTTP 408", False),
        ("/status/404", {}, "has no /status/404: is it an SGLang server?", False),
        ("/status/429", {"error": "queue is full"}, "HTTP 429: queue is full", True),
        ("/status/500", {"error": {"code": 500}}, "HTTP 500: {'error': {'code': 500}}", True),
        ("/status/503", ["busy"], "HTTP 503: ['busy']", True),
        ("/text", None, "something other than JSON: '<html>hello</html>'", False),
        ("/binary", None, "HTTP 500", True),
        ("/gzip", None, "was lost (DecodingError)", True),
        ("/lost", None, "was lost (RemoteProtocolError)", True),
        ("/silent", None, "was lost (RemoteProtocolError)", True),
    ],
)
def test_a_failure_says_why_and_whether_to_try_again(
    client: Client, path: str, body: Any, message: str, retryable: bool
) -> None:
    error = error_of(client, "POST", path, body)
    assert message in str(error)
    assert error.retryable is retryable
    assert client.get("/model_info")


def test_without_a_server_the_error_says_how_to_start_one() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Client(f"127.0.0.1:{unused.getsockname()[1]}") as client:
            error = error_of(client, "GET", "/model_info")
    assert "start one with `lim serve`" in str(error)
    assert "LessIsMore is live" in str(error)
    assert error.retryable
    brief = client_module.without_advice(str(error))
    assert re.fullmatch(r"no server answers at http://127.0.0.1:\d+", brief)


def test_a_name_that_is_not_known_is_told_apart_from_a_server_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with Client("http://no-such-host.invalid:9") as client:
        error = error_of(client, "GET", "/model_info")
    assert "at http://no-such-host.invalid:9, whose name is not known here (Name or" in str(error)
    assert "check the name after --url" in str(error)
    assert "lim serve" not in str(error)


def test_a_port_where_no_server_speaks_http_has_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            peer.recv(1000)
            peer.sendall(b"SSH-2.0-OpenSSH\r\n")
            peer.close()

        threading.Thread(target=answer, daemon=True).start()
        with Client(f"127.0.0.1:{listener.getsockname()[1]}") as client:
            error = error_of(client, "GET", "/model_info")
    assert "(RemoteProtocolError): it has ended, or speaks no HTTP: see its log" in str(error)
    assert client_module.without_advice(str(error)).endswith("was lost (RemoteProtocolError)")


def test_https_is_said_to_be_the_wrong_scheme_of_a_server_without_it(url: str) -> None:
    with Client(url.replace("http:", "https:")) as client:
        error = error_of(client, "GET", "/model_info")
    assert f" does not answer in https: try {url}" in str(error)
    assert not error.retryable


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(0.2, 0.2), (600, INFO_TIMEOUT_S)])
def test_a_limit_of_samples_bounds_what_a_server_answers_at_once(
    timeout_s: float, limit_s: float, url: str
) -> None:
    with Client(url, timeout_s=timeout_s) as client:
        assert client.info_timeout_s == limit_s
        if timeout_s < 1:
            with pytest.raises(RequestTimeoutError, match=r"did not answer within 0\.2 seconds"):
                client.get("/slow")
            wait_for_slow_requests(1)


def test_a_request_out_of_time_is_an_error_of_its_own_and_disconnects(client: Client) -> None:
    Handler.gone.clear()
    error = error_of(client, "GET", "/slow", timeout_s=0.2)
    assert isinstance(error, RequestTimeoutError)
    assert "did not answer within 0.2 seconds" in str(error)
    assert not error.retryable
    wait_for_slow_requests(1)
    assert Handler.gone.wait(5)


def test_closing_cancels_requests_in_flight_and_refuses_new_ones(url: str) -> None:
    client = Client(url)
    running = [client.start(client.fetch("GET", "/slow", timeout_s=60)) for _ in range(20)]
    wait_for_slow_requests(20)
    began = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - began < 2
    for future in running:
        with pytest.raises(CancelledError):
            future.result(timeout=1)
    with pytest.raises(RequestError, match="is closed"):
        client.get("/model_info")


def test_closing_gives_a_cancelled_request_time_to_abort(url: str) -> None:
    answers: list[Any] = []

    async def ask_and_abort(client: Client) -> None:
        try:
            await client.fetch("GET", "/slow", timeout_s=60)
        finally:
            answers.append(await client.fetch("GET", "/model_info", timeout_s=5))

    with Client(url) as client:
        client.start(ask_and_abort(client))
        wait_for_slow_requests(1)
    assert answers == [{"model_path": "m"}]


def test_an_abort_without_an_end_is_cut_short(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CLOSE_TIMEOUT_S", 0.2)
    started = threading.Event()

    async def never_end() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(60)

    with Client(url) as client:
        future = client.start(never_end())
        assert started.wait(5)
    with pytest.raises(CancelledError):
        future.result(timeout=1)


@pytest.mark.parametrize("closed", [True, False])
def test_a_request_that_is_cancelled_while_it_connects_is_cancelled_or_out_of_time(
    monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    connecting = threading.Event()

    async def connect(*_: object, **__: object) -> None:
        connecting.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("second argument (exceptions) must be non-empty") from None  # as anyio

    client = Client("http://127.0.0.1:9")
    monkeypatch.setattr(client.http, "request", connect)
    future = client.start(client.fetch("GET", "/slow", timeout_s=60 if closed else 0.05))
    if closed:
        assert connecting.wait(5)
        client.close()
    with pytest.raises(CancelledError if closed else RequestTimeoutError):
        future.result(timeout=2)
    client.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:30000", "http://localhost:30000"),
        ("http://127.0.0.1:30000/", "http://127.0.0.1:30000"),
        ("https://example.org/prefix//", "https://example.org/prefix"),
        ("[::1]:30000", "http://[::1]:30000"),
        ("HTTP://Host", "HTTP://Host"),
        ("http://host:1/v1", "http://host:1"),
        ("http://host:1/v1/", "http://host:1"),
        ("http://host:1/v1/chat/completions/", "http://host:1"),
        ("http://host:1/prefix/v1/models", "http://host:1/prefix"),
    ],
)
def test_an_address_is_completed_and_needs_no_version(url: str, expected: str) -> None:
    assert root_url(url) == expected
    Client(url).close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        ":30000",
        "ftp://host",
        "http://host:0",
        "http://host:99999",
        "http://[::1",
        "http://ho st",
        "http://host\n",
    ],
)
def test_an_impossible_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write one like http://127\.0\.0\.1:30000"):
        Client(url)


def test_no_http_proxy_is_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for address in (url, url.replace("127.0.0.1", "localhost")):
        with Client(address) as client:
            assert client.get("/model_info")


BACKOFF = Backoff(tries=6, first_s=1.0, most_s=8.0, total_s=60.0)


def pauses(
    backoff: Backoff, *, retry_after: float = 0.0, try_s: float = 0.0, seed: int = 0
) -> list[float]:
    """Return the pauses of a request that fails again and again, each try taking `try_s`."""
    now_s = [1000.0]
    found: list[float] = []
    retries = Retries(backoff, clock=lambda: now_s[0], uniform=random.Random(seed).uniform)
    while (pause_s := retries.pause_s(retry_after)) is not None:
        found.append(pause_s)
        now_s[0] += pause_s + try_s
    return found


def test_pauses_are_random_below_a_limit_that_doubles() -> None:
    all_pauses = [pauses(BACKOFF, seed=seed) for seed in range(500)]
    assert {len(each) for each in all_pauses} == {5}
    for number, limit_s in enumerate((1.0, 2.0, 4.0, 8.0, 8.0)):
        ordered = sorted(each[number] for each in all_pauses)
        assert 0.0 <= ordered[0] < 0.02 * limit_s
        assert 0.98 * limit_s < ordered[-1] <= limit_s
        assert ordered[250] == pytest.approx(limit_s / 2, rel=0.15)


def test_no_try_comes_before_the_server_wants_one() -> None:
    found = [each for seed in range(100) for each in pauses(BACKOFF, retry_after=5.0, seed=seed)]
    assert min(found) >= 5.0
    assert len({round(pause, 3) for pause in found}) > 400  # and not all at the same moment


@pytest.mark.parametrize("try_s", [0.0, 7.0, 20.0])
def test_no_try_begins_later_than_the_bound_after_the_first_failure(try_s: float) -> None:
    patient = Backoff(tries=10**6, first_s=1.0, most_s=8.0, total_s=60.0)
    for seed in range(50):
        found = pauses(patient, try_s=try_s, seed=seed)
        last_begins_s = sum(found) + try_s * (len(found) - 1)
        assert 60.0 - 8.0 - try_s <= last_begins_s <= 60.0


@pytest.mark.parametrize(("wish_s", "num_pauses"), [(51.0, 1), (60.1, 0), (3600.0, 0)])
def test_a_server_that_wants_more_time_than_there_is_is_not_asked_again(
    wish_s: float, num_pauses: int
) -> None:
    assert len(pauses(BACKOFF, retry_after=wish_s)) == num_pauses


@pytest.mark.parametrize(
    ("header", "expected_s"),
    [(None, 0), ("7", 7), ("0", 0), ("-3", 0), ("1.5", 0), ("soon", 0), ("", 0), ("3600", 3600)],
)
def test_a_wish_in_seconds_is_read(header: str | None, expected_s: float) -> None:
    headers = {} if header is None else {"Retry-After": header}
    assert retry_after_s(httpx.Response(429, headers=headers)) == expected_s


def test_a_wish_may_be_a_date() -> None:
    dates = [formatdate(time.time() + in_s, usegmt=True) for in_s in (30, -30)]
    found = [retry_after_s(httpx.Response(503, headers={"Retry-After": date})) for date in dates]
    assert found == [pytest.approx(29, abs=2), 0]
