"""`lim serve`: from a model's name to a server that is proved to decode with LessIsMore."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lim_sglang.config import ENV_VAR, Role
from lim_sglang.errors import REFUSED, RefusedError, ServerError
from lim_sglang.flags import reasons_against_settings
from lim_sglang.server import STOPPING

if TYPE_CHECKING:
    from lim_sglang.server import ServerOptions

POLL_S = 0.5


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
        str | None,
        typer.Option("--budget", "--lim-budget", help="Tokens that a sparse layer reads."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", "--lim-policy", help="What decode reads: lessismore or full."),
    ] = None,
    lim_select_layers: Annotated[
        str | None, typer.Option(help="Layers that pick the token set, such as 2,12.")
    ] = None,
    lim_recent_ratio: Annotated[
        str | None, typer.Option(help="Share of the budget for the newest tokens, 0 to 1.")
    ] = None,
    lim_sinks: Annotated[
        str | None, typer.Option(help="Oldest tokens that are always kept.")
    ] = None,
    lim_ranking: Annotated[
        str | None,
        typer.Option(help="How tokens are ordered: rank, as in the paper, or mass."),
    ] = None,
    lim_config: Annotated[
        str | None, typer.Option(help="Any of these settings as one JSON object.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 30000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LIM_API_KEY", help="Key that clients must send.")
    ] = None,
) -> None:
    """Serve a model with LessIsMore at decode. Options after -- go to SGLang."""
    from lim_sglang.server import Server

    lim_flags = {
        "--lim-budget": budget,
        "--lim-policy": policy,
        "--lim-select-layers": lim_select_layers,
        "--lim-recent-ratio": lim_recent_ratio,
        "--lim-sinks": lim_sinks,
        "--lim-ranking": lim_ranking,
        "--lim-config": lim_config,
    }
    options = server_options(
        model, lim_flags, context.obj or (), host=host, port=port, api_key=api_key
    )
    _run(Server(options))


def server_options(
    model: str | None,
    lim_flags: Mapping[str, str | None],
    sglang_options: tuple[str, ...] = (),
    *,
    host: str = "127.0.0.1",
    port: int,
    api_key: str | None = None,
) -> "ServerOptions":
    """How `lim serve` starts SGLang.

    Args:
        model: folder or hub id; None for the default of this machine.
        lim_flags: our flags by name, None for what was not given.
        sglang_options: passed on to SGLang.

    Raises:
        RefusedError: no server can be started so, with all reasons.
        LimError: the model is not there.
    """
    from lim_sglang.models import check_model, default_model, has_gpu
    from lim_sglang.server import ServerOptions, reasons_against_start

    # Before a model is fetched: nobody waits for a download that ends in a refusal.
    reasons = _options_of_ours(sglang_options)
    reasons += reasons_against_start(host, port, sglang_options, os.environ)
    reasons += reasons_against_settings(os.environ.get(ENV_VAR), lim_flags)
    if api_key == "":
        reasons.append("the API key is empty: leave it out, or give one that clients must send")
    if reasons:
        raise RefusedError(reasons)
    on_cpu = not has_gpu() or _device(sglang_options) == "cpu"
    return ServerOptions(
        model=check_model(model) if model else default_model(on_cpu=on_cpu),
        host=host,
        port=port,
        api_key=api_key,
        on_cpu=on_cpu,
        # One word a flag, so that a value such as "" or "-1" stays with its flag.
        lim_flags=tuple(f"{flag}={text}" for flag, text in lim_flags.items() if text is not None),
        sglang_options=sglang_options,
    )


def _run(server: Any) -> None:
    """Serve until a signal to stop; relay the exit code of a refused start."""
    from lim_sglang.server import StartError

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
        if error.code == REFUSED:  # it has said why
            raise typer.Exit(REFUSED) from None
        raise
    except _Stopped:
        typer.echo("Stopping the server.")
    finally:
        server.stop()


def ready_block(options: Any, live: dict[str, Any]) -> str:
    """What a user sees when the server is ready: where, what, how it decodes, how to ask."""
    config, roles = live["config"], live["roles"]
    key = "" if options.api_key is None else ' -H "Authorization: Bearer $LIM_API_KEY"'
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
    """How a user calls this program: by name where that is found, else by its path."""
    beside = Path(sys.executable).with_name("lim")
    found = shutil.which("lim")
    if found or not beside.is_file():
        return "lim"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


class _Stopped(Exception):  # noqa: N818 - no error: the user asked for it
    """One of the `STOPPING` signals arrived."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # A second signal must not interrupt the clean-up that the first one starts.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise _Stopped


def _device(sglang_options: Sequence[str]) -> str | None:
    """The value of SGLang's --device among the options after --."""
    words = " ".join(sglang_options).replace("=", " ").split()
    return words[words.index("--device") + 1] if "--device" in words[:-1] else None


OURS = {
    "--model-path": "MODEL",
    "--model": "MODEL",
    "--host": "--host",
    "--port": "--port",
    "--api-key": "--api-key",
}
NOT_SERVED = {
    "--ssl-certfile": "put a proxy that speaks TLS in front",
    "--ssl-keyfile": "put a proxy that speaks TLS in front",
}
"""Options after -- with which `lim serve` could not see whether its server is ready."""


def _options_of_ours(sglang_options: Sequence[str]) -> list[str]:
    """Options after -- that `lim serve` itself has to know."""
    given = [word.split("=")[0] for word in sglang_options]
    return [
        f"{word} after --: give it to lim itself, as {OURS[word]} before the --"
        if word in OURS
        else f"{word} after --: {NOT_SERVED[word]}"
        for word in given
        if word in OURS or word in NOT_SERVED
    ]
