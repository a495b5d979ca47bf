"""`sgl.Engine` without any server: `LIM_CONFIG` alone makes its decode sparse."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import clean_environment
from tests.server.client import Answer, Client
from tests.server.comparing import disagreements
from tests.server.oracle import OracleRun
from tests.server.prompts import BUDGET, NUM_NEW, Prompt, long_prompts
from tests.server.tiny_models import SELECT_LAYERS

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parent / "engine_in_process.py"
TIMEOUT_S = 300
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "lim",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
}
CONFIG = {"budget": BUDGET, "select_layers": SELECT_LAYERS}


@dataclass(frozen=True)
class Engine:
    """What the engine said in its process."""

    refusal: str
    """The error of a start with an option that is refused."""
    answer: Answer
    lim: dict[str, Any]
    trace: Path


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One engine, asked for the first of the long prompts."""
    trace = tmp_path_factory.mktemp("engine") / "trace"
    asked = {
        "options": OPTIONS | {"model_path": str(tiny_model)},
        "refused": {"enable_mixed_chunk": True, "pp_size": 2},
        "prompt": long_prompts()[0],
        "sampling": {"max_new_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True},
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(asked),
        env=clean_environment({"LIM_CONFIG": json.dumps(CONFIG), "LIM_TRACE": str(trace)}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return Engine(said["refusal"], Answer.read(said["answer"]), said["lim"], trace)


def test_its_tokens_and_sets_are_the_oracles(
    engine: Engine, tiny_run: Callable[[Prompt], OracleRun]
) -> None:
    client = Client("no server", engine.trace)
    assert not disagreements(client, [engine.answer], [tiny_run(long_prompts()[0])])


def test_its_state_shows_the_configuration_and_the_sparse_rows(engine: Engine) -> None:
    shown = engine.lim["config"]
    assert (shown["budget"], tuple(shown["select_layers"])) == (BUDGET, SELECT_LAYERS)
    assert engine.lim["sparse_rows"] == NUM_NEW  # the last one in vain: the scheduler overlaps


def test_it_names_all_options_that_it_refuses(engine: Engine) -> None:
    assert engine.refusal.startswith("RefusedError")
    assert "--enable-mixed-chunk" in engine.refusal
    assert "--pp-size 2" in engine.refusal
