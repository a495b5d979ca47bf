"""Models, oracles and servers that tests share.

Without a GPU, Triton interprets kernels: it reads `TRITON_INTERPRET` when a kernel is decorated, so
the variable is set before anything imports a kernel. Tests that need a GPU are collected, too.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tensors are small: beside other processes, threads cost ten times more
for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background and under nohup
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)  # else the commands under test inherit that

from lim_sglang.errors import ServerError
from lim_sglang.launch.server import Server, ServerOptions
from tests.forked_commands import Forker, forking
from tests.processes import ON_CPU, SGLANG, WITH_LIM, LocalServer, serving
from tests.server.oracle import Oracle, OracleRun
from tests.server.tiny_model import (
    BUDGET,
    NUM_NEW,
    SELECT_LAYERS,
    Prompt,
    build_tiny_qwen3,
    long_prompts,
    short_prompts,
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of the GPU on a machine without one, unless `-m` asks for them by name."""
    is_asked_for = "gpu" in item.config.getoption("markexpr")
    if "gpu" in item.keywords and not torch.cuda.is_available() and not is_asked_for:
        pytest.skip("needs an NVIDIA GPU")


DenseTokens = dict[tuple[int, ...], tuple[int, ...]]
"""Prompt -> the tokens that SGLang's own dense server generates."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny random Qwen3; return its folder."""
    return build_tiny_qwen3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_oracle(tiny_model: Path) -> Oracle:
    """Return the oracle of LessIsMore on the tiny model."""
    return Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET)


@pytest.fixture(scope="session")
def tiny_run(tiny_oracle: Oracle) -> Callable[[Prompt], OracleRun]:
    """Return the oracle's run of a prompt; each prompt is run once a session."""
    runs: dict[tuple[int, ...], OracleRun] = {}

    def run(prompt: Prompt) -> OracleRun:
        key = tuple(prompt)
        if key not in runs:
            runs[key] = tiny_oracle.generate(prompt, NUM_NEW)
        return runs[key]

    return run


@dataclass(frozen=True)
class DenseServer:
    """Answers of SGLang's own `torch_native` server."""

    tokens: DenseTokens
    """Tokens for the long and the short prompts."""
    verdict: str
    """The error with which `lim serve` refuses this server as one of LessIsMore."""


@pytest.fixture(scope="session")
def dense(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DenseServer:
    """Run SGLang without LessIsMore; the server has ended when its answers are returned."""
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
    """Return the `torch_native` server's tokens for the long and the short prompts."""
    return dense.tokens


@pytest.fixture(scope="session")
def tiny_server(
    tiny_model: Path,
    dense_tokens: DenseTokens,  # two servers at once would be too much for two cores
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalServer]:
    """Serve the tiny model by `sglang.launch_server --attention-backend lim`.

    Shared by the end-to-end tests of `programs` and `server`; `test_tiny_server.py`, the last of
    them, ends it.
    """
    command = [*SGLANG, "--model-path", str(tiny_model), *ON_CPU, *WITH_LIM]
    command += ["--sampling-backend", "lim"]
    with serving(command, folder=tmp_path_factory.mktemp("sparse")) as running:
        yield running


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Return a process with SGLang's frontend, which forks for each command: loading takes 10 s."""
    with forking() as forker:
        yield forker
