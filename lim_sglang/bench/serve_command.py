"""`lim bench serve` as it is typed."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lim_sglang.bench.load import POLICIES, Load, ServeOptions, choose_loads, choose_policies
from lim_sglang.bench.options import (
    BudgetOption,
    MemoryOption,
    ModelOption,
    OutOption,
    ShapeOption,
    VerboseOption,
    choose_model,
    log,
)
from lim_sglang.bench.progress import Progress, progress, wide_console
from lim_sglang.errors import ConfigError, RefusedError
from lim_sglang.programs.options import ApiKeyOption
from lim_sglang.server import on_signals
from lim_sglang.validation import BACKEND

if TYPE_CHECKING:
    from lim_sglang.bench.serve import Measured

OF_OUR_SERVERS = {
    "shape": "--shape",
    "model": "--model",
    "policies": "--policies",
    "budget": "--budget",
    "mem_fraction_static": "--mem-fraction-static",
}
"""Options that say how a server is started, so that they mean nothing with --url."""
PROFILER_OF_STAGES = "SGLANG_PROFILE_V2"
"""Variable of SGLang whose profiler dies of a profile that is not of one stage."""
TimelineOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=1000,
        help="Profile so many decode steps after the timed runs: how idle the GPU was.",
        show_default="none",
    ),
]
PictureOption = Annotated[
    Path | None,
    typer.Option("--timeline-svg", help="An SVG file: some of these steps, host above GPU."),
]


def serve(
    context: typer.Context,
    shape: ShapeOption = None,
    model: ModelOption = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests at once; may be repeated.", show_default="64"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 200,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each generates.")] = 8192,
    budget: BudgetOption = 2048,
    policies: Annotated[
        str, typer.Option(help="lim, and of flashinfer, triton, fa3 those to compare with.")
    ] = POLICIES,
    limit_seconds: Annotated[
        float | None,
        typer.Option(min=1.0, help="Cut each run so long after its first token."),
    ] = None,
    stream_interval: Annotated[
        int, typer.Option(min=1, help="New tokens of a request that are sent together.")
    ] = 1,
    mem_fraction_static: MemoryOption = 0.88,
    url: Annotated[
        str | None,
        typer.Option(help="Measure a server that runs on this machine instead."),
    ] = None,
    api_key: ApiKeyOption = None,
    timeline: TimelineOption = 0,
    timeline_svg: PictureOption = None,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Long generations side by side over HTTP, LessIsMore against dense SGLang. Options after --
    go to every server."""
    loads = choose_loads(
        concurrency or [64],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        limit_s=limit_seconds,
        stream_interval=stream_interval,
    )
    check_timeline(loads, timeline, timeline_svg)
    further: tuple[str, ...] = context.obj or ()
    if url is not None:
        refuse_with_url(context, further)
        log(verbose)
        show(url, partial(_measure_running, url, api_key, loads, timeline), out, timeline_svg)
        return
    options = ServeOptions(
        model=choose_model(shape, model),
        loads=loads,
        policies=choose_policies(policies),
        budget=budget,
        mem_fraction_static=mem_fraction_static,
        verbose=verbose,
        sglang_options=further,
        timeline=timeline,
    )
    refuse_start(options)
    log(verbose)
    show(options.model.name, partial(_measure, options), out, timeline_svg)


def check_timeline(loads: tuple[Load, ...], steps: int, picture: Path | None) -> None:
    """Refuse what no timeline can be made of, before an hour of timed runs rather than after."""
    from lim_sglang.bench.timeline import recorded_steps

    if picture and not steps:
        raise ConfigError("--timeline-svg draws what --timeline records: give --timeline 50, too")
    if picture and picture.is_dir():
        raise ConfigError(f"--timeline-svg {picture} is a folder: name a file")
    if steps:
        for load in loads:
            load.half_way(recorded_steps(steps))


def _measure(options: ServeOptions, report: Progress) -> "Iterator[Measured]":
    from lim_sglang.bench.serve import measure

    # A service manager's signal ends the server that is running, too, as Ctrl-C does.
    with on_signals(signal.default_int_handler):
        yield from measure(options, report)


def _measure_running(
    url: str, api_key: str | None, loads: tuple[Load, ...], steps: int, report: Progress
) -> "Iterator[Measured]":
    from lim_sglang.bench.serve import measure_running
    from lim_sglang.programs.http_client import Client

    with Client(url, api_key=api_key) as client:
        yield from measure_running(client, loads, report, api_key, steps=steps)


def refuse_start(options: ServeOptions) -> None:
    """Refuse what no server can be started with, all reasons at once."""
    from lim_sglang.config import CONFIG_VAR
    from lim_sglang.flags import reasons_against_settings
    from lim_sglang.server import RESERVED_OPTIONS, free_port, reasons_against_start

    given = [word.split("=")[0] for word in options.sglang_options]
    reasons = [
        f"{word} after --: lim bench serve chooses it itself"
        for word in given
        if word in RESERVED_OPTIONS
    ]
    reasons += [
        f"{word} after --: a dense server takes none of these: set {CONFIG_VAR} for ours"
        for word in given
        if word.startswith("--lim-")
    ]
    reasons += reasons_against_start("127.0.0.1", free_port(), options.sglang_options, os.environ)
    texts = {"--lim-budget": str(options.budget)} if BACKEND in options.policies else {}
    reasons += reasons_against_settings(os.environ.get(CONFIG_VAR), texts)
    if options.timeline and os.environ.get(PROFILER_OF_STAGES):
        reasons.append(f"{PROFILER_OF_STAGES} is set, a server would die of --timeline: unset it")
    if reasons:
        raise RefusedError(reasons)


def refuse_with_url(context: typer.Context, further: tuple[str, ...]) -> None:
    """Refuse options that would change nothing of a server that already runs, and other hosts."""
    from lim_sglang.programs.http_client import is_loopback, normalise_url

    given = [
        option
        for name, option in OF_OUR_SERVERS.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    given += ["options after --"] * bool(further)
    if given:
        raise ConfigError(
            f"{', '.join(given)} would change nothing: the server at --url runs already"
        )
    url = normalise_url(context.params["url"])
    if not is_loopback(url):
        raise ConfigError(
            f"{url} is on another machine: run lim bench serve there, because each row names the "
            "GPU, versions and commit of the machine that it runs on"
        )


def show(
    title: str,
    start: "Callable[[Progress], Iterator[Measured]]",
    out: Path | None,
    picture: Path | None = None,
) -> None:
    """Measure, showing and keeping each row as it comes."""
    from lim_sglang.bench.gate import require_gpu
    from lim_sglang.bench.rows import append_lines
    from lim_sglang.bench.serve_rows import (
        json_line,
        make_table,
        timeline_line,
        under_table,
        warnings,
    )
    from lim_sglang.bench.timeline_plot import draw_timelines

    require_gpu()
    rows = []
    conditions: dict[str, Any] = {}
    with progress() as report:
        for row, conditions in start(report):
            rows.append(row)
            if out:
                append_lines(out, [json_line(row, conditions)])
            if picture and (drawn := draw_timelines(rows, conditions)):
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_text(drawn)
    wide_console().print(make_table(rows, title=title))
    for line in filter(None, map(timeline_line, rows)):
        typer.echo(line)
    typer.echo(under_table(conditions))
    for warning in warnings(rows):
        typer.echo(f"warning: {warning}", err=True)
