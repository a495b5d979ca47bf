"""An HTTP server that answers OpenAI's chat completions by a vote: routes, a bounded queue of
votes, requests that are forwarded as they are, clients that disconnect.
"""

import asyncio
import json
import logging
import secrets
import signal
import socket
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from lim_sglang.errors import ConfigError, LimError
from lim_sglang.programs.backend import Backend
from lim_sglang.programs.http_client import normalise_url, open_http
from lim_sglang.programs.program import PROGRAMS, Outcome, find_program, run_program
from lim_sglang.programs.protocol import (
    DONE,
    Answer,
    VoteRequest,
    default_samples,
    error_body,
    event,
    read_request,
)
from lim_sglang.programs.sampler import SamplingRun
from lim_sglang.programs.schema import Sample, Sampling, SamplingRequest, check_thinking_budget
from lim_sglang.programs.vote import Equivalent

HEARTBEAT_S = 2.0
"""Pause between two comments in a stream while samples are generated, so that no client's time-out
fires."""
RETRY_AFTER_S = 5
"""Pause that a client is asked for when the queue is full."""
CLIENT_CLOSED_REQUEST = 499
"""Status of an answer that is not read, as in nginx's logs."""
GRACE_S = 2
"""Time for answers that are being written when the proxy is stopped."""
HEALTH_TIMEOUT_S = 5.0
CONNECTION_HEADERS = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding")
)
"""Headers of one connection, which are not forwarded."""
PROGRAM_LIMITS = {name: program.max_samples for name, program in PROGRAMS.items()}
"""Samples that each program takes at most; None for programs without a limit."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class QueueFullError(LimError):
    """A question that is refused because the queue is full."""


class StoppingError(LimError):
    """A question that is refused or given up because the proxy is being stopped."""


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
        """Answer as an ASGI application."""
        try:
            await super().__call__(*asgi)
        finally:
            await self._close()


class Upstream:
    """The server behind the proxy, which gets the requests that are no votes.

    It belongs to one event loop.
    """

    def __init__(self, url: str) -> None:
        """Prepare the connection; raises `ServerError` if `url` is no HTTP address."""
        self._http = open_http(normalise_url(url))

    async def forward(self, request: Request, body: bytes) -> Response:
        """Forward a request, API key included, and return the answer as it comes.

        Raises:
            httpx.RequestError: the server cannot be reached.
        """
        forwarded = self._http.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode() or None),
            headers=_without_connection_headers(request.headers),
            content=body,
        )
        answer = await self._http.send(forwarded, stream=True)
        response = ClosingStream(
            answer.aiter_raw(), close=answer.aclose, status_code=answer.status_code
        )
        response.raw_headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in _without_connection_headers(answer.headers).items()
        ]
        return response

    async def models(self, request: Request) -> list[Any]:
        """Return the models that the server lists, none if it lists none."""
        try:
            answer = await self._http.get(
                "/v1/models", headers=_without_connection_headers(request.headers)
            )
            return list(answer.raise_for_status().json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []

    async def is_healthy(self) -> bool:
        """Return True if the server says that it is healthy."""
        try:
            answer = await self._http.get("/health", timeout=HEALTH_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.is_success

    async def close(self) -> None:
        """Close all connections, also of requests that are being forwarded."""
        await self._http.aclose()


def _without_connection_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {n: value for n, value in headers.items() if n.lower() not in CONNECTION_HEADERS}


class PendingVote:
    """One question from its acceptance to its outcome."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.num_ended = 0
        """Samples that have ended so far."""
        self.is_cancelled = False
        self.outcome: Future[Outcome] = Future()
        """The outcome, cancelled at once with the question, before the server has aborted."""
        self._lock = threading.Lock()
        self._run: SamplingRun | None = None

    def cancel(self) -> None:
        """Give the question up: remove it from the queue, or abort its samples."""
        with self._lock:
            self.is_cancelled = True
            run = self._run
        self.outcome.cancel()  # outside the lock, since this calls `end` for a queued question
        if run:
            run.stop()

    def begin(self, run: SamplingRun) -> None:
        """Note the run of the program, before its first sample."""
        with self._lock:
            self._run = run
            cancelled = self.is_cancelled
        if cancelled:
            run.stop()

    def end(self, work: Future[Outcome]) -> None:
        """Note the end of the program, or of a question that was never begun."""
        with self._lock:
            if self.is_cancelled:
                return
            error = work.exception()
            if error:
                self.outcome.set_exception(error)
            else:
                self.outcome.set_result(work.result())

    def count(self, _: Sample) -> None:
        """Count a sample that has ended."""
        self.num_ended += 1


class VoteQueue:
    """Questions for one server: a limited number is answered, a limited number waits.

    Any thread may ask.
    """

    def __init__(
        self,
        backend: Backend,
        equivalent: Equivalent,
        *,
        max_questions: int,
        max_waiting: int,
    ) -> None:
        """Prepare the queue; nothing is sent yet.

        Args:
            equivalent: returns True if two answers are equal.
            max_questions: questions answered at the same time; their samples share the slots of
                the backend.
            max_waiting: questions that wait beyond these.
        """
        self._backend = backend
        self._equivalent = equivalent
        self._max_questions = max_questions
        self._max_open = max_questions + max_waiting
        self._pool = ThreadPoolExecutor(max_questions, thread_name_prefix="lim-question")
        self._lock = threading.Lock()
        self._open: set[PendingVote] = set()
        """Questions whose programs have not ended."""
        self._closed = False

    @property
    def num_open(self) -> int:
        """Questions whose programs have not ended."""
        return len(self._open)

    @property
    def max_threads(self) -> int:
        """Threads of all questions: one of the pool and one of the program each, one for a sample
        that has just ended, and one for each sample in flight.
        """
        return 3 * self._max_questions + self._backend.limiter.total

    @property
    def limits(self) -> str:
        """The limits of the queue in a line."""
        return (
            f"{self._max_questions} questions and {self._backend.limiter.total} samples of all of "
            f"them, in at most {self.max_threads} threads"
        )

    def ask(self, request: VoteRequest) -> PendingVote:
        """Accept a question.

        Raises:
            QueueFullError: too many questions wait.
            StoppingError: the queue is closed.
        """
        pending = PendingVote(request.samples)
        with self._lock:
            if self._closed:
                raise StoppingError("the proxy is being stopped")
            if len(self._open) >= self._max_open:
                raise QueueFullError(
                    f"{len(self._open)} questions are open, the most that are taken: try again "
                    "later"
                )
            work = self._pool.submit(self._answer, pending, request)
            self._open.add(pending)
        pending.outcome.add_done_callback(lambda _: work.cancel())
        work.add_done_callback(lambda _: self._remove(pending))
        work.add_done_callback(pending.end)
        return pending

    def check_options(self, request: VoteRequest) -> None:
        """Refuse options that the program does not have, or impossible values; takes milliseconds.

        Raises:
            ConfigError: there is such an option.
        """
        self._run(request, samples=0)

    def close(self) -> None:
        """Accept no more questions, and give up those that are open."""
        with self._lock:
            self._closed = True
            still_open = list(self._open)
        for pending in still_open:
            pending.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, pending: PendingVote, request: VoteRequest) -> Outcome:
        return self._run(
            request, samples=request.samples, on_begin=pending.begin, on_sample=pending.count
        )

    def _run(
        self,
        request: VoteRequest,
        *,
        samples: int,
        on_begin: Callable[[SamplingRun], None] = lambda _: None,
        on_sample: Callable[[Sample], None] = lambda _: None,
    ) -> Outcome:
        program = find_program(request.program)
        has_seeds = samples > 0 and request.sampling.seed is not None
        question = SamplingRequest(
            request.messages,
            request.sampling,
            parallel=request.parallel or program.parallel or request.samples,
            streamed=program.streamed,
            seeds_honoured=has_seeds and self._backend.honours_seeds,
        )
        return run_program(
            program,
            self._backend,
            question,
            indices=range(samples),
            equivalent=self._equivalent,
            options=request.options,
            on_sample=on_sample,
            on_begin=on_begin,
        )

    def _remove(self, pending: PendingVote) -> None:
        with self._lock:
            self._open.discard(pending)


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

    async def check_key(self, request: Request) -> None:
        """Refuse a request without the server's key."""
        sent = request.headers.get("authorization", "")
        if self.api_key and not secrets.compare_digest(
            sent.encode(), f"Bearer {self.api_key}".encode()
        ):
            raise HTTPException(401, "the API key is missing or wrong: send the server's")

    async def models(self, request: Request) -> dict[str, Any]:
        """List the programs with their default samples, and the server's models."""
        now = int(time.time())
        programs = [
            {
                "id": f"{name}@{default_samples(most)}",
                "object": "model",
                "created": now,
                "owned_by": "lim",
            }
            for name, most in PROGRAM_LIMITS.items()
        ]
        return {"object": "list", "data": [*programs, *await self.upstream.models(request)]}

    async def health(self) -> Response:
        """Answer 200 if a question could be answered now, else 503."""
        return Response(status_code=200 if await self.upstream.is_healthy() else 503)

    async def chat(self, request: Request) -> Response:
        """Answer with a vote, or with the server's own answer."""
        body = await request.body()
        asked = read_request(_parse(body), PROGRAM_LIMITS, self.sampling)
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
            _check_not_given_up(pending)
            return JSONResponse(answer.completion(outcome.result()))
        finally:
            pending.cancel()

    async def forward(self, request: Request) -> Response:
        """Answer all other routes of OpenAI's API with the server's answer."""
        body = await request.body()
        return await cancel_on_disconnect(request, self.upstream.forward(request, body))


def create_app(proxy: Proxy) -> FastAPI:
    """Return the proxy as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.upstream.close()

    app = FastAPI(title="lim proxy", openapi_url=None, lifespan=lifespan)
    keyed = [Depends(proxy.check_key)]
    app.get("/health")(proxy.health)
    app.get("/v1/models", dependencies=keyed)(proxy.models)
    app.post("/v1/chat/completions", dependencies=keyed)(proxy.chat)
    app.api_route("/v1/{path:path}", methods=["GET", "POST"], dependencies=keyed)(proxy.forward)
    for kind in (
        LimError,
        httpx.RequestError,
        StarletteHTTPException,
        ClientDisconnectedError,
        Exception,
    ):
        app.add_exception_handler(kind, _answer_error)
    return app


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise ConfigError("the body is no JSON") from None


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
        _check_not_given_up(pending)
        for chunk in answer.chunks(outcome.result()):
            yield chunk
    except Exception as error:
        status, body = _describe_error(error)
        if status == 500:
            logger.exception("a question failed")
        yield event(body)
        yield DONE


def _check_not_given_up(pending: PendingVote) -> None:
    """Raise `StoppingError` for a question that was given up while its client waits."""
    if pending.is_cancelled:
        raise StoppingError("the proxy is being stopped")


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    status, body = _describe_error(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
    return JSONResponse(body, status, headers)


def _describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of an error, as OpenAI's API has them."""
    if isinstance(error, StarletteHTTPException):
        code = "invalid_api_key" if error.status_code == 401 else "invalid_request"
        return error.status_code, error_body(error.detail, "invalid_request_error", code)
    if isinstance(error, ConfigError):
        return 400, error_body(str(error), "invalid_request_error", "invalid_request")
    if isinstance(error, QueueFullError):
        return 429, error_body(str(error), "rate_limit_error", "rate_limit_exceeded")
    if isinstance(error, StoppingError):
        return 503, error_body(str(error), "server_error", "stopping")
    if isinstance(error, LimError):
        return 502, error_body(str(error), "server_error", "server_failed")
    if isinstance(error, httpx.RequestError):
        words = f"the server behind the proxy cannot be reached ({type(error).__name__})"
        return 502, error_body(words, "server_error", "server_failed")
    return 500, error_body(f"the proxy failed: {error!r}", "server_error", "internal_error")


class ProxyServer(uvicorn.Server):
    """A server that can be stopped while clients wait for an answer."""

    def __init__(
        self, app: FastAPI, *, when_ready: Callable[[], None], when_stopped: Callable[[], None]
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
