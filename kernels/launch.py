"""Shared by every Triton kernel here: tile shapes, checks before a launch, and device functions
that order programs: the last program of a unit (block counters) and programmatic dependent launch.

No autotuning: a kernel must launch the same in a CUDA graph, in the interpreter and when it is
compiled without a GPU.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True)
class Tile:
    """What a program of attention over a kept set reads at a time."""

    elements: int
    """Of K, and of V."""
    side_by_side: int
    """Programs that a processor of an H100 runs at a time, by their memory and registers."""


SCORE_BLOCK = 128
"""Tokens that one program scores at a time."""
SCORE_SPLITS = 32
"""Programs a request and KV head, so that the grid does not depend on the length."""
MIN_DOT_ROWS = 16
"""The fewest rows that a tensor core takes; smaller query groups are padded."""
MIN_SAMPLE, MAX_SAMPLE = 2048, 8192
"""Scores of a head that a threshold is sampled from, at least and at most."""
SAMPLED_SHARE = 16
"""One score of so many is sampled in the longest rows that a buffer holds."""
WIDE_TILE, NARROW_TILE = Tile(8192, side_by_side=5), Tile(4096, side_by_side=8)
"""Of attention over a kept set; which of them, `attend_block` says."""
MAX_ATTENDED_DIM = WIDE_TILE.elements // MIN_DOT_ROWS
"""Of a head: a tile of it has as many tokens as a tensor core takes."""
MAX_NARROW_DIM, MAX_NARROW_QUERY = 128, 896
"""Of a head, and of all query heads of a KV head: more, and a program with narrow tiles takes more
than 128 registers a thread."""
ATTEND_WARPS = 2
"""Of attention over a kept set: more programs on a processor hide more of the memory's latency."""
ATTEND_STAGES = 3
"""Of its loop, in Triton's sense: slots, then K and V, are asked for ahead of what is computed."""
BYTES_PER_PROCESSOR = 4
"""Programs of attention that few rows are shared among, times bytes a number of the cache: narrow
numbers need more programs for as many bytes in flight. Many rows make more, which share nothing."""
MIN_SPLIT, MAX_SPLITS = 64, 16
"""Tokens of a row that a program is worth, and programs that a row is worth, at most."""
SPLIT_ALIGNMENT = 16
"""Tokens that parts are multiples of, so that slots are read in whole loads."""
SPLITS_AT_ONCE = 32
"""Heads times parts that are merged at a time."""
SLACK_SHARE = 16
"""One in so many of a sample may miss a threshold that was meant for it: none is exact anyway."""
SHORTLIST_BLOCK = 4096
"""Scores that a shortlist reads at a time."""
RANK_BLOCK = 2048
"""Scores that one pass of the radix selection reads at a time."""
POOL_BLOCK = 256
"""Positions whose mass one program adds up."""
POOL_HEADS = 32
"""Heads whose scores are in flight at a time, at most."""
HEAVIEST_BLOCK = 8192
"""Masses that the one program of a row reads at a time."""
HEAVIEST_SMALL_BLOCK = 1024
"""Slots that are copied at a time, and masses where all are read again: less code to fetch."""
LSE_BLOCK = 1024
"""Scores whose exponentials are added up at a time."""
COMPACT_BLOCK = 2048
"""Positions that one program compacts, and whose chosen tokens are counted for it (`rank.py`)."""
LENGTH_BLOCK = 1024
"""Rows whose lengths are added up at a time."""
MAX_SORT = 16384
"""The longest ranking of one head that is sorted within one program."""
WIDE_WARPS = 8
"""Warps of a program that reads thousands of turns or positions at a time."""
NUM_STAGES = 2
"""Tiles of keys in flight while scores are computed."""
NEVER = 2**31 - 1
"""The first turn of a token that no head has ranked."""
NEEDS_FULL_RANKING = -1
"""The last turn of a row that is still to be ranked whole."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return bool(knobs.runtime.interpret)


def padded_group(num_heads: int, num_kv_heads: int) -> int:
    """Rows of the score tile of one KV head."""
    return max(MIN_DOT_ROWS, triton.next_power_of_2(num_heads // num_kv_heads))


def attend_block(dim: int, group: int, cache_bytes: int, per_processor: float) -> int:
    """Tokens in a tile of attention over a kept set.

    Wide tiles are faster, unless it takes narrow ones to run all programs at once. With wider
    heads, larger groups or another cache, registers do not let narrow ones run in that number.

    Args:
        dim, group: of a head, and query heads a KV head.
        cache_bytes: of a number of K or V.
        per_processor: programs that a processor runs in all.
    """
    light = dim <= MAX_NARROW_DIM and group * dim <= MAX_NARROW_QUERY and cache_bytes == 2
    narrow = light and WIDE_TILE.side_by_side < per_processor <= NARROW_TILE.side_by_side
    return (NARROW_TILE if narrow else WIDE_TILE).elements // dim


def sample_size(columns: int) -> int:
    """Scores to sample of rows of up to so many, a power of two."""
    return min(MAX_SAMPLE, max(MIN_SAMPLE, triton.next_power_of_2(columns // SAMPLED_SHARE)))


def rank_warps(padded_ranks: int) -> int:
    """Warps that rank one head whole: sorting it, unlike a selection among many, gains by 16."""
    return 8 if padded_ranks < 2048 else 16


def sort_warps(padded_ranks: int) -> int:
    """Warps that sort so many tokens of one head in registers."""
    return 8 if padded_ranks <= 4096 else 16


def check_tensors(**tensors: Tensor) -> None:
    """Refuse tensors on different devices, or with gaps in the last dimension."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            devices = {name: str(tensor.device) for name, tensor in tensors.items()}
            raise ValueError(f"tensors must be on one device, not {devices}")
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, not strides {tensor.stride()}"
            )


def check_int32(**tensors: Tensor) -> None:
    """Refuse tensors of another type, which a kernel would misread."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, not {tensor.dtype}")


@triton.jit
def is_last_block(block_counters, expected):
    """Whether all other programs of a unit have arrived; what they wrote is then seen.

    The last one leaves the counter as it found it. It has to read what others wrote past its own
    cache (`cache_modifier=".cg"`).
    """
    tl.debug_barrier()  # this program's own writes come before its arrival
    is_last = tl.atomic_add(block_counters, 1, sem="acq_rel") == expected - 1
    if is_last:
        tl.store(block_counters, 0)
    return is_last


PDL_CAPABILITY = (9, 0)
"""Compute capability."""


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):
    """Wait until the kernel before has ended and what it wrote is seen."""
    if USE_PDL:
        gdc_wait()


@triton.jit
def pdl_launch_next(USE_PDL: tl.constexpr):
    """Let the next kernel be launched once all programs of this one have come here or ended."""
    if USE_PDL:
        gdc_launch_dependents()


def pdl_options() -> dict[str, bool]:
    """Launch options of a kernel that begins with `follow`."""
    return {"FOLLOWS": True, "launch_pdl": True} if _has_pdl() else {"FOLLOWS": False}


@cache
def _has_pdl() -> bool:
    return not interpreted() and torch.cuda.get_device_capability() >= PDL_CAPABILITY
