"""How long each selection kernel takes, replayed from a CUDA graph.

An operation is timed twice: after a pass that leaves the L2 cache full of something else, as a
decode step does between two layers, and straight after itself.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_sglang.kernels.rank import rank_tokens
from lim_sglang.kernels.reference import Shares, split_budget
from lim_sglang.kernels.score import score_tokens
from lim_sglang.kernels.selector import Selector
from lim_sglang.kernels.union import compact_slots, unite_rankings

OPS = ("score", "rank", "union", "compact", "select")
"""`select` is all of them in order, in chunks, as a SELECT layer runs them."""
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
    def shares(self) -> Shares:
        """The budget's parts."""
        return split_budget(self.budget, self.recent_ratio, self.sinks)


@dataclass(frozen=True)
class Op:
    """One operation on tensors of its own, ready to run again and again."""

    run: Run
    num_bytes: int | None
    """What it must read and write at least; None where no such number says anything."""


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
    if op == "select":
        return Op(stages.select, None)
    runs = {"score": stages.score, "rank": stages.rank, "union": stages.unite}
    runs["compact"] = stages.compact
    for name, run in runs.items():
        if name == op:
            break
        run()
    return Op(runs[op], stages.num_bytes(op))


class _Stages:
    """The selection's four stages on one batch, without chunks."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        rows, total, shares = case.batch, case.batch * case.context, case.shares

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.case = case
        self.ends = {"budget": case.budget, "sinks": shares.sinks, "recent": shares.recent}
        self.query = normal(rows, case.heads, case.dim)
        self.keys = normal(total, case.kv_heads, case.dim)
        self.slots = torch.randperm(total, generator=generator, device=device).int()
        steps = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.indptr = steps * case.context
        self.kept_indptr = steps * case.budget
        self.scores = empty(rows, case.heads, case.context, dtype=torch.float32)
        self.ranking = empty(rows, case.heads, shares.selected)
        self.first_turn, self.last_turn = empty(rows, case.context), empty(rows)
        self.kept = empty(rows * case.budget)
        self.selector = Selector.allocate(
            shares, max_rows=rows, num_heads=case.heads, context=case.context, device=device
        )

    def score(self) -> None:
        score_tokens(self.query, self.keys, self.indptr, self.slots, self.case.budget, self.scores)

    def rank(self) -> None:
        rank_tokens(self.scores, self.indptr, out=self.ranking, **self.ends)

    def unite(self) -> None:
        unite_rankings(
            self.ranking,
            self.indptr,
            budget=self.case.budget,
            selected=self.case.shares.selected,
            first_turn=self.first_turn,
            last_turn=self.last_turn,
        )

    def compact(self) -> None:
        compact_slots(
            self.indptr,
            self.slots,
            self.kept_indptr,
            first_turn=self.first_turn,
            last_turn=self.last_turn,
            out=self.kept,
            **self.ends,
        )

    def select(self) -> None:
        self.selector.keep_slots(
            self.query, self.keys, self.indptr, self.slots, self.kept_indptr, self.kept
        )

    def num_bytes(self, op: str) -> int | None:
        """Bytes that an operation cannot avoid."""
        ends = self.ends["sinks"] + self.ends["recent"]
        candidates = self.scores.nbytes * (self.case.context - ends) // self.case.context
        return {
            "score": self.keys.nbytes + self.slots.nbytes + self.scores.nbytes,
            "rank": candidates + self.ranking.nbytes,
            "compact": self.first_turn.nbytes + 2 * self.kept.nbytes,
        }.get(op)


def time_op(op: Op, repeats: int) -> OpTiming:
    """Time an operation on the current GPU."""
    graph = capture(op.run)
    cold, warm = time_graph(graph, repeats, flush=cache_flush()), time_graph(graph, repeats)
    return OpTiming(_in_us(cold), _in_us(warm), op.num_bytes)


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


def time_graph(graph: torch.cuda.CUDAGraph, repeats: int, flush: Run | None = None) -> list[float]:
    """Milliseconds of each replay. The device has work queued, so launching costs nothing.

    Args:
        flush: runs before each replay, untimed.
    """
    before = flush or graph.replay
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


def copy_gb_per_s(num_bytes: int = 1 << 29, repeats: int = 20) -> float:
    """Bandwidth of a copy within the GPU's memory, reads and writes counted."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = capture(lambda: target.copy_(source))
    copy_ms = statistics.median(time_graph(graph, repeats))
    return 2 * num_bytes / copy_ms / 1e6


def _in_us(samples_ms: Sequence[float]) -> Spread:
    return Spread.of([1e3 * sample for sample in samples_ms])
