"""What `lim bench decode --out` has recorded, read again: only rows that belong together."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lim_sglang.bench.limit import Traffic
from lim_sglang.bench.points import DENSE_BACKENDS, Point
from lim_sglang.config import Role
from lim_sglang.errors import DataError
from lim_sglang.validation import BACKEND

SAME: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "commits": lambda found: found["commit"],
    "GPUs": lambda found: found["gpu"],
    "models": lambda found: found["model"],
    "budgets": lambda found: found["budget"],
    "settings of LessIsMore": lambda found: found["lim_config"],
    "schedules": lambda found: found["roles"],
    "dtypes of the KV cache": lambda found: found["kv_dtype"],
    # Older rows do not say it: there was nothing to choose.
    "quantizations of the weights": lambda found: found.get("quantization", "none"),
    "versions": lambda found: found["versions"],
}
"""What all rows of one table must share."""


@dataclass(frozen=True)
class RecordedRow:
    """One backend at one point, as far as a reader of the table wants it."""

    point: Point
    backend: str
    step_ms: float
    """The median of the windows."""
    limit_share: float


@dataclass(frozen=True)
class Recorded:
    """Rows of one commit, GPU and model."""

    rows: Mapping[tuple[Point, str], RecordedRow]
    conditions: Mapping[str, Any]
    """Of the newest row."""
    dates: tuple[str, ...]
    """Days on which rows were measured, oldest first."""

    @property
    def points(self) -> tuple[Point, ...]:
        """By batch, then by context; mixed batches at the end."""
        found = {point for point, _ in self.rows}
        return tuple(sorted(found, key=lambda point: (point.is_mixed, point.batch, point.lengths)))

    @property
    def formats(self) -> str:
        """To follow the model's name: which of weights and KV cache are in 8 bits, if any."""
        quantization = self.conditions.get("quantization", "none")
        cache = str(self.conditions["kv_dtype"]).removeprefix("torch.")
        weights = "" if quantization == "none" else f", weights in {quantization}"
        return f"{weights}, KV cache in {cache}" if "float8" in cache else weights

    @property
    def dense_backends(self) -> tuple[str, ...]:
        """Those that were measured, in the order in which they are known."""
        found = {backend for _, backend in self.rows}
        return tuple(name for name in DENSE_BACKENDS if name in found)

    def fastest_dense(self, point: Point) -> RecordedRow | None:
        """What LessIsMore is compared with; None where no dense backend was measured there."""
        found = [self.rows.get((point, name)) for name in self.dense_backends]
        return min((row for row in found if row), key=lambda row: row.step_ms, default=None)

    def lim(self, point: Point) -> RecordedRow | None:
        """Ours; None where it was not measured."""
        return self.rows.get((point, BACKEND))

    @cached_property
    def traffic(self) -> Traffic:
        """What a step of this model reads."""
        found = self.conditions
        return Traffic(
            weight_bytes=found["weight_bytes_read"],
            token_bytes=found["kv_bytes_per_token_and_layer"],
            roles=tuple(Role(role) for role in found["roles"]),
        )

    def limit_ms(self, num_bytes: float) -> float:
        """Milliseconds that so many bytes take at copy bandwidth."""
        return float(num_bytes / (self.conditions["copy_gb_per_s"] * 1e6))


def read_recorded(paths: Sequence[Path]) -> Recorded:
    """Read files of JSON lines.

    Raises:
        DataError: a line is no row of `lim bench decode`, rows do not belong together, or one
            was recorded twice.
    """
    lines = [found for path in paths for found in _read_lines(path)]
    if not lines:
        raise DataError(
            f"{', '.join(map(str, paths))}: no row; record some with `lim bench decode --out FILE`"
        )
    check_same([found["conditions"] for found in lines])
    rows: dict[tuple[Point, str], RecordedRow] = {}
    for found in lines:
        row = _row(found)
        key = row.point, row.backend
        if key in rows:
            raise DataError(
                f"{row.point} {row.backend} is recorded twice: name files of one run, or keep one "
                "of the two lines"
            )
        rows[key] = row
    if not any(backend == BACKEND for _, backend in rows):
        raise DataError(f"no row is of {BACKEND}: there is nothing to compare with dense decoding")
    newest = max(lines, key=lambda found: str(found["conditions"]["date"]))
    dates = sorted({str(found["conditions"]["date"])[:10] for found in lines})
    return Recorded(rows, newest["conditions"], tuple(dates))


def check_same(conditions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that were made under different conditions, in one sentence."""
    mixed = []
    for name, read in SAME.items():
        values = _different(read(each) for each in conditions)
        if len(values) > 1:
            short = all(len(value) < 60 for value in values)
            mixed.append(f"{name} ({', '.join(values)})" if short else name)
    if mixed:
        raise DataError(
            f"the rows are of different {' and '.join(mixed)}: report each by itself, or measure "
            "all points again in one run"
        )


def _different(values: Iterable[Any]) -> list[str]:
    texts = (v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values)
    return list(dict.fromkeys(texts))


NEEDED = (
    *("commit", "gpu", "driver", "model", "budget", "lim_config", "roles", "kv_dtype", "versions"),
    *("date", "copy_gb_per_s", "weight_bytes_read", "kv_bytes_per_token_and_layer"),
    *("windows", "steps", "dummy_weights"),
)
"""Conditions that a table and a plot are made from."""


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return [
        _read_line(text, f"{path}, line {number}")
        for number, text in enumerate(texts, start=1)
        if text.strip()
    ]


def _read_line(text: str, where: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(text)
        missing = [name for name in NEEDED if name not in found["conditions"]]
        _row(found)
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where} is no row of `lim bench decode --out`") from None
    if missing:
        raise DataError(f"{where} does not say {', '.join(missing)}: measure it again")
    whole: dict[str, Any] = found
    return whole


def _row(found: Mapping[str, Any]) -> RecordedRow:
    if found["backend"] not in (BACKEND, *DENSE_BACKENDS):
        raise ValueError("an unknown backend")
    # Older rows have no `point`: all their requests were of one length.
    point = found.get("point", f"{found['batch']}x{found['context']}")
    return RecordedRow(
        point=Point.parse(str(point)),
        backend=found["backend"],
        step_ms=float(found["step_ms"]["median"]),
        limit_share=float(found["limit_share"]),
    )
