"""`lim sweep`: all runs that a file names."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs.options import INTERRUPTED

if TYPE_CHECKING:
    from lim_sglang.evals.sweep import Sweep
    from lim_sglang.evals.sweeping import SweepRun


def sweep(
    file: Annotated[Path, typer.Argument(help="A TOML file; evals/sweeps/ has some.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only servers whose name matches, such as 'lessismore-256'; repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Serve a folder in place of a model of the file; repeatable.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with TASK.jsonl, read in place of the hub.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs.", show_default="runs/ and FILE's name")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be run, and what is there.")
    ] = False,
) -> None:
    """Run every model, policy, budget and task that a file names, server by server. What is
    complete is left alone; the same command goes on where an earlier one stopped."""
    from lim_sglang.evals.sweep import expand, read_sweep
    from lim_sglang.evals.sweeping import run_sweep, runs_of

    console = Console(stderr=True)
    wanted = read_sweep(file)
    servers = expand(wanted, _paths(model or []), only or [])
    runs = runs_of(wanted, servers, out or Path("runs") / file.stem)
    if dry_run:
        Console().print(_table(wanted, runs))
        return
    try:
        failed = run_sweep(wanted, runs, console, data_dir=data_dir)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    Console().print(_table(wanted, runs))
    done = [run.path for run in runs if run.load()]
    if done:
        folders = shlex.join(map(str, done))
        typer.echo(f"lim compare {folders}\nlim report {folders} --html report.html")
    if failed:
        lines = "\n".join(f"{each.server.name}: {each.error}" for each in failed)
        raise ServerError(f"{lines}\nthe same command tries again; what is finished is safe")


def _paths(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [f"{name}{sign}" for name, sign, folder in pairs if not (name and sign and folder)]
    if wrong:
        raise ConfigError(f"--model takes NAME=FOLDER, not {', '.join(wrong)}")
    return {name: folder for name, _, folder in pairs}


def _table(wanted: "Sweep", runs: "Sequence[SweepRun]") -> Table:
    """One row a run: how much of it is there, and its score."""
    from lim_sglang.evals.score import score
    from lim_sglang.evals.summary import load_summary
    from lim_sglang.evals.table import percent

    table = Table(title="sweep", title_justify="left", title_style="bold")
    for name in ("server", "task", "samples", "pass@1"):
        table.add_column(name, overflow="fold")
    for run in runs:
        found = run.load()
        scored = (
            percent(score(load_summary(run.path)).pass_at_1) if found and found.samples else "-"
        )
        count = f"{len(found.samples)}" if found else "0"
        state = " (complete)" if run.is_complete(wanted) else ""
        table.add_row(run.server.name, run.task, count + state, scored)
    return table
