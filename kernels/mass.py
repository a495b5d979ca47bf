"""Selection by attention mass: the heads' softmax, summed, and the top-k tokens of each row.

Defined by `reference.softmax_mass` and `reference.topk_by_mass`. A head's log-sum-exp is left by
its dense attention; where that is not available, `log_sum_exp` computes it from the scores. In
`_topk_by_mass` one program per row takes the top-k, another copies the slots of sinks and recent
tokens, or of a row within the budget. Candidates that reach a sampled threshold are collected in
order of position; the exact threshold is found among them in registers. Where too few or too many
are collected, the threshold is found in all masses of the row: slower, with the same result.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.compact import StepSlots, copy_slots
from lim_sglang.kernels.launch import (
    LOG2_E,
    LSE_BLOCK,
    MASS_BLOCK,
    MASS_HEADS,
    MASS_SPLITS,
    TOPK_BLOCK,
    TOPK_SMALL_BLOCK,
    check_int32,
    check_tensors,
    pdl_launch_next,
    pdl_options,
    pdl_wait,
    row_and_head,
    sample_size,
    sort_warps,
)
from lim_sglang.kernels.packed import PackedRows, packed_row
from lim_sglang.kernels.radix import (
    collect,
    count_reaching,
    nth_largest,
    raise_threshold,
    sampled_threshold,
    sortable_key,
)
from lim_sglang.kernels.reference import BudgetSplit


@triton.jit(do_not_specialize=["budget"])
def _log_sum_exp(
    scores,  # [B, H, S] f32, packed
    indptr,  # [B + 1] int32
    lse,  # [B, H] f32
    budget,
    scale,  # times log2 e
    lse_row_stride,
    BLOCK: tl.constexpr,
):
    row, head, length = row_and_head(indptr)
    if length <= budget:
        return
    before, pitch = packed_row(indptr, row, 1)
    scores += before * tl.num_programs(1) + head * pitch
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        inside = first + lanes < length
        score = tl.load(scores + first + lanes, mask=inside, other=float("-inf")) * scale
        higher = tl.maximum(largest, score)
        # A lane whose scores are all -inf keeps a total of 0.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(largest - safe) + tl.exp2(score - safe)
        largest = higher
    top = tl.max(largest, 0)
    tl.store(
        lse + row * lse_row_stride + head, top + tl.log2(tl.sum(total * tl.exp2(largest - top), 0))
    )


def log_sum_exp(
    scores: PackedRows, indptr: Tensor, budget: int, scale: float, out: Tensor
) -> Tensor:
    """Compute each head's log-sum-exp in each row that is longer than the budget.

    Args:
        scores: of B rows and H heads, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        budget: rows within it stay untouched.
        scale: factor on q·k before the softmax.
        out: [B, H] f32.

    Returns:
        `out`: log2 of the sum of e^(scale · score), FlashInfer's convention.
    """
    check_tensors(scores=scores.values, indptr=indptr, out=out)
    check_int32(indptr=indptr)
    _log_sum_exp[(len(indptr) - 1, scores.lists)](
        scores.values,
        indptr,
        out,
        budget,
        scale * LOG2_E,
        out.stride(0),
        BLOCK=LSE_BLOCK,
    )
    return out


@triton.jit(do_not_specialize=["budget", "num_heads"])
def _softmax_mass(
    scores,  # [B, H, S] f32, packed
    indptr,  # [B + 1] int32
    lse,  # [B, H] f32
    mass,  # [B, S / PAGE] f32, packed
    budget,
    num_heads,
    scale,  # times log2 e
    lse_row_stride,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,  # positions whose masses are summed
    BY_LARGEST: tl.constexpr,  # the largest weight of any head, not the sum
    USE_PDL: tl.constexpr,
):
    pdl_launch_next(USE_PDL)
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(indptr + row + 1) - tl.load(indptr + row)
    if (length <= budget) | (tl.program_id(1) * BLOCK >= length):
        return
    before, pitch = packed_row(indptr, row, 1)
    pages_before, _ = packed_row(indptr, row, PAGE)
    scores += before * num_heads
    mass += pages_before
    for first in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        positions = first + tl.arange(0, BLOCK)
        # Four scores at a time: a list goes on to a multiple of four.
        read = (positions // 4 * 4 < length)[None, :]
        total = tl.zeros((BLOCK,), tl.float32)
        for first_head in range(0, num_heads, HEADS):
            heads = first_head + tl.arange(0, HEADS)[:, None]
            of_heads = scores + heads * pitch + positions[None, :]
            score = tl.load(of_heads, mask=read & (heads < num_heads), other=float("-inf"))
            of_row = lse + row * lse_row_stride + heads
            head_lse = tl.load(of_row, mask=heads < num_heads, other=0.0)
            weights = tl.exp2(score * scale - head_lse)
            if BY_LARGEST:
                total = tl.maximum(total, tl.max(weights, 0))
            else:
                total += tl.sum(weights, 0)
        if PAGE == 1:
            tl.store(mass + positions, total, mask=positions < length)
        else:
            of_pages = tl.reshape(tl.where(positions < length, total, 0.0), BLOCK // PAGE, PAGE)
            pages = first // PAGE + tl.arange(0, BLOCK // PAGE)
            tl.store(mass + pages, tl.sum(of_pages, 1), mask=pages * PAGE < length)


def softmax_mass(
    scores: PackedRows,
    indptr: Tensor,
    lse: Tensor,
    budget: int,
    scale: float,
    out: PackedRows,
    *,
    by_largest: bool = False,
) -> PackedRows:
    """Weigh each token by the heads' softmax, in each row that is longer than the budget.

    Args:
        scores: of B rows and H heads, from `score_tokens`.
        indptr: [B + 1] int32; row b has `indptr[b + 1] - indptr[b]` tokens.
        lse: [B, H] f32, from `log_sum_exp` or FlashInfer.
        budget: rows within it stay untouched.
        scale: factor on q·k before the softmax.
        out: one list a row; a page's mass is the sum over its tokens.
        by_largest: weigh by the largest weight of any head, not by the sum over heads.

    Returns:
        `out`.
    """
    check_tensors(scores=scores.values, indptr=indptr, lse=lse, out=out.values)
    check_int32(indptr=indptr)
    heads, blocks = scores.lists, triton.cdiv(scores.columns, MASS_BLOCK)
    _softmax_mass[(len(indptr) - 1, min(blocks, MASS_SPLITS))](
        scores.values,
        indptr,
        lse,
        out.values,
        budget,
        heads,
        scale * LOG2_E,
        lse.stride(0),
        HEADS=min(MASS_HEADS, triton.next_power_of_2(heads)),
        BLOCK=MASS_BLOCK,
        PAGE=out.page,
        BY_LARGEST=by_largest,
        **pdl_options(),
    )
    return out


@triton.jit
def _load_keys(mass, first, sinks, end, BLOCK: tl.constexpr):
    """Load the keys of a block of positions, 0 for positions that are no candidates."""
    positions = first + tl.arange(0, BLOCK)
    read = first + tl.arange(0, BLOCK) // 4 * 4 < end  # four at a time, as in `radix.collect`
    keys = sortable_key(tl.load(mass + positions, mask=read, other=0.0))
    return tl.where((positions >= sinks) & (positions < end), keys, 0)


@triton.jit
def _take(keys, inside, threshold, ties_wanted):
    """Return a mask of the keys above the threshold and of the first few that equal it."""
    equal = (inside & (keys == threshold)).to(tl.int32)
    return inside & ((keys > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties_wanted)))


@triton.jit
def _store_pages(slots, kept, pages, index, taken, PAGE: tl.constexpr):
    """Store the slots of the taken pages, the page of index i behind i others."""
    for offset in tl.static_range(PAGE):
        slot = tl.load(slots + pages * PAGE + offset, mask=taken > 0, other=0)
        tl.store(kept + index * PAGE + offset, slot, mask=taken > 0)


@triton.jit
def _keep_collected(
    mass,
    slots,
    candidates,
    kept,
    lowest,
    passed,
    selected,
    CAPACITY: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Keep the top `selected` of the collected candidates, whose keys are `lowest` or more."""
    tl.debug_barrier()  # other threads of this program wrote some of the candidates
    lanes = tl.arange(0, CAPACITY)
    inside = lanes < passed
    positions = tl.load(candidates + lanes, mask=inside, other=0)
    keys = sortable_key(tl.load(mass + positions, mask=inside, other=0.0))
    keys = tl.where(inside, keys - lowest, 0)
    threshold = nth_largest(keys, selected, 0, tl.max(keys, 0))
    above = tl.sum((inside & (keys > threshold)).to(tl.int32), 0)
    taken = _take(keys, inside, threshold, selected - above).to(tl.int32)
    _store_pages(slots, kept, positions, tl.cumsum(taken, 0) - 1, taken, PAGE)


@triton.jit
def _keep_of_all(mass, slots, kept, sinks, end, selected, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Keep the top `selected` of all candidates, reading their masses again and again."""
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
        _store_pages(slots, kept, positions, done + tl.cumsum(taken, 0) - 1, taken, PAGE)
        done += tl.sum(taken, 0)
        ties_wanted -= tl.sum(taken * (keys == threshold).to(tl.int32), 0)


@triton.jit(do_not_specialize=["budget", "sinks", "recent", "selected", "target"])
def _topk_by_mass(
    mass,  # [B, HEADS, S / PAGE] f32, packed
    indptr,  # [B + 1] int32, of all tokens
    slots,  # [indptr[B]] int32
    kept_indptr,  # [B + 1] int32, of the kept tokens
    candidates,  # [B, HEADS, >= CAPACITY] int32
    kept,  # [HEADS, kept_indptr[B]] int32
    budget,
    sinks,
    recent,
    selected,
    target,  # candidates that the sampled threshold should let pass
    candidate_row_stride,
    candidate_head_stride,
    kept_head_stride,
    CAPACITY: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,  # tokens of each mass; all counts but lengths are in pages
    HEADS: tl.constexpr,  # lists of a row
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64) // HEADS
    head = tl.program_id(0).to(tl.int64) % HEADS
    start = tl.load(indptr + row).to(tl.int64)
    length = (tl.load(indptr + row + 1) - start).to(tl.int32)
    slots += start
    kept += tl.load(kept_indptr + row).to(tl.int64) + head * kept_head_stride
    end = (length + PAGE - 1) // PAGE - recent
    is_dense = length <= budget * PAGE
    if tl.program_id(1) == 1:
        if is_dense:
            copy_slots(slots, kept, length, SMALL_BLOCK)
        else:
            copy_slots(slots, kept, sinks * PAGE, SMALL_BLOCK)
            newest = kept + (sinks + selected) * PAGE
            copy_slots(slots + end * PAGE, newest, length - end * PAGE, SMALL_BLOCK)
        return
    if is_dense:
        return
    before, pitch = packed_row(indptr, row, PAGE)
    mass += before * HEADS + head * pitch
    candidates += row * candidate_row_stride + head * candidate_head_stride
    kept += sinks * PAGE

    sampled = tl.minimum(end - sinks, SAMPLE)
    wanted = tl.maximum(target.to(tl.int64) * sampled // (end - sinks), 1)
    lowest = sampled_threshold(mass, sinks, end, wanted, SAMPLE)
    passed = collect(mass, candidates, lowest, sinks, end, 1, CAPACITY, BLOCK)
    if (passed >= selected) & (passed <= CAPACITY):
        _keep_collected(mass, slots, candidates, kept, lowest, passed, selected, CAPACITY, PAGE)
    else:
        _keep_of_all(mass, slots, kept, sinks, end, selected, SMALL_BLOCK, PAGE)


def candidate_capacity(selected: int) -> int:
    """Return the candidates per row that are collected at most, a power of two."""
    return max(16, triton.next_power_of_2(2 * selected))


def topk_by_mass(
    mass: PackedRows, step: StepSlots, budget_split: BudgetSplit, candidates: Tensor
) -> None:
    """Write the slots of each row's sinks, top-k and recent pages to `step.kept`.

    Args:
        mass: of B rows, from `softmax_mass`, or scores of single heads.
        step: slots of B rows; `kept` is [lists, …] where there are several.
        budget_split: in pages; rows within it keep everything; sinks and recent pages are kept.
        candidates: [B, lists, >= `candidate_capacity(selected)`] int32, overwritten.
    """
    ints = vars(step) | {"candidates": candidates}
    check_tensors(mass=mass.values, **ints)
    check_int32(**ints)
    capacity = candidate_capacity(budget_split.selected)
    _topk_by_mass[((len(step.indptr) - 1) * mass.lists, 2)](
        mass.values,
        step.indptr,
        step.slots,
        step.kept_indptr,
        candidates,
        step.kept,
        budget_split.budget,
        budget_split.sinks,
        budget_split.recent,
        budget_split.selected,
        (budget_split.selected + capacity) // 2,
        candidates.stride(0),
        candidates.stride(1),
        step.kept.stride(0),
        CAPACITY=capacity,
        SAMPLE=sample_size(mass.columns),
        BLOCK=TOPK_BLOCK,
        SMALL_BLOCK=TOPK_SMALL_BLOCK,
        PAGE=mass.page,
        HEADS=mass.lists,
        num_warps=sort_warps(capacity),
        **pdl_options(),
    )
