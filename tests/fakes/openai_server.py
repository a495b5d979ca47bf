"""A server that speaks OpenAI's chat completions, no more than these, and fails on request."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.http import JsonHandler, served


@dataclass(frozen=True)
class Streamed:
    """An answer that comes in pieces."""

    pieces: tuple[str, ...]
    reason: str | None = "stop"
    """None: it ends without one."""
    num_tokens: int | None = None
    """What the usage in the end says; None: there is none."""
    pace_s: float = 0.0
    """Before each piece."""
    field: str = "content"
    """Of the delta that holds a piece."""
    logprob: float | None = None
    """Of each candidate of each token, where logprobs are asked for."""
    raw: str = ""
    """Sent as it is after the pieces."""


@dataclass(frozen=True)
class Refusal:
    """A status above 399, or a whole answer."""

    status: int
    content: Any = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()


Reply = Streamed | Refusal
Answerer = Callable[[dict[str, Any]], Reply]


@dataclass
class FakeOpenAI:
    """What it was asked, and how it answers."""

    answer: Answerer
    models: tuple[str, ...] | None = ("small",)
    """None: it does not list them."""
    key: str | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    hung_up: int = 0
    """Streams whose client closed the connection."""


class _Handler(JsonHandler):
    fake: FakeOpenAI

    def answer(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
            self.send_json(401, {"error": {"message": "wrong key"}})
        elif self.path == "/v1/models" and fake.models is not None:
            self.send_json(200, {"data": [{"id": name} for name in fake.models]})
        elif self.path == "/v1/chat/completions":
            fake.requests.append(body)
            self.reply(fake.answer(body), body)
        else:
            self.send_json(404, {"detail": "Not Found"})

    def reply(self, reply: Reply, body: dict[str, Any]) -> None:
        if isinstance(reply, Refusal):
            payload = json.dumps(reply.content).encode()
            self.send_response(reply.status)
            for name, value in (("Content-Type", "application/json"), *reply.headers):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)
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
            self.fake.hung_up += 1


def events(reply: Streamed, *, with_logprobs: bool) -> Iterator[dict[str, Any]]:
    """The events of a stream, with nothing of the usage before its end."""
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
