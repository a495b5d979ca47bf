"""The server behind the proxy: requests passed on as they came, and the models that it lists."""

import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lim_sglang.programs.http_client import open_http, root_url

INFO_TIMEOUT_S = 5.0
"""Limit of the proxy's own questions, for which a client waits."""
SERVED_FOR_S = 10.0
"""Time for which the list of the server's models is believed."""
DEFAULT_MODEL = "default"
"""The name of its model that SGLang takes for a request without a name."""
HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding"))
HOP_BY_HOP |= {b"upgrade"}
"""Headers of one connection (RFC 9110, 7.6.1), beside `Proxy-*` and those that Connection names."""

Header = tuple[bytes, bytes]
logger = logging.getLogger(__name__)


class ClosingStream(StreamingResponse):
    """A stream that closes its source when it ends in any way, even before its first piece.

    Starlette cancels a stream when its client disconnects.
    """

    def __init__(
        self, content: AsyncIterable[Any], *, close: Callable[[], Awaitable[None]], **options: Any
    ) -> None:
        super().__init__(content, **options)
        self._close = close

    async def __call__(self, *asgi: Any) -> None:
        """Answer as an ASGI application; a source that breaks off cuts the connection, too."""
        try:
            await super().__call__(*asgi)
        except httpx.RequestError as error:
            logger.warning("the server broke an answer off (%s)", type(error).__name__)
        finally:
            await self._close()


def is_name(name: str, model: str) -> bool:
    """Return True if a name is a model's id, the id without its owner, or either for a folder that
    is called like the model: `Qwen3-8B` and `Qwen/Qwen3-8B` for `/models/Qwen3-8B`.
    """
    *owner, last = name.split("/")
    is_short = not owner or (model.startswith("/") and len(owner) == 1)
    return name == model or (is_short and bool(last) and last == model.rpartition("/")[2])


class Upstream:
    """The server behind the proxy, which gets the requests that are no votes.

    It belongs to one event loop.
    """

    def __init__(self, url: str) -> None:
        """Prepare the connection; raises `ServerError` if `url` is no HTTP address."""
        self._http = open_http(root_url(url))
        # A cookie for one client must not be sent for another.
        self._http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.served: frozenset[str] = frozenset()
        """Ids of the server's models when the list was last read; empty if it lists none."""
        self._served_until_s = 0.0

    async def forward(
        self,
        request: Request,
        content: bytes,
        on_end: Callable[[bool], object] = lambda _: None,
        on_piece: Callable[[], object] = lambda: None,
    ) -> Response:
        """Pass a request on, API key included, and return the answer as it comes.

        The answer is returned with its first piece, so that a server that dies before is an error
        and no broken stream.

        Args:
            on_end: called when the returned answer has ended in any way; True: the server failed,
                by a status above 499 or by breaking the answer off.
            on_piece: called with each piece of the answer.

        Raises:
            httpx.RequestError: the server cannot be reached, or died before it answered.
        """
        answer = await self.send(request, content)
        pieces = answer.aiter_raw()
        try:
            first = await anext(pieces, b"")
        except BaseException:
            await answer.aclose()
            raise
        on_piece()
        has_failed = answer.status_code >= 500

        async def whole() -> AsyncIterator[bytes]:
            nonlocal has_failed
            yield first
            try:
                async for piece in pieces:
                    on_piece()
                    yield piece
            except httpx.RequestError:
                has_failed = True
                raise

        async def close() -> None:
            try:
                await answer.aclose()
            finally:
                on_end(has_failed)

        response = ClosingStream(whole(), close=close, status_code=answer.status_code)
        # The proxy has a date, and a `Vary: Origin` with its CORS headers, of its own.
        headers = without(end_to_end(answer.headers.raw), b"date")
        response.raw_headers = [
            header for header in headers if (header[0], header[1].lower()) != (b"vary", b"origin")
        ]
        return response

    async def send(self, request: Request, content: bytes) -> httpx.Response:
        """Send a request on and return the answer, whose body is not read yet.

        The server gets target, headers and body as the client sent them, but for Host and the
        headers of one connection; nothing is added.

        Raises:
            httpx.RequestError: the server cannot be reached.
        """
        base = self._http.base_url
        target = base.raw_path.rstrip(b"/") + request.scope["raw_path"]
        if query := request.scope["query_string"]:
            target += b"?" + query
        # Not by the client's `build_request`, which adds headers of its own.
        forwarded = httpx.Request(
            request.method,
            base,
            headers=without(end_to_end(request.headers.raw), b"host"),
            content=content,
            extensions={"target": target, "timeout": self._http.timeout.as_dict()},
        )
        return await self._http.send(forwarded, stream=True)

    async def cards(self, request: Request) -> list[dict[str, Any]]:
        """Return the server's models as the server lists them, none if it lists none.

        Args:
            request: the client's request, whose API key is sent.

        Raises:
            httpx.RequestError: the server cannot be reached.
        """
        key = [header for header in request.headers.raw if header[0] == b"authorization"]
        answer = await self._http.get("/v1/models", headers=key, timeout=INFO_TIMEOUT_S)
        try:
            cards = answer.raise_for_status().json()["data"]
            return [card for card in cards if isinstance(card["id"], str)]
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            return []

    async def serves(self, model: str, request: Request) -> bool:
        """Return True if a model string is the id of one of the server's models."""
        if time.monotonic() > self._served_until_s:
            await self._renew(request)
        return model in self.served

    async def lacks(self, model: str, request: Request) -> bool:
        """Return True if the server lists its models, and a model string names none of them.

        The list is read anew for an unknown name only: adapters come and go.
        """
        if self._knows(model):
            return False
        is_renewed = await self._renew(request)
        return is_renewed and bool(self.served) and not self._knows(model)

    def _knows(self, model: str) -> bool:
        """Return True for an id, SGLang's `id:adapter`, the last part of an id or of a folder, and
        the name of a request without model.
        """
        bare = model.partition(":")[0]
        return model in (DEFAULT_MODEL, *self.served) or any(
            is_name(bare, each) for each in self.served
        )

    async def _renew(self, request: Request) -> bool:
        """Read the list of the server's models; return False if the server does not answer."""
        self._served_until_s = time.monotonic() + SERVED_FOR_S
        try:
            self.served = frozenset(card["id"] for card in await self.cards(request))
        except httpx.RequestError:
            return False
        return True

    async def is_healthy(self) -> bool:
        """Return True if the server says that it is healthy."""
        try:
            answer = await self._http.get("/health", timeout=INFO_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.is_success

    async def close(self) -> None:
        """Close all connections, also of requests that are being passed on."""
        await self._http.aclose()


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """Return the headers that are not those of one connection, in order, names in lower case."""
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        word.strip().lower()
        for name, value in lower
        if name == b"connection"
        for word in value.split(b",")
    }
    return [
        (name, value)
        for name, value in lower
        if name not in HOP_BY_HOP and name not in named and not name.startswith(b"proxy-")
    ]


def without(headers: Iterable[Header], unwanted: bytes) -> list[Header]:
    """Return the headers but those of one name."""
    return [(name, value) for name, value in headers if name != unwanted]
