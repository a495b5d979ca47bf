"""Drawing: what is left is drawn, failures are not answers, a dead server ends the run at once."""

import threading
from pathlib import Path

import pytest

from lim_sglang.errors import DataError, ServerError
from lim_sglang.evals.grade import AnswerKind, Grader
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.run import (
    Deliver,
    Job,
    count_workers,
    open_jobs,
    run_jobs,
    stream_samples,
)
from lim_sglang.evals.store import RunFolder, RunRecord, open_run
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.records import Sample, SampleState
from tests.unit.samples import make_sample

QUESTIONS = [Question(str(n), f"Add {n} and 1.", str(n + 1)) for n in range(6)]


class TextJudge:
    """Answers are the same when their texts are."""

    def same(self, a: str, b: str) -> bool:
        return a == b

    def correct(self, gold: str, answer: str) -> bool:
        return gold == answer


def answer_right(job: Job, deliver: Deliver) -> None:
    """Every sample is right, but the second says nothing."""
    for index in job.indices:
        deliver(make_sample(index, None if index == 1 else job.question.gold))


def open_folder(path: Path) -> RunFolder:
    return open_run(path, RunRecord("id", {}, {}))


def run(
    folder: RunFolder,
    draw: object = answer_right,
    *,
    num_samples: int = 2,
    check_server: object = lambda: None,
    shown: list[GradedSample | None] | None = None,
) -> list[Sample]:
    jobs = open_jobs(QUESTIONS, num_samples, (g.key for g in folder.samples))
    return run_jobs(
        jobs,
        draw,  # type: ignore[arg-type]
        grader=Grader(AnswerKind.EXPRESSION, TextJudge()),
        folder=folder,
        num_workers=2,
        check_server=check_server,  # type: ignore[arg-type]
        on_sample=(shown if shown is not None else []).append,
    )


def test_only_what_is_missing_is_drawn_in_the_order_of_the_questions() -> None:
    jobs = open_jobs(QUESTIONS[:3], 3, [("0", 0), ("0", 1), ("0", 2), ("2", 1)])
    assert jobs == [Job(QUESTIONS[1], (0, 1, 2)), Job(QUESTIONS[2], (0, 2))]


@pytest.mark.parametrize(
    ("num_jobs", "per_job", "concurrency", "expected"),
    [(0, 1, 64, 0), (6, 4, 64, 6), (500, 4, 64, 32), (500, 16, 1, 2), (30, 64, 64, 2)],
)
def test_as_many_questions_run_as_fill_the_server(
    num_jobs: int, per_job: int, concurrency: int, expected: int
) -> None:
    jobs = [Job(QUESTIONS[0], tuple(range(per_job)))] * num_jobs
    assert count_workers(jobs, concurrency) == expected


def test_each_sample_is_stored_once_with_its_verdict(tmp_path: Path) -> None:
    shown: list[GradedSample | None] = []
    with open_folder(tmp_path) as folder:
        assert run(folder, shown=shown) == []
    with open_folder(tmp_path) as folder:
        keys = [graded.key for graded in folder.samples]
        assert sorted(keys) == [(str(n), index) for n in range(6) for index in range(2)]
        assert all(g.correct == (g.sample.index == 0) for g in folder.samples)
        assert shown == folder.samples


def test_a_failed_sample_is_neither_wrong_nor_stored_and_is_redone(tmp_path: Path) -> None:
    def fail_one(job: Job, deliver: Deliver) -> None:
        for index in job.indices:
            failed = job.question.question_id == "3" and index == 1
            deliver(
                make_sample(index, None, SampleState.FAILED if failed else SampleState.FINISHED)
            )

    with open_folder(tmp_path) as folder:
        failed = run(folder, fail_one)
        assert [(s.index, s.error) for s in failed] == [(1, "connection refused")]
        assert len(folder.samples) == 11
    with open_folder(tmp_path) as folder:
        assert open_jobs(QUESTIONS, 2, (g.key for g in folder.samples)) == [Job(QUESTIONS[3], (1,))]
        run(folder)
        assert len(folder.samples) == 12


def test_a_dead_server_ends_the_run_at_its_first_failure(tmp_path: Path) -> None:
    begun: list[str] = []

    def die_at_the_third(job: Job, deliver: Deliver) -> None:
        begun.append(job.question.question_id)
        alive = len(begun) < 3
        for index in job.indices:
            state = SampleState.FINISHED if alive else SampleState.FAILED
            deliver(make_sample(index, job.question.gold, state))
        if not alive:
            blocked.wait(timeout=10)

    def check_server() -> None:
        raise ServerError("the server at http://here does not answer")

    blocked = threading.Event()
    with open_folder(tmp_path) as folder:
        with pytest.raises(ServerError, match="does not answer"):
            run(folder, die_at_the_third, check_server=check_server)
        blocked.set()
        assert len(folder.samples) == 4
    assert len(begun) <= 4


def test_a_defect_in_a_program_is_raised_and_not_swallowed(tmp_path: Path) -> None:
    def broken(job: Job, deliver: Deliver) -> None:
        raise IndexError("list index out of range")

    with open_folder(tmp_path) as folder, pytest.raises(IndexError):
        run(folder, broken)


def test_a_disk_that_refuses_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunFolder, sample: GradedSample) -> None:
        raise DataError("cannot write")

    monkeypatch.setattr(RunFolder, "append", refuse)
    with open_folder(tmp_path) as folder, pytest.raises(DataError, match="cannot write"):
        run(folder)


def test_closing_the_stream_begins_no_further_job() -> None:
    begun: list[str] = []
    ended = threading.Event()
    closed = threading.Event()

    def draw(job: Job, deliver: Deliver) -> None:
        begun.append(job.question.question_id)
        deliver(make_sample(0, "1"))
        closed.wait(timeout=10)
        deliver(make_sample(1, "1"))
        ended.set()

    stream = stream_samples([Job(q, (0, 1)) for q in QUESTIONS], draw, num_workers=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    closed.set()
    assert ended.wait(timeout=10)
    assert begun == ["0"]
