"""Models, oracles and servers that tests share.

Without a GPU, Triton interprets kernels: it reads `TRITON_INTERPRET` when a kernel is decorated, so
the variable is set before anything imports a kernel. Tests that need a GPU are collected, too.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from lim_sglang.errors import ServerError
from lim_sglang.server import Server, ServerOptions
from tests.forked_commands import Forker, forking
from tests.processes import ON_CPU, SGLANG, WITH_LIM, LocalServer, serving
from tests.server.oracle import Oracle, OracleRun
from tests.server.prompts import BUDGET, NUM_NEW, Prompt, long_prompts, short_prompts
from tests.server.tiny_models import SELECT_LAYERS, build_tiny_qwen3

DenseTokens = dict[tuple[int, ...], tuple[int, ...]]
"""Prompt -> the tokens that SGLang's own dense server generates."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random Qwen3."""
    return build_tiny_qwen3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_oracle(tiny_model: Path) -> Oracle:
    """LessIsMore on the tiny model."""
    return Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET)


@pytest.fixture(scope="session")
def tiny_run(tiny_oracle: Oracle) -> Callable[[Prompt], OracleRun]:
    """What the oracle does with a prompt; each prompt is run once."""
    runs: dict[tuple[int, ...], OracleRun] = {}

    def run(prompt: Prompt) -> OracleRun:
        key = tuple(prompt)
        if key not in runs:
            runs[key] = tiny_oracle.generate(prompt, NUM_NEW)
        return runs[key]

    return run


@dataclass(frozen=True)
class DenseServer:
    """What SGLang's own `torch_native` server did."""

    tokens: DenseTokens
    """Of the long and the short prompts."""
    verdict: str
    """Why `lim serve` would not take it for a server of LessIsMore."""


@pytest.fixture(scope="session")
def dense(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DenseServer:
    """SGLang without LessIsMore; it has ended when its answers are here."""
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU]
    command += ["--attention-backend", "torch_native"]
    with serving(command, folder=tmp_path_factory.mktemp("dense")) as server:
        with pytest.raises(ServerError) as refused:
            Server(ServerOptions(str(tiny_model), port=server.port)).prove()
        prompts = [*long_prompts(), *short_prompts()]
        tokens = {tuple(prompt): server.ask(prompt).tokens for prompt in prompts}
        return DenseServer(tokens, str(refused.value))


@pytest.fixture(scope="session")
def dense_tokens(dense: DenseServer) -> DenseTokens:
    """What SGLang's own `torch_native` server makes of the long and the short prompts."""
    return dense.tokens


@pytest.fixture(scope="session")
def tiny_server(
    tiny_model: Path,
    dense_tokens: DenseTokens,  # two servers at once would be too much for two cores
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalServer]:
    """The tiny model behind `sglang.launch_server --attention-backend lim`.

    Of `test_sampler_e2e.py` and `test_tiny_server.py`, which run one after the other; the latter
    ends it.
    """
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU, *WITH_LIM]
    with serving(command, folder=tmp_path_factory.mktemp("sparse")) as running:
        yield running


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Runs commands as processes of their own that share a loaded frontend: loading takes 10 s."""
    with forking() as forker:
        yield forker
