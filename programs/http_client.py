"""JSON over HTTP for any number of threads: one event loop, errors in words, pauses of retries."""

import asyncio
import ipaddress
import random
import re
import socket
import ssl
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

from lim_sglang.errors import ConfigError, ServerError

CONNECT_TIMEOUT_S = 10.0
MAX_IDLE_CONNECTIONS = 8
"""Most idle connections: httpx scans all of them at each request."""
MAX_IDLE_S = 2.0
"""Age of an idle connection that is used again: SGLang closes one after 5 s, as httpx would, and a
request on a connection that is being closed is lost."""
INFO_TIMEOUT_S = 60.0
"""Limit of a request that a server answers at once, unless it is busy with a long step."""
CLOSE_TIMEOUT_S = 5.0
_PLAIN_HTTP = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
)
"""OpenSSL's reasons where a server answers in plain HTTP."""
_ROUTE = re.compile(r"(?<=/v1)/(chat/completions|completions|models)$")
"""A route of OpenAI's API that was copied into an address."""
START_ONE = (
    "start one with `lim serve` (one that is starting answers once it says `LessIsMore is live`), "
    "or name a running one with --url"
)
GIVE_KEY = "give the key that the server was started with by --api-key or LIM_API_KEY"
CHECK_NAME = "check the name after --url"
CHECK_SERVER = "it has ended, or speaks no HTTP: see its log, or name another server with --url"
RAISE_TIMEOUT = "raise --timeout"

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def without_advice(error: str) -> str:
    """Return an error without what to do about it, for a list of many that may be alike."""
    for advice in (START_ONE, GIVE_KEY, CHECK_NAME, CHECK_SERVER, RAISE_TIMEOUT):
        error = error.removesuffix(f": {advice}")
    return error


class RequestError(ServerError):
    """A failed request."""

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        retry_after_s: float = 0.0,
        response: httpx.Response | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        """True if the same request may well succeed a little later."""
        self.retry_after_s = retry_after_s
        """Pause that the server asks for before the next try."""
        self.response = response
        """The server's answer with its status above 399; None if the server gave none."""


class RequestTimeoutError(RequestError):
    """A request that the server took and did not answer in time."""


class RejectedError(RequestError):
    """A request for which nothing was generated: no server was reached, or it refused."""


class UnreachableError(RejectedError):
    """A request to an address where nothing answers."""


@dataclass(frozen=True)
class Backoff:
    """Limits of the tries of a request and of the pauses between them."""

    tries: int = 4
    first_s: float = 1.0
    """Upper limit of the first pause; it doubles with each further pause."""
    most_s: float = 8.0
    """Upper limit of every pause, apart from the time that the server itself asks for."""
    total_s: float = 60.0
    """Time after the first failure within which the last try begins."""


class Retries:
    """The pauses between the tries of one request: exponential, with full jitter.

    Full jitter: clients that failed together do not come back together (Brooker, AWS, 2015).
    """

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
        """Return the seconds to wait after a failure, None to give up.

        Args:
            retry_after_s: pause that the server asks for. No try begins earlier, and none at all
                if that would be after the deadline.
        """
        now_s = self._clock()
        if not self._num_failures:
            self._deadline_s = now_s + self._backoff.total_s
        limit_s = min(self._backoff.first_s * 2**self._num_failures, self._backoff.most_s)
        self._num_failures += 1
        pause_s = retry_after_s + self._uniform(0.0, limit_s)
        in_time = now_s + pause_s <= self._deadline_s
        return pause_s if in_time and self._num_failures < self._backoff.tries else None


def open_http(url: str, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    """Return an HTTP client of one server, without a limit of the time or of the connections."""
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(
            max_connections=None,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=MAX_IDLE_S,
        ),
        # No HTTP proxy can reach this machine's own loopback address.
        trust_env=not is_loopback(url),
    )


class Client:
    """JSON requests to one server, run on a thread of its own.

    Any request can be given a time limit or be cancelled, and `close` ends all of them.
    """

    @staticmethod
    def address(url: str) -> str:
        """Return the address to which the paths of requests are added."""
        return root_url(url)

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = INFO_TIMEOUT_S
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            timeout_s: limit of a request that a server answers at once, `INFO_TIMEOUT_S` at most.

        Raises:
            ConfigError: `url` is no HTTP address, or no HTTP header can hold the key.
        """
        self.url = self.address(url)
        self.info_timeout_s = min(timeout_s, INFO_TIMEOUT_S)
        if api_key and not _fits_header(api_key):
            raise ConfigError(
                "the API key holds a line break, a space at an end or a character that is not "
                "ASCII: give it as the server has it"
            )
        self.http = open_http(self.url, {"Authorization": f"Bearer {api_key}"} if api_key else None)
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="lim-client", daemon=True
        )
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the client's thread; cancelling the future cancels the coroutine.

        Raises:
            RequestError: the client is closed.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RequestError(f"the connection to {self.url} is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def get(self, path: str) -> Any:
        """Return the JSON that the server has under a path; raises `RequestError`."""
        return self.start(self.fetch("GET", path, timeout_s=self.info_timeout_s)).result()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that the server answers to a body; raises `RequestError`."""
        return self.start(self.fetch("POST", path, body, timeout_s=self.info_timeout_s)).result()

    async def fetch(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Any:
        """Send a request and return its answer as JSON; raises `RequestError`."""
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
        """Send a request and return its answer.

        Raises:
            RequestError: unreachable, connection lost, out of time, or a status above 399.
        """
        async with self._translate_failures(path, timeout_s):
            response = await self.http.request(method, path, json=body)
        self._check_status(response, path)
        return response

    async def lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> AsyncGenerator[str]:
        """Send a request and yield its answer line by line; the time limit is for all of it.

        Raises:
            RequestError: unreachable, connection lost, out of time, or a status above 399.
        """
        async with (
            self._translate_failures(path, timeout_s),
            self.http.stream(method, path, json=body) as response,
        ):
            if response.status_code >= 400:
                await response.aread()
            self._check_status(response, path)
            # Split at line feeds only: httpx also splits at characters that JSON may hold
            # unescaped, such as U+2028.
            rest = b""
            async for content in response.aiter_bytes():
                *complete, rest = (rest + content).split(b"\n")
                for line in complete:
                    yield line.decode(errors="replace").rstrip("\r")
            if rest:
                yield rest.decode(errors="replace")

    @asynccontextmanager
    async def _translate_failures(self, path: str, timeout_s: float) -> AsyncIterator[None]:
        """Limit the time of a request, and raise its failures as `RequestError`."""
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    yield
                except ValueError:
                    # anyio may raise an empty group of exceptions if cancelled while connecting.
                    task = asyncio.current_task()
                    if task and task.cancelling():
                        raise asyncio.CancelledError from None
                    raise
        except TimeoutError:
            raise RequestTimeoutError(
                f"{self.url}{path} did not answer within {timeout_s:g} "
                f"second{'' if timeout_s == 1 else 's'}"
            ) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if unknown := _cause(error, socket.gaierror):
                raise UnreachableError(
                    f"no server answers at {self.url}, whose name is not known here "
                    f"({unknown.strerror}): {CHECK_NAME}",
                    retryable=True,
                ) from None
            if untrusted := _cause(error, ssl.SSLCertVerificationError):
                raise RejectedError(
                    f"the certificate of {self.url} is not trusted ({untrusted.verify_message})"
                ) from None
            if (failed := _cause(error, ssl.SSLError)) and failed.reason in _PLAIN_HTTP:
                plain = self.url.replace("https:", "http:", 1)
                raise RejectedError(
                    f"the server at {self.url} does not answer in https: try {plain}"
                ) from None
            raise UnreachableError(
                f"no server answers at {self.url}: {START_ONE}",
                retryable=True,
            ) from None
        except httpx.RequestError as error:
            raise RequestError(
                f"the connection to {self.url} was lost ({type(error).__name__}): {CHECK_SERVER}",
                retryable=True,
            ) from None

    def _check_status(self, response: httpx.Response, path: str) -> None:
        status = response.status_code
        if status < 400:
            return
        if status in (401, 403):
            raise RejectedError(
                f"{self.url} refuses the API key (HTTP {status}): {GIVE_KEY}",
                response=response,
            )
        if status == 404:
            raise RejectedError(
                f"{self.url} has no {path}: is it an SGLang server?", response=response
            )
        # SGLang also answers 5xx in the midst of a generation.
        kind = RejectedError if status < 500 else RequestError
        pause_s = retry_after_s(response)
        wish = f" (it asks for a pause of {pause_s:,.0f} s)" if pause_s else ""
        raise kind(
            f"{self.url} answered HTTP {status}: {reason_of(response)}{wish}",
            retryable=status == 429 or status >= 500,
            retry_after_s=pause_s,
            response=response,
        )

    def close(self) -> None:
        """Cancel all requests, give them time to abort at the server, and end the thread."""
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
            # A task that was cancelled before is already telling the server to abort.
            if not task.cancelling():
                task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            # A second cancellation ends the aborts themselves, so that `close` always returns.
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=CLOSE_TIMEOUT_S)
        await self.http.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cause(error: BaseException, kind: type[E]) -> E | None:
    """Return the error of some kind from which an error came; None if there is none."""
    causes = [error]
    for each in causes:
        if isinstance(each, kind):
            return each
        further = (each.__cause__, each.__context__)  # which may lead in a circle
        causes += [other for other in further if other and other not in causes]
    return None


def awaited(client: Client) -> str:
    """Return the words for the wait for a client's server."""
    return f"{client.url} has not answered yet; waiting {client.info_timeout_s:g} s at most"


def normalise_url(url: str) -> str:
    """Return an address with a scheme, without a final slash, and without a route after /v1.

    Raises:
        ConfigError: `url` is no HTTP address.
    """
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
        raise ConfigError(
            f"{url!r} is no server address: write one like http://127.0.0.1:30000 after --url"
        )
    return _ROUTE.sub("", full.rstrip("/"))


def root_url(url: str) -> str:
    """Return an SGLang server's address, without the /v1 that clients of OpenAI's API add.

    Raises:
        ConfigError: `url` is no HTTP address.
    """
    return normalise_url(url).removesuffix("/v1")


def is_loopback(url: str) -> bool:
    """Return True if an address names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable() and text == text.strip()


def retry_after_s(response: httpx.Response) -> float:
    """Return the pause that a server asks for before the next try, 0 if it asks for none.

    The header holds seconds or the date of the next try (RFC 9110, 10.2.3).
    """
    text = response.headers.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def reason_of(response: httpx.Response) -> str:
    """Return the reason that a failed answer gives; SGLang's routes write it in three shapes."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:200] or response.reason_phrase
    if isinstance(body, dict):
        error = body.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        return str(inner or body.get("message") or body.get("detail") or body)
    return str(body)
