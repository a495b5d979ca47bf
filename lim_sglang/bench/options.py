"""Command-line options that several benchmarks understand."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lim_sglang.bench.points import CACHE_DTYPES, QUANTIZATIONS, ModelChoice
from lim_sglang.bench.shapes import SHAPES, check_shape

ShapeOption = Annotated[
    str | None,
    typer.Option(help=f"A published shape with dummy weights: {', '.join(SHAPES)}."),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="A model folder instead.")]
BudgetOption = Annotated[int, typer.Option(min=1, help="Tokens that a sparse layer reads.")]
MemoryOption = Annotated[
    float,
    typer.Option(min=0.01, max=0.99, help="Share of the GPU for weights and KV cache."),
]
PointOption = Annotated[
    list[str] | None,
    typer.Option(
        help="BATCHxCONTEXT such as 8x32768 or 8x32k, or a mixed batch such as 4x32k+4x1k; may "
        "be repeated."
    ),
]
BackendsOption = Annotated[
    str, typer.Option(help="lim, and of flashinfer, triton, fa3 those to compare with.")
]
CacheOption = Annotated[
    str,
    typer.Option("--kv-cache-dtype", help=f"Of all backends: {', '.join(CACHE_DTYPES)}."),
]
QuantizationOption = Annotated[
    str,
    typer.Option(
        help=f"How weights are quantized while they are loaded: {', '.join(QUANTIZATIONS)}."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="A file to which one JSON line a row is added.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show SGLang's log.")]


def choose_model(shape: str | None, model: str | None) -> ModelChoice:
    """The one that was named, if it is known."""
    return ModelChoice(check_shape(shape) if shape else None, model)


def log(verbose: bool) -> None:
    """Let SGLang, in this process, say as much as was asked for."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
