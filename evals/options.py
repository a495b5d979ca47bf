"""Command-line options of `lim eval` and its like, beside those of all that draw samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lim_sglang.errors import ConfigError

TasksArgument = Annotated[
    list[str],
    typer.Argument(
        help="The questions: math500, aime24, … or file:PATH.jsonl for your own; several are run "
        "one after the other.",
        show_default=False,
    ),
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help="Chains of thought drawn for each question, at most.",
        show_default="4; short 8, adaptive, early_stop and budget 40, confidence 32",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Ask only so many questions of a task, the first ones."),
]
UrlsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        "--base-url",
        envvar="LIM_URL",
        help="Address of a running server. May be repeated: each question goes to the server that "
        "has the most room, and all must serve the same. LIM_URL takes several, between spaces or "
        "commas.",
        show_default="http://127.0.0.1:30000",
    ),
]
ServeOption = Annotated[
    str | None,
    typer.Option(
        "--serve",
        metavar="MODEL",
        help="Start a server with this model for the run; options after -- go to SGLang.",
        show_default="a running server is asked",
    ),
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", "--lim-policy", help="Of --serve: lessismore or full.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", "--lim-budget", help="Of --serve: tokens that a sparse layer reads."),
]
SelectLayersOption = Annotated[
    str | None, typer.Option("--lim-select-layers", help="Of --serve, as `lim serve` has it.")
]
RankingOption = Annotated[
    str | None, typer.Option("--lim-ranking", help="Of --serve, as `lim serve` has it.")
]
LimConfigOption = Annotated[
    str | None, typer.Option("--lim-config", help="Of --serve, as `lim serve` has it.")
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Folder with TASK.jsonl, read in place of the Hugging Face hub."
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder of the run; of several tasks, the folder that gets one for each.",
        show_default="runs/ and the run's id",
    ),
]
ConcurrencyOption = Annotated[
    int,
    typer.Option(
        "--concurrency", min=1, help="Samples that each server is asked for at the same time."
    ),
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Draw samples again that a living server failed in an earlier session; they are left "
        "out otherwise.",
    ),
]


def read_pairs(option: str, form: str, texts: Sequence[str]) -> dict[str, str]:
    """What is after each text's first `=`, by what is before it.

    Args:
        form: of a text, for people.

    Raises:
        ConfigError: a text of another form, or a name that is given twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not (name and value):
            raise ConfigError(f"{option} takes {form}, not {text}")
        if name in pairs:
            raise ConfigError(f"{option} is given twice for {name}")
        pairs[name] = value
    return pairs
