"""A profiled run against a server that streams and profiles as a test wants it."""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.bench import driver, profiled
from lim_sglang.bench.load import WARM_TOKENS, Load
from lim_sglang.bench.profiled import read_whole, record
from lim_sglang.bench.timeline import Trace, recorded_steps
from lim_sglang.errors import DataError, LimError, ServerError
from lim_sglang.programs.http_client import Client
from tests.bench.streaming_server import (
    Event,
    Profiler,
    StreamingServer,
    event,
    steadily,
    streaming,
)
from tests.bench.traces import steps, text

LOAD = Load(concurrency=2, prompt_tokens=5, new_tokens=400)
VOCAB = 1000
STEPS = 5
WHOLE = gzip.compress(text(steps(recorded_steps(STEPS))).encode())


def file_name(body: dict[str, Any]) -> Path:
    """Where SGLang's scheduler writes, by `_stop_profile` of its `profiler_manager.py`."""
    return Path(body["output_dir"]) / f"{body['profile_id']}-TP-0.trace.json.gz"


def profiling(
    content: bytes = WHOLE, after_s: float = 0.05, *, pieces: int = 1, stops: bool = False
) -> Profiler:
    """Writes a trace a little after it was asked for, or only when it is stopped."""
    asked: list[dict[str, Any]] = []

    def write() -> None:
        time.sleep(after_s)
        length = -(-len(content) // pieces)
        with file_name(asked[0]).open("wb", buffering=0) as file:
            for start in range(0, max(len(content), 1), length or 1):
                file.write(content[start : start + length])
                time.sleep(after_s)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/stop_profile":
            if stops:
                write()
            return (200, {}) if stops else (500, {"message": "not in progress"})
        asked.append(body)
        if not stops:
            threading.Thread(target=write, daemon=True).start()
        return 200, {}

    return answer


def recorded(server: StreamingServer, load: Load = LOAD) -> Trace:
    """What a profiled run brings."""
    with Client(server.url) as client:
        return record(client, load, VOCAB, STEPS)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Folders for traces are made here, and none is left."""
    monkeypatch.setattr(profiled.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(profiled, "POLL_S", 0.02)
    monkeypatch.setattr(driver, "TICK_S", 0.02)
    yield tmp_path
    assert not list(tmp_path.iterdir())


def test_a_profile_is_asked_for_once_all_decode_and_ends_the_run() -> None:
    bodies: list[dict[str, Any]] = []
    counts: list[int] = []
    inner = profiling()

    def profiler(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        counts.append(min(totals.values()))
        assert Path(body["output_dir"]).stat().st_mode & 0o777 == 0o777
        return inner(path, body)

    totals: dict[str, int] = {}

    def stream(body: dict[str, Any]) -> Iterator[Event]:
        for total in range(1, 400):
            totals[body["rid"]] = total
            yield 0.01, event(total)

    with streaming(stream, profiler=profiler) as server:
        trace = recorded(server)
        assert len(server.aborted) == 2
    assert len(trace.gpu) == 12 * recorded_steps(STEPS)
    (body,) = bodies
    del body["output_dir"]
    assert body == {
        "num_steps": recorded_steps(STEPS),
        "activities": ["GPU"],
        "with_stack": False,
        "record_shapes": False,
        "profile_id": "lim-timeline",
    }
    assert counts[0] >= WARM_TOKENS


def test_a_trace_that_is_still_being_written_is_waited_for() -> None:
    with streaming(steadily(0.01), profiler=profiling(after_s=0.1, pieces=4)) as server:
        assert recorded(server).gpu
        assert "/stop_profile" not in server.asked


def test_a_profile_that_saw_too_few_steps_is_stopped_and_read() -> None:
    with streaming(steadily(0.005), profiler=profiling(stops=True)) as server:
        assert recorded(server, Load(concurrency=2, prompt_tokens=5, new_tokens=100)).gpu
        assert server.asked[-1] == "/stop_profile"


def refusing(path: str, _body: dict[str, Any]) -> tuple[int, Any]:
    """Starts no profile."""
    return (500, {"message": "no CUPTI"}) if path == "/start_profile" else (500, {})


@pytest.mark.parametrize(
    ("profiler", "error", "words"),
    [
        (None, ServerError, "the server does not profile: .* has no /start_profile"),
        (refusing, ServerError, "the server does not profile: .*HTTP 500: no CUPTI; see its log"),
        (profiling(gzip.compress(b"{")), DataError, "the trace cannot be read"),
        (profiling(gzip.compress(b'{"traceEvents": []}')), DataError, "no activity of a GPU"),
        (profiling(b"no gzip at all"), ServerError, "lim-timeline-TP-0.* cannot be read"),
    ],
)
def test_a_profile_that_comes_to_nothing_is_told(
    profiler: Profiler | None, error: type[LimError], words: str
) -> None:
    with streaming(steadily(0.01), profiler=profiler) as server:
        with pytest.raises(error, match=words):
            recorded(server)
        assert len(server.aborted) == 2  # nothing is left to run


@pytest.mark.parametrize("content", [b"", WHOLE[:-9]])
def test_a_trace_that_is_never_whole_is_given_up(
    monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(profiled, "TRACE_TIMEOUT_S", 1.0)
    with streaming(steadily(0.01), profiler=profiling(content)) as server:
        with pytest.raises(ServerError, match=r"no whole trace .* has to run on this machine"):
            recorded(server)
        assert server.asked[-1] == "/stop_profile"  # so that nothing is written afterwards


def test_a_server_that_sees_other_folders_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiled, "TRACE_TIMEOUT_S", 0.5)
    elsewhere: Profiler = lambda _path, _body: (200, {})  # noqa: E731
    with streaming(steadily(0.01), profiler=elsewhere) as server:
        start_s = time.monotonic()
        with pytest.raises(ServerError, match="wrote no whole trace to"):
            recorded(server)
        assert time.monotonic() - start_s < 3
        assert "/stop_profile" in server.asked


def test_requests_that_never_decode_side_by_side_are_not_profiled() -> None:
    load = Load(concurrency=2, prompt_tokens=5, new_tokens=WARM_TOKENS - 1)
    with streaming(steadily(), profiler=profiling()) as server:
        with pytest.raises(ServerError, match="never all decoded side by side"):
            recorded(server, load)
        assert "/start_profile" not in server.asked


def test_a_failed_request_is_told_and_the_profile_ended() -> None:
    def stream(_body: dict[str, Any]) -> Iterator[Event]:
        for total in range(1, 60):
            yield 0.01, event(total)

    with streaming(stream, profiler=profiling(stops=True)) as server:
        with pytest.raises(ServerError, match="ended after 59 of 400"):
            recorded(server)
        assert server.asked[-1] == "/stop_profile"


def test_a_file_is_whole_once_its_last_byte_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    reads: Callable[[], str | None] = lambda: read_whole(path)  # noqa: E731
    for length in (0, 10, len(WHOLE) // 2, len(WHOLE) - 1):
        path.write_bytes(WHOLE[:length])
        assert reads() is None
    path.write_bytes(WHOLE)
    whole = reads()
    assert whole
    assert whole.startswith('{"schemaVersion"')
    path.unlink()
    with pytest.raises(ServerError, match="cannot be read"):
        reads()
