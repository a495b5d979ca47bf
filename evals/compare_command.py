"""`lim compare`: runs of the same questions against the first of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lim_sglang.errors import ConfigError

if TYPE_CHECKING:
    from lim_sglang.evals.compare import Comparison

MANY = "Each interval is for itself: of 20 comparisons without a difference, one would show one."


def compare_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs' folders or summaries; the others are compared with the first."),
    ],
    common: Annotated[
        bool, typer.Option("--common", help="Compare the questions that both runs have.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a comparison.")] = False,
) -> None:
    """Say what runs of the same questions do and do not show: the difference with a 95 % interval,
    McNemar's test on the votes, the ratio of lengths."""
    from lim_sglang.evals.table import comparison_table

    comparisons = _compare(runs, common=common, seed=seed)
    if as_json:
        for found in comparisons:
            typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    Console().print(comparison_table(comparisons))
    for found in comparisons:
        typer.echo(found.sentence)
        for difference in found.other_differences:
            typer.echo(f"warning: {found.a} and {found.b} differ in {difference}", err=True)
    if len(comparisons) > 1:
        typer.echo(MANY)


def _compare(runs: list[Path], *, common: bool, seed: int) -> list["Comparison"]:
    from lim_sglang.evals.compare import compare, names_of
    from lim_sglang.evals.summary_file import load_summaries

    if len(runs) < 2:
        raise ConfigError("lim compare needs two runs: the one to compare with, then the others")
    console = Console(stderr=True)
    with console.status("Counting votes"):
        first, *others = summaries = load_summaries(runs)
        name, *names = names_of(summaries)
        return [
            compare(first, other, names=(name, other_name), common=common, seed=seed)
            for other, other_name in zip(others, names, strict=True)
        ]
