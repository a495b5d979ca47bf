"""A whole run: planned, drawn, stopped, gone on with."""

import io
import json
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.errors import DataError, ServerError
from lim_sglang.evals import runner as session_module
from lim_sglang.evals.grading import AnswerKind, Grader
from lim_sglang.evals.run_config import Method
from lim_sglang.evals.runner import (
    Plan,
    Request,
    RunOutcome,
    check_unchanged,
    execute,
    load_asked,
    plan_run,
)
from lim_sglang.evals.scheduler import Deliver, Job, SampleResult, Server
from lim_sglang.evals.servers import Facts
from lim_sglang.evals.tasks import find_task
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

NUM_QUESTIONS = 5
INFO = {"model_path": "/models/tiny", "version": "0.5.16", "internal_states": [{}]}
HERE = Facts("http://here", INFO)


class TextJudge:
    """Answers are the same when their texts are."""

    def equivalent(self, a: str, b: str) -> bool:
        return a == b

    correct = equivalent


class FakeServer:
    """Answers every question with 1, until it has done so `lives` times."""

    def __init__(self, lives: int = 10_000, url: str = "http://here") -> None:
        self.left = lives
        self.url = url
        self.asked: list[tuple[str, int]] = []
        self.released = threading.Event()

    def check(self) -> None:
        if not self.left:
            raise ServerError(f"no server answers at {self.url}")

    def draw(self, job: Job, deliver: Deliver) -> None:
        for index in job.indices:
            self.asked.append((job.question.question_id, index))
            alive = self.left > 0
            self.left -= alive
            state = SampleState.FINISHED if alive else SampleState.FAILED
            if not deliver(SampleResult(make_sample(index, "1" if alive else None, state))):
                self.released.wait(5)  # as the next sample of a dead server would
                return


class Limping(FakeServer):
    """Fails samples, and lives."""

    def check(self) -> None:
        """It does."""


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """Five made-up questions, two of them with the answer 1, three samples of each."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"What is {n} mod 3?", "answer": n % 3} for n in range(NUM_QUESTIONS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "math500.jsonl").write_text(lines)
    return Request(load_asked(find_task("math500"), tmp_path), Method(3), {"max_tokens": 64})


def plan(request: Request, info: dict[str, Any] = INFO) -> Plan:
    return plan_run(request, [replace(HERE, info=info)])


def run(
    request: Request, *servers: FakeServer, info: dict[str, Any] = INFO
) -> tuple[RunOutcome, str]:
    """What the run has at its end, and what was shown meanwhile."""
    shown = io.StringIO()
    outcome = execute(
        plan(request, info),
        [Server(each.url, each.draw, each.check, concurrency=1) for each in servers],
        Grader(AnswerKind.EXPRESSION, TextJudge()),
        console=Console(file=shown, width=200),
    )
    return outcome, shown.getvalue()


def test_a_run_leaves_a_line_a_sample_and_its_conditions(request_: Request) -> None:
    outcome, shown = run(request_, FakeServer())
    assert len(outcome.samples) == 15
    assert sum(graded.correct for graded in outcome.samples) == 6
    path = plan(request_).path
    assert path.parent == Path("runs")
    assert path.name.startswith("math500-sglang-")
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    assert "mod 3" not in (path / "samples.jsonl").read_text()
    record = json.loads((path / "run.json").read_text())
    assert record["settings"]["server"]["model_path"] == "/models/tiny"
    assert record["about"]["known_questions"] is False
    assert record["about"]["urls"] == ["http://here"]
    assert "which are not the questions of this benchmark" in shown
    assert "math500: 15/15 samples" in shown


def test_the_same_settings_give_the_same_folder_and_others_another(request_: Request) -> None:
    assert plan(request_).path == plan(request_).path
    two = replace(request_.asked, questions=request_.asked.questions[:2])
    changed = [
        replace(request_, asked=two),
        replace(request_, method=Method(4)),
        replace(request_, sampling={"max_tokens": 65}),
    ]
    paths = {plan(request).path for request in [request_, *changed]}
    assert len(paths) == 4


def test_neither_the_url_nor_its_room_is_part_of_the_identity(request_: Request) -> None:
    there = plan_run(request_, [replace(HERE, url="http://there", concurrency=2)])
    assert there.path == plan(request_).path


def test_the_models_own_sampling_is_taken_where_none_is_given(request_: Request) -> None:
    recommended = replace(HERE, sampling_defaults={"temperature": 0.7, "top_k": 0})
    sampling = plan_run(request_, [recommended]).sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.7, -1, 64)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            Facts("http://there", INFO | {"model_path": "/models/large"}),
            'server.model_path is "/models/tiny" at http://here and "/models/large" at http://the',
        ),
        (Facts("http://there", INFO | {"version": "0.5.17"}), "versions.sglang_server is"),
        (Facts("http://there", INFO, {"temperature": 0.7}), "sampling.temperature is 0.6 at"),
    ],
)
def test_servers_that_differ_are_refused(other: Facts, difference: str, request_: Request) -> None:
    with pytest.raises(ServerError) as caught:
        plan_run(request_, [HERE, HERE, other])
    assert difference in str(caught.value)
    assert "cannot be mixed" in str(caught.value)


def test_a_finished_run_is_not_drawn_again(request_: Request) -> None:
    first, _ = run(request_, FakeServer())
    server = FakeServer()
    second, _ = run(request_, server)
    assert server.asked == []
    assert second == first


def test_a_server_that_dies_ends_the_run_and_the_same_command_goes_on(request_: Request) -> None:
    dying = FakeServer(lives=7)
    with pytest.raises(ServerError) as caught:
        run(request_, dying)
    assert "no server answers" in str(caught.value)
    assert "the same command goes on" in str(caught.value)
    # One failure is enough: of the eight that were left, each thread has asked for one.
    assert len(dying.asked) <= 9
    dying.released.set()

    again = FakeServer()
    outcome, shown = run(request_, again)
    assert "going on at 7 of 15 samples" in shown
    assert len(again.asked) == 8
    assert len({graded.key for graded in outcome.samples}) == 15


def test_one_server_of_two_dies_and_nothing_is_missing(request_: Request) -> None:
    dying, living = FakeServer(lives=4, url="http://dying"), FakeServer()
    dying.released.set()
    outcome, shown = run(request_, dying, living)
    assert len({graded.key for graded in outcome.samples}) == 15
    assert not outcome.failures
    assert "http://dying is asked no more, and its questions go to the others: no serv" in shown
    assert not plan(request_).path.joinpath("failures.jsonl").exists()


def test_a_server_is_known_again_by_what_it_says(request_: Request) -> None:
    planned = plan(request_)
    check_unchanged(planned, HERE, lambda: INFO | {"random_seed": 7})
    with pytest.raises(ServerError, match="another server answers at http://here by now:") as found:
        check_unchanged(planned, HERE, lambda: INFO | {"dtype": "float16"})
    assert 'server.dtype was null and is now "float16"' in str(found.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [(ServerError("no server answers"), "no server answers"), (CancelledError(), "is closed")],
)
def test_a_server_that_does_not_answer_is_gone(
    error: Exception, words: str, request_: Request
) -> None:
    def server_info() -> dict[str, Any]:
        raise error

    with pytest.raises(ServerError, match=words):
        check_unchanged(plan(request_), HERE, server_info)


def test_ctrl_c_leaves_a_run_that_goes_on(request_: Request) -> None:

    def interrupt(jobs: Sequence[Job], servers: Sequence[Server], **how: Any) -> None:
        told = how.pop("on_event")
        count = iter(range(4))

        def tell(event: Any) -> None:
            told(event)
            if next(count) == 3:
                raise KeyboardInterrupt

        run_jobs(jobs, servers, on_event=tell, **how)

    run_jobs = session_module.run_jobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "run_jobs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(request_, FakeServer())
    server = FakeServer()
    outcome, shown = run(request_, server)
    assert "going on at 4 of 15 samples" in shown
    assert len(outcome.samples) == 15
    assert len(server.asked) == 11


def test_failures_of_a_living_server_are_told_and_redone_on_request(request_: Request) -> None:
    outcome, shown = run(request_, Limping(lives=13))
    assert (len(outcome.samples), len(outcome.failures)) == (13, 2)
    assert "2 failed" in shown
    server = FakeServer()
    outcome, shown = run(request_, server)
    assert (len(outcome.samples), len(outcome.failures)) == (13, 2)
    assert server.asked == []
    assert "2 that failed before are left out: --retry-failed draws them again" in shown
    again = replace(request_, retry_failed=True)
    outcome, shown = run(again, Limping(lives=1))
    assert (len(outcome.samples), len(outcome.failures)) == (14, 1)
    outcome, shown = run(again, FakeServer())
    assert (len(outcome.samples), len(outcome.failures)) == (15, 0)


def test_a_named_folder_takes_one_run_only(request_: Request, tmp_path: Path) -> None:
    named = replace(request_, out=tmp_path / "mine")
    run(named, FakeServer())
    other = replace(named, sampling={"max_tokens": 65})
    with pytest.raises(DataError, match=r"sampling\.max_tokens was 64 and is now 65"):
        run(other, FakeServer())
    with pytest.raises(DataError, match=r"server\.model_path was .*tiny.* and is now .*other"):
        run(named, FakeServer(), info={**INFO, "model_path": "/models/other"})
    assert len((tmp_path / "mine" / "samples.jsonl").read_text().splitlines()) == 15
