"""Timed operations are the ones that serve, and attention is timed only if it is right.

Kernels are interpreted, and torch stands in for FlashInfer.
"""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lim_sglang.bench import kernel
from lim_sglang.errors import LimError
from lim_sglang.kernels import bench, scores
from lim_sglang.kernels.bench import (
    ATTENTION_OPS,
    CUDA_CORES,
    FLASHINFER_RUNS,
    KV_HEAD_LISTS,
    OPS,
    QUERY_HEAD_LISTS,
    RUN_ATTENTION,
    RUN_OPS,
    SPARSE_ATTENTION,
    TENSOR_CORES,
    OpTiming,
    SelectionStep,
    Spread,
    StepShape,
    prepare,
    prepare_attention,
)
from lim_sglang.kernels.reference import attend_runs, attend_tokens, keep_tokens, score_tokens

SHAPE = StepShape(3, context=90, heads=4, kv_heads=2, dim=64, budget=32, dtype=torch.float32)
KEPT_OPS = [op for op in ATTENTION_OPS if op not in RUN_OPS]


@pytest.mark.parametrize("op", OPS)
def test_every_operation_runs_again_and_again(op: str) -> None:
    prepared = prepare(op, SHAPE, "cpu")
    prepared.run()
    prepared.run()


def test_single_kernels_and_the_whole_selection_pick_the_reference_s_tokens() -> None:
    step = SelectionStep(SHAPE, torch.device("cpu"), seed=1)
    for op in ("select-scored", "select"):
        step.slots.kept.fill_(-1)
        step.rank_runs()[op]()
        for row in range(SHAPE.batch):
            slots = step.slots.slots.view(SHAPE.batch, SHAPE.context)[row].long()
            row_scores = score_tokens(step.query[row], step.keys[slots])
            expected = slots[keep_tokens(row_scores, SHAPE.budget_split)]
            assert torch.equal(step.slots.kept.view(SHAPE.batch, -1)[row].long(), expected)


def test_necessary_bytes_by_hand() -> None:
    rows, tokens, heads, dim = 3, 90, 4, 64
    split = SHAPE.budget_split
    assert (split.sinks, split.recent, split.selected) == (4, 4, 24)
    expected = {
        "score": rows * (tokens * (2 * dim * 4 + 4) + heads * tokens * 4),
        "shortlist": rows * heads * (tokens - 8) * 4,
        "full-ranking": rows * heads * ((tokens - 8) * 4 + 24 * 4),
        "select-scored": None,
        "select": None,
        "lse": rows * heads * tokens * 4,
        "softmax-mass": rows * (heads + 1) * tokens * 4,
        "topk-by-mass": rows * (tokens * 4 + 32 * 8),
        "select-by-mass": None,
    }
    assert {op: bench.necessary_bytes(op, SHAPE, rows) for op in OPS} == expected
    shape = StepShape(batch=3, context=90, heads=4, kv_heads=2, dim=64, budget=32)
    # bf16: K and V of 3 x 32 tokens in 2 heads, queries and output of 3 x 4 heads.
    attention = prepare_attention(SPARSE_ATTENTION, shape, "cpu")
    assert attention.num_bytes == 2 * (2 * 96 * 2 * dim + 2 * 12 * dim)
    # The same with lists of KV heads; of query heads, a token that both of a KV head keep once.
    attention = prepare_attention(KV_HEAD_LISTS, shape, "cpu")
    assert attention.num_bytes == 2 * (2 * 96 * 2 * dim + 2 * 12 * dim)
    attention = prepare_attention(QUERY_HEAD_LISTS, shape, "cpu")
    pairs = zip(attention.lists[0::2].tolist(), attention.lists[1::2].tolist(), strict=True)
    union = sum(len({*a} | {*b}) for one, other in pairs for a, b in zip(one, other, strict=True))
    assert 2 * 96 < union < 4 * 96
    assert attention.num_bytes == 2 * (2 * union * dim + 2 * 12 * dim)


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
        """Store the arguments."""
        self.planned, self.dtypes = arguments, dtypes

    def run(self, query: torch.Tensor, pages: Any, out: torch.Tensor) -> None:
        """Attend over the planned slots by the definition."""
        indptr, slots, _, _, _, dim, page_size = self.planned
        assert page_size == 1
        keys, values = (each.squeeze(1) for each in pages)
        ends = indptr.tolist()
        for row, each in enumerate(query):
            kept = slots[ends[row] : ends[row + 1]].long()
            out[row] = attend_tokens(each, keys, values, kept, dim**-0.5)


@dataclass
class RunWrapper:
    """Stands in for FlashInfer's prefill wrapper."""

    workspace: Any
    layout: str
    backend: str
    planned: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self, *arguments: Any, **options: Any) -> None:
        """Store the arguments."""
        self.planned, self.options = arguments, options

    def run(self, query: torch.Tensor, pages: Any, out: torch.Tensor) -> None:
        """Attend over the planned slots by the definition."""
        runs, indptr, slots, *_, dim, _ = self.planned
        keys, values = (each.squeeze(1) for each in pages)
        width, scale = int(runs[1]), dim**-0.5
        out.copy_(attend_runs(query, keys, values, slots, indptr, width=width, scale=scale))


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace FlashInfer's decode module, installed or not; run few layers."""
    module: Any = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    prefill: Any = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=RunWrapper)
    package: Any = SimpleNamespace(decode=module, prefill=prefill)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    monkeypatch.setitem(sys.modules, "flashinfer.prefill", prefill)
    monkeypatch.setattr(scores, "GRAPH_WORKSPACE_BYTES", 8)
    monkeypatch.setattr(bench, "LAYERS", 2)
    Wrapper.made.clear()


@pytest.mark.parametrize("op", KEPT_OPS)
def test_rows_keep_slots_of_their_own_scattered_over_all_slots(op: str) -> None:
    lists = prepare_attention(op, SHAPE, "cpu").lists
    num_lists = {KV_HEAD_LISTS: 2, QUERY_HEAD_LISTS: 4}.get(op, 1)
    assert lists.shape == (num_lists, 3, 32)
    assert lists.dtype == torch.int32
    assert (lists.diff(dim=2) > 0).all()
    by_row = [set(lists[:, row].flatten().tolist()) for row in range(3)]
    assert sum(map(len, by_row)) == len(set.union(*by_row))
    assert lists.unique(dim=0).shape == lists.shape
    assert lists.min() < 30
    assert 240 <= lists.max() < 3 * 90


@pytest.mark.parametrize(("op", "tensor_cores"), [(TENSOR_CORES, True), (CUDA_CORES, False)])
def test_flashinfer_is_planned_once_as_serving_plans_it_for_a_graph(
    op: str, tensor_cores: bool
) -> None:
    attention = prepare_attention(op, SHAPE, "cpu")
    (wrapper,) = Wrapper.made
    assert attention.attention is wrapper
    assert (wrapper.layout, wrapper.use_tensor_cores) == ("NHD", tensor_cores)
    assert (wrapper.backend, wrapper.use_cuda_graph) == ("fa2", True)
    indptr, slots, last_page_len, *shape = wrapper.planned
    assert indptr.tolist() == [0, 32, 64, 96]
    assert slots.data_ptr() == attention.lists.data_ptr()
    assert last_page_len.tolist() == [1, 1, 1]
    assert shape == [4, 2, 64, 1]
    assert wrapper.dtypes == {"q_data_type": SHAPE.dtype, "kv_data_type": SHAPE.dtype}
    assert wrapper.paged_kv_indptr_buffer is indptr
    assert wrapper.paged_kv_indices_buffer is slots
    assert wrapper.paged_kv_last_page_len_buffer is last_page_len


def test_runs_are_planned_for_their_lengths_over_all_tokens_in_random_order() -> None:
    layers = prepare_attention(FLASHINFER_RUNS, SHAPE, "cpu")
    wrapper = layers.attention
    assert (wrapper.layout, wrapper.backend) == ("NHD", "fa2")
    runs, indptr, slots, last_page_len, *shape = wrapper.planned
    assert runs.tolist() == [0, 9, 18, 27]
    assert indptr.tolist() == [0, 90, 180, 270]
    assert sorted(slots.tolist()) == list(range(270)) != slots.tolist()
    assert last_page_len.tolist() == [1, 1, 1]
    assert shape == [4, 2, 64, 1]
    dtypes = {"q_data_type": SHAPE.dtype, "kv_data_type": SHAPE.dtype}
    assert wrapper.options == {"causal": True} | dtypes
    assert layers.query.shape == (27, 4, 64)
    # f32: K and V of all tokens in 2 heads, queries and output of 27 x 4 heads.
    assert layers.num_bytes == 4 * (2 * 270 * 2 * 64 + 2 * 27 * 4 * 64)


def test_a_request_whose_run_reads_another_slot_is_found() -> None:
    layers = prepare_attention(RUN_ATTENTION, SHAPE, "cpu")
    layers.attention._slots = layers.attention._slots.clone()
    layers.attention._slots[100] = layers.attention._slots[0]
    layers.run()
    found = [text.split(":")[0] for text in layers.differences()]
    assert found == [f"layer {n}, request 1" for n in (0, 1)]


def test_flashinfer_is_planned_without_a_graph_for_comparisons() -> None:
    ends = torch.tensor([0, 5], dtype=torch.int32)
    scores.plan_flashinfer_decode(
        ends, torch.arange(5), heads=4, kv_heads=2, head_dim=64, dtype=torch.float16
    )
    (wrapper,) = Wrapper.made
    assert (wrapper.use_tensor_cores, wrapper.use_cuda_graph) == (True, False)
    assert wrapper.paged_kv_indices_buffer is None


@pytest.mark.parametrize("op", ATTENTION_OPS)
def test_attention_is_right_once_it_has_run(op: str) -> None:
    attention = prepare_attention(op, SHAPE, "cpu")
    assert len(attention.differences()) == attention.times * SHAPE.batch
    attention.run()
    attention.run()
    assert attention.differences() == []


@pytest.mark.parametrize(("index", "row"), [(0, 0), (31, 0), (70, 2)])
def test_a_row_that_reads_another_slot_is_found(index: int, row: int) -> None:
    attention = prepare_attention(TENSOR_CORES, SHAPE, "cpu")
    indptr, slots, *rest = attention.attention.planned
    other = slots.clone()
    other[index] = torch.isin(torch.arange(270), slots).logical_not().nonzero()[0]
    attention.attention.planned = (indptr, other, *rest)
    attention.run()
    found = attention.differences()
    assert [text.split(":")[0] for text in found] == [f"layer {n}, row {row}" for n in (0, 1)]


def test_each_layer_has_a_cache_of_its_own_as_far_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer_bytes = 2 * 270 * 2 * 64 * 4
    monkeypatch.setattr(bench, "LAYERS", 8)
    monkeypatch.setattr(bench, "MAX_CACHE_BYTES", 3 * layer_bytes + 1)
    attention = prepare_attention(TENSOR_CORES, SHAPE, "cpu")
    assert attention.times == len(attention.keys) == 3
    assert not torch.equal(attention.keys[0], attention.keys[1])
    monkeypatch.setattr(bench, "MAX_CACHE_BYTES", 1)
    assert prepare_attention(TENSOR_CORES, SHAPE, "cpu").times == 1


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown operation 'attention'"):
        prepare_attention("attention", SHAPE, "cpu")
    with pytest.raises(ValueError, match="unknown operation 'sort'"):
        prepare("sort", SHAPE, "cpu")


def test_the_time_of_a_replay_is_divided_by_the_operations_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    graph = SimpleNamespace(replay=lambda: ran.append("replay"))
    monkeypatch.setattr(bench, "capture", lambda _run: graph)
    monkeypatch.setattr(bench, "cache_flush", lambda: lambda: ran.append("flush"))

    def time_graph(_graph: Any, _repeats: int, before: bench.Run) -> list[float]:
        before()
        return [0.8, 0.4] if ran[-1] == "flush" else [0.2]

    monkeypatch.setattr(bench, "time_graph", time_graph)
    op = bench.TimedOp(print, 1000, times=4, reset=lambda: ran.append("reset"))
    timing = bench.time_op(op, 2)
    assert (timing.cold_us.low, timing.cold_us.high) == (100.0, 200.0)
    assert timing.warm_us.median == 50.0
    assert ran == ["reset", "flush", "replay", "reset"]  # every timed run finds a fresh state


SPREAD = Spread(50.0, 49.0, 52.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `measure_ops` run on the CPU; its steps, in order."""
    did: list[str] = []
    real_prepare = bench.prepare_attention

    def copy() -> float:
        did.append("copy")
        return 3000.0

    def time_op(op: Any, _repeats: int) -> OpTiming:
        did.append("time")
        return OpTiming(SPREAD, SPREAD, op.num_bytes)

    monkeypatch.setattr(kernel, "require_exact_kernels", lambda: None)
    monkeypatch.setattr(kernel, "selection_differences", lambda *_: [])
    monkeypatch.setattr(bench, "copy_gb_per_s", copy)
    monkeypatch.setattr(bench, "time_op", time_op)
    monkeypatch.setattr(bench, "prepare", lambda *_: SimpleNamespace(num_bytes=None))
    monkeypatch.setattr(
        bench, "prepare_attention", lambda op, shape, _device: real_prepare(op, shape, "cpu")
    )
    return did


def test_attention_is_timed_after_it_has_proved_right_and_the_copy_is_measured_once(
    measured: list[str],
) -> None:
    rows = list(kernel.measure_ops(ATTENTION_OPS, SHAPE, 1))
    assert measured == ["copy", *["time"] * len(ATTENTION_OPS)]
    assert [row.op for row in rows] == list(ATTENTION_OPS)
    bytes_per_s = rows[0].timing.num_bytes / 50e-6  # type: ignore[operator]
    assert rows[0].copy_share == pytest.approx(bytes_per_s / 3000e9)


@pytest.mark.parametrize(
    ("op", "runs"),
    [
        (SPARSE_ATTENTION, bench.SparseAttention),
        (TENSOR_CORES, Wrapper),
        (CUDA_CORES, Wrapper),
        (RUN_ATTENTION, bench.RunAttention),
        (FLASHINFER_RUNS, RunWrapper),
    ],
)
def test_no_time_is_shown_for_wrong_attention(
    monkeypatch: pytest.MonkeyPatch, measured: list[str], op: str, runs: type
) -> None:
    monkeypatch.setattr(runs, "run", lambda _self, query, _pages, out: out.copy_(query))
    with pytest.raises(LimError, match=f"no time is shown: kernels are not exact in {op}:") as e:
        next(kernel.measure_ops([op], SHAPE, 1))
    row = "request" if op in RUN_OPS else "row"
    assert f"layer 1, {row} 2: attention is off by" in str(e.value)
    assert "time" not in measured


def test_by_default_all_operations_are_timed_that_take_the_shape(measured: list[str]) -> None:
    names = [row.op for row in kernel.measure_ops([], SHAPE, 1)]
    assert names == list(kernel.OPS)
    seven = StepShape(batch=1, context=90, heads=14, kv_heads=2, dim=64, budget=32)
    without_sevens = [op for op in names if op != CUDA_CORES]
    assert [row.op for row in kernel.measure_ops([], seven, 1)] == without_sevens
    narrow = StepShape(batch=1, context=90, heads=4, kv_heads=2, dim=32, budget=32)
    of_any_dim = [op for op in names if op not in (TENSOR_CORES, CUDA_CORES, *RUN_OPS)]
    assert [row.op for row in kernel.measure_ops([], narrow, 1)] == of_any_dim


@pytest.mark.parametrize(
    ("free", "measured"), [(1000, [100, 200, 400]), (500, [100, 200]), (10, [100])]
)
def test_the_speed_is_the_best_of_the_sizes_that_fit(
    monkeypatch: pytest.MonkeyPatch, free: int, measured: list[int]
) -> None:
    sizes: list[int] = []

    def copy_ms(num_bytes: int, _device: str) -> float:
        sizes.append(num_bytes)
        return 1e-4 if num_bytes == 100 else 1e-3

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "_median_copy_ms", copy_ms)
    assert bench.copy_gb_per_s((100, 200, 400)) == pytest.approx(2 * 100 / 1e-4 / 1e6)
    assert sizes == measured


class Operations(TorchDispatchMode):
    """Notes which of torch's operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_timed_copy_is_a_kernel_and_no_memcpy(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = Operations()

    def capture(run: Any) -> None:
        with operations:
            run()

    monkeypatch.setattr(bench, "capture", capture)
    monkeypatch.setattr(bench, "time_graph", lambda _graph, _repeats: [3.0, 1.0, 9.0])
    assert bench._median_copy_ms(4096, "cpu") == 3.0
    assert operations.names == ["aten.neg.out"]
