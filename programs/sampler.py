"""Drawing the samples of one question on SGLang's frontend: so many at a time, until enough.

What all programs share: each sample is a branch of its own, ended samples are told of as they end,
and once a rule is settled the others are aborted at the server.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sglang as sgl

from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.backend import IN_FLIGHT, SEED, ConcurrencyLimiter, InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.schema import Message, Sample, SampleState, SamplingRequest
from lim_sglang.programs.stopping import Equivalent, GroupConfidence, Rule

SOLUTION = "solution"
POLL_S = 0.02
"""The frontend tells of the end of a branch only to those who wait for this one branch."""
ROLES = {"system": sgl.system, "user": sgl.user, "assistant": sgl.assistant}


@dataclass
class SamplingRun:
    """The samples of one question so far, and those that are running."""

    question: SamplingRequest
    equivalent: Equivalent
    on_sample: Callable[[Sample], None] = lambda _: None
    """Called with each sample as it ends, in the program's thread."""
    ended: list[Sample] = field(default_factory=list)
    """In the order in which they ended."""
    in_flight: dict[int, InFlightSample] = field(default_factory=dict)
    """By index of the sample."""
    settled: bool = False
    """Whether it was stopped before all had been drawn and had ended."""
    num_evidence: int | None = None
    """How many samples had ended when a rule was settled; None where none was."""

    @property
    def voters(self) -> list[Sample]:
        """What votes, and what was aborted: not samples that ended by themselves in the moment
        between the rule and the abort, since nobody looked at them when the rule was settled.
        """
        late = self.ended[self.num_evidence :] if self.num_evidence is not None else []
        whole = {sample.index for sample in late if sample.state is not SampleState.ABORTED}
        return [sample for sample in self.ended if sample.index not in whole]

    @property
    def spent_tokens(self) -> int:
        """Generated so far, by running samples too where they are watched."""
        return sum(sample.num_tokens for sample in self.ended) + sum(
            # A display asks from another thread, while samples come and go.
            in_flight.num_tokens
            for in_flight in list(self.in_flight.values())
        )

    def sample(
        self,
        s: Any,
        indices: Sequence[int],
        rule: Rule,
        *,
        confidence: Callable[[], GroupConfidence] | None = None,
        threshold: float | None = None,
    ) -> None:
        """Draw samples until all have ended, or the rule is settled and the others are aborted.

        Args:
            s: the program's state; the question has been added to it.
            confidence: one for each sample that is to have a confidence.
            threshold: a sample whose group confidence falls under it is aborted.
        """
        left = deque(indices)
        branches: dict[int, Any] = {}
        measured = _Confidences(confidence, threshold) if confidence else None
        limiter: ConcurrencyLimiter = s.stream_executor.backend.limiter
        with limiter.for_question() as slots, self._nothing_left_running(branches):
            while left or branches:
                while slots.take(wanted=bool(left) and len(branches) < self.question.parallel):
                    index = left.popleft()
                    branches[index] = self._start(s, index, measured)
                ended = _ended(branches)
                for index in ended:
                    sample = self._end(branches.pop(index), self.in_flight.pop(index), measured)
                    slots.give_back()
                    self._look(rule, left, branches)  # before the display takes its time
                    self.on_sample(sample)
                if not ended:
                    if rule.looks_at_tokens or self.settled:
                        self._look(rule, left, branches)
                    time.sleep(POLL_S)

    def cancel(self) -> None:
        """Want no more of any running sample."""
        for in_flight in list(self.in_flight.values()):
            in_flight.cancel()

    def settles(self, rule: Rule) -> bool:
        """Whether the rule is settled, now or before, by what has ended and what is spent."""
        if not self.settled and rule.is_settled(self.ended, self.spent_tokens, self.equivalent):
            self.settled, self.num_evidence = True, len(self.ended)
        return self.settled

    def abandon(self) -> None:
        """Want no answer any more: begin no further sample, and abort those that run."""
        self.settled = True
        self.cancel()

    def _look(self, rule: Rule, left: deque[int], branches: Mapping[int, Any]) -> None:
        """Stop, once the rule is settled and there is anything to stop."""
        if (left or branches) and self.settles(rule):
            left.clear()
            self.cancel()

    @contextmanager
    def _nothing_left_running(self, branches: Mapping[int, Any]) -> Iterator[None]:
        """Where the program is interrupted, the server is told, and no thread is left."""
        try:
            yield
        finally:
            self.cancel()
            for branch in branches.values():
                branch.stream_executor.end()

    def _start(self, s: Any, index: int, measured: "_Confidences | None") -> Any:
        watcher = partial(measured.watcher, index) if measured else None
        in_flight = InFlightSample(index, streamed=self.question.streamed, watcher=watcher)
        self.in_flight[index] = in_flight
        sampling = self.question.sampling
        branch = s.fork(1)[0]
        branch[SEED] = sampling.seed_of(in_flight.index)
        branch[IN_FLIGHT] = in_flight
        branch += sgl.assistant(
            sgl.gen(
                SOLUTION,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
        )
        return branch

    def _end(
        self, branch: Any, in_flight: InFlightSample, measured: "_Confidences | None"
    ) -> Sample:
        sample = read_sample(
            branch,
            in_flight.index,
            seed_honoured=self.question.seeds_honoured and branch[SEED] is not None,
            confidence=measured.lowest(in_flight.index) if measured else None,
        )
        if in_flight.low_confidence and sample.state is not SampleState.FAILED:
            sample = replace(sample, state=SampleState.ABORTED, answer=None)
        branch.stream_executor.end()
        self.ended.append(sample)
        return sample


def add_messages(s: Any, messages: Sequence[Message]) -> None:
    """Begin a program with the turns so far."""
    for message in messages:
        s += ROLES[message["role"]](message["content"])


def read_sample(
    branch: Any, index: int, *, seed_honoured: bool, confidence: float | None
) -> Sample:
    """The sample of a branch whose generation has ended.

    Raises:
        Exception: whatever ended the branch, when that was no failure of the server.
    """
    found: Generation | None = branch.get_meta_info(SOLUTION)
    if found is None:
        raise branch.error()
    return Sample(
        index=index,
        state=state_of(found),
        text=found.text,
        answer=None if found.aborted or found.error else extract_answer(found.text),
        num_tokens=found.num_tokens,
        latency_s=found.latency_s,
        seed=branch[SEED],
        seed_honoured=seed_honoured,
        rid=found.rid,
        error=found.error,
        tokens_at_least=found.tokens_at_least,
        num_reasoning_tokens=found.num_reasoning_tokens,
        reasoning_estimated=found.reasoning_estimated,
        num_prompt_tokens=found.num_prompt_tokens,
        confidence=confidence,
        num_repeated_logprobs=found.num_repeated_logprobs,
    )


def state_of(found: Generation) -> SampleState:
    """How a generation ended."""
    if found.error is not None:
        return SampleState.FAILED
    if found.aborted:
        return SampleState.ABORTED
    return SampleState.TRUNCATED if found.truncated else SampleState.FINISHED


def _ended(branches: Mapping[int, Any]) -> list[int]:
    """Whose generations have ended, in this order; one that raised comes first."""

    def ended_s(index: int) -> float:
        found: Generation | None = branches[index].get_meta_info(SOLUTION)
        return found.ended_s if found else 0.0

    return sorted((index for index in branches if _has_ended(branches[index])), key=ended_s)


def _has_ended(branch: Any) -> bool:
    return bool(branch.stream_executor.variable_event[SOLUTION].is_set())


class _Confidences:
    """Of samples while they are generated; the last try of each counts."""

    def __init__(self, new: Callable[[], GroupConfidence], threshold: float | None) -> None:
        self._new = new
        self._threshold = threshold
        self._groups: dict[int, GroupConfidence] = {}

    def watcher(self, index: int) -> Callable[[float], bool]:
        """For a new try of a sample: says of each token whether it is the one to end it."""
        group = self._groups[index] = self._new()

        def falls_under(confidence: float) -> bool:
            now = group.push(confidence)
            return self._threshold is not None and now is not None and now < self._threshold

        return falls_under

    def lowest(self, index: int) -> float | None:
        """The lowest group confidence of a sample; None where nothing has come."""
        return self._groups[index].lowest if index in self._groups else None
