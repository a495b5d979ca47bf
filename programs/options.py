"""Command-line options that every command which draws samples understands."""

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:30000"
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, by the shell's convention."""


def _refuse_none(top_p: float) -> float:
    if top_p == 0:
        raise typer.BadParameter("0 leaves no token to draw from; use more, up to 1 for all.")
    return top_p


def _refuse_zero(top_k: int) -> int:
    if top_k == 0:
        raise typer.BadParameter("0 leaves no token to draw from; use 1 or more, or -1 for all.")
    return top_k


UrlOption = Annotated[
    str, typer.Option("--url", envvar="LIM_URL", help="Address of the running server.")
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LIM_API_KEY",
        show_envvar=True,
        help="Key of a server that was started with one.",
    ),
]
SamplesOption = Annotated[
    int, typer.Option("--samples", min=1, help="Chains of thought drawn for each question.")
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=1, help="A sample is cut off after so many tokens.")
]
TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", min=0.0, max=2.0, help="0 always takes the likeliest token."),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        callback=_refuse_none,
        help="Draw from the likeliest tokens of this total probability.",
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(
        "--top-k",
        min=-1,
        callback=_refuse_zero,
        help="Draw from so many tokens at most; -1: from all.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        help="Sample i is sent SEED + i. SGLang heeds it only in deterministic inference.",
    ),
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout", min=1.0, max=86400.0, help="Seconds that the server has for one sample."
    ),
]
