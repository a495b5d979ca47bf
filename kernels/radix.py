"""Scores as sortable integers: thresholds by radix selection, and a sort of one head's ranking.

The order is that of `reference.rank_tokens`: of equal scores the older token comes first, -0.0 ties
with +0.0, NaN ranks last.
"""

import triton
import triton.language as tl

from lim_sglang.kernels.launch import DENSE_STRIDE, MAX_COLLECTIONS, SAMPLE_SLACK, THIN_STRIDE

_SAMPLE_SLACK: tl.constexpr = tl.constexpr(SAMPLE_SLACK)
_THIN: tl.constexpr = tl.constexpr(THIN_STRIDE)
_DENSE: tl.constexpr = tl.constexpr(DENSE_STRIDE)
_MAX_COLLECTIONS: tl.constexpr = tl.constexpr(MAX_COLLECTIONS)
_SIGN: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def sortable_key(scores):
    """Map floats to unsigned integers of the same order; NaN below -inf."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, _SIGN, ordered)
    return (ordered ^ _SIGN).to(tl.uint32, bitcast=True)


@triton.jit
def lowest_score(key):
    """Return the lowest score whose `sortable_key` is at least `key`, which is not 0."""
    above_nan = tl.maximum(key, 0x007FFFFF)  # the key of -inf: no score has a key in between
    ordered = above_nan.to(tl.int32, bitcast=True) ^ _SIGN
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def count_reaching(keys, threshold, step):
    """Count the keys that reach `threshold` plus one, two and three steps, in 21 bits each."""
    one = (keys >= threshold + step).to(tl.int64)
    two = (keys >= threshold + 2 * step).to(tl.int64)
    three = (keys >= threshold + 3 * step).to(tl.int64)
    return tl.sum(one | (two << 21) | (three << 42), 0)


@triton.jit
def raise_threshold(threshold, reached, step, counts, wanted):
    """Raise the threshold by the most steps at which `wanted` keys reach it, and count those."""
    one, two, three = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
    reached = tl.where(one >= wanted, one, reached)
    reached = tl.where(two >= wanted, two, reached)
    reached = tl.where(three >= wanted, three, reached)
    threshold += tl.where(one >= wanted, step, 0)
    threshold += tl.where(two >= wanted, step, 0)
    return threshold + tl.where(three >= wanted, step, 0), reached


@triton.jit
def nth_largest(keys, wanted, slack, highest):
    """Return a threshold that `wanted` keys reach, and at most `slack` more.

    With ties, the threshold is the key of rank `wanted`. It is found two bits at a time among fewer
    than 2^21 keys, none above `highest`; 0 if there are fewer than `wanted`.
    """
    threshold = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    while step > highest:
        step = step >> 2
    reached = tl.full((), -1, tl.int64)
    while (step > 0) & ((reached < wanted) | (reached > wanted + slack)):
        counts = count_reaching(keys, threshold, step)
        threshold, reached = raise_threshold(threshold, reached, step, counts, wanted)
        step = step >> 2
    return threshold


@triton.jit
def sample_keys(scores, sinks, end, SAMPLE: tl.constexpr):
    """Load the keys of SAMPLE candidates, evenly spaced; 0 where there are fewer candidates."""
    lanes = tl.arange(0, SAMPLE)
    candidates = end - sinks
    # lanes * candidates // SAMPLE, in products that stay within 32 bits.
    spread = lanes * (candidates // SAMPLE) + lanes * (candidates % SAMPLE) // SAMPLE
    offsets = tl.where(candidates > SAMPLE, spread, lanes)
    inside = lanes < candidates
    keys = sortable_key(tl.load(scores + sinks + offsets, mask=inside, other=0.0))
    return tl.where(inside, keys, 0)


@triton.jit
def sampled_threshold(values, sinks, end, wanted, SAMPLE: tl.constexpr):
    """Return a threshold that `wanted` of a sample of candidates reach, or up to 1/16 fewer.

    Exactly `wanted` reach the threshold where the sample holds every candidate, ties apart.
    """
    slack = tl.where(end - sinks > SAMPLE, wanted // _SAMPLE_SLACK, 0)
    keys = sample_keys(values, sinks, end, SAMPLE)
    return nth_largest(keys, wanted - slack, slack, tl.full((), 0xFFFFFFFF, tl.uint32))


@triton.jit
def collect(
    values,  # of one head or row, [>= the next multiple of 4 after `end`] f32
    positions,  # [>= CAPACITY] int32, written in ascending order
    threshold,
    sinks,
    end,
    stride,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the first CAPACITY candidates that reach the threshold; return the number of all.

    A thread takes four neighbours, loaded at once from an aligned address, so most of a block's
    prefix sum stays within threads. Of `stride` such groups of four, one is read.
    """
    first_of_four = tl.arange(0, BLOCK // 4) * 4 * stride
    lanes = first_of_four[:, None] + tl.arange(0, 4)[None, :]
    lowest = lowest_score(threshold)
    passed = 0
    for first in range(0, end, BLOCK * stride):
        found = first + lanes
        read = (first + first_of_four < end)[:, None]
        reaches = (tl.load(values + found, mask=read, other=0.0) >= lowest) | (threshold == 0)
        passes = ((found >= sinks) & (found < end) & reaches).to(tl.int32)
        of_four = tl.sum(passes, 1)
        before = passed + tl.cumsum(of_four, 0) - of_four
        index = before[:, None] + tl.cumsum(passes, 1) - 1
        tl.store(positions + index, found, mask=(passes > 0) & (index < CAPACITY))
        passed += tl.sum(of_four, 0)
    return passed


@triton.jit
def sort_ranking(
    scores,  # of one head
    ranking,  # [>= count] int32, written
    positions,  # [PADDED] int32, in any order, at least `count` of them inside
    inside,  # [PADDED] bool, which positions count
    count,
    PADDED: tl.constexpr,  # a power of two
):
    """Write the best `count` positions, best first; return all PADDED positions in that order."""
    keys = sortable_key(tl.load(scores + positions, mask=inside, other=0.0))
    # Of equal keys the lower position comes first: its complement makes the larger number.
    packed = (keys.to(tl.uint64) << 32) | (0xFFFFFFFF - positions.to(tl.uint64))
    packed = tl.sort(tl.where(inside, packed, 0), descending=True)
    ranked = (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)
    tl.debug_barrier()  # no thread overwrites what another thread has yet to read
    ranks = tl.arange(0, PADDED)
    tl.store(ranking + ranks, ranked, mask=ranks < count)
    return ranked


@triton.jit
def read_back(
    positions,  # [>= count] int32
    count,
    PADDED: tl.constexpr,  # a power of two, at least `count`
):
    """Load the positions that this program has written; return them and their mask, [PADDED]."""
    tl.debug_barrier()  # other threads of this program wrote some of them
    lanes = tl.arange(0, PADDED)
    inside = lanes < count
    return tl.load(positions + lanes, mask=inside, other=0), inside


@triton.jit
def safe_target(candidates, sampled, CAPACITY: tl.constexpr):
    """Return the number of candidates to aim at, so that seldom more than CAPACITY pass.

    The number that passes varies by about sqrt(CAPACITY * (candidates / sampled - 1)): room is left
    for three times that, so a complete sample fills the shortlist and a thin sample half of it.
    """
    # Never below 0, whatever the rounding.
    unsampled = (candidates - sampled).to(tl.float32) / sampled
    return tl.maximum(CAPACITY - 3.0 * tl.sqrt(CAPACITY * unsampled), CAPACITY / 2)


@triton.jit
def collect_by_sample(
    scores, ranking, sinks, end, SAMPLE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr
):
    """Collect a head's best candidates, and once more if too many pass; return their number."""
    candidates = end - sinks
    sampled = tl.minimum(candidates, SAMPLE)
    target = safe_target(candidates, sampled, CAPACITY)
    wanted = tl.maximum((target * sampled / candidates).to(tl.int32), 1)
    passed = CAPACITY + 1
    attempts = 0
    while (passed > CAPACITY) & (attempts < 2):
        tl.debug_barrier()  # a second attempt overwrites the positions of the first
        threshold = sampled_threshold(scores, sinks, end, wanted, SAMPLE)
        passed = collect(scores, ranking, threshold, sinks, end, 1, CAPACITY, BLOCK)
        # The number that passed tells the error of the sample: aim at half the capacity.
        wanted = tl.maximum((wanted.to(tl.float32) * CAPACITY / (2.0 * passed)).to(tl.int32), 1)
        attempts += 1
    return passed


@triton.jit
def collect_densely(
    scores, ranking, sinks, end, SAMPLE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr
):
    """Collect a head's best candidates, of long rows first those of ever denser samples.

    The next threshold is raised among those collected before, from one in `stride` groups of four
    or, where too many passed, from all.
    """
    candidates = end - sinks
    stride = tl.where(candidates > _THIN * SAMPLE, _DENSE, 1)
    stride = tl.where(candidates > _THIN * _DENSE * SAMPLE, _THIN * _DENSE, stride)
    sampled = tl.minimum(candidates, SAMPLE)
    best = tl.where(stride > 1, candidates // _DENSE, sampled)  # the densest sample's size
    target = safe_target(candidates, best, CAPACITY)
    reaching = candidates
    threshold = tl.full((), 0, tl.uint32)
    passed = CAPACITY + 1
    attempts = 0
    is_open = True
    while is_open & (attempts < _MAX_COLLECTIONS):
        if attempts == 0:
            keys = sample_keys(scores, sinks, end, SAMPLE)
        else:
            positions, inside = read_back(ranking, sampled, SAMPLE)
            keys = sortable_key(tl.load(scores + positions, mask=inside, other=0.0))
            keys = tl.where(inside, keys, 0)
        aim = tl.where(stride > 1, stride * (CAPACITY / 2), target)
        wanted = tl.maximum((aim * sampled / reaching).to(tl.int32), 1)
        slack = tl.where(candidates > SAMPLE, wanted // _SAMPLE_SLACK, 0)
        highest = tl.full((), 0xFFFFFFFF, tl.uint32)
        threshold = tl.maximum(threshold, nth_largest(keys, wanted - slack, slack, highest))
        tl.debug_barrier()  # the next positions overwrite those that were read back
        passed = collect(scores, ranking, threshold, sinks, end, stride, CAPACITY, BLOCK)
        is_open = (stride > 1) | (passed > CAPACITY)
        reaching = tl.maximum(passed * stride, 1)
        sampled = tl.minimum(passed, CAPACITY)
        if passed <= CAPACITY:
            stride = tl.where(stride > _DENSE, stride // _THIN, 1)
        attempts += 1
    return tl.where(is_open, CAPACITY + 1, passed)
