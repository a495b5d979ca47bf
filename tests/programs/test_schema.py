"""Sampling parameters and prompts."""

from typing import Any

import pytest

from lim_sglang.errors import ConfigError
from lim_sglang.programs.schema import (
    Sampling,
    ask_messages,
    check_thinking_budget,
    copies_note,
    resolve_sampling,
)

LLAMA = {"temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize(
    ("published", "given", "expected"),
    [
        ({}, {}, Sampling(temperature=0.6, top_p=0.95, top_k=20)),
        (LLAMA, {}, Sampling(temperature=0.7, top_p=0.9, top_k=20)),
        (LLAMA, {"temperature": None}, Sampling(temperature=0.7, top_p=0.9)),
        (LLAMA, {"temperature": 0.0}, Sampling(temperature=0.0, top_p=0.9)),
        (LLAMA, {"top_p": 1.0, "top_k": -1}, Sampling(temperature=0.7, top_p=1.0, top_k=-1)),
        ({"temperature": None, "top_k": 5}, {}, Sampling(top_k=5)),
        ({"top_k": 0}, {}, Sampling(top_k=-1)),
        ({"top_k": -1}, {"top_k": 40}, Sampling(top_k=40)),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, {}, Sampling()),
        ({"max_tokens": 7, "seed": 3}, {}, Sampling()),
        (LLAMA, {"max_tokens": 9, "seed": 0}, Sampling(9, 0.7, 0.9, 0)),
    ],
)
def test_given_parameters_win_over_the_models_and_those_over_the_papers(
    published: dict[str, Any], given: dict[str, Any], expected: Sampling
) -> None:
    assert resolve_sampling(published, **given) == expected


@pytest.mark.parametrize(("seed", "expected"), [(None, [None, None]), (40, [40, 43])])
def test_each_sample_has_a_seed_of_its_own(seed: int | None, expected: list[int | None]) -> None:
    assert [Sampling(seed=seed).seed_of(index) for index in (0, 3)] == expected


@pytest.mark.parametrize("template", ["{question}{question}", "no question", "{q}", "{question"])
def test_a_template_holds_the_question_once(template: str) -> None:
    with pytest.raises(ConfigError, match="prompt template"):
        ask_messages("2 + 2?", template=template)


def test_braces_of_a_question_are_text() -> None:
    system, user = ask_messages("{2} + 2?", template="{{{question}}}", system="Be brief.")
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert (user["role"], user["content"]) == ("user", "{{2} + 2?}")


def test_a_thinking_budget_leaves_tokens_for_the_answer() -> None:
    check_thinking_budget(None, 1)
    check_thinking_budget(9, 10)
    with pytest.raises(ConfigError, match="leaves nothing of max_tokens 10 to answer with"):
        check_thinking_budget(10, 10)


@pytest.mark.parametrize(
    ("sampling", "num_samples", "told"),
    [
        ({"temperature": 0.0, "top_k": 20}, 4, "at temperature 0 the 4 samples"),
        ({"temperature": 0.6, "top_k": 1}, 2, "at top_k 1 the 2 samples"),
        ({"temperature": 0.0}, 1, None),
        ({"temperature": 0.6, "top_k": 20}, 4, None),
    ],
)
def test_copies_of_one_chain_are_no_vote(
    sampling: dict[str, float], num_samples: int, told: str | None
) -> None:
    note = copies_note(sampling, num_samples)
    assert note is told or (note and told and note.startswith(told))
