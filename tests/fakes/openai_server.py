"""A server that speaks OpenAI's chat completions, nothing else, and fails on request."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.fakes.http import JsonHandler, served


@dataclass(frozen=True)
class Streamed:
    """An answer that comes in pieces."""

    pieces: tuple[str, ...]
    reason: str | None = "stop"
    """Why it ends; None: the stream ends without a reason."""
    num_tokens: int | None = None
    """Tokens in the usage at the end; None: there is no usage."""
    pace_s: float = 0.0
    """Pause before each piece."""
    field: str = "content"
    """Field of the delta that holds a piece."""
    logprob: float | None = None
    """Log-probability of each candidate of each token, if logprobs are asked for."""
    raw: str = ""
    """Sent as it is after the pieces."""


@dataclass(frozen=True)
class Complete:
    """A complete answer, or a refusal with a status above 399."""

    status: int
    content: Any = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()


Reply = Streamed | Complete
Answerer = Callable[[dict[str, Any]], Reply]


@dataclass
class FakeOpenAI:
    """A fake server: its answers, and the requests that it got."""

    answer: Answerer
    models: tuple[str, ...] | None = ("small",)
    """None: it does not list its models."""
    aliases: tuple[str, ...] = ()
    """Models that it describes and does not list."""
    key: str | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_disconnected: int = 0
    """Streams whose client closed the connection."""


class _Handler(JsonHandler):
    fake: FakeOpenAI

    def answer(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
            self.send_json(401, {"error": {"message": "wrong key"}})
        elif self.path == "/v1/models" and fake.models is not None:
            self.send_json(200, {"data": [{"id": name} for name in fake.models]})
        elif unquote(self.path).removeprefix("/v1/models/") in fake.aliases:
            self.send_json(200, {"object": "model"})
        elif self.path == "/v1/chat/completions":
            fake.requests.append(body)
            self.reply(fake.answer(body), body)
        else:
            self.send_json(404, {"detail": "Not Found"})

    def reply(self, reply: Reply, body: dict[str, Any]) -> None:
        if isinstance(reply, Complete):
            self.send_json(reply.status, reply.content, *reply.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in events(reply, with_logprobs=bool(body.get("logprobs"))):
                time.sleep(reply.pace_s)
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(f"{reply.raw}data: [DONE]\n\n".encode())
        except OSError:
            self.fake.num_disconnected += 1


def events(reply: Streamed, *, with_logprobs: bool) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream, with the usage at its end only."""
    about = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "usage": None}
    for piece in reply.pieces:
        choice: dict[str, Any] = {"index": 0, "delta": {reply.field: piece}, "finish_reason": None}
        if with_logprobs and reply.logprob is not None:
            top = [{"token": "x", "logprob": reply.logprob}] * 20
            choice["logprobs"] = {"content": [{"token": piece, "top_logprobs": top}]}
        yield {**about, "choices": [choice]}
    if reply.reason:
        yield {**about, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.reason}]}
    if reply.num_tokens is not None:
        yield {**about, "choices": [], "usage": {"completion_tokens": reply.num_tokens}}


@contextmanager
def serving_openai(answer: Answerer, **options: Any) -> Iterator[FakeOpenAI]:
    """Run a fake server on a free port until the block ends."""
    fake = FakeOpenAI(answer, **options)
    handler = type("Handler", (_Handler,), {"fake": fake})
    with served(handler) as fake.url:
        yield fake
