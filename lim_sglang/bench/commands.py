"""`lim bench`: its commands and their options."""

import json
import os
import shlex
import signal
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from lim_sglang.bench import workloads
from lim_sglang.bench.workloads import SHAPES, CacheDtype, ModelChoice, Quantization
from lim_sglang.config import BACKEND, LimConfig
from lim_sglang.errors import INTERRUPTED, ConfigError, DataError, lim_command
from lim_sglang.gates.training import MAX_SEED, check_folder
from lim_sglang.launch.server import CPU_ENVIRONMENT
from lim_sglang.markdown_section import counted
from lim_sglang.models import has_gpu
from lim_sglang.programs.options import ApiKeyOption, ServerCommand, given_options

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on an NVIDIA GPU; divergence runs on a CPU, too, regress and "
    "report need neither. No time is shown where a kernel is not exact.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ShapeOption = Annotated[
    str | None, typer.Option(help=f"A published shape with dummy weights: {', '.join(SHAPES)}.")
]
ModelOption = Annotated[str | None, typer.Option(help="A model folder instead.")]
BudgetOption = Annotated[int, typer.Option(min=1, help="Tokens that a sparse layer reads.")]
MemoryOption = Annotated[
    float, typer.Option(min=0.01, max=0.99, help="Share of the GPU for weights and KV cache.")
]
TopPOption = Annotated[
    float, typer.Option(min=0.01, max=1, help="Of all requests that are not greedy.")
]
BackendsOption = Annotated[
    str, typer.Option(help="lim, and of flashinfer, triton, fa3 those to compare with.")
]
StepBackendsOption = Annotated[
    str,
    typer.Option(
        help="lim, and of flashinfer, triton, fa3 those to compare with; flashinfer+layers is "
        "dense with our kernels of layers."
    ),
]
PointOption = Annotated[
    list[str] | None, typer.Option(help="BATCHxCONTEXT: 8x32k, or mixed, 4x32k+4x1k; repeatable.")
]
PoliciesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Policies to compare with LessIsMore, at the same budget: names between commas, or "
        "the JSON of --lim-config; repeatable."
    ),
]
CacheOption = Annotated[CacheDtype, typer.Option(help="KV cache: auto, fp8_e4m3 or fp8_e5m2.")]
QuantizationOption = Annotated[Quantization, typer.Option(help="Weights: none, or fp8 at loading.")]
OutOption = Annotated[Path | None, typer.Option(help="A file to which each row is added as JSON.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show SGLang's log.")]


MOST_COUNTED_REQUESTS = 64
"""Requests at once for which policies have memory when capacities are compared."""


def show(activity: str) -> None:
    """Show the current activity on standard error."""
    typer.echo(activity, err=True)


def keep(out: Path | None, line: str) -> None:
    """Add a JSON line to the file of --out, so that an interrupted run keeps its results."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(f"{line}\n")


@bench.command("decode")
def decode(
    shape: ShapeOption = None,
    model: ModelOption = None,
    point: PointOption = None,
    batch: Annotated[int | None, typer.Option(help="Requests, with --context.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each request; needs --batch.")
    ] = None,
    context_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the longest request that the server allows.",
            show_default="the model's",
        ),
    ] = None,
    budget: BudgetOption = 2048,
    backends: StepBackendsOption = "lim,flashinfer",
    policy: PoliciesOption = None,
    kv_cache_dtype: CacheOption = "auto",
    quantization: QuantizationOption = "none",
    tp: Annotated[
        int,
        typer.Option(
            min=1,
            help="GPUs that share the heads of each layer; over 1 is refused so far, as a server's "
            "--tp-size is on a GPU.",
        ),
    ] = 1,
    windows: Annotated[int, typer.Option(min=1, help="Timed windows of each backend.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps in a window.")] = 20,
    mem_fraction_static: MemoryOption = 0.88,
    split: Annotated[bool, typer.Option(help="Divide the step into its parts.")] = True,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time decode steps of lim and of SGLang's dense backends, window by window in turns."""
    choice = ModelChoice(shape, model, kv_cache_dtype, quantization)
    points = workloads.choose_points(point or [], batch, context)
    names = workloads.read_backends(backends, choice, by_step=True)
    from lim_sglang.bench.decode import DecodeOptions, measure
    from lim_sglang.bench.model_runner import show_log
    from lim_sglang.bench.results import DecodeTable

    policies = workloads.read_timed_policies(policy or [], budget)
    options = DecodeOptions(
        *(choice, points, names, budget, policies, mem_fraction_static, windows, steps, split),
        context_limit=context_limit,
        tp=tp,
    )
    show_log(verbose=verbose)
    measured = []
    for row, conditions in measure(options, show):
        measured.append((row, conditions))
        keep(out, row.to_json(conditions))
        typer.echo(row.describe())
    table = DecodeTable.of(measured)
    typer.echo(f"\n{table.section(points)}\n{'; '.join(table.conditions['notes'])}")


@bench.command("drafts")
def drafts(
    shape: ShapeOption = None,
    model: ModelOption = None,
    point: PointOption = None,
    budget: BudgetOption = 2048,
    draft_budget: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens that a draft keeps: 256, 512, 1024, 2048; repeatable.",
            show_default="1024",
        ),
    ] = None,
    drafts: Annotated[
        str, typer.Option(help="Drafts of a cycle, of 0, 4, 8, 12 and 15, between commas.")
    ] = "0,4,8,12,15",
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=2, help="Of all requests, 0 for greedy; repeatable.", show_default="0.6"
        ),
    ] = None,
    top_p: TopPOption = 1.0,
    backends: StepBackendsOption = "lim,flashinfer,triton",
    windows: Annotated[int, typer.Option(min=1, help="Timed windows of each.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps, or cycles, in a window.")] = 10,
    mem_fraction_static: MemoryOption = 0.85,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time cycles of lossless drafting, with sampling, beside dense and LessIsMore steps. Tokens
    are counted by acceptance that was recorded on easy and on hard texts."""
    choice = ModelChoice(shape, model)
    points = workloads.choose_points(point or [], None, None)
    names = workloads.read_backends(backends, choice, by_step=True)
    numbers = workloads.read_drafts(drafts)
    from lim_sglang.bench.decode import DecodeOptions
    from lim_sglang.bench.drafts import ACCEPTANCE, Draw, draft_table, measure
    from lim_sglang.bench.model_runner import show_log

    options = DecodeOptions(
        *(choice, points, names, budget, {}, mem_fraction_static, windows, steps, False)
    )
    show_log(verbose=verbose)
    numbers_kept = tuple(dict.fromkeys(draft_budget or [1024]))
    workloads.check_draft_budgets(numbers_kept, ACCEPTANCE)
    budgets = [
        LimConfig.from_mapping({"policy": "lossless", "budget": each}) for each in numbers_kept
    ]
    draws = [Draw(each, top_p if each else 1.0) for each in dict.fromkeys(temperature or [0.6])]
    rows, notes = [], ""
    for row, conditions in measure(options, budgets, numbers, draws, show):
        rows.append(row)
        keep(out, json.dumps({"drafts": asdict(row), "conditions": conditions}))
        typer.echo(row.describe())
        notes = "; ".join(conditions["notes"])
    typer.echo(f"\n{draft_table(rows)}\n{notes}")


@bench.command("capacity")
def capacity(
    shape: ShapeOption = None,
    model: ModelOption = None,
    budget: BudgetOption = 2048,
    backends: BackendsOption = "lim,flashinfer",
    policy: PoliciesOption = None,
    kv_cache_dtype: CacheOption = "auto",
    quantization: QuantizationOption = "none",
    mem_fraction_static: MemoryOption = 0.88,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Count the tokens that the KV cache holds, each backend and policy in a process of its own.
    With --policy all have the page size that any of them needs, and 64 requests at once."""
    choice = ModelChoice(shape, model, kv_cache_dtype, quantization)
    names = workloads.read_backends(backends, choice)
    from lim_sglang.bench.model_runner import count_slots, run_in_child, settings_for, show_log
    from lim_sglang.bench.results import surroundings
    from lim_sglang.bench.verify import require_gpu

    show_log(verbose=verbose)
    require_gpu()
    policies = workloads.read_timed_policies(policy or [], budget)
    options = workloads.options_of_policies(policies, MOST_COUNTED_REQUESTS)
    settings = dict.fromkeys(names, settings_for(budget)) | policies
    slots = dict.fromkeys(settings, 0)
    dense = names[1:]
    # Dense backends first: each other line is complete, with its share, once it is counted.
    for name in sorted(settings, key=lambda name: name not in dense):
        show(f"Starting {name}")
        backend = BACKEND if name in policies else name
        slots[name] = run_in_child(
            count_slots, choice, backend, settings[name], mem_fraction_static, options
        )
        most = max((slots[each] for each in dense), default=0)
        compared = most and name not in dense
        share = f" ({100 * slots[name] / most:.2f} % of dense)" if compared else ""
        typer.echo(f"{name:>12}  {slots[name]:,} tokens{share}")
    conditions = surroundings() | asdict(choice) | {"model": choice.name, "budget": budget}
    conditions["mem_fraction_static"] = mem_fraction_static
    keep(out, json.dumps({"kv_capacity": slots, "conditions": conditions}))


@bench.command("kernel")
def kernel(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="score, shortlist, full-ranking, select-scored, select, lse, softmax-mass, "
            "topk-by-mass, select-by-mass, sparse-attention, sparse-attention-kv-heads, "
            "sparse-attention-query-heads (a list each), sparse-attention-tensor-cores, "
            "sparse-attention-cuda-cores (both FlashInfer's), run-attention or "
            "run-attention-flashinfer (dense, of several tokens of a request); may be repeated; "
            "all by default."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 32768,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    dim: Annotated[int, typer.Option(min=16, help="Dimensions of a head.")] = 128,
    budget: BudgetOption = 2048,
    width: Annotated[
        int, typer.Option(min=1, help="Last tokens of each request that run-attention attends for.")
    ] = 9,
    repeats: Annotated[int, typer.Option(min=1, help="Replays; the median is shown.")] = 30,
    out: OutOption = None,
) -> None:
    """Time kernels of selection and attention one by one, in CUDA graphs, with a cold and a warm L2
    cache."""
    from lim_sglang.bench.kernel import check_case, measure_ops, op_table
    from lim_sglang.kernels.bench import StepShape

    case = StepShape(batch, context, heads, kv_heads, dim, budget, width=width)
    check_case(case, op or [])
    show("Checking the kernels on this GPU")
    rows = []
    for row in measure_ops(op or [], case, repeats):
        show(f"Measured {row.op}: {row.timing.cold_us.median:.1f} µs, L2 cold")
        rows.append(row)
        keep(out, row.to_json(case, repeats))
    shape = f"{batch} x {context:,}, {heads} / {kv_heads} heads x {dim}"
    typer.echo(f"{shape}, K = {budget:,}, width {width}")
    typer.echo(op_table(rows))


@bench.command("serve", cls=ServerCommand)
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
    policies: BackendsOption = "lim,flashinfer",
    limit_seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Then abort all requests of the server."),
    ] = None,
    stream_interval: Annotated[int, typer.Option(min=1, help="New tokens sent together.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Of all requests, 0 for greedy.")
    ] = 0.0,
    top_p: TopPOption = 1.0,
    mem_fraction_static: MemoryOption = 0.88,
    url: Annotated[str | None, typer.Option(help="A running server of this machine.")] = None,
    api_key: ApiKeyOption = None,
    out: OutOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Long generations side by side over HTTP, LessIsMore against dense SGLang. Options after --
    go to every server."""
    from lim_sglang.bench import serve as serving
    from lim_sglang.bench.verify import require_gpu
    from lim_sglang.launch.server import on_signals

    loads = [
        serving.Load(
            *(number, prompt_tokens, new_tokens, limit_seconds, stream_interval, temperature, top_p)
        )
        for number in dict.fromkeys(concurrency or [64])
    ]
    further: tuple[str, ...] = context.obj or ()
    if url is None:
        choice, ours_last = ModelChoice(shape, model), workloads.read_backends(policies)[::-1]
        words = ("--mem-fraction-static", f"{mem_fraction_static}", *further)
        words += () if verbose else ("--log-level", "warning")
        servers = serving.own_servers(choice, ours_last, loads, budget, words, verbose)
        extra = {"model": choice.name, "dummy_weights": choice.is_dummy, "sglang_options": further}
    else:
        address = address_of(context, url, further)
        servers, extra = iter([nullcontext(SimpleNamespace(url=address))]), {}
    require_gpu()
    show("Checking the kernels on this GPU")
    rows = []
    # A service manager's signal ends the running server, too, as Ctrl-C does.
    with on_signals(signal.default_int_handler):
        for row, conditions in serving.measure(servers, loads, api_key):
            rows.append(row)
            keep(out, json.dumps({"serve": asdict(row), "conditions": conditions | extra}))
            show(f"{row.policy}, {row.concurrency} requests: {row.tokens_per_s:,.0f} tokens/s")
    typer.echo(f"{serving.serve_table(rows)}\n{'; '.join(serving.NOTES)}")


def address_of(context: typer.Context, url: str, further: tuple[str, ...]) -> str:
    """Return the address of --url; refuse another machine's, and options of the server's start."""
    from lim_sglang.programs.http_client import is_loopback, root_url

    names = ("shape", "model", "policies", "budget", "mem_fraction_static")
    if given := [*further, *given_options(context, names)]:
        raise ConfigError(f"{', '.join(given)} would change nothing: the server runs already")
    address = root_url(url)
    if not is_loopback(address):
        raise ConfigError(
            f"{address} is on another machine: run lim bench serve there, since each row names the "
            "GPU, versions and commit of its machine"
        )
    return address


@bench.command("divergence")
def divergence(
    model: Annotated[str, typer.Argument(help="A model folder, or a hub id.")],
    texts: Annotated[
        Path,
        typer.Option(
            help='JSON lines with {"text": ...} or {"tokens": [...]}, or the folder of a run of '
            "lim eval, whose questions and answers are taken."
        ),
    ],
    policy: Annotated[
        list[str],
        typer.Option(
            help="Policies: names between commas, or the JSON of --lim-config; repeatable."
        ),
    ],
    budget: Annotated[
        str, typer.Option(help="Tokens that a sparse layer reads, between commas.")
    ] = "128,256,512,1024",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences made of the texts.")] = 6,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Last tokens of each, to be decoded.")] = 512,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Decides the order of the texts.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="A file to which each row is added as JSON; its rows are not repeated."),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure how far each policy's next-token distribution is from dense attention's: KL
    divergence and agreement of the likeliest token, teacher-forced on texts, on one GPU or on the
    CPU."""
    cells = workloads.read_cells(policy, budget)
    from lim_sglang.bench.divergence import DivergenceOptions, measure
    from lim_sglang.bench.model_runner import show_log
    from lim_sglang.bench.results import DivergenceTable, read_divergences
    from lim_sglang.progress import plain_console

    choice = ModelChoice(None, model)
    options = DivergenceOptions(choice, texts, cells, sequences, length, steps, seed)
    show_log(verbose=verbose)
    recorded = read_divergences(out) if out and out.exists() else []
    measured = []
    for row, conditions in measure(options, recorded, plain_console(stderr=True)):
        measured.append((row, conditions))
        if (row, conditions) not in recorded:
            keep(out, row.to_json(conditions))
    typer.echo(DivergenceTable.of(measured).section())


def calibrate(
    model: Annotated[str, typer.Argument(help="A model folder, or a hub id.")],
    layers: Annotated[int, typer.Option(min=1, max=4, help="SELECT layers to choose.")] = 2,
    pick_layers: Annotated[
        int, typer.Option(min=0, max=4, help="Pick layers to choose beside the SELECT layers.")
    ] = 0,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="As for lim bench divergence.",
            show_default="the model's own answers to built-in prompts",
        ),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens that a sparse layer reads.")] = 128,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Last tokens of each, to be measured.")] = 64,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Of the model's answers, or of the texts' order."),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the preset, written at the end.",
            show_default="presets/ and the model's name",
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Choose a model's SELECT layers, and write a preset of them for --lim-preset: the first layer
    above the dense ones, then one by one those that bring next tokens nearest to dense attention's
    (KL divergence, teacher-forced), then pick layers in the same way, on one GPU or on the CPU."""
    if not has_gpu():
        for name, value in CPU_ENVIRONMENT.items():  # before torch, which reads it once, is loaded
            os.environ.setdefault(name, value)
    from lim_sglang.bench import calibration
    from lim_sglang.bench.model_runner import show_log
    from lim_sglang.progress import plain_console

    choice = ModelChoice(None, model)
    options = calibration.CalibrationOptions(
        choice, texts, layers, budget, sequences, length, steps, seed, pick_layers
    )
    path = out or Path("presets", f"{Path(model).resolve().name}.json")
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder: name the preset's file")
    check_folder(path.parent)
    show_log(verbose=verbose)
    try:
        found = calibration.calibrate(options, plain_console(stderr=True))
    except KeyboardInterrupt:
        show("Interrupted: no preset was written.")
        raise typer.Exit(INTERRUPTED) from None
    calibration.write_preset(found, path)
    words = shlex.join([lim_command(), "serve", model, "--lim-preset", str(path)])
    typer.echo(f"{found.table()}\n")
    typer.echo(f"The preset of layers {found.layers} is in {path}. Next:\n{words}")


@bench.command("regress")
def regress(
    old: Annotated[Path, typer.Argument(help="What `lim bench decode` wrote by --out before.")],
    new: Annotated[Path, typer.Argument(help="What it wrote after a change.")],
    most: Annotated[
        float, typer.Option(min=0, help="Percent by which a step may become slower.")
    ] = 2.0,
) -> None:
    """Compare two recordings of decode steps; exit code 1 if a step of LessIsMore or another policy
    became slower by more, in windows that do not overlap; needs no GPU."""
    from lim_sglang.bench.regression import find_changes, losses, table_of_changes

    changes = find_changes(old, new)
    typer.echo(table_of_changes(changes, most / 100))
    if lost := losses(changes, most / 100):
        raise DataError(
            f"{counted(len(lost), 'step')} of {len(changes)} became slower by more than {most:g} %"
        )


@bench.command("report")
def write_report(
    files: Annotated[
        list[Path],
        typer.Argument(help="What `lim bench decode` and `divergence` have written by --out."),
    ],
    update: Annotated[Path | None, typer.Option(help="Markdown file for three rows.")] = None,
    results: Annotated[Path | None, typer.Option(help="Markdown file for all rows.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file of step times.")] = None,
) -> None:
    """Write tables of recorded rows between the markers of Markdown files, and plot the first table
    of decode steps; needs no GPU."""
    from lim_sglang.bench import results as tables
    from lim_sglang.bench.plots import draw

    distances = [path for path in files if tables.holds_divergences(path)]
    steps = tables.read_tables([path for path in files if path not in distances])
    if not steps and (update or plot):
        raise ConfigError("--update and --plot show rows of `lim bench decode`: name a file of it")
    parts = [table.section(table.points) for table in steps]
    if results and plot:
        parts.insert(1, f"![Step time over context]({os.path.relpath(plot, results.parent)})")
    measured = [row for path in distances for row in tables.read_divergences(path)]
    sections = {
        tables.SECTION: parts,
        tables.DIVERGENCE_SECTION: [each.section() for each in tables.divergence_tables(measured)],
    }
    texts = {section: "\n\n".join(found) for section, found in sections.items() if found}
    # All texts are made before the first is written, so that a refusal changes no file.
    changed: dict[Path, str] = {}
    if results:
        for section, text in texts.items():
            changed[results] = section.replace_in(results, text, changed.get(results))
    if update:
        link = os.path.relpath(results, update.parent) if results else None
        proof = steps[0].proof() + (f" [All rows]({link})." if link else "")
        changed[update] = tables.SECTION.replace_in(update, proof, changed.get(update))
    if plot:
        draw(steps[0], plot)
    for path, text in changed.items():
        path.write_text(text)
        typer.echo(f"The table is in {path}.")
    if not changed:
        typer.echo("\n\n".join(texts.values()))
