"""The door of a server: each request is checked here before anything of SGLang's acts on it.

Three places, all in the process that answers HTTP: `RequestDoor` sees each body and each answer,
`check_incoming` each request as its route made it, `check_tokenized` each prompt as the scheduler
will get it. What the checks are is in `request_checks.py`; a refusal is a status of 400 with
OpenAI's error object on every route.
"""

import asyncio
import json
import logging
import re
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from jinja2 import TemplateError

from lim_sglang.request_checks import (
    MAX_BODY_BYTES,
    Limits,
    reason_against_body,
    reasons_against_batch,
    reasons_against_ids,
    reasons_against_model_name,
    reasons_against_request,
)

Message = MutableMapping[str, Any]
"""A message of ASGI."""
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]

BAD_REQUEST, TOO_LARGE, INTERNAL_ERROR = 400, 413, 500
LONG_BODY = 1 << 20
"""Bytes of a body that takes milliseconds to check."""
ANTHROPIC_ROUTES = "/v1/messages"
"""Routes whose errors have Anthropic's shape."""
OPENAI_ROUTES = ("/v1/", "/invocations")
SERVER_ERRORS = ("api_error", "server_error", "InternalServerError")
"""Types of errors that are no fault of the request."""
READING_ROUTES = ("/separate_reasoning", "/parse_function_call")
"""Routes that read a text and do nothing else."""
READING = "solve_dependencies"
"""The function of FastAPI that makes a route's arguments from a request."""

UNREADABLE = (
    *(TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError),
    *(RecursionError, re.error, TemplateError),
)
"""Errors with which SGLang meets a value that no check knows, before it has sent anything on."""

_PLACE_IN_CODE = re.compile(r'\n\s*File "[^"\n]*", line \d+[^\n]*(?:\n[ \t]+[^\n]*)?')
"""The function of a route that FastAPI names behind the errors of a request, and its path."""

_log = logging.getLogger(__name__)


async def check_incoming(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Run SGLang's `generate_request` on a request that its checks let through.

    Args:
        obj: SGLang's `GenerateReqInput` or `EmbeddingReqInput`.
        request: the HTTP request, None from Python.

    Raises:
        ValueError: the request cannot be served; SGLang's routes make it a status of 400.
    """
    path = request.url.path if request is not None else ""
    _refuse(reasons_against_batch(obj, is_openai=path.startswith(OPENAI_ROUTES)))
    answers = original(manager, obj, request)
    try:
        first = await anext(answers)
    except UNREADABLE as error:
        raise _as_bad_request(error) from error
    except StopAsyncIteration:
        return
    yield first
    async for answer in answers:
        yield answer


def check_tokenized(tokenized: Any, manager: Any, obj: Any, *_: Any, **__: Any) -> None:
    """Check one prompt with its parameters after SGLang has read them, before they are sent on.

    Args:
        tokenized: SGLang's `TokenizedGenerateReqInput` or `TokenizedEmbeddingReqInput`.
        obj: the request that it was made from.

    Raises:
        ValueError: as `check_incoming`.
    """
    if not hasattr(tokenized, "top_logprobs_num"):  # embeddings, which SGLang refuses itself
        return
    model = manager.model_config
    limits = Limits(
        model.vocab_size,
        manager.context_len,
        model.hidden_size,
        manager.server_args.grammar_backend,
        reads_media=manager.mm_processor is not None,
    )
    reasons = reasons_against_request(tokenized, limits)
    if obj.contains_mm_input() and not limits.reads_media:
        reasons.append("the model reads text only: leave images, videos and sound out")
    _refuse(reasons)


def check_detokenized(route: Any, request: Any, _raw_request: Any = None) -> None:
    """Check the token ids that SGLang is about to make text of.

    Raises:
        ValueError: as `check_incoming`.
    """
    model = route.tokenizer_manager.model_config
    _refuse(reasons_against_ids("tokens", request.tokens, model.vocab_size))


def checked_conversion(
    original: Callable[..., Any], route: Any, request: Any, *others: Any, **words: Any
) -> Any:
    """Run SGLang's reading of an OpenAI request; blame the request for an error in it.

    Raises:
        ValueError: the request cannot be read, or is not the server's to answer.
    """
    served = getattr(getattr(route, "tokenizer_manager", None), "served_model_name", None)
    _refuse(reasons_against_model_name(getattr(request, "model", None), served))
    try:
        return original(route, request, *others, **words)
    except UNREADABLE as error:
        raise _as_bad_request(error) from error


def anthropic_error(
    original: Callable[..., Any], route: Any, status_code: int, *arguments: Any, **words: Any
) -> Any:
    """Answer an error of `/v1/messages*`, a refused request with 400 as OpenAI's routes do.

    SGLang calls the original inside the handler of the error, with a status of 500 for any.
    """
    refusal = sys.exc_info()[1]
    if status_code == INTERNAL_ERROR and isinstance(refusal, ValueError):
        return original(route, BAD_REQUEST, "invalid_request_error", str(refusal))
    return original(route, status_code, *arguments, **words)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError("; ".join(reasons))


def _as_bad_request(error: BaseException) -> ValueError:
    _log.warning("a request that cannot be read", exc_info=error)
    return ValueError(f"the request cannot be read: {type(error).__name__}: {error}")


class RequestDoor:
    """Middleware of ASGI: refuses bodies that cannot be read, and gives errors one shape."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(scope["path"], send)
        if _may_be_json(scope):
            messages, body = await _read_body(receive)
            if body is None:
                await answer.refuse(TOO_LARGE, f"the body is over {MAX_BODY_BYTES} bytes")
                return
            # In a thread where reading takes long, since nothing else is served meanwhile.
            checks = asyncio.to_thread(reason_against_body, body) if len(body) > LONG_BODY else None
            if reason := await checks if checks else reason_against_body(body):
                await answer.refuse(BAD_REQUEST, reason)
                return
            receive = _replay(messages, receive)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            if answer.is_over:  # raised further, it would close a connection that is in use again
                _log.exception("an error after the answer to %s", scope["path"])
                return
            if answer.has_begun or not _is_unreadable(error, scope["path"]):
                raise
            await answer.refuse(BAD_REQUEST, str(_as_bad_request(error)))


def _is_unreadable(error: Exception, path: str) -> bool:
    """Return True if the error is the request's: a validator, or a parser, met another type."""
    if not isinstance(error, (ValueError, *UNREADABLE)):
        return False
    return path in READING_ROUTES or _came_from_reading(error)


def _came_from_reading(error: Exception) -> bool:
    """Return True if FastAPI was filling in a route's arguments."""
    return any(frame.name == READING for frame in traceback.extract_tb(error.__traceback__))


def _may_be_json(scope: Mapping[str, Any]) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] in ("POST", "PUT") and not any(b"multipart/" in kind for kind in kinds)


async def _read_body(receive: Receive) -> tuple[list[Message], bytes | None]:
    """Return the messages of a body and the body, None if it is too large."""
    messages: list[Message] = []
    size = 0
    while not messages or (messages[-1]["type"] == "http.request" and messages[-1]["more_body"]):
        message = await receive()
        message.setdefault("more_body", False)
        messages.append(message)
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            return [], None
    return messages, b"".join(message.get("body", b"") for message in messages)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Return a `receive` that gives messages which were read already, then goes on."""
    left = iter(messages)

    async def replayed() -> Message:
        return next(left, None) or await receive()

    return replayed


class Answer:
    """An answer on its way: an error gets its shape, a stream that begins with one its status.

    SGLang's own OpenAI routes wait for the first event of a stream before they send a status; here
    all routes do.
    """

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send
        self._start: Message | None = None
        """The start that is held back; None once it is sent."""
        self._body = b""
        self.has_begun = False
        """True once the route has answered."""
        self.is_over = False
        """True once nothing more will be sent."""

    async def refuse(self, status: int, message: str) -> None:
        """Send an error."""
        await self._send_error(status, {"message": message})

    async def send(self, message: Message) -> None:
        """Pass on a message of SGLang's answer."""
        if self.is_over:
            return
        self.has_begun = True
        if message["type"] == "http.response.start" and _may_be_error(message):
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._send_held(message)
        else:
            await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)
        self.is_over |= is_last

    async def _send_held(self, message: Message) -> None:
        """Send the start that was held back, with its body so far, as what the body shows it is."""
        assert self._start is not None
        self._body += message.get("body", b"")
        more = message.get("more_body", False)
        is_stream = _kind(self._start) == b"text/event-stream"
        if more and not (is_stream and self._body.strip()):
            return
        status = self._start["status"]
        if is_stream and (error := error_in_event(self._body)):
            await self._send_error(error.get("code", BAD_REQUEST), error)
        elif not is_stream and (payload := _read_object(self._body)) is not None:
            await self._send_error(status, payload)
        else:
            await self._send(self._start)
            await self._pass_on({**message, "body": self._body})
        self._start = None

    async def _send_error(self, status: int, payload: Mapping[str, Any]) -> None:
        shaped = shaped_error(payload, status, self._path)
        body = json.dumps(shaped).encode()
        headers = [(b"content-type", b"application/json")]
        if self._start is not None:
            dropped = (b"content-length", b"content-type")
            headers += [each for each in self._start["headers"] if each[0].lower() not in dropped]
        headers.append((b"content-length", str(len(body)).encode()))
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await self._send(start)
        await self._pass_on({"type": "http.response.body", "body": body})


def _kind(start: Message) -> bytes:
    """Return the content type of an answer, without its parameters."""
    found = [value for name, value in start.get("headers", ()) if name.lower() == b"content-type"]
    return bytes(found[0]).partition(b";")[0].strip() if found else b""


def _may_be_error(start: Message) -> bool:
    if start["status"] >= BAD_REQUEST:
        return _kind(start) == b"application/json"
    return _kind(start) == b"text/event-stream"


def _read_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def error_in_event(body: bytes) -> dict[str, Any] | None:
    """Return the error that a stream begins with, None if it begins with an answer.

    SGLang says so by an event with an error, or by an aborted result with a status.
    """
    lines = [line for line in body.splitlines() if line.startswith(b"data:")]
    event = _read_object(lines[0].removeprefix(b"data:")) if lines else None
    if event is None:
        return None
    error = event.get("error")
    if isinstance(error, dict):
        code = error.get("code")
        if not (isinstance(code, int) and BAD_REQUEST <= code < 600):
            code = 500 if error.get("type") in SERVER_ERRORS else BAD_REQUEST
        return {**error, "code": code}
    meta = event.get("meta_info")
    finish = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(finish, dict) and finish.get("status_code"):
        return {"message": finish["message"], "code": int(finish["status_code"])}
    return None


def shaped_error(payload: Mapping[str, Any], status: int, path: str) -> dict[str, Any]:
    """Return the body of an error: OpenAI's error object, beside the fields that SGLang gives.

    Args:
        payload: SGLang's body, flat or with an error object, or an error object.
    """
    payload = {key: _without_place(value) for key, value in payload.items()}
    error = payload.get("error")
    given = error if isinstance(error, dict) else payload
    message = given.get("message") or given.get("detail") or error or "the request failed"
    if path.startswith(ANTHROPIC_ROUTES):
        kind = given.get("type", "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = "invalid_request_error" if status < 500 else "server_error"
    shape = {"message": message, "type": kind, "param": given.get("param"), "code": status}
    if isinstance(error, dict):
        shape |= {key: value for key, value in error.items() if value is not None}
    return {"object": "error", **shape, **payload, "error": shape}


def _without_place(value: Any) -> Any:
    """Return a message, or an error with one, without a place in SGLang's code."""
    if isinstance(value, dict):
        return {key: _without_place(each) for key, each in value.items()}
    return _PLACE_IN_CODE.sub("", value) if isinstance(value, str) else value
