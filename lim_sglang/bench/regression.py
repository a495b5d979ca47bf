"""Two recordings of decode steps: which steps became slower, beyond the noise of their windows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lim_sglang.bench.results import SAME, TIMES, DecodeTable, point_name, read_tables
from lim_sglang.bench.workloads import DENSE_BACKENDS, Point
from lim_sglang.errors import DataError
from lim_sglang.kernels.bench import Spread
from lim_sglang.markdown_section import markdown_table

CODE = {"commit", "versions"}
"""Conditions that two recordings may differ in: the code that is compared."""


class Verdict(StrEnum):
    """Reading of two timings of a step."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "SLOWER"
    UNCLEAR = "slower, but the windows overlap"


@dataclass(frozen=True)
class Change:
    """One step in both recordings."""

    model: str
    point: Point
    backend: str
    old: Spread
    new: Spread

    @property
    def slowdown(self) -> float:
        """The share of the old median that was added; negative for a faster step."""
        return self.new.median / self.old.median - 1

    def verdict(self, most_slowdown: float) -> Verdict:
        """Read the change; a dense backend's step shows how far the machines differ.

        Args:
            most_slowdown: share that counts as the same. More counts as slower where the slowest
                old window is faster than the fastest new one.
        """
        if self.slowdown > most_slowdown:
            return Verdict.SLOWER if self.new.low > self.old.high else Verdict.UNCLEAR
        return Verdict.FASTER if self.slowdown < -most_slowdown else Verdict.SAME


def find_changes(old: Path, new: Path) -> list[Change]:
    """Pair the rows that two files of `lim bench decode --out` have in common.

    Rows are paired by point and backend where all conditions but commit and versions are equal. Of
    several commits in a file, the newest counts.

    Raises:
        DataError: a damaged file, or no common row.
    """
    before, after = (_by_conditions(read_tables([path])) for path in (old, new))
    found = [
        Change(after[key].model, point, backend, table.rows[point, backend].step_ms, row.step_ms)
        for key, table in before.items()
        if key in after
        for (point, backend), row in after[key].rows.items()
        if (point, backend) in table.rows
    ]
    if not found:
        raise DataError(
            f"{old} and {new} have no step in common: name two files of `lim bench decode --out` "
            "from the same kind of GPU, with the same model, budget, settings and points"
        )
    return found


def _by_conditions(tables: Sequence[DecodeTable]) -> dict[str, DecodeTable]:
    """Return the newest table of each set of conditions but the code's."""
    names = [name for name in SAME.split() if name not in CODE]
    ordered = sorted(tables, key=lambda table: str(table.conditions["date"]))
    return {json.dumps([table.conditions[name] for name in names]): table for table in ordered}


def losses(changes: Sequence[Change], most_slowdown: float) -> list[Change]:
    """Return the steps of LessIsMore and of other policies that became slower."""
    ours = [change for change in changes if change.backend not in DENSE_BACKENDS]
    return [change for change in ours if change.verdict(most_slowdown) is Verdict.SLOWER]


def table_of_changes(changes: Sequence[Change], most_slowdown: float) -> str:
    """Return all changes in Markdown, dense steps among them."""
    head = [f"model, B {TIMES} S, backend", "old, ms", "new, ms", "change, %", "verdict"]
    lines = [
        [
            f"{change.model}, {point_name(change.point)}, {change.backend}",
            *(f"{s.median:.3f} ({s.low:.3f} to {s.high:.3f})" for s in (change.old, change.new)),
            f"{100 * change.slowdown:+.1f}",
            change.verdict(most_slowdown),
        ]
        for change in changes
    ]
    return markdown_table(head, lines)
