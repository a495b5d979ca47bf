"""The commands `lim eval`, `lim grade`, `lim compare` and `lim report`, and their options."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lim_sglang.errors import ConfigError, DataError, ServerError
from lim_sglang.evals.metrics import score
from lim_sglang.evals.run_config import choose_method
from lim_sglang.evals.runner import Evaluation, Finished, run_evaluation
from lim_sglang.evals.servers import split_urls
from lim_sglang.evals.table import score_table
from lim_sglang.programs.options import (
    INTERRUPTED,
    ApiKeyOption,
    ApiOption,
    MaxTokensOption,
    ModelOption,
    ProgramOption,
    SeedOption,
    SettingsOption,
    SystemOption,
    TemperatureOption,
    ThinkingBudgetOption,
    ThinkingOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    read_settings,
)
from lim_sglang.programs.schema import DEFAULT_URL, Access, Api, Sampling, check_thinking_budget
from lim_sglang.server import ServerSpec, serving

if TYPE_CHECKING:
    from lim_sglang.evals.compare import Comparison
    from lim_sglang.evals.metrics import Summary
    from lim_sglang.evals.report import Group

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


def evaluate(
    context: typer.Context,
    tasks: TasksArgument,
    program: ProgramOption = "majority",
    samples: NumSamplesOption = None,
    settings: SettingsOption = None,
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = Sampling.max_tokens,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = Sampling.seed,
    system: SystemOption = None,
    thinking: ThinkingOption = None,
    thinking_budget: ThinkingBudgetOption = None,
    api: ApiOption = Api.SGLANG,
    url: UrlsOption = None,
    model: ModelOption = None,
    api_key: ApiKeyOption = None,
    serve: ServeOption = None,
    policy: PolicyOption = None,
    budget: BudgetOption = None,
    lim_select_layers: SelectLayersOption = None,
    lim_ranking: RankingOption = None,
    lim_config: LimConfigOption = None,
    timeout: TimeoutOption = 600.0,
    data_dir: DataDirOption = None,
    out: OutOption = None,
    concurrency: ConcurrencyOption = 64,
    retry_failed: RetryOption = False,
) -> None:
    """Score running servers, or one that is started for it, on benchmarks.

    Each sample is stored as it ends. The same command goes on where an earlier one stopped.
    """
    check_thinking_budget(thinking_budget, max_tokens)
    beside = {"system": system, "thinking": thinking, "thinking_budget": thinking_budget}
    method = choose_method(program, samples, options=read_settings(settings or []), **beside)
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    evaluation = Evaluation(tuple(tasks), method, sampling, limit, data_dir, out, retry_failed)
    access = Access(
        api=api,
        model=model,
        api_key=api_key,
        timeout_s=timeout,
        max_concurrency=concurrency,
    )
    flags = {
        "--lim-policy": policy,
        "--lim-budget": budget,
        "--lim-select-layers": lim_select_layers,
        "--lim-ranking": lim_ranking,
        "--lim-config": lim_config,
    }
    given = {flag: text for flag, text in flags.items() if text is not None}
    with _interrupted_in_a_word(), _servers(serve, url, access, given, context.obj or ()) as urls:
        finished = run_evaluation(evaluation, urls, access, Console(stderr=True), _show_score)
    _refuse_gaps(finished)


@contextmanager
def _servers(
    serve: str | None,
    urls: Sequence[str] | None,
    access: Access,
    lim_flags: dict[str, str],
    sglang_options: tuple[str, ...],
) -> Iterator[tuple[str, ...]]:
    """The addresses of the servers to ask: those that are named, or one for the length of a block.

    Raises:
        ConfigError: options of a server that is to be started, and none is.
        LimError: it does not start.
    """
    if serve is None:
        if lim_flags or sglang_options:
            given = ", ".join([*lim_flags, *(["what follows --"] if sglang_options else [])])
            raise ConfigError(f"{given}: options of a server that --serve MODEL would start")
        yield split_urls(urls or [DEFAULT_URL])
        return
    if urls:
        raise ConfigError("--serve starts a server of its own: leave --url and LIM_URL out")
    spec = ServerSpec(serve, lim_flags, sglang_options, access.api_key)
    with serving(spec, Console(stderr=True)) as url:
        yield (url,)


@contextmanager
def _interrupted_in_a_word() -> Iterator[None]:
    """End with the exit code of Ctrl-C; what became of a run has been said."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _show_score(finished: Finished) -> None:
    """Print the table of a run, if it has a sample."""
    if finished.summary:
        Console().print(score_table(finished.summary.conditions, score(finished.summary)))


def _refuse_gaps(finished: Sequence[Finished]) -> None:
    """Raise `ServerError` where samples are missing because they failed."""
    gaps = [each for each in finished if each.outcome.failures]
    if gaps:
        lines = "\n".join(_describe_gap(each) for each in gaps)
        raise ServerError(
            f"{lines}\nthey are not scored; the same command with --retry-failed draws them again"
        )


def _describe_gap(finished: Finished) -> str:
    failures = finished.outcome.failures
    task = finished.plan.request.asked.task.name
    return f"{task}: {len(failures)} samples failed, the last with: {failures[-1].error}"


MAX_WORKERS = 16
"""Unless asked for more: each has to import math-verify before it is of use."""


def grade(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of math-verify.",
            show_default=f"one a core, {MAX_WORKERS} at most",
        ),
    ] = None,
) -> None:
    """Extract the answers of a run's samples again and grade them: after a mend of the grader, or
    to check verdicts on another machine. Samples are left as they are; grades.jsonl beside them
    holds the new verdicts, all of them or, where this is interrupted, none."""
    from lim_sglang.evals.grade import Grader
    from lim_sglang.evals.regrade import grade_run
    from lim_sglang.evals.run_store import load_run
    from lim_sglang.evals.tasks import find_task
    from lim_sglang.programs.equivalence import EquivalenceChecker

    num_workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    loaded = [load_run(path) for path in runs]  # what is none is refused before any is graded
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        EquivalenceChecker(num_workers=num_workers) as checker,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        for run in loaded:
            bar = progress.add_task(run.record.run_id, total=len(run.samples))
            kind = find_task(run.record.settings["task"]).answer_kind
            found = grade_run(
                run.path,
                Grader(kind, checker),
                num_threads=num_workers,
                on_graded=partial(_show_graded, progress, bar),
            )
            typer.echo(
                f"{run.path}: {found.num_right} of {found.num_samples} right, "
                f"{found.num_changed} changed"
            )


def _show_graded(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


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
    from lim_sglang.evals.metrics import load_summaries

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
    from lim_sglang.evals.report import make_groups
    from lim_sglang.evals.tables import make_section

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
    from lim_sglang.evals.report_page import make_page
    from lim_sglang.evals.tables import PART, make_section

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
    from lim_sglang.evals.metrics import load_summaries

    with Console(stderr=True).status("Reading runs"):
        return load_summaries([found for path in paths for found in _expand(path)])


def _expand(path: Path) -> list[Path]:
    """A folder of runs or of summaries becomes what is in it."""
    from lim_sglang.evals.run_store import RUN_FILE

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
    from lim_sglang.evals.metrics import write_summary

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
