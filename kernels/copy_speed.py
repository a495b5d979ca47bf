"""The bandwidth of a copy within the GPU's memory: what the byte limit of a step is counted in."""

import statistics
from collections.abc import Sequence

import torch

from lim_sglang.kernels.bench import capture, time_graph

SIZES = (256 << 20, 512 << 20, 1 << 30, 2 << 30)
"""Bytes that are read, and as many that are written: each far more than an L2 cache holds."""
REPEATS = 20
MEMORY_SHARE = 0.9
"""Of the GPU's free memory, so that measuring never runs out of it."""


def copy_gb_per_s(sizes: Sequence[int] = SIZES) -> float:
    """The best size's bandwidth, reads and writes counted, of those sizes that memory has room for.

    Raises:
        torch.OutOfMemoryError: there is no room even for the smallest.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    fitting = [size for size in sizes if 2 * size <= MEMORY_SHARE * free] or [min(sizes)]
    best = max(2 * size / _median_copy_ms(size, "cuda") / 1e6 for size in fitting)
    torch.cuda.empty_cache()  # what is measured next finds the memory as it was
    return best


def _median_copy_ms(num_bytes: int, device: str) -> float:
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # Not `copy_`: in a CUDA graph that is a memcpy node, which an H100 ran at 2.4 TB/s while decode
    # kernels read 2.9. A change of sign is certainly a kernel.
    graph = capture(lambda: torch.neg(source, out=target))
    return statistics.median(time_graph(graph, REPEATS))
