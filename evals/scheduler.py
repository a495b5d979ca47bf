"""The jobs of a run, question by question, and the servers that do them: each question goes to the
server that has the most room.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Protocol

from lim_sglang.errors import ServerError
from lim_sglang.evals.grading import Grader
from lim_sglang.evals.run_store import Failure, GradedSample, Key
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.schema import Sample, SampleState


@dataclass(frozen=True)
class Job:
    """The samples of one question that are not there yet."""

    question: Question
    indices: tuple[int, ...]
    whole: bool = False
    """Whether they are of use only together."""


@dataclass(frozen=True)
class SampleResult:
    """One sample as it ended."""

    sample: Sample
    late: bool = False
    """Whether its program drew it whole and did not let it vote."""


class Deliver(Protocol):
    """How a program hands samples over, from any thread."""

    def __call__(self, *drawn: SampleResult) -> bool:
        """Hand over samples that belong together, or one that failed.

        Returns:
            Whether the rest of the job is still wanted.
        """


class Draw(Protocol):
    """A program: draws the samples of a job and delivers each that is of use, as it ends."""

    def __call__(self, job: Job, deliver: Deliver) -> object:
        """Return when all have ended."""


def open_jobs(
    questions: Sequence[Question],
    num_samples: int,
    done: Iterable[Key],
    *,
    given_up: Collection[Key] = (),
    whole: bool = False,
) -> list[Job]:
    """What is left to draw, in the order of the questions.

    Args:
        done: samples that are there.
        given_up: samples that failed and are not tried again; with `whole`, their questions.
        whole: a question with any sample is done, and one without any is drawn from its first.
    """
    there = {*done, *given_up}
    if whole:
        questions_there = {question_id for question_id, _ in there}
        every = tuple(range(num_samples))
        return [Job(q, every, whole) for q in questions if q.question_id not in questions_there]
    jobs = []
    for question in questions:
        indices = (i for i in range(num_samples) if (question.question_id, i) not in there)
        jobs.append(Job(question, tuple(indices)))
    return [job for job in jobs if job.indices]


def questions_at_once(concurrency: int, in_flight: int, *, whole: bool = False) -> int:
    """Questions that a server is asked side by side.

    Twice as many as fill its places, since the last sample of a question holds its thread. Where a
    program looks at what ends first, no sample may wait for another question's: as many as fit.

    Args:
        places: requests that the server is given at once.
        in_flight: samples of one question among these.
    """
    return max(1, concurrency // in_flight) if whole else 2 * math.ceil(concurrency / in_flight)


@dataclass(frozen=True)
class Server:
    """One server that a run is drawn from."""

    url: str
    draw: Draw
    check: Callable[[], object]
    """Raises `ServerError` where it is gone, or serves something else by now."""
    close: Callable[[], object] = lambda: None
    """Ends what is in flight there, once it is gone."""
    concurrency: int = 64
    """Requests that it is given at once."""


@dataclass(frozen=True)
class ServerLost:
    """A server that is asked no more."""

    url: str
    error: ServerError


Event = tuple[GradedSample, ...] | Failure | ServerLost
"""Samples that belong together, one that failed, or a server less."""


class Scheduler:
    """Which job is next, and on which server. For any number of threads."""

    def __init__(self, jobs: Sequence[Job], servers: Sequence[Server], in_flight: int) -> None:
        """Nothing is begun yet.

        Args:
            in_flight: samples of one question that are drawn at the same time.
        """
        whole = any(job.whole for job in jobs)
        self._most = {
            server.url: questions_at_once(server.concurrency, in_flight, whole=whole)
            for server in servers
        }
        self._waiting = deque(jobs)
        self._loads = {server.url: 0 for server in servers}
        """Jobs that each server has."""
        self._servers = list(servers)
        """Those that are not gone."""
        self._gone: dict[str, ServerError] = {}
        self._changed = threading.Condition()
        self._closed = False

    @property
    def num_threads(self) -> int:
        """As many as can be busy at once."""
        return min(len(self._waiting), sum(self._most.values()))

    @property
    def is_closed(self) -> bool:
        """Whether nobody wants any more."""
        return self._closed

    def take(self) -> tuple[Job, Server] | None:
        """The next job and the server with the most room for it, once one has room.

        Returns:
            None when no job is left, or nobody can or wants to do it.
        """
        with self._changed:
            while self._waiting and self._servers and not self._closed:
                server = min(self._servers, key=self._fullness)
                if self._fullness(server) < 1:
                    self._loads[server.url] += 1
                    return self._waiting.popleft(), server
                self._changed.wait()
            return None

    def finish(self, server: Server) -> None:
        """A job is done."""
        with self._changed:
            self._loads[server.url] -= 1
            self._changed.notify_all()

    def give_back(self, job: Job, server: Server) -> None:
        """A job is done by half; the same thread may take the rest, on another server. It waits
        behind the others, so that a question that kills servers does so last.
        """
        with self._changed:
            self._waiting.append(job)
        self.finish(server)

    def lose(self, server: Server, error: ServerError) -> bool:
        """Give a server nothing more to do; false where it was lost before."""
        with self._changed:
            if server.url in self._gone:
                return False
            self._gone[server.url] = error
            self._servers.remove(server)
            self._changed.notify_all()
            return True

    @property
    def lost_all(self) -> ServerError | None:
        """The end of the last server, or of all of them; None while there is one."""
        with self._changed:
            if self._servers:
                return None
        errors = list(self._gone.values())
        if len(errors) == 1:
            return errors[0]
        reasons = "".join(f"\n  - {error}" for error in errors)
        return ServerError(f"all {len(errors)} servers are gone:{reasons}")

    def close(self) -> None:
        """Let no further job begin."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fullness(self, server: Server) -> float:
        return self._loads[server.url] / self._most[server.url]


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
        self.is_lost = False
        """Whether the server is gone."""
        self._job = job
        self._left = set(job.indices)
        self._server = server
        self._scheduler = scheduler
        self._grader = grader
        self._put = put
        self._is_over = False

    @property
    def left(self) -> Job:
        """What it did not bring."""
        return replace(self._job, indices=tuple(sorted(self._left)))

    def deliver(self, *drawn: SampleResult) -> bool:
        """See `jobs.Deliver`. Grades in the caller's thread."""
        if self._is_over or self._scheduler.is_closed:
            return False
        failed = [each.sample for each in drawn if each.sample.state is SampleState.FAILED]
        if failed:
            return self._fail(failed[0])
        self._put(tuple(self._grade(each, len(drawn)) for each in drawn))
        brought = (each.sample.index for each in drawn)
        self._left -= set(self._job.indices if self._job.whole else brought)
        return True

    def _grade(self, drawn: SampleResult, together: int) -> GradedSample:
        question = self._job.question
        return GradedSample(
            question.question_id,
            question.gold,
            self._grader.correct(question.gold, drawn.sample.answer),
            drawn.sample,
            late=drawn.late,
            of=together if self._job.whole else None,
        )

    def _fail(self, sample: Sample) -> bool:
        """Is it the sample or the server? A failure of the server is nothing to remember."""
        if self._server_is_gone():
            self.is_lost = self._is_over = True
            return False
        error = sample.error or "it did not say why"
        self._put(Failure(self._job.question.question_id, sample.index, error))
        self._left.discard(sample.index)
        self._is_over = self._job.whole
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


def stream(
    jobs: Sequence[Job], servers: Sequence[Server], grader: Grader, *, in_flight: int
) -> Generator[Event]:
    """Run the jobs and yield what comes of them, in the caller's thread; see `Dispatcher`.

    An exception of a program or of the grader is raised here. Closing the iterator lets no further
    job begin and drops what still comes; closing the endpoints then ends the programs. The threads
    are daemons, as are those that they start, so that a request in flight does not keep the process
    alive.

    Raises:
        ServerError: jobs are left and every server is gone.
    """
    scheduler = Scheduler(jobs, servers, in_flight)
    results: SimpleQueue[Event | Exception | None] = SimpleQueue()
    running = scheduler.num_threads
    for number in range(running):
        arguments = (scheduler, grader, results.put)
        threading.Thread(
            target=_work, args=arguments, name=f"lim-eval-{number}", daemon=True
        ).start()
    try:
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, Exception):
                raise result
            else:
                yield result
            if results.empty() and (error := scheduler.lost_all):
                raise error
    finally:
        scheduler.close()


def _work(
    scheduler: Scheduler, grader: Grader, put: Callable[[Event | Exception | None], None]
) -> None:
    """One thread: job after job until none is left, or the caller wants no more."""
    try:
        while task := scheduler.take():
            job, server = task
            attempt = _Attempt(job, server, scheduler, grader, put)
            server.draw(job, attempt.deliver)
            if attempt.is_lost:
                scheduler.give_back(attempt.left, server)
            else:
                scheduler.finish(server)
    except Exception as error:  # noqa: BLE001 - carried to the caller's thread
        put(error)
    finally:
        put(None)
