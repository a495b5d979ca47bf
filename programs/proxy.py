"""An HTTP server that answers OpenAI's chat completions by a vote: routes, a bounded queue of
votes, requests that are passed on as they are, clients that disconnect.
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
from lim_sglang.programs.http_client import CONNECT_TIMEOUT_S, is_loopback, normalise_url
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

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """Nobody reads the answer any more."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Wait for some work, as long as the client does; else it is cancelled.

    Raises:
        HungUpError: the client is gone.
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


class Released(StreamingResponse):
    """A stream that lets go of its source however it ends, also if that is before its beginning.

    Starlette cancels a stream when its client hangs up.
    """

    def __init__(
        self, content: AsyncIterable[Any], *, release: Callable[[], Awaitable[None]], **how: Any
    ) -> None:
        super().__init__(content, **how)
        self._release = release

    async def __call__(self, *asgi: Any) -> None:
        """Answer as an ASGI application."""
        try:
            await super().__call__(*asgi)
        finally:
            await self._release()


HEALTH_TIMEOUT_S = 5.0
NOT_PASSED_ON = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding")
)
"""Headers of one connection; its two ends write their own."""


class Upstream:
    """Passes requests on, and the answers back as they come. Belongs to one event loop."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet; raises `ServerError` where `url` is no HTTP address."""
        self.url = normalise_url(url)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=not is_loopback(self.url),
        )

    async def forward(self, request: Request, body: bytes) -> Response:
        """The server's answer to a request, key and all.

        Raises:
            httpx.RequestError: the server cannot be reached.
        """
        passed_on = self._http.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode() or None),
            headers=_passed(request.headers),
            content=body,
        )
        answer = await self._http.send(passed_on, stream=True)
        response = Released(
            answer.aiter_raw(), release=answer.aclose, status_code=answer.status_code
        )
        response.raw_headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in _passed(answer.headers).items()
        ]
        return response

    async def models(self, request: Request) -> list[Any]:
        """What the server lists as its models; nothing where it does not say."""
        try:
            answer = await self._http.get("/v1/models", headers=_passed(request.headers))
            return list(answer.raise_for_status().json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []

    async def is_healthy(self) -> bool:
        """Whether the server says that it is."""
        try:
            answer = await self._http.get("/health", timeout=HEALTH_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.is_success

    async def close(self) -> None:
        """Cut off what is still being passed on."""
        await self._http.aclose()


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in NOT_PASSED_ON}


class BusyError(LimError):
    """As many questions wait as may."""


class ClosedError(LimError):
    """No more questions are taken."""


class PendingVote:
    """One question from when it is taken until its outcome."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.num_ended = 0
        """Samples so far."""
        self.is_cancelled = False
        self.outcome: Future[Outcome] = Future()
        """Cancelled as soon as the question is, whatever the server still has to say."""
        self._lock = threading.Lock()
        self._run: SamplingRun | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves the queue, or its samples are aborted."""
        with self._lock:
            self.is_cancelled = True
            run = self._run
        self.outcome.cancel()  # outside the lock: where it was queued, this calls `end`
        if run:
            run.abandon()

    def begin(self, run: SamplingRun) -> None:
        """Its program is about to draw."""
        with self._lock:
            self._run = run
            cancelled = self.is_cancelled
        if cancelled:
            run.abandon()

    def end(self, work: Future[Outcome]) -> None:
        """Its program has ended, or was never begun."""
        with self._lock:
            if self.is_cancelled:
                return
            error = work.exception()
            if error:
                self.outcome.set_exception(error)
            else:
                self.outcome.set_result(work.result())

    def count(self, _: Sample) -> None:
        """One of its samples has ended."""
        self.num_ended += 1


class VoteQueue:
    """Takes questions for one server. Any thread may ask."""

    def __init__(
        self,
        backend: Backend,
        equivalent: Equivalent,
        *,
        max_questions: int,
        max_waiting: int,
    ) -> None:
        """Nothing is asked yet.

        Args:
            same: whether two answers are equal.
            max_questions: answered at the same time; the samples of all of them share the
                endpoint's places.
            max_waiting: taken beyond these; they wait.
        """
        self._backend = backend
        self._equivalent = equivalent
        self._max_questions = max_questions
        self._max_open = max_questions + max_waiting
        self._pool = ThreadPoolExecutor(max_questions, thread_name_prefix="lim-question")
        self._lock = threading.Lock()
        self._open: set[PendingVote] = set()
        """Until their programs have ended."""
        self._closed = False

    @property
    def most_threads(self) -> int:
        """That questions and their samples ever have: each question one of the pool, one of its
        program and one of a sample, and all of them together those of the endpoint's places.
        """
        return 3 * self._max_questions + self._backend.limiter.total

    @property
    def bounds(self) -> str:
        """What is done at the same time at most, in a line."""
        return (
            f"{self._max_questions} questions and {self._backend.limiter.total} samples of all of "
            f"them, in at most {self.most_threads} threads"
        )

    def ask(self, request: VoteRequest) -> PendingVote:
        """Take a question.

        Raises:
            BusyError: as many wait as may.
            ClosedError: the desk is closed.
        """
        pending = PendingVote(request.samples)
        with self._lock:
            if self._closed:
                raise ClosedError("the proxy is being stopped")
            if len(self._open) >= self._max_open:
                raise BusyError(
                    f"{len(self._open)} questions are open, as many as may be: try again later"
                )
            work = self._pool.submit(self._answer, pending, request)
            self._open.add(pending)
        pending.outcome.add_done_callback(lambda _: work.cancel())
        work.add_done_callback(lambda _: self._forget(pending))
        work.add_done_callback(pending.end)
        return pending

    def check_options(self, request: VoteRequest) -> None:
        """Refuse options that the program does not have, or that cannot be; takes milliseconds.

        Raises:
            ConfigError: what is wrong with them.
        """
        self._run(request, samples=0)

    def close(self) -> None:
        """Take no more questions, and give up those that are open."""
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
        question = SamplingRequest(
            request.messages,
            request.sampling,
            parallel=request.parallel or program.parallel or request.samples,
            streamed=program.streamed,
            seeds_honoured=bool(
                samples and request.sampling.seed is not None and self._backend.honours_seeds
            ),
        )
        return run_program(
            *(program, self._backend, question),
            indices=range(samples),
            equivalent=self._equivalent,
            options=request.options,
            on_sample=on_sample,
            on_begin=on_begin,
        )

    def _forget(self, pending: PendingVote) -> None:
        with self._lock:
            self._open.discard(pending)


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


GRACE_S = 2
"""For answers that are being written when the proxy is stopped."""


class ProxyServer(uvicorn.Server):
    """A server that can be stopped while clients wait for an answer."""

    def __init__(
        self, app: FastAPI, *, when_ready: Callable[[], None], when_stopped: Callable[[], None]
    ) -> None:
        """Does not listen yet.

        Args:
            when_ready: called once clients are answered.
            when_stopped: called as soon as a signal to stop has come; ends what clients wait for.
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
        """Listen, and say so."""
        await super().startup(sockets)
        self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what clients wait for, so that their connections end."""
        self._when_stopped()
        await super().shutdown(sockets)
