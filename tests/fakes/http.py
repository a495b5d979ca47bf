"""What fake servers share: JSON in, JSON out, on a free port until a block ends."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Hands each request's body to `answer`, which sends the reply."""

    def answer(self, body: dict[str, Any]) -> None:
        """Send the reply to one request."""
        raise NotImplementedError

    def send_json(self, status: int, content: Any) -> None:
        """Send a whole reply."""
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _read_and_answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.answer(json.loads(self.rfile.read(length) or b"{}"))

    do_GET = do_POST = _read_and_answer  # noqa: N815 - names of the standard library

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def served(handler: type[JsonHandler]) -> Iterator[str]:
    """Serve on this machine; the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
