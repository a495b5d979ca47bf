"""The `lim ask` command: one question, several chains of thought, the vote while it comes in."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.programs.connect import connect
from lim_sglang.programs.display import VoteDisplay, verdict
from lim_sglang.programs.judge import AnswerJudge
from lim_sglang.programs.options import (
    DEFAULT_URL,
    INTERRUPTED,
    ApiKeyOption,
    MaxTokensOption,
    SamplesOption,
    SeedOption,
    TemperatureOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    UrlOption,
)
from lim_sglang.programs.records import SampleState, Sampling

if TYPE_CHECKING:
    from lim_sglang.programs.endpoint import Endpoint


def ask(
    question: Annotated[str, typer.Argument(help="A question with one short answer.")],
    samples: SamplesOption = 8,
    max_tokens: MaxTokensOption = Sampling.max_tokens,
    temperature: TemperatureOption = Sampling.temperature,
    top_p: TopPOption = Sampling.top_p,
    top_k: TopKOption = Sampling.top_k,
    seed: SeedOption = Sampling.seed,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Ask a running server and let its samples vote on the answer."""
    if not question.strip():
        raise typer.BadParameter("it is empty.", param_hint="question")
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    console = Console(stderr=True)
    endpoint = connect(url, api_key, console, timeout_s=timeout, max_concurrency=samples)
    try:
        with AnswerJudge() as judge, VoteDisplay(console, samples, judge.same) as display:
            judge.warm_up()
            _draw(endpoint, question, samples, sampling, display)
            last_line = verdict(display.tally, display.samples, display.elapsed_s)
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        endpoint.close()
    typer.echo(last_line)


def _draw(
    endpoint: "Endpoint", question: str, count: int, sampling: Sampling, display: VoteDisplay
) -> None:
    """Run the program.

    Raises:
        ServerError: every sample failed.
    """
    from lim_sglang.programs.majority import run_majority

    drawn = run_majority(
        endpoint, question, indices=range(count), sampling=sampling, on_sample=display.add
    )
    if all(sample.state is SampleState.FAILED for sample in drawn):
        raise ServerError(
            f"the server failed all {count} samples, the first with: {drawn[0].error}"
        )
