"""The oracle itself: it does what the algorithm says, and its prompts can tell right from wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.server.oracle import Oracle, OracleRun, unified_set
from tests.server.tiny_model import (
    BUDGET,
    NUM_NEW,
    SELECT_LAYERS,
    Prompt,
    crossing_prompts,
    long_prompts,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "selection.json"
CASES = [c for c in json.loads(GOLDEN.read_text()) if len(c["scores"][0]) > c["budget"]]


@pytest.fixture(scope="module")
def dense_oracle(tiny_model: Path) -> Oracle:
    """The tiny model without LessIsMore."""
    return Oracle(tiny_model, select_layers=(), budget=BUDGET)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_sets_are_the_golden_ones(case: dict) -> None:
    scores = torch.tensor(case["scores"])
    assert unified_set(scores, case["budget"], case["recent_ratio"], case["sinks"]) == case["kept"]


def test_without_select_layers_it_is_transformers_own_greedy_search(
    dense_oracle: Oracle, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = long_prompts()[0]
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
        )
    assert tuple(ids[0, len(prompt) :].tolist()) == dense_oracle.generate(prompt, NUM_NEW).tokens


def test_a_budget_beyond_the_length_is_dense(dense_oracle: Oracle, tiny_model: Path) -> None:
    prompt = crossing_prompts()[0]
    run = Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=4096).generate(prompt, NUM_NEW)
    assert run == dense_oracle.generate(prompt, NUM_NEW)
    assert not run.kept


def test_no_prompt_hangs_on_rounding(
    tiny_model: Path, tiny_run: Callable[[Prompt], OracleRun]
) -> None:
    exact = Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET, dtype=torch.float64)
    for prompt in [*long_prompts(), *crossing_prompts()]:
        assert exact.generate(prompt, NUM_NEW) == tiny_run(prompt)


def test_every_sparse_step_keeps_the_budget(tiny_run: Callable[[Prompt], OracleRun]) -> None:
    prompt = crossing_prompts()[0]
    kept = tiny_run(prompt).kept
    lengths = range(BUDGET + 1, len(prompt) + NUM_NEW)
    assert set(kept) == {(length, layer) for length in lengths for layer in SELECT_LAYERS}
    assert {len(positions) for (positions,) in kept.values()} == {BUDGET}


def test_a_prefill_in_mid_output_changes_what_follows(
    tiny_oracle: Oracle, tiny_run: Callable[[Prompt], OracleRun]
) -> None:
    prompt = long_prompts()[0]
    undisturbed = tiny_run(prompt).tokens
    retracted = tiny_oracle.generate(prompt, NUM_NEW, reprefill_at=(20,)).tokens
    assert retracted[:20] == undisturbed[:20]
    assert retracted != undisturbed
