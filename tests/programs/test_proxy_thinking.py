"""The served vote of a model that thinks: its thoughts stand apart, and may be limited."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.fakes.sglang_server import FakeServer, completion, serving
from tests.programs.chains import Chain, words
from tests.programs.proxied import QUESTION, Served, proxied

THOUGHTS = "17 * 23, so " + "hm " * 200 + "391"
REPLY = "It is \\boxed{391}."
TEXT = f"<think>\n{THOUGHTS}\n</think>\n\n{REPLY}"


@contextmanager
def both(answer: Any, **options: Any) -> Iterator[tuple[FakeServer, Served]]:
    """A fake server and a proxy in front of it."""
    with serving(answer) as fake, proxied(fake, **options) as served:
        yield fake, served


def saying(text: str) -> Any:
    """Every sample says it."""
    return lambda _: Chain(words(text, 9))


@pytest.mark.parametrize("text", [TEXT, TEXT.removeprefix("<think>\n")])
def test_thoughts_of_the_shown_sample_are_no_part_of_the_content(text: str) -> None:
    with both(saying(text)) as (_, served):
        found = served.ask("majority@3")
    message = found.choices[0].message
    assert (message.content, message.reasoning_content) == (REPLY, THOUGHTS)
    assert found.lim["answer"] == "391"
    assert found.usage.completion_tokens_details.reasoning_tokens > 0


def test_a_stream_has_the_thoughts_first_and_apart() -> None:
    with both(saying(TEXT)) as (_, served):
        chunks = list(served.ask("majority@2", stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    replies = [delta.content or "" for delta in deltas]
    assert "".join(thoughts) == THOUGHTS
    assert "".join(replies) == REPLY
    last_thought = max(place for place, piece in enumerate(thoughts) if piece)
    assert all(place > last_thought for place, piece in enumerate(replies) if piece)
    assert sum(map(bool, thoughts)) > 1


def test_who_is_cut_off_within_its_thoughts_has_said_nothing() -> None:
    with both(lambda _: completion("<think>\nhm hm", reason="length")) as (_, served):
        found = served.ask("majority@2")
    message = found.choices[0].message
    assert (message.content, message.reasoning_content) == ("", "hm hm")
    assert found.choices[0].finish_reason == "length"


def test_a_model_that_does_not_think_has_no_thoughts() -> None:
    with both(saying(f"  {REPLY}\n")) as (_, served):
        message = served.ask("majority@2").choices[0].message
    assert message.content == f"  {REPLY}\n"  # as it was written
    assert "reasoning_content" not in message.model_extra


def test_an_answer_with_thoughts_may_be_a_turn_of_the_next_question() -> None:
    with both(saying(TEXT)) as (fake, served):
        answer = served.ask("single").choices[0].message
        served.ask("single", messages=[*QUESTION, answer, {"role": "user", "content": "Sure?"}])
    assert fake.requests[-1]["messages"][1] == {"role": "assistant", "content": REPLY}


def thinking(body: dict[str, Any]) -> Any:
    """Thinks as long as it may, and answers once its thoughts are closed."""
    if body.get("continue_final_message"):
        return completion(REPLY, num_tokens=5)
    return completion("<think>\nhm hm", num_tokens=body["max_tokens"], reason="length")


def test_the_proxys_budget_closes_the_thoughts() -> None:
    with both(thinking, thinking_budget=30) as (fake, served):
        found = served.ask("majority@2", max_tokens=100)
    message = found.choices[0].message
    assert message.content == REPLY
    assert message.reasoning_content.startswith("hm hm")
    assert found.usage.completion_tokens == 2 * 35
    assert found.usage.completion_tokens_details.reasoning_tokens == 2 * 30
    assert sorted(request["max_tokens"] for request in fake.requests) == [30, 30, 70, 70]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_room_for_an_answer_is_refused(stream: bool) -> None:
    with both(thinking, thinking_budget=30) as (fake, served):
        with pytest.raises(openai.BadRequestError, match="a thinking budget of 30 tokens leaves"):
            served.ask("majority@2", max_tokens=30, stream=stream)
        assert not fake.requests
