"""Scheduling of a run: one job a question, each given to the server with the most free room, and
taken over by another server where the first one is lost.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Protocol

from lim_sglang.config import Drafts
from lim_sglang.errors import ServerError, bullets
from lim_sglang.evals.grading import TURN_S, Grader
from lim_sglang.evals.run_store import Failure, GradedSample, Key
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.schema import COMPLETED_STATES, Sample, SampleState


@dataclass(frozen=True)
class Job:
    """Missing samples of one question."""

    question: Question
    indices: tuple[int, ...]
    all_or_nothing: bool = False
    """True if the samples are of use only together, since a program decides how many there are."""


@dataclass(frozen=True)
class SampleResult:
    """One sample as it ended."""

    sample: Sample
    late: bool = False
    """True if the sample is complete but has no vote; see `GradedSample.late`."""


class SampleSink(Protocol):
    """Receiver of finished samples, called from any thread."""

    def __call__(self, *results: SampleResult) -> bool:
        """Take samples that belong together, or a failed sample.

        Returns:
            True if the rest of the job is still wanted.
        """


class JobSampler(Protocol):
    """Generates the samples of a job on one server; called from several threads."""

    def __call__(self, job: Job, deliver: SampleSink) -> object:
        """Deliver each useful sample as it ends; return when all have ended."""


def remaining_jobs(
    questions: Sequence[Question],
    num_samples: int,
    stored: Iterable[Key],
    *,
    given_up: Collection[Key] = (),
    all_or_nothing: bool = False,
) -> list[Job]:
    """Return the jobs of a run that are left, in the order of the questions.

    Args:
        stored: samples that the run has.
        given_up: samples that failed and are not tried again; with `all_or_nothing`, their
            questions are not tried again.
        all_or_nothing: True: a question with any stored sample is done, and any other question
            starts from its first sample.
    """
    done = {*stored, *given_up}
    if all_or_nothing:
        done_questions = {question_id for question_id, _ in done}
        indices = tuple(range(num_samples))
        return [Job(q, indices, True) for q in questions if q.question_id not in done_questions]
    jobs = [
        Job(q, tuple(i for i in range(num_samples) if (q.question_id, i) not in done))
        for q in questions
    ]
    return [job for job in jobs if job.indices]


def max_jobs_in_flight(concurrency: int, in_flight: int, *, all_or_nothing: bool = False) -> int:
    """Return how many questions a server works on at the same time.

    Twice as many questions as fill the server, since the last sample of a question keeps a job open
    after its other samples have ended. With `all_or_nothing`, only as many questions as fit: the
    program looks at the order in which samples end, so none may wait for another question's.

    Args:
        concurrency: requests that the server is sent at the same time.
        in_flight: samples of one question among them.
    """
    if all_or_nothing:
        return max(1, concurrency // in_flight)
    return 2 * math.ceil(concurrency / in_flight)


@dataclass(frozen=True)
class InFlight:
    """The work of a run that a server is doing."""

    num_samples: int = 0
    num_tokens: int = 0
    """Tokens of the samples so far; 0 if they are not streamed."""
    running_s: tuple[float, ...] = ()
    """Seconds so far of each sample, or of each question of a program that stops early."""


@dataclass(frozen=True)
class Server:
    """One server of a run, as the scheduler needs it."""

    url: str
    sample: JobSampler
    check: Callable[[], object]
    """Raises `ServerError` if the server is gone or serves something else by now."""
    close: Callable[[], object] = lambda: None
    """Ends the requests in flight there, once the server is lost."""
    concurrency: int = 64
    """Requests that the server is sent at the same time."""
    in_flight: Callable[[], InFlight] = InFlight
    """Count the samples that the server is generating; called from any thread."""
    drafts: Callable[[], Drafts | None] = lambda: None
    """Read what the server has drafted so far; None if it does not draft, or is gone."""


def requests_at_a_time(jobs: Sequence[Job], servers: Sequence[Server], in_flight: int) -> int:
    """Return the most requests that each server is sent at the same time: fewer than its
    concurrency where few samples are left.

    Args:
        in_flight: samples of one question among them.
    """
    together = any(job.all_or_nothing for job in jobs)
    rooms = (
        in_flight * max_jobs_in_flight(each.concurrency, in_flight, all_or_nothing=together)
        for each in servers
    )
    room = sum(min(each.concurrency, room) for each, room in zip(servers, rooms, strict=True))
    wanted = sum(min(len(job.indices), in_flight) for job in jobs)
    return math.ceil(min(room, wanted) / len(servers))


@dataclass(frozen=True)
class ServerLost:
    """A server that gets no more jobs."""

    url: str
    error: ServerError


Event = tuple[GradedSample, ...] | Failure | ServerLost
"""Graded samples that belong together, a failed sample, or the loss of a server."""


class Scheduler:
    """Assigns jobs to servers. Thread-safe."""

    def __init__(self, jobs: Sequence[Job], servers: Sequence[Server], in_flight: int) -> None:
        """Start no job yet.

        Args:
            in_flight: samples of one question that are generated at the same time.
        """
        all_or_nothing = any(job.all_or_nothing for job in jobs)
        self._max_jobs = {
            server.url: max_jobs_in_flight(
                server.concurrency, in_flight, all_or_nothing=all_or_nothing
            )
            for server in servers
        }
        self._waiting = deque(jobs)
        self._num_jobs = {server.url: 0 for server in servers}
        """Jobs in flight on each server."""
        self._servers = list(servers)
        """Servers that are not lost."""
        self._lost: dict[str, ServerError] = {}
        self._changed = threading.Condition()
        self._closed = False

    @property
    def num_threads(self) -> int:
        """Number of threads that can be busy at the same time."""
        return min(len(self._waiting), sum(self._max_jobs.values()))

    @property
    def is_closed(self) -> bool:
        """True after `close()`: no further job starts."""
        return self._closed

    def take(self) -> tuple[Job, Server] | None:
        """Wait until a server has room; return the next job and the server with the most room.

        Returns:
            None when no job or no server is left, or the scheduler is closed.
        """
        with self._changed:
            while self._waiting and self._servers and not self._closed:
                server = min(self._servers, key=self._load)
                if self._load(server) < 1:
                    self._num_jobs[server.url] += 1
                    return self._waiting.popleft(), server
                self._changed.wait()
            return None

    def finish(self, server: Server) -> None:
        """Give the room of a finished job back."""
        with self._changed:
            self._num_jobs[server.url] -= 1
            self._changed.notify_all()

    def requeue(self, job: Job, server: Server) -> None:
        """Put the rest of a job, whose server was lost, at the end of the queue.

        The end, so that a question that kills servers is tried last.
        """
        with self._changed:
            self._waiting.append(job)
        self.finish(server)

    def lose(self, server: Server, error: ServerError) -> bool:
        """Give a server no more jobs; return False if the server was lost before."""
        with self._changed:
            if server.url in self._lost:
                return False
            self._lost[server.url] = error
            self._servers.remove(server)
            self._changed.notify_all()
            return True

    def all_lost(self) -> ServerError | None:
        """Return the reasons why every server was lost, or None while one is left."""
        with self._changed:
            if self._servers:
                return None
        errors = list(self._lost.values())
        if len(errors) == 1:
            return errors[0]
        return ServerError(f"all {len(errors)} servers are gone:{bullets(errors)}")

    def close(self) -> None:
        """Start no further job."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _load(self, server: Server) -> float:
        """Return the used share of a server's room; 1 is full."""
        return self._num_jobs[server.url] / self._max_jobs[server.url]


class _Attempt:
    """One job on one server."""

    def __init__(
        self,
        job: Job,
        server: Server,
        scheduler: Scheduler,
        grader: Grader,
        put: Callable[[Event], None],
    ) -> None:
        self.server_lost = False
        self._job = job
        self._missing = set(job.indices)
        self._server = server
        self._scheduler = scheduler
        self._grader = grader
        self._put = put
        self._is_over = False

    @property
    def rest(self) -> Job:
        """Samples of this job that are still missing."""
        return replace(self._job, indices=tuple(sorted(self._missing)))

    def deliver(self, *results: SampleResult) -> bool:
        """Grade samples in the caller's thread and pass them on; see `SampleSink`."""
        if self._is_over or self._scheduler.is_closed:
            return False
        failed = [each.sample for each in results if each.sample.state is SampleState.FAILED]
        if failed:
            return self._fail(failed[0])
        self._put(tuple(self._grade(each, len(results)) for each in results))
        delivered = (each.sample.index for each in results)
        self._missing -= set(self._job.indices if self._job.all_or_nothing else delivered)
        return True

    def _grade(self, result: SampleResult, num_together: int) -> GradedSample:
        question, sample = self._job.question, result.sample
        if sample.state in COMPLETED_STATES:
            # The sampler knows no kind of answer.
            sample = replace(sample, answer=self._grader.extract(sample.text, sample.state))
        return GradedSample(
            question.question_id,
            question.gold,
            self._grader.correct(question.gold, sample.answer),
            sample,
            late=result.late,
            written_together=num_together if self._job.all_or_nothing else None,
        )

    def _fail(self, sample: Sample) -> bool:
        """Record a failed sample, unless its server is gone: the loss of a server is no failure."""
        if self._server_is_gone():
            self.server_lost = self._is_over = True
            return False
        error = sample.error or "no reason given"
        self._put(Failure(self._job.question.question_id, sample.index, error))
        self._missing.discard(sample.index)
        self._is_over = self._job.all_or_nothing
        return not self._is_over

    def _server_is_gone(self) -> bool:
        try:
            self._server.check()
        except ServerError as error:
            if self._scheduler.lose(self._server, error):
                self._put(ServerLost(self._server.url, error))
                self._server.close()
            return True
        return False


def sample_jobs(
    jobs: Sequence[Job], servers: Sequence[Server], grader: Grader, *, in_flight: int
) -> Generator[Event]:
    """Run the jobs in threads and yield their events in the caller's thread.

    An exception of a sampler or of the grader is raised here. Closing the iterator starts no
    further job and drops results that still arrive; closing the connections then ends the samplers.
    The threads are daemons, as are the threads that they start, so that a request in flight does
    not keep the process alive.

    Args:
        in_flight: samples of one question that are generated at the same time.

    Raises:
        ServerError: jobs are left and every server is lost.
    """
    scheduler = Scheduler(jobs, servers, in_flight)
    results: SimpleQueue[Event | Exception | None] = SimpleQueue()
    num_running = scheduler.num_threads
    for number in range(num_running):
        threading.Thread(
            target=_work,
            args=(scheduler, grader, results.put),
            name=f"lim-eval-{number}",
            daemon=True,
        ).start()
    try:
        while num_running:
            result = _next(results)
            if result is None:
                num_running -= 1
            elif isinstance(result, Exception):
                raise result
            else:
                yield result
            if results.empty() and (error := scheduler.all_lost()):
                raise error
    finally:
        scheduler.close()


def _next(results: "SimpleQueue[Event | Exception | None]") -> Event | Exception | None:
    """Wait for a result, in turns that Ctrl-C interrupts."""
    while True:
        with suppress(Empty):
            return results.get(timeout=TURN_S)


def _work(
    scheduler: Scheduler, grader: Grader, put: Callable[[Event | Exception | None], None]
) -> None:
    """Run jobs in this thread until none is left; then put None."""
    try:
        while task := scheduler.take():
            job, server = task
            attempt = _Attempt(job, server, scheduler, grader, put)
            server.sample(job, attempt.deliver)
            if attempt.server_lost:
                scheduler.requeue(attempt.rest, server)
            else:
                scheduler.finish(server)
    except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
        put(error)
    finally:
        put(None)
