"""Several replicas behind one address: the choice, aborts, deaths and the state of all."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lim_sglang.config import add_up, lim_state
from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.launch.replicas import balancing
from lim_sglang.launch.server import Server, ServerOptions, local_client
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.proxy import balancer as balancer_module
from lim_sglang.programs.proxy.balancer import (
    MAX_KEYS,
    MAX_LOST,
    SLACK,
    Balancer,
    Replica,
    prompt_keys,
    sum_infos,
)
from lim_sglang.programs.proxy.command import listen
from lim_sglang.programs.proxy.upstream import Upstream
from lim_sglang.programs.schema import Access, Sampling
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import (
    CUT,
    Answerer,
    Chain,
    FakeServer,
    Reply,
    eventually,
    serving,
)
from tests.programs.proxy_harness import proxy_at

CHAT = "/v1/chat/completions"
HERE = "http://127.0.0.1"


def chat(content: str, **fields: Any) -> dict[str, Any]:
    """Return a chat completion of one turn."""
    return {"model": "default", "messages": [{"role": "user", "content": content}], **fields}


def turn(content: str, role: str = "user") -> dict[str, str]:
    """Return a turn of a conversation."""
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Replicated:
    """Fake servers behind a balancer."""

    url: str
    fakes: tuple[FakeServer, ...]
    balancer: Balancer

    @property
    def in_flight(self) -> list[int]:
        """Requests in flight as the balancer counts them."""
        return [each.in_flight for each in self.balancer.replicas]

    def numbers(self) -> list[int]:
        """Chat completions that each server got."""
        return [len(fake.requests) for fake in self.fakes]

    client: httpx.Client

    def post(self, body: Any, path: str = CHAT) -> httpx.Response:
        """Send a body."""
        return self.client.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        """Ask for a path."""
        return self.client.get(path)


@contextmanager
def replicated(*answers: Answerer, **options: Any) -> Iterator[Replicated]:
    """Run a fake server for each way to answer, and a balancer in front of them."""
    with ExitStack() as stack:
        fakes = tuple(stack.enter_context(serving(answer, **options)) for answer in answers)
        servers = {fake.url: Server(ServerOptions("m", port=port_of(fake))) for fake in fakes}
        listener = stack.enter_context(closing(listen("127.0.0.1", 0)))
        balancer = stack.enter_context(balancing(servers, listener))
        url = f"{HERE}:{listener.getsockname()[1]}"
        client = stack.enter_context(local_client(url, timeout_s=20))
        yield Replicated(url, fakes, balancer, client)


def port_of(fake: FakeServer) -> int:
    """Return the port of a fake server."""
    return int(fake.url.rpartition(":")[2])


def quick(_: Mapping[str, Any]) -> Chain:
    """Answer at once."""
    return Chain(("hi",))


def choices(balancer: Balancer, prompts: list[str]) -> list[int]:
    """Return the replica of each prompt, none of which ends."""
    found = (balancer.choose(prompt_keys(_body(prompt))) for prompt in prompts)
    return [balancer.replicas.index(each) for each in found]


def _body(content: str) -> bytes:
    return httpx.Request("POST", HERE, json=chat(content)).content


def test_samples_of_a_question_go_together_until_another_replica_has_fewer() -> None:
    balancer = Balancer([f"{HERE}:1", f"{HERE}:2"])
    questions = [f"question {number}" for number in range(8) for _ in range(4)]
    found = choices(balancer, questions)
    together = [len(set(found[first : first + 4])) == 1 for first in range(0, len(found), 4)]
    assert all(together)
    assert Counter(found) == {0: 16, 1: 16}


def test_one_question_is_spread_when_it_has_many_samples() -> None:
    balancer = Balancer([f"{HERE}:1", f"{HERE}:2", f"{HERE}:3"])
    found = Counter(choices(balancer, ["one question"] * 24))
    assert max(found.values()) - min(found.values()) <= SLACK
    assert len(found) == 3


def test_a_conversation_goes_where_its_beginning_went_unless_that_is_full() -> None:
    def keys(*turns: str) -> list[bytes]:
        return prompt_keys(
            httpx.Request("POST", HERE, json={"messages": list(map(turn, turns))}).content
        )

    balancer = Balancer([f"{HERE}:1", f"{HERE}:2"])
    first = balancer.choose(keys("system", "a"))
    other = balancer.choose(keys("system", "b"))
    balancer.choose(keys("system", "b"))
    assert balancer.choose(keys("system", "a", "answer", "more")) is first
    for _ in range(2):
        first.end_one()
    assert balancer.choose(keys("system", "b", "answer", "more")) in (first, other)


def test_idle_replicas_take_turns() -> None:
    balancer = Balancer([f"{HERE}:1", f"{HERE}:2", f"{HERE}:3"])
    found = []
    for number in range(6):
        replica = balancer.choose(prompt_keys(_body(f"{number}")))
        found.append(balancer.replicas.index(replica))
        replica.end_one()
    assert found == [0, 1, 2] * 2


def test_lost_replicas_get_nothing_and_doubted_ones_only_what_is_left() -> None:
    balancer = Balancer([f"{HERE}:1", f"{HERE}:2", f"{HERE}:3"])
    lost, doubted, good = balancer.replicas
    balancer.lose(lost.url)
    doubted.in_flight += 1
    doubted.end_one(has_failed=True)
    assert {balancer.choose([]) for _ in range(9)} == {good}
    assert balancer.choose([], [good]) is doubted
    with pytest.raises(ServerError, match="no replica is left"):
        balancer.choose([], [good, doubted])


def test_beginnings_are_forgotten_the_oldest_first() -> None:
    balancer = Balancer([f"{HERE}:1"])
    for number in range(MAX_KEYS + 9):
        balancer.choose([b"%d" % number])
    assert list(balancer._seen) == [b"%d" % number for number in range(9, MAX_KEYS + 9)]


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (b"", 0),
        (b"no JSON", 0),
        (b"[1]", 0),
        (b'{"messages": "x"}', 1),
        (b'{"messages": {"a": 1}}', 0),
        (b'{"messages": [{"role": "user"}, 7]}', 2),
        (b'{"text": "' + b"a" * 3000 + b'"}', 3),
        (b'{"text": ["a", "b"]}', 2),
        (b'{"input_ids": [' + b"1, " * 599 + b"1]}", 3),
        (b'{"input_ids": [[1, 2], [3]]}', 2),
        (b'{"prompt": "", "input": "b"}', 1),
        (b'{"prompt": "' + b"a" * 99_999 + b'"}', 32),
    ],
)
def test_any_body_has_its_beginnings_or_none(content: bytes, number: int) -> None:
    assert len(prompt_keys(content)) == number


def test_a_body_that_no_replica_could_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        prompt_keys(b"[" * 100_000)
    with pytest.raises(ConfigError, match="previous_response_id"):
        prompt_keys(b'{"input": "a", "previous_response_id": "r"}')
    with pytest.raises(ConfigError, match="background"):
        prompt_keys(b'{"input": "a", "background": true}')


def test_requests_are_passed_on_whole_and_routes_of_one_server_are_refused() -> None:
    with replicated(quick, quick, models=("fake",)) as served:
        answer = served.post(chat("a", rid="lim-1", top_k=7, unknown={"b": 1}))
        assert answer.json()["choices"][0]["message"]["content"] == "hi"
        [body] = served.fakes[0].requests + served.fakes[1].requests
        assert body == chat("a", rid="lim-1", top_k=7, unknown={"b": 1})
        assert served.get("/v1/models").json()["data"][0]["id"] == "fake"
        assert served.post({"prompt": "a b"}, "/v1/tokenize").json()["count"] == 2
        refused = served.get("/v1/loads")
        assert refused.status_code == 404
        assert all(fake.url in refused.json()["error"]["message"] for fake in served.fakes)
        assert served.post({"input": "a", "previous_response_id": "r"}, "/v1/responses").is_error
        assert eventually(lambda: served.in_flight == [0, 0])


def test_an_abort_reaches_the_replica_that_has_the_request() -> None:
    def answer(_: Mapping[str, Any]) -> Chain:
        return Chain(("let me",), until=threading.Event())

    with (
        replicated(answer, answer) as served,
        closing(SglangBackend(Access(served.url))) as backend,
        ThreadPoolExecutor(6) as pool,
    ):
        samples = [InFlightSample(index, streamed=index % 2 == 0) for index in range(6)]
        found = [
            pool.submit(backend.generate, [turn(f"{each.index}")], Sampling(), each)
            for each in samples
        ]
        assert eventually(lambda: [fake.in_flight for fake in served.fakes] == [3, 3])
        for each in samples:
            each.cancel()
        assert all(each.result(5).aborted for each in found)
        assert eventually(lambda: served.in_flight == [0, 0])
        assert eventually(lambda: not any(fake.in_flight for fake in served.fakes))
        for fake in served.fakes:
            assert {body["rid"] for body in fake.requests} <= set(fake.aborted)


def test_votes_are_asked_for_before_it() -> None:
    with replicated(quick, quick, models=("fake",)) as served, proxy_at(served.url) as proxy:
        assert proxy.ask("majority@4").lim["samples"]
        assert proxy.ask("fake").choices[0].message.content == "hi"
    assert sum(served.numbers()) == 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_ends_its_request_at_the_replica(stream: bool) -> None:
    def answer(_: Mapping[str, Any]) -> Chain:
        return Chain(("word",) if stream else (), until=threading.Event())

    with replicated(answer, answer) as served:
        body = chat("a", stream=stream)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + CHAT, json=body, timeout=0.5, trust_env=False)
        assert eventually(lambda: sum(len(fake.disconnected) for fake in served.fakes) == 1)
        assert eventually(lambda: served.in_flight == [0, 0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_streamed_nothing_is_answered_by_another_replica(stream: bool) -> None:
    go = threading.Event()

    def answer(_: Mapping[str, Any]) -> Chain:
        return Chain(("hi",), after=go)

    with replicated(answer, answer) as served, ThreadPoolExecutor(4) as pool:
        bodies = [chat(f"{number}", stream=stream) for number in range(4)]
        found = [pool.submit(served.post, body) for body in bodies]
        assert eventually(lambda: served.numbers() == [2, 2])
        served.fakes[0].kill()
        assert eventually(lambda: served.numbers() == [2, 4])
        go.set()
        assert all("hi" in each.result(10).text for each in found)
        assert served.post(chat("later", stream=stream)).is_success
        assert eventually(lambda: served.in_flight == [0, 0])


def test_a_stream_that_has_begun_breaks_off_so_that_its_client_tries_again() -> None:
    def dying(_: Mapping[str, Any]) -> Chain:
        return Chain(("half ", CUT))

    with replicated(dying, quick) as served:
        stream = httpx.stream("POST", served.url + CHAT, json=chat("a", stream=True), timeout=9)
        with pytest.raises(httpx.RemoteProtocolError), stream as answer:
            assert "half" in "".join(answer.iter_text())
        dying_one, _ = served.balancer.replicas
        assert eventually(lambda: dying_one.is_doubted)
        with closing(SglangBackend(Access(served.url))) as backend:
            sample = InFlightSample(0, streamed=True)
            found = backend.generate([turn("b")], Sampling(), sample)
        assert (found.text, found.error) == ("hi", None)


def test_a_request_that_ends_replicas_does_not_end_all_of_them() -> None:
    def dying(_: Mapping[str, Any]) -> Chain:
        return Chain((CUT,))

    with replicated(dying, dying, dying) as served:
        answer = served.post(chat("a"))
        assert answer.status_code == 502
        assert "lost the request (RemoteProtocolError)" in answer.json()["error"]["message"]
        assert sum(served.numbers()) == MAX_LOST


def test_a_replica_that_fails_at_once_does_not_get_all_requests() -> None:
    def failing(_: Mapping[str, Any]) -> Reply:
        return 503, {"error": {"message": "not healthy"}}

    def slow(_: Mapping[str, Any]) -> Chain:
        return Chain(("hi",), pace_s=0.05)

    with replicated(failing, slow) as served, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(served.post, [chat(f"{number}") for number in range(40)]))
        assert sum(answer.is_error for answer in found) <= 8
        assert eventually(lambda: served.in_flight == [0, 0])


def test_a_replica_that_hangs_gets_no_more_requests_while_another_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(balancer_module, "SILENT_S", 0.3)
    is_over = threading.Event()

    def hanging(_: Mapping[str, Any]) -> Chain:
        is_over.wait(20)
        return Chain(("late",))

    with replicated(hanging, quick) as served, ThreadPoolExecutor(16) as pool:
        lost = pool.submit(served.post, chat("hangs"))
        assert eventually(lambda: served.in_flight == [1, 0])
        time.sleep(0.4)
        held = [pool.submit(served.post, chat(f"{number}")) for number in range(12)]
        assert all(each.result().is_success for each in held)
        assert served.numbers() == [1, 12]
        is_over.set()
        assert lost.result().is_success
        assert eventually(lambda: served.in_flight == [0, 0])
        assert not served.balancer.replicas[0].is_silent


def test_replicas_that_are_all_silent_share_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer_module, "SILENT_S", 0.0)
    balancer = Balancer([f"{HERE}:1", f"{HERE}:2"])
    assert Counter(choices(balancer, [f"{number}" for number in range(8)])) == {0: 4, 1: 4}


def test_a_replica_that_hangs_hides_no_state_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(balancer_module, "INFO_LIMIT_S", 0.2)
    with replicated(quick, quick) as served, socket.create_server(("127.0.0.1", 0)) as hanging:
        served.balancer.replicas[0].upstream = Upstream(f"{HERE}:{hanging.getsockname()[1]}")
        info = served.get("/server_info").json()
        assert [each["serves"] for each in info["replicas"]] == [False, True]
        served.fakes[1].kill()
        assert served.get("/server_info").status_code in (502, 504)


def test_it_is_healthy_while_one_replica_is() -> None:
    healthy = threading.Event()
    healthy.set()
    with replicated(quick, quick) as served:
        # The fake servers have no /health: they are unhealthy until the route is stood in for.
        assert served.get("/health").status_code == 503
        for replica in served.balancer.replicas:
            replica.upstream.is_healthy = lambda: _ready(healthy.is_set())  # type: ignore[method-assign]
        assert served.get("/health").status_code == 200
        served.balancer.lose(served.fakes[0].url)
        assert served.get("/health").status_code == 200
        served.balancer.lose(served.fakes[1].url)
        assert served.get("/health").status_code == 503
        answer = served.post(chat("a"))
        assert answer.status_code == 502
        assert "no replica is left" in answer.json()["error"]["message"]


async def _ready(is_healthy: bool) -> bool:
    return is_healthy


STATE = {
    "config": {"budget": 64},
    "roles": ["full", "select"],
    "seeds_honoured": True,
    "draft_tokens": 8,
    "decode_steps": 3,
    "accepted_histogram": {"0": 1, "3": 2},
    "ranks": 2,
    "live_ranks": 2,
}


def test_states_of_workers_are_added_up() -> None:
    other = {**STATE, "decode_steps": 4, "accepted_histogram": {"3": 1, "5": 1}, "live_ranks": 1}
    total = add_up([STATE, {**other, "seeds_honoured": False}])
    assert total == {
        **STATE,
        "seeds_honoured": False,
        "decode_steps": 7,
        "accepted_histogram": {"0": 1, "3": 3, "5": 1},
        "ranks": 4,
        "live_ranks": 3,
    }
    assert lim_state({"internal_states": [{"lim": STATE}]}) == STATE
    assert lim_state({"internal_states": [{"lim": STATE}, {}]}) is None
    assert lim_state({}) is None


def test_replicas_show_the_state_of_one_server_and_each_its_own() -> None:
    info = {"max_running_requests": 32, "internal_states": [{"lim": STATE, "memory": 5}]}
    unlike = {**STATE, "config": {"budget": 128}}
    infos = {"a": info, "b": {**info, "internal_states": [{"lim": unlike}]}}
    total = sum_infos(infos, {"a": 2, "b": 0, "c": 0})
    assert total["max_running_requests"] == 64
    [state] = total["internal_states"]
    assert state["memory"] == 5
    assert (state["lim"]["replicas"], state["lim"]["live_replicas"]) == (3, 1)
    assert (state["lim"]["decode_steps"], state["lim"]["live_ranks"]) == (6, 4)
    assert [(each["url"], each["in_flight"], each["serves"]) for each in total["replicas"]] == [
        ("a", 2, True),
        ("b", 0, True),
        ("c", 0, False),
    ]
    assert total["replicas"][1]["states"] == [{"lim": unlike}]
    dense = sum_infos({"a": {"internal_states": [{}]}, "b": info}, {"a": 0, "b": 0})
    assert lim_state(dense) is None


def test_drafts_of_all_replicas_are_counted() -> None:
    with replicated(quick, quick, drafts=True, max_running_requests=3) as served:
        served.post(chat("a"))
        info = served.get("/server_info").json()
        assert lim_state(info)["cycles"] == 45  # type: ignore[index]
        assert info["max_running_requests"] == 6
        served.fakes[0].kill()
        assert served.get("/server_info").json()["max_running_requests"] == 3


SLOTS = 16
"""Requests that each fake server generates at a time, in time that is slept."""
GOLDEN = 0.618
"""Spreads the times of requests evenly from 0.5 to 1.5 s. With equal times the servers work in
rounds, and two requests more on one of them cost a whole round, which is 5 % of the throughput."""


@pytest.mark.slow
def test_two_replicas_have_twice_the_throughput_of_one() -> None:
    def seconds(num_replicas: int) -> float:
        limits = [threading.Semaphore(SLOTS) for _ in range(num_replicas)]

        def server(limit: threading.Semaphore) -> Answerer:
            def answer(body: Mapping[str, Any]) -> Chain:
                length_s = 0.5 + int(body["rid"]) * GOLDEN % 1
                with limit:
                    time.sleep(length_s)
                return Chain(("hi",))

            return answer

        with replicated(*map(server, limits)) as served, ThreadPoolExecutor(4 * SLOTS) as pool:
            bodies = [chat(f"question {each // 4}", rid=str(each)) for each in range(40 * SLOTS)]
            begin_s = time.monotonic()
            assert all(answer.is_success for answer in pool.map(served.post, bodies))
            return time.monotonic() - begin_s

    one_s, two_s = seconds(1), seconds(2)
    assert one_s / two_s >= 1.9, f"{one_s:.2f} s by one, {two_s:.2f} s by two"


def test_a_replica_is_a_server_of_its_own() -> None:
    assert Replica(f"{HERE}:5/v1").upstream._http.base_url == f"{HERE}:5"
