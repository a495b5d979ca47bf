"""The HTTP part of fake servers: JSON in, JSON out, on a free port until a block ends."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """A handler that gives each request's body to `answer`, which sends the reply."""

    def answer(self, body: dict[str, Any]) -> None:
        """Send the reply to one request."""
        raise NotImplementedError

    def send_json(self, status: int, content: Any, *headers: tuple[str, str]) -> None:
        """Send a complete reply."""
        self.send_body(status, json.dumps(content).encode(), *headers)

    def send_body(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        """Send a complete reply as it is."""
        usual = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in {**usual, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _read_and_answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.answer(json.loads(self.rfile.read(length) or b"{}"))

    do_GET = do_POST = _read_and_answer  # noqa: N815 - names of the standard library

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on this machine until the block ends; yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that disconnect
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
