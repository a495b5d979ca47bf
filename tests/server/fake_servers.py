"""Servers made of fake SGLang processes, which leave their ids in a folder."""

import sys
from contextlib import suppress
from pathlib import Path

import psutil

from lim_sglang.launch.server import Server, ServerOptions, ServerSpec, free_port
from lim_sglang.launch.supervisor import is_running
from tests.fakes import sglang_process
from tests.fakes.sglang_process import NUM_PROCESSES
from tests.fakes.sglang_server import eventually

SCRIPT = sglang_process.__file__
BEGIN_WITHIN_S = 60.0


class FakeOptions(ServerOptions):
    """Options that start `sglang_process` in SGLang's place; `sglang_options` are its arguments."""

    def command_line(self) -> list[str]:
        """Return the command that starts the fake server."""
        return [sys.executable, "-P", SCRIPT, str(self.port), *self.sglang_options]


def fake_options(spec: ServerSpec, *, port: int) -> ServerOptions:
    """Stand in for `server_options`."""
    return FakeOptions(str(spec.model), sglang_options=spec.sglang_options, port=port)


def fake_spec(folder: Path, manner: str = "serve") -> ServerSpec:
    """Describe a fake server of this manner, whose processes leave their ids in the folder."""
    return ServerSpec("tiny", {"--lim-budget": "64"}, (str(folder), manner))


def fake_server(folder: Path, manner: str) -> Server:
    """Start a fake server and wait until all its processes run."""
    server = Server(fake_options(fake_spec(folder, manner), port=free_port()))
    server.start()
    wait_until_begun(folder)
    return server


def wait_until_begun(folder: Path) -> None:
    """Wait until all processes of a fake server run."""
    assert eventually(lambda: len(process_ids(folder)) == NUM_PROCESSES, BEGIN_WITHIN_S)


def process_ids(folder: Path) -> list[int]:
    """List the processes of a fake server."""
    return [int(path.name) for path in folder.iterdir()]


def running(folder: Path) -> list[int]:
    """List the processes of a fake server that have not ended."""
    found = []
    for pid in process_ids(folder):
        with suppress(psutil.NoSuchProcess):
            if is_running(psutil.Process(pid)):
                found.append(pid)
    return found
