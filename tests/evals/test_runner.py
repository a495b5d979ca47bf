"""A run: planned, opened or resumed, sampled, graded, stored and summarised."""

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from lim_sglang import progress as progress_module
from lim_sglang.config import Drafts
from lim_sglang.errors import ConfigError, DataError, ServerError
from lim_sglang.evals import runner as runner_module
from lim_sglang.evals.grading import Grader
from lim_sglang.evals.metrics import run_conditions, score
from lim_sglang.evals.run_config import RunConfig
from lim_sglang.evals.run_store import Failure, Run, RunFolder, open_run, read_record
from lim_sglang.evals.runner import (
    BAR_WIDTH,
    ROOM,
    FinishedRun,
    RunPlan,
    RunProgress,
    check_unchanged,
    complete_runs,
    describe_failures,
    load_benchmarks,
    plan_run,
    sample_missing,
)
from lim_sglang.evals.scheduler import InFlight, Job, SampleResult, SampleSink, Server, ServerLost
from lim_sglang.evals.servers import Connection, ServerFacts
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import Access, SampleState
from lim_sglang.progress import fitting, show_progress
from tests.builders import TextEquivalence, make_graded, make_sample
from tests.fakes.job_server import FailingServer, JobServer
from tests.fakes.sglang_server import eventually

INFO = {"model_path": "/models/tiny", "version": "0.5.16", "internal_states": [{}]}
FACTS = ServerFacts("http://here", INFO)
BENCHMARK = [Question(str(n), f"What is {n} mod 3?", str(n % 3)) for n in range(5)]
"""Two of the answers are 1."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Three samples of each question, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    sampling = {"max_tokens": 64}
    return RunConfig("math500", num_samples=3, sampling=sampling, data_dir=tmp_path)


def plan(config: RunConfig, info: dict[str, Any] = INFO) -> RunPlan:
    return plan_run(config, BENCHMARK, [replace(FACTS, info=info)])


def run(config: RunConfig, *servers: JobServer, info: dict[str, Any] = INFO) -> tuple[Run, str]:
    """Sample what is missing; return the run, and what was printed."""
    printed = io.StringIO()
    found = sample_missing(
        plan(config, info),
        [each.as_server(1) for each in servers],
        Grader(AnswerKind.EXPRESSION, TextEquivalence()),
        Console(file=printed, width=200),
    )
    return found, printed.getvalue()


EARLY_STOP: dict[str, Any] = {"program": "early_stop", "options": {"window": 3}}


def test_a_run_leaves_a_line_a_sample_and_its_conditions(config: RunConfig) -> None:
    found, printed = run(config, JobServer())
    assert len(found.samples) == 15
    assert sum(graded.correct for graded in found.samples) == 6
    assert found.path.parent == Path("runs")
    assert found.path.name.startswith("math500-own-questions-sglang-")
    lines = (found.path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 15
    assert not any("mod 3" in line for line in lines)
    record = json.loads((found.path / "run.json").read_text())
    assert record["settings"]["server"]["model_path"] == "/models/tiny"
    assert record["about"]["origin"] == "own"
    assert (found.path / "questions.jsonl").read_text().count("mod 3") == 5
    assert record["about"]["urls"] == ["http://here"]
    assert "which are not the questions and answers of this benchmark" in printed
    assert "math500 (own questions): 15/15 samples" in printed


def test_a_complete_run_writes_lost_questions_again(config: RunConfig) -> None:
    found, _ = run(config, JobServer())
    file = found.path / "questions.jsonl"
    written = file.read_text()
    file.write_text(written.partition("\n")[2])
    run(config, JobServer())
    assert file.read_text() == written


def test_a_session_records_what_its_servers_have_drafted(config: RunConfig) -> None:
    with pytest.raises(ServerError):
        run(config, JobServer(lives=7, drafts=True))
    other, third = JobServer(drafts=True), JobServer("http://third", drafts=True)
    other.asked += [("q", 0)] * 4  # by someone else, before
    found, printed = run(config, other, third)
    drafts = Drafts(8, 64, 48, {"6": 8}).counts()
    first, second = found.record.about["sessions"]
    assert first == {"requests": 1}  # the server was gone
    assert second["drafts"] == drafts
    assert "drafts: 48 of 64 accepted, 7.0 tokens a request and cycle" in printed
    run(config, other)  # nothing is left to sample
    assert read_record(found.path).about["sessions"][-1]["drafts"] == drafts


def test_neither_the_address_nor_the_room_of_a_server_is_part_of_the_identity(
    config: RunConfig,
) -> None:
    there = plan_run(config, BENCHMARK, [replace(FACTS, url="http://there", concurrency=2)])
    assert there.path == plan(config).path


def test_the_models_own_sampling_is_used_where_none_is_given(config: RunConfig) -> None:
    recommended = replace(FACTS, sampling_defaults={"temperature": 0.7, "top_k": 0})
    sampling = plan_run(config, BENCHMARK, [recommended]).sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.7, -1, 64)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"info": INFO | {"model_path": "/models/large"}},
            'server.model_path is "/models/tiny" at http://here and "/models/large" at http://the',
        ),
        ({"info": INFO | {"version": "0.5.17"}}, "versions.sglang_server is"),
        ({"sampling_defaults": {"temperature": 0.7}}, "sampling.temperature is 0.6 at"),
    ],
)
def test_servers_that_differ_are_refused(
    changes: dict[str, Any], difference: str, config: RunConfig
) -> None:
    same, other = replace(FACTS, url="http://same"), replace(FACTS, url="http://there", **changes)
    with pytest.raises(ServerError, match="cannot be mixed") as caught:
        plan_run(config, BENCHMARK, [FACTS, same, other])
    assert difference in str(caught.value)


@pytest.mark.parametrize("program", ["majority", "early_stop"])
def test_a_complete_run_asks_no_server(program: str, config: RunConfig) -> None:
    config = replace(config, **(EARLY_STOP if program == "early_stop" else {}))
    first, _ = run(config, JobServer())
    of = {graded.written_together for graded in first.samples}
    assert of == {3 if program == "early_stop" else None}
    server = JobServer()
    second, _ = run(config, server)
    assert server.asked == []
    assert second == first


def test_a_server_that_dies_ends_the_run_and_the_same_command_resumes(config: RunConfig) -> None:
    with pytest.raises(ServerError, match="no server answers") as caught:
        run(config, JobServer(lives=7))
    path = plan(config).path
    assert f"finished samples are safe in {path}; the same command resumes" in str(caught.value)
    stored = (path / "samples.jsonl").read_bytes()
    again = JobServer()
    found, printed = run(config, again)
    assert "resuming at 7 of 15 samples" in printed
    assert read_record(path).about["sessions"] == [{"requests": 1}] * 2
    run(config, JobServer())  # complete: no session
    assert run_conditions(read_record(path))["requests_by_session"] == [1, 1]
    assert len(again.asked) == len(set(again.asked)) == 8
    assert (path / "samples.jsonl").read_bytes().startswith(stored)
    assert len(found.samples) == len({graded.key for graded in found.samples}) == 15


def test_one_server_of_two_dies_and_nothing_is_missing(config: RunConfig) -> None:
    dying, living = JobServer("http://dying", lives=4), JobServer()
    found, printed = run(config, dying, living)
    assert len({graded.key for graded in found.samples}) == 15
    assert not found.failures
    assert "http://dying gets no more questions: no server answers" in printed
    assert not (found.path / "failures.jsonl").exists()


def test_a_server_is_recognised_by_what_it_reports(config: RunConfig) -> None:
    planned = plan(config)
    check_unchanged(planned, "http://here", lambda: INFO | {"random_seed": 7})
    with pytest.raises(ServerError, match="another server answers at http://here by now:") as found:
        check_unchanged(planned, "http://here", lambda: INFO | {"dtype": "float16"})
    assert 'server.dtype was null and is now "float16"' in str(found.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [(ServerError("no server answers"), "no server answers"), (CancelledError(), "is closed")],
)
def test_a_server_that_does_not_answer_is_gone(
    error: Exception, words: str, config: RunConfig
) -> None:
    with pytest.raises(ServerError, match=words):
        check_unchanged(plan(config), "http://here", Mock(side_effect=error))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("cannot write")])
def test_ctrl_c_and_a_full_disk_leave_a_run_that_is_resumed(
    error: BaseException, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunFolder.append

    def stop_after_four(folder: RunFolder, *samples: Any) -> None:
        if len(folder.samples) == 4:
            raise error
        append(folder, *samples)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", stop_after_four)
        with pytest.raises(type(error)):
            run(config, JobServer())
    server = JobServer()
    found, printed = run(config, server)
    assert "resuming at 4 of 15 samples" in printed
    assert len(found.samples) == 15
    assert len(server.asked) == 11


def test_failures_of_a_living_server_are_told_and_tried_again_on_request(
    config: RunConfig,
) -> None:
    found, printed = run(config, FailingServer(lives=13))
    assert (len(found.samples), len(found.failures)) == (13, 2)
    assert "2 failed" in printed
    assert describe_failures(found.failures) == (
        "2 samples failed, the last with: connection refused"
    )
    server = JobServer()
    again, printed = run(config, server)
    assert (again.samples, again.failures) == (found.samples, found.failures)
    assert server.asked == []
    assert "2 that failed before are left out: --retry-failed tries them again" in printed
    retried = replace(config, retry_failed=True)
    found, _ = run(retried, FailingServer(lives=1))
    assert (len(found.samples), len(found.failures)) == (14, 1)
    found, _ = run(retried, JobServer())
    assert (len(found.samples), len(found.failures)) == (15, 0)


def test_a_named_folder_takes_one_run_only(config: RunConfig, tmp_path: Path) -> None:
    named = replace(config, out=tmp_path / "mine")
    run(named, JobServer())
    other = replace(named, sampling={"max_tokens": 65})
    with pytest.raises(DataError, match=r"max_tokens \(--max-tokens\) was 64 and is now 65"):
        run(other, JobServer())
    with pytest.raises(DataError, match=r"server\.model_path was .*tiny.* and is now .*other"):
        run(named, JobServer(), info={**INFO, "model_path": "/models/other"})
    assert len((tmp_path / "mine" / "samples.jsonl").read_text().splitlines()) == 15


def progress_of(
    config: RunConfig,
    clock: list[float],
    *stored: Any,
    failures: int = 0,
    servers: Sequence[Server] = (),
) -> RunProgress:
    """Return the progress of a run that has these samples and failures."""
    folder = open_run(Path("runs/progress"), plan(config).record)
    for each in stored:
        folder.append(each)
    for index in range(failures):
        folder.append_failure(Failure("z", index, "HTTP 400"))
    return RunProgress(plan(config), folder, servers, lambda: clock[0])


FIFTY = {"num_tokens": 50}


def test_progress_tells_accuracy_speed_and_time_left_of_this_session(config: RunConfig) -> None:
    clock = [100.0]
    progress = progress_of(config, clock, make_graded(0, **FIFTY), make_graded(1, **FIFTY))
    assert progress.describe() == "math500 (own questions): 2/15 samples, 100.0 % right"
    clock[0] += 4
    progress.count((make_graded(answer="5", **FIFTY),))
    progress.count((make_graded(answer=None, **FIFTY),))
    assert progress.describe() == (
        "math500 (own questions): 4/15 samples, 50.0 % right, 25 tokens/s, about 15 s left"
    )


def test_an_aborted_sample_is_neither_right_nor_wrong_and_a_lost_server_is_no_sample(
    config: RunConfig,
) -> None:
    progress = progress_of(replace(config, **EARLY_STOP), [100.0])
    progress.count((make_graded(answer="5", state=SampleState.ABORTED), make_graded(1)))
    progress.count(ServerLost("http://here", ServerError("no server answers")))
    described = progress.describe()
    assert described.startswith("math500 (own questions): 1/5 questions, 100.0 % of samples right")


def test_failures_are_counted_apart_and_nobody_waits_for_earlier_ones(config: RunConfig) -> None:
    clock = [100.0]
    progress = progress_of(config, clock, make_graded(0, **FIFTY), failures=2)
    clock[0] += 3
    progress.count(Failure("q", 1, "HTTP 400"))
    progress.count((make_graded(2, **FIFTY),))
    assert progress.describe().endswith(
        ": 2/15 samples, 100.0 % right, 17 tokens/s, about 13 s left, 3 failed"
    )


def test_progress_tells_samples_in_flight_and_goes_on_while_none_ends(config: RunConfig) -> None:
    clock, running = [100.0], [InFlight()]
    servers = [replace(JobServer().as_server(), in_flight=lambda: running[0])] * 2
    progress = progress_of(config, clock, servers=servers)
    assert progress.describe() == "math500 (own questions): 0/15 samples"
    clock[0], running[0] = 140.0, InFlight(2)
    assert progress.describe() == "math500 (own questions): 0/15 samples, 4 running"
    running[0] = InFlight(2, num_tokens=9, running_s=(40.0, 40.0))
    progress.count(Failure("q", 1, "timeout"))
    assert progress.describe().endswith(
        ": 0/15 samples, 4 running, 0.5 tokens/s, 18 tokens, 1 failed"
    )


def test_samples_in_flight_count_at_the_speed_of_the_ended_ones_and_within_the_token_limit(
    config: RunConfig,
) -> None:
    clock = [100.0]
    running = InFlight(11, running_s=(20.0,) * 11)
    servers = [replace(JobServer().as_server(), in_flight=lambda: running)]
    progress = progress_of(config, clock, failures=3, servers=servers)
    clock[0] += 20
    progress.count((make_graded(0, num_tokens=60, latency_s=20.0),))
    # 12 samples at 3 tokens/s, which have 64 tokens at most.
    assert progress.describe().endswith(", 11 running, 36 tokens/s, about 1 s left, 3 failed")


def test_the_time_left_of_a_program_that_stops_early_counts_questions(config: RunConfig) -> None:
    running = InFlight(6, num_tokens=90, running_s=(3.0, 0.0))
    servers = [replace(JobServer().as_server(), in_flight=lambda: running)]
    clock = [100.0]
    progress = progress_of(replace(config, **EARLY_STOP), clock, servers=servers)
    clock[0] += 5
    progress.count(tuple(make_graded(n, num_tokens=20, latency_s=5.0) for n in range(3)))
    assert ", 6 samples running, 30 tokens/s, about 10 s left" in progress.describe()


def test_no_time_is_left_once_every_sample_has_ended(config: RunConfig) -> None:
    clock = [100.0]
    progress = progress_of(config, clock, failures=14)
    clock[0] += 5
    progress.count((make_graded(0, num_tokens=2),))
    assert progress.describe().endswith("100.0 % right, 0.4 tokens/s, 14 failed")


def one_then_nine(job: Job, deliver: SampleSink) -> None:
    """Answer 1 first and 9 in every further sample."""
    for index in job.indices:
        answer = "9" if index else "1"
        sample = replace(make_sample(index, answer), text=f"\\boxed{{{answer}}}")
        deliver(SampleResult(sample))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> JobServer:
    """Replace connecting by one server, and math-verify by an equality of texts."""
    server = JobServer()
    server.sample = one_then_nine  # type: ignore[method-assign]

    @contextmanager
    def connected(*_: Any) -> Iterator[tuple[Connection, ...]]:
        yield (Connection(FACTS, None),)  # type: ignore[arg-type]

    monkeypatch.setattr(runner_module, "connected", connected)
    monkeypatch.setattr(runner_module, "server_of", lambda *_: server.as_server())
    monkeypatch.setattr(runner_module, "EquivalenceChecker", TextEquivalence)
    return server


def complete(*configs: RunConfig) -> tuple[list[FinishedRun], str]:
    """Complete runs; return them, and what was printed."""
    printed = io.StringIO()
    benchmarks = {config.task: BENCHMARK[:3] for config in configs}
    console = Console(file=printed, width=200)
    told: list[FinishedRun] = []
    found = complete_runs(configs, benchmarks, [FACTS.url], Access(), console, told.append)
    assert found == told
    return found, printed.getvalue()


def num_right(finished: list[FinishedRun]) -> int:
    (run,) = finished
    assert run.summary
    return sum(sum(question.correct) for question in run.summary.questions)


@pytest.fixture
def two_samples(config: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(config, num_samples=2, out=tmp_path / "run")


def test_each_task_has_a_run_of_its_own(two_samples: RunConfig, server: JobServer) -> None:
    own = replace(two_samples, task="file:mine.jsonl", out=Path("mine"))
    finished, printed = complete(two_samples, own)
    assert [each.run.path for each in finished] == [two_samples.out, Path("mine")]
    for each in finished:
        assert len((each.run.path / "samples.jsonl").read_text().splitlines()) == 6
        assert each.summary
        assert score(each.summary).pass_at_1.value == pytest.approx(1 / 6)
    ends = [f"{name}: 6/6 samples" for name in ("math500 (own questions)", "file:mine")]
    assert printed.index(ends[0]) < printed.index(ends[1])


def test_a_run_that_is_resumed_with_another_grader_has_verdicts_of_one_version(
    two_samples: RunConfig, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, printed = complete(two_samples)
    assert num_right(finished) == 1
    assert "renewed" not in printed
    assert two_samples.out
    file = two_samples.out / "samples.jsonl"
    first_lines = b"".join(file.read_bytes().splitlines(keepends=True)[:4])
    file.write_bytes(first_lines)
    # A grader that was changed: the answer 9 is always right.
    monkeypatch.setattr(
        TextEquivalence, "equivalent", lambda _, gold, answer: answer in (gold, "9")
    )
    for module in ("runner", "grading"):
        monkeypatch.setattr(f"lim_sglang.evals.{module}.GRADING_VERSION", 99)
    finished, printed = complete(two_samples)
    assert num_right(finished) == 4
    assert "verdicts of another version were renewed, as by lim grade: 2 changed" in printed
    assert file.read_bytes().startswith(first_lines)
    assert num_right(complete(two_samples)[0]) == 4


def test_verdicts_that_lim_grade_has_written_are_renewed_too(
    two_samples: RunConfig, server: JobServer
) -> None:
    complete(two_samples)
    assert two_samples.out
    row = {"question": "1", "index": 0, "answer": "7", "correct": False, "by": "old"}
    (two_samples.out / "grades.jsonl").write_text(json.dumps(row) + "\n")
    finished, printed = complete(two_samples)
    assert num_right(finished) == 1
    assert "renewed, as by lim grade: 1 changed" in printed
    finished, printed = complete(two_samples)
    assert num_right(finished) == 1
    assert "renewed" not in printed


def test_a_run_without_a_sample_has_no_summary(
    two_samples: RunConfig, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = FailingServer(lives=0).as_server()
    monkeypatch.setattr(runner_module, "server_of", lambda *_: failing)
    (finished,), _ = complete(two_samples)
    assert finished.summary is None
    assert len(finished.run.failures) == 6


def test_every_problem_with_tasks_is_named_at_once(tmp_path: Path) -> None:
    tasks = ("aime1924", "math500", "gsm8k", "math500")
    with pytest.raises(ConfigError) as caught:
        load_benchmarks([RunConfig(task, data_dir=tmp_path) for task in tasks], Console(quiet=True))
    expected = ("unknown task 'aime1924'", "math500.jsonl", "gsm8k.jsonl")
    lines = str(caught.value).split("\n")
    assert all(part in line for part, line in zip(expected, lines, strict=True))


def test_a_wait_for_the_hub_is_shown_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "FIRST_WAIT_S", 0.02)
    printed = io.StringIO()

    def load(*_: object) -> list[Question]:
        assert eventually(lambda: "  waiting, 0 s\n" in printed.getvalue())
        return []

    monkeypatch.setattr(runner_module, "load_questions", load)
    load_benchmarks([RunConfig("math500")], Console(file=printed))
    assert printed.getvalue().count("waiting") == 1


def test_questions_of_the_hub_are_announced_before_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.StringIO()
    before: list[str] = []

    def load(*_: object) -> list[Question]:
        before.append(printed.getvalue())
        return []

    monkeypatch.setattr(runner_module, "load_questions", load)
    for data_dir in (None, tmp_path):
        load_benchmarks([RunConfig("math500", data_dir=data_dir)], Console(file=printed))
    assert before == ["loading math500 from the hub: HuggingFaceH4/MATH-500\n"] * 2


@pytest.mark.parametrize(("limit", "words"), [(1, "1 sample"), (2, "2 samples")])
def test_the_opening_counts_samples(limit: int, words: str, config: RunConfig) -> None:
    _, printed = run(replace(config, num_samples=1, limit=limit), JobServer())
    assert f"sampling {words} in runs" in printed


NAMES = {
    "math500": ("math500",) * 2,
    "gpqa_diamond": ("gpqa_diamond",) * 2,
    "file:a_" + "long_name_" * 5: ("file:a…name_", "file:a_" + "long_name_" * 5),
    "file:数学" * 5: ("file:…e:数学", "file:数学" * 5),
}
"""Names of tasks, and how they are shown at 80 and at 160 columns."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("width", "num_failed", "figures"),
    [
        (60, 0, "1m02s left"),
        (80, 0, "66.7 % right, 1m02s left"),
        (80, 2, "66.7 % right, 1m02s left, 2 failed"),
        (100, 0, "66.7 % right, 64 running, 453 tokens/s, 1m02s left"),
        (160, 2, "66.7 % right, 64 running, 453 tokens/s, 1m02s left, 2 failed"),
    ],
)
def test_the_progress_of_a_terminal_is_one_line_of_the_most_important_figures(
    name: str, width: int, num_failed: int, figures: str, config: RunConfig
) -> None:
    running = InFlight(64, num_tokens=9000, running_s=(20.0,) * 64)
    servers = [replace(JobServer().as_server(), in_flight=lambda: running)]
    clock = [100.0]
    progress = progress_of(config, clock, failures=num_failed, servers=servers)
    progress._task, progress.total = name, 500
    clock[0] += 20
    progress.count((make_graded(0, num_tokens=60, latency_s=20.0),))
    progress._num_right, progress._num_judged = 2, 3
    text = progress.describe(width - BAR_WIDTH)
    if name == "math500" and (width, num_failed) == (80, 0):
        figures = "66.7 % right, 64 running, 1m02s left"
    assert text == f"{NAMES[name][width > 100]}:   1/500, {figures}"
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with show_progress(console, progress.total, text, completed=progress.done) as show:
        show(progress.done, text)
    assert text in console.file.getvalue()  # type: ignore[attr-defined]


def test_no_figure_of_a_terminal_comes_and_goes_with_its_digits() -> None:
    short = ("0.0 % right", "1 running", "0.4 tokens/s", "3 s left", "1 failed")
    long = ("66.7 % right", "64 running", "1,403 tokens/s", "1h02m left", "9 failed")
    names = ("right", "running", "speed", "left", "failed")
    for width in range(80):
        shown = [
            [word.split()[-1] for word in fitting(dict(zip(names, each, strict=True)), ROOM, width)]
            for each in (short, long)
        ]
        assert shown[0] == shown[1]
    assert len(shown[0]) == len(names)


def test_no_time_left_is_told_before_a_sample_has_ended(config: RunConfig) -> None:
    running = InFlight(2, num_tokens=1234, running_s=(20.0, 20.0))
    servers = [replace(JobServer().as_server(), in_flight=lambda: running)]
    progress = progress_of(config, clock := [100.0], servers=servers)
    assert progress.describe().endswith(": 0/15 samples, 2 running, 1,234 tokens")
    assert progress.describe(80 - BAR_WIDTH).endswith("2 running, 1,234 tokens")
    clock[0] += 20
    progress.count((make_graded(0, latency_s=20.0),))
    assert progress.describe().endswith(" left")
