"""Whatever is killed, all of a server's processes and files go: with fake SGLang processes."""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from lim_sglang.errors import errors_in_words
from lim_sglang.launch import serve, supervisor
from lim_sglang.launch.server import Server, free_port
from lim_sglang.launch.supervisor import Ending, ServerFolder, is_running
from tests.fakes.sglang_process import NUM_PROCESSES
from tests.fakes.sglang_server import eventually
from tests.server.fake_servers import (
    fake_options,
    fake_spec,
    process_ids,
    running,
    wait_until_begun,
)

GONE_WITHIN_S = 10.0
KILLED = "was killed by signal 9 (SIGKILL)"


class Fake:
    """A forked `lim serve` and all processes of its server, which is ready."""

    def __init__(self, folder: Path, *, forks: bool = False) -> None:
        self.folder, self.error = folder, folder.parent / "stderr"
        self.error.touch()
        self.lim = os.fork()
        if self.lim == 0:
            serve_in_this_process(folder, self.error, forks=forks)
        self.code: int | None = None
        wait_until_begun(folder)
        assert eventually(self.is_watched, 10)
        tree = psutil.Process(self.lim).children(recursive=True)
        self.pids = {"lim": self.lim} | {name(process): process.pid for process in tree}

    def is_watched(self) -> bool:
        """Return True if the server is ready and the supervisor watches both children of SGLang."""
        if "ready" not in self.error.read_text():
            return False
        for process in psutil.Process(self.lim).children():
            if name(process) == "supervisor":
                folder = f"/proc/{process.pid}/fd"
                links = []
                for number in os.listdir(folder):
                    with suppress(FileNotFoundError):  # closed meanwhile
                        links.append(os.readlink(f"{folder}/{number}"))
                return links.count("anon_inode:[pidfd]") == 2
        return False

    def kill(self, *victims: str) -> None:
        """Send SIGKILL to processes by name; none acts while the others are killed."""
        for each in (signal.SIGSTOP, signal.SIGKILL):
            for victim in victims:
                os.kill(self.pids[victim], each)

    def is_gone(self) -> bool:
        """Return True if no process is left; take note of the exit code of `lim serve`."""
        if self.code is None:
            pid, status = os.waitpid(self.lim, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None and not running(self.folder) and not self.is_supervised()

    def is_supervised(self) -> bool:
        """Return True if the supervisor runs."""
        with suppress(psutil.NoSuchProcess):
            return is_running(psutil.Process(self.pids["supervisor"]))
        return False


def serve_in_this_process(folder: Path, error: Path, *, forks: bool) -> NoReturn:
    """Run `lim serve` with a fake SGLang, and end.

    Args:
        forks: once SGLang is started, leave a child that has whatever its parent has open.
    """
    os.setsid()
    start = Server.start

    def start_and_fork(server: Server) -> None:
        start(server)
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)

    Server.start = start_and_fork if forks else start  # type: ignore[method-assign]
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    os.dup2(os.open(error, os.O_CREAT | os.O_WRONLY), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    code = 0
    try:
        options = fake_options(fake_spec(folder), port=free_port())
        with errors_in_words():
            serve._run(options, "tiny", verbose=False)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def name(process: psutil.Process) -> str:
    """Return the name of a process of a fake server."""
    words = " ".join(process.cmdline())
    names = ("lim_sglang.launch.supervisor", "sglang::scheduler", "sglang::detokenizer")
    found = next((name for name in names if name in words), "main")
    return re.split(r"[.:]+", found)[-1]


@pytest.mark.parametrize(
    ("victims", "words"),
    [
        (["lim"], None),
        (["main"], f"the server is gone: SGLang's main process {KILLED}"),
        (["scheduler"], f"the server is gone: SGLang's scheduler (process {{scheduler}}) {KILLED}"),
        (
            ["detokenizer"],
            f"the server is gone: SGLang's detokenizer (process {{detokenizer}}) {KILLED}",
        ),
        (["supervisor"], "the server is gone: SGLang's supervisor died"),
        (["detokenizer", "lim"], None),
    ],
)
def test_whoever_is_killed_takes_all_others_along_and_no_file_is_left(
    folder: Path,
    temporary: Path,
    victims: list[str],
    words: str | None,
) -> None:
    fake = Fake(folder)
    fake.kill(*victims)
    assert eventually(fake.is_gone, GONE_WITHIN_S)
    assert eventually(lambda: not list(temporary.iterdir()), 1)
    if words:
        assert words.format(**fake.pids) in fake.error.read_text()
        assert "`dmesg` names the processes" in fake.error.read_text()
        assert "Traceback" not in fake.error.read_text()
        assert fake.code == 1


def test_a_process_that_the_owner_forked_does_not_keep_the_server_alive(
    folder: Path,
) -> None:
    fake = Fake(folder, forks=True)
    children = psutil.Process(fake.lim).children()
    [sleeper] = [child for child in children if child.pid != fake.pids["supervisor"]]
    fake.kill("lim")
    assert eventually(fake.is_gone, GONE_WITHIN_S)
    assert sleeper.is_running()
    sleeper.kill()


def test_after_the_death_of_all_the_next_start_removes_the_files_of_dead_servers_only(
    folder: Path,
    temporary: Path,
) -> None:
    living = ServerFolder.make()
    fake = Fake(folder)
    fake.kill("supervisor", "main", "scheduler", "detokenizer", "lim")
    assert eventually(fake.is_gone, GONE_WITHIN_S)
    [dead] = set(temporary.iterdir()) - {living.path}
    shared = [Path("/dev/shm", f"{dead.name}-{pid}") for pid in process_ids(folder)]
    assert len([path for path in shared if path.exists()]) == NUM_PROCESSES
    new = ServerFolder.make()
    assert set(temporary.iterdir()) == {living.path, new.path}
    assert not [path for path in shared if path.exists()]
    for each in (living, new):
        each.remove()


@pytest.mark.parametrize(("length", "is_used"), [(52, True), (53, False)])
def test_sockets_have_room_for_their_paths(
    monkeypatch: pytest.MonkeyPatch, length: int, is_used: bool
) -> None:
    base = "/tmp/".ljust(length, "x")
    monkeypatch.setattr("tempfile.tempdir", base)
    assert supervisor._base() == Path(base if is_used else "/tmp")


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (Ending(2), "the server ended with code 2"),
        (Ending(137), f"SGLang's main process {KILLED}"),
        (Ending(128 + 40), "SGLang's main process was killed by signal 40"),
        (Ending(137, "scheduler (process 7)"), "SGLang's scheduler (process 7) died"),
        (Ending(0, "scheduler (process 7)", 137), f"SGLang's scheduler (process 7) {KILLED}"),
        (
            Ending(137, "scheduler (process 7)", 1),
            "SGLang's scheduler (process 7) ended with exit code 1",
        ),
    ],
)
def test_an_ending_is_said_in_words_and_crosses_the_socket(ending: Ending, words: str) -> None:
    assert str(ending) == words
    assert Ending.from_json(ending.to_json()) == ending


def test_a_lack_of_memory_is_named_where_a_process_was_killed_or_its_end_is_not_known() -> None:
    hinted = (Ending(137), Ending(0, "scheduler", 137), Ending(0, "scheduler"))
    assert all("`dmesg`" in each.hint for each in hinted)
    assert not any(each.hint for each in (Ending(1), Ending(137, "scheduler", 1)))


def test_how_a_process_ended_is_known_until_its_parent_asks() -> None:
    child = os.fork()
    if child == 0:
        os._exit(3)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert supervisor._code_of_zombie(child) == 3
    os.waitpid(child, 0)
    assert supervisor._code_of_zombie(child) is None
    assert supervisor._code_of_zombie(os.getpid()) is None
