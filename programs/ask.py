"""The `lim ask` command: one question, several chains of thought, the vote while it comes in."""

import json
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lim_sglang.errors import ServerError, errors_in_words
from lim_sglang.programs.connect import Api, connect
from lim_sglang.programs.display import VoteDisplay, verdict
from lim_sglang.programs.judge import EquivalenceChecker
from lim_sglang.programs.options import (
    DEFAULT_URL,
    INTERRUPTED,
    ApiKeyOption,
    ApiOption,
    MaxTokensOption,
    ModelOption,
    MostSamplesOption,
    ProgramOption,
    SeedOption,
    SettingsOption,
    SystemOption,
    TemperatureOption,
    TemplateOption,
    ThinkingBudgetOption,
    ThinkingOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    UrlOption,
    read_settings,
    samples_of,
)
from lim_sglang.programs.prompts import MATH_PROMPT, ask_messages
from lim_sglang.programs.record import ask_record
from lim_sglang.programs.records import SampleState, Sampling
from lim_sglang.programs.sampling import check_thinking_budget, resolve_sampling

if TYPE_CHECKING:
    from lim_sglang.programs.drawing import SamplingRequest
    from lim_sglang.programs.program import Outcome, Program
    from lim_sglang.programs.transport import Backend


def ask(
    question: Annotated[str, typer.Argument(help="A question with one short answer.")],
    program: ProgramOption = "majority",
    samples: MostSamplesOption = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Samples in flight at once.", show_default="all; adaptive 8, budget 4"
        ),
    ] = None,
    settings: SettingsOption = None,
    max_tokens: MaxTokensOption = Sampling.max_tokens,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = Sampling.seed,
    system: SystemOption = None,
    template: TemplateOption = MATH_PROMPT,
    thinking: ThinkingOption = None,
    thinking_budget: ThinkingBudgetOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON record of all that happened.")
    ] = False,
    api: ApiOption = Api.SGLANG,
    url: UrlOption = DEFAULT_URL,
    model: ModelOption = None,
    api_key: ApiKeyOption = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Ask a running server and let its samples vote on the answer."""
    if not question.strip():
        raise typer.BadParameter("it is empty.", param_hint="question")
    check_thinking_budget(thinking_budget, max_tokens)
    samples = samples_of(program, samples)
    messages = ask_messages(question, template=template, system=system)
    options = read_settings(settings or [])
    console = Console(stderr=True)
    backend = connect(
        *(url, api_key, console),
        timeout_s=timeout,
        max_concurrency=samples,
        thinking=thinking,
        thinking_budget=thinking_budget,
        api=api,
        model=model,
    )
    with closing(backend):
        sampling = resolve_sampling(
            backend.sampling_defaults(),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        from lim_sglang.programs.catalogue import find_program
        from lim_sglang.programs.drawing import SamplingRequest

        chosen = find_program(program)
        chosen.check(options)
        question_asked = SamplingRequest(
            messages,
            sampling,
            parallel=parallel or chosen.parallel or samples,
            streamed=chosen.streamed or console.is_terminal,
            seeds_honoured=sampling.seed is not None and backend.honours_seeds,
        )
        # Before anything is drawn: the server may be gone afterwards.
        about = backend.about() if as_json else {}
        try:
            outcome = _draw(backend, chosen, question_asked, samples, options, console)
        except KeyboardInterrupt:
            console.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        record = ask_record(question, chosen, options, question_asked, outcome)
        typer.echo(json.dumps({**record, "server": about}))
    _refuse_silence(outcome)
    if not as_json:
        typer.echo(verdict(outcome))


def _draw(
    backend: "Backend",
    program: "Program",
    question: "SamplingRequest",
    samples: int,
    options: dict[str, Any],
    console: Console,
) -> "Outcome":
    """Run the program and show it."""
    from lim_sglang.programs.program import run_program

    total = min(samples, program.most or samples)
    with (
        EquivalenceChecker() as checker,
        VoteDisplay(console, total, checker.equivalent, program.order) as display,
    ):
        checker.warm_up()
        return run_program(
            *(program, backend, question),
            indices=range(samples),
            equivalent=checker.equivalent,
            options=options,
            on_sample=display.add,
            on_begin=display.begin,
        )


def _refuse_silence(outcome: "Outcome") -> None:
    """Raise `ServerError` where every sample failed."""
    failed = [sample for sample in outcome.samples if sample.state is SampleState.FAILED]
    if failed and len(failed) == len(outcome.samples):
        raise ServerError(
            f"the server failed all {len(failed)} samples, the first with: {failed[0].error}"
        )


def run_script(program: str) -> None:
    """What the file of a program does as a script: `lim ask` with this program."""

    def script(**options: Any) -> None:
        ask(**{**options, "program": program})

    script.__doc__ = ask.__doc__
    script.__signature__ = _without_program(ask)  # type: ignore[attr-defined]
    with errors_in_words():
        typer.run(script)


def _without_program(command: Callable[..., None]) -> Any:
    from inspect import signature

    whole = signature(command)
    kept = [given for name, given in whole.parameters.items() if name != "program"]
    return whole.replace(parameters=kept)
