"""The paper's selection from scores to slots, and from query and cache to slots in chunks."""

import pytest
import torch

from lim_sglang.kernels import reference
from lim_sglang.kernels.selector import MassSelector, RankSelector, Room, ScoreSelector
from lim_sglang.kernels.verify import (
    Batch,
    allocate_poisoned,
    kept_slots,
    pipeline_differences,
    random_step,
    rank_set_differences,
    token_slots,
)
from tests.kernels.batches import LARGE, SMALL, on_both, some

MOST_LOST_MASS = 1e-3


@on_both()
def test_the_set_is_exactly_the_reference_s(batch: Batch, device: str) -> None:
    assert not rank_set_differences(batch, device)


@pytest.mark.parametrize(
    ("kind", "max_rows"), [(RankSelector, 1), (RankSelector, 8), (MassSelector, 2)]
)
@on_both(some(SMALL, "mixed-lengths"), {})
def test_chunks_of_rows_change_nothing(
    batch: Batch, device: str, kind: type[ScoreSelector], max_rows: int
) -> None:
    assert not pipeline_differences(batch, device, max_rows, kind)


@pytest.mark.parametrize("max_rows", [1, 5, 64])
@pytest.mark.parametrize("kind", [RankSelector, MassSelector])
@on_both({}, some(LARGE, "qwen3-8b", "smollm2", "many-rows"))
def test_chunks_of_rows_change_nothing_on_a_gpu(
    batch: Batch, device: str, kind: type[ScoreSelector], max_rows: int
) -> None:
    assert not pipeline_differences(batch, device, max_rows, kind)


@on_both({}, some(LARGE, "qwen3-8b", "coder-1.5b", "group-of-sixteen", "fp8-cache"))
def test_kept_mass_is_the_reference_s(batch: Batch, device: str) -> None:
    """Attention mass of the kept tokens, where the reference scores in f32 from the same cache."""
    step = random_step(batch, device)
    selector = allocate_poisoned(RankSelector, batch, device)
    selector.select(step.query, step.keys, step.slots, scale=batch.scale)
    for row in batch.rows_over_budget:
        slots = token_slots(step.slots, row)
        scores = reference.score_tokens(step.query[row], step.keys[slots].to(batch.dtype))
        mass = (scores * batch.scale).softmax(-1)
        found = torch.isin(slots, kept_slots(step.slots, row))
        expected = reference.keep_tokens(scores, batch.budget_split)
        lost = mass[:, expected].sum(-1) - mass[:, found].sum(-1)
        assert float(lost.abs().max()) <= MOST_LOST_MASS


@pytest.mark.parametrize("kind", [RankSelector, MassSelector])
def test_memory_of_fewer_rows_is_the_same_memory(kind: type[ScoreSelector]) -> None:
    batch = SMALL["mixed-lengths"]
    selector = kind.allocate(batch.budget_split, Room(5, 4, 2, 200, 1000, "cpu"))
    part = selector.first_rows(2)
    assert (selector.max_rows, part.max_rows) == (5, 2)
    assert part.scores.values.data_ptr() == selector.scores.values.data_ptr()
    assert part.num_bytes < selector.num_bytes


def test_more_scores_than_are_counted_are_refused() -> None:
    room = Room(1, 4, 2, context=1 << 21, tokens=1 << 21, device="meta")
    with pytest.raises(ValueError, match=r"at most 2097151 scores .* not 2097152"):
        MassSelector.allocate(SMALL["mixed-lengths"].budget_split, room)
