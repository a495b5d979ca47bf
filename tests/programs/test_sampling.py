"""Which sampling parameters apply."""

from typing import Any

import pytest

from lim_sglang.programs.schema import Sampling, resolve_sampling

QWEN3 = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
LLAMA = {"temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize(
    ("published", "given", "expected"),
    [
        ({}, {}, Sampling(temperature=0.6, top_p=0.95, top_k=20)),
        (QWEN3, {}, Sampling(temperature=0.6, top_p=0.95, top_k=20)),
        (LLAMA, {}, Sampling(temperature=0.7, top_p=0.9, top_k=20)),
        (LLAMA, {"temperature": None}, Sampling(temperature=0.7, top_p=0.9)),
        (LLAMA, {"temperature": 0.0}, Sampling(temperature=0.0, top_p=0.9)),
        (LLAMA, {"top_p": 1.0, "top_k": -1}, Sampling(temperature=0.7, top_p=1.0, top_k=-1)),
        ({"temperature": None, "top_k": 5}, {}, Sampling(top_k=5)),
        ({"top_k": 0}, {}, Sampling(top_k=-1)),
        ({"top_k": -1}, {}, Sampling(top_k=-1)),
        ({"top_k": -1}, {"top_k": 40}, Sampling(top_k=40)),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, {}, Sampling()),
        ({"max_tokens": 7, "seed": 3}, {}, Sampling()),
        (LLAMA, {"max_tokens": 9, "seed": 0}, Sampling(9, 0.7, 0.9, 0)),
    ],
)
def test_what_is_given_wins_over_the_models_and_that_over_the_papers(
    published: dict[str, Any], given: dict[str, Any], expected: Sampling
) -> None:
    assert resolve_sampling(published, **given) == expected
