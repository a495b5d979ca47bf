"""The byte limit, by the ceilings that follow from it, and the division of a step."""

import pytest

from lim_sglang.bench.limit import StepSplit, Traffic, read_weight_bytes, share_of_limit, split_step
from lim_sglang.bench.points import Point
from lim_sglang.config import LimConfig, Role, layer_roles

QWEN3_8B_ROLES = layer_roles(LimConfig(select_layers=(2, 12)), 36)
TOKEN_BYTES = 2 * 8 * 128 * 2
BUDGET = 2048


def ceiling(weight_bytes: float, point: Point) -> float:
    """How much faster than dense a step could be, from bytes alone."""
    traffic = Traffic(int(weight_bytes), TOKEN_BYTES, QWEN3_8B_ROLES)
    return traffic.dense_bytes(point) / traffic.lim_bytes(point, BUDGET)


@pytest.mark.parametrize(
    ("point", "expected"),
    [("1x32k", 1.23), ("16x32k", 3.20), ("16x16k", 2.20)],
)
def test_qwen3_8b_has_the_known_ceilings(point: str, expected: float) -> None:
    assert ceiling(16.4e9, Point.parse(point)) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("context", "expected"), [(8192, 3.0), (16384, 4.5), (32768, 6.0), (65536, 7.2)]
)
@pytest.mark.parametrize("batch", [1, 64])
def test_attention_alone_has_the_known_ceilings(batch: int, context: int, expected: float) -> None:
    assert ceiling(0, Point.uniform(batch, context)) == pytest.approx(expected, abs=0.05)


def test_within_the_budget_both_read_the_same() -> None:
    assert ceiling(16.4e9, Point.uniform(8, 1024)) == 1.0


def test_bytes_of_one_step_by_hand() -> None:
    traffic = Traffic(1000, 10, (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE))
    point = Point.uniform(3, 50)
    assert traffic.dense_bytes(point) == 1000 + 3 * 50 * 10 * 4
    assert traffic.lim_bytes(point, 20) == 1000 + 3 * 10 * (50 * 2 + 20 * 2)


def test_a_row_of_a_mixed_batch_within_the_budget_is_read_whole() -> None:
    traffic = Traffic(1000, 10, (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE))
    point = Point((50, 50, 7))
    assert traffic.dense_bytes(point) == 1000 + 10 * 4 * (50 + 50 + 7)
    assert traffic.lim_bytes(point, 20) == 1000 + 10 * 2 * (50 + 50 + 7) + 10 * 2 * (20 + 20 + 7)


def test_the_share_is_the_time_of_the_bytes_over_the_time_of_the_step() -> None:
    assert share_of_limit(3_000_000_000, gb_per_s=3000, step_ms=4.0) == pytest.approx(0.25)


def test_an_untied_embedding_is_not_read_but_a_tied_one_is() -> None:
    sizes = {"model.embed_tokens.weight": 100, "model.layers.0.weight": 7}
    assert read_weight_bytes(sizes) == 107
    assert read_weight_bytes(sizes | {"lm_head.weight": 100}) == 107


def test_a_step_divides_by_role() -> None:
    roles = (Role.FULL, Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE, Role.REUSE)
    split = split_step(10.0, roles, {Role.FULL: 0.5, Role.SELECT: 0.75, Role.REUSE: 0.25})
    assert split == StepSplit(dense_ms=1.5, selection_ms=0.25, sparse_ms=0.75, rest_ms=7.5)


def test_a_dense_step_is_dense_attention_and_the_rest() -> None:
    split = split_step(10.0, (Role.FULL,) * 4, {Role.FULL: 0.5})
    assert split == StepSplit(dense_ms=2.0, selection_ms=0.0, sparse_ms=0.0, rest_ms=8.0)


def test_without_a_full_layer_selection_cannot_be_told_from_attention() -> None:
    split = split_step(10.0, (Role.SELECT, Role.REUSE), {Role.SELECT: 1.0, Role.REUSE: 0.5})
    assert split == StepSplit(dense_ms=1.0, selection_ms=0.0, sparse_ms=0.5, rest_ms=8.5)
