"""The heaviest tokens of each row as cache slots, in order of position.

Defined by `reference.keep_heaviest`. One program a row takes the heaviest, another copies the
ends or a row that is kept whole. Candidates that pass a sampled threshold are collected in
order of position; the exact threshold is found among them in registers. Where they are too few or
too many, it is found in all of the row's masses, which is slower and gives the same.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.follow import pdl_options, pdl_wait
from lim_sglang.kernels.launch import (
    HEAVIEST_BLOCK,
    HEAVIEST_SMALL_BLOCK,
    check_int32,
    check_tensors,
    sample_size,
    sort_warps,
)
from lim_sglang.kernels.order import (
    collect,
    count_reaching,
    nth_largest,
    raise_threshold,
    sampled_threshold,
    sortable_key,
)
from lim_sglang.kernels.reference import BudgetSplit


@triton.jit
def _copy(slots, kept, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for first in range(0, count, BLOCK):
        inside = first + lanes < count
        slot = tl.load(slots + first + lanes, mask=inside, other=0)
        tl.store(kept + first + lanes, slot, mask=inside)


@triton.jit
def _load_keys(mass, first, sinks, end, BLOCK: tl.constexpr):
    """Keys of a block of positions, 0 for what is no candidate."""
    positions = first + tl.arange(0, BLOCK)
    read = first + tl.arange(0, BLOCK) // 4 * 4 < end  # four at a time: see `order.collect`
    keys = sortable_key(tl.load(mass + positions, mask=read, other=0.0))
    return tl.where((positions >= sinks) & (positions < end), keys, 0)


@triton.jit
def _take(keys, inside, threshold, ties_wanted):
    """What is above the threshold, and the first few that equal it."""
    equal = (inside & (keys == threshold)).to(tl.int32)
    return inside & ((keys > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties_wanted)))


@triton.jit
def _keep_among(mass, slots, candidates, kept, lowest, passed, selected, CAPACITY: tl.constexpr):
    """Keep the heaviest of at least as many candidates, in order of position, from `lowest` on."""
    tl.debug_barrier()  # other threads of this program wrote some of them
    places = tl.arange(0, CAPACITY)
    inside = places < passed
    positions = tl.load(candidates + places, mask=inside, other=0)
    keys = sortable_key(tl.load(mass + positions, mask=inside, other=0.0))
    keys = tl.where(inside, keys - lowest, 0)
    threshold = nth_largest(keys, selected, 0, tl.max(keys, 0))
    above = tl.sum((inside & (keys > threshold)).to(tl.int32), 0)
    taken = _take(keys, inside, threshold, selected - above).to(tl.int32)
    slot = tl.load(slots + positions, mask=taken > 0, other=0)
    tl.store(kept + tl.cumsum(taken, 0) - 1, slot, mask=taken > 0)


@triton.jit
def _keep_of_all(mass, slots, kept, sinks, end, selected, BLOCK: tl.constexpr):
    """Keep the heaviest of all candidates, reading their masses again and again."""
    threshold = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    reached = tl.full((), -1, tl.int64)
    while (step > 0) & (reached != selected):
        counts = tl.full((), 0, tl.int64)
        for first in range(0, end, BLOCK):
            keys = _load_keys(mass, first, sinks, end, BLOCK)
            counts += count_reaching(keys, threshold, step)
        threshold, reached = raise_threshold(threshold, reached, step, counts, selected)
        step = step >> 2
    ties_wanted = selected
    for first in range(0, end, BLOCK):
        keys = _load_keys(mass, first, sinks, end, BLOCK)
        ties_wanted -= tl.sum((keys > threshold).to(tl.int32), 0)
    done = 0
    for first in range(0, end, BLOCK):
        positions = first + tl.arange(0, BLOCK)
        inside = (positions >= sinks) & (positions < end)
        keys = _load_keys(mass, first, sinks, end, BLOCK)
        taken = _take(keys, inside, threshold, ties_wanted).to(tl.int32)
        slot = tl.load(slots + positions, mask=taken > 0, other=0)
        tl.store(kept + done + tl.cumsum(taken, 0) - 1, slot, mask=taken > 0)
        done += tl.sum(taken, 0)
        ties_wanted -= tl.sum(taken * (keys == threshold).to(tl.int32), 0)


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "selected", "target"])
def _topk_by_mass(
    mass,  # [B, >= S] f32
    indptr,  # [B + 1] int32, of all tokens
    slots,  # [indptr[B]] int32
    kept_indptr,  # [B + 1] int32, of the kept tokens
    candidates,  # [B, >= CAPACITY] int32
    kept,  # [kept_indptr[B]] int32
    budget,
    sinks,
    recent,
    selected,
    target,
    mass_row_stride,
    candidate_row_stride,
    CAPACITY: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = (tl.load(indptr + row + 1) - start).to(tl.int32)
    slots += start
    kept += tl.load(kept_indptr + row).to(tl.int64)
    end = length - recent
    if tl.program_id(1) == 1:
        if length <= budget:
            _copy(slots, kept, length, SMALL_BLOCK)
        else:
            _copy(slots, kept, sinks, SMALL_BLOCK)
            _copy(slots + end, kept + sinks + selected, recent, SMALL_BLOCK)
        return
    if length <= budget:
        return
    mass += row * mass_row_stride
    candidates += row * candidate_row_stride
    kept += sinks

    sampled = tl.minimum(end - sinks, SAMPLE)
    wanted = tl.maximum(target.to(tl.int64) * sampled // (end - sinks), 1)
    lowest = sampled_threshold(mass, sinks, end, wanted, SAMPLE)
    passed = collect(mass, candidates, lowest, sinks, end, CAPACITY, BLOCK)
    if (passed >= selected) & (passed <= CAPACITY):
        _keep_among(mass, slots, candidates, kept, lowest, passed, selected, CAPACITY)
    else:
        _keep_of_all(mass, slots, kept, sinks, end, selected, SMALL_BLOCK)


def candidate_capacity(selected: int) -> int:
    """Candidates a row that there is room for, a power of two."""
    return max(16, triton.next_power_of_2(2 * selected))


def topk_by_mass(
    mass: Tensor,
    indptr: Tensor,
    slots: Tensor,
    kept_indptr: Tensor,
    *,
    budget_split: BudgetSplit,
    candidates: Tensor,
    out: Tensor,
) -> Tensor:
    """Write the slots of each row's ends and heaviest tokens, in order of position.

    Args:
        mass: [B, N] f32, from `pool_mass`; N a multiple of 4, at least the longest row.
        indptr, slots: [B + 1] and [indptr[B]] int32, all tokens.
        kept_indptr: [B + 1] int32, where each row's kept tokens begin: `min(length, budget)` each.
        shares: rows within its budget keep everything; its ends are always kept.
        candidates: [B, >= `candidate_capacity(selected)`] int32, written.
        out: [kept_indptr[B]] int32 or longer.

    Returns:
        `out`.
    """
    ints = {"indptr": indptr, "slots": slots, "kept_indptr": kept_indptr, "out": out}
    ints |= {"candidates": candidates}
    check_tensors(mass=mass, **ints)
    check_int32(**ints)
    rows, columns = mass.shape
    if columns % 4:
        raise ValueError(f"rows of masses must have a multiple of 4 columns, not {columns}")
    capacity = candidate_capacity(budget_split.selected)
    _topk_by_mass[(rows, 2)](
        mass,
        indptr,
        slots,
        kept_indptr,
        candidates,
        out,
        budget_split.budget,
        budget_split.sinks,
        budget_split.recent,
        budget_split.selected,
        (budget_split.selected + capacity) // 2,
        mass.stride(0),
        candidates.stride(0),
        CAPACITY=capacity,
        SAMPLE=sample_size(columns),
        BLOCK=HEAVIEST_BLOCK,
        SMALL_BLOCK=HEAVIEST_SMALL_BLOCK,
        num_warps=sort_warps(capacity),
        **pdl_options(),
    )
    return out
