"""A fake SGLang server made of real processes, all of which ignore SIGTERM.

As a script, PORT FOLDER MANNER: a process with a child and a grandchild that have the titles of
SGLang's; each leaves its id in the folder, a temporary file, and one in shared memory. By MANNER
the server is ready at once (`serve`), without LessIsMore (`dense`), never (`hang`), ends before it
is ready and leaves its children behind (`fail`), or ends right after `/server_info` (`break`).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from setproctitle import setproctitle

NAME_KEY, SERVER_VAR = "lim_server", "LIM_SERVER"  # no import of the package: it would be slow
LAST_WORDS = "RuntimeError: CUDA out of memory, or so it says"
NUM_PROCESSES = 3
TITLES = {"child": "sglang::scheduler", "grandchild": "sglang::detokenizer"}
CHILD_OF = {"child": "grandchild", "grandchild": None}
LIFE_S = 60.0


def main(port: str, folder: str, manner: str) -> None:
    """Be one of the three processes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = CHILD_OF.get(manner, "child")
    if child:
        subprocess.Popen([sys.executable, "-P", __file__, port, folder, child])
    if manner in TITLES:
        setproctitle(TITLES[manner])
    tempfile.NamedTemporaryFile(delete=False).close()
    Path("/dev/shm", f"{os.environ[SERVER_VAR]}-{os.getpid()}").touch()
    (Path(folder) / str(os.getpid())).touch()
    if manner in CHILD_OF:
        time.sleep(LIFE_S)
        return
    while len(list(Path(folder).iterdir())) < NUM_PROCESSES:
        time.sleep(0.01)
    sys.stdout.write("Loading  10%\r\x1b[31mLoading [/bold] 100%\x1b[0m\n")
    sys.stdout.flush()
    if manner == "fail":
        sys.exit(LAST_WORDS)
    if manner == "hang":
        time.sleep(LIFE_S)
    listener = HTTPServer(("127.0.0.1", int(port)), Answers)
    Answers.manner = manner
    listener.serve_forever()


class Answers(BaseHTTPRequestHandler):
    """Answers every path as `/server_info`."""

    manner = ""

    def do_GET(self) -> None:
        """Answer one request."""
        state = {NAME_KEY: os.environ[SERVER_VAR]}
        if self.manner != "dense":
            state["lim"] = {"config": {"policy": "full"}, "roles": ["full"]}
        body = json.dumps({"internal_states": [state]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.manner == "break" and self.path == "/server_info":
            sys.stderr.write(LAST_WORDS)
            sys.stderr.flush()
            os._exit(9)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


if __name__ == "__main__":
    main(*sys.argv[1:])
