"""The vote as a person sees it come in, and its last line."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lim_sglang.programs.records import Sample, SampleState
from lim_sglang.programs.vote import Tally, tally


class VoteDisplay:
    """The vote as it stands: redrawn in place on a terminal, a line a sample elsewhere."""

    def __init__(self, console: Console, total: int, same: Callable[[str, str], bool]) -> None:
        self.samples: list[Sample] = []
        self.tally = tally([], same)
        """The vote of the samples so far."""
        self._console = console
        self._total = total
        self._same = same
        self._start_s = time.monotonic()
        self._bar = Progress(
            TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("", total=total)
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

    @property
    def elapsed_s(self) -> float:
        """Seconds since the question was asked."""
        return time.monotonic() - self._start_s

    def add(self, sample: Sample) -> None:
        """Show one sample more."""
        self.samples.append(sample)
        self.tally = tally(self.samples, self._same)
        self._bar.advance(self._task)
        place = f"{len(self.samples)}/{self._total}"
        # As text: an answer may hold what rich takes for markup.
        line = Text(f"{place}  {describe(sample)}")
        if not self._console.is_terminal:
            line.append(f"  |  {standing(self.tally)}")
        self._console.print(line, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(vote_table(self.tally), self._bar) if self.samples else self._bar


def describe(sample: Sample) -> str:
    """One sample in a line."""
    if sample.state is SampleState.FAILED:
        return f"failed: {sample.error}"
    cut = ", cut off" if sample.state is SampleState.TRUNCATED else ""
    answer = "no answer" if sample.answer is None else sample.answer
    return f"{answer}  ({sample.num_tokens} tokens, {sample.latency_s:.1f} s{cut})"


def standing(vote: Tally) -> str:
    """The vote in a line: `391: 5, 401: 1, no answer: 2`."""
    counts = [*((group.answer, group.votes) for group in vote.groups), *silent(vote).items()]
    return ", ".join(f"{name}: {count}" for name, count in counts if count)


def silent(vote: Tally) -> dict[str, int]:
    """Samples without a vote, by reason."""
    return {"no answer": vote.unanswered, "cut off": vote.truncated, "failed": vote.failed}


def vote_table(vote: Tally) -> Table:
    """The vote with a bar an answer."""
    table = Table("answer", "votes", "", box=None, header_style="bold")
    for group in vote.groups:
        table.add_row(Text(group.answer), str(group.votes), "█" * group.votes)
    for name, count in silent(vote).items():
        if count:
            table.add_row(Text(name, style="dim"), str(count), "")
    return table


def verdict(vote: Tally, samples: list[Sample], elapsed_s: float) -> str:
    """The last line: answer, votes, tokens, seconds."""
    votes = f"{vote.votes} of {len(samples)} votes"
    answer = (
        f"answer: {vote.winner}  ({votes}" if vote.winner is not None else f"no answer  ({votes}"
    )
    tokens = sum(sample.num_tokens for sample in samples)
    failed = f", {vote.failed} failed" if vote.failed else ""
    return f"{answer}{failed}, {tokens:,} tokens, {elapsed_s:.1f} s)"
