"""A server that speaks as much of SGLang's HTTP as a program needs, and fails on request."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.http_fake import JsonHandler, served

Reply = tuple[int, Any]
Answerer = Callable[[dict[str, Any]], Reply]


def completion(text: str, *, num_tokens: int = 7, reason: str = "stop") -> Reply:
    """A finished chat completion."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": num_tokens}}


@dataclass
class FakeServer:
    """What it was asked, and how it answers."""

    answer: Answerer
    url: str = ""
    deterministic: bool = False
    max_running_requests: int | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        """The answer to one request."""
        if path == "/server_info":
            return 200, {
                "model_path": "/models/fake",
                "version": "0.5.16",
                "enable_deterministic_inference": self.deterministic,
                "max_running_requests": self.max_running_requests,
                "internal_states": [{}],
            }
        if path == "/abort_request":
            self.aborted.append(body["rid"])
            return 200, {}
        if path == "/v1/chat/completions":
            return self._complete(body)
        return (200, {}) if path == "/model_info" else (404, {"detail": "Not Found"})

    def _complete(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.requests.append(body)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            return self.answer(body)
        finally:
            with self.lock:
                self.running -= 1


@contextmanager
def serving(answer: Answerer, **options: Any) -> Iterator[FakeServer]:
    """Run a fake server on a free port until the block ends."""
    fake = FakeServer(answer, **options)

    class Handler(JsonHandler):
        def answer(self, body: dict[str, Any]) -> None:
            self.send_json(*fake.reply(self.path, body))

    with served(Handler) as fake.url:
        yield fake


def eventually(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether something becomes true before the time is up."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
