"""Real models on the GPU, teacher-forced against the independent oracle in fp16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lim_sglang.models import SMOLLM2, cache_folder

pytestmark = pytest.mark.gpu

MODELS = {
    "smollm2": (cache_folder() / SMOLLM2.name, "2,17"),
    "coder-0.5b": (Path(os.environ.get("LIM_TEST_MODELS", "/")) / "coder-0.5b", "2,9"),
}
"""Folder and SELECT layers; a converted SmolLM2 is in the cache after a first `lim serve`."""

KL_NOISE = 2e-4
"""Nats that fp16 may cost a set which a near tie decides."""


@pytest.mark.parametrize("name", MODELS)
def test_served_logits_are_as_near_the_oracle_as_dense_ones(name: str) -> None:
    folder, select = MODELS[name]
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not here: set LIM_TEST_MODELS, or run lim serve once")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.teacher_forced", str(folder), select],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(json.dumps(found) + "\n")  # shown with -rP, for docs/log.md
    dense, lim = found["dense"], found["lim"]
    assert lim["top1"] >= dense["top1"] - 0.01
    assert lim["kl"] <= 1.5 * dense["kl"] + KL_NOISE
    # What would be seen if decode were dense, or another layer selected.
    assert found["dense_oracle_to_lim"]["kl"] > 10 * lim["kl"]
    assert found["oracle_to_other_select_layers"]["kl"] > 10 * lim["kl"]
