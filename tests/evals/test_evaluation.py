"""Several runs one after the other, and verdicts of one version of the grader in each."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from rich.console import Console

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals import runner as evaluation_module
from lim_sglang.evals.metrics import score
from lim_sglang.evals.run_config import Method
from lim_sglang.evals.runner import Evaluation, Finished, load_all, run_evaluation
from lim_sglang.evals.scheduler import Deliver, Job, SampleResult, Server
from lim_sglang.evals.servers import Connection, Facts
from lim_sglang.programs.schema import Access, SampleState
from tests.builders import make_sample

FACTS = Facts("http://here", {"model_path": "/models/tiny", "internal_states": [{}]})


class TextJudge:
    """Answers are the same when their texts are, and 9 is always right where that is so."""

    lenient = False

    def warm_up(self) -> None:
        """Nothing is to be started."""

    def equivalent(self, a: str, b: str) -> bool:
        return a == b

    def correct(self, gold: str, answer: str) -> bool:
        return gold == answer or (self.lenient and answer == "9")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers every question with 1 first and then with 9."""

    @contextmanager
    def connected(*_: Any, **__: Any) -> Iterator[tuple[Connection, ...]]:
        yield (Connection(FACTS, None),)  # type: ignore[arg-type]

    def draw(job: Job, deliver: Deliver) -> None:
        for index in job.indices:
            answer = "9" if index else "1"
            text = f"\\boxed{{{answer}}}"
            sample = make_sample(index, answer)
            deliver(SampleResult(type(sample)(**{**vars(sample), "text": text})))

    server = Server(FACTS.url, draw, lambda: None)
    monkeypatch.setattr(evaluation_module, "connected", connected)
    monkeypatch.setattr(evaluation_module, "servers_of", lambda *_: (server,))
    monkeypatch.setattr(evaluation_module, "EquivalenceChecker", TextJudge)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two tasks of our own, the first questions of which have the answer 1."""
    for name in ("math500", "mine"):
        rows = [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def evaluate(questions: Path, **others: Any) -> tuple[list[Finished], str]:
    """What is finished, and what was shown."""
    shown = io.StringIO()
    tasks = ("math500", f"file:{questions / 'mine.jsonl'}")
    evaluation = Evaluation(
        **{"tasks": tasks, "method": Method(2), "data_dir": questions, "out": questions, **others}
    )
    console = Console(file=shown, width=200)
    return run_evaluation(evaluation, [FACTS.url], Access(), console), shown.getvalue()


def test_each_task_has_a_run_of_its_own(questions: Path) -> None:
    finished, shown = evaluate(questions)
    assert [each.plan.path.name for each in finished] == ["math500", "file-mine"]
    for each in finished:
        assert len((each.plan.path / "samples.jsonl").read_text().splitlines()) == 6
        assert each.summary
        assert score(each.summary).pass_at_1.value == pytest.approx(1 / 6)
    assert shown.index("math500: 6/6 samples") < shown.index("file:mine: 6/6 samples")


def test_one_task_takes_the_folder_itself(questions: Path) -> None:
    finished, _ = evaluate(questions, tasks=("math500",), out=questions / "run")
    assert [each.plan.path for each in finished] == [questions / "run"]


def test_each_run_is_told_of_as_it_ends(questions: Path) -> None:
    told: list[Finished] = []
    evaluation = Evaluation(("math500",), Method(1), data_dir=questions, out=questions / "run")
    console = Console(file=io.StringIO())
    assert run_evaluation(evaluation, [FACTS.url], Access(), console, told.append) == told


def test_a_limit_is_of_each_task(questions: Path) -> None:
    finished, _ = evaluate(questions, limit=2)
    assert [len(each.plan.request.asked.questions) for each in finished] == [2, 2]


def test_all_that_is_wrong_with_tasks_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_all(Evaluation(("aime1924", "math500", "gsm8k"), data_dir=tmp_path))
    message = str(caught.value)
    assert all(part in message for part in ("aime1924", "math500.jsonl", "gsm8k.jsonl"))
    with pytest.raises(ConfigError, match="math500 is named twice"):
        load_all(Evaluation(("math500", "math500"), data_dir=tmp_path))


def right(finished: list[Finished]) -> int:
    (run,) = finished
    assert run.summary
    return sum(sum(question.correct) for question in run.summary.questions)


def test_a_run_that_goes_on_with_a_mended_grader_has_verdicts_of_one_version(
    questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"tasks": ("math500",), "out": questions / "run"}
    finished, shown = evaluate(questions, **one)
    assert right(finished) == 1
    assert "renewed" not in shown
    file = questions / "run" / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]))
    monkeypatch.setattr(TextJudge, "lenient", True)
    for module in ("runner", "regrade"):
        monkeypatch.setattr(f"lim_sglang.evals.{module}.GRADING_VERSION", 99)
    finished, shown = evaluate(questions, **one)
    assert right(finished) == 4
    assert "verdicts of another version were renewed, as lim grade does: 2 changed" in shown
    # The verdicts that were written meanwhile are those of the mended grader as well.
    assert file.read_bytes().startswith(b"".join(lines[:4]))
    again, _ = evaluate(questions, **one)
    assert right(again) == 4


def test_verdicts_that_lim_grade_has_written_are_those_of_the_table(questions: Path) -> None:
    one = {"tasks": ("math500",), "out": questions / "run"}
    evaluate(questions, **one)
    rows = [{"question": "0", "index": 0, "answer": "7", "correct": False, "by": "old"}]
    (questions / "run" / "grades.jsonl").write_text(json.dumps(rows[0]) + "\n")
    finished, shown = evaluate(questions, **one)
    assert right(finished) == 1
    assert "renewed, as lim grade does: 1 changed" in shown


def test_a_run_without_a_sample_has_no_summary(
    questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job, deliver: Deliver) -> None:
        for index in job.indices:
            deliver(SampleResult(make_sample(index, None, SampleState.FAILED)))

    server = Server(FACTS.url, fail, lambda: None)
    monkeypatch.setattr(evaluation_module, "servers_of", lambda *_: (server,))
    finished, _ = evaluate(questions)
    assert [each.summary for each in finished] == [None, None]
    assert [len(each.outcome.failures) for each in finished] == [6, 6]
