"""How many programs share a row in attention over a kept set, and the memory they share it in."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lim_sglang.kernels.launch import (
    BYTES_PER_PROCESSOR,
    MAX_SPLITS,
    MIN_SPLIT,
    padded_group,
)

INTERPRETED_PROCESSORS = 64
"""On a CPU, where there are none: enough that a few rows are shared."""


@dataclass(frozen=True)
class SplitWorkspace:
    """Where programs that share a row leave what they found, allocated once.

    Shapes: N programs that run side by side.
    """

    outputs: Tensor
    """[N, padded group, D] f32."""
    lse: Tensor
    """[N, padded group] f32, log2 of each head's normaliser."""
    block_counters: Tensor
    """[N] int32, 0 between two kernels."""
    processors: int
    """Of the GPU."""

    @classmethod
    def allocate(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int,
        dim: int,
        cache_dtype: torch.dtype,
        device: torch.device | str,
    ) -> "SplitWorkspace":
        """Take the memory for this GPU's processors."""
        processors = INTERPRETED_PROCESSORS
        if torch.device(device).type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = processors * max(1, BYTES_PER_PROCESSOR // cache_dtype.itemsize)
        group = padded_group(num_heads, num_kv_heads)
        return cls(
            torch.zeros(programs, group, dim, dtype=torch.float32, device=device),
            torch.zeros(programs, group, dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
            processors,
        )

    def count_for(self, num_units: int, longest: int) -> int:
        """Programs that share each row and KV head, so that all of them run side by side.

        Args:
            num_units: rows times KV heads.
            longest: tokens of the longest row that there can be.
        """
        fitting = self.outputs.shape[0] // max(1, num_units)
        return max(1, min(fitting, MAX_SPLITS, triton.cdiv(longest, MIN_SPLIT)))
