"""An HTTP server that answers OpenAI's chat completions by a vote: routes, errors, clients that
disconnect.
"""

import asyncio
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lim_sglang.errors import ConfigError, LimError, cut
from lim_sglang.programs.chat import some_names
from lim_sglang.programs.program import PROGRAMS, Outcome, find_program, refuse_failures
from lim_sglang.programs.proxy.protocol import (
    DONE,
    Answer,
    Named,
    NoJsonError,
    anthropic_error_body,
    error_body,
    event,
    parse_body,
    read_model,
    read_request,
    refusal_body,
)
from lim_sglang.programs.proxy.upstream import ClosingStream, Upstream, is_name
from lim_sglang.programs.proxy.vote_queue import (
    PendingVote,
    QueueFullError,
    StoppingError,
    VoteQueue,
)
from lim_sglang.programs.schema import COMPLETED_STATES, Sampling, check_thinking_budget

HEARTBEAT_S = 2.0
"""Pause between two comments in a stream while samples are generated, so that no client's time-out
fires."""
RETRY_AFTER_S = 5
"""Pause that a client is asked for when the queue is full."""
CLIENT_CLOSED_REQUEST = 499
"""Status of an answer that is not read, as in nginx's logs."""
GRACE_S = 2
"""Time for answers that are being written when the proxy is stopped."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Methods of the requests that are passed on."""
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
PROGRAM_SAMPLES = {name: program.samples for name, program in PROGRAMS.items()}
VOTES = [f"{name}@{samples}" for name, samples in PROGRAM_SAMPLES.items()]
"""Model strings of the programs with their default samples."""

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
logger = logging.getLogger(__name__)


class ModelNotFoundError(LimError):
    """A model that is neither a vote nor one of the server's."""


class RefusedVoteError(LimError):
    """A vote whose samples the server refused; the client gets the server's own answer."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"the server answered HTTP {response.status_code} to the samples")
        self.response = response


class ClientDisconnectedError(Exception):
    """An answer that is not needed any more: its client has disconnected."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await some work; cancel it if the client disconnects.

    Raises:
        ClientDisconnectedError: the client has disconnected.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return await working
    finally:
        working.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class Proxy:
    """The routes, and the objects that they need."""

    queue: VoteQueue
    upstream: Upstream
    sampling: Sampling
    """Parameters of requests that name none."""
    api_key: str | None = None
    thinking_budget: int | None = None
    """Tokens after which the backend closes thoughts."""

    def keyed(self, endpoint: Endpoint) -> Endpoint:
        """Return a route that refuses requests without the server's key."""

        async def answer(request: Request) -> Response:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            is_right = secrets.compare_digest(key.encode(), (self.api_key or "").encode())
            if self.api_key and not (scheme.lower() == "bearer" and is_right):
                raise HTTPException(401, "the API key is missing or wrong: send the server's")
            return await endpoint(request)

        return answer

    async def models(self, request: Request) -> Response:
        """List the server's models, then the programs with their default samples: many clients take
        the first name.
        """
        try:
            served = await self.upstream.cards(request)
        except httpx.RequestError:
            served = []
        return json_response({"object": "list", "data": [*served, *map(_program_card, VOTES)]})

    async def model(self, request: Request) -> Response:
        """Describe a vote, or a model of the server, by its id."""
        name = request.path_params["id"]
        lost, served = None, {}
        try:
            served = {card["id"]: card for card in await self.upstream.cards(request)}
        except httpx.RequestError as error:  # a vote can be described all the same
            lost = error
        if name in served:
            return json_response(served[name])
        if query := request.url.query:  # options whose ? the client did not encode
            name = f"{name}?{unquote(query)}"
        try:
            named = read_model(name, PROGRAM_SAMPLES)
            if named and named[0]:
                find_program(named[0]).check(named[2], named[1])
                return json_response(_program_card(name))
        except ConfigError as error:
            raise ModelNotFoundError(str(error)) from None
        if lost:
            raise lost
        for model, card in served.items():
            if is_name(name, model):
                return json_response(card)
        raise _not_found(name, served)

    async def health(self, _: Request) -> Response:
        """Answer 200 if a question could be answered now, else 503."""
        return Response(status_code=200 if await self.upstream.is_healthy() else 503)

    async def chat(self, request: Request) -> Response:
        """Answer with a vote, or with the server's own answer."""
        if request.method != "POST":
            words = f"{CHAT} has no {request.method}: send POST with a chat completion"
            raise HTTPException(405, words, {"Allow": "POST"})
        content = await request.body()
        body = parse_body(content)
        if not isinstance(body, dict):
            raise ConfigError("the body is no JSON object: send a chat completion")
        named = await self._named(request, body.get("model"))
        if named is None and body.get("lim") is None:
            await self._refuse_unknown(request, body.get("model"))
            return await cancel_on_disconnect(request, self.upstream.forward(request, content))
        asked = read_request(body, named, PROGRAM_SAMPLES, self.sampling)
        check_thinking_budget(self.thinking_budget, asked.sampling.max_tokens)
        pending, answer = self.queue.ask(asked), Answer(asked)
        outcome = asyncio.wrap_future(pending.outcome)
        try:
            # A failure before the first heartbeat still has its own status in a stream.
            limit_s = HEARTBEAT_S if asked.stream else None
            await cancel_on_disconnect(request, asyncio.wait({outcome}, timeout=limit_s))
            found = _result(pending, outcome) if outcome.done() else None
            if found and not asked.stream:
                return json_response(answer.completion(found))
        except BaseException:
            pending.cancel()
            raise
        return _stream(answer, pending)

    async def forward(self, request: Request) -> Response:
        """Answer all other routes of OpenAI's API with the server's answer."""
        content = await request.body()
        await self._refuse_vote(request, content)
        return await cancel_on_disconnect(request, self.upstream.forward(request, content))

    async def _refuse_vote(self, request: Request, content: bytes) -> None:
        """Refuse a vote on a route that has none: SGLang answers to any model string.

        Raises:
            ConfigError: the body names a vote, a misspelt one too, or is nested too deeply.
        """
        try:
            body = parse_body(content)
        except NoJsonError:
            return  # a form, a file, nothing
        if not isinstance(body, dict):
            return
        named = await self._named(request, body.get("model"))
        if named or body.get("lim") is not None:
            asked = f"model {cut(repr(body['model']), 200)}" if named else "lim"
            raise ConfigError(
                f"{asked}: {request.url.path} has no votes; ask POST {CHAT} for a vote, "
                "or name the server's model here"
            )
        # Clients of Anthropic's API send the names of its models, whatever the server.
        if not request.url.path.startswith(MESSAGES):
            await self._refuse_unknown(request, body.get("model"))

    async def _refuse_unknown(self, request: Request, model: Any) -> None:
        """Refuse a model that is none of the server's: SGLang answers to any model string.

        Raises:
            ModelNotFoundError: the server lists its models, and this one is not among them.
        """
        if isinstance(model, str) and await self.upstream.lacks(model, request):
            raise _not_found(model, sorted(self.upstream.served))

    async def _named(self, request: Request, model: Any) -> Named | None:
        """Return what a model string names; None for a model of the server, whatever its id.

        Raises:
            ConfigError: the model string is a vote of the wrong form, or a misspelt one.
        """
        try:
            named = read_model(model, PROGRAM_SAMPLES)
        except ConfigError:
            if await self.upstream.serves(model, request):
                return None
            raise
        return None if named and await self.upstream.serves(model, request) else named


def create_app(proxy: Proxy) -> ASGIApp:
    """Return the proxy as an ASGI application, with the CORS headers of SGLang's own server."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await proxy.upstream.close()

    return words_as_answers(
        [
            Route("/health", proxy.health),
            Route("/v1/models", proxy.keyed(proxy.models)),
            Route("/v1/models/{id:path}", proxy.keyed(proxy.model)),
            Route(CHAT, proxy.keyed(proxy.chat), methods=METHODS),
            Route("/v1/{path:path}", proxy.keyed(proxy.forward), methods=METHODS),
            Route("/{path:path}", _refuse_route, methods=METHODS),
        ],
        lifespan,
    )


def words_as_answers(
    routes: Sequence[Route], lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]]
) -> ASGIApp:
    """Return routes as an application that answers errors in words, with SGLang's CORS headers."""
    errors = (LimError, httpx.RequestError, HTTPException, ClientDisconnect)
    app = Starlette(
        routes=routes,
        exception_handlers=dict.fromkeys(
            (*errors, ClientDisconnectedError, Exception), _answer_error
        ),
        lifespan=lifespan,
    )
    # Outside of all else, so that errors have the headers, too.
    return CORSMiddleware(
        app, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )


async def _refuse_route(request: Request) -> Response:
    raise HTTPException(
        404,
        f"the proxy has no {cut(request.url.path, 200)}: it votes on POST {CHAT} and passes the "
        "other routes under /v1 on; ask the server itself for routes of its own",
    )


def json_response(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer of JSON."""
    # Escaped, since texts may hold halves of surrogate pairs, which UTF-8 cannot.
    return Response(json.dumps(content), status, headers, media_type="application/json")


def _not_found(name: str, served: Iterable[str]) -> ModelNotFoundError:
    names = ", ".join([*VOTES, some_names([*served])]).removesuffix(", ")
    return ModelNotFoundError(
        f"the model {cut(repr(name), 200)} does not exist; /v1/models lists {names}; a vote is "
        "PROGRAM@SAMPLES"
    )


def _program_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "lim"}


def _stream(answer: Answer, pending: PendingVote) -> Response:
    async def close() -> None:
        pending.cancel()

    return ClosingStream(
        _events(answer, pending),
        close=close,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(answer: Answer, pending: PendingVote) -> AsyncIterator[str]:
    """Yield heartbeats until the vote is counted, then the answer; errors are events, too."""
    yield answer.begin()
    outcome = asyncio.wrap_future(pending.outcome)
    try:
        while not outcome.done():
            await asyncio.wait({outcome}, timeout=HEARTBEAT_S)
            if not outcome.done():
                yield f": {pending.num_ended} of {pending.num_samples} samples have ended\n\n"
        for chunk in answer.chunks(_result(pending, outcome)):
            yield chunk
    except Exception as error:
        if not isinstance(error, LimError):
            logger.exception("a question failed")
        yield event(_error_event(error))
        yield DONE


def _result(pending: PendingVote, outcome: "asyncio.Future[Outcome]") -> Outcome:
    """Return the outcome of a question that has ended, unless the server failed.

    Raises:
        StoppingError: the question was given up while its client waits.
        RefusedVoteError: the server refused samples, and none was completed.
        ServerError: samples failed in another way, and none was completed.
    """
    if pending.is_cancelled:
        raise StoppingError("the proxy is being stopped")
    found = outcome.result()
    is_answered = any(sample.state in COMPLETED_STATES for sample in found.samples)
    if pending.refusal and not is_answered:
        raise RefusedVoteError(pending.refusal)
    refuse_failures(found)
    return found


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnectedError | ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(error, RefusedVoteError):
        answer = error.response
        kept = {name: answer.headers.get(name) for name in ("content-type", "retry-after")}
        headers = {name: value for name, value in kept.items() if value}
        return Response(answer.content, answer.status_code, headers)
    status, body = _describe_error(error)
    if request.url.path.startswith(MESSAGES):
        body = anthropic_error_body(body["error"]["message"], status)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else {}
    return json_response(body, status, {**headers, **(getattr(error, "headers", None) or {})})


def _error_event(error: Exception) -> dict[str, Any]:
    """Return an error in the midst of a stream."""
    if isinstance(error, RefusedVoteError):
        return refusal_body(error.response)
    return _describe_error(error)[1]


def _describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of an error, as OpenAI's API has them."""
    words, kind = str(error), "invalid_request_error"
    match error:
        case HTTPException():
            code = "invalid_api_key" if error.status_code == 401 else "invalid_request"
            return error.status_code, error_body(error.detail, kind, code)
        case ModelNotFoundError():
            return 404, error_body(words, kind, "model_not_found", param="model")
        case ConfigError():
            return 400, error_body(words, kind, "invalid_request")
        case QueueFullError():
            return 429, error_body(words, "rate_limit_error", "rate_limit_exceeded")
        case StoppingError():
            return 503, error_body(words, "server_error", "stopping")
        case LimError():
            return 502, error_body(words, "server_error", "server_failed")
        case httpx.RequestError():
            words = f"the server behind the proxy cannot be reached ({type(error).__name__})"
            status = 504 if isinstance(error, httpx.TimeoutException) else 502
            return status, error_body(words, "server_error", "server_failed")
    return 500, error_body(f"the proxy failed: {error!r}", "server_error", "internal_error")


class ProxyServer(uvicorn.Server):
    """A server that can be stopped while clients wait for an answer."""

    def __init__(
        self, app: ASGIApp, *, when_ready: Callable[[], None], when_stopped: Callable[[], None]
    ) -> None:
        """Prepare the server; it does not listen yet.

        Args:
            when_ready: called once clients are answered.
            when_stopped: called as soon as a signal to stop has come; gives up the questions that
                clients wait for.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,  # answers that are passed on have the server's
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._when_ready = when_ready
        self._when_stopped = when_stopped

    def serve_until_stopped(self, listener: socket.socket) -> None:
        """Answer clients until Ctrl-C, SIGTERM or, unless that is ignored, SIGHUP.

        Uvicorn raises the signal once more when it has ended, for handlers that were there before.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            self.run([listener])
        except KeyboardInterrupt:
            return

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report it."""
        await super().startup(sockets)
        self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Give up the questions that clients wait for, so that their connections end."""
        self._when_stopped()
        await super().shutdown(sockets)
