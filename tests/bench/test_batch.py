"""A filled context without SGLang: slots, lengths, and what is wrong with a kept set."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench.batch import (
    FilledBatch,
    check_kept,
    check_room,
    fill_cache,
    filled_batch,
    prepare_kept,
)
from lim_sglang.bench.points import Point
from lim_sglang.errors import LimError

POOL_SIZE = 200


class Allocator:
    """Hands out slots from 1 on, as SGLang's."""

    def __init__(self) -> None:
        self.clear()

    def alloc(self, need: int) -> torch.Tensor | None:
        """The next slots."""
        if need > len(self.free):
            return None
        taken, self.free = self.free[:need], self.free[need:]
        return taken

    def clear(self) -> None:
        """All slots are free."""
        self.free = torch.arange(1, POOL_SIZE + 1)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What of a model runner a batch is built from."""
    fakes = {
        "ForwardBatch": SimpleNamespace,
        "ForwardMode": SimpleNamespace(DECODE="decode"),
        "CaptureHiddenMode": SimpleNamespace(NULL="none"),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(vars(compat), name, fake)  # the real ones need SGLang
    return SimpleNamespace(
        device="cpu",
        max_total_num_tokens=POOL_SIZE,
        model_config=SimpleNamespace(vocab_size=50, context_len=100),
        spec_algorithm="none",
        token_to_kv_pool_allocator=Allocator(),
        req_to_token_pool=SimpleNamespace(
            free_slots=[1, 2, 3, 4], req_to_token=torch.zeros(5, 100, dtype=torch.int32)
        ),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_slot_of_every_layer_is_drawn(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("lim_sglang.bench.batch.FILL_ROWS", 30)
    store = torch.uint8 if dtype.itemsize == 1 else dtype
    buffers = [torch.zeros(101, 2, 8, dtype=store) for _ in range(4)]
    pool = SimpleNamespace(
        k_buffer=buffers[:2], v_buffer=buffers[2:], dtype=dtype, store_dtype=store
    )
    fill_cache(pool, seed=0)
    drawn = torch.stack(buffers).view(dtype).float()
    assert drawn.isfinite().all()
    assert drawn.std() == pytest.approx(1, abs=0.05)
    assert (drawn.view(4 * 101, -1).abs().sum(1) > 0).all()
    assert not torch.equal(buffers[0], buffers[1])
    assert not torch.equal(buffers[0][:30], buffers[0][30:60])


def test_requests_own_scattered_slots_and_write_their_newest_again(runner: Any) -> None:
    with filled_batch(runner, Point.uniform(3, 40), seed=0) as batch:
        fields = batch.forward_batch
        slots = torch.stack(batch.slots)
        assert sorted(slots.flatten().tolist()) == list(range(1, 121))
        assert (slots.diff(dim=1) < 0).any()
        rows = runner.req_to_token_pool.req_to_token[fields.req_pool_indices]
        assert torch.equal(rows[:, :40].long(), slots)
        assert torch.equal(fields.out_cache_loc, slots[:, 39])
        assert fields.seq_lens.tolist() == fields.seq_lens_cpu.tolist() == [40] * 3
        assert fields.positions.tolist() == [39] * 3
        assert (fields.batch_size, fields.seq_lens_sum) == (3, 120)
        assert fields.req_pool_indices.tolist() == [1, 2, 3]
        for name in ("input_ids", "req_pool_indices", "seq_lens", "out_cache_loc", "positions"):
            assert getattr(fields, name).dtype == torch.int64


def test_each_request_of_a_mixed_batch_has_its_own_length(runner: Any) -> None:
    with filled_batch(runner, Point((40, 3, 17)), seed=0) as batch:
        fields = batch.forward_batch
        assert [len(mine) for mine in batch.slots] == [40, 3, 17]
        assert sorted(torch.cat(batch.slots).tolist()) == list(range(1, 61))
        table = runner.req_to_token_pool.req_to_token
        for request, mine in zip(fields.req_pool_indices.tolist(), batch.slots, strict=True):
            assert torch.equal(table[request, : len(mine)].long(), mine)
            assert not table[request, len(mine) :].any()
        assert fields.out_cache_loc.tolist() == [int(mine[-1]) for mine in batch.slots]
        assert fields.seq_lens.tolist() == fields.seq_lens_cpu.tolist() == [40, 3, 17]
        assert fields.positions.tolist() == [39, 2, 16]
        assert (fields.batch_size, fields.seq_lens_sum) == (3, 60)
        assert fields.num_token_non_padded_cpu == 3
        for name in ("seq_lens", "seq_lens_cpu", "out_cache_loc", "positions"):
            assert getattr(fields, name).dtype == torch.int64


def test_the_slots_are_free_again_after_a_point(runner: Any) -> None:
    for _ in range(2):
        with filled_batch(runner, Point.uniform(3, 60), seed=0):
            assert len(runner.token_to_kv_pool_allocator.free) == POOL_SIZE - 180
    assert len(runner.token_to_kv_pool_allocator.free) == POOL_SIZE


def test_the_same_seed_gives_the_same_batch(runner: Any) -> None:
    with filled_batch(runner, Point.uniform(2, 30), seed=5) as first:
        pass
    with filled_batch(runner, Point.uniform(2, 30), seed=5) as second:
        assert all(map(torch.equal, first.slots, second.slots))


def test_points_without_room_are_refused_all_at_once(runner: Any) -> None:
    with pytest.raises(LimError) as caught:
        check_room(runner, (Point.uniform(2, 50), Point.uniform(3, 99), Point((5, 101))))
    assert "3x99 fills 297 slots, the KV cache has 200" in str(caught.value)
    assert "1x5+1x101 is longer than the model's context of 100 tokens" in str(caught.value)
    assert "2x50" not in str(caught.value)


BUDGET = 4
SLOTS = torch.tensor([[7, 3, 9, 5, 1, 8], [2, 12, 4, 10, 6, 11]])
BATCH = FilledBatch(Point.uniform(2, 6), tuple(SLOTS), None)
KEPT = SLOTS[:, [0, 2, 4, 5]]
SHORT = torch.tensor([15, 14, 16])
MIXED = FilledBatch(Point((6, 3, 6)), (SLOTS[0], SHORT, SLOTS[1]), None)


def problem_of(*kept: torch.Tensor, batch: FilledBatch = BATCH) -> str | None:
    """What the check says; the buffer is longer than the batch needs, as in a runner."""
    buffer = torch.cat([*kept, torch.full((5,), -1)]).to(torch.int32)
    return check_kept(SimpleNamespace(lim_kept_slots=buffer), batch, BUDGET)


def test_a_good_set_passes() -> None:
    assert problem_of(*KEPT) is None


@pytest.mark.parametrize(
    "kept",
    [
        KEPT.flip(0),
        KEPT[:1].expand(2, 4),
        KEPT.flip(1),
        SLOTS[:, [0, 0, 4, 5]],
        SLOTS[:, [0, 1, 2, 3]],
        torch.zeros(2, 4, dtype=torch.int64),
        torch.full((2, 4), 1000),
    ],
    ids=["rows-swapped", "row-0-s", "descending", "twice", "not-the-newest", "untouched", "beyond"],
)
def test_a_bad_set_is_found(kept: torch.Tensor) -> None:
    problem = problem_of(*kept)
    assert problem is not None
    assert "does not keep 4 slots, or all that it has, of its own" in problem


def test_a_row_of_a_mixed_batch_within_the_budget_keeps_all_its_slots() -> None:
    assert problem_of(KEPT[0], SHORT, KEPT[1], batch=MIXED) is None


@pytest.mark.parametrize(
    ("short", "rows"),
    [
        (SHORT.flip(0), "1"),
        (SHORT[[0, 2, 2]], "1"),
        (torch.tensor([15, 0, 16]), "1"),
        # All rows after it begin too early.
        (SHORT[:2], "1, 2"),
    ],
    ids=["descending", "twice", "not-written", "one-too-few"],
)
def test_a_short_row_that_loses_a_slot_is_found(short: torch.Tensor, rows: str) -> None:
    problem = problem_of(KEPT[0], short, KEPT[1], batch=MIXED)
    assert f"1x6+1x3+1x6: row {rows} does not keep" in str(problem)


def test_within_the_budget_there_is_no_set_to_check() -> None:
    empty = SimpleNamespace(lim_kept_slots=torch.zeros(12, dtype=torch.int32))
    assert check_kept(empty, BATCH, 6) is None
    assert check_kept(SimpleNamespace(), BATCH, BUDGET) is None


def test_old_slots_are_wiped_before_a_step_is_checked() -> None:
    runner = SimpleNamespace(lim_kept_slots=torch.ones(3, dtype=torch.int32))
    prepare_kept(runner)
    assert runner.lim_kept_slots.tolist() == [0, 0, 0]
    prepare_kept(SimpleNamespace())
