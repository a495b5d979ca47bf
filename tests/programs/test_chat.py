"""Chat completions: thoughts told apart, put back and counted; confidences by SGLang's own code."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

from lim_sglang.mends import tokens_with_own_candidates
from lim_sglang.programs.chat import (
    StreamReader,
    ThoughtJoiner,
    count_repeated_logprobs,
    proportional_tokens,
    read_answer,
    split_thoughts,
    thoughts_in,
    token_confidences,
)
from lim_sglang.programs.program import PROGRAMS
from tests.fakes.sglang_server import Chain, Raw, as_event, serving
from tests.programs.harness import run_at


@pytest.mark.parametrize(
    ("text", "thoughts", "reply"),
    [
        ("<think>\none two\n</think>\n\nIt is \\boxed{7}.", "one two", "It is \\boxed{7}."),
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
    assert text.startswith(thoughts_in(text))


def test_thoughts_that_were_joined_come_apart_again() -> None:
    joiner = ThoughtJoiner()
    pieces = ({"reasoning_content": "one "}, {"reasoning_content": "two"}, {"content": "It is 7."})
    assert split_thoughts("".join(map(joiner.join, pieces))) == ("one two", "It is 7.")


@pytest.mark.parametrize(("part", "text", "tokens"), [("abc", "abcd", 75), ("", "", 0)])
def test_an_estimate_is_the_share_of_the_characters(part: str, text: str, tokens: int) -> None:
    assert proportional_tokens(100, part, text) == tokens


def test_an_answer_that_is_all_thoughts_is_read_as_such() -> None:
    message = {"reasoning_content": "hm hm", "content": None}
    choice = {"message": message, "finish_reason": "length"}
    found = read_answer({"choices": [choice], "usage": {"completion_tokens": 5}}, "r")
    assert (found.text, found.num_reasoning_tokens) == ("<think>\nhm hm", 5)


def test_tokens_of_a_chunk_with_the_end_of_the_thoughts_and_more_are_divided() -> None:
    reader = StreamReader("r")
    for text, num_tokens in (("<think>hm", 10), ("hm</think>1234567890", 14)):
        choice = {"delta": {"content": text}, "finish_reason": None}
        reader.take({"choices": [choice], "usage": {"completion_tokens": num_tokens}})
    assert reader.result().num_reasoning_tokens == 12  # of four new tokens, half are the reply's
    assert reader.result().reasoning_estimated


def test_pieces_that_the_server_does_not_count_are_an_estimate() -> None:
    reader = StreamReader("r")
    for text in ("hm", "hm", "</think>", "It is 7."):
        reader.take({"choices": [{"delta": {"content": text}}]})
    found = reader.result()
    assert (found.num_reasoning_tokens, found.reasoning_estimated) == (3, True)


def test_the_servers_count_replaces_an_estimate() -> None:
    reader = StreamReader("r")
    reader.take({"choices": [{"delta": {"content": "hm</think>It is 7."}}]})
    assert reader.result().reasoning_estimated
    usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 3}}
    reader.take({"choices": [], "usage": usage})
    assert reader.result().num_reasoning_tokens == 3
    assert not reader.result().reasoning_estimated


CONFIDENCES = (2.0, 8.0, 4.0, 6.0)
"""Confidences of four tokens; the second and third come in one chunk."""
CHUNKS = ((0, 1), (1, 3), (3, 4))


def chat_server(*, mended: bool) -> Any:
    """Return as much of SGLang's chat server as makes a chunk of logprobs."""
    server = SimpleNamespace()
    server.tokenizer_manager = SimpleNamespace(
        server_args=SimpleNamespace(incremental_streaming_output=False)
    )
    theirs = OpenAIServingChat._process_logprobs_tokens
    read = partial(tokens_with_own_candidates, theirs) if mended else theirs
    server._process_logprobs_tokens = partial(read, server)
    return server


def of_tokens(confidences: Sequence[float]) -> dict[str, Any]:
    """Return the scheduler's record of tokens with these confidences: all so far, in each step."""
    tops = [
        [(-confidence + offset, place, f"{token}.{place}") for place, offset in enumerate((-1, 1))]
        for token, confidence in enumerate(confidences)
    ]
    own = [(top[1][0], 7, f"w{token}") for token, top in enumerate(tops)]
    return {"meta_info": {"output_token_logprobs": own, "output_top_logprobs": tops}}


def streamed(confidences: Sequence[float], *, mended: bool) -> list[dict[str, Any]]:
    """Return the logprobs of each chunk."""
    return [
        OpenAIServingChat._process_streaming_logprobs(
            chat_server(mended=mended), of_tokens(confidences[:end]), start, end
        ).model_dump()
        for start, end in CHUNKS
    ]


def test_sglang_repeats_the_candidates_of_a_chunks_first_token() -> None:
    chunks = streamed(CONFIDENCES, mended=False)
    assert [token_confidences(chunk) for chunk in chunks] == [[2.0], [8.0, 8.0], [6.0]]
    assert [count_repeated_logprobs(chunk) for chunk in chunks] == [0, 1, 0]
    tokens = [token for chunk in chunks for token in chunk["content"]]
    assert [token["token"] for token in tokens] == ["w0", "w1", "w2", "w3"]
    assert [token["logprob"] for token in tokens] == [-1.0, -7.0, -3.0, -5.0]


def test_the_plugin_gives_each_token_its_own_candidates() -> None:
    chunks = streamed(CONFIDENCES, mended=True)
    assert [token_confidences(chunk) for chunk in chunks] == [[2.0], [8.0, 4.0], [6.0]]
    assert not any(map(count_repeated_logprobs, chunks))


@pytest.mark.parametrize("mended", [False, True])
def test_answers_that_are_not_streamed_are_as_before(mended: bool) -> None:
    logprobs = of_tokens(CONFIDENCES)
    found = OpenAIServingChat._process_response_logprobs(chat_server(mended=mended), logprobs)
    assert token_confidences(found.model_dump()) == list(CONFIDENCES)


@pytest.mark.parametrize(("mended", "confidence", "repeated"), [(True, 14 / 3, 0), (False, 6.0, 1)])
def test_a_sample_says_how_much_of_its_confidence_is_a_guess(
    mended: bool, confidence: float, repeated: int
) -> None:
    pieces = [
        Raw(
            as_event({"choices": [{"delta": {"content": "w"}, "logprobs": chunk}]}).decode().strip()
        )
        for chunk in streamed(CONFIDENCES, mended=mended)
    ]
    with serving(lambda _: Chain(pieces)) as fake:
        (sample,) = run_at(fake, 1, program=PROGRAMS["confidence"], options={"window": 3}).samples
    assert sample.num_repeated_logprobs == repeated
    assert sample.confidence == pytest.approx(confidence)  # the lowest mean of three tokens


def test_equal_candidates_in_different_chunks_are_no_repetition() -> None:
    reader = StreamReader("r")
    for chunk in streamed((3.0, 3.0, 3.0, 3.0), mended=True):
        content = [{**token, "top_logprobs": [{"logprob": -3.0}]} for token in chunk["content"][:1]]
        reader.take({"choices": [{"delta": {"content": "w"}, "logprobs": {"content": content}}]})
    assert reader.result().num_repeated_logprobs == 0
