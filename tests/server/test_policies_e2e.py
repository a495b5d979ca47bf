"""Each rival policy on a real CPU server: its tokens and sets are an independent oracle's."""

from pathlib import Path

import pytest

from lim_sglang.config import LimConfig
from tests.processes import ON_CPU, SGLANG, disagreements, serving
from tests.server.oracle import Oracle
from tests.server.rivals import RIVALS, write_tiny_gates
from tests.server.tiny_model import (
    BUDGET,
    SELECT_LAYERS,
    Prompt,
    crossing_prompts,
    long_prompts,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_NEW = 24
"""Tokens of each answer: lists are slow."""
PICK_LAYERS = (4, 7)


def test_pick_layers_read_the_set_that_they_choose_themselves(
    tiny_model: Path, tmp_path: Path
) -> None:
    layers = {"select_layers": SELECT_LAYERS, "pick_layers": PICK_LAYERS}
    oracle = Oracle(tiny_model, budget=BUDGET, **layers)
    prompts: list[Prompt] = [long_prompts()[0], *crossing_prompts()[1:3]]
    config = LimConfig(budget=BUDGET, **layers).to_json()
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU]
    command += ["--attention-backend", "lim", "--lim-config", config]
    with serving(command, folder=tmp_path) as server:
        answers = server.ask_together(prompts, NUM_NEW)
        runs = [oracle.generate(prompt, NUM_NEW) for prompt in prompts]
        assert not disagreements(server, answers, runs)
        state = server.lim()
    assert {layer for run in runs for _, layer in run.kept} == {*SELECT_LAYERS, *PICK_LAYERS}
    assert [n for n, role in enumerate(state["roles"]) if role == "pick"] == [*PICK_LAYERS]


@pytest.mark.parametrize("name", RIVALS)
def test_tokens_and_sets_are_the_oracles(name: str, tiny_model: Path, tmp_path: Path) -> None:
    rival = RIVALS[name]
    settings = rival.settings_with(write_tiny_gates(tmp_path / "gate"))
    if not rival.picks:
        settings["select_layers"] = SELECT_LAYERS
    oracle = rival.oracle(tiny_model, SELECT_LAYERS)
    prompts: list[Prompt] = [long_prompts()[0], *crossing_prompts()[1:3]]
    config = LimConfig.from_mapping(settings).to_json()
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU]
    command += ["--attention-backend", "lim", "--lim-config", config]
    with serving(command, folder=tmp_path) as server:
        answers = server.ask_together(prompts, NUM_NEW)
        runs = [rival.written(oracle.generate(prompt, NUM_NEW)) for prompt in prompts]
        assert not disagreements(server, answers, runs)
        state = server.lim()
    assert state["config"]["policy"] == rival.settings["policy"]
    assert ("gate_sha256" in state) == (name == "seer")
    assert state["sparse_rows"] > NUM_NEW
