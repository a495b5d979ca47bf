"""A SGLang server as a child process: its options, start, proof of life, log and end."""

import argparse
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import httpx
import psutil
from rich.console import Console
from rich.text import Text

from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.config import CONFIG_VAR, lim_state
from lim_sglang.errors import DataError, RefusedError, ServerError
from lim_sglang.flags import reasons_against_settings
from lim_sglang.models import check_model, default_model, has_gpu
from lim_sglang.validation import BACKEND, reasons_against_environment

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a service manager, a closed terminal."""
POLL_S = 0.5
"""Pause between two health checks of a server that starts."""
HEALTH_TIMEOUT_S = 5.0
INFO_TIMEOUT_S = 30.0
START_TIMEOUT_S = 1800.0
"""A first start on a GPU may compile kernels and download weights."""
GRACE_S = 3.0
"""Time that SGLang has to end by itself before the whole process tree is killed."""
LOG_POLL_S = 1.0
"""Pause between two looks at the log of a server that starts."""
LOG_TAIL_BYTES = 2000
"""The part of a log that an error quotes."""

CPU_DEFAULTS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--max-total-tokens", "40960", "--max-running-requests", "32"),
)
"""Options of a CPU server: exact arithmetic, and a KV cache that fits into a small machine."""

RESERVED_OPTIONS: Mapping[str, str] = {
    "--model-path": "lim sets it from the model that is named before the --",
    "--model": "lim sets it from the model that is named before the --",
    "--host": "lim sets it, in lim serve from --host before the --",
    "--port": "lim sets it, in lim serve from --port before the --",
    "--api-key": "lim sets it from --api-key before the --",
    "--ssl-certfile": "put a proxy that speaks TLS in front",
    "--ssl-keyfile": "put a proxy that speaks TLS in front",
}
"""SGLang options that `lim` sets itself, or that would hide the server from its health check."""


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle the `STOPPING` signals until the block ends: else a server would outlive us.

    Ignored signals stay ignored, as under nohup. In a thread nothing changes: it gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    handled = [number for number in STOPPING if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


@dataclass(frozen=True)
class ServerOptions:
    """Model, address and options of a server, ready to start."""

    model: str
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    on_cpu: bool = True
    backend: str = BACKEND
    """The attention backend of decode: ours, or one of SGLang's to compare with."""
    lim_flags: tuple[str, ...] = ()
    sglang_options: tuple[str, ...] = ()
    """Passed on to SGLang as they are; they win over everything above."""

    def command_line(self) -> list[str]:
        """Return the command that starts SGLang's server."""
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        command += ["--host", self.host, "--port", str(self.port)]
        command += [*(CPU_DEFAULTS if self.on_cpu else ()), "--attention-backend", self.backend]
        command += ["--api-key", self.api_key] if self.api_key else []
        return [*command, *self.lim_flags, *self.sglang_options]

    def environment(self) -> dict[str, str]:
        """Return the environment of SGLang's processes."""
        return dict(os.environ) | ({CPU_ENGINE_VAR: "1"} if self.on_cpu else {})

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True)
class ServerSpec:
    """A server as a user asks for it."""

    model: str | None
    """Folder or hub id; None for the default of this machine."""
    lim_flags: Mapping[str, str] = field(default_factory=dict)
    """`--lim-policy`, `--lim-budget`, … and their values, as `lim serve` has them."""
    sglang_options: tuple[str, ...] = ()
    """Passed on to SGLang."""
    api_key: str | None = None

    def __str__(self) -> str:
        flags = " ".join(f"{flag} {text}" for flag, text in self.lim_flags.items())
        return f"{self.model or 'the default model'} {flags}".rstrip()


def server_options(spec: ServerSpec, *, host: str = "127.0.0.1", port: int) -> ServerOptions:
    """Check a server's specification, find its model and choose GPU or CPU.

    Raises:
        RefusedError: no server can be started so, with all reasons.
        ModelError: the model does not exist or cannot be fetched.
    """
    # Before a model is fetched: nobody waits for a download that ends in a refusal.
    reasons = [
        f"{option} after --: {RESERVED_OPTIONS[option]}"
        for option in (word.split("=")[0] for word in spec.sglang_options)
        if option in RESERVED_OPTIONS
    ]
    reasons += reasons_against_start(host, port, spec.sglang_options, os.environ)
    reasons += reasons_against_settings(os.environ.get(CONFIG_VAR), spec.lim_flags)
    if spec.api_key == "":
        reasons.append("the API key is empty: leave it out, or give one that clients must send")
    if reasons:
        raise RefusedError(reasons)
    on_cpu = not has_gpu() or _read_option(spec.sglang_options, "--device") == "cpu"
    return ServerOptions(
        model=check_model(spec.model) if spec.model else default_model(on_cpu=on_cpu),
        host=host,
        port=port,
        api_key=spec.api_key,
        on_cpu=on_cpu,
        # One word a flag, so that a value such as "" or "-1" stays with its flag.
        lim_flags=tuple(f"{flag}={text}" for flag, text in spec.lim_flags.items()),
        sglang_options=spec.sglang_options,
    )


def reasons_against_start(
    host: str, port: int, sglang_options: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """List the reasons why no server can be started so; SGLang's own process may add more."""
    reasons = reasons_against_environment(environment)
    decode = _read_option(sglang_options, "--decode-attention-backend")
    decode = decode or _read_option(sglang_options, "--attention-backend") or BACKEND
    if decode != BACKEND:
        reasons.append(
            f"decode would be served by {decode}: leave --attention-backend and "
            f"--decode-attention-backend out, or use `sglang serve` for a server without {BACKEND}"
        )
    return reasons + _reasons_against_address(host, port)


def _read_option(sglang_options: Sequence[str], name: str) -> str | None:
    """Return the value of one option, as SGLang's parser would read it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name, nargs="?", dest="value")
    value: str | None = parser.parse_known_args(sglang_options)[0].value
    return value


def _reasons_against_address(host: str, port: int) -> list[str]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return [f"port {port} of {host} is in use: choose another --port"]
            return [f"cannot listen on {host}, port {port} ({error.strerror}): choose other ones"]
    return []


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class StartError(ServerError):
    """SGLang's process ended before it served; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"the server ended with code {code} before it was ready: see its log")


class Server:
    """A SGLang server. The context manager starts it, checks its decode backend, and stops it."""

    def __init__(self, options: ServerOptions, *, log: int | None = None) -> None:
        """Prepare a server.

        Args:
            log: file descriptor for SGLang's output; None for ours.
        """
        self.options = options
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._http = local_client(options.url, options.api_key)

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
        """The address for requests."""
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
        """Wait until the server is healthy; return LessIsMore's part of `/server_info`.

        Raises:
            ServerError: the server ended, took too long, or decodes by another backend.
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
        """Return LessIsMore's part of `/server_info`; an empty one if a dense server was asked for.

        Raises:
            ServerError: another backend decodes than the one that was asked for.
        """
        try:
            answer = self._http.get("/server_info", timeout=INFO_TIMEOUT_S).json()
        except (httpx.HTTPError, ValueError) as error:
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
        """Return the exit code of SGLang's main process; None while it runs."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """End SGLang and everything that it started; SGLang's own shutdown can hang."""
        self._http.close()
        if self._process is None:
            return
        # A signal must neither interrupt the end, which would leave a server behind, nor get lost.
        received: list[int] = []
        with on_signals(lambda number, _: received.append(number)):
            self._end(self._process)
        for number in received[:1]:
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
        with suppress(ProcessLookupError):  # children whose parent died before
            os.killpg(main.pid, signal.SIGKILL)
        main.wait()
        psutil.wait_procs(processes, timeout=GRACE_S)

    def _is_healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=HEALTH_TIMEOUT_S).is_success
        except httpx.HTTPError:
            return False


def local_client(url: str, api_key: str | None = None, timeout_s: float = 5.0) -> httpx.Client:
    """Return a client of a server on this machine, which the environment's proxies cannot reach."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    return httpx.Client(base_url=url, trust_env=False, headers=headers, timeout=timeout_s)


def _tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def decode_backend(server_info: Mapping[str, Any]) -> str | None:
    """Return the attention backend of decode that `/server_info` names."""
    found: str | None = server_info.get("decode_attention_backend")
    return found or server_info.get("attention_backend")


@contextmanager
def serving(spec: ServerSpec, console: Console, log: Path | None = None) -> Iterator[str]:
    """Serve until the block ends; yield the address. See `running_server`.

    Raises:
        RefusedError: no server can be started so.
        ModelError: the model does not exist or cannot be fetched.
    """
    options = server_options(spec, port=free_port())
    with running_server(options, console, title=str(spec), log=log) as server:
        yield server.url


@contextmanager
def running_server(
    options: ServerOptions, console: Console, *, title: str, log: Path | None = None
) -> Iterator[Server]:
    """Run a server until the block ends; yield it when it is ready and decodes by its backend.

    The server and its children end with the block, also by Ctrl-C, SIGTERM and SIGHUP.

    Args:
        console: shows the progress of the start.
        title: names the server there.
        log: file for SGLang's output; by default a temporary one, kept only if the server fails.

    Raises:
        ServerError: the server did not start, or the block raised this error because it broke down
            later; the end of the log is added.
        DataError: the log cannot be written.
    """
    with _log_file(log) as path, path.open("wb") as file, on_signals(signal.default_int_handler):
        server = Server(options, log=file.fileno())
        try:
            server.start()
            with _start_shown(title, path, console):
                server.wait_until_ready()
            yield server
        except ServerError as error:
            tail = log_tail(path).strip() or "(which is empty)"
            raise ServerError(f"{error} (log: {path})\n{tail}") from None
        finally:
            server.stop()


@contextmanager
def _log_file(wanted: Path | None) -> Iterator[Path]:
    """Make an empty file. A temporary one is removed, unless the block raises a `ServerError`."""
    try:
        if wanted:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            wanted.write_bytes(b"")
        else:
            handle, name = tempfile.mkstemp(prefix="lim-server-", suffix=".log")
            os.close(handle)
    except OSError as error:
        where = wanted or tempfile.gettempdir()
        raise DataError(f"cannot write a server's log to {where} ({error.strerror})") from None
    path = wanted or Path(name)
    is_kept = wanted is not None
    try:
        yield path
    except ServerError:
        is_kept = True
        raise
    finally:
        if not is_kept:
            path.unlink(missing_ok=True)


@contextmanager
def _start_shown(title: str, log: Path, console: Console) -> Iterator[None]:
    """Show a log's newest line until the block ends; on no terminal, say once what starts."""
    opening = f"Starting a server: {title}"
    began_s = time.monotonic()
    if console.is_terminal:
        with _log_followed(opening, log, console):
            yield
    else:
        console.print(opening, markup=False, highlight=False, soft_wrap=True)
        yield
    took_s = time.monotonic() - began_s
    console.print(f"The server is ready after {took_s:.0f} s", highlight=False)


@contextmanager
def _log_followed(opening: str, log: Path, console: Console) -> Iterator[None]:
    ended = threading.Event()
    # As Text: a log may hold what looks like markup.
    with console.status(Text(opening)) as status:

        def follow() -> None:
            while not ended.wait(LOG_POLL_S):
                line = Text(f"\n  {newest_line(log)}", style="dim", no_wrap=True)
                line.truncate(console.width, overflow="ellipsis")
                status.update(Text(opening) + line)

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def newest_line(log: Path) -> str:
    """Return the last line with text, without colours; of a progress bar the last state."""
    lines = re.split(r"[\r\n]+", log_tail(log))
    found = (Text.from_ansi(line).plain.strip() for line in reversed(lines))
    return next(filter(None, found), "")


def log_tail(log: Path) -> str:
    """Return the last `LOG_TAIL_BYTES` of a log as text, also while the log is written."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
