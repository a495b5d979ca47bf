"""A generation that its program ends: nothing is asked, or the server is told, in bounded time."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Event
from typing import Any

import pytest

from lim_sglang.programs import endpoint as endpoint_module
from lim_sglang.programs import transport
from lim_sglang.programs.backoff import Backoff
from lim_sglang.programs.endpoint import Endpoint
from lim_sglang.programs.running import Running
from tests.programs.chains import Chain, endless
from tests.programs.fake_server import Answerer, FakeServer, completion, eventually, serving
from tests.programs.generating import begin, generate

WAIT_S = 10.0


@contextmanager
def at(answer: Answerer, places: int = 8, **options: Any) -> Iterator[tuple[FakeServer, Endpoint]]:
    """A server and an endpoint."""
    with (
        serving(answer, **options) as fake,
        closing(Endpoint(fake.url, max_concurrency=places)) as endpoint,
    ):
        yield fake, endpoint


def test_what_is_cancelled_before_it_begins_is_never_sent() -> None:
    running = Running(0)
    running.cancel()
    with at(lambda _: completion("never")) as (fake, endpoint):
        found = generate(endpoint, running)
    assert found.aborted
    assert (found.num_tokens, found.text, found.error) == (0, "", None)
    assert not found.tokens_at_least
    assert not running.has_started
    assert not fake.requests
    assert not fake.aborted


def test_what_waits_for_a_place_ends_at_once_though_no_place_is_free() -> None:
    first, second = Running(0), Running(1)
    with at(lambda _: endless(), places=1) as (fake, endpoint):
        ahead = begin(endpoint, first)
        assert eventually(lambda: fake.running == 1)
        behind = begin(endpoint, second)
        second.cancel()
        assert behind.result(WAIT_S).aborted
        assert not ahead.done()
        assert not second.has_started
        first.cancel()
        ahead.result(WAIT_S)
        # The place of the first is free again, and that of the second was never lost.
        third = begin(endpoint, Running(2))
        assert eventually(lambda: len(fake.requests) == 2)
    assert third.result(WAIT_S).error
    assert fake.aborted == [fake.requests[0]["rid"], fake.requests[1]["rid"]]


@pytest.mark.parametrize("watched", [False, True])
def test_what_runs_is_aborted_at_the_server_and_its_tokens_are_counted(watched: bool) -> None:
    running = Running(0, watched=watched)
    with at(lambda _: endless("so ", "far ", "")) as (fake, endpoint):
        future = begin(endpoint, running)
        assert eventually(lambda: fake.num_tokens == 3)
        assert eventually(lambda: running.num_tokens == (2 if watched else 0))
        assert running.text == ("so far " if watched else "")
        assert (running.tokens_per_s > 0) == watched
        running.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.running == 0)
    assert found.aborted
    assert not found.truncated
    assert (found.text, found.error) == ("so far ", None)
    assert found.num_tokens == 3  # the last has no text yet, and is told of in the end
    assert not found.tokens_at_least
    assert set(fake.aborted) == {found.rid}
    assert not fake.hung_up


@pytest.mark.parametrize("watched", [False, True])
def test_after_its_end_a_cancel_changes_nothing(watched: bool) -> None:
    running = Running(0, watched=watched)
    with at(lambda _: Chain(("391",))) as (fake, endpoint):
        found = generate(endpoint, running)
        running.cancel()
        assert generate(endpoint, Running(1)).text == "391"
    assert not found.aborted
    assert not fake.aborted


@pytest.mark.parametrize("watched", [False, True])
def test_what_ends_by_itself_before_the_abort_arrives_is_whole(watched: bool) -> None:
    end = Event()
    with at(lambda _: Chain(("391",), until=end), forgets_aborts=1) as (fake, endpoint):
        running = Running(0, watched=watched)
        future = begin(endpoint, running)
        assert eventually(lambda: fake.running == 1)
        running.cancel()
        assert eventually(lambda: len(fake.aborted) == 1)
        end.set()
        found = future.result(WAIT_S)
    assert (found.text, found.aborted, found.truncated) == ("391", False, False)


def test_an_abort_that_overtakes_its_request_is_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_module, "ABORT_AGAIN_S", 0.05)
    with at(lambda _: endless("so"), forgets_aborts=2) as (fake, endpoint):
        running = Running(0)
        future = begin(endpoint, running)
        assert eventually(lambda: fake.num_tokens == 1)
        running.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.running == 0)
    assert found.aborted
    assert found.num_tokens == 1
    assert fake.aborted == [found.rid] * 3


@pytest.mark.parametrize("watched", [False, True])
def test_a_server_that_heeds_no_abort_is_not_waited_for(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "ABORT_TIMEOUT_S", 0.2)
    with at(lambda _: endless("so "), answers_aborts=False) as (fake, endpoint):
        running = Running(0, watched=watched)
        future = begin(endpoint, running)
        assert eventually(lambda: running.num_tokens == 1 if watched else fake.running == 1)
        start_s = time.monotonic()
        running.cancel()
        found = future.result(WAIT_S)
        assert time.monotonic() - start_s < 2.0
        assert eventually(lambda: fake.hung_up == [found.rid])
    assert found.aborted
    assert (found.num_tokens, found.text) == ((1, "so ") if watched else (0, ""))
    assert found.tokens_at_least


def test_a_pause_before_the_next_try_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BACKOFF", Backoff(first_s=1e6, most_s=1e6, total_s=1e7))
    with at(lambda _: (503, {"detail": "busy"})) as (fake, endpoint):
        running = Running(0)
        future = begin(endpoint, running)
        assert eventually(lambda: len(fake.requests) == 1 and fake.running == 0)
        running.cancel()
        assert future.result(WAIT_S).aborted
    assert len(fake.requests) == 1
