"""`lim bench kernel`: one kernel of selection or attention, on a batch of one length."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from lim_sglang.bench.results import NONE, surroundings
from lim_sglang.bench.verify import refuse_differences, require_exact_kernels
from lim_sglang.errors import ConfigError
from lim_sglang.kernels import bench
from lim_sglang.kernels.bench import OpTiming, StepShape, TimedOp
from lim_sglang.kernels.launch import MAX_ATTENDED_DIM, MAX_RUN_ROWS
from lim_sglang.kernels.verify import Batch, selection_differences
from lim_sglang.markdown_section import markdown_table
from lim_sglang.validation import HEAD_DIMS

OPS = bench.OPS + bench.ATTENTION_OPS
CHECKED_ROWS = 2  # of a case: compared with the reference before the case is timed
MAX_CHECKED_BYTES = 128 << 20
"""Most bytes of the scores that are compared; a single row may take more."""


@dataclass(frozen=True)
class OpRow:
    """Timing of one operation."""

    op: str
    timing: OpTiming
    copy_gb_per_s: float  # speed of a copy on this GPU, reads and writes counted

    @property
    def copy_share(self) -> float | None:
        """Necessary bytes a second with a cold L2 cache, over a copy's."""
        speed = self.timing.gb_per_s
        return None if speed is None else speed / self.copy_gb_per_s

    def to_json(self, case: StepShape, repeats: int) -> str:
        """Return a JSON line with the case and all other conditions."""
        copy = {"repeats": repeats, "copy_gb_per_s": round(self.copy_gb_per_s, 1)}
        speed = {"gb_per_s": self.timing.gb_per_s, "copy_share": self.copy_share}
        shape = {"case": asdict(case) | {"dtype": str(case.dtype)}}
        found = {"op": self.op} | asdict(self.timing) | speed | shape
        return json.dumps(found | {"conditions": surroundings() | copy})


def measure_ops(ops: Sequence[str], case: StepShape, repeats: int) -> Iterator[OpRow]:
    """Time operations one after the other, once all kernels are exact, on the case's shape too.

    Args:
        ops: empty for all that take the case.
    """
    require_exact_kernels()
    room = MAX_CHECKED_BYTES // (4 * case.heads * case.context)
    rows = max(1, min(case.batch, CHECKED_ROWS, room))
    shape = {n: value for n, value in asdict(case).items() if n not in ("batch", "width")}
    checked = Batch(lengths=(shape.pop("context"),) * rows, **shape)
    refuse_differences(selection_differences(checked, "cuda"), "on this case")
    copy_gb_per_s = bench.copy_gb_per_s()
    for op in ops or [name for name in OPS if not reasons_against(name, case)]:
        yield OpRow(op, bench.time_op(_prepare(op, case), repeats), copy_gb_per_s)


def _prepare(op: str, case: StepShape) -> TimedOp:
    if op not in bench.ATTENTION_OPS:
        return bench.prepare(op, case, "cuda")
    attention = bench.prepare_attention(op, case, "cuda")
    attention.run()
    refuse_differences(attention.differences(), f"in {op}")
    return TimedOp(attention.run, attention.num_bytes, attention.times)


def check_case(case: StepShape, ops: Sequence[str]) -> None:
    """Refuse unknown operations and shapes that no kernel takes, all reasons at once."""
    reasons = [f"unknown --op {op}; known: {', '.join(OPS)}" for op in ops if op not in OPS]
    reasons += [reason for op in ops for reason in reasons_against(op, case)]
    if case.heads % case.kv_heads:
        reasons.append(f"--heads {case.heads} is no multiple of --kv-heads {case.kv_heads}")
    if case.dim & (case.dim - 1):
        reasons.append(f"--dim {case.dim} is no power of two")
    if case.context <= case.budget:
        reasons.append(f"--context {case.context} is within --budget {case.budget}: nothing to do")
    if reasons:
        raise ConfigError("; ".join(reasons))


def reasons_against(op: str, case: StepShape) -> list[str]:
    """List why an operation has no kernel for a case."""
    reasons = []
    if op in bench.OWN_ATTENTION_OPS and case.dim > MAX_ATTENDED_DIM:
        reasons.append(f"--op {op} takes --dim {MAX_ATTENDED_DIM} or less, not {case.dim}")
    if op in bench.FLASHINFER_OPS + bench.RUN_OPS and case.dim not in HEAD_DIMS:
        reasons.append(f"--op {op} takes --dim {', '.join(map(str, HEAD_DIMS))}, not {case.dim}")
    group, rest = divmod(case.heads, case.kv_heads)
    if op == bench.CUDA_CORES and not rest and group not in bench.CUDA_CORE_GROUPS:
        groups = ", ".join(map(str, bench.CUDA_CORE_GROUPS))
        reasons.append(f"--op {op} takes {groups} query heads per KV head, not {group}")
    if op in bench.RUN_OPS and case.width > case.context:
        reasons.append(f"--width {case.width} is more than --context {case.context}")
    if op == bench.RUN_ATTENTION and case.width * group > MAX_RUN_ROWS:
        reasons.append(
            f"--op {op} takes --width {MAX_RUN_ROWS // group} or less with {group} query heads per "
            f"KV head, not {case.width}"
        )
    return reasons


def op_table(rows: Sequence[OpRow]) -> str:
    """Return all operations in Markdown."""
    head = ["op", "µs, L2 cold", "range", "µs, L2 warm", "range", "GB/s, cold", "of a copy"]
    lines = []
    for row in rows:
        line = [row.op]
        for spread in (row.timing.cold_us, row.timing.warm_us):
            line += [f"{spread.median:.1f}", f"{spread.low:.1f} - {spread.high:.1f}"]
        speed, share = row.timing.gb_per_s, row.copy_share
        line.append(f"{speed:,.0f}" if speed else NONE)
        lines.append([*line, f"{100 * share:.0f} %" if share else NONE])
    return markdown_table(head, lines)
