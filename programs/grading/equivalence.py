"""Mathematical equality of answers: math-verify, in processes that may hang or die."""

import logging
import multiprocessing
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from queue import LifoQueue
from typing import Any, Self

import lim_sglang
from lim_sglang.errors import LimError
from lim_sglang.programs.grading.conditions import without_conditions
from lim_sglang.programs.grading.forms import without_nouns
from lim_sglang.programs.grading.values import decide, read_value
from lim_sglang.programs.grading.vectors import as_coordinates

DEADLINE_S = 30.0
"""Limit of one pair. `comparison.py` stops by itself after 1.5 s of computing, unless it hangs."""
START_TIMEOUT_S = 120.0
MAX_LENGTH = 1000
"""Characters of the longest answer that is compared; a longer one is prose, and equal only to its
own text."""
MAX_MEMORY = 4 * 1024**3
"""Bytes of address space of a worker; some powers are larger than any memory."""
CACHE_SIZE = 65_536

logger = logging.getLogger(__name__)


class EquivalenceChecker:
    """Mathematical equality by math-verify, for any number of threads.

    math-verify takes a second to import, needs a main thread for its time limits and hangs on some
    input all the same, so it runs in worker processes. They start when first needed. A worker that
    misses the deadline or dies is replaced; its pair counts as not equal, with a warning. Verdicts
    are cached.

    Raises, from `equivalent`:
        LimError: math-verify does not start.
        RuntimeError: the checker is closed.
    """

    def __init__(self, *, num_workers: int = 2, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        # Last in, first out, so that a second worker starts only when two threads ask at once.
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(num_workers):
            self._idle.put(None)
        self._verdict = lru_cache(maxsize=CACHE_SIZE)(self._ask)

    def equivalent(self, a: str, b: str) -> bool:
        r"""Return True if two answers are equal: the one test of votes and of grades.

        Symmetric, but not transitive: `50\%` equals both 50 and 0.5.
        """
        if a == b:
            return True
        if max(len(a), len(b)) > MAX_LENGTH:
            return False
        values = without_nouns(a, b)
        pairs = without_conditions(*values) if values else []
        return bool(pairs) and all(self._are_equal(*as_coordinates(*pair)) for pair in pairs)

    def _are_equal(self, a: str, b: str) -> bool:
        verdict = decide(read_value(a), read_value(b))
        return verdict if isinstance(verdict, bool) else self._verdict(*verdict)

    def warm_up(self) -> None:
        """Start a worker without waiting for it, so that the first verdict comes sooner."""
        worker = self._idle.get()
        try:
            worker = worker or self._start()
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers at once. A thread that waits for a verdict gets a `RuntimeError`."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()

    def _ask(self, a: str, b: str) -> bool:
        worker, verdict = self._idle.get(), None
        try:
            if worker is None or not worker.is_alive():
                worker = self._start()
            verdict = worker.ask(a, b, deadline_s=self._deadline_s)
        except LimError:
            self._check_open()
            raise
        finally:
            # The late answer of an interrupted worker must not become that of the next pair.
            if verdict is None and worker is not None:
                worker.kill()
                worker = None
            self._idle.put(worker)
        if verdict is None:
            self._check_open()
            logger.warning(
                "math-verify did not decide if %r equals %r: they count as different", a, b
            )
        return bool(verdict)

    def _start(self) -> "_Worker":
        with self._lock:
            self._check_open()
            worker = _Worker()
            self._workers = [known for known in self._workers if known.is_alive()] + [worker]
            return worker

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the equivalence checker is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A process that runs `_serve`, for one thread at a time."""

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            # No process of multiprocessing, which would run the user's main script once more.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(lim_sglang.__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches the parent only
            )
        self._ready = False

    def ask(self, a: str, b: str, *, deadline_s: float) -> bool | None:
        """Return the verdict; None if the process dies or misses the deadline.

        Raises:
            LimError: math-verify does not start.
        """
        if not self._ready:
            problem = self._receive(START_TIMEOUT_S)
            if problem != "":
                reason = problem or "its process ended or did not answer"
                raise LimError(f"math-verify does not start ({reason}): reinstall lim-sglang")
            self._ready = True
        with suppress(OSError):
            self._pipe.send((a, b))
        verdict: bool | None = self._receive(deadline_s)
        return verdict

    def is_alive(self) -> bool:
        """Return True if the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _receive(self, timeout_s: float) -> Any:
        try:
            return self._pipe.recv() if self._pipe.poll(timeout_s) else None
        except (EOFError, OSError):
            return None


def _serve(pipe: Connection) -> None:
    """Answer pairs until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ValueError, OSError):  # there is a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    try:
        from lim_sglang.programs.comparison import compare

        compare("1", "1.0")
        pipe.send("")
    except ImportError as error:
        pipe.send(str(error))
        return
    with suppress(EOFError, OSError):
        while True:
            a, b = pipe.recv()
            try:
                verdict = compare(a, b)
            except Exception:  # noqa: BLE001 - SymPy raises exceptions of many kinds
                verdict = False
            pipe.send(verdict)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
