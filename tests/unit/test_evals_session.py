"""A whole run: planned, drawn, stopped, gone on with."""

import io
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.errors import DataError, ServerError
from lim_sglang.evals.grade import AnswerKind, Grader
from lim_sglang.evals.run import Deliver, Job
from lim_sglang.evals.session import Outcome, Plan, Request, execute, plan_run
from lim_sglang.evals.tasks import find_task
from lim_sglang.programs.records import Sample, SampleState, Sampling

NUM_QUESTIONS = 5
INFO = {"model_path": "/models/tiny", "version": "0.5.16", "internal_states": [{}]}


class TextJudge:
    """Answers are the same when their texts are."""

    def same(self, a: str, b: str) -> bool:
        return a == b

    correct = same


class FakeServer:
    """Answers every question with 1, until it has done so `lives` times."""

    def __init__(self, lives: int = 10_000) -> None:
        self.left = lives
        self.asked: list[tuple[str, int]] = []
        self.released = threading.Event()

    def check(self) -> None:
        if not self.left:
            raise ServerError("no server answers")

    def draw(self, job: Job, deliver: Deliver) -> None:
        for index in job.indices:
            self.asked.append((job.question.question_id, index))
            alive = self.left > 0
            self.left -= alive
            deliver(
                Sample(
                    index=index,
                    state=SampleState.FINISHED if alive else SampleState.FAILED,
                    text="\\boxed{1}" if alive else "",
                    answer="1" if alive else None,
                    num_tokens=5,
                    latency_s=0.1,
                    seed=None,
                    seed_honoured=False,
                    rid="r",
                    error=None if alive else "connection lost",
                )
            )
            if not alive:
                self.released.wait(5)  # as the next sample of a dead server would


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """Five made-up questions, two of them with the answer 1, three samples of each."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"What is {n} mod 3?", "answer": n % 3} for n in range(NUM_QUESTIONS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "math500.jsonl").write_text(lines)
    return Request(find_task("math500"), 3, Sampling(max_tokens=64), data_dir=tmp_path)


def plan(request: Request, info: dict[str, Any] = INFO) -> Plan:
    return plan_run(request, info, "http://here")


def run(request: Request, server: FakeServer, info: dict[str, Any] = INFO) -> tuple[Outcome, str]:
    """What the run has at its end, and what was shown meanwhile."""
    shown = io.StringIO()
    outcome = execute(
        plan(request, info),
        server.draw,
        Grader(AnswerKind.EXPRESSION, TextJudge()),
        concurrency=1,
        check_server=server.check,
        console=Console(file=shown),
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
    assert "which are not the questions of this benchmark" in shown


def test_the_same_settings_give_the_same_folder_and_others_another(request_: Request) -> None:
    assert plan(request_).path == plan(request_).path
    changed = [
        replace(request_, limit=2),
        replace(request_, num_samples=4),
        replace(request_, sampling=Sampling(max_tokens=65)),
    ]
    paths = {plan(request).path for request in [request_, *changed]}
    assert len(paths) == 4


def test_neither_the_url_nor_the_concurrency_is_part_of_the_identity(request_: Request) -> None:
    there = plan_run(replace(request_, concurrency=2), INFO, "http://there")
    assert there.path == plan(request_).path


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
    # One failure is enough: of the eight that were left, each worker has asked for one.
    assert len(dying.asked) <= 9
    dying.released.set()

    again = FakeServer()
    outcome, shown = run(request_, again)
    assert "going on at 7 of 15 samples" in " ".join(shown.split())
    assert len(again.asked) == 8
    assert len({graded.key for graded in outcome.samples}) == 15


def test_ctrl_c_leaves_a_run_that_goes_on(request_: Request) -> None:
    class Interrupted(FakeServer):
        def check(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(request_, Interrupted(lives=4))
    outcome, _ = run(request_, FakeServer())
    assert len(outcome.samples) == 15


def test_failures_of_a_living_server_are_told_and_redone(request_: Request) -> None:
    class Limping(FakeServer):
        def check(self) -> None:
            """It lives."""

    outcome, shown = run(request_, Limping(lives=13))
    assert (len(outcome.samples), len(outcome.failed)) == (13, 2)
    assert "2 failed" in shown
    outcome, _ = run(request_, FakeServer())
    assert (len(outcome.samples), len(outcome.failed)) == (15, 0)


def test_a_named_folder_takes_one_run_only(request_: Request, tmp_path: Path) -> None:
    named = replace(request_, out=tmp_path / "mine")
    run(named, FakeServer())
    other = replace(named, sampling=Sampling(max_tokens=65))
    with pytest.raises(DataError, match=r"sampling\.max_tokens was 64 and is now 65"):
        run(other, FakeServer())
    with pytest.raises(DataError, match=r"server\.model_path was .*tiny.* and is now .*other"):
        run(named, FakeServer(), {**INFO, "model_path": "/models/other"})
    assert len((tmp_path / "mine" / "samples.jsonl").read_text().splitlines()) == 15
