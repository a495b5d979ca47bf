"""A server that is made to retract: only the retracted request changes, as the oracle says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import (
    ON_CPU,
    SGLANG_SERVE,
    WITH_LIM,
    Answer,
    Client,
    serving,
    set_differences,
    token_differences,
)
from tests.server.oracle import KeptSets, Oracle, OracleRun
from tests.server.tiny_model import NUM_NEW, Prompt, crossing_prompts, long_prompts

pytestmark = pytest.mark.e2e

PROMPTS = [*long_prompts()[:3], crossing_prompts()[-1]]
LONGEST = 2
"""Index of the longest prompt: among equally long outputs, SGLang retracts its request."""

RETRACTING = {
    "SGLANG_TEST_RETRACT": "1",
    # A multiple of this number of forward passes retracts: the first one comes after about 31
    # tokens (27 to 33 were checked: no near ties there), the second after the end.
    "SGLANG_TEST_RETRACT_INTERVAL": "36",
    # No forward passes but those of our requests.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}


@dataclass(frozen=True)
class Round:
    """A retracting server's answers to `PROMPTS`, asked at once."""

    answers: list[Answer]
    kept: list[KeptSets]
    retracted_at: list[list[int]]
    """Numbers of output tokens at which each request was retracted."""
    counted: int
    """Retractions in `/server_info`."""


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    """Ask a server that has done nothing before."""
    command = [*SGLANG_SERVE, "--model-path", str(tiny_model), *ON_CPU, *WITH_LIM]
    folder = tmp_path_factory.mktemp("retracting")
    with serving([*command, "--skip-server-warmup"], folder=folder, settings=RETRACTING) as server:
        answers = server.ask_together(PROMPTS)
        return Round(
            answers,
            [server.kept_sets(answer) for answer in answers],
            [retractions(server, answer) for answer in answers],
            server.lim()["retractions"],
        )


def retractions(server: Client, answer: Answer) -> list[int]:
    """Return the numbers of output tokens at which a request was retracted: it misses steps there.

    The row before such a gap was running when SGLang retracted the request; its token is dropped.
    """
    steps = server.steps(answer.rid)
    gaps = [before for before, after in pairwise(sorted(steps)) if after > before + 1]
    return [steps[before] - answer.prompt_tokens for before in gaps]


def test_the_longest_request_was_retracted_once_and_counted(served: Round) -> None:
    others = [at for number, at in enumerate(served.retracted_at) if number != LONGEST]
    assert not any(others)
    (retracted_at,) = served.retracted_at[LONGEST]
    assert 0 < retracted_at < NUM_NEW
    assert served.counted == 1


def test_the_others_are_left_alone(served: Round, tiny_run: Callable[[Prompt], OracleRun]) -> None:
    for number, prompt in enumerate(PROMPTS):
        if number != LONGEST:
            run = tiny_run(prompt)
            assert not token_differences(served.answers[number].tokens, run.tokens)
            assert not set_differences(served.kept[number], run.kept)


def test_the_retracted_request_goes_on_from_a_dense_prefill(
    served: Round, tiny_oracle: Oracle, tiny_run: Callable[[Prompt], OracleRun]
) -> None:
    prompt, tokens = PROMPTS[LONGEST], served.answers[LONGEST].tokens
    (retracted_at,) = served.retracted_at[LONGEST]
    run = tiny_oracle.generate(prompt, NUM_NEW, reprefill_at=(retracted_at,))
    dropped = len(prompt) + retracted_at  # the length of the row whose token is dropped
    kept = {row: kept for row, kept in served.kept[LONGEST].items() if row[0] != dropped}
    assert not token_differences(tokens, run.tokens)
    assert not set_differences(kept, run.kept)
    assert tokens != tiny_run(prompt).tokens, "this prompt cannot tell a retraction"


@pytest.mark.slow
def test_a_retracted_requests_penalties_go_on(tiny_model: Path, tmp_path: Path) -> None:
    """Dense, so that what was decoded and what is prefilled again have the same keys."""
    options = ["--attention-backend", "lim", "--lim-policy", "full", "--skip-server-warmup"]
    command = [*SGLANG_SERVE, "--model-path", str(tiny_model), *ON_CPU, *options]
    sampling = {"temperature": 0, "max_new_tokens": 80, "min_new_tokens": 70}
    sampling |= {"logit_bias": {"2": 3.0}}  # it would end without a least number of tokens
    penalties = {"frequency_penalty": 0.3, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    bodies = [{"input_ids": prompt, "sampling_params": sampling | penalties} for prompt in PROMPTS]

    def answers(folder: str, settings: dict[str, str]) -> list[Any]:
        (tmp_path / folder).mkdir()
        with serving(command, folder=tmp_path / folder, settings=settings) as server:

            def ask(body: dict[str, Any]) -> Any:
                return httpx.post(f"{server.url}/generate", json=body, timeout=300).json()

            with ThreadPoolExecutor(len(bodies)) as pool:
                return list(pool.map(ask, bodies))

    often = RETRACTING | {"SGLANG_TEST_RETRACT_INTERVAL": "12"}
    expected, found = answers("plain", {}), answers("retracting", often)
    assert sum(each["meta_info"]["num_retractions"] for each in found) > 2
    assert [each["output_ids"] for each in found] == [each["output_ids"] for each in expected]
