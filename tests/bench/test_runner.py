"""What `lim bench decode` builds, in SGLang itself: one runner, a filled cache, two backends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.compat import CPU_ENGINE_VAR
from tests.processes import clean_environment
from tests.server.tiny_model import NUM_LAYERS

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parent / "bench_in_process.py"
BUDGET = 64
LONG, SHORT, MIXED = "4x1500", "2x50", "1x1500+2x50+1x900"


@pytest.fixture(scope="module")
def shown(tiny_model: Path) -> dict[str, Any]:
    """What the script says about the tiny model."""
    command = [sys.executable, str(SCRIPT), str(tiny_model), str(BUDGET), LONG, SHORT, MIXED]
    done = subprocess.run(
        command,
        env=clean_environment({CPU_ENGINE_VAR: "1"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("point", "sparse_rows"), [(LONG, 4), (SHORT, 0), (MIXED, 2)])
def test_a_drawn_context_decodes_as_a_prefilled_one(
    shown: dict[str, Any], point: str, sparse_rows: int
) -> None:
    found = shown["points"][point]
    assert found["finite"]
    assert found["same_again"]  # the length stays, so every window measures the same step
    assert found["sparse_rows"] == sparse_rows


def test_backends_are_exchanged_on_one_runner(shown: dict[str, Any]) -> None:
    for found in shown["points"].values():
        assert found["dense_backend"] == "TorchNativeAttnBackend"
        assert found["attention_backend"] == "lim"
    assert shown["points"][SHORT]["same_as_dense"]
    assert not shown["points"][LONG]["same_as_dense"]


def test_short_rows_of_a_mixed_batch_are_dense_and_the_others_are_not(
    shown: dict[str, Any],
) -> None:
    assert shown["points"][MIXED]["rows_over"] == [0, 3]
    assert shown["points"][MIXED]["rows_as_dense"] == [1, 2]


def test_the_bytes_are_the_model_s_own(shown: dict[str, Any]) -> None:
    facts = shown["facts"]
    assert facts["quantization"] == "none"
    assert list(facts["weight_bytes_by_dtype"]) == ["torch.float32"]
    assert facts["layers"] == len(facts["roles"]) == NUM_LAYERS
    assert (facts["heads"], facts["kv_heads"], facts["head_dim"]) == (6, 2, 16)
    assert facts["kv_bytes_per_token_and_layer"] == 2 * 2 * 16 * 4
    per_layer = 64 * 16 * (6 + 2 + 2) + 6 * 16 * 64 + 3 * 64 * 128 + 2 * 16 + 2 * 64
    # Matrices, norms and the output matrix in f32; the embedding is not tied, so not read.
    assert facts["weight_bytes_read"] == 4 * (NUM_LAYERS * per_layer + 64 + 512 * 64)
