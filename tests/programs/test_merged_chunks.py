"""Several tokens in one chunk, as a busy server sends them, by SGLang's own code."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

from lim_sglang.compat import tokens_with_own_candidates
from lim_sglang.programs.chat import StreamReader, confidences_of, count_repeated
from lim_sglang.programs.program import PROGRAMS
from tests.fakes.sglang_server import serving
from tests.programs.chains import Chain, Raw, as_event
from tests.programs.drawn import draw

CONFIDENCE = PROGRAMS["confidence"]

CONFIDENCES = (2.0, 8.0, 4.0, 6.0)
"""Of four tokens; the second and third come in one chunk."""
CHUNKS = ((0, 1), (1, 3), (3, 4))


def chat(*, mended: bool) -> Any:
    """As much of SGLang's chat server as turns logprobs into a chunk's."""
    server = SimpleNamespace()
    server.tokenizer_manager = SimpleNamespace(
        server_args=SimpleNamespace(incremental_streaming_output=False)
    )
    theirs = OpenAIServingChat._process_logprobs_tokens
    read = partial(tokens_with_own_candidates, theirs) if mended else theirs
    server._process_logprobs_tokens = partial(read, server)
    return server


def of_tokens(confidences: Sequence[float]) -> dict[str, Any]:
    """What SGLang's scheduler tells of tokens with these confidences: all so far, in each step."""
    tops = [
        [(-confidence + offset, place, f"{token}.{place}") for place, offset in enumerate((-1, 1))]
        for token, confidence in enumerate(confidences)
    ]
    own = [(top[1][0], 7, f"w{token}") for token, top in enumerate(tops)]
    return {"meta_info": {"output_token_logprobs": own, "output_top_logprobs": tops}}


def streamed(confidences: Sequence[float], *, mended: bool) -> list[dict[str, Any]]:
    """The logprobs of each chunk."""
    return [
        OpenAIServingChat._process_streaming_logprobs(
            chat(mended=mended), of_tokens(confidences[:end]), start, end
        ).model_dump()
        for start, end in CHUNKS
    ]


def test_sglang_repeats_the_candidates_of_a_chunks_first_token() -> None:
    chunks = streamed(CONFIDENCES, mended=False)
    assert [confidences_of(chunk) for chunk in chunks] == [[2.0], [8.0, 8.0], [6.0]]
    assert [count_repeated(chunk) for chunk in chunks] == [0, 1, 0]
    tokens = [token for chunk in chunks for token in chunk["content"]]
    assert [token["token"] for token in tokens] == ["w0", "w1", "w2", "w3"]
    assert [token["logprob"] for token in tokens] == [-1.0, -7.0, -3.0, -5.0]


def test_the_plugin_gives_each_token_its_own() -> None:
    chunks = streamed(CONFIDENCES, mended=True)
    assert [confidences_of(chunk) for chunk in chunks] == [[2.0], [8.0, 4.0], [6.0]]
    assert not any(map(count_repeated, chunks))


@pytest.mark.parametrize("mended", [False, True])
def test_whole_answers_are_as_before(mended: bool) -> None:
    logprobs = of_tokens(CONFIDENCES)
    found = OpenAIServingChat._process_response_logprobs(chat(mended=mended), logprobs)
    assert confidences_of(found.model_dump()) == list(CONFIDENCES)


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
        (sample,) = draw(fake, 1, program=CONFIDENCE, options={"window": 3}).samples
    assert sample.num_repeated_logprobs == repeated
    assert sample.confidence == pytest.approx(confidence)  # the lowest mean of three tokens


def test_equal_candidates_in_different_chunks_are_no_repetition() -> None:
    reader = StreamReader("r")
    for chunk in streamed((3.0, 3.0, 3.0, 3.0), mended=True):
        equivalent = [
            {**token, "top_logprobs": [{"logprob": -3.0}]} for token in chunk["content"][:1]
        ]
        choice = {"delta": {"content": "w"}, "logprobs": {"content": equivalent}}
        reader.take({"choices": [choice]})
    assert reader.result().num_repeated_logprobs == 0
