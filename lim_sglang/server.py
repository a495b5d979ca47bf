"""A SGLang server as a child process: its command line, its proof of life, its end."""

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import psutil
import requests

from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.errors import ServerError
from lim_sglang.validation import BACKEND, reasons_against_environment

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


POLL_S = 0.5
HEALTH_TIMEOUT_S = 5.0
INFO_TIMEOUT_S = 30.0
START_TIMEOUT_S = 1800.0
"""A first start on a GPU may compile kernels and download weights."""
GRACE_S = 3.0
"""How long SGLang may take to end by itself before the whole tree is killed."""

CPU_DEFAULTS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--max-total-tokens", "40960", "--max-running-requests", "32"),
)
"""A CPU server's options: exact arithmetic, and a KV cache that fits into a small machine."""


@dataclass(frozen=True)
class ServerOptions:
    """What is served, where, and with which further options of SGLang."""

    model: str
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    on_cpu: bool = True
    backend: str = BACKEND
    """The attention backend of decode: ours, or one of SGLang's to compare with."""
    lim_flags: tuple[str, ...] = ()
    sglang_options: tuple[str, ...] = ()
    """Passed on as they are; they win over everything above."""

    def command_line(self) -> list[str]:
        """The arguments that start SGLang's server."""
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        command += ["--host", self.host, "--port", str(self.port)]
        command += [*(CPU_DEFAULTS if self.on_cpu else ()), "--attention-backend", self.backend]
        command += ["--api-key", self.api_key] if self.api_key else []
        return [*command, *self.lim_flags, *self.sglang_options]

    def environment(self) -> dict[str, str]:
        """The environment of SGLang's processes."""
        return dict(os.environ) | ({CPU_ENGINE_VAR: "1"} if self.on_cpu else {})

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def reasons_against_start(
    host: str, port: int, sglang_options: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Why a server cannot be started so, one line each; SGLang's own process may add more."""
    reasons = reasons_against_environment(environment)
    decode = _decode_backend(sglang_options)
    if decode != BACKEND:
        reasons.append(
            f"decode would be served by {decode}: leave --attention-backend and "
            f"--decode-attention-backend out, or use `sglang serve` for a server without {BACKEND}"
        )
    problem = _problem_with(host, port)
    return [*reasons, problem] if problem else reasons


class Server:
    """A running server. As a context manager it is started, proved to be as asked, and stopped."""

    def __init__(self, options: ServerOptions, *, log: int | None = None) -> None:
        """`log`: a file descriptor for SGLang's output; None shows it as it comes."""
        self.options = options
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy can reach this machine's own addresses
        if options.api_key:
            self._http.headers["Authorization"] = f"Bearer {options.api_key}"

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where to send requests."""
        return self.options.url

    def start(self) -> None:
        """Start SGLang in a process group of its own."""
        self._process = subprocess.Popen(
            self.options.command_line(),
            env=self.options.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the first answer and return what the server says of LessIsMore.

        Raises:
            ServerError: it ended, took too long, or decodes by another backend.
        """
        deadline = time.monotonic() + timeout_s
        while not self._is_healthy():
            code = self.poll()
            if code is not None:
                raise StartError(code)
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready after {timeout_s:.0f} s; it was ended")
            time.sleep(POLL_S)
        return self.prove()

    def prove(self) -> dict[str, Any]:
        """What `/server_info` shows under `lim`; nothing where a dense server was asked for.

        Raises:
            ServerError: another backend decodes than the one that was asked for.
        """
        try:
            answer = self._http.get(f"{self.url}/server_info", timeout=INFO_TIMEOUT_S).json()
        except requests.RequestException as error:
            raise ServerError(
                f"the server went away before it said what it serves ({type(error).__name__})"
            ) from None
        live = lim_state(answer)
        if self.options.backend != BACKEND:
            if live is not None or (found := decode_backend(answer)) != self.options.backend:
                raise ServerError(
                    f"the server decodes by {BACKEND if live else found}, asked for was "
                    f"{self.options.backend}, so it was ended: leave other backends out of its "
                    "options"
                )
            return {}
        if live is None:
            raise ServerError(
                "the server decodes without LessIsMore, so it was ended: "
                "run `lim doctor` to see what keeps the plugin from loading"
            )
        return live

    def poll(self) -> int | None:
        """The exit code of SGLang's main process; None while it runs."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """End SGLang and everything that it started; SGLang's own shutdown can hang."""
        if self._process is None:
            return
        # Nobody who is impatient shall leave a server behind, nor be overheard.
        noted: list[int] = []
        with on_signals(lambda number, _: noted.append(number)):
            self._end(self._process)
        for number in noted[:1]:
            signal.raise_signal(number)

    @staticmethod
    def _end(main: "subprocess.Popen[bytes]") -> None:
        processes = _tree(main.pid)
        if main.poll() is None:
            main.send_signal(signal.SIGTERM)
            psutil.wait_procs(processes, timeout=GRACE_S)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ProcessLookupError):  # what a process that died before has left behind
            os.killpg(main.pid, signal.SIGKILL)
        main.wait()
        psutil.wait_procs(processes, timeout=GRACE_S)

    def _is_healthy(self) -> bool:
        try:
            answer = self._http.get(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S)
        except requests.RequestException:
            return False
        return answer.ok


class StartError(ServerError):
    """SGLang's process ended before it served; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"the server ended with code {code} before it was ready: see its log")


def lim_state(server_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `/server_info` shows of LessIsMore; None where it is not live."""
    states = server_info.get("internal_states") or [{}]
    live: dict[str, Any] | None = states[0].get(BACKEND)
    return live


def decode_backend(server_info: Mapping[str, Any]) -> str | None:
    """The attention backend of decode that `/server_info` names."""
    found: str | None = server_info.get("decode_attention_backend")
    return found or server_info.get("attention_backend")


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _decode_backend(sglang_options: Sequence[str]) -> str:
    """The decode backend after the user's options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--attention-backend", default=BACKEND)
    parser.add_argument("--decode-attention-backend")
    found, _ = parser.parse_known_args(sglang_options)
    backend: str = found.decode_attention_backend or found.attention_backend
    return backend


def _problem_with(host: str, port: int) -> str | None:
    """Why nothing can listen there, None where it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} of {host} is in use: choose another --port"
            return f"cannot listen on {host}, port {port} ({error.strerror}): choose other ones"
    return None
