"""What is left of a run, question by question, and what comes of it."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lim_sglang.evals.questions import Question
from lim_sglang.evals.records import Key
from lim_sglang.programs.records import Sample


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
