"""Summaries of pages, the bounds on their scores, and the pages that are kept."""

from itertools import pairwise

import pytest
import torch

from lim_sglang.kernels import page_bounds as page_bounds_module
from lim_sglang.kernels import reference_rivals
from lim_sglang.kernels.launch import BOUND_BLOCK, BOUND_SPLITS
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.page_bounds import page_bounds, summarize_pages
from lim_sglang.kernels.verify import Batch, token_slots
from lim_sglang.kernels.verify_pages import (
    bound_selector,
    page_batch,
    page_differences,
    paged_step,
)
from tests.kernels.batches import COMPILED_HERE, LARGE, SMALL, on_both, some

SEVERAL = some(SMALL, "mixed-lengths", "odd-heads", "bf16", "fp8-cache", "longer-than-a-block")
LONG = Batch((16 * BOUND_BLOCK * BOUND_SPLITS + 1000,), 2, 1, 64, 96, dtype=torch.float32)
LEVELS = {
    "integer-keys": Batch((100, 49, 48, 47, 65, 80), 6, 2, 64, 48, levels=2),
    "ties-of-pages": Batch((300, 96, 97, 111, 112), 4, 1, 64, 64, levels=1),
    "group-of-one": Batch((160, 200), 3, 3, 64, 64, levels=2),
}


@on_both(SEVERAL | LEVELS, LARGE | {"long": LONG})
def test_summaries_bounds_and_kept_pages_are_the_reference_s(batch: Batch, device: str) -> None:
    assert not page_differences(batch, device)


@on_both(some(SMALL, "mixed-lengths"), some(LARGE, "coder-1.5b"))
def test_a_page_is_summarized_when_its_last_token_comes_and_never_before(
    batch: Batch, device: str
) -> None:
    batch = page_batch(batch, 16)
    step = paged_step(batch, bound_selector(batch, device, 1))
    whole, alone = step.summaries.clone(), step.summaries.clone().fill_(0)
    ends = step.slots.indptr.tolist()
    for first, last in pairwise(ends):
        for token in range(first, last):  # as decode does, token by token
            now = torch.tensor([token - first + 1], device=device)
            slot = step.slots.slots[token : token + 1].long()
            before = alone.clone()
            summarize_pages(step.keys, now, slot, 16, alone)
            changed = (before.float() != alone.float()).flatten(1).any(1).nonzero().flatten()
            expected = [int(slot) // 16] if int(now) % 16 == 0 else []
            assert changed.tolist() == expected
    written = whole.float().isnan().logical_not()
    assert torch.equal(alone.float()[written], whole.float()[written])


@COMPILED_HERE
def test_one_wrong_head_makes_a_summary_wrong() -> None:
    batch = page_batch(Batch((64,), 4, 2, 64, 48), 16)
    selector = bound_selector(batch, "cpu", batch.heads)
    step = paged_step(batch, selector)
    pages = token_slots(step.slots, 0)[::16] // 16
    found = step.summaries[pages].clone()
    found[2, 1, 1, 5] += 1  # of the greatest keys
    right = selector.has_right_summaries(0, step.row_keys(0), found)
    assert right.tolist() == [True, True, False, True]


@COMPILED_HERE
def test_a_second_round_of_pages_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_bounds_module, "BOUND_SPLITS", 1)
    batch = Batch((16 * BOUND_BLOCK + 300,), 2, 1, 64, 96, dtype=torch.float32)
    assert not page_differences(batch, "cpu")


@COMPILED_HERE
def test_shapes_that_would_be_read_out_of_bounds_are_refused() -> None:
    keys, slots = torch.zeros(64, 2, 64), torch.zeros(32, dtype=torch.int32)
    summaries, indptr = torch.zeros(4, 2, 2, 64), torch.tensor([0, 32], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"summaries must be \[pages, 2, 2, 64\]"):
        summarize_pages(keys, slots[:1], slots[:1], 16, summaries[:, :1])
    with pytest.raises(ValueError, match=r"\[2\] lengths, but \[1\] slots"):
        summarize_pages(keys, slots[:2], slots[:1], 16, summaries)
    bounds = PackedRows.allocate(lists=3, max_rows=1, longest=32, tokens=32, device="cpu", page=16)
    with pytest.raises(ValueError, match="4 lists, 2 or one, not 3"):
        page_bounds(torch.zeros(1, 4, 64), summaries, indptr, slots, 16, bounds)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        page_bounds(torch.zeros(1, 3, 64), summaries, indptr, slots, 16, bounds)


def test_the_bound_is_no_less_than_any_score_of_its_page() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, query = (torch.randn(n, 2, 8, generator=generator) for n in (64, 2))
    query = query.view(4, 8)
    bounds = reference_rivals.page_bounds(query, *reference_rivals.summarize_pages(keys, 16))
    scores = torch.einsum("hd,shd->hs", query, keys.repeat_interleave(2, 1))
    assert (bounds >= scores.view(4, 4, 16).amax(-1) - 1e-5).all()
