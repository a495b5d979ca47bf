"""The reasoning programs, how one of them is run on a question, and the record of its outcome."""

import importlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from inspect import signature
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from lim_sglang.environment import project_commit
from lim_sglang.errors import ConfigError, ServerError, likely_name
from lim_sglang.markdown_section import counted, join_words
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    IN_A_BOX,
    READ_FORMS,
    UNREAD,
    Sample,
    SampleState,
    cut_off_advice,
)
from lim_sglang.programs.stopping import (
    WINDOW,
    FirstRule,
    PosteriorRule,
    TokenBudgetRule,
    WindowRule,
    check_consensus,
    fewest_votes,
)
from lim_sglang.programs.vote import Equivalent, Order, Tally, tally

if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend
    from lim_sglang.programs.sampler import SamplingRun
    from lim_sglang.programs.schema import SamplingRequest


SAMPLING_VERSION = 2
"""Part of the identity of a run: samples of two versions are never mixed.

Raise the number with each change of the requests to a server, of the reading of its answers, or of
the moment when an existing program stops (`sampler.py`, `backend.py`, `chat.py`, the backends,
`stopping.py`, the programs). A new program needs no new number.
"""


@dataclass(frozen=True)
class Program:
    """A way to answer a question with samples: how many, when to stop, how they vote.

    The function itself is in the module of the same name, which imports SGLang's frontend, unless
    `own_function` is given.
    """

    name: str
    samples: int
    """Most samples if the caller names no number: 40 as in the papers of `adaptive` and
    `early_stop`, twice DeepConf's warm-up for `confidence`."""
    stops_when: str
    source: str
    order: Order = Order.BY_VOTES
    streamed: bool = False
    """True if the program looks at the tokens of samples in flight."""
    finished_only: bool = False
    """True if a sample that was cut off has no vote, even if it states an answer."""
    eval_samples: int | None = None
    """Most samples of each question of `lim eval`, if that is another number."""
    parallel: int | None = None
    """Samples in flight if the caller names no number; None for all."""
    max_samples: int | None = None
    """Samples that the program takes at most, however many it is offered."""
    least_samples: Callable[..., int] = lambda: 1
    """Returns the fewest samples of which the program can stop early, by those of its options that
    are its parameters: with fewer it would be a plain majority."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Further parameters of the function, with their defaults; whole numbers only take these."""
    check_values: Callable[..., object] = dict
    """Raises `ConfigError` for impossible values of the options, which are its parameters."""
    stops_early: bool = True
    """True if the samples of a question decide how many there are."""
    own_function: Any = None
    """The `@sgl.function` of a program outside this package; see `examples/stopping_rule.py`."""

    @cached_property
    def function(self) -> Any:
        """The `@sgl.function` of `(s, run, indices, **options)`."""
        if self.own_function is not None:
            return self.own_function
        module = importlib.import_module(f"lim_sglang.programs.{self.name}")
        return getattr(module, self.name)

    def check(self, options: Mapping[str, Any], samples: int | None = None) -> None:
        """Refuse options that the program does not have, and numbers that can have no effect.

        Args:
            samples: most samples of a question; None: not known.

        Raises:
            ConfigError: an option that the program does not have, a value that it cannot have, or
                more or fewer samples than the program can use.
        """
        for name, value in options.items():
            if name not in self.options:
                raise ConfigError(_unknown_option(self, name))
            if isinstance(self.options[name], int) and not isinstance(value, int):
                raise ConfigError(f"{name}: expected a whole number, got {value}")
        values = {**self.options, **options}
        self.check_values(**values)
        if samples is None:
            return
        if self.max_samples is not None and samples > self.max_samples:
            raise ConfigError(
                f"the program {self.name} takes {counted(self.max_samples, 'sample')} of a "
                f"question, not {samples}: the program majority takes several, which vote"
            )
        named = signature(self.least_samples).parameters
        decisive = {name: value for name, value in values.items() if name in named}
        if samples < (least := self.least_samples(**decisive)):
            given = " ".join(f"{name}={value}" for name, value in decisive.items())
            raise ConfigError(
                f"the program {self.name} with {given} cannot stop before it has "
                f"{counted(least, 'sample')}, and may take {samples}: take more samples, lower "
                f"{join_words(decisive)}, or take the program majority"
            )

    def count(self, samples: Sequence[Sample], equivalent: Equivalent) -> Tally:
        """Return the vote of samples, which may be those so far."""
        return tally(samples, equivalent, self.order, finished_only=self.finished_only)


def _unknown_option(program: Program, name: str) -> str:
    """Return the error for an option that a program does not have."""
    owners = [each.name for each in PROGRAMS.values() if name in each.options]
    hint = f", which {join_words(owners)} {'has' if len(owners) == 1 else 'have'}" if owners else ""
    takes = f"only {join_words(program.options)}" if program.options else "no options"
    return f"the program {program.name} has no option {name}{hint}; it takes {takes}"


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program(
            "single",
            samples=1,
            stops_when="its one sample has ended",
            source="chain of thought, arXiv 2201.11903",
            max_samples=1,
            stops_early=False,
        ),
        Program(
            "majority",
            samples=8,
            eval_samples=4,
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
            options={"confidence": 0.95},
            check_values=PosteriorRule,
            least_samples=fewest_votes,
        ),
        Program(
            "early_stop",
            samples=40,
            stops_when="a window of samples agrees",
            source="ESC, arXiv 2401.10480",
            options={"window": 5},
            check_values=lambda window: WindowRule(window),
            least_samples=lambda window: window,
        ),
        Program(
            "short",
            samples=8,
            stops_when="the first m of k samples have finished",
            source="short-m@k, arXiv 2505.17813",
            order=Order.SHORTER_FIRST,
            finished_only=True,
            options={"wanted": 3},
            check_values=FirstRule,
            least_samples=lambda wanted: wanted,
        ),
        Program(
            "confidence",
            samples=32,
            stops_when="one answer has nearly all of the confidence; unsure chains are aborted",
            source="DeepConf, arXiv 2508.15260",
            order=Order.BY_CONFIDENCE,
            streamed=True,
            options={"warm_up": 16, "keep": 0.1, "agreement": 0.95, "window": WINDOW},
            check_values=check_consensus,
            least_samples=lambda warm_up: warm_up,
        ),
        Program(
            "budget",
            samples=40,
            stops_when="a token budget for the whole question is spent",
            source="ours, a baseline at equal cost",
            streamed=True,
            finished_only=True,
            parallel=4,
            options={"tokens": 16384},
            check_values=TokenBudgetRule,
        ),
    )
}
"""Every program by the name that `--program` takes."""


def find_name(name: str, known: Iterable[str] = PROGRAMS) -> str | None:
    """Return the known program of a name, whatever its case and the signs between its words."""
    bare = {program.replace("_", ""): program for program in known}
    return bare.get(re.sub(r"[\s_-]", "", name.casefold()))


def find_program(name: str) -> Program:
    """Look up a program, as `find_name` does.

    Raises:
        ConfigError: none has this name; the message names the likeliest one, and lists all.
    """
    found = find_name(name)
    if found is None:
        guess = likely_name(name, PROGRAMS)
        raise ConfigError(
            f"unknown program {name!r}; {guess}known, and when each stops:\n{listing()}"
        )
    return PROGRAMS[found]


def listing() -> str:
    """Describe the programs: when each stops, its samples, its options with their defaults."""
    width = max(map(len, PROGRAMS))
    return "\n".join(
        f"  {program.name:{width}}  {program.stops_when} ({program.source})\n"
        f"  {'':{width}}  {_limits(program)}"
        for program in PROGRAMS.values()
    )


def _limits(program: Program) -> str:
    """Return the defaults of a program in words."""
    samples = f"{program.samples} sample{'s' * (program.samples > 1)}"
    parallel = f", {program.parallel} at once" if program.parallel else ""
    options = " ".join(f"{name}={value}" for name, value in program.options.items())
    of_eval = f" (lim eval: {program.eval_samples})" if program.eval_samples else ""
    return samples + of_eval + parallel + (f"; options: {options}" if options else "")


def load_frontend(console: Console) -> None:
    """Import SGLang's frontend, which takes two seconds, and show that on the console."""
    with console.status("Loading SGLang's frontend"):
        importlib.import_module("lim_sglang.programs.sampler")


@dataclass(frozen=True)
class Outcome:
    """The samples of a question and their vote."""

    samples: tuple[Sample, ...]
    """All samples that were begun, by index."""
    vote: Tally
    num_asked: int
    """Samples that the program could have taken."""
    settled: bool
    """True if the program stopped before all of these had been generated."""
    elapsed_s: float
    num_late: int = 0
    """Samples that ended by themselves after that, too late to vote."""
    interrupted: bool = False
    """True if Ctrl-C ended the question: samples in flight are left out."""
    left_out_tokens: int = 0
    """Tokens of these samples as far as they were counted."""

    @property
    def num_not_begun(self) -> int:
        """Samples that were never begun."""
        return self.num_asked - len(self.samples)

    @property
    def spent_tokens(self) -> int:
        """Tokens generated, by aborted samples and by those left out, too."""
        return self.left_out_tokens + sum(sample.num_tokens for sample in self.samples)

    @property
    def spent_at_least(self) -> bool:
        """True if the server may have generated more than `spent_tokens`."""
        return self.interrupted or any(sample.tokens_at_least for sample in self.samples)

    @property
    def saved_tokens(self) -> int:
        """A cautious estimate of the tokens that all samples would have taken in addition.

        A sample that was not begun counts the mean of those that ended by themselves, which are the
        shorter ones; an aborted sample counts the tokens it lacks of that mean, at least one.
        """
        completed = [s.num_tokens for s in self.samples if s.state in COMPLETED_STATES]
        aborted = [s.num_tokens for s in self.samples if s.state is SampleState.ABORTED]
        if not completed:
            return 0
        mean = fmean(completed)
        return round(self.num_not_begun * mean + sum(max(mean - n, 1.0) for n in aborted))


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
    """Generate the samples of one question that the program needs, and let them vote.

    Args:
        indices: the samples that the program may take; each index gives a sample its seed.
        equivalent: returns True if two answers are equal.
        options: the program's options by name; see `Program.options`.
        on_sample: called with each sample as it ends, in the caller's thread.
        on_begin: called with the run before its first sample.

    Raises:
        ConfigError: an option that the program does not have, or a value that it cannot have.
    """
    from lim_sglang.programs.sampler import FrontendBackend, SamplingRun

    options = options or {}
    program.check(options)
    indices = indices[: program.max_samples]
    start_s = time.monotonic()
    run = SamplingRun(backend, question, equivalent, on_sample)
    on_begin(run)
    program.function.run(
        run=run,
        indices=tuple(indices),
        **{**program.options, **options},
        backend=FrontendBackend(backend),
    )
    return outcome_of(program, run, len(indices), time.monotonic() - start_s)


def outcome_of(
    program: Program,
    run: "SamplingRun",
    num_asked: int,
    elapsed_s: float,
    *,
    interrupted: bool = False,
) -> Outcome:
    """Return the outcome of a run that has ended, or that was interrupted."""
    samples = tuple(sorted(run.ended, key=lambda sample: sample.index))
    voters = run.voters
    return Outcome(
        samples=samples,
        vote=program.count(voters, run.equivalent),
        num_asked=num_asked,
        settled=run.settled,
        elapsed_s=elapsed_s,
        num_late=len(samples) - len(voters),
        interrupted=interrupted,
        left_out_tokens=sum(each.num_tokens for each in list(run.in_flight.values())),
    )


def refuse_failures(outcome: Outcome) -> None:
    """Raise `ServerError` if samples failed and no sample ended by itself."""
    failed = [sample for sample in outcome.samples if sample.state is SampleState.FAILED]
    if not failed or any(sample.state in COMPLETED_STATES for sample in outcome.samples):
        return
    total = len(outcome.samples)
    share = of_samples(len(failed), total)
    every = f"all {counted(total, 'sample')}" if total > 1 else "the only sample"
    which = every if len(failed) == total else f"{share} and none ended"
    first = ", the first with" if len(failed) > 1 else ""
    raise ServerError(f"the server failed {which}{first}: {_failure(failed[0])}")


_TOO_LONG = re.compile(r"maximum context length|max_(completion_)?tokens")
"""Words of servers, SGLang among them, whose context is too short for a request."""


def is_too_long(error: object) -> bool:
    """Return True if a server's context cannot hold a question and its answer."""
    return bool(_TOO_LONG.search(str(error)))


def _failure(sample: Sample) -> str:
    """Return the error of a sample, with the option that mends the request if there is one."""
    too_long = is_too_long(sample.error)
    advice = " (lower --max-tokens, or ask a shorter question)" if too_long else ""
    return f"{sample.error}{advice}"


def of_samples(count: int, total: int) -> str:
    """Return a share of samples in words: `2 of 8 samples`, `1 of 1 sample`."""
    return f"{count:,} of {counted(total, 'sample')}"


class Reason(NamedTuple):
    """A reason why samples of a question have no vote."""

    found: str
    """The samples in numbers, and what became of them."""
    mend: str
    """The rest of the line: the way to mend it, or the error."""


ONE_RESULT = "the question has to have one short result"
_WORDS = re.compile(r"\banswer(?: is|:)[^\w\\]*[^\W\d_]{2}", re.IGNORECASE)
"""An answer that is stated in words."""


def _states_words(sample: Sample) -> bool:
    return sample.answer is None and bool(_WORDS.search(sample.text))


def reasons_without_vote(outcome: Outcome, program: Program, max_tokens: int) -> Iterator[Reason]:
    """Yield the reasons why samples have no vote.

    Samples that a settled program stopped need none, unless there is no answer.
    """
    vote, samples, total = outcome.vote, outcome.samples, len(outcome.samples)
    yield from _reasons_of_the_cut_off(outcome, program, max_tokens)
    if vote.unanswered:
        advice = f", or another --template; {ONE_RESULT}"
        found = f"{of_samples(vote.unanswered, total)} {UNREAD}"
        yield Reason(found, f"{READ_FORMS}{advice}")
    if vote.failed:
        error = next(_failure(s) for s in samples if s.state is SampleState.FAILED)
        yield Reason(f"{of_samples(vote.failed, total)} failed", f": {error}")
    if vote.winner is None:
        advice = ": `lim programs` lists its options"
        rule = f"the program {program.name} stops when {program.stops_when}"
        if "tokens" in program.options:
            advice = ": raise --set tokens="
        if vote.aborted:
            found = f"{of_samples(vote.aborted, total)} stopped before an answer, since {rule}"
            yield Reason(found, advice)
        if outcome.num_late:
            late = of_samples(outcome.num_late, total)
            yield Reason(f"{late} ended too late to vote, since {rule}", advice)


def _reasons_of_the_cut_off(
    outcome: Outcome, program: Program, max_tokens: int
) -> Iterator[Reason]:
    vote = outcome.vote
    cut_off = [s for s in outcome.samples if s.state is SampleState.TRUNCATED]
    otherwise = "ask a shorter question, or serve a longer context"
    rule = f"with an answer that has no vote, since the program {program.name} counts none of these"
    for count, has_answer, words in (
        (vote.truncated - vote.uncounted, False, "without an answer"),
        (vote.uncounted, True, rule),
    ):
        if count:
            lengths = [s.num_tokens for s in cut_off if (s.answer is not None) == has_answer]
            longest = max(lengths, default=0)
            share = of_samples(count, len(outcome.samples))
            advice = cut_off_advice(longest, max_tokens, otherwise)
            if not has_answer and any(map(_states_words, cut_off)):
                advice += f"; {IN_A_BOX}"
            if count == len(outcome.samples) and not has_answer:
                advice += f"; {ONE_RESULT}"
            yield Reason(
                f"{share} cut off after {counted(longest, 'token')} {words}", f": {advice}"
            )


def ask_record(
    question: str,
    program: Program,
    options: Mapping[str, Any],
    asked: "SamplingRequest",
    outcome: Outcome,
) -> dict[str, Any]:
    """Return the record of `lim ask --json`, without the server's description."""
    return {
        "question": question,
        **outcome_record(outcome),
        "interrupted": outcome.interrupted,
        "program": program.name,
        "options": {**program.options, **options},
        "messages": list(asked.messages),
        "parallel": asked.parallel,
        "sampling": asdict(asked.sampling),
        "samples": [asdict(sample) for sample in outcome.samples],
        "commit": project_commit(),
        "asked": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """Return the record of a vote and its cost."""
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
