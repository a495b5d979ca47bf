"""A stand-in for SGLang's server: a child, a grandchild, two addresses, and no ear for SIGTERM.

As a script: PORT FOLDER MANNER. Each process leaves its id in the folder. Of its manners, `serve`
is ready at once, `dense` does not show LessIsMore, `hang` is never ready, `fail` ends before it is,
and `break` when it has told of itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

FINAL_WORDS = "CUDA out of memory, or so it says"
NUM_PROCESSES = 3
YOUNGER = {"child": "grandchild", "grandchild": None}
LIFE_S = 60.0


def main(port: str, folder: str, manner: str) -> None:
    """Be one of the three processes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    younger = YOUNGER.get(manner, "child")
    if younger:
        subprocess.Popen([sys.executable, __file__, port, folder, younger])
    (Path(folder) / str(os.getpid())).touch()
    if manner in YOUNGER:
        time.sleep(LIFE_S)
        return
    while len(list(Path(folder).iterdir())) < NUM_PROCESSES:
        time.sleep(0.01)
    sys.stdout.write("Loading  10%\r\x1b[31mLoading [/bold] 100%\x1b[0m\n")
    sys.stdout.flush()
    if manner == "fail":
        sys.exit(FINAL_WORDS)
    if manner == "hang":
        time.sleep(LIFE_S)
    listener = HTTPServer(("127.0.0.1", int(port)), Answers)
    Answers.manner = manner
    listener.serve_forever()


class Answers(BaseHTTPRequestHandler):
    """Health, and what it is."""

    manner = ""

    def do_GET(self) -> None:
        """Both addresses that a start asks."""
        state = {} if self.manner == "dense" else {"lim": {"roles": ["full"]}}
        body = json.dumps({"internal_states": [state]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.manner == "break" and self.path == "/server_info":
            sys.stderr.write(FINAL_WORDS)
            sys.stderr.flush()
            os._exit(9)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


if __name__ == "__main__":
    main(*sys.argv[1:])
