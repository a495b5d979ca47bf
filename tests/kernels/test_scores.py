"""Scores of all tokens, from keys and from the dense pass that stores them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.scores import WORKSPACE_BYTES, ScoreStoringAttention, score_tokens
from lim_sglang.kernels.verify import (
    PROBED_CHUNK,
    TILE,
    Batch,
    probe_differences,
    score_differences,
    self_test_batch,
    self_test_differences,
    stored_score_differences,
)
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


PROBE = self_test_batch(
    4, heads=4, kv_heads=2, dim=64, dtype=torch.float16, key_dtype=torch.float16
)
"""Two chunks of 200 and 197 tokens, and two short rows."""


def store(*step: Any) -> None:
    """Store the scores of a step as `score_tokens` has them."""
    *inputs, scores = step
    score_tokens(*inputs, PROBE.budget, scores)


def store_all_but(first: int, last: int, value: float) -> Callable[..., None]:
    """Store scores, but a value in the place of those of tokens of the longest row."""

    def store_some(query: Any, keys: Any, indptr: Any, slots: Any, scores: PackedRows) -> None:
        store(query, keys, indptr, slots, scores)
        scores.rows(indptr.tolist())[0][:, first:last] = value

    return store_some


def test_a_self_test_finds_all_scores_stored() -> None:
    assert PROBE.lengths == (2 * PROBED_CHUNK - 3, 77, 32)
    assert probe_differences(PROBE, "cpu", store) == []


@pytest.mark.parametrize(
    ("first", "last", "value", "words"),
    [
        (392, 397, torch.nan, f"row 0: {4 * 5} of {4 * 397} stored scores are missing"),
        (192, 200, torch.nan, f"row 0: {4 * 8} of {4 * 397} stored scores are missing"),
        (192, 200, 0.0, "row 0: stored scores are off by "),
        (397, 398, 0.0, "stored scores written past a row's tokens"),
    ],
    ids=["end of the row", "end of a chunk", "wrong", "past the end"],
)
def test_a_self_test_finds_scores_that_a_chunk_drops(
    first: int, last: int, value: float, words: str
) -> None:
    """As FlashInfer 0.6.18 does with the last, partial tile of each chunk."""
    (found,) = probe_differences(PROBE, "cpu", store_all_but(first, last, value))
    assert found.startswith(words)


def flashinfer_chunk(lengths: Sequence[int], num_blocks: int) -> int:
    """Return the tokens of a chunk by FlashInfer's rule: the fewest from 128 on with which there
    are no more chunks than blocks."""
    fits = (n for n in range(128, max(lengths)) if sum(-(-s // n) for s in lengths) <= num_blocks)
    return next(fits, max(lengths))


@pytest.mark.parametrize("num_processors", [72, 108, 132, 148, 160])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 16, 32])
def test_a_self_tests_chunks_end_within_a_tile_on_any_gpu(
    num_processors: int, kv_heads: int
) -> None:
    batch = self_test_batch(
        num_processors, heads=32, kv_heads=kv_heads, dim=128, dtype=BF16, key_dtype=BF16
    )
    assert sum(batch.lengths) * kv_heads < 64_000  # keys of 16 MB
    chunk = flashinfer_chunk(batch.lengths, 2 * num_processors // kv_heads)
    ends = {chunk % TILE, *(length % chunk % TILE for length in batch.lengths[:2])}
    assert 0 not in ends
    assert len(ends) >= 2
    assert batch.lengths[0] > chunk


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [BF16, torch.float8_e5m2], ids=str)
def test_the_self_test_of_a_start_finds_the_dense_passs_scores_right(cache: torch.dtype) -> None:
    batch = self_test_batch(132, heads=32, kv_heads=8, dim=128, dtype=BF16, key_dtype=cache)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    assert not self_test_differences(ScoreStoringAttention(BF16, cache, 128), batch, workspace)


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
