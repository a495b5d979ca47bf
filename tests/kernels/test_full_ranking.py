"""Full rankings of every head, and the sets that follow from them."""

import pytest

from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.selector import RankSelector, Room
from lim_sglang.kernels.verify import Batch, full_ranking_differences, random_step
from tests.kernels.batches import on_both


@on_both()
def test_a_full_ranking_is_exactly_the_reference_s(batch: Batch, device: str) -> None:
    assert not full_ranking_differences(batch, device)


def test_more_tokens_than_a_program_can_sort_are_refused() -> None:
    split = BudgetSplit(sinks=0, selected=16385, recent=1)
    selector = RankSelector.allocate(split, Room(1, 1, 1, 9, 9, "cpu"))
    with pytest.raises(ValueError, match="at most 16384 tokens per head can be ranked, not 16385"):
        selector.rank_fully(random_step(Batch((9,)), "cpu").slots.indptr)
