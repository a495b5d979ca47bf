"""Drawing the samples of one question on SGLang's frontend: so many at a time, until enough.

What all programs share: each sample is a branch of its own, ended samples are told of as they end,
and once a rule is settled the others are aborted at the server.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sglang as sgl

from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.endpoint import RUNNING, SEED
from lim_sglang.programs.prompts import Message
from lim_sglang.programs.records import Sample, SampleState, Sampling
from lim_sglang.programs.running import Running
from lim_sglang.programs.stopping import GroupConfidence, Rule, Same

SOLUTION = "solution"
POLL_S = 0.02
"""The frontend tells of the end of a branch only to those who wait for this one branch."""
ROLES = {"system": sgl.system, "user": sgl.user, "assistant": sgl.assistant}


@dataclass(frozen=True)
class Question:
    """What is asked, and how each sample of it is drawn."""

    messages: tuple[Message, ...]
    sampling: Sampling
    parallel: int
    """Samples in flight at once."""
    watched: bool = False
    """Whether the tokens of running samples are counted as they come in."""
    seeds_honoured: bool = False


@dataclass
class Drawing:
    """The samples of one question so far, and those that are running."""

    question: Question
    same: Same
    on_sample: Callable[[Sample], None] = lambda _: None
    """Called with each sample as it ends, in the program's thread."""
    ended: list[Sample] = field(default_factory=list)
    """In the order in which they ended."""
    running: dict[int, Running] = field(default_factory=dict)
    """By index of the sample."""
    settled: bool = False
    """Whether a rule was settled before all had been drawn and had ended."""

    @property
    def spent_tokens(self) -> int:
        """Generated so far, by running samples too where they are watched."""
        return sum(sample.num_tokens for sample in self.ended) + sum(
            running.num_tokens for running in self.running.values()
        )

    def draw(
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
        groups: dict[int, GroupConfidence] = {}
        with self._nothing_left_running():
            while left or branches:
                room = self.question.parallel - len(branches)
                for index in [left.popleft() for _ in range(min(room, len(left)))]:
                    groups[index] = confidence() if confidence else GroupConfidence(1)
                    watch = _watch(groups[index], threshold) if confidence else None
                    running = Running(index, watched=self.question.watched, on_confidence=watch)
                    self.running[index] = running
                    branches[index] = self._start(s, running)
                ended = [n for n, branch in branches.items() if _has_ended(branch)]
                for index in ended:
                    branch = branches.pop(index)
                    del self.running[index]
                    self._end(branch, index, groups.pop(index).lowest if confidence else None)
                if (left or branches) and self.settles(rule):
                    left.clear()
                    self.cancel()
                if not ended:
                    time.sleep(POLL_S)

    def cancel(self) -> None:
        """Want no more of any running sample."""
        for running in list(self.running.values()):
            running.cancel()

    def settles(self, rule: Rule) -> bool:
        """Whether the rule is settled, now or before, by what has ended and what is spent."""
        if not self.settled:
            self.settled = rule.is_settled(self.ended, self.spent_tokens, self.same)
        return self.settled

    @contextmanager
    def _nothing_left_running(self) -> Iterator[None]:
        """Where the program is interrupted, the server is told."""
        try:
            yield
        finally:
            self.cancel()

    def _start(self, s: Any, running: Running) -> Any:
        sampling = self.question.sampling
        branch = s.fork(1)[0]
        branch[SEED] = sampling.seed_of(running.index)
        branch[RUNNING] = running
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

    def _end(self, branch: Any, index: int, confidence: float | None) -> None:
        sample = read_sample(
            branch,
            index,
            seed_honoured=self.question.seeds_honoured and branch[SEED] is not None,
            confidence=confidence,
        )
        branch.stream_executor.end()
        self.ended.append(sample)
        self.on_sample(sample)


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
        answer=None if found.aborted else extract_answer(found.text),
        num_tokens=found.num_tokens,
        latency_s=found.latency_s,
        seed=branch[SEED],
        seed_honoured=seed_honoured,
        rid=found.rid,
        error=found.error,
        num_reasoning_tokens=found.num_reasoning_tokens,
        confidence=confidence,
    )


def state_of(found: Generation) -> SampleState:
    """How a generation ended."""
    if found.error is not None:
        return SampleState.FAILED
    if found.aborted:
        return SampleState.ABORTED
    return SampleState.TRUNCATED if found.truncated else SampleState.FINISHED


def _has_ended(branch: Any) -> bool:
    return bool(branch.stream_executor.variable_event[SOLUTION].is_set())


def _watch(group: GroupConfidence, threshold: float | None) -> Callable[[float], bool]:
    def falls_under(confidence: float) -> bool:
        now = group.push(confidence)
        return threshold is not None and now is not None and now < threshold

    return falls_under
