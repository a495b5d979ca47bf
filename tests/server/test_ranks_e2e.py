"""Ranks of tensor parallelism on a CPU: tokens and sets are an independent oracle's, on each rank.

The oracle knows no ranks: it ranks the scores of all heads.
"""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lim_sglang.config import LimConfig
from lim_sglang.launch.server import Server, ServerOptions
from lim_sglang.models import SMOLLM2, embedded_model
from lim_sglang.policies.policy import SharedBy, SparsePolicy
from tests.processes import (
    ON_CPU,
    SGLANG,
    WITH_LIM,
    Answer,
    LocalServer,
    serving,
    set_differences,
    token_differences,
)
from tests.server.oracle import KeptSets, Oracle, OracleRun
from tests.server.rivals import RIVALS, write_tiny_gates
from tests.server.tiny_model import (
    BUDGET,
    SELECT_LAYERS,
    Prompt,
    build_tiny_qwen2,
    build_tiny_qwen3_moe,
    crossing_prompts,
    long_prompts,
    random_prompt,
    stories,
)
from tests.soak.server_soak import RETRACTING, soak_server

pytestmark = pytest.mark.e2e

NUM_NEW = 32
PROMPTS = [random_prompt(720, 1), random_prompt(850, 1), random_prompt(250, 0)]
"""Two that are sparse from the first step, one that crosses the budget."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of 4 query heads and 2 KV heads."""
    return build_tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def runs(model: Path) -> Iterator[Future[list[OracleRun]]]:
    """Run the oracle on the prompts, while SGLang's first process loads on another core."""
    oracle = Oracle(model, select_layers=SELECT_LAYERS, budget=BUDGET)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(lambda: [oracle.generate(prompt, NUM_NEW) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def server(
    model: Path, runs: Future[list[OracleRun]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """Serve the model by two ranks."""
    command = [*SGLANG, "--model-path", str(model), "--skip-tokenizer-init"]
    command += [*ON_CPU, *WITH_LIM, "--tp-size", "2"]
    with serving(command, folder=tmp_path_factory.mktemp("ranks")) as running:
        yield running


def differences(
    server: LocalServer, answer: Answer, run: OracleRun, *, shared: bool = True, ranks: int = 2
) -> list[str]:
    """Return a line for the tokens, and for the sets of each rank, that are not the oracle's.

    Args:
        shared: all heads read one list; else each rank has the lists of its own heads.
    """
    found = server.kept_by_rank(answer)
    assert len(found) == ranks
    if not shared:
        found = [joined(found)]
    return [
        *token_differences(answer.tokens, run.tokens),
        *(line for kept in found for line in set_differences(kept, run.kept)),
    ]


def joined(of_ranks: list[KeptSets]) -> KeptSets:
    """Return the lists of all heads, in the order of the ranks."""
    rows = of_ranks[0].keys()
    return {row: tuple(each for kept in of_ranks for each in kept[row]) for row in rows}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "all at once"])
def test_tokens_and_sets_of_each_rank_are_the_oracles(
    server: LocalServer, runs: Future[list[OracleRun]], together: bool
) -> None:
    answers = [server.ask(prompt, NUM_NEW) for prompt in ([] if together else PROMPTS)]
    answers = answers or server.ask_together(PROMPTS, NUM_NEW)
    assert all(run.kept for run in runs.result())
    for answer, run in zip(answers, runs.result(), strict=True):
        assert not differences(server, answer, run)


def test_every_rank_is_proved_to_decode_with_lessismore(server: LocalServer, model: Path) -> None:
    live = Server(ServerOptions(str(model), port=server.port)).prove()
    assert (live["ranks"], live["live_ranks"]) == (2, 2)


def serve_and_compare(
    command: list[str], folder: Path, prompts: list[Prompt], runs: list[OracleRun], **how: Any
) -> Mapping[str, Any]:
    """Serve by several ranks and compare; return the state of the server."""
    with serving(command, folder=folder) as server:
        answers = server.ask_together(prompts, len(runs[0].tokens))
        for answer, run in zip(answers, runs, strict=True):
            assert not differences(server, answer, run, **how)
        return server.lim()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mass", *RIVALS])
def test_each_policy_keeps_on_two_ranks_what_its_oracle_keeps(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = [long_prompts()[0], *crossing_prompts()[1:3]]
    if name == "mass":
        settings = {"policy": "lessismore", "ranking": "mass", "budget": BUDGET}
        oracle = Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET, by_mass=True)
    else:
        settings = RIVALS[name].settings_with(write_tiny_gates(tmp_path / "gate"))
        oracle = RIVALS[name].oracle(tiny_model, SELECT_LAYERS)
    if name == "mass" or not RIVALS[name].picks:
        settings["select_layers"] = SELECT_LAYERS
    config = LimConfig.from_mapping(settings)
    policy = config.make_policy()
    assert isinstance(policy, SparsePolicy)
    runs = [oracle.generate(prompt, 16) for prompt in prompts]
    if name != "mass":
        runs = [RIVALS[name].written(run) for run in runs]
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU, "--tp-size", "2"]
    command += ["--attention-backend", "lim", "--lim-config", config.to_json()]
    shared = policy.sharing is SharedBy.ALL
    state = serve_and_compare(command, tmp_path, prompts, runs, shared=shared)
    assert state["live_ranks"] == 2


@pytest.mark.slow
def test_ranks_lose_nothing_to_aborts_and_retractions(tiny_model: Path, tmp_path: Path) -> None:
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU, *WITH_LIM]
    with serving([*command, *RETRACTING, "--tp-size", "2"], folder=tmp_path) as server:
        found = asyncio.run(soak_server(server, tmp_path, num_requests=120, seed=1))
    assert found["broken"] == []
    assert found["sparse_rows"] > 0


@pytest.mark.slow
def test_three_ranks_serve_smollm2(tmp_path: Path) -> None:
    model, layers = embedded_model(SMOLLM2), (2, 17)
    prompts = [AutoTokenizer.from_pretrained(model)(text)["input_ids"] for text in stories()[:2]]
    oracle = Oracle(model, select_layers=layers, budget=BUDGET)
    runs = [oracle.generate(prompt, NUM_NEW) for prompt in prompts]
    command = [*SGLANG, "--model-path", str(model), *ON_CPU, "--tp-size", "3"]
    command += ["--attention-backend", "lim", "--lim-budget", str(BUDGET)]
    assert serve_and_compare(command, tmp_path, prompts, runs, ranks=3)["live_ranks"] == 3


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_of_experts_keeps_what_its_oracle_keeps(ranks: int, tmp_path: Path) -> None:
    model = build_tiny_qwen3_moe(tmp_path / "experts")
    oracle = Oracle(model, select_layers=SELECT_LAYERS, budget=BUDGET)
    runs = [oracle.generate(prompt, NUM_NEW) for prompt in PROMPTS]
    command = [*SGLANG, "--model-path", str(model), "--skip-tokenizer-init"]
    command += [*ON_CPU, *WITH_LIM, "--tp-size", str(ranks)]
    assert serve_and_compare(command, tmp_path, PROMPTS, runs, ranks=ranks)["sparse_rows"] > 0
