"""Real models on the GPU, teacher-forced against the independent oracle in fp16."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.models import SMOLLM2, cache_folder
from tests.server.in_process import run_in_process

pytestmark = pytest.mark.gpu

MODELS = {
    "smollm2": (cache_folder() / SMOLLM2.name, (2, 17)),
    "coder-0.5b": (Path(os.environ.get("LIM_TEST_MODELS", "/")) / "coder-0.5b", (2, 9)),
}
"""Folder and SELECT layers; a converted SmolLM2 is in the cache after a first `lim serve`."""

NOISE = 3
"""Allowed distance from the fp32 oracle, in distances of the fp16 oracle from it: there, near ties
decide half of the sets otherwise (by up to 3 of 256 tokens in Coder-0.5B)."""


Runs = dict[str, Future[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """Run each model that is here, all at once, each in a process of its own."""
    with ThreadPoolExecutor() as pool:
        yield {
            name: pool.submit(
                run_in_process,
                "force_tokens",
                {"model": str(folder), "select_layers": select},
                os.environ,
            )
            for name, (folder, select) in MODELS.items()
            if folder.is_dir()
        }


@pytest.mark.parametrize("name", MODELS)
def test_served_logits_are_as_near_the_oracle_as_dense_ones(runs: Runs, name: str) -> None:
    if name not in runs:
        folder = MODELS[name][0].name
        pytest.skip(f"{folder} is not here: set LIM_TEST_MODELS, or run lim serve once")
    found = runs[name].result()
    sys.stdout.write(json.dumps(found) + "\n")  # shown with -rP, for docs/log
    dense, lim = found["dense"], found["lim"]
    assert lim["top1"] >= dense["top1"] - 0.01
    assert lim["kl"] <= NOISE * found["oracle_in_fp16"]["kl"] + dense["kl"]
    # A dense decode, or another SELECT layer, would be as far away as these.
    assert found["dense_oracle_to_lim"]["kl"] > 10 * lim["kl"]
    assert found["oracle_to_other_select_layers"]["kl"] > 10 * lim["kl"]
