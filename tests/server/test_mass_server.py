"""A real server that orders tokens by mass: its tokens and sets are the oracle's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DenseTokens
from tests.processes import ON_CPU, SGLANG, WITH_LIM, serving
from tests.server.comparing import disagreements
from tests.server.oracle import Oracle, OracleRun
from tests.server.prompts import BUDGET, NUM_NEW, Prompt, long_prompts
from tests.server.tiny_models import SELECT_LAYERS

pytestmark = pytest.mark.e2e


def test_tokens_and_sets_are_the_oracle_s(
    tiny_model: Path,
    tiny_run: Callable[[Prompt], OracleRun],
    dense_tokens: DenseTokens,  # its server has ended
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    by_mass = Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET, by_mass=True)
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU, *WITH_LIM]
    command += ["--lim-ranking", "mass"]
    prompts = long_prompts()[:2]
    with serving(command, folder=tmp_path_factory.mktemp("mass")) as server:
        answers = [server.ask(prompt) for prompt in prompts]
        runs = [by_mass.generate(prompt, NUM_NEW) for prompt in prompts]
        assert not disagreements(server, answers, runs)
    # The paper's ranking keeps other tokens, so it is seen whether the option does anything.
    assert all(run.kept != tiny_run(p).kept for run, p in zip(runs, prompts, strict=True))
