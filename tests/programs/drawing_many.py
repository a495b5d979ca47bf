"""As a script: draw many samples of one question at once, and tell what that took.

python -m tests.programs.drawing_many URL COUNT
"""

import json
import resource
import sys
import threading
import time
from collections import Counter
from contextlib import closing

from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.programs.drawn import run_on

MAJORITY = PROGRAMS["majority"]


def main(url: str, count: int) -> None:
    """Print one record."""
    most_threads = 0
    ended = threading.Event()

    def count_threads() -> None:
        nonlocal most_threads
        while not ended.wait(0.005):
            most_threads = max(most_threads, threading.active_count())

    before_bytes = _peak_bytes()
    start_s = time.monotonic()
    threading.Thread(target=count_threads, daemon=True).start()
    with closing(SglangBackend(url, max_concurrency=count)) as backend:
        outcome = run_on(backend, count, program=MAJORITY, parallel=count, seed=0, streamed=True)
    ended.set()
    record = {
        "threads": most_threads,
        "grown_bytes": _peak_bytes() - before_bytes,
        "peak_bytes": _peak_bytes(),
        "seconds": time.monotonic() - start_s,
        "states": Counter(str(sample.state) for sample in outcome.samples),
        "tokens": outcome.spent_tokens,
        "left": threading.active_count(),
    }
    sys.stdout.write(json.dumps(record))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
