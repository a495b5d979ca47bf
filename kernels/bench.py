"""How long each selection kernel takes, replayed from a CUDA graph.

An operation is timed twice: after a pass that leaves the L2 cache full of something else, as a
decode step does between two layers, and straight after itself, or after what puts back what it used
up.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_sglang.kernels.launch import NEEDS_FULL_RANKING
from lim_sglang.kernels.mass_selector import MassSelector
from lim_sglang.kernels.pool import log_sum_exp, softmax_mass
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.selector import RankSelector, Selector

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
