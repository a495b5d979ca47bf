"""The signals that end a process, and who handles them for the length of a block."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a service manager, a terminal that is closed."""

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


@contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Handle the `STOPPING` signals until the block ends: a server outlives us otherwise.

    What is ignored stays so, as under nohup. Threads get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    ours = [number for number in STOPPING if before[number] not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
