"""A SGLang server as a child process: its options, start, proof of life, log and end."""

import argparse
import errno
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import IO, Any
from weakref import WeakSet

import httpx
from rich.console import Console

from lim_sglang.compat import CPU_ENGINE_VAR, SGLANG_VERSION, reasons_against_version
from lim_sglang.config import (
    BACKEND,
    CONFIG_VAR,
    SERVER_VAR,
    ModelShape,
    lim_state,
    read_preset,
    server_name,
    with_preset,
)
from lim_sglang.errors import REFUSED, ConfigError, DataError, RefusedError, ServerError
from lim_sglang.flags import (
    CONFIG_FLAG,
    FLAGS,
    option_names,
    read_settings,
    reasons_against_words,
)
from lim_sglang.launch.server_log import cause_of_failure, ended_itself, keep_log, start_shown
from lim_sglang.launch.supervisor import STOPPING, Ending, ServerFolder, supervision
from lim_sglang.models import (
    GPUS_VAR,
    check_model,
    default_model,
    has_gpu,
    known_context,
    known_shape,
    lasting_caches,
)
from lim_sglang.policies.lossless import Lossless
from lim_sglang.validation import reasons_against_environment

POLL_S = 0.5
"""Pause between two health checks of a server that starts."""
HEALTH_TIMEOUT_S = 5.0
INFO_TIMEOUT_S = 30.0
START_TIMEOUT_S = 1800.0
"""A first start on a GPU may compile kernels and download weights."""
GRACE_S = 3.0
"""Time that SGLang has to end by itself before the whole process tree is killed."""
TOLD_WITHIN_S = 6.0
"""Time that a server which seems gone has to end, so that its ending can be told."""
STARTING = 503
"""HTTP status of SGLang's `/health` while SGLang starts."""

CPU_DEFAULTS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--max-total-tokens", "40960", "--max-running-requests", "32", "--sleep-on-idle"),
)
"""Options of a CPU server: exact arithmetic, a KV cache that fits into a small machine, and no core
that is kept busy without requests."""

CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Defaults of a CPU server. SGLang binds one thread to each core, and these spin while they wait
for each other: with any other work on a core, a step takes up to ten times as long. Threads that
sleep cost 10 to 65 % of a step on idle cores."""

RESERVED_OPTIONS: Mapping[str, str] = {
    "--model-path": "lim sets it from the model that is named before the --",
    "--model": "lim sets it from the model that is named before the --",
    "--host": "lim sets it, in lim serve from --host before the --",
    "--port": "lim sets it: lim serve from --port before the --, others to a port that is free",
    "--api-key": "lim sets it from --api-key before the --",
    "--help": "`python -m sglang.launch_server --help` shows SGLang's options",
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
    cores: tuple[int, ...] = ()
    """The processor's cores that the server may use; empty: all."""
    gpus: str | None = None
    """The server's part of the GPUs, as `CUDA_VISIBLE_DEVICES` has them; None: all."""

    def command_line(self) -> list[str]:
        """Return the command that starts SGLang's server."""
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        command += ["--host", self.host, "--port", str(self.port)]
        command += [*(CPU_DEFAULTS if self.on_cpu else ()), "--attention-backend", self.backend]
        command += ["--api-key", self.api_key] if self.api_key else []
        return [*command, *self.lim_flags, *self.sglang_options]

    def environment(self) -> dict[str, str]:
        """Return the environment of SGLang's processes."""
        defaults = lasting_caches() | (CPU_ENVIRONMENT if self.on_cpu else {})
        ours = {CPU_ENGINE_VAR: "1"} if self.on_cpu else {}
        ours |= {GPUS_VAR: self.gpus} if self.gpus else {}
        return defaults | dict(os.environ) | ours

    def use_own_cores(self) -> None:
        """Keep this process and those that it starts on the server's cores."""
        os.sched_setaffinity(0, self.cores)

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
    max_tokens: int | None = None
    """New tokens that requests will ask for; None: not known."""

    def title(self, options: "ServerOptions") -> str:
        """Return the model's name and the flags, for people.

        Args:
            options: made from this specification; names the default model.
        """
        model = self.model or (Path(options.model).name if options.on_cpu else options.model)
        flags = (f"{flag} {text}" for flag, text in self.lim_flags.items())
        return " ".join([model, *flags])

    def lim_settings(self) -> dict[str, Any] | None:
        """Return LessIsMore's settings as the server will state them; None where they are not known
        before the start: SGLang's options may change them, and wrong ones are told at the start.
        """
        config, _ = read_settings(os.environ.get(CONFIG_VAR), self.lim_flags)
        return None if config is None or self.sglang_options else config.settings()


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
    reasons += reasons_against_version("sglang", SGLANG_VERSION)
    reasons += _unknown_options(spec.sglang_options)
    on_cpu = not has_gpu() or _read_option(spec.sglang_options, "--device") == "cpu"
    config, wrong = read_settings(os.environ.get(CONFIG_VAR), spec.lim_flags)
    is_lossless = config is not None and isinstance(config.make_policy(), Lossless)
    words = spec.sglang_options
    reasons += reasons_against_words(words, on_cpu=on_cpu, is_lossless=is_lossless)
    reasons += reasons_against_start(host, port, spec.sglang_options, os.environ)
    reasons += wrong
    if spec.api_key == "":
        reasons.append("the API key is empty: leave it out, or give one that clients must send")
    if reasons:
        raise RefusedError(reasons)
    revision = _read_option(spec.sglang_options, "--revision")
    model = check_model(spec.model or default_model(on_cpu=on_cpu), revision)
    reasons = _reasons_against_layers(spec, known_shape(model, revision))
    if reasons := [*reasons, *_reasons_against_tokens(spec, known_context(model, revision))]:
        raise RefusedError(reasons)
    return ServerOptions(
        model=model,
        host=host,
        port=port,
        api_key=spec.api_key,
        on_cpu=on_cpu,
        # One word a flag, so that a value such as "" or "-1" stays with its flag.
        lim_flags=tuple(f"{flag}={text}" for flag, text in spec.lim_flags.items()),
        sglang_options=spec.sglang_options,
    )


def _reasons_against_layers(spec: ServerSpec, shape: ModelShape | None) -> list[str]:
    """List the layers that the settings name and a model of this shape does not have, and what is
    wrong with a preset's file, where both are known before SGLang starts."""
    config, _ = read_settings(os.environ.get(CONFIG_VAR), spec.lim_flags)
    may_change = any(word.startswith(("--lim-", "--json")) for word in spec.sglang_options)
    if config is None or may_change:
        return []
    try:
        if shape:
            with_preset(config, shape).make_policy().roles(shape.num_layers)
        elif config.preset:
            read_preset(config.preset)
    except ConfigError as error:
        return [str(error)]
    return []


def _reasons_against_tokens(spec: ServerSpec, context: int | None) -> list[str]:
    """List the requests that a model's context cannot hold, as far as both are known before SGLang
    starts, which would answer each of them with an error."""
    given = _read_option(spec.sglang_options, "--context-length")
    may_change = any(word.startswith("--json") for word in spec.sglang_options)
    if given is not None:
        context = int(given) if given.isdecimal() else None
    if not spec.max_tokens or not context or may_change or spec.max_tokens < context:
        return []
    return [
        f"--max-tokens {spec.max_tokens:,}: the model takes {context:,} tokens, a question and its "
        "answer together; ask for so many fewer as the longest question has"
    ]


def _unknown_options(sglang_options: Sequence[str]) -> list[str]:
    """List the options that SGLang would refuse half a minute later. It accepts abbreviations."""
    ours = {CONFIG_FLAG, *(flag.name for flag in FLAGS), *RESERVED_OPTIONS}
    known = sorted(option_names() | ours)
    names = (word.partition("=")[0] for word in sglang_options if re.match(r"--\w", word))
    unknown = [name for name in names if not any(option.startswith(name) for option in known)]
    close = {name: get_close_matches(name, known, 1) for name in unknown}
    return [
        f"{name} after --: SGLang {SGLANG_VERSION} has no such option"
        + (f"; do you mean {close[name][0]}?" if close[name] else "")
        for name in unknown
    ]


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
                return [
                    f"port {port} of {host} is in use: choose another --port, or wait 10 s if a "
                    "server there was just killed"
                ]
            return [f"cannot listen on {host}, port {port} ({error.strerror}): choose other ones"]
    return []


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Return different TCP ports of this machine that nothing listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class StartError(ServerError):
    """SGLang's process ended before it served."""

    def __init__(self, ending: Ending) -> None:
        self.ending = ending
        # Options that SGLang's process refuses are wrong options of ours.
        self.exit_code = REFUSED if ending.code == REFUSED else ServerError.exit_code
        super().__init__(f"{ending} before it was ready")


_links: WeakSet[socket.socket] = WeakSet()
"""Our ends of the sockets to supervisors."""


def _close_links() -> None:
    for link in _links:
        link.close()


# A process that we fork must not keep a server alive when we are dead.
os.register_at_fork(after_in_child=_close_links)


class Server:
    """A SGLang server, watched by a supervisor (`supervisor.py`), which ends it when we die."""

    def __init__(
        self, options: ServerOptions, *, log: Path | None = None, verbose: bool = False
    ) -> None:
        """Prepare a server.

        Args:
            log: file for SGLang's output; by default one in the server's temporary folder.
            verbose: SGLang's output goes where ours goes, instead.
        """
        self.options = options
        self.log = log
        self.live: dict[str, Any] = {}
        """LessIsMore's part of `/server_info`, once the server is ready."""
        self._verbose = verbose
        self._folder: ServerFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._ending: Ending | None = None
        self._http = local_client(options.url, options.api_key)

    @property
    def url(self) -> str:
        """The address for requests."""
        return self.options.url

    def start(self) -> None:
        """Start SGLang under a supervisor, in a session of its own.

        Raises:
            DataError: the log or temporary files cannot be written.
        """
        self._folder = folder = ServerFolder.make()
        if not self._verbose:
            self.log = self.log or folder.log
        self._link, theirs = socket.socketpair()
        _links.add(self._link)
        named = {"TMPDIR": str(folder.path), SERVER_VAR: folder.path.name}
        with _opened(self.log) as output, theirs:
            self._process = subprocess.Popen(
                supervision(self.options.command_line(), theirs.fileno(), folder.path, GRACE_S),
                env=self.options.environment() | named,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(theirs.fileno(), folder.lock),
                preexec_fn=self.options.use_own_cores if self.options.cores else None,
            )

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Wait until the server is healthy; return LessIsMore's part of `/server_info`.

        Raises:
            ServerError: the server ended, took too long, or decodes by another backend; or another
                server has taken its port.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready after {timeout_s:.0f} s; it was ended")
            time.sleep(POLL_S)
        return self.live

    def is_ready(self) -> bool:
        """Return True, and fill in `live`, once the server is healthy; raises `ServerError` as
        `wait_until_ready` does.
        """
        if self._is_healthy():
            self.live = self.prove()
            return True
        if ending := self.poll():
            raise StartError(ending)
        return False

    def prove(self) -> dict[str, Any]:
        """Return LessIsMore's part of `/server_info`; an empty one if a dense server was asked for.

        Raises:
            ServerError: the server is not the one that we started, or decodes by another backend
                than the one that was asked for.
        """
        try:
            answer = self._http.get("/server_info", timeout=INFO_TIMEOUT_S).json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(
                f"the server went away before it said what it serves ({type(error).__name__})"
            ) from None
        if self._folder and server_name(answer) != self._folder.path.name:
            raise self._port_taken()
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
        if (alive := live.get("live_ranks")) != (ranks := live.get("ranks")):
            raise ServerError(
                f"{alive} of {ranks} ranks decode with LessIsMore and the same settings, so the "
                "server was ended: see its log"
            )
        return live

    def poll(self) -> Ending | None:
        """Return how SGLang ended; None while it runs, or before it was started."""
        if self._link and not self._ending and select.select([self._link], [], [], 0)[0]:
            told = self._link.recv(4096)
            died = Ending(code=128 + signal.SIGKILL, dead="supervisor")
            self._ending = Ending.from_json(told.decode()) if told else died
        return self._ending

    def wait(self, timeout_s: float = math.inf) -> Ending | None:
        """Wait until SGLang has ended by itself; return how, or None if the time is over."""
        deadline = time.monotonic() + timeout_s
        while not (ending := self.poll()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return ending

    def begin_to_stop(self) -> None:
        """Tell the supervisor to end SGLang, without a wait; `stop` has to follow."""
        if self._link:
            self._link.close()

    def stop(self) -> None:
        """End SGLang and everything that it started, and remove its files.

        SGLang's own shutdown can hang, so the supervisor kills what is left after `GRACE_S`.
        """
        self._http.close()
        # A signal must neither interrupt the end, which would leave a server behind, nor get lost.
        received: list[int] = []
        with on_signals(lambda number, _: received.append(number)):
            self.begin_to_stop()
            if self._process and self._process.wait() < 0:  # the supervisor was killed
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            if self._folder:
                self._folder.remove()
            self._link = self._process = self._folder = None
        for number in received[:1]:
            signal.raise_signal(number)

    def _is_healthy(self) -> bool:
        """Return True if a server answers that is ready.

        Raises:
            ServerError: something answers that cannot be ours.
        """
        try:
            status = self._http.get("/health", timeout=HEALTH_TIMEOUT_S).status_code
        except httpx.HTTPError:
            return False
        if status not in (httpx.codes.OK, STARTING):
            raise self._port_taken()
        return status == httpx.codes.OK

    def _port_taken(self) -> ServerError:
        return ServerError(
            f"another server answers at {self.url}, so ours was ended: choose another --port"
        )


@contextmanager
def _opened(log: Path | None) -> Iterator[IO[bytes] | None]:
    """Open an empty log; None stays None.

    Raises:
        DataError: the file cannot be written.
    """
    if log is None:
        yield None
        return
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    except OSError as error:
        raise DataError(f"cannot write a server's log to {log} ({error.strerror})") from None
    with file:
        yield file


def local_client(url: str, api_key: str | None = None, timeout_s: float = 5.0) -> httpx.Client:
    """Return a client of a server on this machine, which the environment's proxies cannot reach."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    return httpx.Client(base_url=url, trust_env=False, headers=headers, timeout=timeout_s)


def decode_backend(server_info: Mapping[str, Any]) -> str | None:
    """Return the attention backend of decode that `/server_info` names."""
    found: str | None = server_info.get("decode_attention_backend")
    return found or server_info.get("attention_backend")


def serving(
    spec: ServerSpec, console: Console, log: Path | None = None
) -> AbstractContextManager[str]:
    """Check a specification; return a block that serves and has the address. See `running_server`.

    Raises:
        RefusedError: no server can be started so.
        ModelError: the model does not exist or cannot be fetched.
    """
    options = server_options(spec, port=free_port())
    return _serving(options, console, spec.title(options), log)


@contextmanager
def _serving(
    options: ServerOptions, console: Console, title: str, log: Path | None
) -> Iterator[str]:
    with running_server(options, console, title=title, log=log) as server:
        yield server.url


@contextmanager
def running_server(
    options: ServerOptions,
    console: Console,
    *,
    title: str,
    log: Path | None = None,
    verbose: bool = False,
) -> Iterator[Server]:
    """Run a server until the block ends; yield it when it is ready and decodes by its backend.

    The server and its children end with the block, also by Ctrl-C, SIGTERM and SIGHUP.

    Args:
        console: shows the progress of the start.
        title: names the server there.
        log: file for SGLang's output; by default a temporary one, kept only if the server fails.
        verbose: SGLang's output goes where ours goes, and there is no log.

    Raises:
        ServerError: the server did not start, or the block raised this error because it broke down
            later; what the log says about it is added.
        DataError: the log or temporary files cannot be written.
    """
    server = Server(options, log=log, verbose=verbose)
    with on_signals(signal.default_int_handler):
        try:
            server.start()
            logs = {"": server.log}
            with start_shown(title, logs, console, on_cpu=options.on_cpu) as tell_ready:
                server.wait_until_ready()
                tell_ready("")
            with _end_told(server):
                yield server
        except ServerError as error:
            error.args = (explained(error, server, is_temporary=log is None),)
            raise
        finally:
            server.stop()


@contextmanager
def _end_told(server: Server) -> Iterator[None]:
    """Add to an error that the block raises how SGLang ended, if it did."""
    try:
        yield
    except ServerError as error:
        if ending := server.wait(TOLD_WITHIN_S):
            error.args = (f"{error}: {ending}",)
        raise


def explained(error: ServerError, server: Server, *, is_temporary: bool) -> str:
    """Return the text of an error with what the server's log says about it."""
    ending = server.poll()
    hint = f"\n{ending.hint}" if ending and ending.hint else ""
    if server.log is None:
        return f"{error}: see above{hint}"
    cause = cause_of_failure(server.log)
    if error.exit_code == REFUSED:  # SGLang's process has named all reasons
        return cause
    by_itself = bool(hint) and ended_itself(server.log)
    kept = keep_log(server.log) if is_temporary else server.log
    if by_itself:
        return f"{error}, by SGLang itself after an error (log: {kept})\n{cause}"
    return f"{error} (log: {kept})\n{cause}{hint}"
