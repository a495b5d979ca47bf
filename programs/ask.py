"""`lim ask`: one question, several chains of thought, and their vote while it is counted."""

import inspect
import json
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lim_sglang.errors import ServerError, errors_in_words
from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.equivalence import EquivalenceChecker
from lim_sglang.programs.options import (
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
    by_program,
    read_settings,
    samples_of,
)
from lim_sglang.programs.program import (
    PROGRAMS,
    Outcome,
    ask_record,
    find_program,
    load_frontend,
    run_program,
)
from lim_sglang.programs.schema import (
    DEFAULT_URL,
    MATH_PROMPT,
    Access,
    Api,
    Sample,
    SampleState,
    Sampling,
    SamplingRequest,
    ask_messages,
    check_thinking_budget,
    resolve_sampling,
)
from lim_sglang.programs.sglang_backend import connect
from lim_sglang.programs.vote import Equivalent, Order, Tally, tally

if TYPE_CHECKING:
    from lim_sglang.programs.backend import InFlightSample
    from lim_sglang.programs.sampler import SamplingRun

MAX_ROWS = 16
"""Samples in flight that are shown in a row of their own."""
LONGEST_BOX = 1000
"""Characters of the longest box that is read."""
BOXES_READ = 3
"""Boxes that are read from the end: the last may be open still, or the prompt's own empty one."""


def ask(
    question: Annotated[str, typer.Argument(help="A question with one short answer.")],
    program: ProgramOption = "majority",
    samples: MostSamplesOption = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples in flight at once.",
            show_default="all; "
            + by_program({name: program.parallel for name, program in PROGRAMS.items()}),
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
        bool, typer.Option("--json", help="Print one JSON record with every sample.")
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
    chosen = find_program(program)
    samples = samples_of(program, samples)
    messages = ask_messages(question, template=template, system=system)
    options = read_settings(settings or [])
    console = Console(stderr=True)
    access = Access(url, api, model, api_key, timeout, samples, thinking, thinking_budget)
    with closing(connect(access, console)) as backend:
        load_frontend(console)
        chosen.check(options)
        sampling = resolve_sampling(
            backend.sampling_defaults(),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        request = SamplingRequest(
            messages,
            sampling,
            parallel=parallel or chosen.parallel or samples,
            streamed=chosen.streamed or console.is_terminal,
            seeds_honoured=sampling.seed is not None and backend.honours_seeds,
        )
        # Before the first sample: the server may be gone afterwards.
        about = backend.about() if as_json else {}
        try:
            with (
                EquivalenceChecker() as checker,
                VoteDisplay(
                    console,
                    min(samples, chosen.max_samples or samples),
                    checker.equivalent,
                    chosen.order,
                ) as display,
            ):
                checker.warm_up()
                outcome = run_program(
                    chosen,
                    backend,
                    request,
                    indices=range(samples),
                    equivalent=checker.equivalent,
                    options=options,
                    on_sample=display.add,
                    on_begin=display.begin,
                )
        except KeyboardInterrupt:
            console.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        record = ask_record(question, chosen, options, request, outcome)
        typer.echo(json.dumps({**record, "server": about}))
    _refuse_failures(outcome)
    if not as_json:
        typer.echo(result_line(outcome))


def _refuse_failures(outcome: Outcome) -> None:
    """Raise `ServerError` if every sample failed."""
    failed = [sample for sample in outcome.samples if sample.state is SampleState.FAILED]
    if failed and len(failed) == len(outcome.samples):
        raise ServerError(
            f"the server failed all {len(failed)} samples, the first with: {failed[0].error}"
        )


def run_script(program: str) -> None:
    """Run `lim ask` with a program: the main function of the program's own file."""

    def script(**options: Any) -> None:
        ask(**{**options, "program": program})

    signature = inspect.signature(ask)
    kept = [option for name, option in signature.parameters.items() if name != "program"]
    script.__doc__ = ask.__doc__
    script.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    with errors_in_words():
        typer.run(script)


class VoteDisplay:
    """The vote so far: redrawn in place on a terminal, elsewhere a line for each sample."""

    def __init__(
        self, console: Console, total: int, equivalent: Equivalent, order: Order = Order.BY_VOTES
    ) -> None:
        self.samples: list[Sample] = []
        self.tally = tally([], equivalent)
        """The vote of the samples so far."""
        self._console = console
        self._total = total
        self._equivalent = equivalent
        self._order = order
        self._run: SamplingRun | None = None
        self._bar = Progress(
            TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("", total=total)
        self._start_s = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
            if self.samples:
                self._console.print(vote_table(self.tally))

    def begin(self, run: "SamplingRun") -> None:
        """Show the samples in flight, too."""
        self._run = run

    def add(self, sample: Sample) -> None:
        """Show a sample that has ended."""
        self.samples.append(sample)
        self.tally = tally(self.samples, self._equivalent, self._order)
        self._bar.advance(self._task)
        # As text: an answer may hold rich's markup.
        line = Text(f"{len(self.samples)}/{self._total}  {sample_line(sample)}")
        if not self._console.is_terminal:
            line.append(f"  |  {vote_line(self.tally)}")
        self._console.print(line, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [vote_table(self.tally)] if self.samples else []
        if self._run and self._run.in_flight:
            elapsed_s = time.monotonic() - self._start_s
            parts.append(in_flight_table(list(self._run.in_flight.values())))
            parts.append(Text(speed_line(self._run.spent_tokens, elapsed_s)))
        return Group(*parts, self._bar)


def vote_table(vote: Tally) -> Table:
    """Return the vote as a table with a bar for each answer."""
    table = Table("answer", "votes", "", box=None, header_style="bold")
    for group in vote.groups:
        table.add_row(Text(group.answer), str(group.votes), "█" * group.votes)
    for name, count in without_vote(vote).items():
        if count:
            table.add_row(Text(name, style="dim"), str(count), "")
    return table


def vote_line(vote: Tally) -> str:
    """Return the vote in a line: `391: 5, 401: 1, no answer: 2`."""
    counts = [*((group.answer, group.votes) for group in vote.groups), *without_vote(vote).items()]
    return ", ".join(f"{name}: {count}" for name, count in counts if count)


def without_vote(vote: Tally) -> dict[str, int]:
    """Return the number of samples without a vote, by reason."""
    return {
        "no answer": vote.unanswered,
        "cut off": vote.truncated,
        "stopped": vote.aborted,
        "failed": vote.failed,
    }


def sample_line(sample: Sample) -> str:
    """Return a sample that has ended in a line."""
    if sample.state is SampleState.FAILED:
        return f"failed: {sample.error}"
    least = "at least " if sample.tokens_at_least else ""
    cost = f"{least}{sample.num_tokens} tokens, {sample.latency_s:.1f} s"
    if sample.state is SampleState.ABORTED:
        return f"stopped  ({cost})"
    cut = ", cut off" if sample.state is SampleState.TRUNCATED else ""
    answer = "no answer" if sample.answer is None else sample.answer
    return f"{answer}  ({cost}{cut})"


def in_flight_table(samples: "Sequence[InFlightSample]") -> Table:
    """Return the samples in flight as a table: length, speed, state, and the answer so far."""
    begun = [sample for sample in samples if sample.has_started]
    columns = ("sample", "tokens", "tokens/s", "state", "answer so far")
    table = Table(*columns, box=None, header_style="bold")
    for sample in sorted(begun, key=lambda sample: sample.index)[:MAX_ROWS]:
        state = "ending" if sample.is_cancelled else "running" if sample.num_tokens else "waiting"
        speed = f"{sample.tokens_per_s:,.1f}"
        answer = Text(answer_so_far(sample.text))
        table.add_row(str(sample.index), f"{sample.num_tokens:,}", speed, state, answer)
    more = len(begun) - MAX_ROWS
    if more > 0:
        table.add_row("…", "", f"{more} more")
    return table


def answer_so_far(text: str) -> str:
    """Return the content of the last box that is closed, empty if there is none.

    Quick on long texts, since the table is redrawn several times a second.
    """
    end = len(text)
    for _ in range(BOXES_READ):
        start = max(text.rfind(box, 0, end) for box in ("\\boxed", "\\fbox"))
        if start < 0:
            return ""
        answer = extract_answer(text[start : start + LONGEST_BOX])
        if answer:
            return answer
        end = start
    return ""


def speed_line(num_tokens: int, elapsed_s: float) -> str:
    """Return the tokens of all samples so far, and their speed."""
    return f"{num_tokens:,} tokens so far, {num_tokens / max(elapsed_s, 1e-3):,.0f} a second"


def result_line(outcome: Outcome) -> str:
    """Return the last line: answer, votes, tokens spent and saved, seconds."""
    vote = outcome.vote
    num_votes = len(outcome.samples) - vote.aborted - outcome.num_late
    votes = f"{vote.votes} of {num_votes} votes"
    answer = (
        f"answer: {vote.winner}  ({votes}" if vote.winner is not None else f"no answer  ({votes}"
    )
    failed = f", {vote.failed} failed" if vote.failed else ""
    stopped = outcome.settled or vote.aborted
    saved = f", about {outcome.saved_tokens:,} saved" if stopped else ""
    spent = f"{'at least ' if outcome.spent_at_least else ''}{outcome.spent_tokens:,} tokens"
    return f"{answer}{failed}, {spent}{saved}, {outcome.elapsed_s:.1f} s)"
