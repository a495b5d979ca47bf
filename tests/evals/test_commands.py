"""`lim eval` and `lim grade` as command lines: what their words mean, and how they end."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import typer
from typer.testing import CliRunner

from lim_sglang.config import LimConfig
from lim_sglang.errors import ConfigError, DataError, ServerError, lim_command
from lim_sglang.evals import evaluate as evaluate_module
from lim_sglang.evals.commands import grade
from lim_sglang.evals.evaluate import evaluate
from lim_sglang.evals.run_config import RunConfig, task_settings
from lim_sglang.evals.run_store import Failure, GradedSample, Run, RunRecord, open_run
from lim_sglang.evals.runner import FinishedRun
from lim_sglang.evals.tasks import find_task
from lim_sglang.launch.server import ServerSpec
from lim_sglang.programs.schema import Access, Api, Sampling
from tests.builders import make_sample
from tests.evals.summaries import question, run
from tests.fakes.sglang_server import eventually
from tests.forked_commands import Forker

MODEL_OWN = {"temperature": None, "top_p": None, "top_k": None, "seed": None}
SLOW = r"\int_0^a x^{x^{x^x}} dx"
"""An expression that keeps math-verify busy until it gives up after five seconds."""


def call(command: Any, *words: object, further: tuple[str, ...] = ()) -> Any:
    """Call a command as the command line does; its errors come through."""
    app = typer.Typer()
    app.command()(command)
    found = CliRunner().invoke(app, [*map(str, words)], obj=further)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


class Runs:
    """Takes the place of `complete_runs`."""

    configs: Sequence[RunConfig] = ()
    urls: Sequence[str] = ()
    access = Access()
    finished: Sequence[FinishedRun] = ()

    def __call__(self, configs: Any, _: Any, urls: Any, access: Access, *__: Any) -> Any:
        self.configs, self.urls, self.access = configs, tuple(urls), access
        return self.finished


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.delenv("LIM_URL", raising=False)
    monkeypatch.delenv("LIM_API_KEY", raising=False)
    runs = Runs()
    monkeypatch.setattr(evaluate_module, "complete_runs", runs)
    monkeypatch.setattr(evaluate_module, "load_benchmarks", lambda *_: {})
    return runs


def test_without_options_it_is_four_samples_by_majority_on_a_local_server(runs: Runs) -> None:
    assert call(evaluate, "math500").exit_code == 0
    assert runs.configs == [RunConfig("math500", sampling={"max_tokens": 2048, **MODEL_OWN})]
    assert runs.configs[0].samples_per_question == 4
    assert runs.urls == ("http://127.0.0.1:30000",)
    assert runs.access == Access(
        api=Api.SGLANG, timeout_s=600.0, max_concurrency=64, command="lim eval"
    )


def test_every_option_arrives(runs: Runs) -> None:
    options = """
        --program adaptive --samples 16 --set confidence=0.9 --limit 3 --max-tokens 4096 --seed 7
        --temperature 0.8 --top-p 0.9 --top-k 40 --system Briefly. --thinking
        --thinking-budget 1000 --data-dir data --out runs/x --url a:1 --url b:2 --api-key k
        --timeout 60 --concurrency 8 --retry-failed
    """
    call(evaluate, "aime24", "file:my/own.jsonl", *options.split())
    given = {"max_tokens": 4096, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7}
    expected = RunConfig(
        task="aime24",
        program="adaptive",
        options={"confidence": 0.9},
        num_samples=16,
        system="Briefly.",
        thinking=True,
        thinking_budget=1000,
        sampling=given,
        limit=3,
        data_dir=Path("data"),
        out=Path("runs/x/aime24"),
        retry_failed=True,
    )
    own = replace(expected, task="file:my/own.jsonl", out=Path("runs/x/file-own"))
    assert runs.configs == [expected, own]
    assert runs.urls == ("http://a:1", "http://b:2")
    assert runs.access == Access(api_key="k", timeout_s=60.0, max_concurrency=8, command="lim eval")


def test_one_task_gets_the_folder_itself(runs: Runs) -> None:
    call(evaluate, "math500", "--out", "runs/x")
    assert [config.out for config in runs.configs] == [Path("runs/x")]
    call(evaluate, "math500", "aime24")
    assert [config.out for config in runs.configs] == [None, None]


def test_the_environment_names_several_servers(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIM_URL", " a:1,  b:2 ")
    call(evaluate, "math500")
    assert runs.urls == ("http://a:1", "http://b:2")
    call(evaluate, "math500", "--url", "c:3")
    assert runs.urls == ("http://c:3",)


def test_a_server_is_started_for_the_run_with_the_options_of_lim_serve(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []

    @contextmanager
    def serving(spec: ServerSpec, _: object) -> Iterator[str]:
        served.append(spec)
        yield "http://127.0.0.1:31999"
        served.append(runs.urls)

    monkeypatch.setattr(evaluate_module, "serving", serving)
    monkeypatch.setenv("LIM_URL", "http://another:1")  # as --url, which wins, too
    options = "--serve tiny --policy lessismore --budget 256 --lim-ranking mass --api-key k"
    call(evaluate, "math500", *options.split(), further=("--dtype", "half"))
    flags = {"--lim-policy": "lessismore", "--lim-budget": "256", "--lim-ranking": "mass"}
    assert served == [
        ServerSpec("tiny", flags, ("--dtype", "half"), "k", Sampling.max_tokens),
        ("http://127.0.0.1:31999",),
    ]


SERVED = ["tiny", "--lim-policy lessismore", "--lim-budget 256"]
LIM = {"config": LimConfig.from_mapping({"policy": "lessismore", "budget": 256}).settings()}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)

    @contextmanager
    def serving(*_: object) -> Iterator[str]:
        raise ServerError("a server starts")
        yield ""

    monkeypatch.setattr(evaluate_module, "serving", serving)


@pytest.mark.parametrize(
    ("words", "further", "served", "num_stored", "error", "message"),
    [
        ("", (), SERVED, 1, None, "run is complete: no server is started"),
        ("", ("--tp", "1"), [*SERVED, "--tp", "1"], 1, None, "no server is started"),
        ("", (), SERVED, 0, ServerError, "a server starts"),
        (
            "--max-tokens 128",
            (),
            SERVED,
            1,
            DataError,
            r"max_tokens \(--max-tokens\) was 160 and is now 128",
        ),
        ("--budget 512", (), SERVED, 1, DataError, r"budget \(--budget\) was 256 and is now 512"),
        ("--budget wide", (), SERVED, 1, ServerError, "a server starts"),
        ("--serve large", (), SERVED, 1, ServerError, "a server starts"),
        ("", ("--dtype", "half"), SERVED, 1, ServerError, "a server starts"),
        ("", (), [*SERVED, "--lim-select-layers 2"], 1, ServerError, "a server starts"),
        ("", (), None, 1, ServerError, "a server starts"),
    ],
)
def test_no_server_starts_for_a_stored_run_that_is_complete_or_another(
    words: str,
    further: tuple[str, ...],
    served: list[str] | None,
    num_stored: int,
    error: type[Exception] | None,
    message: str,
    runs: Runs,
    no_server: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = run(question("q", [0]))
    monkeypatch.setattr(evaluate_module, "finish_run", lambda run, *_: FinishedRun(run, scored))
    config = RunConfig("aime24", num_samples=1)
    settings = {**task_settings(config, find_task("aime24")), "sampling": {"max_tokens": 160}}
    settings |= {"lim": LIM, "questions": {"asked": 1}}
    with open_run(tmp_path / "run", RunRecord("run", settings, {"served": served})) as folder:
        for index in range(num_stored):
            folder.append(GradedSample("q", "7", True, make_sample(index, "7")))
    given = "aime24 --serve tiny --samples 1 --max-tokens 160 --policy lessismore --budget 256"
    command = (*given.split(), "--out", tmp_path / "run", *words.split())
    if error is None:
        shown = call(evaluate, *command, further=further)
        assert message in shown.stderr
        assert "lim report" in shown.stderr
    else:
        with pytest.raises(error, match=message):
            call(evaluate, *command, further=further)
    assert runs.configs == ()


@pytest.mark.parametrize(
    ("words", "further", "message"),
    [
        ("math500 --budget 256", (), "--budget needs --serve MODEL"),
        ("math500", ("--dtype", "half"), "what follows -- needs --serve MODEL"),
        ("math500 --budget 9 --policy full", (), "--policy and --budget need --serve MODEL"),
        ("math500 --serve tiny --url a:1", (), "--serve starts a server of its own"),
        ("math500 --set window", (), "--set takes NAME=VALUE"),
        ("math500 aime24 math500", (), "math500 is named twice"),
        ("", (), "name a task, such as math500 .*, or give --matrix FILE"),
        ("math500 --dry-run", (), "--only and --dry-run go with --matrix"),
        ("math500 --only full", (), "--only and --dry-run go with --matrix"),
        ("math500 --matrix tiny", (), "tasks: with --matrix, leave it out"),
        ("--matrix tiny --samples 4 --budget 9", (), "--samples, --budget: with --matrix, leave"),
        ("--matrix tiny", ("--dtype", "half"), "what follows --: with --matrix"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    words: str, further: tuple[str, ...], message: str, runs: Runs
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(evaluate, *words.split(), further=further)
    assert runs.urls == ()


@pytest.mark.parametrize("word", ["--budget", "--lim-budget"])
def test_an_option_without_its_server_is_named_as_typed(
    word: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lim", "eval", "math500", f"{word}=256"])
    with pytest.raises(ConfigError, match=f"^{word} "):
        call(evaluate, "math500", f"{word}=256")


@pytest.mark.parametrize(("policy", "pair"), [("full", "{} OTHER_RUN"), ("lim", "OTHER_RUN {}")])
def test_the_closing_hint_compares_with_the_dense_run_first(
    policy: str, pair: str, runs: Runs
) -> None:
    summary = run(question("q", [0, 1]), policy=policy)
    stored = [Run(Path(f"runs/{name}"), RunRecord(name, {}, {}), ()) for name in ("one", "two")]
    runs.finished = [FinishedRun(each, summary) for each in stored]
    shown = call(evaluate, "aime24", "math500").stderr
    assert "stored in runs/one and runs/two, each sample" in shown
    assert f"\n  {lim_command()} report runs/one runs/two\n" in shown
    assert f"\n  {lim_command()} compare {pair.format('runs/one runs/two')}\n" in shown


def test_ctrl_c_has_the_shells_exit_code(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "complete_runs", Mock(side_effect=KeyboardInterrupt))
    result = call(evaluate, "math500")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_samples_that_failed_are_told_for_each_task(runs: Runs) -> None:
    def finished(name: str, *errors: str) -> FinishedRun:
        failures = tuple(Failure("q", index, error) for index, error in enumerate(errors))
        return FinishedRun(Run(Path(name), RunRecord(name, {"task": name}, {}), (), failures), None)

    runs.finished = [finished("aime24"), finished("math500", "HTTP 400", "HTTP 503")]
    with pytest.raises(ServerError) as caught:
        call(evaluate, "aime24", "math500")
    assert "math500: 2 samples failed, the last with: HTTP 503" in str(caught.value)
    assert "aime24" not in str(caught.value)
    assert "--retry-failed tries them again" in str(caught.value)
    too_long = "HTTP 400: exceeds the model's maximum context length of 8192 tokens"
    runs.finished = [finished("math500", too_long, too_long)]
    with pytest.raises(ServerError, match="not scored; lower --max-tokens"):
        call(evaluate, "math500")


def write_run(path: Path, task: str, gold: str, *texts: str) -> Path:
    """Store a run whose samples are all wrong."""
    with open_run(path, RunRecord(path.name, {"task": task}, {})) as folder:
        for index, text in enumerate(texts):
            sample = replace(make_sample(index, None), text=text)
            folder.append(GradedSample("q", gold, False, sample))
    return path


def verdicts(run: Path) -> list[bool]:
    return [json.loads(line)["correct"] for line in (run / "grades.jsonl").read_text().splitlines()]


def test_each_run_is_graded_by_the_kind_of_its_task(tmp_path: Path) -> None:
    maths = write_run(tmp_path / "maths", "math500", r"\frac{1}{2}", r"\boxed{0.5}", r"\boxed{B}")
    choices = write_run(tmp_path / "own", "file:mine:choice", "B", r"\boxed{B) 0.5}", r"\boxed{C}")
    sheet = write_run(tmp_path / "sheet", "aime24", "7", r"\boxed{007}", r"\boxed{7.5}", "7")
    found = call(grade, maths, choices, sheet, "--workers", 1)
    assert found.exit_code == 0
    assert found.stdout.splitlines() == [
        f"{maths}: 1 of 2 right, 1 changed",
        f"{choices}: 1 of 2 right, 1 changed",
        f"{sheet}: 2 of 3 right, 2 changed",
    ]
    assert verdicts(maths) == [True, False]
    assert verdicts(choices) == [True, False]
    assert verdicts(sheet) == [True, False, True]
    again = call(grade, tmp_path, "--workers", 1)
    assert again.stdout.count(" 0 changed") == 3
    again = call(grade, choices, sheet, "--workers", 1)
    assert again.stdout.count(" 0 changed") == 2


def test_a_folder_without_a_run_is_refused_before_any_is_graded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "aime24", "7", r"\boxed{7}")
    (tmp_path / "empty").mkdir()
    for other in ("empty", "none"):
        with pytest.raises(ConfigError, match=rf"{other}.*(the|a) folder of a run"):
            call(grade, run, tmp_path / other)
    with pytest.raises(ConfigError, match="twice"):
        call(grade, run, tmp_path / "." / "run")
    (tmp_path / "empty" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="empty holds summaries alone"):
        call(grade, tmp_path / "empty")
    assert not list(tmp_path.rglob("grades.jsonl"))


def test_impossible_words_of_grade_are_refused(tmp_path: Path) -> None:
    assert call(grade).exit_code == call(grade, "--workers", "0", tmp_path).exit_code == 2
    unknown = write_run(tmp_path, "aime1924", "7", r"\boxed{7}")
    with pytest.raises(DataError, match="unknown task 'aime1924'; did you mean aime24"):
        call(grade, unknown)


def test_ctrl_c_ends_grading_at_once_with_its_workers_and_without_verdicts(
    forker: Forker, tmp_path: Path
) -> None:
    texts = [rf"\boxed{{{SLOW}+{number}}}" for number in range(20)]
    run = write_run(tmp_path / "run", "math500", "1", *texts)
    command = forker.start(tmp_path, "grade", str(run), "--workers", "1")
    lim = psutil.Process(command.pid)
    assert eventually(lambda: bool(lim.children()), 60), command.error
    workers = lim.children()
    command.interrupt()
    assert command.wait(10) == 130
    assert command.output == ""
    assert command.error.endswith("interrupted\n")
    assert "Traceback" not in command.error
    assert not (run / "grades.jsonl").exists()
    assert eventually(lambda: not any(worker.is_running() for worker in workers))
