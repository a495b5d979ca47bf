"""Time each selection kernel and attention over a kept set, replayed from CUDA graphs.

An operation is timed twice: after a pass that leaves the L2 cache full of something else, as a
decode step does between two layers, and straight after itself, or after what puts back what it
used up. Attention is compared with `reference.attend_tokens` before it is timed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels.launch import NEEDS_FULL_RANKING
from lim_sglang.kernels.mass import log_sum_exp, softmax_mass
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.scores import planned_decode
from lim_sglang.kernels.selector import MassSelector, RankSelector, Selector
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens
from lim_sglang.kernels.verify import ATTENTION_TOLERANCE, attention_error

RANK_OPS = ("score", "shortlist", "rank", "keep", "select")
"""`rank` finds every row undecided, where in a step it mostly only counts; `keep` is all that a
SELECT layer runs whose dense pass leaves scores, of one chunk; `select` scores too, in chunks."""
MASS_OPS = ("lse", "pool", "heaviest", "select-by-mass")
"""`lse` is for layers whose dense pass leaves no normalisers; the last is all, with scoring."""
OPS = RANK_OPS + MASS_OPS
WARM_UPS = 3
MIN_FLUSH_BYTES = 256 << 20

Run = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The middle of some timings, and how far they reach."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise at least one timing."""
        return cls(statistics.median(samples), min(samples), max(samples))


@dataclass(frozen=True)
class Case:
    """The shape of one decode step, every row of the same length."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    dim: int
    budget: int
    recent_ratio: float = 0.25
    sinks: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.dim**-0.5

    @property
    def budget_split(self) -> BudgetSplit:
        """The budget's parts."""
        return split_budget(self.budget, self.recent_ratio, self.sinks)


@dataclass(frozen=True)
class Op:
    """One operation on tensors of its own, ready to run again and again."""

    run: Run
    num_bytes: int | None
    """What it must read and write at least; None where no such number says anything."""
    times: int = 1
    """How often `run` runs it: an operation that a step has many of is timed in a row."""
    reset: Run | None = None
    """Puts back what a run uses up, before the next; untimed."""


@dataclass(frozen=True)
class OpTiming:
    """Microseconds of one operation."""

    cold_us: Spread
    warm_us: Spread
    num_bytes: int | None

    @property
    def gb_per_s(self) -> float | None:
        """Necessary bytes a second with a cold L2 cache."""
        return self.num_bytes / self.cold_us.median / 1e3 if self.num_bytes else None


def prepare(op: str, case: Case, device: torch.device | str, seed: int = 0) -> Op:
    """Draw a batch and lay out one operation; what comes before it has run once.

    Raises:
        ValueError: the operation is unknown, or the kernels would skip rows this short.
    """
    if op not in OPS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(OPS)}")
    if case.context <= case.budget:
        raise ValueError(
            f"a context of {case.context} tokens is within the budget of {case.budget}: "
            "there is nothing to select"
        )
    stages = _Stages(case, torch.device(device), seed)
    if op in MASS_OPS:
        stages.prepare_mass()
    reset = stages.reset if op in ("shortlist", "rank") else None
    return Op(stages.runs[op], stages.num_bytes(op), reset=reset)


class _Stages:
    """The selection's stages on one batch; the scores are of one chunk."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        rows, total = case.batch, case.batch * case.context

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

        self.case = case
        self.query = normal(rows, case.heads, case.dim)
        self.keys = normal(total, case.kv_heads, case.dim)
        self.slots = torch.randperm(total, generator=generator, device=device).int()
        steps = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.indptr = steps * case.context
        self.kept_indptr = steps * case.budget
        self.kept = torch.empty(rows * case.budget, dtype=torch.int32, device=device)
        self.selector = RankSelector.allocate(
            case.budget_split,
            max_rows=rows,
            num_heads=case.heads,
            context=case.context,
            device=device,
        )
        chunk = min(rows, self.selector.max_rows)
        self.chunk = self.selector.narrow(chunk)
        self.ends = self.indptr[: chunk + 1]
        # Where a chunk's slots are, and where those that it keeps go.
        self.lists = (self.ends, self.slots, self.kept_indptr[: chunk + 1], self.kept)
        self.runs: dict[str, Run] = {
            "score": lambda: self.chunk.score(self.query[:chunk], self.keys, self.ends, self.slots),
            "shortlist": lambda: self.chunk.shortlist(self.ends),
            "rank": lambda: self.chunk.rank(self.ends),
            "keep": lambda: self.chunk.keep(*self.lists, scale=case.scale, has_lse=False),
            "select": lambda: self.select(self.selector),
        }
        self.runs["score"]()  # every stage finds what it needs

    def reset(self) -> None:
        """Forget what was decided."""
        self.chunk.forget()
        self.chunk.last_turn.fill_(NEEDS_FULL_RANKING)

    def select(self, selector: Selector) -> None:
        selector.keep_slots(
            *(self.query, self.keys, self.indptr, self.slots, self.kept_indptr, self.kept),
            scale=self.case.scale,
        )

    def prepare_mass(self) -> None:
        """Add the operations of selection by mass, on the scores that are there."""
        case = self.case
        whole = MassSelector.allocate(
            case.budget_split,
            max_rows=case.batch,
            num_heads=case.heads,
            context=case.context,
            device=self.query.device,
        )
        part = whole.narrow(self.chunk.max_rows)
        part.scores.copy_(self.chunk.scores)
        step = (case.budget_split.budget, case.scale)
        self.runs |= {
            "lse": lambda: log_sum_exp(part.scores, self.ends, *step, part.normalisers),
            "pool": lambda: softmax_mass(
                part.scores, self.ends, part.normalisers, *step, part.mass
            ),
            "heaviest": lambda: part.write(*self.lists),
            "select-by-mass": lambda: self.select(whole),
        }
        for stage in ("lse", "pool"):
            self.runs[stage]()

    def num_bytes(self, op: str) -> int | None:
        """Bytes that an operation cannot avoid."""
        case, budget_split = self.case, self.case.budget_split
        rows = self.chunk.max_rows
        num_heads = rows * case.heads
        candidates = num_heads * (case.context - budget_split.sinks - budget_split.recent) * 4
        read = rows * case.context * (2 * case.kv_heads * case.dim + 4)  # keys and slots
        return {
            "score": read + num_heads * case.context * 4,
            "shortlist": candidates,
            "rank": candidates + num_heads * budget_split.selected * 4,
            "lse": num_heads * case.context * 4,
            "pool": (num_heads + rows) * case.context * 4,
            "heaviest": rows * (case.context * 4 + 2 * case.budget * 4),
        }.get(op)


def time_op(op: Op, repeats: int) -> OpTiming:
    """Time an operation on the current GPU."""
    graph = capture(op.run)
    cold = time_graph(graph, repeats, before=_each(op.reset, cache_flush()))
    warm = time_graph(graph, repeats, before=_each(graph.replay, op.reset))
    return OpTiming(_in_us(cold, op.times), _in_us(warm, op.times), op.num_bytes)


def capture(run: Run) -> torch.cuda.CUDAGraph:
    """Warm up, then capture what `run` launches."""
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
    """Milliseconds of each replay. The device has work queued, so launching costs nothing.

    Args:
        before: runs before each replay, untimed; else the same replay.
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
    """Something to run that fills the L2 cache with clean lines: it only reads."""
    cache_bytes = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
    size = max(MIN_FLUSH_BYTES, 2 * cache_bytes)
    filler = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
    total = torch.zeros((), device="cuda")
    return lambda: torch.sum(filler, dim=0, out=total)


def _each(*runs: Run | None) -> Run:
    def run() -> None:
        for one in runs:
            if one:
                one()

    return run


def _in_us(samples_ms: Sequence[float], times: int) -> Spread:
    return Spread.of([1e3 * sample / times for sample in samples_ms])


OURS = "sparse-attention"
"""What REUSE layers run."""
TENSOR_CORES, CUDA_CORES = "sparse-attention-tensor-cores", "sparse-attention-cuda-cores"
"""FlashInfer's decode at page size 1; SGLang takes the former from 4 query heads a KV head on."""
FLASHINFER_OPS = (TENSOR_CORES, CUDA_CORES)
ATTENTION_OPS = (OURS, *FLASHINFER_OPS)
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads a KV head that FlashInfer compiles for CUDA cores (DISPATCH_GQA_GROUP_SIZE)."""


LAYERS = 8
"""Layers with K and V of their own that run one after the other, as in a step: so the launch of a
graph is no part of a layer's time, and each finds a cache that others have filled."""
MAX_CACHE_BYTES = 16 << 30
"""Of K and V together, from which on there are fewer layers."""


class OwnAttention:
    """`attend.py` in the place of FlashInfer's wrapper."""

    def __init__(self, case: Case, indptr: Tensor, slots: Tensor) -> None:
        self._case, self._indptr, self._slots = case, indptr, slots
        self._workspace = SplitWorkspace.allocate(
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            dim=case.dim,
            cache_dtype=case.dtype,
            device=slots.device,
        )

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Attend [B, H, D] over the kept slots, in pages of one token."""
        keys, values = (cache.squeeze(1) for cache in pages)
        return attend_tokens(
            *(query, keys, values, self._slots, self._indptr),
            longest=self._case.budget,
            scale=self._case.scale,
            workspace=self._workspace,
            out=out,
        )


@dataclass(frozen=True)
class AttentionLayers:
    """Some layers' attention over kept slots, ready to run again and again.

    Shapes: L layers, B rows that keep K slots each of a pool of P = B * context; H query heads,
    G KV heads, D head_dim.
    """

    case: Case
    attention: Any
    """FlashInfer's planned wrapper, or `OwnAttention`."""
    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[L, P, G, D]."""
    values: Tensor
    """[L, P, G, D]."""
    slots: Tensor
    """[B, K] int32, ascending in a row; no slot belongs to two rows."""
    outputs: Tensor
    """[L, B, H, D], NaN until they have run."""

    @property
    def times(self) -> int:
        """L."""
        return len(self.outputs)

    @property
    def num_bytes(self) -> int:
        """K and V of the kept tokens, queries and output of a layer: what cannot be avoided."""
        kept = self.slots.numel() * self.case.kv_heads * self.case.dim * self.keys.itemsize
        return 2 * kept + 2 * self.query.nbytes

    def run(self) -> None:
        """Attend once a layer; a CUDA graph may capture it."""
        for keys, values, output in zip(self.keys, self.values, self.outputs, strict=True):
            pages = keys.unsqueeze(1), values.unsqueeze(1)  # of one token
            self.attention.run(self.query, pages, out=output)

    def differences(self) -> list[str]:
        """Rows of the last run that are not the definition's, beyond the tolerance."""
        found = []
        for layer, row in product(range(self.times), range(self.case.batch)):
            error = attention_error(
                self.outputs[layer, row],
                self.query[row],
                self.keys[layer],
                self.values[layer],
                self.slots[row].long(),
                self.case.scale,
            )
            if not error <= ATTENTION_TOLERANCE[self.case.dtype]:
                found.append(f"layer {layer}, row {row}: attention is off by {error:.1e}")
        return found


def prepare_attention(
    op: str, case: Case, device: torch.device | str, seed: int = 0
) -> AttentionLayers:
    """Draw a batch and its kept slots, and make ready what runs in a CUDA graph.

    Raises:
        ValueError: the operation is unknown.
    """
    if op not in ATTENTION_OPS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(ATTENTION_OPS)}")
    generator = torch.Generator(device).manual_seed(seed)
    pool = case.batch * case.context

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    drawn = torch.randperm(pool, generator=generator, device=device)[: case.batch * case.budget]
    slots = drawn.view(case.batch, case.budget).sort(dim=1).values.int()
    indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.budget
    attention: Any
    if op == OURS:
        attention = OwnAttention(case, indptr, slots.view(-1))
    else:
        attention = planned_decode(
            indptr,
            slots.view(-1),
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.dim,
            dtype=case.dtype,
            tensor_cores=op == TENSOR_CORES,
            in_graph=True,
        )
    query = normal(case.batch, case.heads, case.dim)
    layer_bytes = 2 * pool * case.kv_heads * case.dim * case.dtype.itemsize
    layers = max(1, min(LAYERS, MAX_CACHE_BYTES // layer_bytes))
    keys, values = (normal(layers, pool, case.kv_heads, case.dim) for _ in range(2))
    outputs = torch.full((layers, *query.shape), torch.nan, dtype=query.dtype, device=query.device)
    return AttentionLayers(case, attention, query, keys, values, slots, outputs)


SIZES = (256 << 20, 512 << 20, 1 << 30, 2 << 30)
"""Bytes that are read, and as many that are written: each far more than an L2 cache holds."""
REPEATS = 20
MEMORY_SHARE = 0.9
"""Of the GPU's free memory, so that measuring never runs out of it."""


def copy_gb_per_s(sizes: Sequence[int] = SIZES) -> float:
    """The best size's bandwidth, reads and writes counted, of those sizes that memory has room for.

    Raises:
        torch.OutOfMemoryError: there is no room even for the smallest.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    fitting = [size for size in sizes if 2 * size <= MEMORY_SHARE * free] or [min(sizes)]
    best = max(2 * size / _median_copy_ms(size, "cuda") / 1e6 for size in fitting)
    torch.cuda.empty_cache()  # what is measured next finds the memory as it was
    return best


def _median_copy_ms(num_bytes: int, device: str) -> float:
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # Not `copy_`: in a CUDA graph that is a memcpy node, which an H100 ran at 2.4 TB/s while decode
    # kernels read 2.9. A change of sign is certainly a kernel.
    graph = capture(lambda: torch.neg(source, out=target))
    return statistics.median(time_graph(graph, REPEATS))
