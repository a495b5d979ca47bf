"""`lim serve`: from a model's name to a server that is proved to decode with LessIsMore."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from struct import Struct
from typing import Annotated, Any

import typer
from rich.console import Console

from lim_sglang.config import API_KEY_VAR, LimConfig, default_of
from lim_sglang.errors import INTERRUPTED, ConfigError, ServerError, lim_command
from lim_sglang.flags import FLAG_HELP
from lim_sglang.launch.replicas import replicated, serve_on
from lim_sglang.launch.server import (
    Server,
    ServerOptions,
    ServerSpec,
    running_server,
    server_options,
)
from lim_sglang.policies.policy import SPARSE, Role
from lim_sglang.progress import plain_console, print_plain

MAX_REPLICAS = 64
"""More GPUs than a machine has."""
LONGEST_NAME = 107
"""Bytes that Linux takes for the name of a Unix socket."""
UCRED = Struct("3i")
"""Process, user and group at the other end of a Unix socket, as Linux gives them."""


def _option(flag: str, *others: str, default: object) -> Any:
    """Declare one of our flags; `default`, for the help, is the value without the flag."""
    return typer.Option(*others, flag, help=FLAG_HELP[flag], show_default=str(default))


def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder or hub id. Without it: SmolLM2-135M-Instruct on a CPU, "
            "Qwen/Qwen3-8B on a GPU.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None, _option("--lim-budget", "--budget", default=default_of("budget"))
    ] = None,
    policy: Annotated[
        str | None, _option("--lim-policy", "--policy", default=LimConfig.policy)
    ] = None,
    lim_select_layers: Annotated[
        str | None, _option("--lim-select-layers", default="by model")
    ] = None,
    lim_pick_layers: Annotated[
        str | None, _option("--lim-pick-layers", default="those of --lim-preset")
    ] = None,
    lim_preset: Annotated[str | None, _option("--lim-preset", default="none")] = None,
    lim_recent_ratio: Annotated[
        str | None, _option("--lim-recent-ratio", default=default_of("recent_ratio"))
    ] = None,
    lim_sinks: Annotated[str | None, _option("--lim-sinks", default=default_of("sinks"))] = None,
    lim_ranking: Annotated[
        str | None, _option("--lim-ranking", default=default_of("ranking"))
    ] = None,
    draft_tokens: Annotated[
        str | None,
        _option(
            "--lim-draft-tokens", "--draft-tokens", default=default_of("draft_tokens", "lossless")
        ),
    ] = None,
    lim_shared_by: Annotated[str | None, _option("--lim-shared-by", default="by policy")] = None,
    lim_gate: Annotated[str | None, _option("--lim-gate", default="none")] = None,
    lim_config: Annotated[str | None, _option("--lim-config", default="none")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 30000,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY_VAR, help="Key that clients must send.")
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_REPLICAS,
            help="Servers behind the address, each with its share of the GPUs, or of the cores.",
        ),
    ] = 1,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show SGLang's log.")] = False,
) -> None:
    """Serve a model with LessIsMore at decode. Options after -- go to SGLang."""
    flags = {
        "--lim-budget": budget,
        "--lim-policy": policy,
        "--lim-select-layers": lim_select_layers,
        "--lim-pick-layers": lim_pick_layers,
        "--lim-preset": lim_preset,
        "--lim-recent-ratio": lim_recent_ratio,
        "--lim-sinks": lim_sinks,
        "--lim-ranking": lim_ranking,
        "--lim-draft-tokens": draft_tokens,
        "--lim-shared-by": lim_shared_by,
        "--lim-gate": lim_gate,
        "--lim-config": lim_config,
    }
    given = {flag: text for flag, text in flags.items() if text is not None}
    spec = ServerSpec(model, given, context.obj or (), api_key)
    with claimed(host, port):
        options = server_options(spec, host=host, port=port)
        _run(options, spec.title(options), replicas=replicas, verbose=verbose)


@contextmanager
def claimed(host: str, port: int) -> Iterator[None]:
    """Claim an address from the start of its server on, long before the server listens there.

    Abstract Unix socket: a name without a file, in the same network namespace as the port, which
    the kernel frees at the end of this process. Where there are none, nothing is claimed.

    Raises:
        ConfigError: another process has the claim.
    """
    name = f"\0lim-serve {port} {host}".encode(errors="surrogatepass")[:LONGEST_NAME]
    with ExitStack() as stack:
        try:
            claim = stack.enter_context(socket.socket(socket.AF_UNIX))
            claim.bind(name)
            claim.listen(socket.SOMAXCONN)  # for `_owner`, whose connections nobody takes
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} of {host} is taken by another lim serve{_owner(name)}, which "
                    "starts or runs: choose another --port, or stop that one"
                ) from None
        yield


def _owner(name: bytes) -> str:
    """Return the process that listens at a Unix socket, as ` (process 12)` if it is known."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.setblocking(False)
        try:
            asked.connect(name)
            told = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        # It does not listen yet, or many have asked before; or the system does not say.
        except (OSError, AttributeError):
            return ""
    return f" (process {UCRED.unpack(told)[0]})"


def _run(options: ServerOptions, title: str, *, replicas: int = 1, verbose: bool) -> None:
    """Serve until a signal to stop.

    Raises:
        ServerError: the server did not start, or ended by itself.
        typer.Exit: with 130, as a shell says Ctrl-C, a signal came before the server was live.
    """
    is_live = False
    try:
        console = Console(stderr=True)
        with _running(options, replicas, console, title=title, verbose=verbose) as (servers, wait):
            print_plain(plain_console(), ready_block(options, servers))
            print_plain(plain_console(), commands_block(options), whole=True)
            is_live = True
            _tell_signal(wait)
            raise ServerError("the server is gone")
    except KeyboardInterrupt:  # any of the signals to stop
        if not is_live:
            typer.echo("The start of the server has been interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        typer.echo("The server has been stopped.")


@contextmanager
def _running(
    options: ServerOptions, replicas: int, console: Console, *, title: str, verbose: bool
) -> Iterator[tuple[Mapping[str, Server], Callable[[], object]]]:
    """Run one server, or several replicas, until the block ends; yield the servers by name, and a
    function that waits until none is left.
    """
    if replicas == 1:
        with running_server(options, console, title=title, verbose=verbose) as server:
            yield {"": server}, server.wait
        return
    with replicated(options, replicas, console, title=title, verbose=verbose) as (servers, found):
        yield servers, partial(serve_on, servers, found, console)


def _tell_signal(wait: Callable[[], object]) -> None:
    """Wait until no server is left; tell a signal at once, since the end takes seconds."""
    try:
        wait()
    except KeyboardInterrupt:
        typer.echo("Stopping the server.")
        raise


def ready_block(options: ServerOptions, servers: Mapping[str, Server]) -> str:
    """Return the message of ready servers: address, model, schedule, logs.

    Args:
        options: of the address that clients ask.
        servers: by name; the name of a server that is no replica is empty.
    """
    live = next(iter(servers.values())).live
    config, roles = live["config"], live["roles"]
    schedule = _describe_drafts(config, live) or _describe_roles(config, roles)
    return "\n".join(
        [
            "",
            "LessIsMore is live",
            f"  url       {options.url}",
            f"  model     {options.model}",
            f"  policy    {config['policy']}: {schedule}",
            *_preset_lines(live.get("preset") or {}),
            *(line for name, server in servers.items() for line in _server_lines(name, server)),
        ]
    )


def _server_lines(name: str, server: Server) -> Iterator[str]:
    """Yield the line of a replica, with its part of the machine, and that of a server's log."""
    if name:
        gpus, cores = server.options.gpus, ", ".join(map(str, server.options.cores))
        part = f"GPU {gpus}" if gpus else f"core{'s' if ',' in cores else ''} {cores}"
        yield f"  {name} {server.url} ({part})"
    if server.log:
        yield f"  log       {server.log}"


def _describe_drafts(config: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    """Say what lossless drafting does; nothing for other policies."""
    if "draft_tokens" not in live:
        return ""
    layers = ", ".join(map(str, config["select_layers"]))
    return (
        f"up to {live['draft_tokens']} drafts a step, from {config['budget']} tokens picked at "
        f"layers {layers}; all {len(live['roles'])} layers verify them"
    )


def _describe_roles(config: Mapping[str, Any], roles: Sequence[str]) -> str:
    """Say how many layers read how much."""
    select = [str(layer) for layer, role in enumerate(roles) if role == Role.SELECT]
    sparse = sum(role in SPARSE for role in roles)
    if not sparse:
        return f"all {len(roles)} layers read everything"
    picked = f" picked at layers {', '.join(select)}" if select else ""
    if pick := ", ".join(map(str, config.get("pick_layers") or ())):
        picked += f" and, by the keys of all, in {pick}"
    return f"{sparse} of {len(roles)} layers read {config['budget']} tokens{picked}"


def _preset_lines(preset: Mapping[str, Any]) -> list[str]:
    """Return a line that says how the model differs from the one whose layers were measured."""
    differences = ", ".join(preset.get("differences", ()))
    if not differences:
        return []
    measured = f"those of {preset['measured_on']}, but " if preset["measured_on"] else ""
    return [
        f"  layers    {measured}{differences}: compare with --policy full, or run lim calibrate"
    ]


def commands_block(options: ServerOptions) -> str:
    """Return the commands that ask and stop a ready server."""
    key = "" if options.api_key is None else f' -H "Authorization: Bearer ${API_KEY_VAR}"'
    return "\n".join(
        [
            f'  ask       {lim_command()} ask "What is 17 * 23?" --samples 8 --url {options.url}',
            f"  or        curl {options.url}/v1/chat/completions{key} "
            "-H 'Content-Type: application/json' "
            """-d '{"messages": [{"role": "user", "content": "What is 17 * 23?"}]}'""",
            # A script hands an ignored SIGINT down to what it starts in the background.
            f"  stop      Ctrl-C, or kill {os.getpid()}",
            "",
        ]
    )
