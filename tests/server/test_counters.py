"""Lengths of a decode step, and the counters of rows and tokens."""

from lim_sglang.counters import Stats, step_lengths
from lim_sglang.policies.delta import Delta
from lim_sglang.policies.lessismore import LessIsMore

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
    stats.count_step(step_lengths([5, 100], POLICY))
    stats.count_step(step_lengths([101], POLICY))
    assert stats == Stats(
        decode_steps=2, dense_rows=1, sparse_rows=2, tokens_kept=21, tokens_seen=206
    )
