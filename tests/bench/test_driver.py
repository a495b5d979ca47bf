"""The client of `lim bench serve`, against a server that streams and fails as it is told."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from lim_sglang.bench import driver
from lim_sglang.bench.driver import Glance, Occupancy, drive, read_occupancy
from lim_sglang.bench.load import Load
from lim_sglang.bench.streams import measured_stretch, token_latencies
from lim_sglang.errors import ServerError
from tests.bench.streaming_server import Event, event, steadily, streaming

LOAD = Load(concurrency=3, prompt_tokens=5, new_tokens=100)
VOCAB = 1000


def ignore(_glance: Glance) -> None:
    """Nobody looks."""


def test_every_token_of_every_stream_is_counted() -> None:
    with streaming(steadily()) as server:
        run = drive(server.url, LOAD, VOCAB, watch=ignore)
    assert [stream.num_tokens for stream in run.streams] == [100] * 3
    assert all(stream.finished for stream in run.streams)
    assert not run.cut
    assert not server.aborted


def test_a_token_takes_as_long_as_the_server_waits() -> None:
    with streaming(steadily(wait_s=0.02)) as server:
        load = Load(concurrency=2, prompt_tokens=5, new_tokens=30)
        run = drive(server.url, load, VOCAB, watch=ignore)
    stretch = measured_stretch(run.streams)
    assert stretch
    latencies = token_latencies(run.streams, stretch)
    assert latencies
    assert 20 <= latencies.p50 < 40
    assert latencies.p50 <= latencies.p99 < 200
    assert 0 < run.client_share < 1


def test_chunks_of_several_tokens_are_counted_whole() -> None:
    with streaming(steadily(at_once=7)) as server:
        run = drive(server.url, LOAD, VOCAB, watch=ignore)
    assert [stream.num_tokens for stream in run.streams] == [100] * 3
    assert len(run.streams[0].times_s) == 16


def test_requests_are_greedy_through_end_tokens_and_share_no_prefix() -> None:
    load = Load(concurrency=3, prompt_tokens=5, new_tokens=4, stream_interval=8)
    with streaming(steadily()) as server:
        drive(server.url, load, VOCAB, watch=ignore)
    assert len({body["rid"] for body in server.requests}) == 3
    assert len({body["input_ids"][0] for body in server.requests}) == 3
    for body in server.requests:
        assert body["stream"]
        assert len(body["input_ids"]) == 5
        assert body["sampling_params"] == {
            "temperature": 0,
            "max_new_tokens": 4,
            "ignore_eos": True,
            "stream_interval": 8,
        }


def test_the_server_tells_how_full_it_is_while_streams_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "POLL_S", 0.05)
    with streaming(steadily()) as server:
        run = drive(server.url, LOAD, VOCAB, watch=ignore)
    assert len(run.occupancies) > 2
    told = run.occupancies[-1]
    assert (told.running, told.waiting, told.kv_tokens, told.kv_share) == (3, 1, 250, 0.25)
    times = [each.at_s for each in run.occupancies]
    assert times == sorted(times)


def test_the_limit_cuts_the_run_and_the_server_is_told() -> None:
    seen: list[Glance] = []
    with streaming(steadily(wait_s=0.05)) as server:
        load = Load(concurrency=2, prompt_tokens=5, new_tokens=10_000, limit_s=0.5)
        start_s = time.monotonic()
        run = drive(server.url, load, VOCAB, watch=seen.append)
        assert time.monotonic() - start_s < 5
    assert run.cut
    assert all(3 <= stream.num_tokens < 50 for stream in run.streams)
    assert server.aborted == {body["rid"] for body in server.requests}
    assert seen[-1].seconds >= 0.5
    assert seen[-1].last
    counts = [glance.num_tokens for glance in seen]
    assert counts == sorted(counts)


def test_who_watches_sees_the_slowest_stream_and_may_end_the_run() -> None:
    def stream(body: dict[str, Any]) -> Iterator[Event]:
        slow = body["rid"].endswith("-1.")
        yield from steadily(wait_s=0.1 if slow else 0.01)(body)

    seen: list[Glance] = []

    def watch(glance: Glance) -> bool:
        seen.append(glance)
        return glance.fewest >= 4

    with streaming(stream) as server:
        run = drive(server.url, LOAD, VOCAB, watch=watch)
    assert run.cut
    assert len(server.aborted) == 3
    assert 4 <= seen[-1].fewest <= run.streams[1].num_tokens < 20
    assert all(glance.fewest < 4 for glance in seen[:-1])


def test_a_limit_that_is_not_reached_cuts_nothing() -> None:
    with streaming(steadily()) as server:
        load = Load(concurrency=1, prompt_tokens=5, new_tokens=20, limit_s=60)
        assert not drive(server.url, load, VOCAB, watch=ignore).cut


def fails(last: dict[str, Any] | None) -> Any:
    """Two tokens, then another event, or just an end."""

    def stream(body: dict[str, Any]) -> Iterator[Event]:
        yield 0.0, event(1)
        yield 0.0, event(2)
        if last and body["input_ids"]:
            yield 0.0, last

    return stream


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (None, r"ended after 2 of 100 tokens"),
        (event(3, {"type": "stop"}), r"ended after 3 of 100 tokens"),
        (event(3, {"type": "abort", "message": "out of memory"}), "aborted request .*of memory"),
        ({"error": {"message": "too long"}}, "failed: too long"),
        ({"text": "hello"}, "broke off .KeyError"),
    ],
)
def test_a_failed_stream_is_no_measurement(last: dict[str, Any] | None, words: str) -> None:
    with streaming(fails(last)) as server, pytest.raises(ServerError, match=words):
        drive(server.url, LOAD, VOCAB, watch=ignore)


def test_one_failure_ends_all_streams_and_tells_the_server() -> None:
    def stream(body: dict[str, Any]) -> Iterator[Event]:
        first = body["rid"].endswith("-0.")
        yield from fails(None)(body) if first else steadily(wait_s=0.05)(body)

    with streaming(stream) as server:
        with pytest.raises(ServerError, match="ended after 2 of 100"):
            drive(server.url, LOAD, VOCAB, watch=ignore)
        assert len(server.aborted) == 3  # the one that broke off, too: it may still run


def test_a_refused_request_is_told_with_its_status() -> None:
    with streaming(steadily(), status=500) as server, pytest.raises(ServerError, match="HTTP 500"):
        drive(server.url, LOAD, VOCAB, watch=ignore)


def test_a_server_that_does_not_say_how_full_it_is_is_not_measured() -> None:
    with (
        streaming(steadily(wait_s=0.05), loads=[]) as server,
        pytest.raises(ServerError, match="how full it is"),
    ):
        drive(server.url, LOAD, VOCAB, watch=ignore)


def test_no_server_is_an_error_in_words() -> None:
    with pytest.raises(ServerError, match=r"broke off \(ClientConnectorError"):
        drive("http://127.0.0.1:9", LOAD, VOCAB, watch=ignore)


def test_a_server_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(_body: dict[str, Any]) -> Iterator[Event]:
        yield 0.0, event(1)
        yield 3.0, event(2)

    monkeypatch.setattr(driver, "STALL_S", 0.4)
    with streaming(stream) as server, pytest.raises(ServerError, match="no token came"):
        drive(server.url, LOAD, VOCAB, watch=ignore)


def test_retractions_are_kept_with_their_stream() -> None:
    def stream(_body: dict[str, Any]) -> Iterator[Event]:
        yield 0.0, event(1)
        yield 0.0, event(100, {"type": "length"}, retractions=2)

    with streaming(stream) as server:
        run = drive(server.url, LOAD, VOCAB, watch=ignore)
    assert [stream.retractions for stream in run.streams] == [2, 2, 2]


def test_occupancy_is_read_from_one_scheduler_s_entry() -> None:
    load = {
        "num_running_reqs": 8,
        "num_waiting_reqs": 2,
        "num_used_tokens": 30,
        "max_total_num_tokens": 40,
    }
    assert read_occupancy(load, 5.0) == Occupancy(5.0, 8, 2, 30, 0.75)
