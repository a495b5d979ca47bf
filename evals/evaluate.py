"""The command `lim eval`: its options, and the runs that it completes."""

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lim_sglang.config import CONFIG_VAR, URL_VAR
from lim_sglang.errors import (
    INTERRUPTED,
    ConfigError,
    LimError,
    ServerError,
    bullets,
    lim_command,
)
from lim_sglang.evals.grading import Grader
from lim_sglang.evals.long_questions import DEFAULT_LENGTH, GENERATORS, LENGTHS
from lim_sglang.evals.metrics import Summary, score
from lim_sglang.evals.question_notes import question_notes
from lim_sglang.evals.report import FULL
from lim_sglang.evals.run_config import EVAL_SAMPLES, RunConfig, folder_name
from lim_sglang.evals.run_store import RUN_FILE, Run
from lim_sglang.evals.runner import (
    RUNS_FOLDER,
    FinishedRun,
    complete_runs,
    describe_failures,
    finish_run,
    load_benchmarks,
)
from lim_sglang.evals.servers import split_urls
from lim_sglang.evals.sources import ROW_FORM
from lim_sglang.evals.tables import print_table, reasons_without_answer, score_table
from lim_sglang.evals.tasks import TASKS, Question, short_name, sized_name
from lim_sglang.launch.server import ServerSpec, serving
from lim_sglang.markdown_section import join_words
from lim_sglang.policies import POLICIES
from lim_sglang.programs.http_client import UnreachableError
from lim_sglang.programs.options import (
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
    by_program,
    given_options,
    read_settings,
)
from lim_sglang.programs.program import is_too_long
from lim_sglang.programs.schema import DEFAULT_URL, Access, Api, Sampling
from lim_sglang.progress import plain_console, print_plain

TasksArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help=f"Questions: {', '.join(TASKS)}, or file:PATH.jsonl for your own, {ROW_FORM}, and "
        '"id" if you like. Their answers are compared as mathematical expressions, which '
        "file:PATH.jsonl:expression says, too; with file:PATH.jsonl:integer as integers from 0 to "
        "999; with file:PATH.jsonl:text word for word; with file:PATH.jsonl:choice as the "
        "letters of options, which stand in the question's text, as in \"Which is prime?\\nA) 4\\n"
        'B) 5". Several tasks are run one after the other.',
        show_default=False,
    ),
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help="Most chains of thought for each question.",
        show_default=by_program(EVAL_SAMPLES),
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Number of questions of each task, the first ones."),
]
LengthOption = Annotated[
    int | None,
    typer.Option(
        "--length",
        min=LENGTHS[0],
        max=LENGTHS[-1],
        help="Tokens of each question, about: a word, a digit and a sign count as one each. "
        f"{join_words(GENERATORS)} are generated in that length; before a question of a benchmark "
        "whose rows have solutions, such as math500, others are shown with theirs, up to that "
        "length at most. "
        "TASK:LENGTH says it of one task.",
        show_default=f"{DEFAULT_LENGTH} for {join_words(GENERATORS)}, else the question alone",
    ),
]
QuestionSeedOption = Annotated[
    int | None,
    typer.Option(
        "--question-seed",
        min=0,
        help="Seed of generated questions, and of the choice of questions shown with solutions.",
        show_default="0",
    ),
]
UrlsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        "--base-url",
        envvar=URL_VAR,
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
    str | None,
    typer.Option("--policy", "--lim-policy", help=f"With --serve: {', '.join(POLICIES)}."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", "--lim-budget", help="With --serve: tokens that a sparse layer reads."
    ),
]
SelectLayersOption = Annotated[
    str | None, typer.Option("--lim-select-layers", help="With --serve, as for `lim serve`.")
]
RankingOption = Annotated[
    str | None, typer.Option("--lim-ranking", help="With --serve, as for `lim serve`.")
]
SharedByOption = Annotated[
    str | None, typer.Option("--lim-shared-by", help="With --serve, as for `lim serve`.")
]
DraftTokensOption = Annotated[
    str | None,
    typer.Option("--draft-tokens", "--lim-draft-tokens", help="With --serve, as for `lim serve`."),
]
LimConfigOption = Annotated[
    str | None, typer.Option("--lim-config", help="With --serve, as for `lim serve`.")
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder with TASK.jsonl, read in place of the Hugging Face hub, in the form of one's "
        "own questions. Other questions than the benchmark's are named so.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder of the run; with several tasks or --matrix, the folder of the runs' folders.",
        show_default="runs/ and the run's id, or the matrix file's name",
    ),
]
ConcurrencyOption = Annotated[
    int,
    typer.Option("--concurrency", min=1, help="Samples that each server is sent at the same time."),
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Try samples again that a living server failed in an earlier session; they are left "
        "out otherwise.",
    ),
]
MatrixOption = Annotated[
    str | None,
    typer.Option(
        "--matrix",
        metavar="FILE",
        help="In place of TASK: complete all runs of a TOML file, rows of server settings times "
        "rows of task settings. A path, or a file that comes with lim: paper, analyses, "
        "math500-coder-1.5b, long-coder-1.5b, tiny or tiny-analyses.",
        show_default=False,
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="GLOB",
        help="With --matrix: only runs whose name or a word of it matches, such as full, math500 "
        "or 'Qwen/*'; --dry-run shows the names. May be repeated.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="With --matrix: only list the runs, with stored and planned samples."
    ),
]
BESIDE_MATRIX = ("matrix", "only", "dry_run", "data_dir", "out")
"""Parameters of `lim eval` that go with --matrix. Everything else is in the file."""
RECORDED = "no server answers, so model, policy and sampling are those that the run recorded"


def evaluate(
    context: typer.Context,
    tasks: TasksArgument = None,
    program: ProgramOption = "majority",
    samples: NumSamplesOption = None,
    settings: SettingsOption = None,
    limit: LimitOption = None,
    length: LengthOption = None,
    question_seed: QuestionSeedOption = None,
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
    lim_shared_by: SharedByOption = None,
    draft_tokens: DraftTokensOption = None,
    lim_config: LimConfigOption = None,
    timeout: TimeoutOption = 600.0,
    data_dir: DataDirOption = None,
    out: OutOption = None,
    concurrency: ConcurrencyOption = 64,
    retry_failed: RetryOption = False,
    matrix: MatrixOption = None,
    only: OnlyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Score running servers, or one that is started for the run, on benchmarks.

    Each sample is stored as it ends. The same command resumes an interrupted run.
    """
    if matrix is not None:
        _refuse_beside_matrix(context)
        with _exit_code_of_ctrl_c():
            _evaluate_matrix(matrix, out, data_dir, only or [], dry_run=dry_run)
        return
    if not tasks:
        raise ConfigError("name a task, such as math500 or file:PATH.jsonl, or give --matrix FILE")
    if only or dry_run:
        raise ConfigError("--only and --dry-run go with --matrix")
    tasks = [sized_name(task, length, question_seed) for task in tasks]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))} is named twice: name each task once")
    several = len(tasks) > 1
    configs = [
        RunConfig(
            task=task,
            program=program,
            options=read_settings(settings or []),
            num_samples=samples,
            system=system,
            thinking=thinking,
            thinking_budget=thinking_budget,
            sampling={
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "seed": seed,
            },
            limit=limit,
            data_dir=data_dir,
            out=out / folder_name(short_name(task)) if out and several else out,
            retry_failed=retry_failed,
        )
        for task in tasks
    ]
    access = Access(
        api=api,
        model=model,
        api_key=api_key,
        timeout_s=timeout,
        max_concurrency=concurrency,
        command="lim eval",
    )
    flags = {
        "--lim-policy": policy,
        "--lim-budget": budget,
        "--lim-select-layers": lim_select_layers,
        "--lim-ranking": lim_ranking,
        "--lim-shared-by": lim_shared_by,
        "--lim-draft-tokens": draft_tokens,
        "--lim-config": lim_config,
    }
    given = {flag: text for flag, text in flags.items() if text is not None}
    if serve is None:
        _refuse_without_server(context, given)
    spec = ServerSpec(serve, given, context.obj or (), access.api_key, max_tokens)
    configs = [replace(each, served=_started_with(spec)) for each in configs]
    console = plain_console(stderr=True)
    servers = _servers(spec, url, console, is_typed=bool(given_options(context, ["url"])))
    benchmarks = load_benchmarks(configs, console)
    # SGLang's own interface alone states LessIsMore's settings.
    lim = spec.lim_settings() if serve and api is Api.SGLANG else None
    stored = _stored_runs(configs, benchmarks, lim)
    notes = list(question_notes(benchmarks))
    _print_lines(console, (f"warning: {note}" for note in notes))
    with _exit_code_of_ctrl_c():
        if complete := _all_complete(configs, stored):
            finished = _score_stored(complete, console, "no server is started")
        else:
            try:
                with servers as urls:
                    finished = complete_runs(
                        configs, benchmarks, urls, access, console, _print_score
                    )
            except UnreachableError as problem:
                if serve is not None:
                    raise
                complete = _recorded_runs(configs, stored, benchmarks, api, problem)
                finished = _score_stored(complete, console, RECORDED)
    _print_lines(console, notes)  # once more: the scores depend on them
    _print_next_commands(finished, console)
    _refuse_gaps(finished)


def _stored_runs(
    configs: Sequence[RunConfig], benchmarks: Mapping[str, Sequence[Question]], lim: object
) -> list[Run | None]:
    """Return what each run's --out holds, checked by all settings that are known before a server
    starts; None: no --out, or nothing in it.

    Args:
        lim: LessIsMore's settings of the server that is to start; None: not known.

    Raises:
        DataError: --out holds a run of other settings, or one that is being written.
    """
    from lim_sglang.evals.matrix import find_stored
    from lim_sglang.evals.run_store import refuse_other_writers

    for each in configs:
        if each.out:
            refuse_other_writers(each.out)
    server = {"lim": {"config": lim}} if lim else {}
    return [
        find_stored(each.out, each, benchmarks.get(each.task), server) if each.out else None
        for each in configs
    ]


def _started_with(spec: ServerSpec) -> tuple[str, ...] | None:
    """Return the model and all settings of the server that is started; None: none is started."""
    if spec.model is None:
        return None
    folder = Path(spec.model)
    model = str(folder.resolve()) if folder.exists() else spec.model
    flags = (f"{flag} {text}" for flag, text in spec.lim_flags.items())
    return (model, *flags, *filter(None, [os.environ.get(CONFIG_VAR)]), *spec.sglang_options)


def _all_complete(configs: Sequence[RunConfig], stored: Sequence[Run | None]) -> list[Run]:
    """Return the stored runs if none lacks a sample, and each had the server that the command would
    start; else none.
    """
    complete = [
        run
        for config, run in zip(configs, stored, strict=True)
        if run and run.is_complete and config.served
        if run.record.about.get("served") == list(config.served)
    ]
    return complete if len(complete) == len(configs) else []


def _recorded_runs(
    configs: Sequence[RunConfig],
    stored: Sequence[Run | None],
    benchmarks: Mapping[str, Sequence[Question]],
    api: Api,
    problem: UnreachableError,
) -> list[Run]:
    """Return the complete run of each config, where no server says which run is meant: that in
    --out, or the only one in the folder of runs that has all settings that are known.

    Raises:
        UnreachableError: there is no such run, or are several.
    """
    runs: list[Run] = []
    for config, named in zip(configs, stored, strict=True):
        found = [named] if config.out else _runs_like(config, benchmarks.get(config.task), api)
        complete = [run for run in found if run and run.is_complete]
        if not complete:
            raise problem
        if len(complete) > 1:
            paths = shlex.join(str(run.path) for run in complete)
            raise UnreachableError(
                f"{problem}\nwithout a server {len(complete)} complete runs may be meant: "
                f"`lim report {paths}` shows their scores, --out FOLDER names one of them"
            )
        runs += complete
    return runs


def _runs_like(
    config: RunConfig, benchmark: Sequence[Question] | None, api: Api
) -> Iterator[Run | None]:
    """Yield the runs in the folder of runs that have all settings that are known."""
    from lim_sglang.evals.matrix import find_stored

    for record in sorted(RUNS_FOLDER.glob(f"*/{RUN_FILE}")):
        with suppress(LimError):  # a run of other settings, or one that is damaged
            run = find_stored(record.parent, config, benchmark)
            if run and run.record.settings.get("api", Api.SGLANG) == api:
                yield run


def _score_stored(runs: Sequence[Run], console: Console, why: str) -> list[FinishedRun]:
    """Print the scores of complete runs, which need no server."""
    from lim_sglang.evals.summaries import recorded_task
    from lim_sglang.programs.grading.equivalence import EquivalenceChecker

    finished = []
    with EquivalenceChecker() as checker:
        for run in runs:
            print_plain(console, f"{run.path} is complete: {why}")
            grader = Grader(recorded_task(run).answer_kind, checker)
            finished.append(finish_run(run, grader, console))
            _print_score(finished[-1])
    return finished


def _print_lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        print_plain(console, line)


def _servers(
    spec: ServerSpec, urls: Sequence[str] | None, console: Console, *, is_typed: bool
) -> AbstractContextManager[tuple[str, ...]]:
    """Return the addresses of the named servers, or a server that is started for the block.

    Args:
        urls: from the command line, else from `LIM_URL`.
        is_typed: they are from the command line.

    Raises:
        LimError: no server can be started so; checked before the block, at whose start it starts.
    """
    if spec.model is None:
        return nullcontext(split_urls(urls or [DEFAULT_URL]))
    if is_typed:
        raise ConfigError("--serve starts a server of its own: leave --url out")
    return _as_urls(serving(spec, console))


def _refuse_without_server(context: typer.Context, lim_flags: Iterable[str]) -> None:
    """Raise `ConfigError`, which names them as typed, where a server's options are given."""
    words = {word.partition("=")[0] for word in sys.argv}
    spellings = [[*each.opts] for each in context.command.params if {*each.opts} & {*lim_flags}]
    given = [next((each for each in opts if each in words), opts[0]) for opts in spellings]
    given += ["what follows --"] if context.obj else []
    if given:
        needs, it = ("need", "them") if len(given) > 1 else ("needs", "it")
        names = join_words(given)
        raise ConfigError(f"{names} {needs} --serve MODEL, which starts a server with {it}")


@contextmanager
def _as_urls(server: AbstractContextManager[str]) -> Iterator[tuple[str, ...]]:
    with server as url:
        yield (url,)


@contextmanager
def _exit_code_of_ctrl_c() -> Iterator[None]:
    """Exit with the shell's code for Ctrl-C; a run that had begun has printed how to resume."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not stop.args:
            typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _print_score(finished: FinishedRun) -> None:
    if finished.summary:
        _print_summary(finished.summary)


def _print_next_commands(finished: Sequence[FinishedRun], console: Console) -> None:
    """Print where the runs are stored, and the commands that say more about them."""
    scored = [(run.run.path, run.summary) for run in finished if run.summary]
    if not scored:
        return
    paths = shlex.join(str(path) for path, _ in scored)
    folders = join_words(path for path, _ in scored)
    is_dense = scored[0][1].conditions["policy"] == FULL
    pair = f"{paths} OTHER_RUN" if is_dense else f"OTHER_RUN {paths}"  # the reference first
    print_plain(
        console,
        f"stored in {folders}, each sample's text and answer in samples.jsonl; all tables (--html "
        "FILE writes a page), and a comparison with another run of the same questions:",
    )
    lim = lim_command()
    print_plain(console, f"  {lim} report {paths}\n  {lim} compare {pair}", whole=True)


def _print_summary(summary: Summary) -> None:
    found = score(summary)
    print_table(plain_console(), score_table(summary.conditions, found))
    _print_lines(plain_console(), reasons_without_answer(summary.conditions, found))


def _refuse_gaps(finished: Sequence[FinishedRun]) -> None:
    """Raise `ServerError` where samples are missing because they failed."""
    gaps = [
        f"{each.run.record.settings['task']}: {describe_failures(each.run.failures)}\n"
        for each in finished
        if each.run.failures
    ]
    if gaps:
        errors = [failure.error for each in finished for failure in each.run.failures]
        advice = (
            "lower --max-tokens, in a folder of its own if this one holds samples"
            if all(map(is_too_long, errors))
            else "the same command with --retry-failed tries them again"
        )
        raise ServerError(f"{''.join(gaps)}they are not scored; {advice}")


def _refuse_beside_matrix(context: typer.Context) -> None:
    """Raise `ConfigError` where options are given that a matrix file has."""
    others = [each.name for each in context.command.params if each.name not in BESIDE_MATRIX]
    given = given_options(context, [name for name in others if name])
    if given or context.obj:
        names = ", ".join([*given, *(["what follows --"] if context.obj else [])])
        raise ConfigError(f"{names}: with --matrix, leave it out and write it into the file")


def _evaluate_matrix(
    file: str, out: Path | None, data_dir: Path | None, only: Sequence[str], *, dry_run: bool
) -> None:
    """Complete the runs of a file; print their scores, and the commands that compare them."""
    from lim_sglang.evals.matrix import (
        complete_matrix,
        describe_matrix,
        find_matrix,
        next_commands,
        read_matrix,
        stored_runs,
    )
    from lim_sglang.evals.summaries import load_summaries

    path = find_matrix(file)
    folder = out or RUNS_FOLDER / path.stem
    matrix = read_matrix(path, folder, data_dir, only)
    if dry_run:
        typer.echo(describe_matrix(matrix))
        return
    whole = read_matrix(path, folder, data_dir, [])  # now: the file may change while runs go on
    failed = complete_matrix(matrix, plain_console(stderr=True))
    stored = zip(whole.runs, stored_runs(whole.runs), strict=True)
    sampled = [run for run, found in stored if found and found.samples]
    asked = [run.path for run in sampled if run in matrix.runs]
    for summary in load_summaries(asked, plain_console(stderr=True)):
        _print_summary(summary)
    for command in next_commands(sampled, folder):
        typer.echo(shlex.join(command))
    if failed:
        reasons = {name: str(error).partition("\n")[0] for name, error in failed.items()}
        lines = bullets(f"{name}: {reason}" for name, reason in reasons.items())
        raise ServerError(
            f"these runs are not complete:{lines}\nfinished samples are safe; the same command "
            "tries the others again"
        )
