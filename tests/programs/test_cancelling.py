"""A generation that its program ends: nothing is asked, or the server is told, in bounded time."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Event
from typing import Any

import pytest

from lim_sglang.programs import backend as backend_module
from lim_sglang.programs import sglang_backend as endpoint_module
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.http_client import Backoff
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import Answerer, FakeServer, completion, eventually, serving
from tests.programs.chains import Chain, endless
from tests.programs.generating import begin, generate

WAIT_S = 10.0


@contextmanager
def at(
    answer: Answerer, limiter: int = 8, **options: Any
) -> Iterator[tuple[FakeServer, SglangBackend]]:
    """A server and an endpoint."""
    with (
        serving(answer, **options) as fake,
        closing(SglangBackend(fake.url, max_concurrency=limiter)) as backend,
    ):
        yield fake, backend


def test_what_is_cancelled_before_it_begins_is_never_sent() -> None:
    in_flight = InFlightSample(0)
    in_flight.cancel()
    with at(lambda _: completion("never")) as (fake, backend):
        found = generate(backend, in_flight)
    assert found.aborted
    assert (found.num_tokens, found.text, found.error) == (0, "", None)
    assert not found.tokens_at_least
    assert not in_flight.has_started
    assert not fake.requests
    assert not fake.aborted


def test_what_waits_for_a_place_ends_at_once_though_no_place_is_free() -> None:
    first, second = InFlightSample(0), InFlightSample(1)
    with at(lambda _: endless(), limiter=1) as (fake, backend):
        ahead = begin(backend, first)
        assert eventually(lambda: fake.in_flight == 1)
        behind = begin(backend, second)
        second.cancel()
        assert behind.result(WAIT_S).aborted
        assert not ahead.done()
        assert not second.has_started
        first.cancel()
        ahead.result(WAIT_S)
        # The place of the first is free again, and that of the second was never lost.
        third = begin(backend, InFlightSample(2))
        assert eventually(lambda: len(fake.requests) == 2)
    assert third.result(WAIT_S).error
    assert fake.aborted == [fake.requests[0]["rid"], fake.requests[1]["rid"]]


@pytest.mark.parametrize("streamed", [False, True])
def test_what_runs_is_aborted_at_the_server_and_its_tokens_are_counted(streamed: bool) -> None:
    in_flight = InFlightSample(0, streamed=streamed)
    with at(lambda _: endless("so ", "far ", "")) as (fake, backend):
        future = begin(backend, in_flight)
        assert eventually(lambda: fake.num_tokens == 3)
        assert eventually(lambda: in_flight.num_tokens == (2 if streamed else 0))
        assert in_flight.text == ("so far " if streamed else "")
        assert (in_flight.tokens_per_s > 0) == streamed
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.in_flight == 0)
    assert found.aborted
    assert not found.truncated
    assert (found.text, found.error) == ("so far ", None)
    assert found.num_tokens == 3  # the last has no text yet, and is told of in the end
    assert not found.tokens_at_least
    assert set(fake.aborted) == {found.rid}
    assert not fake.hung_up


@pytest.mark.parametrize("streamed", [False, True])
def test_after_its_end_a_cancel_changes_nothing(streamed: bool) -> None:
    in_flight = InFlightSample(0, streamed=streamed)
    with at(lambda _: Chain(("391",))) as (fake, backend):
        found = generate(backend, in_flight)
        in_flight.cancel()
        assert generate(backend, InFlightSample(1)).text == "391"
    assert not found.aborted
    assert not fake.aborted


@pytest.mark.parametrize("streamed", [False, True])
def test_what_ends_by_itself_before_the_abort_arrives_is_whole(streamed: bool) -> None:
    end = Event()
    with at(lambda _: Chain(("391",), until=end), forgets_aborts=1) as (fake, backend):
        in_flight = InFlightSample(0, streamed=streamed)
        future = begin(backend, in_flight)
        assert eventually(lambda: fake.in_flight == 1)
        in_flight.cancel()
        assert eventually(lambda: len(fake.aborted) == 1)
        end.set()
        found = future.result(WAIT_S)
    assert (found.text, found.aborted, found.truncated) == ("391", False, False)


def test_an_abort_that_overtakes_its_request_is_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_module, "ABORT_AGAIN_S", 0.05)
    with at(lambda _: endless("so"), forgets_aborts=2) as (fake, backend):
        in_flight = InFlightSample(0)
        future = begin(backend, in_flight)
        assert eventually(lambda: fake.num_tokens == 1)
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.in_flight == 0)
    assert found.aborted
    assert found.num_tokens == 1
    assert fake.aborted == [found.rid] * 3


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_that_heeds_no_abort_is_not_waited_for(
    streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "ABORT_TIMEOUT_S", 0.2)
    with at(lambda _: endless("so "), answers_aborts=False) as (fake, backend):
        in_flight = InFlightSample(0, streamed=streamed)
        future = begin(backend, in_flight)
        assert eventually(lambda: in_flight.num_tokens == 1 if streamed else fake.in_flight == 1)
        start_s = time.monotonic()
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert time.monotonic() - start_s < 2.0
        assert eventually(lambda: fake.hung_up == [found.rid])
    assert found.aborted
    assert (found.num_tokens, found.text) == ((1, "so ") if streamed else (0, ""))
    assert found.tokens_at_least


def test_a_pause_before_the_next_try_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "BACKOFF", Backoff(first_s=1e6, most_s=1e6, total_s=1e7))
    with at(lambda _: (503, {"detail": "busy"})) as (fake, backend):
        in_flight = InFlightSample(0)
        future = begin(backend, in_flight)
        assert eventually(lambda: len(fake.requests) == 1 and fake.in_flight == 0)
        in_flight.cancel()
        assert future.result(WAIT_S).aborted
    assert len(fake.requests) == 1
