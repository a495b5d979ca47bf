"""Time each selection kernel, and attention, by replaying CUDA graphs.

An operation is timed twice: after a pass that fills the L2 cache with other data, as a decode step
does between two layers, and right after itself. Attention is compared with `reference.attend_lists`
or `reference.attend_runs` before it is timed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.mass import log_sum_exp, softmax_mass
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.run_attention import RunWorkspace, attend_runs
from lim_sglang.kernels.scores import plan_flashinfer_decode, plan_flashinfer_runs
from lim_sglang.kernels.selector import MassSelector, RankSelector, Room, ScoreSelector
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens
from lim_sglang.kernels.verify import relative_error
from lim_sglang.kernels.verify_attention import ATTENTION_TOLERANCE, attention_error

RANK_OPS = ("score", "shortlist", "full-ranking", "select-scored", "select")
"""The paper's selection. `full-ranking` ranks every row, where in a step it mostly only counts;
`select-scored` is all that a SELECT layer runs whose dense pass stores scores, for one chunk;
`select` also scores, in chunks."""
MASS_OPS = ("lse", "softmax-mass", "topk-by-mass", "select-by-mass")
"""Selection by mass. `lse` is for layers whose dense pass leaves no log-sum-exp; `select-by-mass`
is all of it, with scoring."""
OPS = RANK_OPS + MASS_OPS
SPARSE_ATTENTION = "sparse-attention"
"""Attention that REUSE layers run, over one list for all heads."""
KV_HEAD_LISTS, QUERY_HEAD_LISTS = "sparse-attention-kv-heads", "sparse-attention-query-heads"
"""The same over a list for each KV head or each query head. Random lists hardly share a token, so
their union is as long as it can be; a model's heads agree more."""
OWN_ATTENTION_OPS = (SPARSE_ATTENTION, KV_HEAD_LISTS, QUERY_HEAD_LISTS)
TENSOR_CORES, CUDA_CORES = "sparse-attention-tensor-cores", "sparse-attention-cuda-cores"
"""FlashInfer's decode at page size 1. SGLang takes tensor cores from 4 query heads per KV head."""
FLASHINFER_OPS = (TENSOR_CORES, CUDA_CORES)
RUN_ATTENTION, FLASHINFER_RUNS = "run-attention", "run-attention-flashinfer"
"""Dense attention of the last tokens of each request, as a verification of drafts runs it: our
kernel, and FlashInfer's causal prefill, planned for these lengths and not for any of a graph."""
RUN_OPS = (RUN_ATTENTION, FLASHINFER_RUNS)
ATTENTION_OPS = (*OWN_ATTENTION_OPS, *FLASHINFER_OPS, *RUN_OPS)
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads per KV head that FlashInfer compiles for CUDA cores (DISPATCH_GQA_GROUP_SIZE)."""
LAYERS = 8
"""Layers with K and V of their own that run one after the other, as in a step: the launch of a
graph is then no part of a layer's time, and each layer finds a cache that others have filled."""
MAX_CACHE_BYTES = 16 << 30
"""Most bytes of K and V of all layers together; above, fewer layers run."""
WARM_UPS = 3
MIN_FLUSH_BYTES = 256 << 20
"""Fewest bytes that are read to fill the L2 cache."""
COPY_SIZES = (256 << 20, 512 << 20, 1 << 30, 2 << 30)
"""Bytes that a copy reads, and writes: each far more than an L2 cache holds."""
COPY_REPEATS = 20
COPY_MEMORY_SHARE = 0.9
"""Share of the GPU's free memory that a copy may take."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some timings."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise at least one timing."""
        return cls(statistics.median(samples), min(samples), max(samples))


@dataclass(frozen=True)
class StepShape:
    """Shape of a decode step whose rows all have the same length."""

    batch: int
    """Rows."""
    context: int
    """Tokens of each row."""
    heads: int
    kv_heads: int
    dim: int
    budget: int
    recent_ratio: float = 0.25
    sinks: int = 4
    dtype: torch.dtype = torch.bfloat16
    width: int = 9
    """Query rows of each request where runs attend."""

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.dim**-0.5

    @property
    def budget_split(self) -> BudgetSplit:
        """Parts of the budget."""
        return split_budget(self.budget, self.recent_ratio, self.sinks)


@dataclass(frozen=True)
class TimedOp:
    """An operation on tensors of its own, ready to run repeatedly."""

    run: Run
    num_bytes: int | None
    """Bytes that one operation reads and writes at least; None if memory does not bound it."""
    times: int = 1
    """Operations per `run`: more than one where a step runs many in a row."""
    reset: Run | None = None
    """Restores, untimed, the state that a run consumes."""


@dataclass(frozen=True)
class OpTiming:
    """Time of one operation, in microseconds."""

    cold_us: Spread
    """After other data filled the L2 cache."""
    warm_us: Spread
    """Right after the same operation."""
    num_bytes: int | None

    @property
    def gb_per_s(self) -> float | None:
        """Necessary bytes per second with a cold L2 cache."""
        return self.num_bytes / self.cold_us.median / 1e3 if self.num_bytes else None


def prepare(op: str, shape: StepShape, device: torch.device | str, seed: int = 0) -> TimedOp:
    """Generate a batch for one operation, and run once the operations that come before it.

    Raises:
        ValueError: the operation is unknown, or every row is within the budget.
    """
    if op not in OPS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(OPS)}")
    if shape.context <= shape.budget:
        raise ValueError(
            f"a context of {shape.context} tokens is within the budget of {shape.budget}: "
            "there is nothing to select"
        )
    step = SelectionStep(shape, torch.device(device), seed)
    runs = step.mass_runs() if op in MASS_OPS else step.rank_runs()
    reset = step.ranker.buffers.reset if op in ("shortlist", "full-ranking") else None
    return TimedOp(runs[op], necessary_bytes(op, shape, step.ranker.max_rows), reset=reset)


class SelectionStep:
    """Random tensors of one decode step, selectors, and the operations of selection on them.

    Single kernels run on the first chunk of rows, whose scores are computed already.
    """

    def __init__(self, shape: StepShape, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        rows, num_tokens = shape.batch, shape.batch * shape.context

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=shape.dtype)

        self.shape = shape
        self.query = normal(rows, shape.heads, shape.dim)
        self.keys = normal(num_tokens, shape.kv_heads, shape.dim)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.slots = StepSlots(
            indptr=ends * shape.context,
            slots=torch.randperm(num_tokens, generator=generator, device=device).int(),
            kept_indptr=ends * shape.budget,
            kept=torch.empty(rows * shape.budget, dtype=torch.int32, device=device),
        )
        self._selector = self._allocate(RankSelector)
        self.ranker = self._selector.first_rows(min(rows, self._selector.max_rows))
        self.chunk = self.slots.chunk(0, self.ranker.max_rows)
        self._score()

    def _allocate(self, kind: type[RankSelector] | type[MassSelector]) -> Any:
        shape = self.shape
        num_tokens, device = shape.batch * shape.context, self.query.device
        room = Room(shape.batch, shape.heads, shape.kv_heads, shape.context, num_tokens, device)
        return kind.allocate(shape.budget_split, room)

    def _score(self) -> None:
        self.ranker.score(self.query[: self.ranker.max_rows], self.keys, self.chunk)

    def select(self, selector: ScoreSelector) -> None:
        """Select in all rows, with scoring."""
        selector.select(self.query, self.keys, self.slots, scale=self.shape.scale)

    def rank_runs(self) -> dict[str, Run]:
        """Return the operations of the paper's selection by name."""
        ranker, chunk, scale = self.ranker, self.chunk, self.shape.scale
        return {
            "score": self._score,
            "shortlist": lambda: ranker.shortlist(chunk.indptr),
            "full-ranking": lambda: ranker.rank_fully(chunk.indptr),
            "select-scored": lambda: ranker.select_scored(chunk, scale=scale, has_lse=False),
            "select": lambda: self.select(self._selector),
        }

    def mass_runs(self) -> dict[str, Run]:
        """Return the operations of selection by mass by name, each with its inputs computed."""
        whole: MassSelector = self._allocate(MassSelector)
        part = whole.first_rows(self.ranker.max_rows)
        part.scores.values.copy_(self.ranker.scores.values)
        scores, indptr, lse = part.scores, self.chunk.indptr, part.lse
        budget, scale = self.shape.budget_split.budget, self.shape.scale
        runs: dict[str, Run] = {
            "lse": lambda: log_sum_exp(scores, indptr, budget, scale, lse),
            "softmax-mass": lambda: softmax_mass(scores, indptr, lse, budget, scale, part.mass),
            "topk-by-mass": lambda: part.topk(self.chunk),
            "select-by-mass": lambda: self.select(whole),
        }
        runs["lse"]()
        runs["softmax-mass"]()
        return runs


def necessary_bytes(op: str, shape: StepShape, rows: int) -> int | None:
    """Return the bytes that an operation on `rows` rows cannot avoid; None for several kernels."""
    split, heads = shape.budget_split, rows * shape.heads
    candidates = heads * (shape.context - split.sinks - split.recent) * 4
    keys_and_slots = rows * shape.context * (shape.dtype.itemsize * shape.kv_heads * shape.dim + 4)
    return {
        "score": keys_and_slots + heads * shape.context * 4,
        "shortlist": candidates,
        "full-ranking": candidates + heads * split.selected * 4,
        "lse": heads * shape.context * 4,
        "softmax-mass": (heads + rows) * shape.context * 4,
        "topk-by-mass": rows * (shape.context * 4 + 2 * shape.budget * 4),
    }.get(op)


class SparseAttention:
    """`attend_tokens` with the interface of FlashInfer's planned wrapper."""

    def __init__(self, shape: StepShape, indptr: Tensor, slots: Tensor) -> None:
        self._shape, self._indptr, self._slots = shape, indptr, slots
        self._workspace = SplitWorkspace.allocate(
            num_heads=shape.heads,
            num_units=len(slots) if slots.ndim == 2 else shape.kv_heads,
            dim=shape.dim,
            cache_dtype=shape.dtype,
            device=slots.device,
        )

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Attend [B, H, D] over the kept slots, in pages of one token."""
        keys, values = (cache.squeeze(1) for cache in pages)
        return attend_tokens(
            query,
            keys,
            values,
            self._slots,
            self._indptr[:-1],
            self._indptr[1:],
            longest=self._shape.budget,
            scale=self._shape.scale,
            workspace=self._workspace,
            out=out,
        )


class RunAttention:
    """`attend_runs` with the interface of FlashInfer's planned wrapper."""

    def __init__(self, shape: StepShape, indptr: Tensor, slots: Tensor) -> None:
        self._shape, self._indptr, self._slots = shape, indptr, slots
        self._workspace = RunWorkspace.allocate(
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            dim=shape.dim,
            max_width=shape.width,
            device=slots.device,
        )

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Attend [B * width, H, D] over all slots, in pages of one token."""
        keys, values = (cache.squeeze(1) for cache in pages)
        return attend_runs(
            query,
            keys,
            values,
            self._slots,
            self._indptr,
            width=self._shape.width,
            scale=self._shape.scale,
            workspace=self._workspace,
            out=out,
        )


@dataclass(frozen=True)
class AttentionLayers:
    """Attention of some layers over kept slots, ready to run repeatedly.

    Shapes: L layers, B rows whose lists keep K slots each of P = B * context; H query heads, G KV
    heads, D head dimension.
    """

    shape: StepShape
    attention: Any
    """FlashInfer's planned wrapper, `SparseAttention` or `RunAttention`."""
    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[L, P, G, D]."""
    values: Tensor
    """[L, P, G, D]."""
    lists: Tensor
    """[lists, B, K] int32, ascending in a row; no slot belongs to two rows."""
    outputs: Tensor
    """[L, B, H, D], NaN before the first run."""

    @property
    def times(self) -> int:
        """L, the layers per run."""
        return len(self.outputs)

    @property
    def num_bytes(self) -> int:
        """Bytes of one layer's kept K and V, queries and output: no attention can avoid them.

        A KV head's tokens count once, if several of its query heads keep them.
        """
        kept = self.num_kept_slots * self.shape.dim * self.keys.itemsize
        return 2 * kept + 2 * self.query.nbytes

    @property
    def num_kept_slots(self) -> int:
        """Slots that any query head of a KV head keeps, summed over rows and KV heads."""
        lists, kv_heads = len(self.lists), self.shape.kv_heads
        if lists == 1:
            return self.lists.numel() * kv_heads
        by_kv_head = self.lists.view(kv_heads, -1)
        return sum(len(slots.unique()) for slots in by_kv_head)

    def run(self) -> None:
        """Attend once per layer; a CUDA graph may capture it."""
        for keys, values, output in zip(self.keys, self.values, self.outputs, strict=True):
            pages = keys.unsqueeze(1), values.unsqueeze(1)  # of one token
            self.attention.run(self.query, pages, out=output)

    def differences(self) -> list[str]:
        """Return the rows of the last run that differ from the reference, one line each."""
        found = []
        for layer, row in product(range(self.times), range(self.shape.batch)):
            error = attention_error(
                self.outputs[layer, row],
                self.query[row],
                self.keys[layer],
                self.values[layer],
                self.lists[:, row].long(),
                self.shape.scale,
            )
            if not error <= ATTENTION_TOLERANCE[self.shape.dtype]:
                found.append(f"layer {layer}, row {row}: attention is off by {error:.1e}")
        return found


class RunLayers(AttentionLayers):
    """Attention of the last tokens of each request, over all of its tokens: K is the context.

    Query and outputs have B * width rows.
    """

    def differences(self) -> list[str]:
        """Return the requests of the last run that differ from the reference, one line each."""
        found, width = [], self.shape.width
        indptr = torch.arange(self.shape.batch + 1) * self.shape.context
        for layer in range(self.times):
            expected = reference.attend_runs(
                self.query.float(),
                self.keys[layer].float(),
                self.values[layer].float(),
                self.lists.flatten(),
                indptr,
                width=width,
                scale=self.shape.scale,
            )
            for request in range(self.shape.batch):
                rows = slice(request * width, (request + 1) * width)
                error = relative_error(self.outputs[layer, rows], expected[rows])
                if not error <= ATTENTION_TOLERANCE[self.shape.dtype]:
                    found.append(
                        f"layer {layer}, request {request}: attention is off by {error:.1e}"
                    )
        return found


def prepare_attention(
    op: str, shape: StepShape, device: torch.device | str, seed: int = 0
) -> AttentionLayers:
    """Generate a batch and its kept slots for one operation, and plan what needs a plan.

    Raises:
        ValueError: the operation is unknown.
    """
    if op not in ATTENTION_OPS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(ATTENTION_OPS)}")
    generator = torch.Generator(device).manual_seed(seed)
    num_slots = shape.batch * shape.context

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=shape.dtype)

    owned = torch.randperm(num_slots, generator=generator, device=device)
    owned = owned.view(shape.batch, shape.context)
    lists = owned[None].int() if op in RUN_OPS else _kept_lists(op, shape, owned, generator)
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * lists.shape[2]
    slots = lists.view(-1) if len(lists) == 1 else lists.view(len(lists), -1)
    attention: Any
    if op == RUN_ATTENTION:
        attention = RunAttention(shape, indptr, slots)
    elif op == FLASHINFER_RUNS:
        attention = plan_flashinfer_runs(
            indptr,
            slots,
            width=shape.width,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            dtype=shape.dtype,
        )
    elif op in OWN_ATTENTION_OPS:
        attention = SparseAttention(shape, indptr, slots)
    else:
        attention = plan_flashinfer_decode(
            indptr,
            slots,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            dtype=shape.dtype,
            tensor_cores=op == TENSOR_CORES,
            in_graph=True,
        )
    rows = shape.batch * (shape.width if op in RUN_OPS else 1)
    query = normal(rows, shape.heads, shape.dim)
    layer_bytes = 2 * num_slots * shape.kv_heads * shape.dim * shape.dtype.itemsize
    layers = max(1, min(LAYERS, MAX_CACHE_BYTES // layer_bytes))
    keys, values = (normal(layers, num_slots, shape.kv_heads, shape.dim) for _ in range(2))
    outputs = torch.full((layers, *query.shape), torch.nan, dtype=query.dtype, device=query.device)
    kind = RunLayers if op in RUN_OPS else AttentionLayers
    return kind(shape, attention, query, keys, values, lists, outputs)


def _kept_lists(op: str, shape: StepShape, owned: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the slots that sparse attention reads, [lists, B, K] int32.

    Args:
        owned: [B, context] int64, the slots of each row.
    """
    num_lists = {KV_HEAD_LISTS: shape.kv_heads, QUERY_HEAD_LISTS: shape.heads}.get(op, 1)
    drawn = torch.rand(num_lists, *owned.shape, generator=generator, device=owned.device)
    kept = drawn.topk(shape.budget).indices  # distinct positions of a row
    return owned.expand(num_lists, -1, -1).gather(2, kept).sort(dim=2).values.int()


def time_op(op: TimedOp, repeats: int) -> OpTiming:
    """Time an operation on the current GPU."""
    graph = capture(op.run)
    cold = time_graph(graph, repeats, before=_in_turn(op.reset, cache_flush()))
    warm = time_graph(graph, repeats, before=_in_turn(graph.replay, op.reset))
    return OpTiming(_in_us(cold, op.times), _in_us(warm, op.times), op.num_bytes)


def capture(run: Run) -> torch.cuda.CUDAGraph:
    """Warm up, then capture the launches of `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, repeats: int, before: Run | None = None) -> list[float]:
    """Return the milliseconds of each replay; the device has work queued, so launching is free.

    Args:
        graph: a captured graph.
        repeats: replays to time.
        before: runs, untimed, before each replay; None for another replay.
    """
    before = before or graph.replay
    events = []
    for _ in range(repeats):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def cache_flush() -> Run:
    """Return a function that fills the L2 cache with clean lines: it only reads."""
    cache_bytes = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
    size = max(MIN_FLUSH_BYTES, 2 * cache_bytes)
    filler = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
    total = torch.zeros((), device="cuda")
    return lambda: torch.sum(filler, dim=0, out=total)


def _in_turn(*runs: Run | None) -> Run:
    def run() -> None:
        for each in runs:
            if each:
                each()

    return run


def _in_us(samples_ms: Sequence[float], times: int) -> Spread:
    return Spread.of([1e3 * sample / times for sample in samples_ms])


def copy_gb_per_s(sizes: Sequence[int] = COPY_SIZES) -> float:
    """Return the highest bandwidth of a copy over the sizes that fit, reads and writes counted.

    Raises:
        torch.OutOfMemoryError: there is no room even for the smallest.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    fitting = [size for size in sizes if 2 * size <= COPY_MEMORY_SHARE * free] or [min(sizes)]
    best = max(2 * size / _median_copy_ms(size, "cuda") / 1e6 for size in fitting)
    torch.cuda.empty_cache()  # the next measurement finds the memory as it was
    return best


def _median_copy_ms(num_bytes: int, device: str) -> float:
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # Not `copy_`: in a CUDA graph that is a memcpy node, which an H100 ran at 2.4 TB/s while decode
    # kernels read 2.9. A change of sign is certainly a kernel.
    graph = capture(lambda: torch.neg(source, out=target))
    return statistics.median(time_graph(graph, COPY_REPEATS))
