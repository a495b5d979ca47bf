"""The frontend backend: ids, time-outs, retries, aborts, and failures as values."""

import threading
import time
from typing import Any

import pytest

from lim_sglang.errors import ServerError
from lim_sglang.programs import backend
from lim_sglang.programs.backend import new_rid
from lim_sglang.programs.chat import Generation, chat_request
from lim_sglang.programs.http_client import Backoff
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import FakeServer, Reply, completion, eventually, serving
from tests.programs.generating import MESSAGES, PARAMS, generate


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKOFF", Backoff(tries=3, first_s=0.01))


def hang(_: dict[str, Any]) -> Reply:
    """An answer that comes too late."""
    time.sleep(1.5)
    return completion("late")


def failing(times: int, status: int = 503) -> Any:
    """Answers with an error so many times, then well."""
    left = [times]

    def answer(_: dict[str, Any]) -> Reply:
        left[0] -= 1
        return (status, {"detail": "busy"}) if left[0] >= 0 else completion("at last")

    return answer


def ask(fake: FakeServer, **options: Any) -> Generation:
    """One generation from an endpoint of its own."""
    backend = SglangBackend(fake.url, **options)
    try:
        return generate(backend)
    finally:
        backend.close()


def test_a_generation_carries_what_the_server_says() -> None:
    with serving(lambda _: completion("so \\boxed{391}", num_tokens=12)) as fake:
        found = ask(fake)
    assert (found.text, found.num_tokens, found.truncated) == ("so \\boxed{391}", 12, False)
    assert found.error is None
    assert found.latency_s > 0
    (request,) = fake.requests
    assert request["rid"] == found.rid
    assert request["messages"] == MESSAGES


def test_the_request_holds_the_sampling_parameters_and_only_a_given_seed() -> None:
    body = chat_request(MESSAGES, PARAMS, None)
    assert (body["max_tokens"], body["top_k"], body["top_p"]) == (64, 20, 0.95)
    assert "seed" not in body
    assert chat_request(MESSAGES, PARAMS, 0)["seed"] == 0


def test_reaching_the_limit_is_no_failure() -> None:
    with serving(lambda _: completion("so far", reason="length")) as fake:
        found = ask(fake)
    assert found.truncated
    assert found.error is None


def test_what_may_succeed_later_is_tried_again_under_a_new_id() -> None:
    with serving(failing(2)) as fake:
        assert ask(fake).text == "at last"
    assert len({request["rid"] for request in fake.requests}) == 3


def test_tries_come_to_an_end() -> None:
    with serving(failing(99)) as fake:
        found = ask(fake)
    assert "HTTP 503" in str(found.error)
    assert len(fake.requests) == 3


def test_a_bad_request_is_not_tried_again() -> None:
    with serving(failing(99, status=400)) as fake:
        assert "HTTP 400" in str(ask(fake).error)
    assert len(fake.requests) == 1


def test_an_aborted_request_is_tried_again() -> None:
    replies = iter([completion("", reason="abort"), completion("whole")])
    with serving(lambda _: next(replies)) as fake:
        assert ask(fake).text == "whole"


@pytest.mark.parametrize("content", [{}, {"choices": []}, [], {"choices": [{"message": None}]}])
def test_an_answer_of_another_form_is_a_failure(content: Any) -> None:
    with serving(lambda _: (200, content)) as fake:
        assert "no chat completion" in str(ask(fake).error)


def test_a_time_out_is_a_failure_and_aborts_the_request() -> None:
    with serving(hang) as fake:
        found = ask(fake, timeout_s=0.2)
        assert "within 0.2 seconds" in str(found.error)
        assert fake.aborted == [found.rid]


def test_closing_aborts_what_is_running_and_frees_who_waits() -> None:
    found: list[Generation] = []
    with serving(hang) as fake:
        backend = SglangBackend(fake.url, max_concurrency=1)
        threads = [
            threading.Thread(target=lambda: found.append(generate(backend))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert eventually(lambda: bool(fake.requests))
        backend.close()
        for thread in threads:
            thread.join(1.0)
        assert fake.aborted == [fake.requests[0]["rid"]]
    assert len(found) == 3
    assert all(generation.error for generation in found)


def test_no_more_requests_are_sent_at_once_than_allowed() -> None:
    pair = threading.Barrier(2)

    def slow(_: dict[str, Any]) -> Reply:
        pair.wait(5)
        return completion("done")

    with serving(slow) as fake:
        backend = SglangBackend(fake.url, max_concurrency=2)
        threads = [threading.Thread(target=generate, args=(backend,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        backend.close()
    assert len(fake.requests) == 6
    assert fake.most_running == 2


def test_seeds_are_honoured_only_in_deterministic_inference() -> None:
    for deterministic in (False, True):
        with serving(lambda _: completion(""), deterministic=deterministic) as fake:
            backend = SglangBackend(fake.url)
            assert backend.honours_seeds is deterministic
            backend.close()


def test_a_server_that_is_not_there_is_an_error_of_its_own() -> None:
    backend = SglangBackend("http://127.0.0.1:9")
    with pytest.raises(ServerError, match="no server answers"):
        backend.server_info()
    assert "no server answers" in str(generate(backend).error)
    backend.close()


def test_no_request_id_is_the_beginning_of_another() -> None:
    rids = {new_rid() for _ in range(100)}
    assert len(rids) == 100
    assert len({len(rid) for rid in rids}) == 1
