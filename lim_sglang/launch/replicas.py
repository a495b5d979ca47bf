"""Replicas of a server on one machine, each with its share of GPUs or cores, behind one address.

The `lim serve` process answers at that address itself (`programs/proxy/balancer.py`). The replicas
are its servers, each under a supervisor of its own: all end with it, and the rest serves on when
one ends.
"""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from lim_sglang.errors import RefusedError, ServerError, bullets
from lim_sglang.launch.server import (
    POLL_S,
    START_TIMEOUT_S,
    Server,
    ServerOptions,
    explained,
    free_ports,
    on_signals,
)
from lim_sglang.launch.server_log import start_shown
from lim_sglang.mends import cores_of_ranks
from lim_sglang.models import visible_gpus
from lim_sglang.progress import print_plain

if TYPE_CHECKING:
    from lim_sglang.programs.proxy.balancer import Balancer

LISTENS_WITHIN_S = 10.0
"""Time in which the balancer answers once the replicas are ready."""
ENDS_WITHIN_S = 5.0
"""Time in which the balancer ends; it gives answers that are being written 2 s."""
BASE_GPU = "--base-gpu-id"


def replica_options(options: ServerOptions, number: int) -> list[ServerOptions]:
    """Return the options of each of several replicas: a port, and GPUs or cores of its own.

    Args:
        options: of the server as one, whose address is the balancer's.

    Raises:
        RefusedError: there are fewer GPUs than replicas, or an option names other GPUs.
    """
    ports = free_ports(number)
    if options.on_cpu:
        cores = cores_of_ranks(sorted(os.sched_getaffinity(0)), number)
        shares = zip(ports, cores, strict=True)
        return [
            replace(options, host="127.0.0.1", port=port, cores=tuple(share))
            for port, share in shares
        ]
    gpus = visible_gpus()
    reasons = []
    if len(gpus) < number:
        reasons.append(
            f"--replicas {number}: each replica needs a GPU, and {len(gpus)} can be seen "
            "(CUDA_VISIBLE_DEVICES may hide others): ask for fewer replicas"
        )
    if any(word.startswith(BASE_GPU) for word in options.sglang_options):
        reasons.append(f"{BASE_GPU} after --: replicas share the GPUs of CUDA_VISIBLE_DEVICES out")
    if reasons:
        raise RefusedError(reasons)
    each = len(gpus) // number
    parts = [",".join(gpus[first * each : (first + 1) * each]) for first in range(number)]
    return [
        replace(options, host="127.0.0.1", port=port, gpus=part)
        for port, part in zip(ports, parts, strict=True)
    ]


@contextmanager
def replicated(
    options: ServerOptions, number: int, console: Console, *, title: str, verbose: bool = False
) -> Iterator[tuple[dict[str, Server], "Balancer"]]:
    """Run replicas of a server until the block ends; yield them by name, and what balances them.

    See `running_replicas`.

    Raises:
        ConfigError: the address is taken.
        RefusedError: see `replica_options`.
    """
    from lim_sglang.programs.proxy.command import listen

    with (
        closing(listen(options.host, options.port)) as listener,
        running_replicas(
            replica_options(options, number), console, title=title, verbose=verbose
        ) as servers,
        balancing(servers, listener) as balancer,
    ):
        yield servers, balancer


@contextmanager
def running_replicas(
    options: Sequence[ServerOptions], console: Console, *, title: str, verbose: bool = False
) -> Iterator[dict[str, Server]]:
    """Run several servers until the block ends; yield them by name when all are ready and proved.

    The servers and their children end with the block, also by Ctrl-C, SIGTERM and SIGHUP.

    Args:
        console: shows the progress of the start.
        title: names the servers there.

    Raises:
        ServerError: a server did not start; the others were ended.
        DataError: the logs or temporary files cannot be written.
    """
    servers = {
        f"replica {number}": Server(each, verbose=verbose)
        for number, each in enumerate(options, start=1)
    }
    with on_signals(signal.default_int_handler):
        try:
            for server in servers.values():
                server.start()
            logs = {name: server.log for name, server in servers.items()}
            on_cpu = any(each.on_cpu for each in options)
            with start_shown(title, logs, console, on_cpu=on_cpu) as tell_ready:
                for name in _wait_until_ready(servers):
                    tell_ready(name)
            yield servers
        finally:
            _stop(servers.values())


def _wait_until_ready(servers: Mapping[str, Server]) -> Iterator[str]:
    """Yield the name of each server as it is ready; raises `ServerError` if one does not start."""
    deadline = time.monotonic() + START_TIMEOUT_S
    starting = dict(servers)
    while starting:
        for name, server in servers.items():
            try:
                if name not in starting:
                    if ending := server.poll():
                        raise ServerError(f"{ending} while others started")
                elif server.is_ready():
                    del starting[name]
                    yield name
                elif time.monotonic() > deadline:
                    raise ServerError(f"not ready after {START_TIMEOUT_S:.0f} s")
            except ServerError as error:
                error.args = (f"{name}: {explained(error, server, is_temporary=True)}",)
                raise
        time.sleep(POLL_S)


def _stop(servers: Iterable[Server]) -> None:
    """End all servers, at the same time."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.begin_to_stop()


def serve_on(servers: dict[str, Server], balancer: "Balancer", console: Console) -> None:
    """Wait until the last replica has ended, and tell of each that ends.

    Args:
        servers: by name; those that end are taken out, and their files are removed.

    Raises:
        ServerError: all have ended.
    """
    endings = []
    while servers:
        time.sleep(POLL_S)
        for name, server in list(servers.items()):
            if not (ending := server.poll()):
                continue
            balancer.lose(server.url)
            del servers[name]
            told = explained(ServerError(f"{name} is gone: {ending}"), server, is_temporary=True)
            server.stop()
            endings.append(told)
            if servers:
                left = ", ".join(servers)
                print_plain(console, f"{told}\n{left} serve{'s' if len(servers) == 1 else ''} on.")
    raise ServerError(f"all replicas are gone:{bullets(endings)}")


@contextmanager
def balancing(servers: Mapping[str, Server], listener: socket.socket) -> Iterator["Balancer"]:
    """Answer at one address for several servers until the block ends, in a thread.

    Args:
        listener: a socket that is bound to the address.

    Raises:
        ConfigError: another process has begun to listen there.
        ServerError: the balancer does not listen.
    """
    from lim_sglang.programs.proxy.app import ProxyServer
    from lim_sglang.programs.proxy.balancer import Balancer, create_app
    from lim_sglang.programs.proxy.command import begin_to_listen

    begin_to_listen(listener)
    _allow_many_connections()
    balancer = Balancer([server.url for server in servers.values()])
    is_ready = threading.Event()
    server = ProxyServer(create_app(balancer), when_ready=is_ready.set, when_stopped=lambda: None)
    thread = threading.Thread(
        target=server.run, args=([listener],), name="lim-balancer", daemon=True
    )
    thread.start()
    try:
        if not is_ready.wait(LISTENS_WITHIN_S):
            raise ServerError("the balancer of the replicas does not listen: choose another --port")
        yield balancer
    finally:
        server.should_exit = True
        thread.join(ENDS_WITHIN_S)


def _allow_many_connections() -> None:
    """Raise this process's limit of open files: a request takes two connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
