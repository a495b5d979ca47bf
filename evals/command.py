"""The `lim eval` command."""

import operator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.evals.grade import Grader
from lim_sglang.evals.run import Deliver, Draw, Job
from lim_sglang.evals.score import score_samples
from lim_sglang.evals.session import Outcome, Plan, Request, execute, how_to_go_on, plan_run
from lim_sglang.evals.table import score_table
from lim_sglang.evals.tasks import TASKS, find_task
from lim_sglang.programs.connect import Api, connect
from lim_sglang.programs.judge import AnswerJudge
from lim_sglang.programs.options import (
    DEFAULT_URL,
    INTERRUPTED,
    ApiKeyOption,
    ApiOption,
    MaxTokensOption,
    ModelOption,
    SamplesOption,
    SeedOption,
    TemperatureOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    UrlOption,
)
from lim_sglang.programs.prompts import ask_messages
from lim_sglang.programs.records import Sampling
from lim_sglang.programs.sampling import resolve_sampling

if TYPE_CHECKING:
    from lim_sglang.programs.transport import Transport

MOST_AT_ONCE = 64
"""Samples of one question in flight: the frontend starts a thread for each."""


def evaluate(
    task: Annotated[str, typer.Argument(help=f"The questions: {' or '.join(TASKS)}.")],
    samples: SamplesOption = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only so many questions, the first ones.")
    ] = None,
    max_tokens: MaxTokensOption = Sampling.max_tokens,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = Sampling.seed,
    api: ApiOption = Api.SGLANG,
    url: UrlOption = DEFAULT_URL,
    model: ModelOption = None,
    api_key: ApiKeyOption = None,
    timeout: TimeoutOption = 600.0,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK.jsonl, read in place of the Hugging Face hub."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/ and the run's id.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Samples that the server is asked for at the same time.")
    ] = 64,
) -> None:
    """Score a running server on a benchmark.

    Each sample is stored as it ends. The same command goes on where an earlier one stopped, and
    redoes samples that the server failed.
    """
    questions = find_task(task)
    console = Console(stderr=True)
    endpoint = connect(
        *(url, api_key, console),
        timeout_s=timeout,
        max_concurrency=concurrency,
        api=api,
        model=model,
    )
    with closing(endpoint), AnswerJudge() as judge:
        judge.warm_up()
        sampling = resolve_sampling(
            endpoint.sampling_defaults(),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        request = Request(
            task=questions,
            num_samples=samples,
            sampling=sampling,
            limit=limit,
            data_dir=data_dir,
            out=out,
            concurrency=concurrency,
        )
        grader = Grader(questions.answer_kind, judge)
        _evaluate(request, endpoint, url, grader, console)


def _evaluate(
    request: Request, endpoint: "Transport", url: str, grader: Grader, console: Console
) -> None:
    """Run what is missing, then print the table of all of it."""
    plan = plan_run(request, endpoint.server_info(), url)
    try:
        outcome = execute(
            plan,
            draw_with(endpoint, request.sampling),
            grader,
            concurrency=request.concurrency,
            check_server=endpoint.server_info,
            console=console,
        )
    except KeyboardInterrupt:
        console.print(f"interrupted; {how_to_go_on(plan)}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(plan, outcome, grader)


def draw_with(endpoint: "Transport", sampling: Sampling) -> Draw:
    """The majority program on one server, as a run draws with it."""
    from lim_sglang.programs.drawing import Question
    from lim_sglang.programs.majority import MAJORITY
    from lim_sglang.programs.program import run_program

    honoured = sampling.seed is not None and endpoint.honours_seeds

    def draw(job: Job, deliver: Deliver) -> None:
        run_program(
            MAJORITY,
            endpoint,
            Question(
                ask_messages(job.question.text),
                sampling,
                parallel=MOST_AT_ONCE,
                seeds_honoured=honoured,
            ),
            indices=job.indices,
            same=operator.eq,  # the votes are counted when the run is scored
            on_sample=deliver,
        )

    return draw


def _show(plan: Plan, outcome: Outcome, grader: Grader) -> None:
    """Print the table.

    Raises:
        ServerError: samples failed, so that the run is not complete.
    """
    if outcome.samples:
        score = score_samples(outcome.samples, grader.same)
        Console().print(score_table(plan.record.settings, score, len(outcome.failed)))
    if outcome.failed:
        raise ServerError(
            f"the server failed {len(outcome.failed)} samples, the first with: "
            f"{outcome.failed[0].error}\nthey are not scored; the same command draws them again"
        )
