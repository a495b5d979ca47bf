"""Ranks of tensor parallelism in a benchmark: processes of this host, one a GPU, that run the same
function together.

This process is none of them: it only reads what the first rank yields. So a rank that fails ends
the run in words, while the others wait for it in a collective operation.
"""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

from lim_sglang.errors import LimError, ServerError, bullets
from lim_sglang.launch.server import free_port
from lim_sglang.launch.supervisor import die_with

LOOK_S = 1.0
"""Pause between two looks at the time while ranks say nothing."""
OTHERS_WITHIN_S = 2.0
"""Time in which further ranks may fail after the first, so that all problems are shown at once."""

Report = Callable[[str], None]
"""Shows the current activity."""


@dataclass(frozen=True)
class Rank:
    """One of the processes that share the heads of a model; the only one by default."""

    number: int = 0
    size: int = 1
    port: int | None = None
    """A free one, the same for all ranks, for torch's process group."""


ALONE = Rank()
"""The rank of a process that shares nothing."""


@dataclass(frozen=True)
class Activity:
    """Text of the first rank that is to be shown."""

    text: str


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank."""

    text: str
    is_in_words: bool = True
    """False for all but a `LimError`: a rank fails in other ways where another went away, too."""


@dataclass(frozen=True)
class _Worker:
    """The process of a rank, and the connection that the rank writes to."""

    process: BaseProcess
    connection: Connection

    def receive(self) -> Any:
        """Return the next message of a rank that has sent one or has ended: None at its end, a
        failure if it has died."""
        with suppress(EOFError):
            if self.connection.poll():
                return self.connection.recv()
        self.process.join(LOOK_S)
        words = f"died with exit code {self.process.exitcode}: see its output"
        return Failure(words, is_in_words=False)


def run_ranks(
    function: Callable[..., Iterator[Any]],
    args: Sequence[Any],
    size: int,
    report: Report,
    set_up: Callable[[], None],
) -> Iterator[Any]:
    """Run a generator function of a module as `function(*args, report, rank)` in a new process for
    each rank, and yield what the first rank yields.

    All ranks have ended when this generator ends, is closed, or raises; they end with this process.

    Args:
        report: called with what the first rank reports.
        set_up: a module's function that each process calls first.

    Raises:
        LimError: a rank failed; with the problems of all ranks that failed then.
        ServerError: a rank died.
    """
    context, port = multiprocessing.get_context("spawn"), free_port()
    workers: list[_Worker] = []
    try:
        for number in range(size):
            ours, theirs = context.Pipe(duplex=False)
            given = (Rank(number, size, port), function, args, theirs, os.getpid(), set_up)
            process = context.Process(target=_run_rank, args=given, daemon=True)
            workers.append(_Worker(process, ours))
            process.start()
            theirs.close()
        yield from _follow(workers, report)
    finally:
        for worker in workers:
            if worker.process.pid:
                worker.process.kill()
                worker.process.join()
            worker.connection.close()


def _run_rank(
    rank: Rank,
    function: Callable[..., Iterator[Any]],
    args: Sequence[Any],
    connection: Connection,
    parent: int,
    set_up: Callable[[], None],
) -> None:
    """Run the function in the process of a rank, and send what it yields and reports, if this is
    the first rank, its failure, or None at its end."""
    die_with(parent)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which kills the ranks
    set_up()
    send: Callable[[object], None] = connection.send
    if rank.number:
        logging.disable(logging.WARNING)  # the first rank says the same
        send = _ignore
    try:
        for item in function(*args, lambda text: send(Activity(text)), rank):
            send(item)
    except LimError as error:
        connection.send(Failure(str(error)))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        traceback.print_exc()
        connection.send(Failure(f"{type(error).__name__}: {error}", is_in_words=False))
    else:
        connection.send(None)


def _ignore(_message: object) -> None:
    """Take the place of a connection for what only the first rank sends."""


def _follow(workers: Sequence[_Worker], report: Report) -> Iterator[Any]:
    """Yield the items of the ranks until all have ended; raise once a rank has failed."""
    running, failures = dict(enumerate(workers)), dict[int, Failure]()
    until = None
    while running and (until is None or monotonic() < until):
        for number in _speaking(running):
            match running[number].receive():
                case None:
                    del running[number]
                case Failure() as failure:
                    failures[number] = failure
                    del running[number]
                    until = until or monotonic() + OTHERS_WITHIN_S
                case Activity(text):
                    report(text)
                case item:
                    yield item
    if failures:
        raise _error_of(failures)


def _speaking(running: dict[int, _Worker]) -> list[int]:
    """Wait a while for ranks that have sent something or have ended, and return these."""
    sources = {n: (each.connection, each.process.sentinel) for n, each in running.items()}
    ready = wait([source for pair in sources.values() for source in pair], LOOK_S)
    return [number for number, pair in sources.items() if any(each in ready for each in pair)]


def _error_of(failures: dict[int, Failure]) -> LimError:
    """Return the problems of ranks as one error; what all say alike, without the rank."""
    in_words = {number: each for number, each in failures.items() if each.is_in_words}
    shown = {number: each.text for number, each in sorted((in_words or failures).items())}
    texts = list(dict.fromkeys(shown.values()))
    kind = LimError if in_words else ServerError
    if len(texts) == 1 and len(shown) > 1:
        return kind(texts[0])
    lines = [f"rank {number}: {text}" for number, text in shown.items()]
    return kind(lines[0] if len(lines) == 1 else f"several ranks failed:{bullets(lines)}")
