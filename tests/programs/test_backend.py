"""The base of both backends: slots, tries with pauses, generations that a program ends early."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest

from lim_sglang.programs import sglang_backend as sglang_module
from lim_sglang.programs.backend import (
    ConcurrencyLimiter,
    InFlightSample,
    QuestionSlots,
    new_rid,
)
from lim_sglang.programs.chat import StreamReader
from lim_sglang.programs.http_client import Retries
from lim_sglang.programs.schema import Access
from lim_sglang.programs.sglang_backend import SglangBackend
from lim_sglang.programs.stopping import GroupConfidence
from tests.fakes.sglang_server import (
    Answerer,
    Chain,
    FakeServer,
    Reply,
    completion,
    endless,
    eventually,
    serving,
)
from tests.programs.harness import WAIT_S, begin, generate


@contextmanager
def question(limiter: ConcurrencyLimiter) -> Iterator[tuple[QuestionSlots, threading.Event]]:
    """Take slots for a question; the event is set when one is granted that it waits for."""
    granted = threading.Event()
    with limiter.question(granted.set) as slots:
        yield slots, granted


def take_all(slots: QuestionSlots) -> int:
    """Take slots until there is none; return their number."""
    taken = 0
    while slots.take():
        taken += 1
    return taken


def test_a_question_alone_takes_all_slots_and_no_more() -> None:
    limiter = ConcurrencyLimiter(5)
    with question(limiter) as (slots, granted):
        assert take_all(slots) == 5
        assert not granted.wait(0.01)
        slots.release()
        assert granted.is_set()
        assert slots.take()
        assert not slots.take()


def test_a_free_slot_goes_to_the_question_that_waits_with_the_fewest() -> None:
    limiter = ConcurrencyLimiter(4)
    with question(limiter) as (first, _), question(limiter) as (second, granted):
        assert take_all(first) == 4
        assert not second.take()
        for held in (1, 2):
            first.release()
            assert not first.take()  # the second waits, and holds fewer
            assert granted.is_set()
            granted.clear()
            assert second.take()
            assert not second.take()
            assert (first.num_held, second.num_held) == (4 - held, held)
        first.release()
        assert second.is_granted != first.is_granted
        assert (first.num_held, second.num_held) == (2, 2)


def test_at_a_tie_the_question_that_has_waited_longest_is_next() -> None:
    limiter = ConcurrencyLimiter(1)
    with (
        question(limiter) as (first, _),
        question(limiter) as (second, _),
        question(limiter) as (third, _),
    ):
        assert first.take()
        for slots in (second, third, second):
            assert not slots.take()
        first.release()
        assert second.is_granted
        assert not third.take()


def test_a_granted_slot_that_is_not_wanted_any_more_goes_to_the_next_question() -> None:
    limiter = ConcurrencyLimiter(1)
    with question(limiter) as (first, _), question(limiter) as (third, granted):
        assert first.take()
        with question(limiter) as (second, _):
            assert not second.take()
            assert not third.take()
            first.release()
            assert second.is_granted
        assert granted.is_set()
        assert third.take()
        third.withdraw()  # what was taken is not given back
        assert limiter.num_free == 0


def test_a_question_that_withdraws_keeps_no_other_from_a_slot() -> None:
    limiter = ConcurrencyLimiter(2)
    with question(limiter) as (first, _), question(limiter) as (second, _):
        assert take_all(first) == 2
        assert not second.take()
        second.withdraw()
        first.release()
        assert not second.is_granted
        assert first.take()


def test_slots_outlive_their_question_until_the_samples_have_ended() -> None:
    limiter = ConcurrencyLimiter(2)
    with question(limiter) as (slots, _):
        assert take_all(slots) == 2
    assert limiter.num_free == 0
    slots.release()
    slots.release()
    assert limiter.num_free == 2


def test_many_threads_hold_no_more_slots_than_there_are_and_none_starves() -> None:
    limiter, held, most = ConcurrencyLimiter(8), 0, 0
    lock = threading.Lock()

    def ask(seed: int) -> None:
        nonlocal held, most
        rng = random.Random(seed)
        with question(limiter) as (slots, granted):
            for _ in range(100):
                while not slots.take():
                    assert granted.wait(WAIT_S)
                    granted.clear()
                with lock:
                    held += 1
                    most = max(most, held)
                if rng.random() < 0.2:
                    time.sleep(0)
                with lock:
                    held -= 1
                slots.release()
                if rng.random() < 0.2:
                    slots.withdraw()

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(20)))
    assert most <= 8
    assert limiter.num_free == 8


def test_a_sample_ends_once_and_tells_it_once() -> None:
    ends: list[InFlightSample] = []
    sample = InFlightSample(3, on_end=ends.append)
    sample.end()
    sample.end()
    assert ends == [sample]
    assert sample.generation is None


def test_a_sample_under_its_threshold_is_cancelled_and_a_new_try_is_measured_anew() -> None:
    woken: list[bool] = []
    sample = InFlightSample(0, new_confidence=lambda: GroupConfidence(2), threshold=5.0)
    sample.when_cancelled(lambda: woken.append(True))
    sample.begin_try(StreamReader("r1"))
    sample.see([9.0, 2.0])
    sample.begin_try(StreamReader("r2"))
    sample.see([9.0, 1.0])
    assert (woken, sample.low_confidence) == ([], False)  # 5.5 and 5.0
    sample.see([1.0])
    assert (woken, sample.low_confidence, sample.is_cancelled) == ([True], True, True)
    assert sample.confidence is not None
    assert sample.confidence.lowest == 1.0


@contextmanager
def serve(answer: Answerer, **options: Any) -> Iterator[tuple[FakeServer, SglangBackend]]:
    """Run a fake server, and a backend for it."""
    with (
        serving(answer, **options) as fake,
        closing(SglangBackend(Access(fake.url))) as backend,
    ):
        yield fake, backend


def failing(times: int, status: int = 503) -> Answerer:
    """Answer with an error this number of times, then well."""
    left = [times]

    def answer(_: dict[str, Any]) -> Reply | Chain:
        left[0] -= 1
        return (status, {"detail": "busy"}) if left[0] >= 0 else completion("at last")

    return answer


@pytest.mark.parametrize(
    ("times", "status", "num_requests"), [(2, 503, 3), (99, 503, 3), (99, 429, 3), (99, 400, 1)]
)
def test_a_failure_that_may_pass_is_tried_again_under_a_new_id_up_to_an_end(
    times: int, status: int, num_requests: int
) -> None:
    with serve(failing(times, status)) as (fake, backend):
        found = generate(backend)
    assert found.error is None if times < 3 else f"HTTP {status}: busy" in str(found.error)
    assert len({request["rid"] for request in fake.requests}) == num_requests
    # A refusal generates nothing; a 5xx may come in the midst of a generation.
    assert found.tokens_at_least == (status == 503)


def test_a_request_that_the_server_aborted_by_itself_is_tried_again() -> None:
    replies = iter([completion("", reason="abort"), completion("done")])
    with serve(lambda _: next(replies)) as (_, backend):
        assert generate(backend).text == "done"


def test_closing_aborts_the_generations_in_flight_and_refuses_new_ones() -> None:
    with serve(lambda _: endless("so")) as (fake, backend):
        futures = [begin(backend) for _ in range(3)]
        assert eventually(lambda: len(fake.requests) == 3)
        backend.close()
        found = [future.result(WAIT_S) for future in futures]
        found.append(generate(backend))
        assert set(fake.aborted) == {request["rid"] for request in fake.requests}
    assert all(generation.error for generation in found)
    assert [generation.tokens_at_least for generation in found] == [True] * 3 + [False]


def test_a_sample_that_is_cancelled_before_it_begins_is_never_sent() -> None:
    in_flight = InFlightSample(0)
    in_flight.cancel()
    with serve(lambda _: completion("never")) as (fake, backend):
        found = generate(backend, in_flight)
    assert (found.aborted, found.tokens_at_least) == (True, False)
    assert (found.num_tokens, found.text, found.error) == (0, "", None)
    assert in_flight.generation == found
    assert not in_flight.has_started
    assert not fake.requests
    assert not fake.aborted


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cancelled_generation_is_aborted_and_its_tokens_are_counted(streamed: bool) -> None:
    in_flight = InFlightSample(0, streamed=streamed)
    with serve(lambda _: endless("so ", "far ", "")) as (fake, backend):
        future = begin(backend, in_flight)
        assert eventually(lambda: fake.num_tokens == 3)
        assert eventually(lambda: in_flight.num_tokens == (2 if streamed else 0))
        assert in_flight.text == ("so far " if streamed else "")
        assert (in_flight.tokens_per_s > 0) == streamed
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.in_flight == 0)
    assert (found.aborted, found.truncated) == (True, False)
    assert (found.text, found.error) == ("so far ", None)
    assert found.num_tokens == 3  # the last token has no text yet, and is counted at the end
    assert not found.tokens_at_least
    assert set(fake.aborted) == {found.rid}
    assert not fake.disconnected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cancel_after_the_end_changes_nothing(streamed: bool) -> None:
    in_flight = InFlightSample(0, streamed=streamed)
    with serve(lambda _: Chain(("391",))) as (fake, backend):
        found = generate(backend, in_flight)
        in_flight.cancel()
        assert generate(backend, InFlightSample(1)).text == "391"
    assert not found.aborted
    assert not fake.aborted


@pytest.mark.parametrize("streamed", [False, True])
def test_a_generation_that_ends_before_the_abort_arrives_is_complete(streamed: bool) -> None:
    end = threading.Event()
    with serve(lambda _: Chain(("391",), until=end), forgets_aborts=1) as (fake, backend):
        in_flight = InFlightSample(0, streamed=streamed)
        future = begin(backend, in_flight)
        assert eventually(lambda: fake.in_flight == 1)
        in_flight.cancel()
        assert eventually(lambda: len(fake.aborted) == 1)
        end.set()
        found = future.result(WAIT_S)
    assert (found.text, found.aborted, found.truncated) == ("391", False, False)


def test_an_abort_that_overtakes_its_request_is_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang_module, "ABORT_AGAIN_S", 0.05)
    with serve(lambda _: endless("so"), forgets_aborts=2) as (fake, backend):
        in_flight = InFlightSample(0)
        future = begin(backend, in_flight)
        assert eventually(lambda: fake.num_tokens == 1)
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert eventually(lambda: fake.in_flight == 0)
    assert (found.aborted, found.num_tokens) == (True, 1)
    assert fake.aborted == [found.rid] * 3


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_that_ignores_aborts_is_not_waited_for(
    streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_module, "ABORT_TIMEOUT_S", 0.2)
    with serve(lambda _: endless("so "), answers_aborts=False) as (fake, backend):
        in_flight = InFlightSample(0, streamed=streamed)
        future = begin(backend, in_flight)
        assert eventually(lambda: in_flight.num_tokens == 1 if streamed else fake.in_flight == 1)
        start_s = time.monotonic()
        in_flight.cancel()
        found = future.result(WAIT_S)
        assert time.monotonic() - start_s < 2.0
        assert eventually(lambda: fake.disconnected == [found.rid])
    assert found.aborted
    assert (found.num_tokens, found.text) == ((1, "so ") if streamed else (0, ""))
    assert found.tokens_at_least


def test_a_pause_before_the_next_try_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    in_flight = InFlightSample(0)

    def pause_s(*_: object) -> float:
        asyncio.get_running_loop().call_soon(in_flight.cancel)  # as soon as the pause begins
        return 1e6

    monkeypatch.setattr(Retries, "pause_s", pause_s)
    with serve(lambda _: (503, {"detail": "busy"})) as (fake, backend):
        assert begin(backend, in_flight).result(WAIT_S).aborted
    assert len(fake.requests) == 1


def test_no_request_id_is_the_beginning_of_another() -> None:
    rids = {new_rid() for _ in range(100)}
    assert len(rids) == 100
    assert len({len(rid) for rid in rids}) == 1
