"""`lim bench kernel`: one selection kernel at a time, on a batch of one length."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lim_sglang.bench.facts import surroundings
from lim_sglang.bench.gate import check_exactness, refuse_differences, require_gpu
from lim_sglang.bench.rows import NONE
from lim_sglang.errors import ConfigError
from lim_sglang.kernels.bench import OPS, Case, OpTiming, Spread, prepare, time_op
from lim_sglang.kernels.check import Batch, differences
from lim_sglang.kernels.selector import MAX_SCORE_BYTES

CHECKED_ROWS = 2
"""Rows of a case that are judged by the reference before the case is timed."""


@dataclass(frozen=True)
class OpRow:
    """One operation's timing."""

    op: str
    timing: OpTiming


def measure_ops(ops: Sequence[str], case: Case, repeats: int) -> Iterator[OpRow]:
    """Time operations one after the other, after the kernels have proved exact, on the case too."""
    require_gpu()
    check_exactness()
    refuse_differences(differences(checked_batch(case), "cuda"), "on this case")
    for op in ops or OPS:
        yield OpRow(op, time_op(prepare(op, case, "cuda"), repeats))


def checked_batch(case: Case) -> Batch:
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


def check_case(case: Case, ops: Sequence[str]) -> None:
    """Refuse shapes that no kernel takes, all reasons at once."""
    unknown = [op for op in ops if op not in OPS]
    reasons = [f"unknown --op {op}; known: {', '.join(OPS)}" for op in unknown]
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


def op_line(row: OpRow, case: Case, repeats: int) -> str:
    """One operation as a line of JSON."""
    conditions = surroundings() | {"repeats": repeats}
    shape = asdict(case) | {"dtype": str(case.dtype)}
    timing: dict[str, Any] = asdict(row.timing) | {"gb_per_s": row.timing.gb_per_s}
    return json.dumps({"op": row.op, **timing, "case": shape, "conditions": conditions})


def op_table(rows: Sequence[OpRow], case: Case) -> Table:
    """All operations, for people."""
    title = (
        f"{case.batch} x {case.context:,}, {case.heads} / {case.kv_heads} heads x {case.dim}, "
        f"K = {case.budget:,}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("op")
    for heading in ("µs, L2 cold", "min - max", "µs, L2 warm", "min - max", "GB/s, cold"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = row.timing.gb_per_s
        table.add_row(
            row.op,
            *_cells(row.timing.cold_us),
            *_cells(row.timing.warm_us),
            NONE if speed is None else f"{speed:,.0f}",
        )
    return table


def _cells(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.1f}", f"{spread.low:.1f} - {spread.high:.1f}"
