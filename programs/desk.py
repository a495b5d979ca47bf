"""Questions to programs, many at once: a bounded pool, a bounded queue, each can be given up."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lim_sglang.errors import LimError
from lim_sglang.programs.catalogue import find_program
from lim_sglang.programs.drawing import SamplingRequest, SamplingRun
from lim_sglang.programs.openai_shapes import VoteRequest
from lim_sglang.programs.program import Outcome, run_program
from lim_sglang.programs.records import Sample
from lim_sglang.programs.transport import Backend
from lim_sglang.programs.vote import Equivalent


class BusyError(LimError):
    """As many questions wait as may."""


class ClosedError(LimError):
    """No more questions are taken."""


class PendingVote:
    """One question from when it is taken until its outcome."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.num_ended = 0
        """Samples so far."""
        self.is_cancelled = False
        self.outcome: Future[Outcome] = Future()
        """Cancelled as soon as the question is, whatever the server still has to say."""
        self._lock = threading.Lock()
        self._run: SamplingRun | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves the queue, or its samples are aborted."""
        with self._lock:
            self.is_cancelled = True
            run = self._run
        self.outcome.cancel()  # outside the lock: where it was queued, this calls `end`
        if run:
            run.abandon()

    def begin(self, run: SamplingRun) -> None:
        """Its program is about to draw."""
        with self._lock:
            self._run = run
            cancelled = self.is_cancelled
        if cancelled:
            run.abandon()

    def end(self, work: Future[Outcome]) -> None:
        """Its program has ended, or was never begun."""
        with self._lock:
            if self.is_cancelled:
                return
            error = work.exception()
            if error:
                self.outcome.set_exception(error)
            else:
                self.outcome.set_result(work.result())

    def count(self, _: Sample) -> None:
        """One of its samples has ended."""
        self.num_ended += 1


class VoteQueue:
    """Takes questions for one server. Any thread may ask."""

    def __init__(
        self,
        backend: Backend,
        equivalent: Equivalent,
        *,
        max_questions: int,
        max_waiting: int,
    ) -> None:
        """Nothing is asked yet.

        Args:
            same: whether two answers are equal.
            max_questions: answered at the same time; the samples of all of them share the
                endpoint's places.
            max_waiting: taken beyond these; they wait.
        """
        self._backend = backend
        self._equivalent = equivalent
        self._max_questions = max_questions
        self._max_open = max_questions + max_waiting
        self._pool = ThreadPoolExecutor(max_questions, thread_name_prefix="lim-question")
        self._lock = threading.Lock()
        self._open: set[PendingVote] = set()
        """Until their programs have ended."""
        self._closed = False

    @property
    def most_threads(self) -> int:
        """That questions and their samples ever have: each question one of the pool, one of its
        program and one of a sample, and all of them together those of the endpoint's places.
        """
        return 3 * self._max_questions + self._backend.limiter.total

    @property
    def bounds(self) -> str:
        """What is done at the same time at most, in a line."""
        return (
            f"{self._max_questions} questions and {self._backend.limiter.total} samples of all of "
            f"them, in at most {self.most_threads} threads"
        )

    def ask(self, request: VoteRequest) -> PendingVote:
        """Take a question.

        Raises:
            BusyError: as many wait as may.
            ClosedError: the desk is closed.
        """
        pending = PendingVote(request.samples)
        with self._lock:
            if self._closed:
                raise ClosedError("the proxy is being stopped")
            if len(self._open) >= self._max_open:
                raise BusyError(
                    f"{len(self._open)} questions are open, as many as may be: try again later"
                )
            work = self._pool.submit(self._answer, pending, request)
            self._open.add(pending)
        pending.outcome.add_done_callback(lambda _: work.cancel())
        work.add_done_callback(lambda _: self._forget(pending))
        work.add_done_callback(pending.end)
        return pending

    def check_options(self, request: VoteRequest) -> None:
        """Refuse options that the program does not have, or that cannot be; takes milliseconds.

        Raises:
            ConfigError: what is wrong with them.
        """
        self._run(request, samples=0)

    def close(self) -> None:
        """Take no more questions, and give up those that are open."""
        with self._lock:
            self._closed = True
            still_open = list(self._open)
        for pending in still_open:
            pending.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, pending: PendingVote, request: VoteRequest) -> Outcome:
        return self._run(
            request, samples=request.samples, on_begin=pending.begin, on_sample=pending.count
        )

    def _run(
        self,
        request: VoteRequest,
        *,
        samples: int,
        on_begin: Callable[[SamplingRun], None] = lambda _: None,
        on_sample: Callable[[Sample], None] = lambda _: None,
    ) -> Outcome:
        program = find_program(request.program)
        question = SamplingRequest(
            request.messages,
            request.sampling,
            parallel=request.parallel or program.parallel or request.samples,
            streamed=program.streamed,
            seeds_honoured=bool(
                samples and request.sampling.seed is not None and self._backend.honours_seeds
            ),
        )
        return run_program(
            *(program, self._backend, question),
            indices=range(samples),
            equivalent=self._equivalent,
            options=request.options,
            on_sample=on_sample,
            on_begin=on_begin,
        )

    def _forget(self, pending: PendingVote) -> None:
        with self._lock:
            self._open.discard(pending)
