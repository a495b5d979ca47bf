"""Votes that clients wait for: a bounded queue of questions, each until its outcome."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx

from lim_sglang.errors import LimError
from lim_sglang.programs.backend import Backend
from lim_sglang.programs.program import Outcome, find_program, run_program
from lim_sglang.programs.proxy.protocol import VoteRequest
from lim_sglang.programs.schema import Sample, SamplingRequest
from lim_sglang.programs.vote import Equivalent

if TYPE_CHECKING:
    from lim_sglang.programs.sampler import SamplingRun

ENOUGH_REFUSALS = 8
"""Samples that the server refuses, with none that it answered before, until a vote is given up."""


class QueueFullError(LimError):
    """A question that is refused because the queue is full."""


class StoppingError(LimError):
    """A question that is refused or given up because the proxy is being stopped."""


class PendingVote:
    """One question from its acceptance to its outcome."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.num_ended = 0
        """Samples that have ended so far."""
        self.is_cancelled = False
        self.outcome: Future[Outcome] = Future()
        """The outcome, cancelled at once with the question, before the server has aborted."""
        self._lock = threading.Lock()
        self._run: SamplingRun | None = None

    @property
    def refusal(self) -> httpx.Response | None:
        """The server's answer to a sample that it refused for good, else to the last that failed.

        None if no sample failed by an answer of the server.
        """
        found = self._run.refusals if self._run else []
        for_good = (each for each in found if each.status_code < 500 and each.status_code != 429)
        return next(for_good, found[-1] if found else None)

    def cancel(self) -> None:
        """Give the question up: remove it from the queue, or abort its samples."""
        with self._lock:
            self.is_cancelled = True
            run = self._run
        self.outcome.cancel()  # outside the lock, since this calls `end` for a queued question
        if run:
            run.stop()

    def begin(self, run: "SamplingRun") -> None:
        """Note the run of the program, before its first sample."""
        with self._lock:
            self._run = run
            cancelled = self.is_cancelled
        if cancelled:
            run.stop()

    def end(self, work: Future[Outcome]) -> None:
        """Note the end of the program, or of a question that was never begun."""
        with self._lock:
            if self.is_cancelled:
                return
            error = work.exception()
            if error:
                self.outcome.set_exception(error)
            else:
                self.outcome.set_result(work.result())

    def count(self, _: Sample) -> None:
        """Count a sample that has ended; stop the run if the server refuses all samples."""
        self.num_ended += 1
        if self._run and len(self._run.refusals) == self.num_ended == ENOUGH_REFUSALS:
            self._run.stop()


class VoteQueue:
    """Questions for one server: a limited number is answered, a limited number waits.

    Any thread may ask.
    """

    def __init__(
        self,
        backend: Backend,
        equivalent: Equivalent,
        *,
        max_questions: int,
        max_waiting: int,
    ) -> None:
        """Prepare the queue; nothing is sent yet.

        Args:
            equivalent: returns True if two answers are equal.
            max_questions: questions answered at the same time; their samples share the slots of
                the backend.
            max_waiting: questions that wait beyond these.
        """
        self._backend = backend
        self._equivalent = equivalent
        self._max_questions = max_questions
        self._max_open = max_questions + max_waiting
        self._pool = ThreadPoolExecutor(max_questions, thread_name_prefix="lim-question")
        self._lock = threading.Lock()
        self._open: set[PendingVote] = set()
        """Questions whose programs have not ended."""
        self._closed = False

    @property
    def num_open(self) -> int:
        """Questions whose programs have not ended."""
        return len(self._open)

    @property
    def max_threads(self) -> int:
        """Threads of all questions: one of the pool and one of the program each, one for a sample
        that has just ended, and one for each sample in flight.
        """
        return 3 * self._max_questions + self._backend.limiter.total

    def ask(self, request: VoteRequest) -> PendingVote:
        """Accept a question.

        Raises:
            QueueFullError: too many questions wait.
            StoppingError: the queue is closed.
        """
        pending = PendingVote(request.samples)
        with self._lock:
            if self._closed:
                raise StoppingError("the proxy is being stopped")
            if len(self._open) >= self._max_open:
                raise QueueFullError(
                    f"{len(self._open)} questions are open, the most that are taken: try again "
                    "later"
                )
            work = self._pool.submit(self._answer, pending, request)
            self._open.add(pending)
        pending.outcome.add_done_callback(lambda _: work.cancel())
        work.add_done_callback(lambda _: self._remove(pending))
        work.add_done_callback(pending.end)
        return pending

    def close(self) -> None:
        """Accept no more questions, and give up those that are open."""
        with self._lock:
            self._closed = True
            still_open = list(self._open)
        for pending in still_open:
            pending.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, pending: PendingVote, request: VoteRequest) -> Outcome:
        program = find_program(request.program)
        question = SamplingRequest(
            request.messages,
            request.sampling,
            parallel=request.parallel or program.parallel or request.samples,
            streamed=program.streamed,
            seeds_honoured=request.sampling.seed is not None and self._backend.honours_seeds,
        )
        return run_program(
            program,
            self._backend,
            question,
            indices=range(request.samples),
            equivalent=self._equivalent,
            options=request.options,
            on_sample=pending.count,
            on_begin=pending.begin,
        )

    def _remove(self, pending: PendingVote) -> None:
        with self._lock:
            self._open.discard(pending)
