"""A server that streams like SGLang's `/generate`, as fast and as badly as a test wants it."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.http import JsonHandler, served

Event = tuple[float, dict[str, Any]]
"""Seconds to wait, and what is then sent."""
Streamer = Callable[[dict[str, Any]], Iterator[Event]]
"""The events of one request, from its body."""
Profiler = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""Status and answer, from path and body."""


def event(total: int, reason: dict[str, Any] | None = None, retractions: int = 0) -> dict[str, Any]:
    """What SGLang sends after so many tokens."""
    meta = {"completion_tokens": total, "finish_reason": reason, "num_retractions": retractions}
    return {"output_ids": [7], "meta_info": meta}


def steadily(wait_s: float = 0.002, at_once: int = 1) -> Streamer:
    """Every token that was asked for, some at once, at one pace."""

    def stream(body: dict[str, Any]) -> Iterator[Event]:
        wanted = body["sampling_params"]["max_new_tokens"]
        for total in range(1, wanted, at_once):
            yield wait_s, event(total)
        yield wait_s, event(wanted, {"type": "length"})

    return stream


@dataclass
class StreamingServer:
    """What it was asked, and what it says of itself."""

    stream: Streamer
    url: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    busy: bool = False
    """Refuses to forget its prefixes."""
    status: int = 200
    """Of `/generate`."""
    loads: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {
                "num_running_reqs": 3,
                "num_waiting_reqs": 1,
                "num_used_tokens": 250,
                "max_total_num_tokens": 1000,
            }
        ]
    )
    requests: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Paths of everything else, in order."""
    aborted: set[str] = field(default_factory=set)
    profiler: Profiler | None = None
    """Answers `/start_profile` and `/stop_profile`; without one, neither exists."""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Everything but streams."""
        self.asked.append(path)
        if path.startswith("/v1/loads"):
            return 200, {"loads": self.loads}
        if path.startswith("/flush_cache"):
            return (400, {"message": "pending requests"}) if self.busy else (200, {})
        if path == "/abort_request":
            self.aborted.add(body["rid"])
            return 200, {}
        if self.profiler and path in ("/start_profile", "/stop_profile"):
            return self.profiler(path, body)
        return (200, self.info) if path == "/server_info" else (404, {})


@contextmanager
def streaming(stream: Streamer, **options: Any) -> Iterator[StreamingServer]:
    """Run a server on a free port until the block ends."""
    fake = StreamingServer(stream, **options)

    class Handler(JsonHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body: dict[str, Any]) -> None:
            if self.path != "/generate":
                self.send_json(*fake.answer(self.path, body))
            elif fake.status == 200:
                fake.requests.append(body)
                self._stream(body)
            else:
                self.send_json(fake.status, {})

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for wait_s, sent in fake.stream(body):
                time.sleep(wait_s)
                if body["rid"] in fake.aborted:
                    break
                self._chunk(b"data: " + json.dumps(sent).encode() + b"\n\n")
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

        def _chunk(self, content: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    with served(Handler) as fake.url:
        yield fake
