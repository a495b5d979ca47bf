"""SGLang's layers by our kernels, interpreted: a CPU server's tokens and sets stay the oracle's."""

from pathlib import Path

import pytest

from lim_sglang.models import SMOLLM2, embedded_model
from tests.processes import ON_CPU, SGLANG, WITH_LIM, serving, set_differences, token_differences
from tests.server import interpreted_passes, planted
from tests.server.oracle import Oracle
from tests.server.test_lossless_e2e import BUDGET, DENSE, LOSSLESS, command, drafting
from tests.server.tiny_model import NUM_LAYERS, crossing_prompts, long_prompts, random_prompt

pytestmark = pytest.mark.e2e

LLAMA = ["--attention-backend", "lim", "--lim-budget", "64", "--lim-select-layers", "2,17"]
NUM_NEW = 12
"""Tokens of each request: some seconds, interpreted."""


def test_tokens_and_sets_are_the_oracles(
    tiny_model: Path, tiny_oracle: Oracle, tmp_path: Path
) -> None:
    """A request that grows past the budget beside a sparse one; then both from the radix tree."""
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU, *WITH_LIM]
    settings = planted.sitecustomize(tmp_path, planted.LAYER_KERNELS, planted.RUNNER)
    prompts = [crossing_prompts()[1], long_prompts()[0]]
    expected = [tiny_oracle.generate(prompt, NUM_NEW) for prompt in prompts]
    settings |= interpreted_passes.SETTINGS
    with serving(command, folder=tmp_path, settings=settings) as server:
        for _ in range(2):
            for answer, run in zip(server.ask_together(prompts, NUM_NEW), expected, strict=True):
                assert token_differences(answer.tokens, run.tokens) == []
                assert set_differences(server.kept_sets(answer), run.kept) == []
        state = server.lim()
    assert state is not None
    # In 32 bits the linear layers do not suit.
    assert state["layer_kernels"] == {"skinny_gemm": 0, "norm_rope_store": NUM_LAYERS}


@pytest.mark.slow
def test_a_model_without_norms_answers_the_same(tmp_path: Path) -> None:
    """Rows below the budget, beyond it, and one that crosses it; SmolLM2 is a Llama."""
    command = [*SGLANG, "--model-path", str(embedded_model(SMOLLM2)), *ON_CPU, *LLAMA]
    prompts = [random_prompt(length, length) for length in (20, 60, 90)]
    kernels = planted.sitecustomize(tmp_path, planted.LAYER_KERNELS, planted.RUNNER)
    kernels |= interpreted_passes.SETTINGS
    found = []
    for name, settings in (("sglang", {}), ("ours", kernels)):
        (tmp_path / name).mkdir()
        with serving(command, folder=tmp_path / name, settings=settings) as server:
            answers = server.ask_together(prompts, NUM_NEW)
            found.append([answer.tokens for answer in answers])
            state = server.lim()
    assert found[0] == found[1]
    assert state is not None
    assert state["layer_kernels"] == {"skinny_gemm": 0, "norm_rope_store": 30}


@pytest.mark.slow
def test_drafts_and_verifications_keep_the_dense_tokens(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [random_prompt(BUDGET - 2, 3), random_prompt(BUDGET + 6, 4)]
    (tmp_path / "dense").mkdir()
    with serving(command(tiny_model, *DENSE), folder=tmp_path / "dense") as server:
        expected = [answer.tokens for answer in server.ask_together(prompts, NUM_NEW)]
    settings = planted.sitecustomize(tmp_path, planted.LAYER_KERNELS, planted.RUNNER)
    settings |= interpreted_passes.SETTINGS
    start = command(tiny_model, *LOSSLESS, "--lim-draft-tokens", "3")
    with serving(start, folder=tmp_path, settings=settings) as server:
        found = [answer.tokens for answer in server.ask_together(prompts, NUM_NEW)]
        state = drafting(server)
    assert found == expected
    assert state["layer_kernels"]["norm_rope_store"] == NUM_LAYERS
    assert state["drafted_tokens"] > 0
