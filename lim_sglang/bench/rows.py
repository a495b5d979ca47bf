"""The result of a decode benchmark: one row a point and backend, as a table and as JSON lines."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lim_sglang.bench.limit import StepSplit
from lim_sglang.bench.points import Point
from lim_sglang.kernels.bench import Spread
from lim_sglang.validation import BACKEND

NONE = "-"


@dataclass(frozen=True)
class Row:
    """One backend at one point."""

    point: Point
    backend: str
    step_ms: Spread
    """Over windows: the mean step of each, planning on the host included."""
    replay_ms: Spread
    """The CUDA graph alone, without planning."""
    sparse_rows: int | None
    """Rows that read less than everything, counted in each step of ours; None for a dense one."""
    num_bytes: int
    """What the step reads at least."""
    limit_share: float
    """Time of these bytes at copy bandwidth over the step's."""
    kernel_launches: int | None = None
    """Kernels in the step's CUDA graph; None where they could not be counted."""
    split: StepSplit | None = None
    split_error: str | None = None
    """Why the split is missing, None where it was not asked for or does not apply."""
    speedup: float | None = None
    """Step of the fastest dense backend over this one."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch."""
        return self.point.batch / (self.step_ms.median / 1e3)

    @property
    def over_limit(self) -> bool:
        """Whether the step is faster than its bytes can be, so that one of the two is wrong."""
        return self.limit_share > 1


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Compare the rows of one point with its fastest dense one."""
    dense = [row.step_ms.median for row in rows if row.backend != BACKEND]
    if not dense:
        return list(rows)
    return [replace(row, speedup=min(dense) / row.step_ms.median) for row in rows]


def json_line(row: Row, conditions: Mapping[str, Any]) -> str:
    """One row with all that it depends on; `context` is null where requests differ in length."""
    fields = asdict(row) | {"point": str(row.point)}
    context = None if row.point.is_mixed else row.point.longest
    point = {"batch": row.point.batch, "context": context}
    derived = {"tokens_per_s": row.tokens_per_s, "over_limit": row.over_limit}
    return json.dumps({**point, **fields, **derived, "conditions": dict(conditions)})


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file, so that an interrupted run keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def make_table(rows: Sequence[Row], *, title: str, budget: int) -> Table:
    """All rows, for people."""
    table = Table(title=title, title_justify="left")
    for heading in ("B", "S", "K"):
        table.add_column(heading, justify="right")
    table.add_column("backend")
    for heading in (
        "step ms",
        "min - max",
        "graph ms",
        "speed-up",
        "dense",
        "select",
        "sparse",
        "rest",
        "kernels",
        "tokens/s",
        "limit",
    ):
        table.add_column(heading, justify="right")
    last: Point | None = None
    for row in rows:
        if last not in (None, row.point):
            table.add_section()
        last = row.point
        table.add_row(*cells(row, budget))
    return table


def cells(row: Row, budget: int) -> list[str]:
    """One line of the table."""
    split = row.split
    parts = (
        (split.dense_ms, split.selection_ms, split.sparse_ms, split.rest_ms)
        if split
        else (None,) * 4
    )
    return [
        "+".join(f"{batch}" for batch, _ in row.point.groups),
        "+".join(f"{context:,}" for _, context in row.point.groups),
        f"{budget:,}" if row.backend == BACKEND else NONE,
        row.backend,
        f"{row.step_ms.median:.3f}",
        _range(row.step_ms),
        f"{row.replay_ms.median:.3f}",
        NONE if row.speedup is None else f"{row.speedup:.2f}",
        *(NONE if part is None else f"{part:.3f}" for part in parts),
        NONE if row.kernel_launches is None else f"{row.kernel_launches:,}",
        f"{row.tokens_per_s:,.0f}",
        _share(row),
    ]


def one_line(row: Row) -> str:
    """A row as it is measured, before the table is complete."""
    speedup = f", {row.speedup:.2f} x" if row.speedup else ""
    step = f"{row.step_ms.median:.3f} ms a step ({_range(row.step_ms)})"
    return f"{row.point} {row.backend}: {step}{speedup}, {_share(row)} of the limit"


def limit_warnings(rows: Iterable[Row]) -> list[str]:
    """What to say about rows that are faster than their bytes can be."""
    return [
        f"{row.point} {row.backend} is at {_share(row)} of the byte limit, which cannot be: the "
        "copy bandwidth was measured too low, or bytes are counted that are not read"
        for row in rows
        if row.over_limit
    ]


def under_table(conditions: Mapping[str, Any]) -> str:
    """The conditions that people look for first; the JSON lines have all of them."""
    versions = conditions["versions"]
    shown = ("torch", "triton", "flashinfer-python", "sglang")
    quantization = conditions["quantization"]
    weights = "not quantized" if quantization == "none" else f"in {quantization}"
    cache = str(conditions["kv_dtype"]).removeprefix("torch.")
    return "\n".join(
        [
            f"{conditions['gpu']}, driver {conditions['driver']}, copy "
            f"{conditions['copy_gb_per_s']:,.0f} GB/s, commit {conditions['commit']}",
            ", ".join(f"{name} {versions.get(name)}" for name in shown),
            f"KV cache {conditions['kv_capacity']:,} tokens of {cache} at mem_fraction_static "
            f"{conditions['mem_fraction_static']}, weights {weights}",
            f"median of {conditions['windows']} windows of {conditions['steps']} steps; "
            + "; ".join(conditions["notes"]),
        ]
    )


def _share(row: Row) -> str:
    """The share of the limit, marked where it cannot be."""
    return f"{100 * row.limit_share:.0f} %{' (!)' if row.over_limit else ''}"


def _range(spread: Spread) -> str:
    return f"{spread.low:.3f} - {spread.high:.3f}"
