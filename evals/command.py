"""The `lim eval` command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.evals.evaluation import Evaluation, Finished, run_evaluation
from lim_sglang.evals.method import choose_method
from lim_sglang.evals.options import (
    BudgetOption,
    ConcurrencyOption,
    DataDirOption,
    LimConfigOption,
    LimitOption,
    NumSamplesOption,
    OutOption,
    PolicyOption,
    RankingOption,
    RetryOption,
    SelectLayersOption,
    ServeOption,
    TasksArgument,
    UrlsOption,
)
from lim_sglang.evals.score import score
from lim_sglang.evals.servers import Access, split_urls
from lim_sglang.evals.serving import ServerSpec, serving
from lim_sglang.evals.table import score_table
from lim_sglang.programs.connect import Api
from lim_sglang.programs.options import (
    DEFAULT_URL,
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
from lim_sglang.programs.records import Sampling
from lim_sglang.programs.sampling import check_thinking_budget


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
    access = Access(api, model, api_key, timeout, concurrency)
    flags = {
        "--lim-policy": policy,
        "--lim-budget": budget,
        "--lim-select-layers": lim_select_layers,
        "--lim-ranking": lim_ranking,
        "--lim-config": lim_config,
    }
    given = {flag: text for flag, text in flags.items() if text is not None}
    with _interrupted_in_a_word(), _servers(serve, url, access, given, context.obj or ()) as urls:
        finished = run_evaluation(evaluation, urls, access, Console(stderr=True), _show)
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


def _show(finished: Finished) -> None:
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
