"""Compressed blocks, the logits of a trained gate, and the blocks that are kept."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lim_sglang.kernels.block_gate import compress_blocks, gate_logits
from lim_sglang.kernels.launch import GATE_BLOCKS, GATE_SPLITS
from lim_sglang.kernels.reference_rivals import BlockGate
from lim_sglang.kernels.verify import Batch, token_slots
from lim_sglang.kernels.verify_pages import (
    GATE_BLOCK,
    gate_differences,
    gate_selector,
    page_batch,
    paged_step,
)
from tests.kernels.batches import BF16, COMPILED_HERE, F32, LARGE, SMALL, on_both, some

SEVERAL = {
    "ends-of-blocks": Batch((256, 193, 192, 191, 255, 257, 1), 6, 2, 64, 192, dtype=F32),
    "group-of-eight": Batch((400, 64, 65), 8, 1, 64, 192, dtype=BF16),
    "no-groups": Batch((333,), 3, 3, 128, 192, dtype=BF16),
    "odd-heads": Batch((450,), 9, 3, 64, 256),
    "wide-head": Batch((260,), 2, 2, 256, 192, dtype=BF16),
    "many-rows": Batch((*range(200, 220),), 2, 1, 64, 192, dtype=BF16),
}
LONG = Batch((GATE_BLOCK * GATE_BLOCKS * GATE_SPLITS + 70,), 4, 2, 64, 192, dtype=BF16)
"""A row with a block for every program and more."""


@on_both(SEVERAL | some(SMALL, "fp8-cache"), LARGE | SEVERAL | {"long": LONG})
def test_compressed_keys_logits_and_kept_blocks_are_the_references(
    batch: Batch, device: str
) -> None:
    assert not gate_differences(batch, device)


@on_both(some(SEVERAL, "ends-of-blocks"), some(LARGE, "coder-1.5b"))
def test_a_block_is_compressed_when_its_last_token_comes_with_the_same_bits(
    batch: Batch, device: str
) -> None:
    batch = page_batch(batch, GATE_BLOCK)
    selector = gate_selector(batch, device, has_norm=True)
    step = paged_step(batch, selector)
    alone = torch.full_like(step.summaries, torch.nan)
    for first, last in pairwise(step.slots.indptr.tolist()):
        for token in range(first, last):  # as decode does, token by token
            now = torch.tensor([token - first + 1], device=device)
            slot = step.slots.slots[token : token + 1].long()
            before = alone.clone()
            selector.summarize(0, step.keys, now, slot, alone)
            changed = (before.nan_to_num() != alone.nan_to_num()).flatten(1).any(1).nonzero()
            expected = [int(slot) // GATE_BLOCK] if int(now) % GATE_BLOCK == 0 else []
            assert changed.flatten().tolist() == expected
    assert torch.equal(alone.nan_to_num(9.0), step.summaries.nan_to_num(9.0))


@on_both(some(SEVERAL, "odd-heads"), some(LARGE, "smollm2"))
def test_a_gate_that_says_nothing_keeps_the_oldest_blocks_and_the_newest(
    batch: Batch, device: str
) -> None:
    batch = page_batch(batch, GATE_BLOCK)
    selector = gate_selector(batch, device, has_norm=False, gain=0.0)
    step = paged_step(batch, selector)
    selector.select(0, step.query, step.summaries, step.slots)
    length = batch.lengths[0]
    newest = (length - 1) // GATE_BLOCK * GATE_BLOCK
    oldest = torch.arange(batch.budget - GATE_BLOCK)
    positions = torch.cat([oldest, torch.arange(newest, length)]).to(device)
    expected = token_slots(step.slots, 0)[positions].int()
    for kept in step.slots.kept[:, : len(positions)]:
        assert torch.equal(kept, expected)


@COMPILED_HERE
def test_a_block_is_rotated_by_its_place_in_the_request() -> None:
    batch = page_batch(Batch((256,), 2, 1, 64, 192, dtype=F32), GATE_BLOCK)
    selector = gate_selector(batch, "cpu", has_norm=True)
    step = paged_step(batch, selector)
    first, second = step.summaries[token_slots(step.slots, 0)[::GATE_BLOCK][:2] // GATE_BLOCK]
    moved = step.summaries.clone()
    at_zero = torch.arange(1, 65)
    for start in (0, 64):
        slots = token_slots(step.slots, 0)[start : start + 64]
        selector.summarize(0, step.keys, at_zero, slots, moved)
    again = moved[token_slots(step.slots, 0)[::GATE_BLOCK][:2] // GATE_BLOCK]
    assert torch.equal(again[0], first)
    assert not torch.allclose(again[1], second, atol=1e-2)


@COMPILED_HERE
def test_shapes_that_would_be_read_out_of_bounds_are_refused() -> None:
    batch = page_batch(Batch((256,), 4, 2, 64, 192, dtype=F32), GATE_BLOCK)
    selector = gate_selector(batch, "cpu", has_norm=True)
    step = paged_step(batch, selector)
    gates, slots = selector.gates, step.slots
    gate, table = gates.of_layer[0], gates.cos_sin
    lengths = torch.arange(1, 257)
    with pytest.raises(ValueError, match=r"compressed must be \[blocks, 2, 64\]"):
        compress_blocks(step.keys, lengths, lengths, gate, table, step.summaries[:, :1])
    with pytest.raises(ValueError, match=r"\[256\] lengths, but \[1\] slots"):
        compress_blocks(step.keys, lengths, lengths[:1], gate, table, step.summaries)
    with pytest.raises(ValueError, match="2 KV heads of 64 dimensions, the cache of 1 of 64"):
        compress_blocks(step.keys[:, :1], lengths, lengths, gate, table, step.summaries)
    narrow = BlockGate(torch.zeros(2, 2, 16, 16), torch.zeros(2, 48, 16), None, None)
    with pytest.raises(ValueError, match="multiples of 32, not 16"):
        compress_blocks(step.keys[..., :16], lengths, lengths, narrow, table, step.summaries)
    with pytest.raises(ValueError, match="f32 without gaps"):
        compress_blocks(step.keys, lengths, lengths, gate, table.half(), step.summaries)
    scores = (selector.projected, selector.page_scores)
    indptr = slots.indptr
    with pytest.raises(ValueError, match="2 query heads, but the query has 3 heads"):
        gate_logits(
            step.query[:, :3], step.summaries, indptr, slots.slots, 192, gate, table, *scores
        )
    turned = replace(gate, key_weight=gate.key_weight.mT.contiguous().mT)
    with pytest.raises(ValueError, match="contiguous and on the device"):
        compress_blocks(step.keys, lengths, lengths, turned, table, step.summaries)
    strided = replace(gate, query_norm=torch.ones(128)[::2])
    where = (indptr, slots.slots, 192)
    with pytest.raises(ValueError, match="contiguous and on the device"):
        gate_logits(step.query, step.summaries, *where, strided, table, *scores)
    gaps = step.summaries.repeat(1, 2, 1)[:, ::2]
    with pytest.raises(ValueError, match=r"compressed must be \[blocks, 2, 64\] without gaps"):
        gate_logits(step.query, gaps, *where, gate, table, *scores)


@COMPILED_HERE
def test_one_wrong_head_makes_a_summary_wrong() -> None:
    batch = page_batch(Batch((256,), 4, 2, 64, 192, dtype=F32), GATE_BLOCK)
    selector = gate_selector(batch, "cpu", has_norm=True)
    step = paged_step(batch, selector)
    found = step.summaries[token_slots(step.slots, 0)[::GATE_BLOCK] // GATE_BLOCK]
    found[2, 1] += 1
    right = selector.has_right_summaries(0, step.row_keys(0), found)
    assert right.tolist() == [True, True, False, True]


@COMPILED_HERE
def test_the_gate_is_counted_in_the_selectors_memory_and_in_a_steps_reads() -> None:
    batch = page_batch(Batch((256,), 4, 2, 64, 192, dtype=BF16), GATE_BLOCK)
    selector = gate_selector(batch, "cpu", has_norm=True)
    query_weight = 2 * 2 * 64 * 64 * 2
    weights = query_weight + 2 * 3 * 64 * 64 * 2 + 2 * 64 * 2
    table = selector.gates.cos_sin.nbytes
    assert selector.gates.num_bytes == weights + table
    without = replace(selector, gates=replace(selector.gates, of_layer={}))
    assert selector.num_bytes - without.num_bytes == weights
    assert selector.read_once(0) == query_weight
