"""`lim eval` as a command line: what its words mean, and how it ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.evals import commands as command_module
from lim_sglang.evals.commands import evaluate
from lim_sglang.evals.run_config import Method
from lim_sglang.evals.run_store import Failure
from lim_sglang.evals.runner import Evaluation
from lim_sglang.programs.schema import Access, Api
from lim_sglang.server import ServerSpec

MODEL_OWN = {"temperature": None, "top_p": None, "top_k": None, "seed": None}


class Runs:
    """Takes the place of `run_evaluation`."""

    def __init__(self) -> None:
        self.evaluation = Evaluation(())
        self.urls: tuple[str, ...] = ()
        self.access = Access()
        self.finished: list[Any] = []

    def __call__(
        self, evaluation: Evaluation, urls: Sequence[str], access: Access, *_: object
    ) -> list[Any]:
        self.evaluation, self.urls, self.access = evaluation, tuple(urls), access
        return self.finished


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.delenv("LIM_URL", raising=False)
    monkeypatch.delenv("LIM_API_KEY", raising=False)
    runs = Runs()
    monkeypatch.setattr(command_module, "run_evaluation", runs)
    return runs


def lim_eval(*words: str, further: tuple[str, ...] = ()) -> Any:
    """Call the command as the command line does; an error comes through."""
    app = typer.Typer()
    app.command()(evaluate)
    found = CliRunner().invoke(app, words, obj=further)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_without_options_it_is_four_samples_by_majority_on_a_local_server(runs: Runs) -> None:
    assert lim_eval("math500").exit_code == 0
    assert runs.evaluation == Evaluation(
        ("math500",), Method(4, "majority"), {"max_tokens": 2048, **MODEL_OWN}
    )
    assert runs.urls == ("http://127.0.0.1:30000",)
    assert runs.access == Access(api=Api.SGLANG, timeout_s=600.0, max_concurrency=64)


def test_every_option_arrives(runs: Runs) -> None:
    lim_eval(
        *("aime24", "file:mine.jsonl", "--program", "adaptive", "--samples", "16"),
        *("--set", "confidence=0.9", "--limit", "3", "--max-tokens", "4096", "--seed", "7"),
        *("--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--system", "Be brief."),
        *("--thinking", "--thinking-budget", "1000", "--data-dir", "data", "--out", "runs/x"),
        *("--url", "a:1", "--url", "b:2", "--api-key", "k", "--timeout", "60"),
        *("--concurrency", "8", "--retry-failed"),
    )
    method = Method(16, "adaptive", {"confidence": 0.9}, "Be brief.", True, 1000)
    sampling = {
        "max_tokens": 4096,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 7,
    }
    assert runs.evaluation == Evaluation(
        ("aime24", "file:mine.jsonl"), method, sampling, 3, Path("data"), Path("runs/x"), True
    )
    assert runs.urls == ("http://a:1", "http://b:2")
    assert runs.access == Access(api_key="k", timeout_s=60.0, max_concurrency=8)


@pytest.mark.parametrize(
    ("program", "expected"), [("single", 1), ("short", 8), ("confidence", 32), ("budget", 40)]
)
def test_a_program_draws_as_many_samples_as_suit_it(
    program: str, expected: int, runs: Runs
) -> None:
    lim_eval("math500", "--program", program)
    assert runs.evaluation.method.num_samples == expected


@pytest.mark.parametrize("urls", ["http://a:1 http://b:2", "a:1,b:2", " a:1,  b:2 "])
def test_the_environment_names_several_servers(
    urls: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIM_URL", urls)
    lim_eval("math500")
    assert runs.urls == ("http://a:1", "http://b:2")
    lim_eval("math500", "--url", "c:3")
    assert runs.urls == ("http://c:3",)


def test_a_server_is_started_for_the_run_with_what_lim_serve_takes(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []

    @contextmanager
    def serving(spec: ServerSpec, _: object) -> Iterator[str]:
        served.append(spec)
        yield "http://127.0.0.1:31999"
        served.append(runs.urls)

    monkeypatch.setattr(command_module, "serving", serving)
    lim_eval(
        *("math500", "--serve", "tiny", "--policy", "lessismore", "--budget", "256"),
        *("--lim-ranking", "mass", "--api-key", "k"),
        further=("--dtype", "half"),
    )
    flags = {"--lim-policy": "lessismore", "--lim-budget": "256", "--lim-ranking": "mass"}
    assert served == [
        ServerSpec("tiny", flags, ("--dtype", "half"), "k"),
        ("http://127.0.0.1:31999",),
    ]
    with pytest.raises(ConfigError, match="--serve starts a server of its own"):
        lim_eval("math500", "--serve", "tiny", "--url", "a:1")


@pytest.mark.parametrize(
    ("words", "further", "message"),
    [
        (["--budget", "256"], (), "--lim-budget: options of a server that --serve MODEL"),
        ([], ("--dtype", "half"), "what follows --: options of a server"),
        (["--program", "oracle"], (), "unknown program 'oracle'"),
        (["--set", "window"], (), "--set takes NAME=VALUE"),
        (["--url", "a:1", "--url", "a:1"], (), "named twice"),
        (["--thinking-budget", "2048"], (), "leaves nothing of max_tokens 2,048 to answer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], further: tuple[str, ...], message: str, runs: Runs
) -> None:
    with pytest.raises(ConfigError, match=message):
        lim_eval("math500", *words, further=further)
    assert runs.urls == ()


def test_ctrl_c_has_the_shells_exit_code(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module, "run_evaluation", interrupt)
    assert lim_eval("math500").exit_code == 130


def test_samples_that_failed_are_told_for_each_task(runs: Runs) -> None:
    def finished(name: str, *errors: str) -> Any:
        failures = tuple(Failure("q", index, error) for index, error in enumerate(errors))
        task = SimpleNamespace(name=name)
        plan = SimpleNamespace(request=SimpleNamespace(asked=SimpleNamespace(task=task)))
        return SimpleNamespace(plan=plan, outcome=SimpleNamespace(failures=failures))

    runs.finished = [finished("aime24"), finished("math500", "HTTP 400", "HTTP 503")]
    with pytest.raises(ServerError) as caught:
        lim_eval("aime24", "math500")
    assert "math500: 2 samples failed, the last with: HTTP 503" in str(caught.value)
    assert "aime24" not in str(caught.value)
    assert "--retry-failed draws them again" in str(caught.value)
