"""A run of its own under torch's profiler, in a server whose timed runs are over."""

import gzip
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lim_sglang.bench.driver import Glance, drive
from lim_sglang.bench.load import WARM_TOKENS, Load
from lim_sglang.bench.timeline import Trace, read_trace, recorded_steps
from lim_sglang.errors import ServerError
from lim_sglang.programs.http_client import Client

ACTIVITIES = ("GPU",)
"""Kernels, copies and CUDA calls. `CPU` would record every operator and slow the host down."""
PROFILE_ID = "lim-timeline"
TRACE_FILES = f"*{PROFILE_ID}-TP-0*.trace.json.gz"
"""SGLang's scheduler writes it when the last step is over, before it goes on."""
START_TIMEOUT_S = 120.0
"""The first profile of a process starts CUPTI."""
TRACE_TIMEOUT_S = 180.0
"""From a profile's start to its whole trace."""
POLL_S = 0.2


def record(
    client: Client, load: Load, vocab_size: int, steps: int, *, api_key: str | None = None
) -> Trace:
    """Drive an idle server until so many steps of it are recorded; all else is thrown away.

    Args:
        load: whose requests have tokens enough left, see `Load.half_way`.

    Raises:
        LimError: a request failed, the server refused, or no trace came.
    """
    with trace_folder() as folder, Profile(client, folder, recorded_steps(steps)) as profile:
        drive(client.url, load, vocab_size, api_key=api_key, watch=profile.watch)
        return read_trace(profile.text())


@contextmanager
def trace_folder() -> Iterator[Path]:
    """A folder that is gone with the block."""
    with tempfile.TemporaryDirectory(prefix="lim-timeline-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # A server of another user has to write there: SGLang's scheduler dies where it cannot.
        folder.chmod(0o777)
        yield folder


class Profile:
    """One profile of a server: asked for once all requests decode, over when its trace is whole."""

    def __init__(self, client: Client, folder: Path, steps: int) -> None:
        self._client = client
        self._folder = folder
        self._steps = steps
        self._asked: Future[Any] | None = None
        self._asked_s = 0.0
        self._whole = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        """Let nothing be written later, when the folder is gone."""
        if self._asked and not self._whole:
            self._asked.cancel()
            self._stop()

    def watch(self, glance: Glance) -> bool:
        """Ask for the profile in time; whether the run has served its purpose."""
        if self._asked is None:
            if glance.fewest >= WARM_TOKENS:
                self._asked, self._asked_s = self._start(), time.monotonic()
            return False
        failed = self._asked.done() and self._asked.exception() is not None
        return failed or self._is_late() or self._file() is not None

    def text(self) -> str:
        """The whole trace, waited for.

        Raises:
            ServerError: none was asked for, the server refused, or none came in time.
        """
        if self._asked is None:
            raise ServerError(
                f"no profile was asked for: the requests were never all decoded side by side for "
                f"{WARM_TOKENS} tokens; use fewer requests"
            )
        try:
            self._asked.result()
        except ServerError as error:
            raise ServerError(f"the server does not profile: {error}; see its log") from None
        if self._file() is None:
            self._stop()  # it has seen fewer steps than it waits for
        while (text := self._read()) is None:
            if self._file() is None or self._is_late():
                raise ServerError(
                    f"the server wrote no whole trace to {self._folder} within "
                    f"{time.monotonic() - self._asked_s:.0f} s: it has to run on this machine and "
                    "see the same folders; see its log"
                )
            time.sleep(POLL_S)
        self._whole = True
        return text

    def _start(self) -> "Future[Any]":
        body = {
            "output_dir": str(self._folder),
            "num_steps": self._steps,
            "activities": list(ACTIVITIES),
            "with_stack": False,
            "record_shapes": False,
            "profile_id": PROFILE_ID,
        }
        sent = self._client.send("POST", "/start_profile", body, timeout_s=START_TIMEOUT_S)
        return self._client.start(sent)

    def _stop(self) -> None:
        """End the profile. SGLang answers when its trace is written, or that there is none."""
        sent = self._client.send("POST", "/stop_profile", timeout_s=TRACE_TIMEOUT_S)
        with suppress(ServerError):
            self._client.start(sent).result()

    def _is_late(self) -> bool:
        return time.monotonic() - self._asked_s > TRACE_TIMEOUT_S

    def _file(self) -> Path | None:
        return next(self._folder.glob(TRACE_FILES), None)

    def _read(self) -> str | None:
        path = self._file()
        return read_whole(path) if path else None


def read_whole(path: Path) -> str | None:
    """What a compressed file holds; None while it is still being written.

    Raises:
        ServerError: it cannot be read.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except EOFError:
        return None
    except (OSError, zlib.error) as error:
        raise ServerError(f"the trace {path} cannot be read: {error}") from None
    return content.decode(errors="replace") or None
