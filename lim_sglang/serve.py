"""`lim serve`: from a model's name to a server that is proved to decode with LessIsMore."""

import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from lim_sglang.config import API_KEY_VAR, LimConfig, Role
from lim_sglang.errors import REFUSED, ServerError
from lim_sglang.flags import FLAG_HELP
from lim_sglang.server import (
    POLL_S,
    STOPPING,
    Server,
    ServerOptions,
    ServerSpec,
    StartError,
    server_options,
)


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
        str | None, _option("--lim-budget", "--budget", default=LimConfig.budget)
    ] = None,
    policy: Annotated[
        str | None, _option("--lim-policy", "--policy", default=LimConfig.policy)
    ] = None,
    lim_select_layers: Annotated[
        str | None, _option("--lim-select-layers", default="by model")
    ] = None,
    lim_recent_ratio: Annotated[
        str | None, _option("--lim-recent-ratio", default=LimConfig.recent_ratio)
    ] = None,
    lim_sinks: Annotated[str | None, _option("--lim-sinks", default=LimConfig.sinks)] = None,
    lim_ranking: Annotated[str | None, _option("--lim-ranking", default=LimConfig.ranking)] = None,
    lim_config: Annotated[str | None, _option("--lim-config", default="none")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 30000,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY_VAR, help="Key that clients must send.")
    ] = None,
) -> None:
    """Serve a model with LessIsMore at decode. Options after -- go to SGLang."""
    flags = {
        "--lim-budget": budget,
        "--lim-policy": policy,
        "--lim-select-layers": lim_select_layers,
        "--lim-recent-ratio": lim_recent_ratio,
        "--lim-sinks": lim_sinks,
        "--lim-ranking": lim_ranking,
        "--lim-config": lim_config,
    }
    given = {flag: text for flag, text in flags.items() if text is not None}
    spec = ServerSpec(model, given, context.obj or (), api_key)
    _run(Server(server_options(spec, host=host, port=port)))


def _run(server: Server) -> None:
    """Serve until a signal to stop; relay the exit code of a refused start."""
    for number in STOPPING:
        # nohup ignores SIGHUP for us: such a server outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        server.start()
        live = server.wait_until_ready()
        typer.echo(ready_block(server.options, live))
        while server.poll() is None:
            time.sleep(POLL_S)
        raise ServerError(f"the server ended by itself with code {server.poll()}: see its log")
    except StartError as error:
        if error.code == REFUSED:  # SGLang's process has named the reasons
            raise typer.Exit(REFUSED) from None
        raise
    except _Stopped:
        typer.echo("Stopping the server.")
    finally:
        server.stop()


class _Stopped(Exception):  # noqa: N818 - no error: the user asked for it
    """One of the `STOPPING` signals arrived."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # A second signal must not interrupt the clean-up that the first one starts.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise _Stopped


def ready_block(options: ServerOptions, live: Mapping[str, Any]) -> str:
    """Return the message of a ready server: address, model, schedule, and how to ask it.

    Args:
        live: LessIsMore's part of `/server_info`.
    """
    config, roles = live["config"], live["roles"]
    key = "" if options.api_key is None else f' -H "Authorization: Bearer ${API_KEY_VAR}"'
    select = [str(layer) for layer, role in enumerate(roles) if role == Role.SELECT]
    reuse = roles.count(Role.REUSE)
    schedule = (
        f"{reuse} of {len(roles)} layers read {config['budget']} tokens "
        f"picked at layers {', '.join(select)}"
        if reuse
        else f"all {len(roles)} layers read everything"
    )
    return "\n".join(
        [
            "",
            "LessIsMore is live",
            f"  url       {options.url}",
            f"  model     {options.model}",
            f"  policy    {config['policy']}: {schedule}",
            f'  ask       {_lim()} ask "What is 17 * 23?" --samples 8 --url {options.url}',
            f"  or        curl {options.url}/v1/chat/completions{key} "
            "-H 'Content-Type: application/json' "
            """-d '{"messages": [{"role": "user", "content": "What is 17 * 23?"}]}'""",
            "  stop      Ctrl-C",
            "",
        ]
    )


def _lim() -> str:
    """Return the name of this program if the PATH has it, else its path."""
    beside = Path(sys.executable).with_name("lim")
    found = shutil.which("lim")
    if found or not beside.is_file():
        return "lim"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
