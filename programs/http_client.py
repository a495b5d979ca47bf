"""A SGLang server over HTTP, for any number of threads: one event loop, failures in words, retries
with pauses.
"""

import asyncio
import ipaddress
import random
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from lim_sglang.errors import ServerError


@dataclass(frozen=True)
class Backoff:
    """How often and for how long."""

    tries: int = 4
    first_s: float = 1.0
    """Limit of the first pause; doubled with each further one."""
    most_s: float = 8.0
    """Limit of every pause, but for what the server itself asks for."""
    total_s: float = 60.0
    """No try begins later than this after the first failure."""


class Retries:
    """The pauses between the tries of one request."""

    def __init__(
        self,
        backoff: Backoff,
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._backoff = backoff
        self._clock = clock
        self._uniform = uniform
        self._num_failures = 0
        self._deadline_s = 0.0

    def pause_s(self, retry_after_s: float = 0.0) -> float | None:
        """Seconds to wait after a failure; None to give up.

        Args:
            retry_after_s: the server wants no other try before. Never is one sent before, and
                none at all where that would be too late.
        """
        now_s = self._clock()
        if not self._num_failures:
            self._deadline_s = now_s + self._backoff.total_s
        limit_s = min(self._backoff.first_s * 2**self._num_failures, self._backoff.most_s)
        self._num_failures += 1
        pause_s = retry_after_s + self._uniform(0.0, limit_s)
        in_time = now_s + pause_s <= self._deadline_s
        return pause_s if in_time and self._num_failures < self._backoff.tries else None


CONNECT_TIMEOUT_S = 10.0
MAX_KEPT = 8
"""Idle connections that are kept. For each one the pool looks at all others, at each request."""
INFO_TIMEOUT_S = 60.0
"""For what the server answers at once, unless it is busy with a long step."""
CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")


class RequestError(ServerError):
    """One request failed."""

    def __init__(
        self, message: str, *, retryable: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        """Whether the same request may well succeed a little later."""
        self.retry_after_s = retry_after_s
        """The server wants no other try before."""


class RequestTimeoutError(RequestError):
    """The server took the request and did not answer in time."""


class TurnedAwayError(RequestError):
    """Nothing was generated: no server was reached, or it did not take the request."""


class Client:
    """JSON requests to one server. Coroutines run on a thread of their own, so any of them can be
    given a time limit or be cancelled, and `close` ends all of them.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """Connects to nothing yet.

        Raises:
            ServerError: `url` is no HTTP address, or no HTTP header can hold the key.
        """
        self.url = normalise_url(url)
        if api_key and not _fits_header(api_key):
            raise ServerError(
                "the API key holds a line break, a space at an end or a character that is not "
                "ASCII: give it as the server has it"
            )
        self.http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=MAX_KEPT),
            # No proxy can reach this machine's own loopback address.
            trust_env=not is_loopback(self.url),
        )
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="lim-client", daemon=True
        )
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the client's thread. Cancelling the future cancels it there."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RequestError(f"the connection to {self.url} is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def get(self, path: str) -> Any:
        """The JSON that the server answers under `path`; raises `RequestError`."""
        return self.start(self.fetch("GET", path, timeout_s=INFO_TIMEOUT_S)).result()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that it answers to a body; raises `RequestError`."""
        return self.start(self.fetch("POST", path, body, timeout_s=INFO_TIMEOUT_S)).result()

    async def fetch(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Any:
        """Like `send`, and reads the answer as JSON."""
        response = await self.send(method, path, body, timeout_s=timeout_s)
        try:
            return response.json()
        except ValueError:
            raise RequestError(
                f"{self.url}{path} answered something other than JSON: {response.text[:80]!r}"
            ) from None

    async def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> httpx.Response:
        """One request, one answer.

        Raises:
            RequestError: unreachable, connection lost, out of time, or a status above 399.
        """
        async with self._in_words(path, timeout_s):
            response = await self.http.request(method, path, json=body)
        self._check_status(response, path)
        return response

    async def lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> AsyncGenerator[str]:
        """Like `send`, for an answer that comes line by line; the time limit is of all of it."""
        async with (
            self._in_words(path, timeout_s),
            self.http.stream(method, path, json=body) as response,
        ):
            if response.status_code >= 400:
                await response.aread()
            self._check_status(response, path)
            # Only at line feeds: httpx also breaks lines at characters that JSON may hold as they
            # are, U+2028 among them.
            rest = b""
            async for content in response.aiter_bytes():
                *whole, rest = (rest + content).split(b"\n")
                for line in whole:
                    yield line.decode(errors="replace").rstrip("\r")
            if rest:
                yield rest.decode(errors="replace")

    @asynccontextmanager
    async def _in_words(self, path: str, timeout_s: float) -> AsyncIterator[None]:
        """Limit the time of a request, and say what became of it."""
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    yield
                except ValueError:
                    # anyio, cancelled while it connects, may raise an empty group of failures.
                    task = asyncio.current_task()
                    if task and task.cancelling():
                        raise asyncio.CancelledError from None
                    raise
        except TimeoutError:
            raise RequestTimeoutError(
                f"{self.url}{path} did not answer within {timeout_s:g} seconds"
            ) from None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise TurnedAwayError(
                f"no server answers at {self.url}: start one with `lim serve`, "
                "or name a running one with --url",
                retryable=True,
            ) from None
        except httpx.RequestError as error:
            raise RequestError(
                f"the connection to {self.url} was lost ({type(error).__name__})", retryable=True
            ) from None

    def close(self) -> None:
        """Cancel what is running, let it say goodbye to the server, and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            # A task that was cancelled before is busy with its goodbye.
            if not task.cancelling():
                task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            # Their goodbyes are cut short, so that nobody waits for them for ever.
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=CLOSE_TIMEOUT_S)
        await self.http.aclose()

    def _check_status(self, response: httpx.Response, path: str) -> None:
        status = response.status_code
        if status < 400:
            return
        if status in (401, 403):
            raise TurnedAwayError(
                f"{self.url} refuses the API key (HTTP {status}): give the key that the server "
                "was started with by --api-key or LIM_API_KEY"
            )
        if status == 404:
            raise TurnedAwayError(f"{self.url} has no {path}: is it a SGLang server?")
        # SGLang also answers 5xx in the midst of a generation.
        kind = TurnedAwayError if status < 500 else RequestError
        pause_s = retry_after_s(response)
        wish = f" (it wants no other try for {pause_s:,.0f} s)" if pause_s else ""
        raise kind(
            f"{self.url} answered HTTP {status}: {reason_of(response)}{wish}",
            retryable=status == 429 or status >= 500,
            retry_after_s=pause_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_server(url: str, api_key: str | None = None) -> None:
    """Ask the server for a sign of life; takes no time, unlike the import of the frontend.

    Raises:
        ServerError: nothing answers, the key is wrong, or it is no SGLang server.
    """
    with Client(url, api_key=api_key) as client:
        client.get("/model_info")


def normalise_url(url: str) -> str:
    """`url` with a scheme and without a final slash; raises `ServerError` when it is none."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        valid = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and full.isprintable()
            and " " not in full
        )
    except ValueError:
        valid = False
    if not valid:
        raise ServerError(
            f"{url!r} is no server address: write one like http://127.0.0.1:30000 after --url"
        )
    return full.rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether an address names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable() and text == text.strip()


def retry_after_s(response: httpx.Response) -> float:
    """How long the server wants no other try; 0 where it does not say. It says so in seconds, or
    with the date of the next try (RFC 9110, 10.2.3).
    """
    text = response.headers.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def reason_of(response: httpx.Response) -> str:
    """What the server says went wrong; SGLang's routes say it in three shapes."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:200] or response.reason_phrase
    if isinstance(body, dict):
        error = body.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        return str(inner or body.get("message") or body.get("detail") or body)
    return str(body)
