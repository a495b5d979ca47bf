"""A reasoning program, and how one is run on a question."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from lim_sglang.environment import project_commit
from lim_sglang.errors import ConfigError
from lim_sglang.programs.backend import Backend
from lim_sglang.programs.sampler import SamplingRequest, SamplingRun
from lim_sglang.programs.schema import COMPLETED_STATES, Sample, SampleState
from lim_sglang.programs.vote import Equivalent, Order, Tally, tally


@dataclass(frozen=True)
class Program:
    """A way to answer a question with samples: which are drawn, when to stop, how they vote."""

    name: str
    function: Any
    """An `@sgl.function` of `(s, drawing, indices)` and its options with their defaults."""
    order: Order = Order.BY_VOTES
    streamed: bool = False
    """Whether it needs to know the tokens of running samples."""
    finished_only: bool = False
    """Whether a sample that was cut off has no vote, even if it states an answer."""
    parallel: int | None = None
    """Samples in flight where the caller does not say how many; None for all."""
    most: int | None = None
    """Samples that it draws at most, however many it is offered."""

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        _, _, _, *options = inspect.signature(self.function.func).parameters.values()
        return {option.name: option.default for option in options}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that it does not have, and parts of what is counted.

        Raises:
            ConfigError: there is such an option.
        """
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ConfigError(
                f"the program {self.name} has no option {', '.join(unknown)}; it has: {known}"
            )
        for name, value in options.items():
            if isinstance(self.options[name], int) and not isinstance(value, int):
                raise ConfigError(f"{name}: expected a whole number, got {value}")


@dataclass(frozen=True)
class Outcome:
    """What a program made of a question."""

    samples: tuple[Sample, ...]
    """All that were begun, by index."""
    vote: Tally
    num_asked: int
    """Samples that the program could have drawn."""
    settled: bool
    """Whether it stopped before it had drawn them all."""
    elapsed_s: float
    num_late: int = 0
    """Samples that ended by themselves after that, too late to vote."""

    @property
    def num_undrawn(self) -> int:
        """Samples that were never begun."""
        return self.num_asked - len(self.samples)

    @property
    def spent_tokens(self) -> int:
        """Generated, by aborted samples too."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def spent_at_least(self) -> bool:
        """Whether the server may have generated more than is known of."""
        return any(sample.tokens_at_least for sample in self.samples)

    @property
    def saved_tokens(self) -> int:
        """A cautious estimate of what all samples would have taken more: an undrawn one the mean
        of those that ended by themselves, which are the shorter ones; an aborted one what it lacks
        of that mean, and at least one token.
        """
        whole = [s.num_tokens for s in self.samples if s.state in COMPLETED_STATES]
        early = [s.num_tokens for s in self.samples if s.state is SampleState.ABORTED]
        if not whole:
            return 0
        mean = fmean(whole)
        return round(self.num_undrawn * mean + sum(max(mean - tokens, 1.0) for tokens in early))


def run_program(
    program: Program,
    backend: Backend,
    question: SamplingRequest,
    *,
    indices: Sequence[int],
    equivalent: Equivalent,
    options: Mapping[str, Any] | None = None,
    on_sample: Callable[[Sample], None] = lambda _: None,
    on_begin: Callable[[SamplingRun], None] = lambda _: None,
) -> Outcome:
    """Draw samples of one question, as many as the program needs.

    Args:
        indices: which samples; they give each its seed and its name.
        same: whether two answers are equal.
        options: the program's, by name; see `Program.options`.
        on_sample: called with each sample as it ends, in the caller's thread.
        on_begin: given the samples that are running, before the first is.

    Raises:
        ConfigError: an option that the program does not have, or cannot be.
    """
    options = dict(options or {})
    program.check(options)
    indices = indices[: program.most]
    start_s = time.monotonic()
    run = SamplingRun(question, equivalent, on_sample)
    on_begin(run)
    program.function.run(run=run, indices=tuple(indices), **options, backend=backend)
    samples = tuple(sorted(run.ended, key=lambda sample: sample.index))
    voters = run.voters
    return Outcome(
        samples=samples,
        vote=tally(_heard(voters, program), equivalent, program.order),
        num_asked=len(indices),
        settled=run.settled,
        elapsed_s=time.monotonic() - start_s,
        num_late=len(samples) - len(voters),
    )


def _heard(samples: Sequence[Sample], program: Program) -> list[Sample]:
    """The samples as the program lets them vote."""
    return [
        replace(sample, answer=None)
        if program.finished_only and sample.state is SampleState.TRUNCATED
        else sample
        for sample in samples
    ]


def ask_record(
    question: str,
    program: "Program",
    options: Mapping[str, Any],
    asked: "SamplingRequest",
    outcome: "Outcome",
) -> dict[str, Any]:
    """What `lim ask --json` prints, but for what the server says of itself."""
    return {
        "question": question,
        **outcome_record(outcome),
        "program": program.name,
        "options": {**program.options, **options},
        "messages": list(asked.messages),
        "parallel": asked.parallel,
        "sampling": asdict(asked.sampling),
        "samples": [asdict(sample) for sample in outcome.samples],
        "commit": project_commit(),
        "asked": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def outcome_record(outcome: "Outcome") -> dict[str, Any]:
    """The vote and what it cost."""
    vote = outcome.vote
    return {
        "answer": vote.winner,
        "votes": [
            {"answer": group.answer, "votes": group.votes, "weight": group.weight}
            for group in vote.groups
        ],
        "margin": vote.margin,
        "without_vote": {
            "unanswered": vote.unanswered,
            "truncated": vote.truncated,
            "failed": vote.failed,
            "aborted": vote.aborted,
        },
        "samples_asked": outcome.num_asked,
        "settled_early": outcome.settled,
        "tokens_spent": outcome.spent_tokens,
        "tokens_spent_at_least": outcome.spent_at_least,
        "tokens_saved_estimate": outcome.saved_tokens,
        "seconds": round(outcome.elapsed_s, 3),
    }
