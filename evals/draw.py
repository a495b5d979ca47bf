"""A program on one server, as a run draws its questions with it."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lim_sglang.evals.jobs import Deliver, Job, SampleResult
from lim_sglang.evals.method import Method
from lim_sglang.programs.catalogue import find_program
from lim_sglang.programs.drawing import SamplingRequest, SamplingRun
from lim_sglang.programs.program import Outcome, run_program
from lim_sglang.programs.prompts import ask_messages
from lim_sglang.programs.records import COMPLETED_STATES, Sample, SampleState, Sampling
from lim_sglang.programs.transport import Backend
from lim_sglang.programs.vote import Equivalent


class ProgramSampler:
    """Draws jobs with one program on one server, from any number of threads."""

    def __init__(
        self,
        backend: Backend,
        method: Method,
        *,
        prompt: str,
        sampling: Sampling,
        parallel: int,
        equivalent: Equivalent,
    ) -> None:
        """Asks the server for nothing but whether it honours seeds.

        Args:
            prompt: of the task.
            parallel: samples of one question in flight.
            same: whether two answers share a vote.

        Raises:
            ConfigError: an option of the program or the prompt cannot be.
        """
        self._backend = backend
        self._method = method
        self._program = find_program(method.program)
        self._prompt = prompt
        self._sampling = sampling
        self._parallel = parallel
        # Votes are counted when the run is scored; only what stops by itself looks at them now.
        self._equivalent: Equivalent = equivalent if method.stops_by_itself else operator.eq
        self._seeds_honoured = sampling.seed is not None and backend.honours_seeds
        self._run("", ())

    def __call__(self, job: Job, deliver: Deliver) -> None:
        """Draw what a job lacks. Where a delivery is not wanted any more, the rest is aborted."""
        begun: list[SamplingRun] = []

        def tell(sample: Sample) -> None:
            is_news = not self._method.stops_by_itself or sample.state is SampleState.FAILED
            if is_news and not deliver(SampleResult(sample)):
                begun[0].abandon()

        outcome = self._run(job.question.text, job.indices, on_sample=tell, on_begin=begun.append)
        if self._method.stops_by_itself:
            deliver(*self._settled(outcome, begun[0]))

    def _settled(self, outcome: Outcome, run: SamplingRun) -> Iterator[SampleResult]:
        """The samples of a question that has come to its end."""
        heard = {sample.index for sample in run.voters}
        for sample in outcome.samples:
            unheard = self._program.finished_only and sample.state is SampleState.TRUNCATED
            late = sample.state in COMPLETED_STATES and (sample.index not in heard or unheard)
            yield SampleResult(sample, late)

    def _run(
        self,
        text: str,
        indices: Sequence[int],
        *,
        on_sample: Callable[[Sample], None] = lambda _: None,
        on_begin: Callable[[SamplingRun], None] = lambda _: None,
    ) -> Outcome:
        question = SamplingRequest(
            ask_messages(text, template=self._prompt, system=self._method.system),
            self._sampling,
            parallel=self._parallel,
            streamed=self._program.streamed,
            seeds_honoured=self._seeds_honoured,
        )
        options: dict[str, Any] = dict(self._method.options)
        return run_program(
            *(self._program, self._backend, question),
            indices=indices,
            equivalent=self._equivalent,
            options=options,
            on_sample=on_sample,
            on_begin=on_begin,
        )
