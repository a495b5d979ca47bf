"""What every Triton kernel here shares: tile shapes and the checks before a launch.

No autotuning: a kernel must launch the same in a CUDA graph, in the interpreter and when it is
compiled without a GPU.
"""

import triton
from torch import Tensor
from triton import knobs

SCORE_BLOCK = 128
"""Tokens that one program scores at a time."""
SCORE_SPLITS = 32
"""Programs a request and KV head, so that the grid does not depend on the length."""
MIN_DOT_ROWS = 16
"""The fewest rows that a tensor core takes; smaller query groups are padded."""
RANK_BLOCK = 2048
"""Scores that one pass of the radix selection reads at a time."""
UNION_BLOCK = 1024
"""Turns or positions that one pass of the union reads at a time."""
LENGTH_BLOCK = 1024
"""Rows whose lengths are added up at a time."""
MAX_SORT = 16384
"""The longest ranking of one head that is sorted within one program."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return bool(knobs.runtime.interpret)


def padded_group(num_heads: int, num_kv_heads: int) -> int:
    """Rows of the score tile of one KV head."""
    return max(MIN_DOT_ROWS, triton.next_power_of_2(num_heads // num_kv_heads))


def rank_warps(padded_ranks: int) -> int:
    """Warps that sort so many tokens of one head in registers."""
    return 8 if padded_ranks <= 4096 else 16


def check_same_device(**tensors: Tensor) -> None:
    """Refuse tensors on different devices: a kernel would read garbage."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors must be on one device, not {devices}")


def check_last_dim_dense(**tensors: Tensor) -> None:
    """Refuse tensors whose last dimension has gaps."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, not strides {tensor.stride()}"
            )
