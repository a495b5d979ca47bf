"""The servers of a run: connect to all of them, and sample jobs there with the run's program."""

import hashlib
import operator
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.evals.run_config import RunConfig
from lim_sglang.evals.scheduler import InFlight, Job, SampleResult, SampleSink
from lim_sglang.programs.http_client import UnreachableError, normalise_url
from lim_sglang.programs.program import Outcome, find_program, load_frontend, run_program
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    Access,
    Api,
    Sample,
    SampleState,
    Sampling,
    SamplingRequest,
    ask_messages,
)
from lim_sglang.programs.sglang_backend import check_server, connect
from lim_sglang.programs.vote import Equivalent

if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend
    from lim_sglang.programs.sampler import SamplingRun


@dataclass(frozen=True)
class ServerFacts:
    """Properties of a server, as it reports them."""

    url: str
    info: Mapping[str, Any]
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters that the model's makers recommend."""
    concurrency: int = 64
    """Requests that the server is sent at the same time."""


@dataclass(frozen=True)
class Connection:
    """A server that answers."""

    facts: ServerFacts
    backend: "Backend"


def sampling_of(sampling: Sampling, question_id: str) -> Sampling:
    """Return the parameters of one question's samples: its seed follows from the run's seed and
    the question's id, so that questions share no noise. Sample i is sent that seed + i.
    """
    if sampling.seed is None:
        return sampling
    digest = hashlib.sha256(f"{sampling.seed} {question_id}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:8], "big") >> 2)  # room for + i


def split_urls(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses in some texts, several in one text between spaces or commas.

    Raises:
        ConfigError: no address, a text that is none, or one that is given twice.
    """
    urls = [normalise_url(url) for text in texts for url in re.split(r"[\s,]+", text) if url]
    if not urls:
        raise ConfigError("no server is named: give --url or LIM_URL an address, or use --serve")
    twice = {url for url in urls if urls.count(url) > 1}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is named twice: name each server once")
    return tuple(urls)


@contextmanager
def connected(
    urls: Sequence[str], access: Access, console: Console
) -> Iterator[tuple[Connection, ...]]:
    """Connect to all servers until the block ends.

    Raises:
        ConfigError: an option that the API does not have.
        ServerError: servers do not answer; all of them are named.
    """
    if access.api is Api.SGLANG:
        _check_all(urls, access, console)
    with ExitStack() as stack:
        connections = []
        for url in urls:
            backend = connect(replace(access, url=url), console)
            stack.callback(backend.close)
            defaults = backend.sampling_defaults()
            facts = ServerFacts(url, backend.server_info(), defaults, backend.limiter.total)
            connections.append(Connection(facts, backend))
        load_frontend(console)
        yield tuple(connections)


def _check_all(urls: Sequence[str], access: Access, console: Console) -> None:
    """Check that every server answers, before SGLang's frontend is loaded, which takes seconds."""
    problems = []
    for url in urls:
        try:
            check_server(replace(access, url=url), console)
        except ServerError as error:
            problems.append(error)
    if problems:
        are_gone = all(isinstance(each, UnreachableError) for each in problems)
        kind = UnreachableError if are_gone else ServerError
        raise kind("\n".join(map(str, problems)))


class ProgramSampler:
    """Samples jobs with the run's program on one server. Thread-safe; a `JobSampler`."""

    def __init__(
        self,
        backend: "Backend",
        config: RunConfig,
        *,
        prompt: str,
        sampling: Sampling,
        parallel: int,
        equivalent: Equivalent,
    ) -> None:
        """Check the prompt; the server is only asked if it honours seeds.

        Args:
            prompt: template of the task's questions.
            parallel: samples of one question in flight.
            equivalent: returns True if two answers share a vote.

        Raises:
            ConfigError: a broken prompt.
        """
        self._backend = backend
        self._config = config
        self._program = find_program(config.program)
        self._prompt = prompt
        self._sampling = sampling
        self._parallel = parallel
        # Votes are counted when the run is scored; only a program that stops early needs them now.
        self._equivalent: Equivalent = equivalent if config.stops_early else operator.eq
        self._seeds_honoured = sampling.seed is not None and backend.honours_seeds
        self._running: dict[SamplingRun, float] = {}
        """Runs of the questions in work, each with the time of its beginning, for the display."""
        self._run("", ())

    def in_flight(self) -> InFlight:
        """Count the samples in work; tokens of a program that stops early are counted with those
        of the question's samples that have ended, which are delivered with the others.
        """
        runs = dict(self._running)
        samples = [sample for run in runs for sample in list(run.in_flight.values())]
        if self._config.stops_early:
            now_s = time.monotonic()
            ages_s = tuple(now_s - begin_s for begin_s in runs.values())
            return InFlight(len(samples), sum(run.spent_tokens for run in runs), ages_s)
        num_tokens = sum(sample.num_tokens for sample in samples)
        return InFlight(len(samples), num_tokens, tuple(each.elapsed_s for each in samples))

    def __call__(self, job: Job, deliver: SampleSink) -> None:
        """Sample a job. Once a delivery is no longer wanted, the rest of the job is aborted."""
        runs: list[SamplingRun] = []

        def on_begin(run: "SamplingRun") -> None:
            runs.append(run)
            self._running[run] = time.monotonic()

        def on_sample(sample: Sample) -> None:
            # A program that stops early delivers at the end, except for failures.
            is_due = not self._config.stops_early or sample.state is SampleState.FAILED
            if is_due and not deliver(SampleResult(sample)):
                runs[0].stop()

        try:
            outcome = self._run(
                job.question.asked,
                job.indices,
                question_id=job.question.question_id,
                on_sample=on_sample,
                on_begin=on_begin,
            )
        finally:
            for run in runs:
                self._running.pop(run, None)
        if self._config.stops_early:
            deliver(*self._results(outcome, runs[0]))

    def _results(self, outcome: Outcome, run: "SamplingRun") -> Iterator[SampleResult]:
        """Yield the samples of a finished question, with those marked that have no vote."""
        voters = {sample.index for sample in run.voters}
        for sample in outcome.samples:
            cut_off = self._program.finished_only and sample.state is SampleState.TRUNCATED
            has_vote = sample.index in voters and not cut_off
            yield SampleResult(sample, late=sample.state in COMPLETED_STATES and not has_vote)

    def _run(
        self,
        text: str,
        indices: Sequence[int],
        *,
        question_id: str = "",
        on_sample: Callable[[Sample], None] = lambda _: None,
        on_begin: "Callable[[SamplingRun], None]" = lambda _: None,
    ) -> Outcome:
        request = SamplingRequest(
            ask_messages(text, template=self._prompt, system=self._config.system),
            sampling_of(self._sampling, question_id),
            parallel=self._parallel,
            streamed=self._program.streamed,
            seeds_honoured=self._seeds_honoured,
        )
        return run_program(
            self._program,
            self._backend,
            request,
            indices=indices,
            equivalent=self._equivalent,
            options=self._config.all_options(),
            on_sample=on_sample,
            on_begin=on_begin,
        )
