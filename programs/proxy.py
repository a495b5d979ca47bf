"""An HTTP server that answers OpenAI's chat completions by a vote: routes and errors in words."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from lim_sglang.errors import ConfigError, LimError
from lim_sglang.programs.catalogue import PROGRAMS
from lim_sglang.programs.desk import BusyError, ClosedError, PendingVote, VoteQueue
from lim_sglang.programs.hanging_up import ClientDisconnectedError, Released, cancel_on_disconnect
from lim_sglang.programs.openai_answers import DONE, Answer, event
from lim_sglang.programs.openai_shapes import default_samples, error_body, read_request
from lim_sglang.programs.records import Sampling
from lim_sglang.programs.sampling import check_thinking_budget
from lim_sglang.programs.upstream import Upstream

HEARTBEAT_S = 2.0
"""A sign of life in a stream while samples are drawn, so that no client's time-out fires."""
RETRY_AFTER_S = 5
"""What a client that was turned away is told to wait."""
CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; nginx writes this number into its log."""
MOST = {name: program.most for name, program in PROGRAMS.items()}
"""Samples that each program draws, where it has a limit."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proxy:
    """What the routes need."""

    queue: VoteQueue
    upstream: Upstream
    sampling: Sampling
    """What a request does not say."""
    api_key: str | None = None
    thinking_budget: int | None = None
    """Tokens after which the endpoint closes thoughts."""

    async def check_key(self, request: Request) -> None:
        """Refuse a request without the server's key."""
        sent = request.headers.get("authorization", "")
        if self.api_key and not secrets.compare_digest(
            sent.encode(), f"Bearer {self.api_key}".encode()
        ):
            raise HTTPException(401, "the API key is missing or wrong: send the server's")

    async def models(self, request: Request) -> dict[str, Any]:
        """The programs with their default samples, and what the server lists."""
        now = int(time.time())
        ours = [
            {
                "id": f"{name}@{default_samples(most)}",
                "object": "model",
                "created": now,
                "owned_by": "lim",
            }
            for name, most in MOST.items()
        ]
        return {"object": "list", "data": [*ours, *await self.upstream.models(request)]}

    async def health(self) -> Response:
        """Whether a question could be answered now."""
        return Response(status_code=200 if await self.upstream.is_healthy() else 503)

    async def chat(self, request: Request) -> Response:
        """A vote, or the server's own answer."""
        body = await request.body()
        asked = read_request(_parsed(body), MOST, self.sampling)
        if asked is None:
            return await cancel_on_disconnect(request, self.upstream.forward(request, body))
        check_thinking_budget(self.thinking_budget, asked.sampling.max_tokens)
        if asked.options:
            await asyncio.to_thread(self.queue.check_options, asked)
        pending = self.queue.ask(asked)
        answer = Answer(asked)
        if asked.stream:
            return _stream(answer, pending)
        outcome = asyncio.wrap_future(pending.outcome)
        try:
            await cancel_on_disconnect(request, asyncio.wait({outcome}))
            _check_wanted(pending)
            return JSONResponse(answer.completion(outcome.result()))
        finally:
            pending.cancel()

    async def pass_on(self, request: Request) -> Response:
        """Whatever else OpenAI's API has is the server's matter."""
        body = await request.body()
        return await cancel_on_disconnect(request, self.upstream.forward(request, body))


def create_app(proxy: Proxy) -> FastAPI:
    """The proxy as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.upstream.close()

    app = FastAPI(title="lim proxy", openapi_url=None, lifespan=lifespan)
    keyed = [Depends(proxy.check_key)]
    app.get("/health")(proxy.health)
    app.get("/v1/models", dependencies=keyed)(proxy.models)
    app.post("/v1/chat/completions", dependencies=keyed)(proxy.chat)
    app.api_route("/v1/{path:path}", methods=["GET", "POST"], dependencies=keyed)(proxy.pass_on)
    for kind in (
        LimError,
        httpx.RequestError,
        StarletteHTTPException,
        ClientDisconnectedError,
        Exception,
    ):
        app.add_exception_handler(kind, _refusal)
    return app


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise ConfigError("the body is no JSON") from None


def _stream(answer: Answer, pending: PendingVote) -> Response:
    async def release() -> None:
        pending.cancel()

    return Released(
        _events(answer, pending),
        release=release,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(answer: Answer, pending: PendingVote) -> AsyncIterator[str]:
    """Signs of life until the vote is settled, then the answer. Errors are events by now."""
    yield answer.begin()
    outcome = asyncio.wrap_future(pending.outcome)
    try:
        while not outcome.done():
            await asyncio.wait({outcome}, timeout=HEARTBEAT_S)
            if not outcome.done():
                yield f": {pending.num_ended} of {pending.num_samples} samples have ended\n\n"
        _check_wanted(pending)
        for chunk in answer.chunks(outcome.result()):
            yield chunk
    except Exception as error:
        status, body = _told(error)
        if status == 500:
            logger.exception("a question failed")
        yield event(body)
        yield DONE


def _check_wanted(pending: PendingVote) -> None:
    """Only a proxy that ends gives a question up while its client waits."""
    if pending.is_cancelled:
        raise ClosedError("the proxy is being stopped")


async def _refusal(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    status, body = _told(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
    return JSONResponse(body, status, headers)


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error, as OpenAI's API has them."""
    if isinstance(error, StarletteHTTPException):
        code = "invalid_api_key" if error.status_code == 401 else "invalid_request"
        return error.status_code, error_body(error.detail, "invalid_request_error", code)
    if isinstance(error, ConfigError):
        return 400, error_body(str(error), "invalid_request_error", "invalid_request")
    if isinstance(error, BusyError):
        return 429, error_body(str(error), "rate_limit_error", "rate_limit_exceeded")
    if isinstance(error, ClosedError):
        return 503, error_body(str(error), "server_error", "stopping")
    if isinstance(error, LimError):
        return 502, error_body(str(error), "server_error", "server_failed")
    if isinstance(error, httpx.RequestError):
        words = f"the server behind the proxy cannot be reached ({type(error).__name__})"
        return 502, error_body(words, "server_error", "server_failed")
    return 500, error_body(f"the proxy failed: {error!r}", "server_error", "internal_error")
