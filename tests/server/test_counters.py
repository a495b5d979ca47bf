"""Lengths of a decode step, and the counters of rows and tokens."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from lim_sglang.counters import Stats, step_lengths
from lim_sglang.policies.delta import Delta
from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.policies.policy import SparsePolicy

POLICY = LessIsMore(budget=8)


def test_rows_over_the_budget_are_sparse() -> None:
    lengths = step_lengths([5, 8, 9, 100], POLICY)
    assert lengths.kept_lens == (5, 8, 8, 8)
    assert lengths.sparse_rows == (2, 3)


def test_the_newest_page_may_be_cut() -> None:
    lengths = step_lengths([144, 145, 159, 160, 161], Delta(budget=144))
    assert lengths.kept_lens == (144, 129, 143, 144, 129)


def test_without_a_reuse_layer_every_row_is_dense() -> None:
    lengths = step_lengths([5, 100], None)
    assert lengths.kept_lens == lengths.seq_lens
    assert lengths.sparse_rows == ()


def test_counters_add_up_over_steps() -> None:
    stats = Stats()
    stats.count_step(np.array([5, 8, 100]), POLICY)
    stats.count_step(np.array([101]), POLICY)
    stats.count_step(np.array([7]), None)
    assert stats == Stats(
        decode_steps=3, dense_rows=3, sparse_rows=2, tokens_kept=36, tokens_seen=221
    )
    json.dumps(asdict(stats))  # as /server_info does


@pytest.mark.parametrize("policy", [POLICY, Delta(budget=144)])
def test_rows_are_counted_together_as_one_by_one(policy: SparsePolicy) -> None:
    lengths = np.arange(1, 400)
    assert policy.count_read(lengths).tolist() == [
        *step_lengths(lengths.tolist(), policy).kept_lens
    ]
