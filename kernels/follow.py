"""How a kernel follows the one before it: launched while that still runs, it waits on the device.

Programmatic dependent launch of NVIDIA's Hopper and later GPUs. What is between two short kernels
of a step then shrinks to the wait itself. Order is as it was: before `follow`, a kernel neither
reads nor writes memory. Only kernels whose next one is ours `let_next_follow`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lim_sglang.kernels.launch import interpreted

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
