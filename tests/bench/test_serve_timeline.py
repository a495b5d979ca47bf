"""`lim bench serve --timeline`: profiled runs after the timed ones, and nothing timed is lost."""

from collections.abc import Iterator
from typing import Any

import pytest

from lim_sglang.bench import driver, profiled, serve
from lim_sglang.bench.load import Load
from lim_sglang.bench.serve_rows import ServeRow
from lim_sglang.bench.timeline import recorded_steps
from lim_sglang.errors import ServerError
from lim_sglang.programs.http_client import Client
from tests.bench.streaming_server import Event, StreamingServer, steadily, streaming
from tests.bench.test_profiled import profiling
from tests.bench.test_serve import SILENT, info

STEPS = 5
LOADS = (Load(concurrency=2, new_tokens=600), Load(concurrency=1, new_tokens=600))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is read, and nobody looks seldom."""
    monkeypatch.setattr(serve, "vocabulary", lambda _path: 1000)
    monkeypatch.setattr(profiled, "POLL_S", 0.02)
    monkeypatch.setattr(driver, "TICK_S", 0.02)


def server_info(**changed: Any) -> dict[str, Any]:
    """A dense server with room for all."""
    found = info("flashinfer")
    found["internal_states"][0]["memory_usage"]["token_capacity"] = 100_000
    return found | changed


def measured(server: StreamingServer, steps: int = STEPS) -> list[Any]:
    """All rows."""
    with Client(server.url) as client:
        curves: dict[Load, list[Any]] = {load: [] for load in LOADS}
        return list(serve.measure_loads(client, curves, SILENT, steps=steps))


def test_a_server_is_profiled_when_all_its_timed_runs_are_over() -> None:
    lengths: list[int] = []

    def stream(body: dict[str, Any]) -> Iterator[Event]:
        lengths.append(len(body["input_ids"]))
        yield from steadily(0.001)(body)

    with streaming(stream, info=server_info(), profiler=profiling_each()) as server:
        (first, facts), (second, _) = measured(server)
    assert lengths[:3] == [200] * 3
    assert lengths[3:] == [facts["timeline_load"]["prompt_tokens"]] * 3
    assert [row.concurrency for row in (first, second)] == [2, 1]
    assert all(
        row.timeline and row.timeline.steps == STEPS and row.strip for row in (first, second)
    )
    assert first.num_tokens <= 2 * 599  # of the timed run alone
    assert facts["notes"][-2:] == list(serve.TIMELINE_NOTES)


def profiling_each() -> Any:
    """A new profile each time it is asked."""
    current: list[Any] = []

    def answer(path: str, body: dict[str, Any]) -> Any:
        if path == "/start_profile":
            assert body["num_steps"] == recorded_steps(STEPS)
            current.append(profiling())
        return current[-1](path, body)

    return answer


def test_without_timelines_rows_come_at_once_and_nothing_is_profiled() -> None:
    with streaming(steadily(0.001), info=server_info()) as server, Client(server.url) as client:
        curves: dict[Load, list[Any]] = {load: [] for load in LOADS}
        rows = serve.measure_loads(client, curves, SILENT)
        row, facts = next(rows)
        assert len(server.requests) == 2
        assert (row.timeline, row.timeline_error, row.strip) == (None, None, None)
        assert "timeline_load" not in facts
        rows.close()
    assert not [path for path in server.asked if "profile" in path]


def error_of(row: ServeRow) -> str:
    """Why there is no timeline, of a row that is complete otherwise."""
    assert row.timeline is None
    assert row.strip is None
    assert row.tokens_per_s > 0
    return row.timeline_error or ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "has no /start_profile"),
        ({"device": "cpu"}, "decodes on a CPU"),
        (
            {"internal_states": [{"memory_usage": {"token_capacity": 500}}]},
            "500 tokens has no room",
        ),
    ],
)
def test_a_profile_that_fails_loses_no_row(changed: dict[str, Any], words: str) -> None:
    with streaming(steadily(0.001), info=server_info(**changed)) as server:
        rows = measured(server)
    assert len(rows) == 2
    for row, facts in rows:
        assert words in error_of(row)
        assert "timeline_load" not in facts


@pytest.mark.parametrize("failure", [ServerError("broke down"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["measure_load", "add_timeline"])
def test_what_is_timed_is_given_before_a_later_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException, where: str
) -> None:
    calls = []
    plain = serve.measure_load

    def measure_load(client: Any, load: Load, *rest: Any) -> Any:
        calls.append(load)
        if where == "measure_load" and load is LOADS[1]:
            raise failure
        return plain(client, load, *rest)

    def add_timeline(*_: Any) -> Any:
        raise failure

    monkeypatch.setattr(serve, "measure_load", measure_load)
    if where == "add_timeline":
        monkeypatch.setattr(serve, "add_timeline", add_timeline)
    curves: dict[Load, list[Any]] = {load: [] for load in LOADS}
    with streaming(steadily(0.001), info=server_info()) as server, Client(server.url) as client:
        rows = serve.measure_loads(client, curves, SILENT, steps=STEPS)
        for concurrency in [2] if where == "measure_load" else [2, 1]:
            row, _ = next(rows)
            assert row.concurrency == concurrency
        with pytest.raises(type(failure)):
            next(rows)
