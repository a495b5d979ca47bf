"""Drawing on one server: what is left is drawn, failures are no answers, a dead server ends it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lim_sglang.errors import DataError, ServerError
from lim_sglang.evals.grading import AnswerKind, Grader
from lim_sglang.evals.run_store import Failure, GradedSample, RunFolder, RunRecord, open_run
from lim_sglang.evals.runner import run_jobs
from lim_sglang.evals.scheduler import (
    Deliver,
    Event,
    Job,
    SampleResult,
    Server,
    ServerLost,
    open_jobs,
    questions_at_once,
)
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

QUESTIONS = [Question(str(n), f"Add {n} and 1.", str(n + 1)) for n in range(6)]


class TextJudge:
    """Answers are the same when their texts are."""

    def equivalent(self, a: str, b: str) -> bool:
        return a == b

    def correct(self, gold: str, answer: str) -> bool:
        return gold == answer


def answer_right(job: Job, deliver: Deliver) -> None:
    """Every sample is right, but the second says nothing."""
    for index in job.indices:
        assert deliver(SampleResult(make_sample(index, None if index == 1 else job.question.gold)))


def open_folder(path: Path) -> RunFolder:
    return open_run(path, RunRecord("id", {}, {}))


def run(
    folder: RunFolder,
    draw: Callable[[Job, Deliver], object] = answer_right,
    *,
    num_samples: int = 2,
    check: Callable[[], object] = lambda: None,
    whole: bool = False,
) -> list[Event]:
    """Draw what is missing; what was told meanwhile."""
    told: list[Event] = []
    done = (graded.key for graded in folder.samples)
    jobs = open_jobs(QUESTIONS, num_samples, done, given_up=folder.failures, whole=whole)
    run_jobs(
        jobs,
        [Server("http://here", draw, check, concurrency=num_samples)],
        grader=Grader(AnswerKind.EXPRESSION, TextJudge()),
        folder=folder,
        in_flight=num_samples,
        on_event=told.append,
    )
    return told


def keys(folder: RunFolder) -> list[tuple[str, int]]:
    return sorted(graded.key for graded in folder.samples)


EVERY_KEY = [(str(n), index) for n in range(6) for index in range(2)]


def test_only_what_is_missing_is_drawn_in_the_order_of_the_questions() -> None:
    jobs = open_jobs(QUESTIONS[:3], 3, [("0", 0), ("0", 1), ("0", 2), ("2", 1)])
    assert jobs == [Job(QUESTIONS[1], (0, 1, 2)), Job(QUESTIONS[2], (0, 2))]


def test_what_failed_before_is_left_out() -> None:
    jobs = open_jobs(QUESTIONS[:2], 2, [("0", 0)], given_up=[("0", 1), ("1", 0)])
    assert jobs == [Job(QUESTIONS[1], (1,))]


def test_a_question_that_is_drawn_whole_is_there_or_not() -> None:
    jobs = open_jobs(QUESTIONS[:3], 40, [("0", 5)], given_up=[("1", 7)], whole=True)
    assert jobs == [Job(QUESTIONS[2], tuple(range(40)), whole=True)]


@pytest.mark.parametrize(
    ("concurrency", "in_flight", "whole", "expected"),
    [
        (64, 1, False, 128),
        (64, 4, False, 32),
        (1, 16, False, 2),
        (64, 64, False, 2),
        (64, 8, True, 8),
        (64, 40, True, 1),
        (4, 8, True, 1),
    ],
)
def test_as_many_questions_run_as_fill_the_server(
    concurrency: int, in_flight: int, whole: bool, expected: int
) -> None:
    assert questions_at_once(concurrency, in_flight, whole=whole) == expected


def test_each_sample_is_stored_once_with_its_verdict(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        told = run(folder)
    with open_folder(tmp_path) as folder:
        assert keys(folder) == EVERY_KEY
        assert all(g.correct == (g.sample.index == 0) for g in folder.samples)
        assert told == [(graded,) for graded in folder.samples]


def test_a_failed_sample_is_neither_wrong_nor_stored_and_is_not_tried_for_ever(
    tmp_path: Path,
) -> None:
    def fail_one(job: Job, deliver: Deliver) -> None:
        for index in job.indices:
            failed = job.question.question_id == "3" and index == 1
            state = SampleState.FAILED if failed else SampleState.FINISHED
            assert deliver(SampleResult(make_sample(index, None, state)))

    failure = Failure("3", 1, "connection refused")
    with open_folder(tmp_path) as folder:
        assert failure in run(folder, fail_one)
        assert len(folder.samples) == 11
    with open_folder(tmp_path) as folder:
        assert list(folder.failures.values()) == [failure]
        assert run(folder) == []
        folder.failures.clear()
        assert len(run(folder)) == 1
    with open_folder(tmp_path) as folder:
        assert keys(folder) == EVERY_KEY
        assert not folder.failures


def test_a_dead_server_ends_the_run_at_its_first_failure(tmp_path: Path) -> None:
    begun: list[str] = []
    blocked = threading.Event()
    closed: list[bool] = []

    def die_at_the_third(job: Job, deliver: Deliver) -> None:
        begun.append(job.question.question_id)
        alive = len(begun) < 3
        for index in job.indices:
            state = SampleState.FINISHED if alive else SampleState.FAILED
            assert deliver(SampleResult(make_sample(index, job.question.gold, state))) is alive
            if not alive:
                closed.append(True)
                blocked.wait(timeout=10)
                break

    def check() -> None:
        raise ServerError("the server at http://here does not answer")

    with open_folder(tmp_path) as folder:
        with pytest.raises(ServerError, match="does not answer"):
            run(folder, die_at_the_third, check=check)
        blocked.set()
        assert len(folder.samples) == 4
        assert not folder.failures
    assert len(begun) <= 4


def test_a_defect_in_a_program_is_raised_and_not_swallowed(tmp_path: Path) -> None:
    def broken(job: Job, deliver: Deliver) -> None:
        raise IndexError("list index out of range")

    with open_folder(tmp_path) as folder, pytest.raises(IndexError):
        run(folder, broken)


def test_a_disk_that_refuses_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunFolder, *samples: GradedSample) -> None:
        raise DataError("cannot write")

    monkeypatch.setattr(RunFolder, "append", refuse)
    with open_folder(tmp_path) as folder, pytest.raises(DataError, match="cannot write"):
        run(folder)


def test_nothing_begins_and_nothing_is_wanted_once_the_run_is_left(tmp_path: Path) -> None:
    begun: list[str] = []
    wanted: list[bool] = []
    left, ended = threading.Event(), threading.Event()

    def draw(job: Job, deliver: Deliver) -> None:
        begun.append(job.question.question_id)
        deliver(SampleResult(make_sample(0, "1")))
        left.wait(timeout=10)
        wanted.append(deliver(SampleResult(make_sample(1, "1"))))
        ended.set()

    def interrupt(_: Event) -> None:
        raise KeyboardInterrupt

    server = Server("http://here", draw, lambda: None, concurrency=1)
    with open_folder(tmp_path) as folder:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(
                *([Job(q, (0, 1)) for q in QUESTIONS], [server]),
                grader=Grader(AnswerKind.EXPRESSION, TextJudge()),
                folder=folder,
                in_flight=2,
                on_event=interrupt,
            )
        left.set()
        assert ended.wait(timeout=10)
        assert len(folder.samples) == 1
    assert len(begun) <= 2
    assert not any(wanted)


def draw_whole(job: Job, deliver: Deliver) -> None:
    """Three samples, however many are offered; the last comes too late to vote."""
    deliver(
        *(
            SampleResult(make_sample(index, job.question.gold), late=index == 2)
            for index in range(3)
        )
    )


def test_a_question_that_is_drawn_whole_is_stored_in_one_go(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        told = run(folder, draw_whole, num_samples=40, whole=True)
        assert [len(samples) for samples in told if isinstance(samples, tuple)] == [3] * 6
    with open_folder(tmp_path) as folder:
        assert all(graded.of == 3 for graded in folder.samples)
        assert [graded.late for graded in folder.samples] == [False, False, True] * 6
        assert run(folder, draw_whole, num_samples=40, whole=True) == []


def test_a_failure_in_a_question_that_is_drawn_whole_keeps_all_of_it_out(tmp_path: Path) -> None:
    wanted: list[bool] = []

    def fail_in_the_third(job: Job, deliver: Deliver) -> None:
        if job.question.question_id == "2":
            wanted.append(deliver(SampleResult(make_sample(7, None, SampleState.FAILED))))
        draw_whole(job, deliver)

    with open_folder(tmp_path) as folder:
        run(folder, fail_in_the_third, num_samples=40, whole=True)
        assert wanted == [False]
        assert {graded.question_id for graded in folder.samples} == {"0", "1", "3", "4", "5"}
        assert list(folder.failures) == [("2", 7)]
        folder.failures.clear()
        run(folder, draw_whole, num_samples=40, whole=True)
        assert len(folder.samples) == 18


def test_what_was_drawn_of_a_question_by_a_dying_server_is_kept(tmp_path: Path) -> None:
    def check() -> None:
        raise ServerError("gone")

    def die_in_the_middle(job: Job, deliver: Deliver) -> None:
        deliver(SampleResult(make_sample(0, "1")))
        deliver(SampleResult(make_sample(1, None, SampleState.FAILED)))
        deliver(SampleResult(make_sample(2, "1")))

    with open_folder(tmp_path) as folder:
        with pytest.raises(ServerError, match="gone"):
            run(folder, die_in_the_middle, num_samples=3, check=check)
        assert {index for _, index in keys(folder)} == {0}
        told = run(folder, answer_right, num_samples=3)
        assert len(folder.samples) == 18
        assert not any(isinstance(event, ServerLost) for event in told)
