"""`lim bench kernel`: one kernel of selection or sparse attention, on a batch of one length."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lim_sglang.bench.facts import surroundings
from lim_sglang.bench.gate import check_exactness, refuse_differences, require_gpu
from lim_sglang.bench.rows import NONE
from lim_sglang.errors import ConfigError
from lim_sglang.kernels.bench import (
    ATTENTION_OPS,
    CUDA_CORE_GROUPS,
    CUDA_CORES,
    FLASHINFER_OPS,
    SPARSE_ATTENTION,
    OpTiming,
    Spread,
    StepShape,
    TimedOp,
    copy_gb_per_s,
    prepare,
    prepare_attention,
    time_op,
)
from lim_sglang.kernels.bench import OPS as SELECTION_OPS
from lim_sglang.kernels.launch import MAX_ATTENDED_DIM
from lim_sglang.kernels.selector import MAX_SCORE_BYTES
from lim_sglang.kernels.verify import Batch, selection_differences
from lim_sglang.validation import HEAD_DIMS

OPS = SELECTION_OPS + ATTENTION_OPS
CHECKED_ROWS = 2
"""Rows of a case that are judged by the reference before the case is timed."""


@dataclass(frozen=True)
class OpRow:
    """One operation's timing."""

    op: str
    timing: OpTiming
    copy_gb_per_s: float
    """Of this GPU, reads and writes counted."""

    @property
    def copy_share(self) -> float | None:
        """Necessary bytes a second with a cold L2 cache, over a copy's."""
        speed = self.timing.gb_per_s
        return None if speed is None else speed / self.copy_gb_per_s


def measure_ops(ops: Sequence[str], case: StepShape, repeats: int) -> Iterator[OpRow]:
    """Time operations one after the other, after the kernels have proved exact, on the case too.

    Args:
        ops: none for all that take the case.
    """
    require_gpu()
    check_exactness()
    refuse_differences(selection_differences(checked_batch(case), "cuda"), "on this case")
    copy = copy_gb_per_s()
    for op in ops or [name for name in OPS if not reasons_against(name, case)]:
        yield OpRow(op, time_op(prepared(op, case, "cuda"), repeats), copy)


def prepared(op: str, case: StepShape, device: str) -> TimedOp:
    """An operation that may be timed.

    Raises:
        LimError: its attention is not the definition's.
    """
    if op not in ATTENTION_OPS:
        return prepare(op, case, device)
    attention = prepare_attention(op, case, device)
    attention.run()
    refuse_differences(attention.differences(), f"in {op}")
    return TimedOp(attention.run, attention.num_bytes, attention.times)


def checked_batch(case: StepShape) -> Batch:
    """The first rows of a case, for the check of exactness, which takes them in one chunk."""
    room = MAX_SCORE_BYTES // 2 // (4 * case.heads * case.context)
    rows = max(1, min(case.batch, CHECKED_ROWS, room))
    return Batch(
        lengths=(case.context,) * rows,
        heads=case.heads,
        kv_heads=case.kv_heads,
        dim=case.dim,
        budget=case.budget,
        recent_ratio=case.recent_ratio,
        sinks=case.sinks,
        dtype=case.dtype,
    )


def check_case(case: StepShape, ops: Sequence[str]) -> None:
    """Refuse shapes that no kernel takes, or one that was named, all reasons at once."""
    unknown = [op for op in ops if op not in OPS]
    reasons = [f"unknown --op {op}; known: {', '.join(OPS)}" for op in unknown]
    reasons += [reason for op in ops for reason in reasons_against(op, case)]
    if case.heads % case.kv_heads:
        reasons.append(f"--heads {case.heads} is no multiple of --kv-heads {case.kv_heads}")
    if case.dim & (case.dim - 1):
        reasons.append(f"--dim {case.dim} is no power of two")
    if case.context <= case.budget:
        reasons.append(
            f"--context {case.context} is within --budget {case.budget}: nothing is selected"
        )
    if reasons:
        raise ConfigError("; ".join(reasons))


def reasons_against(op: str, case: StepShape) -> list[str]:
    """Why there is no kernel for an operation on this case, one line each."""
    if op == SPARSE_ATTENTION and case.dim > MAX_ATTENDED_DIM:
        return [f"--op {op} takes --dim {MAX_ATTENDED_DIM} or less, not {case.dim}"]
    if op not in FLASHINFER_OPS:
        return []
    reasons = []
    if case.dim not in HEAD_DIMS:
        reasons.append(f"--op {op} takes --dim {', '.join(map(str, HEAD_DIMS))}, not {case.dim}")
    group, rest = divmod(case.heads, case.kv_heads)
    if op == CUDA_CORES and not rest and group not in CUDA_CORE_GROUPS:
        reasons.append(
            f"--op {op} takes {', '.join(map(str, CUDA_CORE_GROUPS))} query heads a KV head, not "
            f"{group}: choose other --heads or --kv-heads"
        )
    return reasons


def op_line(row: OpRow, case: StepShape, repeats: int) -> str:
    """One operation as a line of JSON."""
    copy = round(row.copy_gb_per_s, 1)
    conditions = surroundings() | {"repeats": repeats, "copy_gb_per_s": copy}
    shape = asdict(case) | {"dtype": str(case.dtype)}
    speed = {"gb_per_s": row.timing.gb_per_s, "copy_share": row.copy_share}
    timing: dict[str, Any] = asdict(row.timing) | speed
    return json.dumps({"op": row.op, **timing, "case": shape, "conditions": conditions})


def op_table(rows: Sequence[OpRow], case: StepShape) -> Table:
    """All operations, for people."""
    title = (
        f"{case.batch} x {case.context:,}, {case.heads} / {case.kv_heads} heads x {case.dim}, "
        f"K = {case.budget:,}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("op")
    times = ("µs, L2 cold", "min - max", "µs, L2 warm", "min - max")
    for heading in (*times, "GB/s, cold", "share of copy bandwidth"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed, share = row.timing.gb_per_s, row.copy_share
        table.add_row(
            row.op,
            *_cells(row.timing.cold_us),
            *_cells(row.timing.warm_us),
            NONE if speed is None else f"{speed:,.0f}",
            NONE if share is None else f"{100 * share:.0f} %",
        )
    return table


def _cells(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.1f}", f"{spread.low:.1f} - {spread.high:.1f}"
