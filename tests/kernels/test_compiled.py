"""Every kernel compiles for the GPUs that are supported, fits into their shared memory, and leaves
registers for the programs that run beside it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.kernels.decode_layer import SKINNY_TILES
from lim_sglang.kernels.launch import RUN_PROGRAMS_PER_SM
from tests.kernels.compile_all import SM_SHARED_BYTES

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
    "list_turns",
    "merge_turns",
    "log_sum_exp",
    "softmax_mass",
    "topk_by_mass",
    "attend_tokens",
    "attend_runs",
    "combine_splits",
    "pick_coupled",
}
OF_HOPPER = {"multiply", "norm_rotate_store"}
"""Kernels that serve on that architecture alone."""


HOPPER = "90"
REGISTERS = 65536
"""Of an SM, on all of these architectures: NVIDIA's CUDA programming guide."""
SIDE_BY_SIDE = {
    **dict.fromkeys(("shortlist_tokens", "rank_tokens 192"), 2),
    **dict.fromkeys(("score_tokens", "softmax_mass", "compact_slots"), 4),
    "multiply shared": 2,
    "attend_tokens bf16 bf16 128": 5,  # `WIDE_TILE`
    "attend_tokens fp16 fp16 64": 5,
    "attend_runs bf16 bf16 128": 2,  # RUN_PROGRAMS_PER_SM
    "attend_runs fp16 fp16 64": 2,
}
"""Programs that an SM has registers for, at least, by the beginnings of kernels' names."""
MAX_SPILLED = 16
"""Most bytes of a thread's stack where programs shall run side by side."""
RESERVED_BYTES = 1024
"""Shared memory of an SM that each program takes besides its own: the same guide."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What a program takes, by architecture and kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_kernel_fits(compiled: dict[str, dict[str, Any]], architecture: str) -> None:
    kernels = compiled[architecture]
    of_one = OF_HOPPER if architecture == HOPPER else set()
    assert {name.split()[0] for name in kernels} == KERNELS | of_one
    assert max(each["shared_bytes"] for each in kernels.values()) <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("beginning", SIDE_BY_SIDE)
def test_registers_are_left_for_programs_side_by_side(
    compiled: dict[str, dict[str, Any]], beginning: str
) -> None:
    """Bounds, not counts, which a compiler changes."""
    kernels = [each for name, each in compiled[HOPPER].items() if name.startswith(beginning)]
    assert kernels
    for each in kernels:
        most = REGISTERS // (32 * each["warps"] * SIDE_BY_SIDE[beginning])
        assert each["registers"] <= most
        assert each["stack_bytes"] <= MAX_SPILLED


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_shared_memory_is_left_for_a_second_program_of_runs(
    compiled: dict[str, dict[str, Any]], architecture: int
) -> None:
    """Of heads up to 128. SMs of architecture 120 run one, which suffices for their memory."""
    found = compiled[str(architecture)]
    names = [name for name in found if name.startswith("attend_runs") and " 256 " not in name]
    assert names
    for name in names:
        taken = found[name]["shared_bytes"] + RESERVED_BYTES
        assert RUN_PROGRAMS_PER_SM * taken <= SM_SHARED_BYTES[architecture]


def test_two_programs_share_an_sm_where_products_need_more_programs_than_sms(
    compiled: dict[str, dict[str, Any]],
) -> None:
    shared = [each for name, each in compiled[HOPPER].items() if name.startswith("multiply shared")]
    assert len(shared) == len(SKINNY_TILES)
    for each in shared:
        assert 2 * (each["shared_bytes"] + RESERVED_BYTES) <= SM_SHARED_BYTES[int(HOPPER)]
