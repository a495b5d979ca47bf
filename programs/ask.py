"""`lim ask`: one question, several chains of thought, and their vote while it is counted."""

import inspect
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lim_sglang.errors import INTERRUPTED, errors_in_words
from lim_sglang.markdown_section import counted, join_words
from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.http_client import without_advice
from lim_sglang.programs.options import (
    NO_ANSWER,
    TEMPLATE,
    ApiKeyOption,
    ApiOption,
    MaxTokensOption,
    ModelOption,
    MostSamplesOption,
    ProgramOption,
    QuestionCommand,
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
    read_template,
)
from lim_sglang.programs.program import (
    PROGRAMS,
    Outcome,
    Program,
    ask_record,
    find_program,
    load_frontend,
    of_samples,
    outcome_of,
    reasons_without_vote,
    refuse_failures,
    run_program,
)
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    DEFAULT_URL,
    Access,
    Api,
    Sample,
    SampleState,
    Sampling,
    SamplingRequest,
    ask_messages,
    check_thinking_budget,
    copies_note,
    resolve_sampling,
)
from lim_sglang.programs.sglang_backend import connect
from lim_sglang.programs.vote import Equivalent, Tally
from lim_sglang.progress import (
    LINE_INTERVAL_S,
    duration,
    plain_console,
    print_plain,
    printable,
    rate,
    repeated,
    time_left,
)

if TYPE_CHECKING:
    from lim_sglang.programs.backend import InFlightSample
    from lim_sglang.programs.sampler import SamplingRun

UNHEEDED_SEED = (
    "note: --seed is sent, but this server is not known to heed it; one that is started by "
    "`lim serve -- --sampling-backend lim` does"
)
MAX_ROWS = 16
"""Samples in flight that are shown in a row of their own."""
LONGEST_BOX = 1000
"""Characters of the longest box that is read."""
BOXES_READ = 3
"""Boxes that are read from the end: the last may be open still, or the prompt's own empty one."""


SHOWN_LINES = 12
"""Last lines of a chain that are printed after the vote."""
MOST_OF_ERROR = 120
"""Characters of an error in the line of its sample."""
SHOWN_CHARACTERS = 2000
"""Last characters of a chain that are printed, even if a line is longer."""
MAX_TIES = 3
"""Answers with as many votes as the winner that the result names."""


class Show(StrEnum):
    """The chains of thought whose last lines are printed after the vote."""

    WINNER = "winner"
    """The first sample, by its number, that gave the winning answer; without an answer, the first.
    """
    ALL = "all"
    NONE = "none"


def ask(
    question: Annotated[
        str | None,
        typer.Argument(
            help="A question with one short answer; - reads it from standard input, @FILE from a "
            "file. Options of a multiple choice stand in it, each with a letter from A to J at its "
            'line\'s begin, as in "Which is prime?\\nA) 4\\nB) 5"; the letter of a reply is its '
            "vote.",
            show_default="standard input, if that is no terminal",
        ),
    ] = None,
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
    template: TemplateOption = TEMPLATE,
    thinking: ThinkingOption = None,
    thinking_budget: ThinkingBudgetOption = None,
    show: Annotated[
        Show,
        typer.Option(
            help=f"Chains of thought whose last {SHOWN_LINES} lines are printed after the vote: "
            "winner is the first sample, by its number, with the winning answer, or the first of "
            "all where none has an answer."
        ),
    ] = Show.WINNER,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON record with every sample.")
    ] = False,
    api: ApiOption = Api.SGLANG,
    url: UrlOption = DEFAULT_URL,
    model: ModelOption = None,
    api_key: ApiKeyOption = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Ask a running server and let its samples vote on the answer; a tie goes to the first sample,
    by its number. Standard output gets one line, the answer with its votes or the --json record;
    standard error gets all else. Exits with 3 if no sample states an answer."""
    text = read_question(question)
    check_thinking_budget(thinking_budget, max_tokens)
    chosen = find_program(program)
    samples = samples or chosen.samples
    options = read_settings(settings or [])
    chosen.check(options, samples)
    messages = ask_messages(text, template=read_template(template), system=system)
    console = Console(stderr=True)
    access = Access(
        url, api, model, api_key, timeout, samples, thinking, thinking_budget, command="lim ask"
    )
    checker = EquivalenceChecker()
    display = VoteDisplay(console, samples, checker.equivalent, chosen, max_tokens)
    try:
        with (
            checker,
            closing(connect(access, console)) as backend,
            ExitStack() as ctrl_c,
        ):
            load_frontend(console)
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
                streamed=True,  # the progress on standard error counts tokens as they come
                seeds_honoured=sampling.seed is not None and backend.honours_seeds,
            )
            if seed is not None and not request.seeds_honoured:
                print_plain(console, UNHEEDED_SEED)
            if note := copies_note(asdict(sampling), samples):
                print_plain(console, f"note: {note}; give --temperature, or --samples 1")
            # Before the first sample: the server may be gone afterwards.
            about, drafted = backend.about() if as_json else {}, backend.drafts()
            with display:
                checker.warm_up()
                try:
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
                    ctrl_c.enter_context(_without_ctrl_c())
                    outcome = display.interrupted()
            now = backend.drafts()
            drafts = now.since(drafted) if now else None
            if as_json:  # before the backend's end, which may be waited for
                record = ask_record(text, chosen, options, request, outcome)
                record |= {"server": about, "drafts": drafts and drafts.counts()}
                typer.echo(json.dumps(record))
        if outcome.interrupted:
            raise KeyboardInterrupt
        refuse_failures(outcome)
        chains = shown_chains(outcome, show) if not as_json else ()
        drafting = (drafts.describe(),) if drafts else ()
        for line in (*chains, *drafting, *hints(outcome, chosen, max_tokens)):
            print_plain(console, line)
        if not as_json:
            print_plain(plain_console(), result_line(outcome), whole=True)
    except KeyboardInterrupt:
        print_plain(console, display.interrupted_line())
        raise typer.Exit(INTERRUPTED) from None
    if outcome.vote.winner is None:
        raise typer.Exit(NO_ANSWER)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ignore a second Ctrl-C, which `timeout` sends at once, until the record is written."""
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heeded)


def read_question(given: str | None) -> str:
    """Return the text of a question from the command line, or without the last line's end from
    standard input or a file.

    Raises:
        typer.BadParameter: there is none, or its file cannot be read.
    """
    if given in (None, "-") and (sys.stdin is None or (given is None and sys.stdin.isatty())):
        raise _no_question("none is given: write one, - for standard input, or @FILE")
    try:
        if given is None or given == "-":
            text = sys.stdin.buffer.read().decode().rstrip("\r\n")
        elif given.startswith("@"):
            text = Path(given[1:]).expanduser().read_bytes().decode().rstrip("\r\n")
        else:
            text = given
    except OSError as error:
        raise _no_question(
            f"cannot read {given} ({error.strerror}): after @ stands the name of a file; give a "
            "question that begins with @ through standard input, by -"
        ) from None
    except UnicodeDecodeError as error:
        raise _no_question(f"it is no text in UTF-8 ({error.reason})") from None
    if not text.strip():
        raise _no_question("it is empty: write one, - for standard input, or @FILE")
    return text


def _no_question(reason: str) -> typer.BadParameter:
    return typer.BadParameter(reason, param_hint="question")


def run_script(program: str) -> None:
    """Run `lim ask` with a program: the main function of the program's own file."""

    def script(**options: Any) -> None:
        ask(**{**options, "program": program})

    signature = inspect.signature(ask)
    kept = [option for name, option in signature.parameters.items() if name != "program"]
    script.__doc__ = ask.__doc__
    script.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    with errors_in_words():
        app = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        app.command(cls=QuestionCommand)(script)
        app()


class VoteDisplay:
    """The vote so far: redrawn in place on a terminal; elsewhere a line for each sample, and one
    now and then while none ends.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        equivalent: Equivalent,
        program: Program = PROGRAMS["majority"],
        max_tokens: int = Sampling.max_tokens,
    ) -> None:
        self.samples: list[Sample] = []
        self.tally = program.count([], equivalent)
        """The vote of the samples so far."""
        self._console = console
        self._total = total
        self._equivalent = equivalent
        self._program = program
        self._max_tokens = max_tokens
        self._run: SamplingRun | None = None
        self._bar = Progress(
            TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("", total=total)
        self._start_s = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, transient=True)
        self._lines = ExitStack()

    def __enter__(self) -> Self:
        self._start_s = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        else:
            samples, tokens = counted(self._total, "sample"), counted(self._max_tokens, "token")
            print_plain(self._console, f"asking: at most {samples}, {tokens} each")
            self._lines.enter_context(repeated(self._print_waiting, LINE_INTERVAL_S))
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        if self._console.is_terminal:
            self._live.stop()
            if self.samples:
                self._console.print(vote_table(self.tally))

    def begin(self, run: "SamplingRun") -> None:
        """Show the samples in flight, too."""
        self._run = run

    def add(self, sample: Sample) -> None:
        """Show a sample that has ended; of several that failed alike only the first."""
        self.samples.append(sample)
        voters = self._run.voters if self._run else self.samples
        self.tally = self._program.count(voters, self._equivalent)
        self._bar.advance(self._task)
        if sample.error and any(sample.error == before.error for before in self.samples[:-1]):
            return  # the end of the command says how many failed so
        name = sample_name(sample.index)
        line = f"{len(self.samples)}/{self._total}  {name}: {sample_line(sample, self.tally)}"
        if self._console.is_terminal:
            self._live.refresh()  # the line stands above a frame that shows no ended sample
        else:
            line += f"  |  {vote_line(self.tally)}"
        print_plain(self._console, line)

    def interrupted(self) -> Outcome:
        """Return the outcome of the samples so far, where Ctrl-C has ended the run.

        Raises:
            KeyboardInterrupt: the run had not begun.
        """
        if self._run is None:
            raise KeyboardInterrupt
        elapsed_s = time.monotonic() - self._start_s
        return outcome_of(self._program, self._run, self._total, elapsed_s, interrupted=True)

    def interrupted_line(self) -> str:
        """Return the votes so far in a line, for a run that Ctrl-C has ended."""
        ended = f"interrupted after {of_samples(len(self.samples), self._total)}"
        return f"{ended}  |  {vote_line(self.tally)}" if self.samples else ended

    def waiting_line(self) -> str:
        """Return tokens, speed and time left if known, or the wait for the first token."""
        elapsed_s = time.monotonic() - self._start_s
        num_tokens = self._run.spent_tokens if self._run else 0
        if not num_tokens:
            return f"waiting for the first token, {duration(elapsed_s)}"
        line = speed_line(num_tokens, elapsed_s)
        running = list(self._run.in_flight.values()) if self._run else []
        running_s = [sample.elapsed_s for sample in running]
        ended_s = [s.latency_s for s in self.samples if s.state in COMPLETED_STATES]
        # A sample may have ended since the running ones were counted.
        num_waiting = max(self._total - len(self.samples) - len(running_s), 0)
        counted_s = [sample.elapsed_s for sample in running if sample.num_tokens]
        spent_s = sum(sample.latency_s for sample in self.samples) + sum(counted_s)
        left = time_left(
            ended_s,
            running_s,
            num_waiting,
            num_tokens=num_tokens,
            spent_s=spent_s,
            max_tokens=self._max_tokens,
        )
        return f"{line}; {left}" if left else line

    def _print_waiting(self) -> None:
        print_plain(self._console, f"{len(self.samples)}/{self._total}  {self.waiting_line()}")

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [vote_table(self.tally)] if self.samples else []
        if self._run and self._run.in_flight:
            parts.append(in_flight_table(list(self._run.in_flight.values())))
        return Group(*parts, Text(self.waiting_line()), self._bar)


def shown_chains(outcome: Outcome, show: Show) -> Iterator[str]:
    """Yield the last lines of the chains to show, each under its sample's line."""
    chains = [sample for sample in outcome.samples if sample.text.strip()]
    if show is Show.WINNER:
        groups = outcome.vote.groups
        wanted = groups[0].indices[0] if groups else None
        chains = [s for s in chains if wanted is None or s.index == wanted][:1]
    for sample in chains if show is not Show.NONE else []:
        line = sample_line(sample, outcome.vote)
        yield f"{sample_name(sample.index)}: {line}\n{last_lines(sample.text)}"


def last_lines(text: str) -> str:
    """Return the last lines of a text, indented; an ellipsis stands for the lines before."""
    text = text.strip()
    end = text[-SHOWN_CHARACTERS:]
    lines = [line.rstrip() for line in end.splitlines()]
    cut = len(end) < len(text) or len(lines) > SHOWN_LINES
    return "\n".join(f"  {line}".rstrip() for line in (["…"] * cut + lines[-SHOWN_LINES:]))


def vote_table(vote: Tally) -> Table:
    """Return the vote as a table with a bar for each answer."""
    table = Table("answer", "votes", "", box=None, header_style="bold")
    for group in vote.groups:
        table.add_row(Text(printable(group.answer)), str(group.votes), "█" * group.votes)
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


def sample_name(index: int) -> str:
    """Return the name of a sample for people, who count from 1; a record's index begins at 0."""
    return f"sample {index + 1}"


def sample_line(sample: Sample, vote: Tally) -> str:
    """Return a sample that has ended in a line; a failure is said whole at the end, once."""
    if sample.state is SampleState.FAILED:
        error = without_advice(str(sample.error))
        return f"failed: {shorten(error, MOST_OF_ERROR, placeholder=' …')}"
    least = "at least " if sample.tokens_at_least else ""
    cost = f"{least}{counted(sample.num_tokens, 'token')}, {sample.latency_s:.1f} s"
    if sample.state is SampleState.ABORTED:
        return f"stopped  ({cost})"
    cut = ", cut off" if sample.state is SampleState.TRUNCATED else ""
    answer = "no answer" if sample.answer is None else sample.answer
    uncounted = "" if sample.answer is None or vote.counts(sample) else ", no vote"
    return f"{answer}  ({cost}{cut}{uncounted})"


def in_flight_table(samples: "Sequence[InFlightSample]") -> Table:
    """Return the samples in flight as a table: length, speed, state, and the answer so far."""
    begun = [sample for sample in samples if sample.has_started]
    columns = ("sample", "tokens", "tokens/s", "state", "answer so far")
    table = Table(*columns, box=None, header_style="bold")
    for sample in sorted(begun, key=lambda sample: sample.index)[:MAX_ROWS]:
        state = "ending" if sample.is_cancelled else "running" if sample.num_tokens else "waiting"
        per_s = f"{sample.tokens_per_s:,.1f}"
        answer = Text(printable(answer_so_far(sample.text)))
        table.add_row(str(sample.index + 1), f"{sample.num_tokens:,}", per_s, state, answer)
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
        answer = extract_answer(text[start : min(end, start + LONGEST_BOX)])
        if answer:
            return answer
        end = start
    return ""


def speed_line(num_tokens: int, elapsed_s: float) -> str:
    """Return the tokens of all samples so far, and their speed."""
    return f"{counted(num_tokens, 'token')} so far, {rate(num_tokens, elapsed_s)} a second"


def result_line(outcome: Outcome) -> str:
    """Return the last line: answer, votes, tokens spent and saved, seconds."""
    vote = outcome.vote
    without = vote.aborted + outcome.num_late if vote.winner is not None else 0
    num_votes = len(outcome.samples) - without
    votes = f"{counted(vote.votes, 'vote')} of {counted(num_votes, 'sample')}{_ties(vote)}"
    answer = "no answer" if vote.winner is None else f"answer: {vote.winner}"
    failed = f", {vote.failed} failed" if vote.failed else ""
    is_stopped = outcome.settled or vote.aborted
    saved = f", about {outcome.saved_tokens:,} saved" * bool(is_stopped and outcome.saved_tokens)
    spent = (
        f"{'at least ' if outcome.spent_at_least else ''}{counted(outcome.spent_tokens, 'token')}"
    )
    return f"{answer}  ({votes}{failed}, {spent}{saved}, {outcome.elapsed_s:.1f} s)"


def _ties(vote: Tally) -> str:
    """Return the answers that have as many votes as the winner, in words."""
    equal = [f'"{group.answer}"' for group in vote.groups[1:] if group.votes == vote.votes]
    named = [*equal[:MAX_TIES], *([f"{len(equal) - MAX_TIES} more"] if equal[MAX_TIES:] else [])]
    return f", tied with {join_words(named)}" if named else ""


def hints(outcome: Outcome, program: Program, max_tokens: int) -> list[str]:
    """Return a line for each reason why samples have no vote, or why the vote says little."""
    reasons = reasons_without_vote(outcome, program, max_tokens)
    hint = disagreement(outcome.vote)
    return [*(f"{reason.found}{reason.mend}" for reason in reasons), *([hint] if hint else [])]


def disagreement(vote: Tally) -> str | None:
    """Return a hint where several samples were asked and no two agree; None elsewhere."""
    num_without = vote.unanswered + vote.truncated + vote.failed  # others were stopped on purpose
    is_alone = len(vote.groups) + num_without < 2
    if not vote.groups or is_alone or any(group.votes > 1 for group in vote.groups):
        return None
    found = (
        f"no two of the {len(vote.groups)} answers agree"
        if len(vote.groups) > 1
        else "a single sample has an answer"
    )
    return f"{found}, so the vote says little: take more --samples, or serve a larger model"
