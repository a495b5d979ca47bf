"""Attention over a kept set, as `lim bench kernel` times it: ours interpreted, and torch in
FlashInfer's place."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from lim_sglang.bench import kernel
from lim_sglang.errors import LimError
from lim_sglang.kernels import bench, scores
from lim_sglang.kernels.bench import (
    ATTENTION_OPS,
    CUDA_CORES,
    OURS,
    TENSOR_CORES,
    Case,
    OpTiming,
    Spread,
    prepare_attention,
)
from lim_sglang.kernels.reference import attend_tokens

CASE = Case(batch=3, context=90, heads=4, kv_heads=2, dim=64, budget=32, dtype=torch.float32)


@dataclass
class Wrapper:
    """Stands in for FlashInfer's decode wrapper."""

    made: ClassVar[list["Wrapper"]] = []
    workspace: Any
    layout: str
    use_tensor_cores: bool
    backend: str
    use_cuda_graph: bool = False
    paged_kv_indptr_buffer: Any = None
    paged_kv_indices_buffer: Any = None
    paged_kv_last_page_len_buffer: Any = None
    planned: tuple[Any, ...] = ()
    dtypes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Wrapper.made.append(self)

    def plan(self, *arguments: Any, **dtypes: Any) -> None:
        """Note what was planned."""
        self.planned, self.dtypes = arguments, dtypes

    def run(self, query: torch.Tensor, pages: Any, out: torch.Tensor) -> None:
        """Attention over the planned slots, by the definition."""
        indptr, slots, _, _, _, dim, page_size = self.planned
        assert page_size == 1
        keys, values = (each.squeeze(1) for each in pages)
        ends = indptr.tolist()
        for row, each in enumerate(query):
            kept = slots[ends[row] : ends[row + 1]].long()
            out[row] = attend_tokens(each, keys, values, kept, dim**-0.5)


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decode module, whether it is installed or not."""
    module: Any = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    package: Any = SimpleNamespace(decode=module)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    monkeypatch.setattr(scores, "GRAPH_WORKSPACE_BYTES", 8)
    Wrapper.made.clear()


@pytest.mark.parametrize("op", ATTENTION_OPS)
def test_rows_keep_slots_of_their_own_scattered_over_the_whole_pool(op: str) -> None:
    slots = prepare_attention(op, CASE, "cpu").slots
    assert slots.shape == (3, 32)
    assert slots.dtype == torch.int32
    assert (slots.diff(dim=1) > 0).all()
    assert slots.unique().numel() == slots.numel()
    assert slots.min() < 30
    assert 240 <= slots.max() < 3 * 90


@pytest.mark.parametrize(("op", "tensor_cores"), [(TENSOR_CORES, True), (CUDA_CORES, False)])
def test_it_is_planned_once_as_serving_plans_it_for_a_graph(op: str, tensor_cores: bool) -> None:
    attention = prepare_attention(op, CASE, "cpu")
    (wrapper,) = Wrapper.made
    assert attention.attention is wrapper
    assert (wrapper.layout, wrapper.use_tensor_cores) == ("NHD", tensor_cores)
    assert (wrapper.backend, wrapper.use_cuda_graph) == ("fa2", True)
    indptr, slots, last_page_len, *shape = wrapper.planned
    assert indptr.tolist() == [0, 32, 64, 96]
    assert slots.data_ptr() == attention.slots.data_ptr()
    assert last_page_len.tolist() == [1, 1, 1]
    assert shape == [4, 2, 64, 1]
    assert wrapper.dtypes == {"q_data_type": CASE.dtype, "kv_data_type": CASE.dtype}
    assert wrapper.paged_kv_indptr_buffer is indptr
    assert wrapper.paged_kv_indices_buffer is slots
    assert wrapper.paged_kv_last_page_len_buffer is last_page_len


def test_checks_go_on_planning_without_a_graph() -> None:
    ends = torch.tensor([0, 5], dtype=torch.int32)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.float16}
    scores.planned_decode(ends, torch.arange(5), **shape)  # type: ignore[arg-type]
    (wrapper,) = Wrapper.made
    assert (wrapper.use_tensor_cores, wrapper.use_cuda_graph) == (True, False)
    assert wrapper.paged_kv_indices_buffer is None


@pytest.mark.parametrize("op", ATTENTION_OPS)
def test_nothing_has_run_before_it_is_run(op: str) -> None:
    attention = prepare_attention(op, CASE, "cpu")
    assert len(attention.differences()) == attention.times * CASE.batch
    attention.run()
    attention.run()
    assert attention.differences() == []


@pytest.mark.parametrize(("place", "row"), [(0, 0), (31, 0), (70, 2)])
def test_a_row_that_reads_another_slot_is_found(place: int, row: int) -> None:
    attention = prepare_attention(TENSOR_CORES, CASE, "cpu")
    indptr, slots, *rest = attention.attention.planned
    other = slots.clone()
    unused = torch.isin(torch.arange(270), slots).logical_not().nonzero()[0]
    other[place] = unused
    attention.attention.planned = (indptr, other, *rest)
    attention.run()
    found = attention.differences()
    assert [text.split(":")[0] for text in found] == [
        f"layer {layer}, row {row}" for layer in range(bench.LAYERS)
    ]


def test_each_layer_has_a_cache_of_its_own_as_far_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer_bytes = 2 * 270 * 2 * 64 * 4
    monkeypatch.setattr(bench, "MAX_CACHE_BYTES", 3 * layer_bytes + 1)
    attention = prepare_attention(TENSOR_CORES, CASE, "cpu")
    assert attention.times == len(attention.keys) == 3
    assert not torch.equal(attention.keys[0], attention.keys[1])
    monkeypatch.setattr(bench, "MAX_CACHE_BYTES", 1)
    assert prepare_attention(TENSOR_CORES, CASE, "cpu").times == 1


def test_necessary_bytes_by_hand() -> None:
    case = Case(batch=3, context=90, heads=4, kv_heads=2, dim=64, budget=32)
    attention = prepare_attention(TENSOR_CORES, case, "cpu")
    # bf16: K and V of 3 x 32 tokens in 2 heads, queries and output of 3 x 4 heads.
    assert attention.num_bytes == 2 * (2 * 96 * 2 * 64 + 2 * 12 * 64)


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown operation 'attention'"):
        prepare_attention("attention", CASE, "cpu")


SPREAD = Spread(50.0, 49.0, 52.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets `measure_ops` run on the CPU; what it did, in order."""
    did: list[str] = []
    real_prepare = bench.prepare_attention

    def copy() -> float:
        did.append("copy")
        return 3000.0

    def time_op(op: Any, _repeats: int) -> OpTiming:
        did.append("time")
        return OpTiming(SPREAD, SPREAD, op.num_bytes)

    for name in ("require_gpu", "check_exactness"):
        monkeypatch.setattr(kernel, name, lambda: None)
    monkeypatch.setattr(kernel, "differences", lambda *_: [])
    monkeypatch.setattr(kernel, "copy_gb_per_s", copy)
    monkeypatch.setattr(kernel, "time_op", time_op)
    monkeypatch.setattr(kernel, "prepare", lambda *_: SimpleNamespace(num_bytes=None))
    monkeypatch.setattr(
        kernel, "prepare_attention", lambda op, case, _device: real_prepare(op, case, "cpu")
    )
    return did


def test_attention_is_timed_after_it_has_proved_right_and_the_copy_is_measured_once(
    measured: list[str],
) -> None:
    rows = list(kernel.measure_ops(ATTENTION_OPS, CASE, 1))
    assert measured == ["copy", "time", "time", "time"]
    assert [row.op for row in rows] == list(ATTENTION_OPS)
    bytes_per_s = rows[0].timing.num_bytes / 50e-6  # type: ignore[operator]
    assert rows[0].copy_share == pytest.approx(bytes_per_s / 3000e9)


@pytest.mark.parametrize(
    ("op", "runs"),
    [(OURS, bench.OwnAttention), (TENSOR_CORES, Wrapper), (CUDA_CORES, Wrapper)],
)
def test_no_time_is_shown_for_wrong_attention(
    monkeypatch: pytest.MonkeyPatch, measured: list[str], op: str, runs: type
) -> None:
    monkeypatch.setattr(runs, "run", lambda _self, query, _pages, out: out.copy_(query))
    with pytest.raises(LimError, match=f"no time is shown: kernels are not exact in {op}:") as e:
        next(kernel.measure_ops([op], CASE, 1))
    assert "layer 7, row 2: attention is off by" in str(e.value)
    assert "time" not in measured


def test_the_time_of_a_replay_is_divided_by_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    graph = SimpleNamespace(replay=lambda: ran.append("replay"))
    monkeypatch.setattr(bench, "capture", lambda _run: graph)
    monkeypatch.setattr(bench, "cache_flush", lambda: lambda: ran.append("flush"))

    def time_graph(_graph: Any, _repeats: int, before: bench.Run) -> list[float]:
        before()
        return [0.8, 0.4] if ran[-1] == "flush" else [0.2]

    monkeypatch.setattr(bench, "time_graph", time_graph)
    op = bench.Op(print, 1000, times=4, reset=lambda: ran.append("reset"))
    timing = bench.time_op(op, 2)
    assert (timing.cold_us.low, timing.cold_us.high) == (100.0, 200.0)
    assert timing.warm_us.median == 50.0
    assert ran == ["reset", "flush", "replay", "reset"]  # what is timed finds a fresh state


def test_by_default_all_are_timed_that_take_the_case(measured: list[str]) -> None:
    names = [row.op for row in kernel.measure_ops([], CASE, 1)]
    assert names == list(kernel.OPS)
    seven = Case(batch=1, context=90, heads=14, kv_heads=2, dim=64, budget=32)
    assert [row.op for row in kernel.measure_ops([], seven, 1)] == names[:-1]
    narrow = Case(batch=1, context=90, heads=4, kv_heads=2, dim=32, budget=32)
    assert [row.op for row in kernel.measure_ops([], narrow, 1)] == names[:-2]
