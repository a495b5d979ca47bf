"""`lim trace`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from lim_sglang.bench.workloads import read_policies
from lim_sglang.config import LimConfig, parse_layers
from lim_sglang.errors import ConfigError
from lim_sglang.progress import plain_console

DEFAULT_POLICIES = ("lessismore", "tidal", "streaming", "quest")


def trace(
    model: Annotated[str, typer.Argument(help="A model folder, or a hub id.")],
    questions: Annotated[
        str, typer.Option(help="Questions of your own, in the form that lim eval file: takes.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of trace.jsonl, the records, trace.html, the page, and its plots "
            "recall.svg, layers.svg, overlap.svg and changes.svg."
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies: names between commas, or the JSON of --lim-config; repeatable. The "
            "first decodes; the others choose beside it.",
            show_default=",".join(DEFAULT_POLICIES),
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Decode by full attention; all policies choose beside.")
    ] = False,
    budget: Annotated[int, typer.Option(min=2, help="Tokens that a sparse layer reads.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 1024,
    every: Annotated[int, typer.Option(min=1, help="Measure one decode step in so many.")] = 8,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to measure, between commas.", show_default="all"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of questions, the first ones.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show SGLang's log.")] = False,
) -> None:
    """Trace what the layers of decode steps read, in greedy answers: the share of the
    attention mass in the sets of each policy, the heads' overlap, and the change of the sets. The
    same command goes on where it was interrupted."""
    policies = read_policies(policy, budget) if policy else _default_policies(budget)
    if "lossless" in {config.policy for config in policies.values()}:
        raise ConfigError("--policy lossless decodes densely: write --dense --policy lessismore")
    chosen = parse_layers(layers) if layers is not None else None
    if chosen == () or (chosen and min(chosen) < 0):
        raise ConfigError(f"--layers takes layers from 0 between commas, not {layers!r}")
    from lim_sglang.bench.model_runner import show_log
    from lim_sglang.tracing import report, run

    show_log(verbose=verbose)
    options = run.TraceOptions(
        *(model, questions, policies, dense, budget, max_tokens, every, chosen, limit, out)
    )
    found = run.trace(options, plain_console(stderr=True))
    typer.echo(report.as_markdown(found))
    page = report.write_page(found, out)
    typer.echo(f"\nThe page is {page}.")


def _default_policies(budget: int) -> dict[str, LimConfig]:
    """Return the settings of the default policies that take a budget; say which do not.

    Raises:
        ConfigError: the first of them does not, as then none decodes.
    """
    found = read_policies(DEFAULT_POLICIES[:1], budget)
    for name in DEFAULT_POLICIES[1:]:
        try:
            found |= read_policies([name], budget)
        except ConfigError as error:
            typer.echo(f"Left out: {name}, since {error}", err=True)
    return found
