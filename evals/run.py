"""Drawing the samples of a run: questions side by side, one consumer that grades and writes."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from lim_sglang.evals.grade import Grader
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.store import RunFolder
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.records import Sample, SampleState


@dataclass(frozen=True)
class Job:
    """The samples of one question that are not there yet."""

    question: Question
    indices: tuple[int, ...]


Deliver = Callable[[Sample], None]
Draw = Callable[[Job, Deliver], object]
"""A program: draws the samples of a job and delivers each as it ends, from any thread."""


def open_jobs(
    questions: Sequence[Question], num_samples: int, done: Iterable[tuple[str, int]]
) -> list[Job]:
    """What is left to draw, in the order of the questions."""
    there = set(done)
    jobs = []
    for question in questions:
        indices = (i for i in range(num_samples) if (question.question_id, i) not in there)
        jobs.append(Job(question, tuple(indices)))
    return [job for job in jobs if job.indices]


def count_workers(jobs: Sequence[Job], concurrency: int) -> int:
    """Questions to run side by side so that `concurrency` requests are always waiting.

    Twice as many as fill the server, since a question's last sample holds its worker.
    """
    most = max((len(job.indices) for job in jobs), default=1)
    return min(len(jobs), 2 * math.ceil(concurrency / most))


def run_jobs(
    jobs: Sequence[Job],
    draw: Draw,
    *,
    grader: Grader,
    folder: RunFolder,
    num_workers: int,
    check_server: Callable[[], object],
    on_sample: Callable[[GradedSample | None], None],
) -> list[Sample]:
    """Draw, grade and store; return the samples that failed, which are stored nowhere.

    Args:
        check_server: raises when the server is gone. It is asked after each failure, so that a
            dead server ends the run at once.
        on_sample: told of each sample as it is safe, and of each failure with None.

    Raises:
        LimError: the server is gone or the disk refuses; what was finished before is stored.
    """
    failed = []
    for question, sample in stream_samples(jobs, draw, num_workers=num_workers):
        if sample.state is SampleState.FAILED:
            check_server()
            failed.append(sample)
            on_sample(None)
            continue
        correct = grader.correct(question.gold, sample.answer)
        graded = GradedSample(question.question_id, question.gold, correct, sample)
        folder.append(graded)
        on_sample(graded)
    return failed


Result = tuple[Question, Sample] | Exception | None
"""What a worker reports: a sample, the error that ended it, or that it is done (None)."""


def stream_samples(
    jobs: Sequence[Job], draw: Draw, *, num_workers: int
) -> Iterator[tuple[Question, Sample]]:
    """Run the jobs on `num_workers` threads and yield each sample in the caller's thread.

    An exception of a program is raised here. Closing the iterator lets no further job begin and
    drops what still comes; closing the endpoint then ends the programs. The threads are daemons,
    as are those that they start, so that a request in flight does not keep the process alive.
    """
    waiting = deque(jobs)
    results: SimpleQueue[Result] = SimpleQueue()
    stop = threading.Event()
    for number in range(num_workers):
        threading.Thread(
            target=_work,
            args=(waiting, draw, results, stop),
            name=f"lim-eval-{number}",
            daemon=True,
        ).start()
    running = num_workers
    try:
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, Exception):
                raise result
            else:
                yield result
    finally:
        stop.set()


def _work(
    waiting: deque[Job], draw: Draw, results: SimpleQueue[Result], stop: threading.Event
) -> None:
    """One worker: job after job until none is left, or the caller wants no more."""
    try:
        while not stop.is_set() and (job := _next_job(waiting)):
            draw(job, partial(_deliver, job.question, results, stop))
    except Exception as error:  # noqa: BLE001 - carried to the caller's thread
        results.put(error)
    finally:
        results.put(None)


def _next_job(waiting: deque[Job]) -> Job | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _deliver(
    question: Question, results: SimpleQueue[Result], stop: threading.Event, sample: Sample
) -> None:
    if not stop.is_set():
        results.put((question, sample))
