"""`lim bench` on a machine without a GPU: what is refused, shown and kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lim_sglang.bench import decode, model_runner, serve, verify
from lim_sglang.bench.commands import bench
from lim_sglang.bench.decode import DecodeOptions
from lim_sglang.bench.results import SECTION
from lim_sglang.bench.serve import Load, ServeRow
from lim_sglang.bench.workloads import ModelChoice, Point
from lim_sglang.errors import ConfigError, DataError
from tests.bench.recorded import CONDITIONS, LINES, row, write

SHAPE = ("--shape", "qwen3-8b")


def run(*words: Any, further: tuple[str, ...] = ()) -> Any:
    return CliRunner().invoke(bench, [*map(str, words)], obj=further)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a GPU be there."""
    monkeypatch.setattr(verify, "require_gpu", lambda: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decode", "--point", "8x32k"), "either --shape"),
        (("decode", *SHAPE), "at least one point"),
        (("decode", *SHAPE, "--point", "1x1k", "--backends", "flashinfer"), "must name lim"),
        (("capacity",), "either --shape"),
        (("capacity", *SHAPE, "--backends", "lim,vllm"), "unknown backend vllm"),
        (("kernel", "--op", "sort"), "unknown --op sort"),
        (("serve",), "either --shape"),
        (("serve", *SHAPE, "--policies", "lim,vllm"), "unknown backend vllm"),
        (("serve", "--url", "localhost:1", *SHAPE), "--shape would change nothing"),
        (
            ("serve", "--url", "localhost:1", "--budget", "2048", "--policies", "lim"),
            "--policies, --budget would change nothing",
        ),
        (("serve", "--url", "http://10.0.0.7:30000"), "on another machine: run lim bench serve"),
    ],
)
def test_bad_use_is_refused_before_anything_starts(words: tuple[str, ...], message: str) -> None:
    error = run(*words).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


@pytest.mark.parametrize(
    "words", ["--budget 0", "--windows 0", "--steps 0", "--quantization awq", "--tp 0"]
)
def test_values_that_are_not_measured_are_refused(words: str) -> None:
    done = run("decode", *SHAPE, "--point", "1x1k", *words.split())
    assert (done.exit_code, words.split()[0] in done.output) == (2, True)


def test_decode_shows_and_keeps_each_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[DecodeOptions] = []
    out = tmp_path / "new" / "decode.jsonl"

    def measure(options: DecodeOptions, report: Any) -> Iterator[Any]:
        asked.append(options)
        report("Loading the model")
        yield row("flashinfer", "4x32k+4x1k", 21.0), CONDITIONS
        assert len(out.read_text().splitlines()) == 1
        yield row("lim", "4x32k+4x1k", 10.0), CONDITIONS

    monkeypatch.setattr(decode, "measure", measure)
    words = ("--point", "4x32k+4x1k", "--batch", "8", "--context", "512", "--no-split")
    words += ("--backends", "triton,lim,fa3,flashinfer", "--kv-cache-dtype", "fp8_e4m3")
    words += ("--context-limit", "131072", "--tp", "2")
    done = run("decode", *SHAPE, *words, "--out", out)
    assert done.exit_code == 0, done.exception
    assert done.stderr == "Loading the model\n"
    assert "4x32768+4x1024 lim: 10.000 ms a step" in done.stdout
    assert "| 21.00 | 10.00 | 2.10 |" in done.stdout
    assert "no prefill" in done.stdout
    assert '"lim"' in out.read_text().splitlines()[1]
    points = (Point((32768,) * 4 + (1024,) * 4), Point((512,) * 8))
    backends = ("lim", "triton", "fa3", "flashinfer")
    model = ModelChoice("qwen3-8b", None, "fp8_e4m3")
    options = DecodeOptions(model, points, backends, split=False, context_limit=131072, tp=2)
    assert asked == [options]


@pytest.mark.usefixtures("with_gpu")
def test_capacities_are_compared_with_dense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slots = {"lim": 388_000, "flashinfer": 391_000}
    out = tmp_path / "capacity.jsonl"
    monkeypatch.setattr(model_runner, "run_in_child", lambda _count, _model, name, *_: slots[name])
    shown = run("capacity", *SHAPE, "--quantization", "fp8", "--out", out).stdout
    assert "lim  388,000 tokens (99.23 % of dense)" in shown
    found = json.loads(out.read_text())
    assert found["kv_capacity"] == slots
    assert list(found["kv_capacity"]) == ["lim", "flashinfer"]
    assert found["conditions"].items() >= {"model": "qwen3-8b", "quantization": "fp8"}.items()


@pytest.mark.usefixtures("with_gpu")
def test_an_interrupted_count_of_capacities_has_shown_its_dense_backends_and_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slots = {"lim": 300, "flashinfer": 400, "triton": 100}
    out = tmp_path / "capacity.jsonl"

    def count(_count: Any, _model: Any, name: str, config: Any, *_: Any) -> int:
        if config.policy == "quest":
            raise KeyboardInterrupt
        return slots[name]

    monkeypatch.setattr(model_runner, "run_in_child", count)
    words = ("--backends", "lim,flashinfer,triton", "--policy", "quest", "--out", out)
    shown = [line.split() for line in run("capacity", *SHAPE, *words).stdout.splitlines()]
    assert [line[:2] for line in shown] == [
        ["flashinfer", "400"],
        ["triton", "100"],
        ["lim", "300"],
    ]
    assert ["75.00" in " ".join(line) for line in shown] == [False, False, True]
    assert not out.exists()


TIMES = {"p50": 1.0, "p99": 2.0}
SERVED = ServeRow("lim", 8, 100.0, 90.0, TIMES, TIMES, 0.5, 0, 800, 8.0, False, 700, 1.87)


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("verbose", [True, False])
def test_serve_shows_and_keeps_each_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verbose: bool
) -> None:
    asked: list[Any] = []
    out = tmp_path / "serve.jsonl"

    def measure(servers: Any, loads: Any, api_key: str | None) -> Iterator[Any]:
        asked.extend([list(servers), loads, api_key])
        yield SERVED, CONDITIONS

    monkeypatch.setattr(serve, "own_servers", lambda *arguments: iter([arguments]))
    monkeypatch.setattr(serve, "measure", measure)
    words = (*SHAPE, "--concurrency", "8", "--concurrency", "64", "--concurrency", "8")
    words += ("--new-tokens", "500", "--limit-seconds", "30", "--out", str(out))
    done = run("serve", *words, *["--verbose"] * verbose, further=("--kv-cache-dtype", "fp8_e5m2"))
    assert done.exit_code == 0, done.exception
    assert "| 8 | lim | 100 | 90 | 1.87 |" in done.stdout
    assert "lim, 8 requests: 100 tokens/s" in done.stderr
    ((model, policies, loads, budget, options, shown),), again, api_key = asked
    assert (model, policies) == (ModelChoice("qwen3-8b"), ("flashinfer", "lim"))
    assert (budget, api_key) == (2048, None)
    assert loads == again == [Load(8, 200, 500, 30.0), Load(64, 200, 500, 30.0)]
    assert options[:4] == ("--mem-fraction-static", "0.88", "--kv-cache-dtype", "fp8_e5m2")
    assert (shown, "--log-level" in options) == (verbose, not verbose)
    found = json.loads(out.read_text())
    assert (found["serve"]["policy"], found["conditions"]["dummy_weights"]) == ("lim", True)


@pytest.mark.parametrize("words", [SHAPE, ("--url", "127.0.0.1:1")])
def test_without_a_gpu_nothing_is_served(words: tuple[str, ...]) -> None:
    assert "needs an NVIDIA GPU" in str(run("serve", *words).exception)


@pytest.mark.usefixtures("with_gpu")
def test_a_running_server_is_measured_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measure(servers: Any, _loads: Any, api_key: str | None) -> Iterator[Any]:
        for server in servers:
            with server as running:
                asked.append((running.url, api_key))
        yield SERVED, CONDITIONS

    monkeypatch.setattr(serve, "measure", measure)
    done = run("serve", "--url", "localhost:30000", "--api-key", "secret")
    assert done.exit_code == 0, done.exception
    assert asked == [("http://localhost:30000", "secret")]
    error = run("serve", "--url", "127.0.0.1:30000", further=("--dtype", "half")).exception
    assert "--dtype, half would change nothing" in str(error)


def document(folder: Path, name: str) -> Path:
    """Write a Markdown file with a place for the section."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# Title\n\n{SECTION.begin}\n{SECTION.end}\n\nmore\n")
    return path


def test_report_writes_all_rows_the_proof_and_a_plot(tmp_path: Path) -> None:
    readme, results = document(tmp_path, "README.md"), document(tmp_path, "docs/results.md")
    plot = tmp_path / "docs" / "plots" / "decode.svg"
    file = write(tmp_path, *LINES, *({**LINES[0], "conditions": CONDITIONS | {"budget": 512}},))
    done = run("report", file, "--update", readme, "--results", results, "--plot", plot)
    assert done.exit_code == 0, done.exception
    assert plot.is_file()
    proof, everything = readme.read_text(), results.read_text()
    assert proof.startswith("# Title\n\n")
    assert proof.endswith("[All rows](docs/results.md).\n" + f"{SECTION.end}\n\nmore\n")
    assert proof.count("| 8 ") == 1
    assert everything.count("| 8 ") == 3  # two of the first table, one of the second
    assert "budget 512; B requests" in everything
    assert "![Step time over context](plots/decode.svg)" in everything
    assert run("report", file).stdout.startswith("| decode step")


def test_a_refused_report_writes_nothing(tmp_path: Path) -> None:
    readme, results = document(tmp_path, "README.md"), tmp_path / "results.md"
    results.write_text("no markers")
    before, plot = readme.read_text(), tmp_path / "decode.svg"
    words = ("--update", readme, "--results", results, "--plot", plot)
    done = run("report", write(tmp_path, *LINES), *words)
    assert isinstance(done.exception, DataError)
    assert readme.read_text() == before
    assert not plot.exists()
