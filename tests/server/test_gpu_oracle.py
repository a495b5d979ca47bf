"""Real models on the GPU, teacher-forced against the independent oracle in fp16."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lim_sglang.models import SMOLLM2, cache_folder

pytestmark = pytest.mark.gpu

MODELS = {
    "smollm2": (cache_folder() / SMOLLM2.name, "2,17"),
    "coder-0.5b": (Path(os.environ.get("LIM_TEST_MODELS", "/")) / "coder-0.5b", "2,9"),
}
"""Folder and SELECT layers; a converted SmolLM2 is in the cache after a first `lim serve`."""

NOISE = 3
"""Times as far from the oracle in fp32 as the oracle itself is in fp16, where near ties decide half
of the sets otherwise (by up to 3 of 256 tokens in Coder-0.5B)."""


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each model that is here, all at once; ended with the tests."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.server.gpu_teacher_forced", str(folder), select],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for name, (folder, select) in MODELS.items()
        if folder.is_dir()
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("name", MODELS)
def test_served_logits_are_as_near_the_oracle_as_dense_ones(
    started: dict[str, subprocess.Popen[str]], name: str
) -> None:
    if name not in started:
        folder = MODELS[name][0].name
        pytest.skip(f"{folder} is not here: set LIM_TEST_MODELS, or run lim serve once")
    output, errors = started[name].communicate()
    assert started[name].returncode == 0, errors[-3000:]
    found = json.loads(output.splitlines()[-1])
    sys.stdout.write(json.dumps(found) + "\n")  # shown with -rP, for docs/log.md
    dense, lim = found["dense"], found["lim"]
    assert lim["top1"] >= dense["top1"] - 0.01
    assert lim["kl"] <= NOISE * found["oracle_in_fp16"]["kl"] + dense["kl"]
    # What would be seen if decode were dense, or another layer selected.
    assert found["dense_oracle_to_lim"]["kl"] > 10 * lim["kl"]
    assert found["oracle_to_other_select_layers"]["kl"] > 10 * lim["kl"]
