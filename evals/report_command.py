"""`lim report`: a page, plots, the README's table and summaries, from runs."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.options import read_pairs

if TYPE_CHECKING:
    from lim_sglang.evals.report import Group
    from lim_sglang.evals.summary import Summary

README_PLOT = "accuracy"
"""The plot that the README shows."""


def write_report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs' folders, summaries, or folders full of these."),
    ],
    html: Annotated[
        Path | None, typer.Option(help="An HTML file that needs no network: everything.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="A folder for the plots, each as SVG and as PNG.")
    ] = None,
    summaries: Annotated[
        Path | None,
        typer.Option(help="A folder for the runs' summaries, which hold no text of a question."),
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(help="A Markdown file: the text between its markers is replaced."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER=MODEL",
            help="The published name of a model that was served from a local folder; repeatable.",
        ),
    ] = None,
) -> None:
    """Write what runs have shown, with its conditions; without options, print the tables."""
    from lim_sglang.evals.readme_section import make_section
    from lim_sglang.evals.report import make_groups

    names = read_pairs("--name", "FOLDER=MODEL", name or [])
    found = rename(read_runs(runs), names)
    groups = make_groups(found)
    # All is made before anything is written, so that a refusal leaves no half of it.
    files = _make(groups, html=html, plots=plots, update=update)
    _write(files)
    _write_summaries(found, summaries)
    if not (files or summaries):
        typer.echo(make_section(groups))


def _make(
    groups: Sequence["Group"], *, html: Path | None, plots: Path | None, update: Path | None
) -> dict[Path, str | bytes]:
    """The contents of all files that are asked for, but for the summaries."""
    from lim_sglang.evals.plots import PLOTS, draw_png, draw_svg
    from lim_sglang.evals.readme_section import PART, make_section
    from lim_sglang.evals.report_page import make_page

    files: dict[Path, str | bytes] = {}
    if update:
        section = make_section(groups, plot_link(plots, update) if plots else None)
        files[update] = PART.replace_in(update, section)
    if html:
        files[html] = make_page(groups)
    if plots:
        for plot in PLOTS:
            drawn = draw_svg(plot, groups, name=plot.name, alone=True)
            files[plots / f"{plot.name}.svg"] = drawn
            files[plots / f"{plot.name}.png"] = draw_png(plot, groups)
    return files


def plot_link(plots: Path, update: Path) -> str:
    """Where a file that is updated finds the plot that it shows."""
    path = os.path.relpath(plots / f"{README_PLOT}.svg", update.parent)
    return Path(path).as_posix()


def read_runs(paths: Sequence[Path]) -> list["Summary"]:
    """The summaries of runs, whose votes are counted anew, and those that are stored.

    Raises:
        DataError: a path is none of what it may be.
    """
    from lim_sglang.evals.summary_file import load_summaries

    with Console(stderr=True).status("Reading runs"):
        return load_summaries([found for path in paths for found in _expand(path)])


def _expand(path: Path) -> list[Path]:
    """A folder of runs or of summaries becomes what is in it."""
    from lim_sglang.evals.store import RUN_FILE

    if not path.is_dir() or (path / RUN_FILE).exists():
        return [path]
    inside = sorted(path.iterdir())
    found = [each for each in inside if each.suffix == ".json" or (each / RUN_FILE).exists()]
    if not found:
        raise DataError(
            f"{path} holds no run and no summary; name a run's folder, a file that lim report "
            "--summaries wrote, or a folder of these"
        )
    return found


def rename(summaries: Sequence["Summary"], names: Mapping[str, str]) -> list["Summary"]:
    """With the published names of models.

    Raises:
        ConfigError: a name is of no run's model.
    """
    models = dict.fromkeys(str(summary.conditions.get("model")) for summary in summaries)
    unknown = [name for name in names if name not in models]
    if unknown:
        raise ConfigError(
            f"--name {', '.join(unknown)}: no run is of that model; they are of {', '.join(models)}"
        )
    return [
        replace(
            summary,
            conditions={**summary.conditions, "model": names[str(summary.conditions["model"])]},
        )
        if summary.conditions.get("model") in names
        else summary
        for summary in summaries
    ]


def summary_file(summary: "Summary") -> str:
    """The file's name of a summary: that of its run, which may come from a stranger's file."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', summary.run_id).lstrip('.')}.json"


def _write_summaries(summaries: Sequence["Summary"], folder: Path | None) -> None:
    from lim_sglang.evals.summary_file import write_summary

    if not folder:
        return
    for summary in summaries:
        path = folder / summary_file(summary)
        write_summary(summary, path)
        typer.echo(f"wrote {path}", err=True)


def _write(files: Mapping[Path, str | bytes]) -> None:
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise DataError(
                f"cannot write {path} ({error.strerror}); name another file, or make room"
            ) from None
        typer.echo(f"wrote {path}", err=True)
