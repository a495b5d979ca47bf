"""Scores of all tokens, from keys and from the dense pass that stores them."""

import pytest
import torch

from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.scores import ScoreStoringAttention, score_tokens
from lim_sglang.kernels.verify import Batch, score_differences, stored_score_differences
from tests.kernels.batches import BF16, LARGE, SMALL_SHAPES, on_both, some

STORED = some(
    LARGE,
    "qwen3-8b",
    "coder-1.5b",
    "group-of-sixteen",
    "many-rows",
    "smollm2",
    "coder-0.5b",
    "group-of-one",
    "wide-head",
    "fp8-cache",
)


@on_both(SMALL_SHAPES)
def test_scores_are_the_reference_s(batch: Batch, device: str) -> None:
    assert not score_differences(batch, device)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", STORED.values(), ids=STORED)
def test_the_dense_pass_stores_the_reference_s_scores(batch: Batch) -> None:
    assert not stored_score_differences(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [300, 2049, 16385, 32768, 65537])
def test_a_lone_rows_chunks_store_no_others_scores(length: int) -> None:
    assert not stored_score_differences(Batch((length,), 32, 8, 128, 256, dtype=BF16))


@pytest.mark.parametrize(
    ("offset", "dtype"), [(1, torch.float32), (0, torch.bfloat16)], ids=["odd", "bf16"]
)
def test_scores_that_cannot_be_stored_are_refused(offset: int, dtype: torch.dtype) -> None:
    attention = object.__new__(ScoreStoringAttention)  # compiled only where there is a GPU
    query = torch.zeros(2, 4, 64)
    cache = (torch.zeros(200, 2, 64), torch.zeros(200, 2, 64))
    values = torch.zeros(1000, dtype=dtype)[offset:]
    scores = PackedRows(values, lists=4, max_rows=2, tokens=88, longest=44)
    with pytest.raises(ValueError, match=f"float32 at a multiple of 8 bytes, not {dtype}"):
        attention.run(None, query, cache, 1.0, scores, budget=32)


@pytest.mark.parametrize(
    ("query_shape", "key_shape"),
    [((1, 5, 64), (9, 2, 64)), ((1, 4, 64), (9, 2, 32)), ((1, 4, 48), (9, 2, 48))],
)
def test_shapes_that_the_kernel_cannot_score_are_refused(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> None:
    ends, slots = torch.tensor([0, 9]).int(), torch.arange(9).int()
    scores = PackedRows.allocate(lists=4, max_rows=1, longest=9, tokens=9, device="cpu")
    with pytest.raises(ValueError, match="multiple of KV heads"):
        score_tokens(torch.zeros(query_shape), torch.zeros(key_shape), ends, slots, 4, scores)
