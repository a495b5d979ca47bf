"""Samples of one question on SGLang's frontend, until all have ended or a rule is settled.

All programs share this: each sample is a branch of its own, samples are handled as they end, and
once a rule is settled the others are aborted at the server.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from lim_sglang.frontend import BaseBackend, ChatTemplate, sgl
from lim_sglang.programs.backend import Backend, InFlightSample, QuestionSlots
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    Message,
    Sample,
    SampleState,
    Sampling,
    SamplingRequest,
)
from lim_sglang.programs.vote import Equivalent

if TYPE_CHECKING:
    from lim_sglang.programs.stopping import GroupConfidence, Rule

TOKEN_RULE_S = 0.02
"""Pause between two looks at the tokens in flight, for rules that count these."""
SOLUTION = "solution"
"""The branch's variable with the generated text."""
IN_FLIGHT = "in_flight"
"""The branch's variable with its `InFlightSample`."""
ROLES = {"system": sgl.system, "user": sgl.user, "assistant": sgl.assistant}
TRANSPARENT = ChatTemplate("transparent", default_system_prompt=None, role_prefix_and_suffix={})
"""A template that adds nothing to the messages: the server renders them."""


class FrontendBackend(BaseBackend):
    """A backend as SGLang's frontend calls it: `sgl.gen` on a branch becomes one generation."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.chat_template = TRANSPARENT
        self._backend = backend

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, Generation]:
        """Generate the next turn after the branch's messages; called in the branch's thread."""
        sampling = Sampling(
            max_tokens=sampling_params.max_new_tokens,
            temperature=sampling_params.temperature,
            top_p=sampling_params.top_p,
            top_k=sampling_params.top_k,
        )
        found = self._backend.generate(s.messages_, sampling, s.variables[IN_FLIGHT])
        return found.text, found


@dataclass(eq=False)
class SamplingRun:
    """The samples of one question so far, and those in flight."""

    backend: Backend
    question: SamplingRequest
    equivalent: Equivalent
    on_sample: Callable[[Sample], None] = lambda _: None
    """Called with each sample as it ends, in the program's thread."""
    ended: list[Sample] = field(default_factory=list)
    """Samples in the order in which they ended."""
    in_flight: dict[int, InFlightSample] = field(default_factory=dict)
    """Samples that have not been handled yet, by index."""
    settled: bool = False
    """True if the run was stopped before all samples had been generated."""
    num_evidence: int | None = None
    """Number of samples that had ended when a rule was settled; None if no rule was."""
    refusals: list[httpx.Response] = field(default_factory=list)
    """Answers of the server with a status above 399, one for each sample that failed by it."""
    _branches: dict[int, Any] = field(default_factory=dict)
    _newly_ended: deque[InFlightSample] = field(default_factory=deque)
    """Samples that have ended and are not handled yet; filled from other threads."""
    _changed: threading.Event = field(default_factory=threading.Event)
    """Set when a sample has ended, a slot was granted, or the run was stopped."""

    @property
    def voters(self) -> list[Sample]:
        """All samples but the late ones, which completed between the decision and the abort.

        A vote is over the samples that settled the rule.
        """
        after = self.ended[self.num_evidence :] if self.num_evidence is not None else []
        late = {sample.index for sample in after if sample.state is not SampleState.ABORTED}
        return [sample for sample in self.ended if sample.index not in late]

    @property
    def spent_tokens(self) -> int:
        """Tokens generated so far; of samples in flight only if they are streamed."""
        return sum(sample.num_tokens for sample in self.ended) + sum(
            # A display asks from another thread, while samples come and go.
            in_flight.num_tokens
            for in_flight in list(self.in_flight.values())
        )

    def sample(
        self,
        s: Any,
        indices: Sequence[int],
        rule: "Rule | None" = None,
        *,
        confidence: "Callable[[], GroupConfidence] | None" = None,
        threshold: float | None = None,
    ) -> None:
        """Generate samples until all have ended, or the rule is settled and the rest is aborted.

        Args:
            s: the program's state, with the messages of the question.
            rule: None generates all samples.
            confidence: makes the measure of each sample's confidence; None measures none.
            threshold: a sample whose group confidence falls under the threshold is aborted.
        """
        left = deque(indices)
        watches_tokens = rule is not None and rule.looks_at_tokens
        with self.backend.limiter.question(on_grant=self._changed.set) as slots:
            new_sample = partial(
                InFlightSample,
                streamed=self.question.streamed,
                new_confidence=confidence,
                threshold=threshold,
                on_end=self._note_end,
            )
            try:
                while True:
                    self._handle_ended(rule, left, slots)
                    if self.settled or watches_tokens:
                        self._stop_if_settled(rule, left, slots)
                    while left and len(self.in_flight) < self.question.parallel and slots.take():
                        index = left.popleft()
                        seed = self.question.sampling.seed_of(index)
                        self._start(s, new_sample(index, seed=seed), slots)
                    if not left and not self.in_flight:
                        return
                    self._changed.wait(TOKEN_RULE_S if watches_tokens else None)
                    # Cleared before the state is looked at, so that no change is missed.
                    self._changed.clear()
            finally:
                self.cancel()

    def cancel(self) -> None:
        """Abort all samples in flight."""
        for in_flight in list(self.in_flight.values()):
            in_flight.cancel()

    def settles(self, rule: "Rule | None") -> bool:
        """Return True if the run is settled, by this rule or since an earlier call."""
        if not rule or self.settled:
            return self.settled
        # Only ever set to True: another thread may stop the run meanwhile.
        if rule.is_settled(self.ended, self.spent_tokens, self.equivalent):
            self.settled, self.num_evidence = True, len(self.ended)
        return self.settled

    def stop(self) -> None:
        """Stop the run, from any thread: begin no further sample, and abort those in flight."""
        self.settled = True
        self.cancel()
        self._changed.set()

    def _start(self, s: Any, in_flight: InFlightSample, slots: QuestionSlots) -> None:
        """Begin a sample on a branch of its own, whose thread ends with the generation."""
        sampling = self.question.sampling
        try:
            branch = s.fork(1)[0]
        except BaseException:
            slots.release()
            raise
        branch[IN_FLIGHT] = in_flight
        self._branches[in_flight.index] = branch
        self.in_flight[in_flight.index] = in_flight
        solution = sgl.gen(
            SOLUTION,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        # As `branch += …` does, but with an event of ours.
        executor = branch.stream_executor
        executor.variable_event[SOLUTION] = _EndEvent(in_flight, slots)
        executor.queue.put(sgl.assistant(solution))
        executor.end()

    def _note_end(self, in_flight: InFlightSample) -> None:
        """Wake the program to handle a sample; called from any thread."""
        self._newly_ended.append(in_flight)
        self._changed.set()

    def _handle_ended(self, rule: "Rule | None", left: deque[int], slots: QuestionSlots) -> None:
        while self._newly_ended:
            slots.withdraw()  # while this program is busy
            sample = self._finish(self._newly_ended.popleft())
            self._stop_if_settled(rule, left, slots)  # before the display takes its time
            self.on_sample(sample)

    def _stop_if_settled(self, rule: "Rule | None", left: deque[int], slots: QuestionSlots) -> None:
        """Stop if the rule is settled and there is anything left to stop."""
        if (left or self.in_flight) and self.settles(rule):
            left.clear()
            slots.withdraw()
            self.cancel()

    def _finish(self, in_flight: InFlightSample) -> Sample:
        """Move a sample from those in flight to those that have ended.

        Raises:
            Exception: the error of the branch, if that was no failure of the server.
        """
        del self.in_flight[in_flight.index]
        branch = self._branches.pop(in_flight.index)
        if in_flight.generation is None:
            branch.stream_executor.worker.join()  # it notes its error last
            raise branch.error()
        if in_flight.generation.refusal is not None:
            self.refusals.append(in_flight.generation.refusal)
        sample = read_sample(in_flight, in_flight.generation, self.question.seeds_honoured)
        self.ended.append(sample)
        return sample


class _EndEvent(threading.Event):
    """The event of a branch's variable: when it is set, the branch's thread is about to end.

    SGLang's frontend sets the event when the variable is there, and also when the thread has
    failed, perhaps before it called the backend.
    """

    def __init__(self, in_flight: InFlightSample, slots: QuestionSlots) -> None:
        super().__init__()
        self._in_flight = in_flight
        self._slots = slots

    def set(self) -> None:
        if not self.is_set():
            super().set()
            self._in_flight.end()
            self._slots.release()


def add_messages(s: Any, messages: Sequence[Message]) -> None:
    """Begin a program with the turns of a conversation."""
    for message in messages:
        s += ROLES[message["role"]](message["content"])


def read_sample(in_flight: InFlightSample, found: Generation, seeds_honoured: bool) -> Sample:
    """Return the sample that a generation makes."""
    state = state_of(found)
    if in_flight.low_confidence and state is not SampleState.FAILED:
        state = SampleState.ABORTED
    cut_off = state is SampleState.TRUNCATED
    return Sample(
        index=in_flight.index,
        state=state,
        text=found.text,
        answer=extract_answer(found.text, cut_off=cut_off) if state in COMPLETED_STATES else None,
        num_tokens=found.num_tokens,
        latency_s=found.latency_s,
        seed=in_flight.seed,
        seed_honoured=seeds_honoured and in_flight.seed is not None,
        rid=found.rid,
        error=found.error,
        tokens_at_least=found.tokens_at_least,
        num_reasoning_tokens=found.num_reasoning_tokens,
        reasoning_estimated=found.reasoning_estimated,
        num_prompt_tokens=found.num_prompt_tokens,
        confidence=in_flight.confidence.lowest if in_flight.confidence else None,
        num_repeated_logprobs=found.num_repeated_logprobs,
    )


def state_of(found: Generation) -> SampleState:
    """Return how a generation ended."""
    if found.error is not None:
        return SampleState.FAILED
    if found.aborted:
        return SampleState.ABORTED
    return SampleState.TRUNCATED if found.truncated else SampleState.FINISHED
