"""The reasoning programs, and how one of them is run on a question."""

import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lim_sglang.environment import project_commit
from lim_sglang.errors import ConfigError
from lim_sglang.programs.schema import COMPLETED_STATES, Sample, SampleState
from lim_sglang.programs.vote import Equivalent, Order, Tally, tally

if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend
    from lim_sglang.programs.sampler import SamplingRun
    from lim_sglang.programs.schema import SamplingRequest


SAMPLING_VERSION = 1
"""Part of the identity of a run: samples of two versions are never mixed. Raise the number with a
change of what a server is sent, of how its answer is read, or of when a program stops
(`sampler.py`, `backend.py`, `chat.py`, the backends, `stopping.py`, the programs)."""


@dataclass(frozen=True)
class Program:
    """A way to answer a question with samples: which are taken, when to stop, how they vote.

    The function itself is in the module of the same name, which imports SGLang's frontend: seconds.
    """

    name: str
    samples: int
    """Samples that the program may take where nobody says how many: the papers' 40 where a program
    stops by itself, twice DeepConf's warm-up."""
    stops_when: str
    source: str
    order: Order = Order.BY_VOTES
    streamed: bool = False
    """The program needs to know the tokens of samples in flight."""
    finished_only: bool = False
    """A sample that was cut off has no vote, even if it states an answer."""
    parallel: int | None = None
    """Samples in flight where the caller does not say how many; None for all."""
    most: int | None = None
    """Samples that the program takes at most, however many it is offered."""
    stops_early: bool = True
    """What its samples say decides how many a question has."""

    @cached_property
    def function(self) -> Any:
        """The `@sgl.function` of `(s, run, indices)` and the program's options with defaults."""
        module = importlib.import_module(f"lim_sglang.programs.{self.name}")
        return getattr(module, self.name)

    @property
    def options(self) -> dict[str, Any]:
        """The program's options with their defaults; loads SGLang's frontend."""
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


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program(
            "single",
            samples=1,
            stops_when="its one sample has ended",
            source="chain of thought, arXiv 2201.11903",
            most=1,
            stops_early=False,
        ),
        Program(
            "majority",
            samples=8,
            stops_when="all samples have ended",
            source="self-consistency, arXiv 2203.11171",
            stops_early=False,
        ),
        Program(
            "adaptive",
            samples=40,
            stops_when="the leader is the more frequent answer with the given confidence",
            source="Adaptive-Consistency, arXiv 2305.11860",
            parallel=8,
        ),
        Program(
            "early_stop",
            samples=40,
            stops_when="a window of samples agrees",
            source="ESC, arXiv 2401.10480",
        ),
        Program(
            "short",
            samples=8,
            stops_when="the first m of k samples have finished",
            source="short-m@k, arXiv 2505.17813",
            order=Order.SHORTER_FIRST,
            finished_only=True,
        ),
        Program(
            "confidence",
            samples=32,
            stops_when="one answer has nearly all of the confidence; unsure chains are aborted",
            source="DeepConf, arXiv 2508.15260",
            order=Order.BY_CONFIDENCE,
            streamed=True,
        ),
        Program(
            "budget",
            samples=40,
            stops_when="a token budget for the whole question is spent",
            source="ours, a baseline at equal cost",
            streamed=True,
            finished_only=True,
            parallel=4,
        ),
    )
}
"""Every program by the name that `--program` takes."""


def find_program(name: str) -> Program:
    """Look up a program.

    Raises:
        ConfigError: none has this name; the message lists those that there are.
    """
    if name not in PROGRAMS:
        raise ConfigError(f"unknown program {name!r}; known, and when each stops:\n{listing()}")
    return PROGRAMS[name]


def listing() -> str:
    """Describe the programs, a line each."""
    width = max(map(len, PROGRAMS))
    return "\n".join(
        f"  {program.name:{width}}  {program.stops_when} ({program.source})"
        for program in PROGRAMS.values()
    )


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
    backend: "Backend",
    question: "SamplingRequest",
    *,
    indices: Sequence[int],
    equivalent: Equivalent,
    options: Mapping[str, Any] | None = None,
    on_sample: Callable[[Sample], None] = lambda _: None,
    on_begin: "Callable[[SamplingRun], None]" = lambda _: None,
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
    from lim_sglang.programs.sampler import SamplingRun

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
