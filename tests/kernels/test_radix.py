"""Sortable keys, samples and thresholds, as device functions of a kernel of their own."""

import math

import pytest
import torch
import triton
import triton.language as tl

from lim_sglang.kernels.launch import MIN_SAMPLE
from lim_sglang.kernels.radix import lowest_score, nth_largest, sample_keys, sortable_key
from tests.kernels.batches import COMPILED_HERE

pytestmark = COMPILED_HERE

SCORES = [
    math.inf,
    1e38,
    3.0,
    1.0,
    1e-45,
    0.0,
    -0.0,
    -1e-45,
    -1.0,
    -3.0,
    -1e38,
    -math.inf,
    math.nan,
]
"""Scores in descending order; the zeros are equal."""


@triton.jit
def _keys(scores, keys, lowest, size: tl.constexpr):
    lanes = tl.arange(0, size)
    key = sortable_key(tl.load(scores + lanes))
    tl.store(keys + lanes, key.to(tl.int64))
    tl.store(lowest + lanes, lowest_score(key))


def test_keys_are_in_the_order_of_scores() -> None:
    scores = torch.tensor([*SCORES, math.nan, math.nan, math.nan])
    keys, lowest = torch.zeros(16, dtype=torch.int64), torch.zeros(16)
    _keys[(1,)](scores, keys, lowest, size=16)
    order = keys.tolist()[: len(SCORES)]
    assert order[5] == order[6]
    assert order[-1] == 0
    del order[6]
    assert order == sorted(set(order), reverse=True)
    assert torch.equal(lowest[:12], scores[:12])  # each key is reached by its own score first


@triton.jit
def _sample(scores, keys, threshold, sinks, end, wanted, slack, size: tl.constexpr):
    sampled = sample_keys(scores, sinks, end, size)
    tl.store(keys + tl.arange(0, size), sampled.to(tl.int64))
    highest = tl.full((), 0xFFFFFFFF, tl.uint32)
    tl.store(threshold, nth_largest(sampled, wanted, slack, highest).to(tl.int64))


@pytest.mark.parametrize("candidates", [1, 900, 2048, 2049, 5000, 100_000])
def test_a_sample_is_evenly_spaced_and_a_threshold_lets_the_wanted_number_pass(
    candidates: int,
) -> None:
    sinks, num_sampled = 4, min(candidates, MIN_SAMPLE)
    positive = torch.rand(candidates, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([torch.full((sinks,), torch.nan), positive, torch.full((99,), torch.nan)])
    wanted, slack = max(1, num_sampled // 10), num_sampled // 100
    keys, threshold = torch.zeros(MIN_SAMPLE, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    _sample[(1,)](
        scores, keys, threshold, sinks, sinks + candidates, wanted, slack, size=MIN_SAMPLE
    )
    spaced = torch.arange(num_sampled) * candidates // num_sampled
    # The bits of a positive score are in order; a key has the sign bit set as well.
    expected = positive[spaced].view(torch.int32).long() + (1 << 31)
    assert torch.equal(keys[:num_sampled], expected)
    assert not keys[num_sampled:].any()
    assert wanted <= int((keys >= threshold).sum()) <= wanted + slack
