"""Tile shapes, checks before a launch, and device functions that order programs.

Shared by every Triton kernel of this folder. Nothing is autotuned: a kernel must launch the same
way in a CUDA graph, in the interpreter and when it is compiled without a GPU. A *program* is
Triton's word for a thread block, an *SM* a streaming multiprocessor.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True)
class Tile:
    """Tile of K, and of V, that one program of sparse attention reads at a time."""

    elements: int
    programs_per_sm: int
    """Programs that an SM of an H100 runs at a time, limited by shared memory and registers."""


SCORE_BLOCK = 128
"""Tokens that a program scores at a time."""
SCORE_SPLITS = 32
"""Scoring programs per request and KV head: constant, so the grid does not depend on lengths."""
SCORE_STAGES = 2
"""Tiles of keys in flight while scores are computed."""
BOUND_BLOCK = 64
"""Pages whose scores a program bounds at a time."""
BOUND_SPLITS = 32
"""Bounding programs per request and KV head: constant, as of scoring."""
GATE_BLOCKS = 32
"""Blocks whose logits a program computes at a time."""
GATE_SPLITS = 16
"""Gating programs per request and KV head: constant, as of scoring."""
GATE_ROWS, GATE_COLUMNS = 16, 32
"""Rows and columns of a gate's projected queries that one program computes."""
MIN_DOT_ROWS = 16
"""Fewest rows that a tensor core takes; smaller query groups are padded."""
MIN_SAMPLE, MAX_SAMPLE = 2048, 8192
"""Fewest and most scores of a head that a threshold is sampled from."""
SAMPLE_STRIDE = 16
"""Columns of the longest row that there can be per sampled score, within those bounds."""
SHORTLIST_SAMPLE = 4096
"""Most scores of a head that a shortlist samples in registers. Where the longest row would need
more, thresholds of long rows are raised among denser samples."""
THIN_STRIDE, DENSE_STRIDE = 8, 4
"""Candidates per sampled score above which one in DENSE_STRIDE groups of four is read first; above
DENSE_STRIDE times as many, one in THIN_STRIDE * DENSE_STRIDE before that."""
MAX_COLLECTIONS = 4
"""Most collections of a head's candidates: up to three of ever denser samples, one if too many
pass."""
SAMPLE_SLACK = 16
"""One in this many sampled scores that should reach a threshold may miss it: a sample is inexact
anyway, and the search for the threshold ends earlier."""
WIDE_TILE, NARROW_TILE = Tile(8192, programs_per_sm=5), Tile(4096, programs_per_sm=8)
"""Tiles of sparse attention; `attend_block` chooses."""
MAX_ATTENDED_DIM = WIDE_TILE.elements // MIN_DOT_ROWS
"""Largest head dimension of sparse attention: a tile then has 16 tokens, a tensor core's fewest."""
MAX_NARROW_DIM, MAX_NARROW_QUERY = 128, 896
"""Largest head dimension, and largest query group times head dimension, for narrow tiles: above
either, a program with narrow tiles takes more than 128 registers a thread."""
ATTEND_WARPS = 2
"""Warps of a sparse attention program: more programs per SM hide more memory latency."""
ATTEND_STAGES = 3
"""Pipeline stages of the loop over tiles: slots, then K and V, are requested ahead of their use."""
PROGRAMS_PER_SM = 4
"""Programs per SM that few rows are split among, while one round combines their splits. Batches of
many rows are not split."""
PROGRAM_BYTES_PER_SM = 4
"""Programs per SM that few rows are split among where several rounds combine their splits, times
the bytes of a cache element: elements of fewer bytes need more programs for as many in flight."""
MIN_SPLIT_TOKENS, MAX_SPLITS = 64, 16
"""Fewest tokens per split of a row, and most splits per row."""
SPLIT_ALIGNMENT = 16
"""Splits begin at multiples of this many tokens, so that slots are read in whole loads."""
COMBINED_HEADS = 32
"""Heads times splits that are combined in one round."""
MAX_RUN_ROWS = 64
"""Most query rows, those of a run times the heads of a group, that one program attends for."""
RUN_PROGRAMS_PER_SM = 2
"""Programs per SM that share the tokens of all runs, and run at a time."""
WIDE_RUN_TILE, NARROW_RUN_TILE = 16384, 8192
"""Bytes of K, and of V, that a program of a run's attention reads at a time; `run_tile_bytes`
chooses."""
WIDE_RUN_SHARED = 228 << 10
"""Shared memory of an SM that two programs with wide tiles take: queries, and three tiles each of K
and V. So much have Hopper and Blackwell's data-centre GPUs."""
MAX_RUN_BLOCK = 64
"""Most tokens of a tile: more would take registers for their scores."""
MIN_RUN_TILES = 2
"""Fewest tiles of a program: the tiles of few and short requests are shared by fewer programs."""
RUN_STAGES = 3
"""Pipeline stages of the loop over tiles: while one is computed, the next is on its way, and the
one after the next is requested."""
COMBINED_SPLITS, COMBINED_ROWS, COMBINE_WARPS = 8, 4, 4
"""Splits of a run that are combined at a time, and the rows and warps of the program that does."""
NARROW_RUN_DIM, MAX_RUN_DIM = 128, 256
"""Largest head dimension that a program of 4 warps has registers for, and one of 8 warps."""
MIN_REQUESTS, MAX_REQUESTS = 32, 512
"""Requests that a program finds its share among: kernels are compiled for the powers of two from
the first to the second."""
SHORTLIST_BLOCK = 4096
"""Scores that a shortlist reads at a time."""
RADIX_BLOCK = 2048
"""Scores that one pass of a full ranking's radix selection reads at a time."""
MAX_SORT = 16384
"""Longest ranking of one head that is sorted within one program."""
COUNTED_SCORES = 1 << 21
"""Scores that are too many for the counters of a search among all of a row's, of 21 bits each."""
LSE_BLOCK = 1024
"""Scores whose exponentials are summed at a time."""
MASS_BLOCK = 256
"""Positions whose softmax mass one program sums."""
MASS_SPLITS = 256
"""Most programs that sum the masses of a row: longer rows have programs with several blocks."""
MASS_HEADS = 32
"""Most heads whose scores are in flight at a time."""
TOPK_BLOCK = 8192
"""Masses that the one program of a row reads at a time."""
TOPK_SMALL_BLOCK = 1024
"""Slots that are copied at a time, and masses where all are read again: less code to fetch."""
COMPACT_BLOCK = 2048
"""Positions that one program compacts, and whose chosen tokens `full_ranking.py` counts for it."""
COMPACT_REGISTERS = 64
"""Registers of a thread that compacts, at most: four programs of eight warps run on an SM."""
COMPACT_SPLITS = 64
"""Most programs that compact a row: longer rows have programs with several blocks."""
MERGE_BLOCK = 2048
"""Turns of one rank of tensor parallelism that a program merges at a time."""
LENGTH_BLOCK = 1024
"""Rows whose lengths are summed at a time."""
MAX_REGISTERS = 128
"""Registers of a thread, at most, where the size of a sample would take more: with them an SM runs
two programs of eight warps, and the few values that do not fit go to the stack."""
WIDE_WARPS = 8
"""Warps of a program that reads thousands of turns or positions at a time."""
NO_TURN = 2**31 - 1
"""First turn of a token that no head has ranked."""
NEEDS_FULL_RANKING = -1
"""Last turn of a row whose heads are still to be ranked fully."""
LOG2_E = 1.4426950408889634


def interpreted() -> bool:
    """Return True if Triton interprets kernels on the CPU instead of compiling them."""
    return bool(knobs.runtime.interpret)


def padded_group(num_heads: int, num_kv_heads: int) -> int:
    """Return the rows of one KV head's score tile: its query heads, padded for tensor cores."""
    return max(MIN_DOT_ROWS, triton.next_power_of_2(num_heads // num_kv_heads))


def attend_block(dim: int, group: int, cache_bytes: int, programs_per_sm: float) -> int:
    """Return the tokens in a tile of sparse attention.

    Wide tiles are faster unless only narrow ones let all programs run at once. With wider heads,
    larger groups or another cache dtype, registers do not allow that many narrow programs.

    Args:
        dim: head dimension.
        group: query heads per KV head.
        cache_bytes: bytes per element of K and V.
        programs_per_sm: programs of the launch, divided by SMs of the GPU.
    """
    light = dim <= MAX_NARROW_DIM and group * dim <= MAX_NARROW_QUERY and cache_bytes == 2
    narrow = light and WIDE_TILE.programs_per_sm < programs_per_sm <= NARROW_TILE.programs_per_sm
    return (NARROW_TILE if narrow else WIDE_TILE).elements // dim


def run_tile_bytes(shared_bytes: int) -> int:
    """Return the bytes of K, and of V, in a tile of a run's attention.

    Args:
        shared_bytes: shared memory of an SM.
    """
    return WIDE_RUN_TILE if shared_bytes >= WIDE_RUN_SHARED else NARROW_RUN_TILE


def run_block(dim: int, element_bytes: int, tile_bytes: int) -> int:
    """Return the tokens in a tile of a run's attention.

    Args:
        dim: head dimension.
        element_bytes: of K and V as they are multiplied.
        tile_bytes: of K, and of V.
    """
    return max(MIN_DOT_ROWS, min(MAX_RUN_BLOCK, tile_bytes // (dim * element_bytes)))


def run_warps(dim: int) -> int:
    """Return the warps of a program that attends for a run."""
    return 4 if dim <= NARROW_RUN_DIM else WIDE_WARPS


def sample_size(columns: int) -> int:
    """Return the scores to sample of rows of up to `columns` tokens, a power of two."""
    return min(MAX_SAMPLE, max(MIN_SAMPLE, triton.next_power_of_2(columns // SAMPLE_STRIDE)))


def full_ranking_warps(padded_ranks: int) -> int:
    """Return the warps that rank one head fully: 16 speed up a long sort, not a radix selection."""
    return 8 if padded_ranks < 2048 else 16


def sort_warps(padded_ranks: int) -> int:
    """Return the warps that sort `padded_ranks` tokens of one head in registers."""
    return 8 if padded_ranks <= 4096 else 16


@dataclass(frozen=True)
class RowBuffers:
    """Device memory that is allocated once; the first dimension of every tensor is rows."""

    def first_rows(self, num_rows: int) -> Self:
        """Return the same memory for fewer rows; a tensor with a shorter first dimension stays."""

        def cut(value: Any) -> Any:
            if isinstance(value, RowBuffers):
                return value.first_rows(num_rows)
            return value[:num_rows] if isinstance(value, Tensor) else value

        return replace(self, **{name: cut(value) for name, value in vars(self).items()})

    @property
    def num_bytes(self) -> int:
        """Device memory held, in bytes."""
        values = [getattr(self, field.name) for field in fields(self)]
        tensors = sum(value.nbytes for value in values if isinstance(value, Tensor))
        return tensors + sum(value.num_bytes for value in values if isinstance(value, RowBuffers))


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
    """Refuse tensors of another dtype, which a kernel would misread."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, not {tensor.dtype}")


def check_attention(query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """Refuse query [R, H, D], keys and values [P, G, D] and output [R, H, D] that do not fit."""
    num_heads, dim = query.shape[1:]
    if values.shape != keys.shape or keys.shape[2] != dim or num_heads % keys.shape[1]:
        raise ValueError(
            "query heads must be a multiple of KV heads, and all head dimensions the same, not "
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        )
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(
            f"out must be {query.dtype} of shape {tuple(query.shape)}, not {out.dtype} of "
            f"{tuple(out.shape)}"
        )


@triton.jit
def row_and_head(indptr):
    """Return the row and head of this program, and the tokens of the row, in a grid [B, H]."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    return row, head, tl.load(indptr + row + 1) - tl.load(indptr + row)


@triton.jit
def is_last_block(block_counter, num_programs):
    """Return True in the last of `num_programs` programs to get here, and reset the counter.

    The writes of the others are then visible to reads that bypass the L1 cache
    (`cache_modifier=".cg"`).
    """
    tl.debug_barrier()  # every thread's writes come before the count
    is_last = tl.atomic_add(block_counter, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(block_counter, 0)
    return is_last


PDL_CAPABILITY = (9, 0)
"""Lowest compute capability with programmatic dependent launch."""


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its writes are visible."""
    if USE_PDL:
        gdc_wait()


@triton.jit
def pdl_launch_next(USE_PDL: tl.constexpr):
    """Allow the next kernel's launch once every program has got here or ended."""
    if USE_PDL:
        gdc_launch_dependents()


def pdl_options() -> dict[str, bool]:
    """Return the launch options of a kernel that calls `pdl_wait` first.

    Programmatic dependent launch: the kernel may be launched while the previous one still runs.
    """
    return {"USE_PDL": True, "launch_pdl": True} if _has_pdl() else {"USE_PDL": False}


@cache
def _has_pdl() -> bool:
    return not interpreted() and torch.cuda.get_device_capability() >= PDL_CAPABILITY
