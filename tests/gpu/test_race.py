"""No race: under a crowd, every step's kept slots are those of the step's own snapshot."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rig import build_model
from tests.gpu.serve_crowd import NUM_REQUESTS

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parent / "serve_crowd.py"
SETTINGS = json.dumps({"budget": 256, "select_layers": [2, 4]})
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}


@dataclass(frozen=True)
class Mode:
    """One way in which SGLang orders the host's and the GPU's work."""

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


MODES = {
    "overlap": Mode(),
    "no-overlap": Mode({"disable_overlap_schedule": True}),
    "coarse-barrier": Mode(environment={"SGLANG_FORCE_COARSE_WAR_BARRIER": "1"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    return build_model(tmp_path_factory.mktemp("crowd"), "smollm2")


def serve_crowd(model: Path, backend: str, mode: Mode) -> dict[str, Any]:
    """Tokens by request and the state of LessIsMore after a crowd."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(model), backend, json.dumps(mode.options)],
        env={**os.environ, **RETRACTING, "LIM_AUDIT": "1", "LIM_CONFIG": SETTINGS}
        | mode.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", MODES)
def test_every_kept_set_is_that_of_the_steps_own_snapshot(model: Path, name: str) -> None:
    found = serve_crowd(model, "lim", MODES[name])
    state = found["lim"]
    assert len(found["tokens"]) == NUM_REQUESTS
    assert state["retractions"] > 0
    assert state["sparse_rows"] > 1000
    assert state["checked_sets"] > 2000
    assert state["wrong_sets"] == 0
