"""`lim bench serve`: its servers, and what keeps a row from being shown."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.bench import serve
from lim_sglang.bench.driver import Glance, Occupancy
from lim_sglang.bench.load import Load, ServeOptions
from lim_sglang.bench.points import ModelChoice
from lim_sglang.bench.progress import Progress
from lim_sglang.errors import LimError, ModelError, ServerError
from lim_sglang.programs.http_client import Client
from lim_sglang.server import Server
from tests.bench.streaming_server import StreamingServer, steadily, streaming

LOAD = Load(concurrency=2, prompt_tokens=10, new_tokens=81)
SILENT = Progress(lambda _text: None, lambda _text: None, lambda _share, _text: None)
BUDGET = 50


def info(policy: str = "lim", sparse_rows: int = 0) -> dict[str, Any]:
    """What a server says of itself."""
    state: dict[str, Any] = {"memory_usage": {"token_capacity": 1000}}
    if policy == "lim":
        roles = ["full", "select", "reuse"]
        state["lim"] = {
            "config": {"budget": BUDGET},
            "roles": roles,
            "sparse_rows": sparse_rows,
        }
    return {
        "model_path": "/models/x",
        "version": "0.5.16",
        "attention_backend": policy,
        "stream_interval": 1,
        "device": "cuda",
        "internal_states": [state],
    }


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is read."""
    monkeypatch.setattr(serve, "vocabulary", lambda _path: 1000)


def counting(server: StreamingServer, sparse_rows: int) -> None:
    """Let the server count sparse rows while it streams."""
    plain = server.stream

    def stream(body: dict[str, Any]) -> Iterator[Any]:
        server.info = info("lim", sparse_rows)
        yield from plain(body)

    server.stream = stream


def test_a_running_server_is_emptied_driven_and_described() -> None:
    with streaming(steadily(), info=info("flashinfer")) as server, Client(server.url) as client:
        row, _, facts = serve.measure_load(client, LOAD, [], SILENT)
    assert server.asked[0].startswith("/flush_cache")
    assert (row.policy, row.concurrency, row.sparse_rows) == ("flashinfer", 2, None)
    assert row.num_tokens <= 160
    assert (facts["kv_capacity"], facts["lim_config"], facts["new_tokens"]) == (1000, None, 81)
    assert facts["server"]["attention_backend"] == "flashinfer"


# Each request decodes tokens 2 to 81, in rows of 11 to 90 tokens: 40 of them beyond the budget.
@pytest.mark.parametrize(("counted", "is_it"), [(80, True), (79, False), (0, False)])
def test_a_row_of_ours_needs_as_many_sparse_rows_as_there_were_long_ones(
    counted: int, is_it: bool
) -> None:
    with streaming(steadily(), info=info("lim")) as server, Client(server.url) as client:
        counting(server, counted)
        if is_it:
            row, _, facts = serve.measure_load(client, LOAD, [], SILENT)
            assert (row.policy, row.sparse_rows) == ("lim", 80)
            assert facts["lim_config"] == {"budget": BUDGET}
            return
        with pytest.raises(LimError, match="no time is shown: 2 requests decoded 80 tokens"):
            serve.measure_load(client, LOAD, [], SILENT)


def test_a_busy_server_is_not_measured() -> None:
    with (
        streaming(steadily(), info=info(), busy=True) as server,
        Client(server.url) as client,
        pytest.raises(ServerError, match=r"has to be idle before it is measured: .*pending"),
    ):
        serve.measure_load(client, LOAD, [], SILENT)
    assert not server.requests


def test_the_run_is_shown_while_it_goes_on() -> None:
    shown: list[tuple[float, str]] = []
    report = replace(SILENT, advancing=lambda share, text: shown.append((share, text)))
    watch = serve.watcher("lim, 2 requests", replace(LOAD, limit_s=10.0), report)
    watch(Glance(0, 0.0, None))
    watch(Glance(81, 2.0, Occupancy(0.0, 2, 1, 500, 0.5)))
    watch(Glance(90, 9.0, None))
    assert shown == [
        (0.5, "lim, 2 requests: 40 tokens/s, KV cache 50 %, 2 running, 1 waiting"),
        (0.9, "lim, 2 requests: 10 tokens/s"),
    ]


OPTIONS = ServeOptions(ModelChoice("qwen3-1.7b", None), (LOAD,), ("flashinfer", "lim"), BUDGET, 0.8)


def test_one_server_a_policy_is_driven_dense_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    with streaming(steadily()) as fake:

        @contextmanager
        def started(_options: ServeOptions, policy: str, folder: str) -> Iterator[Any]:
            assert json.loads((Path(folder) / "config.json").read_text())["model_type"] == "qwen3"
            fake.info = info(policy)
            counting(fake, 80) if policy == "lim" else None
            said.append(policy)
            yield fake

        monkeypatch.setattr(serve, "started", started)
        monkeypatch.setattr(serve, "run_apart", lambda _what, _call: {"commit": "c0ffee"})
        found = list(serve.measure(OPTIONS, SILENT))
    assert said == ["flashinfer", "lim"]
    (dense, _), (ours, conditions) = found
    assert (dense.policy, dense.speedup) == ("flashinfer", None)
    assert ours.policy == "lim"
    assert ours.speedup == pytest.approx(1.0, abs=0.7)
    assert (conditions["commit"], conditions["model"]) == ("c0ffee", "qwen3-1.7b")
    assert conditions["dummy_weights"]


def test_nothing_starts_before_the_kernels_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_what: str, _call: Any) -> Any:
        raise LimError("no time is shown: kernels are not exact on this GPU")

    monkeypatch.setattr(serve, "run_apart", fail)
    monkeypatch.setattr(serve, "started", None)
    with pytest.raises(LimError, match="not exact"):
        next(serve.measure(OPTIONS, SILENT))
    with pytest.raises(LimError, match="not exact"):
        next(serve.measure_running(None, (LOAD,), SILENT, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["lim", "flashinfer"])
def test_a_server_is_one_of_the_policy_and_ends_with_its_block(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Server, "start", lambda self: seen.append(self.options))
    monkeypatch.setattr(Server, "wait_until_ready", lambda _self: {})
    monkeypatch.setattr(Server, "stop", lambda _self: seen.append("stopped"))
    with serve.started(OPTIONS, policy, "/models/x"):
        assert len(seen) == 1
    assert seen[1] == "stopped"
    words = seen[0].command_line()
    assert words[words.index("--attention-backend") + 1] == policy
    assert ("--lim-budget=50" in words) == (policy == "lim")
    assert "--load-format" in words


def test_a_server_that_does_not_start_shows_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(self: Any) -> None:
        with open(self._log, "wb", closefd=False) as log:
            log.write(b"loading\nCUDA out of memory")
        raise ServerError("the server ended with code 1")

    monkeypatch.setattr(Server, "start", start)
    with (
        pytest.raises(ServerError, match="code 1\nloading\nCUDA out of memory"),
        serve.started(OPTIONS, "lim", "/models/x"),
    ):
        pass


def test_a_model_that_is_elsewhere_has_no_vocabulary_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ModelError, match="cannot be read"):
        serve.vocabulary(folder)


def test_a_shape_s_folder_has_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with serve.model_folder(ModelChoice("qwen3-1.7b", None), 100) as folder:
        assert serve.vocabulary(folder) == 151936
