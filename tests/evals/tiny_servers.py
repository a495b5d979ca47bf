"""Servers of which `tiny_sglang.py` is SGLang, and what is left of their processes."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lim_sglang.evals.serving import ServerSpec
from lim_sglang.server import ServerOptions
from tests.evals import tiny_sglang
from tests.fakes.sglang_server import eventually


class TinyOptions(ServerOptions):
    """Starts a stand-in for SGLang."""

    def command_line(self) -> list[str]:
        """What is started."""
        return [sys.executable, tiny_sglang.__file__, str(self.port), *self.sglang_options]


def tiny_options(
    model: str | None, lim_flags: Any, sglang_options: tuple[str, ...], **others: Any
) -> ServerOptions:
    """In place of `server_options`."""
    return TinyOptions(str(model), sglang_options=sglang_options, **others)


def spec(folder: Path, manner: str = "serve") -> ServerSpec:
    """A server of these manners, whose processes leave their ids in the folder."""
    return ServerSpec("tiny", {"--lim-budget": "64"}, (str(folder), manner))


def running(folder: Path) -> list[int]:
    """The processes that have begun and not ended."""
    return [pid for path in folder.iterdir() if _runs(pid := int(path.name))]


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def none_left(tmp_path: Path) -> Iterator[Path]:
    """A folder for the ids of processes, none of which may outlive the block."""
    folder = tmp_path / "processes"
    folder.mkdir()
    yield folder
    # Orphans are killed, and end a moment later.
    eventually(lambda: not running(folder))
    left = running(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert len(list(folder.iterdir())) in (0, tiny_sglang.NUM_PROCESSES)
