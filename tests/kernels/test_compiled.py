"""Every kernel compiles for the GPUs that are supported, and fits into their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_all.py"
SHARED_BYTES = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10}
"""Shared memory that one program may take, by architecture: NVIDIA's CUDA programming guide."""
KERNELS = {
    "score_tokens",
    "shortlist_tokens",
    "rank_tokens",
    "count_kept",
    "copy_window",
    "compact_slots",
    "log_sum_exp",
    "softmax_mass",
    "topk_by_mass",
    "attend_tokens",
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    """Shared memory in bytes by architecture and kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_kernel_fits(compiled: dict[str, dict[str, int]], architecture: str) -> None:
    kernels = compiled[architecture]
    assert {name.split()[0] for name in kernels} == KERNELS
    assert max(kernels.values()) <= SHARED_BYTES[architecture]
