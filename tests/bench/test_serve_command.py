"""`lim bench serve` as it is typed: what it refuses, shows and keeps."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lim_sglang.bench import gate, serve_command
from lim_sglang.bench import serve as serve_module
from lim_sglang.bench.command import bench
from lim_sglang.bench.load import Load, ServeOptions
from lim_sglang.errors import ConfigError, LimError, RefusedError
from tests.bench.test_serve_rows import CONDITIONS, profiled_row, row_of


def run(*words: str, further: tuple[str, ...] = ()) -> Any:
    """What the command does."""
    return CliRunner().invoke(bench, ["serve", *words], obj=further)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --shape"),
        (("--shape", "qwen9"), "unknown shape 'qwen9'"),
        (("--shape", "qwen3-8b", "--policies", "lim,vllm"), "unknown backend vllm"),
        (("--url", "localhost:1", "--shape", "qwen3-8b"), "--shape would change nothing"),
        (
            ("--url", "localhost:1", "--budget", "2048", "--policies", "lim"),
            "--policies, --budget would change nothing",
        ),
        (("--url", "http://10.0.0.7:30000"), "on another machine: run lim bench serve there"),
        (("--shape", "qwen3-8b", "--timeline-svg", "x.svg"), "give --timeline 50, too"),
        (("--url", "localhost:1", "--timeline", "5", "--timeline-svg", "."), ". is a folder"),
        (("--url", "localhost:1", "--timeline", "5", "--new-tokens", "90"), "use more --new-tok"),
    ],
)
def test_bad_use_is_refused_before_anything_starts(words: tuple[str, ...], message: str) -> None:
    error = run(*words).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_options_of_a_server_that_runs_already_are_refused() -> None:
    error = run("--url", "127.0.0.1:30000", further=("--dtype", "half")).exception
    assert "options after -- would change nothing" in str(error)


@pytest.mark.parametrize(
    ("further", "messages"),
    [
        (
            ("--port", "5", "--attention-backend=fa3"),
            ("--port after --: lim bench serve chooses it", "served by fa3"),
        ),
        (("--api-key", "x", "--ssl-keyfile=y"), ("--api-key after", "--ssl-keyfile after")),
        (("--lim-sinks=8",), ("--lim-sinks after --: a dense server takes none of these",)),
        ((), ("unknown LessIsMore setting 'top_k'",)),
    ],
)
def test_servers_that_would_not_start_are_refused_with_all_reasons(
    monkeypatch: pytest.MonkeyPatch, further: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    if not further:
        monkeypatch.setenv("LIM_CONFIG", '{"top_k": 5}')
    error = run("--shape", "qwen3-8b", further=further).exception
    assert isinstance(error, RefusedError)
    for message in messages:
        assert message in str(error)


@pytest.mark.parametrize("words", [("--shape", "qwen3-8b"), ("--url", "127.0.0.1:1")])
def test_without_a_gpu_nothing_is_measured(words: tuple[str, ...]) -> None:
    error = run(*words).exception
    assert isinstance(error, LimError)
    assert "needs an NVIDIA GPU: on a CPU, timings prove nothing" in str(error)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were one; signals are as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(gate, "require_gpu", lambda: None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("on_a_gpu")
def test_rows_are_kept_as_they_come_and_shown_as_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[ServeOptions] = []
    out = tmp_path / "serve.jsonl"

    def measure(options: ServeOptions, _report: Any) -> Iterator[Any]:
        asked.append(options)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        yield row_of(policy="flashinfer"), CONDITIONS
        assert len(out.read_text().splitlines()) == 1
        yield row_of(speedup=1.87, waiting=2), CONDITIONS

    monkeypatch.setattr(serve_module, "measure", measure)
    words = ("--shape", "qwen3-8b", "--concurrency", "8", "--concurrency", "64")
    words += ("--new-tokens", "500", "--limit-seconds", "30", "--out", str(out))
    done = run(*words, further=("--kv-cache-dtype", "fp8_e5m2"))
    assert done.exit_code == 0, done.exception
    assert "1.87" in done.output
    assert "c0ffee" in done.output
    assert "warning: lim, 2 requests: the KV cache had no room" in done.output
    (chosen,) = asked
    assert [load.concurrency for load in chosen.loads] == [8, 64]
    assert chosen.loads[0] == Load(8, 200, 500, 30.0)
    assert (chosen.policies, chosen.budget) == (("flashinfer", "lim"), 2048)
    assert chosen.sglang_options == ("--kv-cache-dtype", "fp8_e5m2")
    policies = [json.loads(line)["serve"]["policy"] for line in out.read_text().splitlines()]
    assert policies == ["flashinfer", "lim"]


@pytest.mark.usefixtures("on_a_gpu")
def test_a_running_server_is_measured_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measure(
        client: Any, loads: Any, _report: Any, api_key: str | None, *, steps: int
    ) -> Iterator[Any]:
        asked.append((client.url, [load.concurrency for load in loads], api_key, steps))
        yield row_of(), CONDITIONS

    monkeypatch.setattr(serve_module, "measure_running", measure)
    done = run("--url", "localhost:30000", "--api-key", "secret", "--timeline", "20")
    assert done.exit_code == 0, done.exception
    assert asked == [("http://localhost:30000", [64], "secret", 20)]


@pytest.mark.usefixtures("on_a_gpu")
def test_timelines_are_shown_and_drawn_as_they_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    picture = tmp_path / "plots" / "timeline.svg"

    def measure(options: ServeOptions, _report: Any) -> Iterator[Any]:
        asked.append(options.timeline)
        yield row_of(policy="flashinfer", timeline_error="no trace"), CONDITIONS
        assert not picture.exists()
        yield profiled_row(), CONDITIONS
        assert "lim, 2 requests" in picture.read_text()

    monkeypatch.setattr(serve_module, "measure", measure)
    words = ("--shape", "qwen3-8b", "--timeline", "10", "--timeline-svg", str(picture))
    done = run(*words)
    assert done.exit_code == 0, done.exception
    assert asked == [10]
    assert "lim, 2 requests: GPU busy 98.0 % over 10 steps" in done.output
    assert "warning: flashinfer, 2 requests: no timeline: no trace" in done.output


def test_a_profiler_that_a_server_would_die_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PROFILE_V2", "1")
    error = run("--shape", "qwen3-8b", "--timeline", "10").exception
    assert isinstance(error, RefusedError)
    assert "SGLANG_PROFILE_V2 is set" in str(error)


def test_the_options_that_need_a_server_of_ours_exist() -> None:
    names = set(serve_command.OF_OUR_SERVERS.values())
    assert all(name in run("--help").output for name in names)
