"""`lim bench`: what decode costs on this GPU, and what it may cost at least."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lim_sglang.bench.options import (
    BackendsOption,
    BudgetOption,
    CacheOption,
    MemoryOption,
    ModelOption,
    OutOption,
    PointOption,
    QuantizationOption,
    ShapeOption,
    VerboseOption,
    choose_model,
    log,
)
from lim_sglang.bench.points import (
    DecodeOptions,
    Precision,
    Repeats,
    choose_backends,
    choose_points,
)
from lim_sglang.bench.progress import progress, wide_console
from lim_sglang.bench.report import write_report
from lim_sglang.bench.serve_command import serve

if TYPE_CHECKING:
    from lim_sglang.bench.capacity import Capacity
    from lim_sglang.bench.rows import Row

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on an NVIDIA GPU. No time is shown where a kernel is not exact.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

bench.command("serve")(serve)
bench.command("report")(write_report)


@bench.command("decode")
def decode(
    shape: ShapeOption = None,
    model: ModelOption = None,
    point: PointOption = None,
    batch: Annotated[int | None, typer.Option(help="Requests, with --context.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each, with --batch.")] = None,
    budget: BudgetOption = 2048,
    backends: BackendsOption = "lim,flashinfer",
    kv_cache_dtype: CacheOption = "auto",
    quantization: QuantizationOption = "none",
    windows: Annotated[int, typer.Option(min=1, help="Timed windows of each backend.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps in a window.")] = 20,
    mem_fraction_static: MemoryOption = 0.88,
    split: Annotated[bool, typer.Option(help="Divide the step into its parts.")] = True,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time decode steps of lim and of SGLang's dense backends, window by window in turns."""
    options = DecodeOptions(
        model=choose_model(shape, model),
        points=choose_points(point or [], batch, context),
        backends=choose_backends(backends),
        repeats=Repeats(windows, steps),
        budget=budget,
        mem_fraction_static=mem_fraction_static,
        precision=Precision(kv_cache_dtype, quantization),
        split=split,
    )
    log(verbose)
    if not _show_decode(options, out):
        raise typer.Exit(1)


def _show_decode(options: DecodeOptions, out: Path | None) -> bool:
    """Measure, showing and keeping each row as it comes; whether all parts were measured."""
    from lim_sglang.bench.decode import measure
    from lim_sglang.bench.rows import (
        append_lines,
        json_line,
        limit_warnings,
        make_table,
        one_line,
        under_table,
    )

    rows: list[Row] = []
    conditions: dict[str, Any] = {}
    with progress() as report:
        for found, conditions in measure(options, report.doing):
            rows += found
            if out:
                append_lines(out, [json_line(row, conditions) for row in found])
            for row in found:
                report.done(one_line(row))
    console = wide_console()
    console.print(make_table(rows, title=options.title, budget=options.budget))
    typer.echo(under_table(conditions))
    for warning in limit_warnings(rows):
        typer.echo(f"warning: {warning}", err=True)
    errors = [f"{row.point} {row.backend}: {row.split_error}" for row in rows if row.split_error]
    for error in errors:
        typer.echo(f"error: the step could not be divided, {error}", err=True)
    return not errors


@bench.command("capacity")
def capacity(
    shape: ShapeOption = None,
    model: ModelOption = None,
    budget: BudgetOption = 2048,
    backends: BackendsOption = "lim,flashinfer",
    kv_cache_dtype: CacheOption = "auto",
    quantization: QuantizationOption = "none",
    mem_fraction_static: MemoryOption = 0.88,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Count the tokens that the KV cache holds, each backend in a process of its own."""
    chosen, names = choose_model(shape, model), choose_backends(backends)
    precision = Precision(kv_cache_dtype, quantization)
    precision.check_backends(names)
    log(verbose)
    from lim_sglang.bench.capacity import measure_capacities
    from lim_sglang.bench.facts import surroundings
    from lim_sglang.bench.rows import append_lines

    with progress() as report:
        report.doing(f"Starting {', '.join(names)}, one after the other")
        found = measure_capacities(
            chosen,
            names,
            budget=budget,
            mem_fraction_static=mem_fraction_static,
            precision=precision,
        )
    _show_capacities(precision.describe(chosen.name), found)
    if out:
        conditions = surroundings() | {
            "model": chosen.name,
            "budget": budget,
            "mem_fraction_static": mem_fraction_static,
            **asdict(precision),
        }
        slots = {each.backend: each.num_tokens for each in found}
        append_lines(out, [json.dumps({"kv_capacity": slots, "conditions": conditions})])


def _show_capacities(title: str, found: Sequence["Capacity"]) -> None:
    """Ours first, as a share of the largest of the others."""
    typer.echo(title)
    most = max((each.num_tokens for each in found[1:]), default=None)
    for each in found:
        share = f" ({100 * each.num_tokens / most:.2f} % of dense)" if most else ""
        typer.echo(f"{each.backend:>12}  {each.num_tokens:,} tokens{share}")


@bench.command("kernel")
def kernel(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="score, shortlist, full-ranking, select-scored, select, lse, softmax-mass, "
            "topk-by-mass, select-by-mass, sparse-attention, and FlashInfer's in its place: "
            "sparse-attention-tensor-cores or sparse-attention-cuda-cores; may be repeated; "
            "all by default."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 32768,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    dim: Annotated[int, typer.Option(min=16, help="Dimensions of a head.")] = 128,
    budget: BudgetOption = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Replays that the median is of.")] = 30,
    out: OutOption = None,
) -> None:
    """Time kernels of selection and sparse attention one by one, in CUDA graphs, with a cold and a
    warm L2 cache."""
    from lim_sglang.bench.kernel import check_case, measure_ops, op_line, op_table
    from lim_sglang.bench.rows import append_lines
    from lim_sglang.kernels.bench import StepShape

    case = StepShape(batch, context, heads, kv_heads, dim, budget)
    check_case(case, op or [])
    rows = []
    with progress() as report:
        report.doing("Are the kernels exact on this GPU?")
        for row in measure_ops(op or [], case, repeats):
            report.doing(f"Measured {row.op}")
            rows.append(row)
            if out:
                append_lines(out, [op_line(row, case, repeats)])
    wide_console().print(op_table(rows, case))
