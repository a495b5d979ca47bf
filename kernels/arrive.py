"""How programs that share work leave its end to the one of them that comes last."""

import triton
import triton.language as tl


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
