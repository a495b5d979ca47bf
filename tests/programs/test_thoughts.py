"""Thoughts in a text: told apart, put back, and counted by whoever can."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from lim_sglang.programs.chat import (
    StreamReader,
    Thoughts,
    read_answer,
    share_of_thoughts,
    split_thoughts,
    thoughts_of,
)
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import Sample
from tests.fakes.sglang_server import Reply, completion, eventually, serving
from tests.programs.chains import Chain, endless
from tests.programs.drawn import by_sample, draw

SHORT = PROGRAMS["short"]

TEXT = "<think>\none two three\n</think>\n\nIt is \\boxed{7}."
"""Five words up to the end of the thoughts."""


@pytest.mark.parametrize(
    ("text", "thoughts", "reply"),
    [
        (TEXT, "one two three", "It is \\boxed{7}."),
        ("one two\n</think>\n\nIt is 7.", "one two", "It is 7."),  # opened by the template
        ("<think>\n\n</think>\n\nIt is 7.", "", "It is 7."),
        ("<think>\none two", "one two", ""),
        ("one </think> two </think> three", "one", "two </think> three"),
        ("  It is <think>.", "", "  It is <think>."),
        ("", "", ""),
    ],
)
def test_a_text_is_thoughts_and_a_reply(text: str, thoughts: str, reply: str) -> None:
    assert split_thoughts(text) == (thoughts, reply)
    assert text.startswith(thoughts_of(text))


def test_what_was_put_together_comes_apart_again() -> None:
    thoughts = Thoughts()
    pieces = ({"reasoning_content": "one "}, {"reasoning_content": "two"}, {"content": "It is 7."})
    assert split_thoughts("".join(map(thoughts.mark, pieces))) == ("one two", "It is 7.")


def test_a_share_is_that_of_the_characters() -> None:
    assert share_of_thoughts(100, "abc", "abcd") == 75
    assert share_of_thoughts(100, "", "") == 0


def drawn(answer: Any, *, tokenizes: bool, streamed: bool = False) -> Sample:
    """One sample."""
    with serving(answer, tokenizes=tokenizes) as fake:
        (sample,) = draw(fake, 1, streamed=streamed).samples
    return sample


def test_thoughts_of_an_answer_in_one_piece_are_counted_by_the_servers_tokenizer() -> None:
    sample = drawn(lambda _: completion(TEXT, num_tokens=9), tokenizes=True)
    assert (sample.num_reasoning_tokens, sample.reasoning_estimated) == (5, False)
    assert sample.num_tokens == 9


def test_without_a_tokenizer_they_are_estimated_and_said_to_be() -> None:
    sample = drawn(lambda _: completion(TEXT, num_tokens=90), tokenizes=False)
    slots = len("<think>\none two three\n</think>") / len(TEXT)
    assert sample.num_reasoning_tokens == round(90 * slots)
    assert sample.reasoning_estimated


def test_no_more_thoughts_are_counted_than_there_are_tokens() -> None:
    sample = drawn(lambda _: completion(TEXT, num_tokens=4), tokenizes=True)
    assert sample.num_reasoning_tokens == 4


def counting(text: str, reasoning: int) -> Reply:
    """An answer of a server that counts the thoughts."""
    status, answer = completion(text, num_tokens=9)
    answer["usage"]["reasoning_tokens"] = reasoning
    return status, answer


def test_what_the_server_counts_is_not_counted_again() -> None:
    assert drawn(lambda _: counting(TEXT, 6), tokenizes=True).num_reasoning_tokens == 6


@pytest.mark.parametrize("text", ["It is 7.", "It is <think>."])
def test_without_thoughts_nobody_is_asked(text: str) -> None:
    with serving(lambda _: completion(text)) as fake:
        (sample,) = draw(fake, 1).samples
        assert "/v1/tokenize" not in fake.paths
    assert (sample.num_reasoning_tokens, sample.reasoning_estimated) == (0, False)


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts_that_never_end_are_all_there_is(streamed: bool) -> None:
    chain = Chain(("<think>", "\n", "hm", "hm"), reason="length")
    sample = drawn(lambda _: chain, tokenizes=True, streamed=streamed)
    assert (sample.num_reasoning_tokens, sample.num_tokens) == (4, 4)
    assert not sample.reasoning_estimated


def test_an_aborted_answer_in_one_piece_has_its_thoughts_counted_too() -> None:
    gate = Event()
    chains = {
        0: Chain(("\\boxed{1}",), until=gate),
        1: endless("<think> one", " two </think>", " so", "", ""),
    }
    with serving(by_sample(chains)) as fake, ThreadPoolExecutor(1) as pool:
        future = pool.submit(draw, fake, 2, program=SHORT, seed=0, options={"wanted": 1})
        assert eventually(lambda: fake.num_tokens == 6)
        gate.set()
        aborted = future.result(10).samples[1]
    assert (aborted.num_reasoning_tokens, aborted.num_tokens) == (4, 5)


def test_a_chunk_with_the_end_of_the_thoughts_and_more_is_shared_out() -> None:
    reader = StreamReader("r")
    for text, num_tokens in (("<think>hm", 10), ("hm</think>1234567890", 14)):
        choice = {"delta": {"content": text}, "finish_reason": None}
        reader.take({"choices": [choice], "usage": {"completion_tokens": num_tokens}})
    assert reader.result().num_reasoning_tokens == 12  # of four new tokens, half are the reply's
    assert reader.result().reasoning_estimated


def test_pieces_that_nobody_counts_are_an_estimate() -> None:
    reader = StreamReader("r")
    for text in ("hm", "hm", "</think>", "It is 7."):
        reader.take({"choices": [{"delta": {"content": text}}]})
    found = reader.result()
    assert (found.num_reasoning_tokens, found.reasoning_estimated) == (3, True)


def test_the_server_has_the_last_word_on_what_was_estimated() -> None:
    reader = StreamReader("r")
    reader.take({"choices": [{"delta": {"content": "hm</think>It is 7."}}]})
    assert reader.result().reasoning_estimated
    usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 3}}
    reader.take({"choices": [], "usage": usage})
    assert reader.result().num_reasoning_tokens == 3
    assert not reader.result().reasoning_estimated


def test_an_answer_that_is_all_thoughts_is_read_as_such() -> None:
    message = {"reasoning_content": "hm hm", "content": None}
    choice = {"message": message, "finish_reason": "length"}
    found = read_answer({"choices": [choice], "usage": {"completion_tokens": 5}}, "r")
    assert (found.text, found.num_reasoning_tokens) == ("<think>\nhm hm", 5)
