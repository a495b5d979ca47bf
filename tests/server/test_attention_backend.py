"""Attention over kept slots in the place of FlashInfer's wrapper, interpreted."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lim_sglang.attention_backend import SparseDecodeWrapper
from lim_sglang.errors import ServerError
from lim_sglang.kernels.reference import attend_tokens

BUDGET, MAX_ROWS = 24, 4
HEADS, KV_HEADS, DIM = 4, 2, 64


def sparse_decode(num_slots: int = MAX_ROWS * BUDGET) -> SparseDecodeWrapper:
    """As a backend of up to four rows makes it; the kept slots are drawn."""
    shape = SimpleNamespace(
        num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, data_type=torch.float32
    )
    backend = SimpleNamespace(kv_last_page_len=torch.ones(MAX_ROWS), indices_updater_decode=shape)
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(200, generator=generator)[:num_slots].int()
    return SparseDecodeWrapper(backend, slots, BUDGET)


def cache() -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of 200 slots."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(2, 200, KV_HEADS, DIM, generator=generator)
    return drawn[0], drawn[1]


def attended(
    kept: SparseDecodeWrapper,
    query: torch.Tensor,
    *,
    sm_scale: float = 0.125,
    logits_soft_cap: float | None = 0.0,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor:
    """As SGLang's decode calls it."""
    return kept.forward(
        query,
        cache(),
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def test_rows_read_as_many_slots_as_they_keep_one_row_after_the_other() -> None:
    kept = sparse_decode()
    query = torch.randn(3, HEADS, DIM, generator=torch.Generator().manual_seed(5))
    for lengths in ([30, 5, 24], [1, 300, 2]):  # the second step has forgotten the first
        kept.begin_step(torch.tensor(lengths))
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + min(length, BUDGET))
        assert kept.kept_indptr.tolist() == ends
        found = attended(kept, query)
        for row, (first, last) in enumerate(pairwise(ends)):
            slots = kept.kept_slots[first:last].long()
            wanted = attend_tokens(query[row], *cache(), slots, 0.125)
            assert torch.allclose(found[row], wanted, atol=1e-5)


def test_a_step_of_other_rows_leaves_the_memory_where_it_is() -> None:
    kept = sparse_decode()
    kept.begin_step(torch.tensor([9, 9, 9, 9]))
    first = kept.kept_indptr.data_ptr()
    kept.begin_step(torch.tensor([30]))
    assert kept.kept_indptr.tolist() == [0, 24]
    assert kept.kept_indptr.data_ptr() == first  # a CUDA graph reads it


def test_scales_and_soft_cap_reach_the_kernel() -> None:
    kept = sparse_decode()
    query = torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(5))
    kept.begin_step(torch.tensor([20]))
    plain = attended(kept, query)
    assert torch.allclose(attended(kept, query, sm_scale=0.0625, k_scale=2.0), plain, atol=1e-6)
    assert torch.allclose(attended(kept, query, v_scale=3.0), 3 * plain, atol=1e-5)
    assert torch.allclose(attended(kept, query, logits_soft_cap=1e4), plain, atol=1e-3)
    assert not torch.allclose(attended(kept, query, logits_soft_cap=0.5), plain, atol=1e-2)
    assert torch.equal(attended(kept, query, logits_soft_cap=None), plain)


def test_more_rows_than_there_is_memory_for_are_refused_in_words() -> None:
    with pytest.raises(ServerError, match=r"runs 4 requests at once.*--max-running-requests 2"):
        sparse_decode(2 * BUDGET)
    kept = sparse_decode()
    with pytest.raises(ValueError, match="out must have 6 elements, not 5"):
        kept.begin_step(torch.tensor([1, 1, 1, 1, 1]))
