"""`lim sweep`: all runs that a file names."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lim_sglang.config import CONFIG_VAR
from lim_sglang.errors import ConfigError, DataError, ServerError
from lim_sglang.evals.commands import read_pairs
from lim_sglang.programs.options import INTERRUPTED

if TYPE_CHECKING:
    from lim_sglang.evals.sweep import SweepRun
    from lim_sglang.evals.sweeping import Failed, Standing

REPORT_FILE = "report.html"
STATES = ("complete", "begun", "missing")


def sweep(
    file: Annotated[
        str,
        typer.Argument(
            help="A TOML file, or the name of one that comes with lim: paper, math500-coder-1.5b "
            "or tiny.",
            show_default=False,
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Only runs of which the whole name or a word of it matches, such as full, math500 "
            "or 'Qwen/*'; --dry-run shows the names. May be repeated.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Serve a folder in place of a model of the file. May be repeated.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK.jsonl, read in place of the Hugging Face hub."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs' folders.", show_default="runs/ and FILE's name"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be run, and what is there.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help=f"Write {REPORT_FILE} beside the runs at the end.")
    ] = False,
) -> None:
    """Run every model, policy, budget and task that a file names, server by server. What is
    complete is left alone; the same command goes on where an earlier one stopped."""
    from lim_sglang.evals.sweep import check_runs, expand, find_sweep, read_sweep
    from lim_sglang.evals.sweeping import load_questions_of, look, run_sweep
    from lim_sglang.programs.schema import Access

    if os.environ.get(CONFIG_VAR):
        raise ConfigError(f"{CONFIG_VAR} is set, and would change what the file says: unset it")
    path = find_sweep(file)
    wanted = read_sweep(path)
    runs = expand(wanted, read_pairs("--model", "NAME=FOLDER", model or []), only or [])
    check_runs(runs)
    out = out or Path("runs") / path.stem
    asked, problems = load_questions_of(runs, data_dir)
    standings = look(runs, out, asked)
    if dry_run:
        Console().print(plan_table(standings))
        for problem in problems.values():
            typer.echo(f"warning: {problem}", err=True)
        typer.echo(describe_plan(standings))
        return
    missing = [standing for standing in standings if not standing.is_complete]
    needed = dict.fromkeys(standing.run.questions for standing in missing)
    if unread := [str(problems[each]) for each in needed if each in problems]:
        raise DataError("\n".join(unread))
    access = Access(timeout_s=wanted.timeout_s, max_concurrency=wanted.concurrency)
    try:
        failed = run_sweep(missing, access, Console(stderr=True), data_dir=data_dir)
    except KeyboardInterrupt:
        reached = describe_plan(look(runs, out, asked))
        typer.echo(f"interrupted; {reached}; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(look(runs, out, asked), out / REPORT_FILE, is_wanted=report)
    _refuse_gaps(failed)


def plan_table(standings: Sequence["Standing"]) -> Table:
    """One row a run: how much of it is there."""
    table = Table(title="sweep", title_justify="left", title_style="bold")
    for name in ("model", "policy", "task", "state"):
        table.add_column(name, overflow="fold")
    table.add_column("samples", justify="right")
    for standing in standings:
        run = standing.run
        place = (run.server.model, run.server.policy, run.task_name)
        table.add_row(*place, _state(standing), _samples(standing))
    return table


def describe_plan(standings: Sequence["Standing"]) -> str:
    """`20 runs: 5 complete, 1 begun, 14 missing; 4 servers to start`."""
    states = [_state(standing) for standing in standings]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES)
    servers = {each.run.server.name for each in standings if not each.is_complete}
    return f"{len(standings)} runs: {counts}; {len(servers)} servers to start"


def _state(standing: "Standing") -> str:
    if standing.is_complete:
        return "complete"
    return "begun" if standing.stored else "missing"


def _samples(standing: "Standing") -> str:
    """`240 of 480`, or what there is where nobody knows how many it will be."""
    wanted = "" if standing.num_wanted is None else f" of {standing.num_wanted:,}"
    return f"{standing.num_samples:,}{wanted}"


def _show(standings: Sequence["Standing"], report: Path, *, is_wanted: bool) -> None:
    """The scores of all runs, and how to look at them more closely."""
    drawn = [standing for standing in standings if standing.num_samples]
    if not drawn:
        return
    groups = grouped(drawn)
    for group in groups:
        Console().print(result_table(group))
    names = report_names([standing.run for standing in drawn])
    for group in groups:
        if len(group) > 1:
            typer.echo(f"lim compare {_paths(group)}")
    options = ["--html", str(report), *(word for name in names for word in ("--name", name))]
    typer.echo(f"lim report {_paths(drawn)} {shlex.join(options)}")
    if is_wanted:
        from lim_sglang.evals.commands import write_report

        write_report([standing.path for standing in drawn], html=report, name=names)


def _paths(standings: Sequence["Standing"]) -> str:
    return shlex.join(str(standing.path) for standing in standings)


def grouped(standings: Sequence["Standing"]) -> list[list["Standing"]]:
    """The runs of each model and task, dense ones first: those that are worth comparing."""
    groups: dict[tuple[str, str], list[Standing]] = {}
    for standing in standings:
        groups.setdefault((standing.run.server.model, standing.run.task), []).append(standing)
    return [
        sorted(group, key=lambda each: each.run.server.lim["policy"] != "full")
        for group in groups.values()
    ]


def result_table(group: Sequence["Standing"]) -> Table:
    """The scores of runs of one model and task."""
    from lim_sglang.evals.metrics import load_summaries, score
    from lim_sglang.evals.table import percent, share

    title = f"{group[0].run.task_name}, {group[0].run.server.model}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("policy", overflow="fold")
    for name in ("samples", "pass@1", "vote", "tokens", "cut off"):
        table.add_column(name, justify="right")
    with Console(stderr=True).status("Counting votes"):
        summaries = load_summaries([standing.path for standing in group])
        for standing, found in zip(group, map(score, summaries), strict=True):
            count = f"{standing.num_samples:,}" if standing.is_complete else _samples(standing)
            table.add_row(
                *(standing.run.server.policy, count),
                *(percent(found.pass_at_1), percent(found.answered)),
                *(f"{found.mean_tokens:,.0f}", share(found.truncated)),
            )
    return table


def report_names(runs: Sequence["SweepRun"]) -> list[str]:
    """How `lim report` is told the names of models that are served from folders of other names."""
    from lim_sglang.evals.metrics import published_name

    served = {run.server.model: run.server.path for run in runs}
    folders = {name: published_name(path) for name, path in served.items() if path}
    return [f"{folder}={name}" for name, folder in folders.items() if folder != name]


def _refuse_gaps(failed: Sequence["Failed"]) -> None:
    """Raise `ServerError` where runs did not come to their end."""
    if failed:
        lines = "".join(f"\n  - {each.name}: {_first_line(each.error)}" for each in failed)
        raise ServerError(
            f"not all runs came to their end:{lines}\n"
            "what is finished is safe; the same command tries the others again"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
