"""A program on one server, as a run draws its questions with it."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lim_sglang.evals.jobs import Deliver, Drawn, Job
from lim_sglang.evals.method import Method
from lim_sglang.programs.catalogue import find_program
from lim_sglang.programs.drawing import Drawing, Question
from lim_sglang.programs.program import Outcome, run_program
from lim_sglang.programs.prompts import ask_messages
from lim_sglang.programs.records import DRAWN_WHOLE, Sample, SampleState, Sampling
from lim_sglang.programs.transport import Transport
from lim_sglang.programs.vote import Same


class ProgramDraw:
    """Draws jobs with one program on one server, from any number of threads."""

    def __init__(
        self,
        endpoint: Transport,
        method: Method,
        *,
        prompt: str,
        sampling: Sampling,
        parallel: int,
        same: Same,
    ) -> None:
        """Asks the server for nothing but whether it honours seeds.

        Args:
            prompt: of the task.
            parallel: samples of one question in flight.
            same: whether two answers share a vote.

        Raises:
            ConfigError: an option of the program or the prompt cannot be.
        """
        self._endpoint = endpoint
        self._method = method
        self._program = find_program(method.program)
        self._prompt = prompt
        self._sampling = sampling
        self._parallel = parallel
        # Votes are counted when the run is scored; only what stops by itself looks at them now.
        self._same: Same = same if method.stops_by_itself else operator.eq
        self._seeds_honoured = sampling.seed is not None and endpoint.honours_seeds
        self._run("", ())

    def __call__(self, job: Job, deliver: Deliver) -> None:
        """Draw what a job lacks. Where a delivery is not wanted any more, the rest is aborted."""
        begun: list[Drawing] = []

        def tell(sample: Sample) -> None:
            is_news = not self._method.stops_by_itself or sample.state is SampleState.FAILED
            if is_news and not deliver(Drawn(sample)):
                begun[0].abandon()

        outcome = self._run(job.question.text, job.indices, on_sample=tell, on_begin=begun.append)
        if self._method.stops_by_itself:
            deliver(*self._settled(outcome, begun[0]))

    def _settled(self, outcome: Outcome, drawing: Drawing) -> Iterator[Drawn]:
        """The samples of a question that has come to its end."""
        heard = {sample.index for sample in drawing.voters}
        for sample in outcome.samples:
            unheard = self._program.finished_only and sample.state is SampleState.TRUNCATED
            late = sample.state in DRAWN_WHOLE and (sample.index not in heard or unheard)
            yield Drawn(sample, late)

    def _run(
        self,
        text: str,
        indices: Sequence[int],
        *,
        on_sample: Callable[[Sample], None] = lambda _: None,
        on_begin: Callable[[Drawing], None] = lambda _: None,
    ) -> Outcome:
        question = Question(
            ask_messages(text, template=self._prompt, system=self._method.system),
            self._sampling,
            parallel=self._parallel,
            watched=self._program.watched,
            seeds_honoured=self._seeds_honoured,
        )
        options: dict[str, Any] = dict(self._method.options)
        return run_program(
            *(self._program, self._endpoint, question),
            indices=indices,
            same=self._same,
            options=options,
            on_sample=on_sample,
            on_begin=on_begin,
        )
