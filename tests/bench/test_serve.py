"""`lim bench serve`: its figures, the proof of sparsity, its servers; and a real server's load."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from lim_sglang.bench import serve
from lim_sglang.bench.serve import HEAD_START, Load
from lim_sglang.bench.workloads import ModelChoice
from lim_sglang.errors import ConfigError, LimError, RefusedError
from lim_sglang.launch.server import local_client
from tests.processes import LocalServer

LOAD = Load(concurrency=2, prompt_tokens=10, new_tokens=81)
BUDGET = 50


def output(*itl: float, start: float = 100.0, ttft: float = 1.0, **fields: Any) -> Any:
    """Return an output of SGLang's benchmark client."""
    found = {"start_time": start, "ttft": ttft, "itl": list(itl), "output_len": len(itl) + 1}
    return SimpleNamespace(**(found | {"success": True, "error": ""} | fields))


def steady(wait_s: float = 0.1, num_tokens: int = 81, start: float = 100.0) -> Any:
    """Return an output of tokens at one pace."""
    return output(*[wait_s] * (num_tokens - 1), start=start)


NOTHING = output(ttft=0.0, output_len=81)
"""A request that was aborted before its first token; the client then gives the wanted length."""


@pytest.mark.parametrize(
    ("outputs", "seconds", "num_tokens"),
    [
        # From the last first token, at 13.0; each stream's first token is not counted.
        ([steady(start=10.0), steady(start=10.5), steady(start=12.0)], 8.0, 80 + 65 + 60),
        # A stream that waited for room does not move the start.
        ([steady(num_tokens=2 * HEAD_START), steady(start=106.4)], 6.4 + 8.0, 127 + 80),
        # Short streams settle with their last token.
        ([output(1.0, 1.0, start=1.0), output(1.0, 1.0, start=2.5)], 2.0, 3),
    ],
)
def test_the_window_begins_when_all_that_began_together_have_their_first_token(
    outputs: list[Any], seconds: float, num_tokens: int
) -> None:
    arrivals, _, found = serve.measured_window(outputs)
    assert (found, len(arrivals)) == (pytest.approx(seconds), num_tokens)
    assert (arrivals > 0).all()
    assert arrivals[-1] == pytest.approx(seconds)


@pytest.mark.parametrize("outputs", [[], [NOTHING], [output(), output(start=101.0)]])
def test_first_tokens_alone_are_no_window(outputs: list[Any]) -> None:
    with pytest.raises(LimError, match="too few tokens came"):
        serve.measured_window(outputs)


def test_a_wait_that_began_before_the_window_is_no_latency() -> None:
    # The second stream's first token comes at 103.0, in the middle of the first one's long wait.
    _, latencies, _ = serve.measured_window([output(5.0, 0.25), output(0.5, start=102.0)])
    assert latencies.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("values", "p50", "p99"),
    [
        ([0.01] * 99 + [1.0], 10.0, 10.0),
        ([0.01] * 98 + [1.0, 2.0], 10.0, 1000.0),
        ([0.5], 500.0, 500.0),
    ],
)
def test_a_percentile_is_a_measured_value(values: list[float], p50: float, p99: float) -> None:
    assert serve.percentiles_ms(values) == {"p50": pytest.approx(p50), "p99": pytest.approx(p99)}


@pytest.mark.parametrize(
    ("dense", "ours", "expected"),
    [
        ([1.0, 2.0, 3.0], [0.5, 1.0, 1.5], 2.0),
        # A cut run is compared over the tokens that both have decoded, at the same contexts: ours
        # was fast at first, and slow at contexts that the dense run did not reach in its time.
        ([1.0, 2.0], [0.5, 1.0, 7.0, 9.0], 2.0),
        ([1.0, 2.0, 3.0], [0.5], 2.0),
    ],
)
def test_runs_are_compared_over_the_same_number_of_tokens(
    dense: list[float], ours: list[float], expected: float
) -> None:
    assert serve.equal_token_speedup(np.array(dense), np.array(ours)) == pytest.approx(expected)


def row_of(*outputs: Any, counted: Any = None, dense: Any = ()) -> Any:
    """Return the row of a run under `LOAD`."""
    policy = "lim" if counted else "flashinfer"
    return serve.make_row(policy, LOAD, outputs, 1000, counted, list(dense))


def test_a_row_is_the_summary_of_its_run() -> None:
    row = row_of(steady(), steady(), counted=(70, 0))
    assert (row.policy, row.concurrency, row.num_tokens, row.cut) == ("lim", 2, 160, False)
    assert (row.seconds, row.tokens_per_s) == (pytest.approx(8.0), pytest.approx(20.0))
    assert row.last_tokens_per_s == pytest.approx(20.0, rel=0.03)
    assert row.itl_ms == {"p50": pytest.approx(100.0), "p99": pytest.approx(100.0)}
    assert row.ttft_ms == {"p50": 1000.0, "p99": 1000.0}
    assert row.kv_needed_share == pytest.approx(2 * (10 + 81) / 1000)
    assert (row.sparse_rows, row.retractions, row.speedup) == (70, 0, None)


def test_the_end_of_a_run_has_a_speed_of_its_own_and_a_cut_run_counts_what_came() -> None:
    slower = output(*[0.1] * 40, *[0.2] * 40)
    assert row_of(slower, slower).last_tokens_per_s == pytest.approx(10.0, rel=0.03)
    row = row_of(steady(num_tokens=40), NOTHING)
    assert (row.cut, row.num_tokens) == (True, 39)
    assert row.kv_needed_share == pytest.approx((2 * 10 + 40) / 1000)


@pytest.mark.parametrize(
    ("dense_capacity", "retractions", "speedup"),
    [(1000, 0, 2.0), (182, 0, 2.0), (181, 0, None), (1000, 1, None)],
)
def test_runs_are_not_compared_if_a_request_may_have_been_retracted(
    dense_capacity: int, retractions: int, speedup: float | None
) -> None:
    # Both requests need 182 slots at their end: a dense server does not count its retractions.
    dense: list[Any] = []
    first = serve.make_row("flashinfer", LOAD, [steady(0.3)] * 2, dense_capacity, None, dense)
    second = serve.make_row("triton", LOAD, [steady(0.2)] * 2, dense_capacity, None, dense)
    assert {first.retractions, second.retractions} == {0 if dense_capacity > 181 else None}
    ours = row_of(steady(), steady(), counted=(70, retractions), dense=dense)
    assert ours.speedup == (speedup and pytest.approx(speedup))
    assert (first.speedup, second.speedup) == (None, None)


def test_a_table_has_a_line_per_row_by_concurrency() -> None:
    row = replace(row_of(steady(), steady(), counted=(70, 0)), speedup=1.5)
    unknown = replace(row, concurrency=1, policy="flashinfer", retractions=None, speedup=None)
    lines = serve.serve_table([row, replace(unknown, cut=True)]).splitlines()
    assert lines[2].startswith("| 1 | flashinfer | 20 | 20 | - | 1,000 | 1,000 | 100.00 | 100.00 |")
    assert lines[2].endswith("| 18 % | unknown | 8.0 | cut |")
    assert lines[3].startswith("| 2 | lim | 20 | 20 | 1.50 |")


STATE = {"config": {"budget": BUDGET}, "roles": ["full", "select", "reuse"]}


# Each request decodes tokens 2 to 81, in rows of 11 to 90 tokens: 40 of them beyond the budget.
@pytest.mark.parametrize(
    ("state", "sparse_rows", "retractions", "is_sparse"),
    [
        (STATE, 80, 0, True),
        (STATE, 79, 0, False),
        (STATE, 0, 0, False),
        (STATE, 79, 1, True),  # prefill gives the next token after a retraction
        (STATE | {"roles": ["full", "full"]}, 0, 0, True),
    ],
)
def test_our_row_needs_as_many_sparse_rows_as_there_were_long_ones(
    state: dict[str, Any], sparse_rows: int, retractions: int, is_sparse: bool
) -> None:
    refused = pytest.raises(LimError, match="no time is shown: 2 requests decoded 80 tokens beyond")
    with nullcontext() if is_sparse else refused:
        serve.check_sparse(LOAD, [steady(), steady(), NOTHING], state, sparse_rows, retractions)


def info(policy: str, sparse_rows: int) -> dict[str, Any]:
    lim = {"lim": STATE | {"sparse_rows": sparse_rows, "retractions": 0}}
    state = {"memory_usage": {"token_capacity": 1000}} | (lim if policy == "lim" else {})
    return {"model_path": "/models/x", "attention_backend": policy, "internal_states": [state]}


@contextmanager
def fake_server(
    monkeypatch: pytest.MonkeyPatch, policy: str, sparse_rows: int = 80, pace_s: float = 0.1
) -> Iterator[httpx.Client]:
    """Provide a client of a server whose requests end at once."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if request.url.path == "/flush_cache":
            return httpx.Response(400 if policy == "busy" else 200, text="pending requests")
        grown = sparse_rows if "generate" in asked else 0
        return httpx.Response(200, json=info(policy, 5 + grown))

    async def generate(_http: httpx.Client, load: Load) -> list[Any]:
        asked.append("generate")
        return [steady(pace_s)] * load.concurrency

    monkeypatch.setattr(serve, "generate", generate)
    with httpx.Client(base_url="http://fake", transport=httpx.MockTransport(answer)) as http:
        yield http
    assert policy == "busy" or asked == ["/flush_cache", "/server_info", "generate", "/server_info"]


@pytest.mark.parametrize("policy", ["lim", "flashinfer"])
def test_a_server_is_emptied_loaded_and_described(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    with fake_server(monkeypatch, policy) as http:
        row, facts = serve.measure_load(http, LOAD, [])
    assert (row.policy, row.sparse_rows) == (policy, 80 if policy == "lim" else None)
    assert (facts["kv_capacity"], facts["new_tokens"]) == (1000, 81)
    assert facts["server"]["attention_backend"] == policy
    assert facts["lim_config"] == ({"budget": BUDGET} if policy == "lim" else None)


@pytest.mark.parametrize(
    ("policy", "words"),
    [("busy", "refuses: pending requests; is it busy"), ("lim", "no time is shown")],
)
def test_a_server_that_is_busy_or_not_sparse_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, policy: str, words: str
) -> None:
    server = fake_server(monkeypatch, policy, sparse_rows=79)
    with server as http, pytest.raises(LimError, match=words):
        serve.measure_load(http, LOAD, [])


def test_servers_run_one_after_the_other_and_ours_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    monkeypatch.setattr(serve, "run_in_child", lambda check: did.append(check.__name__))
    monkeypatch.setattr(serve, "local_client", lambda http, *_: nullcontext(http))

    @contextmanager
    def server(policy: str, pace_s: float) -> Iterator[Any]:
        with fake_server(monkeypatch, policy, pace_s=pace_s) as http:
            did.append(policy)
            yield SimpleNamespace(url=http)
            did.append("ended")

    servers = [server("flashinfer", 0.2), server("lim", 0.1)]
    (dense, _), (ours, conditions) = list(serve.measure(servers, [LOAD], None))
    assert did == ["require_exact_kernels", "flashinfer", "ended", "lim", "ended"]
    assert (dense.policy, dense.speedup) == ("flashinfer", None)
    assert (ours.policy, ours.speedup) == ("lim", pytest.approx(2.0))
    assert conditions["kernels_exact"]
    assert {"date", "commit", "versions", "notes", "kv_capacity", "concurrency"} <= set(conditions)


def started(monkeypatch: pytest.MonkeyPatch, model: ModelChoice, *words: str) -> list[Any]:
    """Return the options with which servers of two policies would be started."""
    monkeypatch.setattr(serve, "running_server", lambda options, *_, **__: options)
    return list(
        serve.own_servers(model, ["flashinfer", "lim"], [LOAD, Load(64)], BUDGET, words, False)
    )


def test_all_servers_have_the_same_options_and_the_users_come_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, ours = started(monkeypatch, ModelChoice("qwen3-1.7b"), "--kv-cache-dtype", "fp8_e5m2")
    assert dense.sglang_options == ours.sglang_options
    words = list(ours.sglang_options)
    assert words[words.index("--load-format") + 1] == "dummy"
    assert words[words.index("--cuda-graph-max-bs-decode") + 1] == "64"
    assert words[words.index("--max-running-requests") + 1] == "65"  # with 64, one of 64 waited
    assert "--incremental-streaming-output" in words
    assert words[-2:] == ["--kv-cache-dtype", "fp8_e5m2"]
    assert (dense.backend, dense.lim_flags) == ("flashinfer", ())
    assert (ours.backend, ours.lim_flags) == ("lim", ("--lim-budget=50",))


def test_servers_that_would_not_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIM_CONFIG", '{"top_k": 5}')
    with pytest.raises(RefusedError) as caught:
        started(monkeypatch, ModelChoice("qwen3-1.7b"), "--port", "5", "--attention-backend=fa3")
    for reason in ("--port after --", "served by fa3", "unknown LessIsMore setting 'top_k'"):
        assert reason in str(caught.value)
    with pytest.raises(ConfigError, match="--lim-ranking=mass would go to dense servers, too"):
        started(monkeypatch, ModelChoice("qwen3-1.7b"), "--lim-ranking=mass")


@pytest.mark.e2e
def test_a_real_servers_load_is_measured_by_sglangs_client(tiny_server: LocalServer) -> None:
    load = Load(concurrency=3, prompt_tokens=300, new_tokens=40)
    with local_client(tiny_server.url, timeout_s=2 * serve.FLUSH_S) as http:
        row, facts = serve.measure_load(http, load, [])
    assert (row.policy, row.concurrency, row.cut, row.retractions) == ("lim", 3, False, 0)
    # All tokens but the first of each stream, and those that came while others were prefilled.
    assert 3 <= row.num_tokens <= 3 * 39
    assert row.sparse_rows == 3 * 40  # SGLang runs one step more for a request that has ended
    assert row.tokens_per_s == pytest.approx(row.num_tokens / row.seconds)
    assert 0 < row.itl_ms["p50"] <= row.itl_ms["p99"] <= 1e3 * row.seconds
    assert facts["kv_capacity"] == 16384
    assert row.kv_needed_share == pytest.approx(3 * 340 / 16384)


@pytest.mark.e2e
def test_a_cut_run_leaves_nothing_behind(tiny_server: LocalServer) -> None:
    load = Load(concurrency=3, prompt_tokens=50, new_tokens=3900, limit_s=8.0, stream_interval=2)
    with local_client(tiny_server.url, timeout_s=2 * serve.FLUSH_S) as http:
        row, _ = serve.measure_load(http, load, [])
        assert row.cut
        assert 0 < row.num_tokens < 3 * 3899
        http.post("/flush_cache?timeout=60").raise_for_status()  # refuses while anything runs
