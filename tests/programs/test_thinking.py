"""A thinking budget: thoughts are closed after so many tokens, and the model answers."""

from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import ConfigError
from lim_sglang.programs.backend import IN_FLIGHT, SEED, InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.connect import connect
from lim_sglang.programs.schema import Access, Api
from lim_sglang.programs.sglang_backend import ENOUGH, ThinkingBudgetBackend, close_thoughts
from tests.fakes.sglang_server import FakeServer, Reply, completion, serving
from tests.programs.test_connect import CONSOLE

PARAMS = SimpleNamespace(max_new_tokens=100, temperature=0.6, top_p=0.95, top_k=20, stop=[])
MESSAGES = [{"role": "user", "content": "What is 17 * 23?"}]
BUDGET = 30
ANSWER = "It is \\boxed{391}."


def ask(
    fake: FakeServer, in_flight: InFlightSample | None = None, budget: int = BUDGET
) -> Generation:
    """One generation from an endpoint of its own."""
    with closing(ThinkingBudgetBackend(fake.url, thinking_budget=budget)) as backend:
        state = SimpleNamespace(messages_=MESSAGES, variables={SEED: None, IN_FLIGHT: in_flight})
        return backend.generate(state, PARAMS)[1]


def thinking(first: str, second: Reply | None = None) -> Any:
    """Answers that use up the budget, then the given one."""

    def answer(body: dict[str, Any]) -> Reply:
        if body.get("continue_final_message"):
            return second or completion(ANSWER, num_tokens=7)
        return completion(first, num_tokens=body["max_tokens"], reason="length")

    return answer


def test_thoughts_that_end_in_time_take_one_request() -> None:
    with serving(lambda _: completion(f"<think>\nhm</think>{ANSWER}", num_tokens=12)) as fake:
        found = ask(fake)
    assert [request["max_tokens"] for request in fake.requests] == [BUDGET]
    assert (found.num_tokens, found.truncated) == (12, False)


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts_that_take_longer_are_closed_and_the_model_answers(streamed: bool) -> None:
    in_flight = InFlightSample(0, streamed=streamed)
    with serving(thinking("<think>\nhm hm")) as fake:
        found = ask(fake, in_flight)
    first, second = fake.requests
    said = f"<think>\nhm hm{ENOUGH}"
    assert (first["max_tokens"], second["max_tokens"]) == (BUDGET, 100 - BUDGET)
    assert second["messages"] == [*MESSAGES, {"role": "assistant", "content": said}]
    assert found.text == said + ANSWER
    assert (found.num_tokens, found.num_reasoning_tokens) == (BUDGET + 7, BUDGET)
    assert (found.truncated, found.error, found.rid) == (False, None, second["rid"])
    assert in_flight.num_tokens == (BUDGET + 7 if streamed else BUDGET)
    assert in_flight.text == (found.text if streamed else said)


def test_an_answer_that_has_begun_goes_on_as_it_was() -> None:
    said = "<think>\nhm\n</think>\n\nIt is "
    with serving(thinking(said)) as fake:
        assert ask(fake).text == said + ANSWER


def test_an_answer_may_still_be_cut_off() -> None:
    with serving(thinking("<think>\nhm", completion("It", num_tokens=70, reason="length"))) as fake:
        found = ask(fake)
    assert (found.truncated, found.num_tokens) == (True, 100)


def test_a_budget_that_is_no_limit_asks_once() -> None:
    with serving(thinking("<think>\nhm")) as fake:
        assert ask(fake, budget=500).truncated
    assert [request["max_tokens"] for request in fake.requests] == [100]


def test_what_was_thought_is_counted_if_the_answer_fails() -> None:
    with serving(thinking("<think>\nhm", (400, {"detail": "too long"}))) as fake:
        found = ask(fake)
    assert "too long" in str(found.error)
    assert found.num_tokens == BUDGET


def test_nothing_follows_once_it_is_not_wanted() -> None:
    in_flight = InFlightSample(0)

    def answer(body: dict[str, Any]) -> Reply:
        in_flight.cancel()
        return completion("<think>\nhm", num_tokens=BUDGET, reason="length")

    with serving(answer) as fake:
        found = ask(fake, in_flight)
    assert found.aborted
    assert len(fake.requests) == 1


def test_half_a_character_is_not_repeated() -> None:
    assert close_thoughts("<think>\nπ is\ufffd") == f"<think>\nπ is{ENOUGH}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"api": Api.OPENAI}, "needs --api sglang"),
        ({"thinking": False}, "--no-thinking forbids"),
    ],
)
def test_what_cannot_be_limited_is_refused(options: dict[str, Any], words: str) -> None:
    access = Access(
        "127.0.0.1:9", timeout_s=20, max_concurrency=1, thinking_budget=BUDGET, **options
    )
    with pytest.raises(ConfigError, match=words):
        connect(access, CONSOLE)
