"""The process between `lim` and SGLang, and the files of a server: all end with their owner.

The owner, a `lim` command, holds one end of a socket. When that end closes, by a call or by the
owner's death, the supervisor ends SGLang's whole tree and removes the server's folder. When a
process of SGLang dies, the supervisor ends the others and tells the owner which one that was. It
loads nothing of SGLang and stays at 20 MB.
"""

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from lim_sglang.errors import DataError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a service manager, a closed terminal."""
TICK_S = 0.2
"""Pause between two looks at SGLang's main process; the owner's end is noticed at once."""
LOOK_S = 1.0
"""Pause between two searches for further processes of SGLang."""
KILLED_WITHIN_S = 10.0
"""Time that the system has to remove killed processes."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of Linux's `prctl`: a signal at the parent's death; orphans of the tree become ours."""

PREFIX = "lim-server-"
LOG_NAME = "server.log"
SOCKET_ROOM = 35
"""Bytes that SGLang's processes append to the folder to name a socket, such as zmq's `/tmpabcdefgh`
and multiprocessing's `/pymp-abcdefgh/listener-abcdefgh`."""
MAX_SOCKET_PATH = 107
"""Bytes that Linux allows for the path of a Unix socket."""
SHARED_MEMORY = Path("/dev/shm")
OUT_OF_MEMORY = (
    "if nobody killed it, memory has most likely run out: `dmesg` names the processes that Linux "
    "killed for it"
)
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class ServerFolder:
    """The folder of one server's temporary files; a lock on it says that the server lives."""

    path: Path
    lock: int
    """File descriptor: the folder is locked while the owner or the supervisor has it open."""

    @classmethod
    def make(cls) -> Self:
        """Make and lock a folder, where sockets can have their paths; remove those of dead servers.

        Raises:
            DataError: no folder can be made.
        """
        try:
            base = _base()
            remove_stale_folders(base)
            while True:
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
                lock = _locked(path)
                if lock is not None:  # else another server's start took it for a dead server's
                    return cls(path, lock)
        except OSError as error:
            raise DataError(
                f"a server's temporary files cannot be kept ({error}): let TMPDIR name a folder of "
                "a local disk that can be written"
            ) from None

    @property
    def log(self) -> Path:
        """The file for SGLang's output, unless the user names another one."""
        return self.path / LOG_NAME

    def remove(self) -> None:
        """Remove the folder, and unlock it."""
        remove_files(self.path)
        with suppress(OSError):
            os.close(self.lock)


def _base() -> Path:
    """Return the folder of temporary files, or `/tmp` where the former's path is too long."""
    base = Path(tempfile.gettempdir())
    longest = MAX_SOCKET_PATH - SOCKET_ROOM - len(f"/{PREFIX}abcdefgh")
    return base if len(os.fsencode(base)) <= longest else Path("/tmp")


def _locked(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None if another process has it, or it is gone.

    Raises:
        OSError: the folder cannot be locked; one that is empty is removed.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()
        raise
    os.close(lock)
    return None


def remove_stale_folders(base: Path) -> None:
    """Remove the folders of this user's servers that nothing holds any more: all were killed."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            is_ours = folder.lstat().st_uid == os.getuid()
            if is_ours and (lock := _locked(folder)) is not None:
                ServerFolder(folder, lock).remove()


def remove_files(folder: Path) -> None:
    """Remove a server's folder, and what its processes left in shared memory under its name."""
    with suppress(OSError):
        for entry in SHARED_MEMORY.glob(f"*{folder.name}-*"):
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Ending:
    """The end of a server that ended by itself."""

    code: int
    """Exit code of SGLang's main process; 128 + n after signal n."""
    dead: str | None = None
    """The process of SGLang whose death ended the others."""
    dead_code: int | None = None
    """Exit code of that process, as `code`; None: not known."""

    def __str__(self) -> str:
        if self.dead:
            return f"SGLang's {self.dead} {_way_to_end(self.dead_code)}"
        if self.code > 128:
            return f"SGLang's main process {_way_to_end(self.code)}"
        return f"the server ended with code {self.code}"

    @property
    def hint(self) -> str:
        """Advice where SIGKILL, or nothing known, ended a process; else empty."""
        code = self.dead_code if self.dead else self.code
        return OUT_OF_MEMORY if code in (None, 128 + signal.SIGKILL) else ""

    def to_json(self) -> str:
        """Return one line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def _way_to_end(code: int | None) -> str:
    """Return how a process ended, by its exit code, which is 128 + n after signal n."""
    if code is None:
        return "died"
    if code <= 128:
        return f"ended with exit code {code}"
    number, name = code - 128, ""
    with suppress(ValueError):  # a real-time signal
        name = f" ({signal.Signals(number).name})"
    return f"was killed by signal {number}{name}"


def supervision(command: Sequence[str], link: int, folder: Path, grace_s: float) -> list[str]:
    """Return the command line of a supervisor.

    Args:
        command: starts SGLang.
        link: descriptor of the supervisor's end of the socket.
        grace_s: time that SGLang has to end by itself before its tree is killed.
    """
    own = [str(link), str(folder), str(grace_s)]
    return [sys.executable, "-m", "lim_sglang.launch.supervisor", *own, *command]


def main(link: str, folder: str, grace_s: str, *command: str) -> None:
    """Start SGLang and watch it; return when nothing of the server is left."""
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    owner = socket.socket(fileno=int(link))
    tree = Tree(command)
    ending = tree.watch(owner)
    tree.end(float(grace_s))
    if ending is not None:
        with suppress(OSError):
            owner.sendall(Ending(tree.code, ending or None, tree.dead_code).to_json().encode())
            owner.recv(1)  # until the owner has read the log
    remove_files(Path(folder))


class Tree:
    """SGLang's processes, all of them descendants of this one."""

    def __init__(self, command: Sequence[str]) -> None:
        self.code = 0
        self.dead_code: int | None = None
        """Exit code of the member that died; None: none did, or its parent was quicker to ask."""
        self._has_ended = False
        self._is_asked_to_stop = False
        for number in STOPPING:
            signal.signal(number, self._stop)
        # This process has one thread, at whose end the kernel sends the signal.
        self._main = subprocess.Popen(command, preexec_fn=die_with(os.getpid())).pid
        self._members: dict[int, tuple[str, int]] = {}
        """Descriptor -> name and id of each process that SGLang keeps as long as it serves."""
        self._known: set[int] = set()
        self._searched_s = 0.0

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._is_asked_to_stop = True

    def watch(self, owner: socket.socket) -> str | None:
        """Wait until the tree must end.

        Returns:
            None if the owner closed its end or died, or a signal asked to stop; the name of the
            member that died; an empty text if SGLang's main process ended.
        """
        while not self._is_asked_to_stop:
            ready = select.select([owner.fileno(), *self._members], [], [], TICK_S)[0]
            if owner.fileno() in ready:
                return None
            if ready:
                name, pid = self._members[ready[0]]
                code = _code_of_zombie(pid)
                time.sleep(TICK_S)  # a main process ends its children as well: which was first?
            self._reap()
            if self._has_ended:
                return ""
            if ready:
                self.dead_code = code
                return f"{name} (process {pid})"
            self._find_members()
        return None

    def _find_members(self) -> None:
        """Open each lasting process of SGLang: the descriptor becomes readable when it dies."""
        if time.monotonic() - self._searched_s < LOOK_S:
            return
        self._searched_s = time.monotonic()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):  # it has ended, or the system has no pidfd
                name = _member_name(process.cmdline())
                if name and process.pid not in self._known:
                    self._members[os.pidfd_open(process.pid)] = name, process.pid
                    self._known.add(process.pid)

    def end(self, grace_s: float) -> None:
        """End all processes: after some grace they are killed, until none is left."""
        if not self._has_ended:
            with suppress(ProcessLookupError):
                os.kill(self._main, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while left := list(self._running()):
            if time.monotonic() > deadline_s + KILLED_WITHIN_S:
                return  # in the kernel, such as a driver that hangs
            if time.monotonic() > deadline_s:
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            time.sleep(0.02)

    def _running(self) -> Iterator[psutil.Process]:
        self._reap()
        return filter(is_running, psutil.Process().children(recursive=True))

    def _reap(self) -> None:
        """Take note of all children that have ended, orphans of the tree among them."""
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self._main:
                    self.code = _shell_code(found[1])
                    self._has_ended = True


def _shell_code(status: int) -> int:
    """Return the exit code of a wait status, 128 + n after signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _code_of_zombie(pid: int) -> int | None:
    """Return the exit code of a process that need not be our child, from the last field of its
    `/proc/PID/stat`; None if it runs, or its parent has already asked for the code.
    """
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            return _shell_code(int(fields[-1]))
    return None


def _member_name(command_line: Sequence[str]) -> str | None:
    """Return the name of a process that SGLang keeps as long as it serves, None for others."""
    text = " ".join(command_line)
    if text.startswith("sglang::"):
        return text.removeprefix("sglang::").split()[0]
    return "resource tracker" if "multiprocessing.resource_tracker" in text else None


def is_running(process: psutil.Process) -> bool:
    """Return True unless a process has ended or is a zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def die_with(parent: int) -> Callable[[], None]:
    """Return a function for a new process: the kernel kills it when its parent dies."""

    def prepare() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # which has died before
            os._exit(1)

    return prepare


if __name__ == "__main__":
    main(*sys.argv[1:])
