"""`./launch.sh` with the embedded model: a real one, whose tokens and sets are the oracle's."""

import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import httpx
import pytest
from transformers import AutoTokenizer

from lim_sglang.models import SMOLLM2, embedded_model
from tests.processes import LAUNCH, LocalServer, disagreements, serving
from tests.server.oracle import Oracle, OracleRun
from tests.server.tiny_model import BUDGET, NUM_NEW, Prompt, stories

pytestmark = pytest.mark.e2e

SELECT_LAYERS = (2, 17)
"""The preset of SmolLM2's shape."""
API_KEY = "a-key-of-the-tests"
SETTINGS = {
    "LIM_API_KEY": API_KEY,
    "SGLANG_USE_CPU_ENGINE": "",  # `lim serve` sets it
}
ENDS_WITHIN_S = 20.0
BLOCK_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the server's log."""
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Return the stories in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(SMOLLM2))
    return [tokenizer(story)["input_ids"] for story in stories()]


@pytest.fixture(scope="module")
def runs(prompts: list[Prompt]) -> list[OracleRun]:
    """Return the oracle's runs of the stories, on the folder that is served."""
    oracle = Oracle(embedded_model(SMOLLM2), select_layers=SELECT_LAYERS, budget=BUDGET)
    return [oracle.generate(prompt, NUM_NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def server(folder: Path, runs: list[OracleRun]) -> Iterator[LocalServer]:
    """Run `lim serve --budget 256`, started when the oracle has left the cores free."""
    with serving([*LAUNCH, "--budget", str(BUDGET)], folder=folder, settings=SETTINGS) as running:
        yield running


def test_the_ready_block_says_where_what_and_how(server: LocalServer, folder: Path) -> None:
    block = ready_block(folder / "server.log")
    assert server.url in block
    assert SMOLLM2.name in block
    assert f"read {BUDGET} tokens picked at layers 2, 17" in block
    assert f'lim ask "What is 17 * 23?" --samples 8 --url {server.url}' in block


def ready_block(log: Path) -> str:
    """Return the message of `lim serve` when its server is ready."""
    deadline = time.monotonic() + BLOCK_WITHIN_S
    while "Ctrl-C" not in log.read_text():
        assert time.monotonic() < deadline, f"no block in {BLOCK_WITHIN_S} s"
        time.sleep(0.5)
    return log.read_text().partition("LessIsMore is live")[2].partition("Ctrl-C")[0]


def test_stories_all_at_once_are_the_oracles(
    server: LocalServer, prompts: list[Prompt], runs: list[OracleRun]
) -> None:
    assert not disagreements(server, server.ask_cold(prompts, together=True), runs)


def test_some_stories_one_by_one_are_the_oracles(
    server: LocalServer, prompts: list[Prompt], runs: list[OracleRun]
) -> None:
    some = slice(None, None, 2)  # all of them have been asked together
    answers = server.ask_cold(prompts[some], together=False)
    assert not disagreements(server, answers, runs[some])


def test_a_chat_longer_than_the_budget_has_sparse_rows(server: LocalServer) -> None:
    before = server.lim()["sparse_rows"]
    answer = server.chat(f"{stories()[0]} What was carried?", num_tokens=8)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > BUDGET
    # The first token comes from prefill.
    num_sparse = server.lim()["sparse_rows"] - before
    assert num_sparse >= answer["usage"]["completion_tokens"] - 1 > 0


def test_a_client_without_the_key_is_turned_away(server: LocalServer) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 401


def test_sigterm_ends_the_whole_process_tree(server: LocalServer) -> None:
    """Last in this file, because it ends the server."""
    ending = server.end_by(SIGTERM, ENDS_WITHIN_S)
    assert not ending.left
    assert ending.code == 0
