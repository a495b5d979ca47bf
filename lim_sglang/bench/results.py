"""Results of `lim bench decode` and `divergence`: rows as JSON lines, and tables in Markdown.

A JSON line holds one row with all conditions of its measurement, so that tables can be made again.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Self

import torch
from pydantic import BeforeValidator, TypeAdapter

from lim_sglang.bench.workloads import DENSE_BACKENDS, WITH_LAYERS, Point
from lim_sglang.config import BACKEND
from lim_sglang.environment import driver_version, installed_versions, project_commit
from lim_sglang.errors import ConfigError, DataError
from lim_sglang.kernels.bench import Spread
from lim_sglang.markdown_section import MarkdownSection, counted, markdown_table, short_commit
from lim_sglang.policies import POLICIES

NONE = "-"
TIMES, DOT = "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}"
NAMES = {
    "flashinfer": "FlashInfer",
    "triton": "Triton",
    "fa3": "FlashAttention 3",
    f"flashinfer{WITH_LAYERS}": "FlashInfer with our layers",
}
SECTION = MarkdownSection("lim bench decode")
"""The section of a Markdown file that `lim bench report` writes."""
SAME = (
    "commit gpu model budget lim_config roles kv_dtype quantization versions dummy_weights "
    "context_length tp"
)
"""Conditions that all rows of one table share; rows of before 2026-11-30 lack `tp`, which was 1."""
DIVERGENCE_SECTION = MarkdownSection("lim bench divergence")
"""The section of divergence rows."""
DIVERGENCE_SAME = "commit gpu model texts_sha256 sequences length steps seed versions"
"""Conditions under which a divergence is not measured again, and that a table's rows share, beside
`model_sha256`, which rows of 2026-11-29 lack: they are shown, and never continued."""
UNDEFINED = "not defined"
"""Cell of a budget that the policy's definition excludes."""
SHOWN = {"driver", "date", "windows", "steps", "copy_gb_per_s", "weight_bytes_read"}
"""Further conditions that tables and plots show."""


def surroundings() -> dict[str, Any]:
    """Return when, where and with which code a number is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": project_commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": installed_versions(),
    }


@dataclass(frozen=True)
class StepSplit:
    """Milliseconds of a decode step by part."""

    dense_ms: float  # dense attention of FULL and SELECT layers
    selection_ms: float  # work of SELECT layers beyond dense attention
    sparse_ms: float  # attention of REUSE layers, and all of PICK layers
    rest_ms: float  # matrices, norms, cache writes, launches, planning on the host


@dataclass(frozen=True)
class Row:
    """Result of one backend at one point."""

    point: Annotated[Point, BeforeValidator(lambda text: Point.parse(str(text)))]
    backend: str
    step_ms: Spread  # over windows: the mean step of each, planning on the host included
    replay_ms: Spread  # the CUDA graph alone, without planning
    sparse_rows: int | None  # requests that read less than all tokens, as counted; None if dense
    num_bytes: int  # that the step reads at least
    limit_share: float  # time of these bytes at the speed of a copy over the step's
    kernel_launches: int | None  # kernels in the step's CUDA graph
    split: StepSplit | None  # None for backends whose layers cannot be timed apart
    tokens_read: float | None = None  # of a request by one KV head in a sparse layer; None if dense
    dense_layers: int | None = None  # None if dense, or not recorded

    @property
    def share(self) -> str:
        """Share of the byte limit; (!) marks an impossible one: the bandwidth was measured too low,
        or bytes are counted that are not read."""
        return f"{100 * self.limit_share:.0f} %{' (!)' if self.limit_share > 1 else ''}"

    def describe(self) -> str:
        """Return the row in one line, with the parts of the step."""
        step = self.step_ms
        parts = [f"graph {self.replay_ms.median:.3f}", f"{self.kernel_launches} kernels"]
        if self.split:
            parts += [f"{name[:-3]} {part:.3f}" for name, part in asdict(self.split).items()]
        return (
            f"{self.point} {self.backend}: {step.median:.3f} ms a step ({step.low:.3f} - "
            f"{step.high:.3f}), {', '.join(parts)}, {self.share} of the byte limit"
        )

    def to_json(self, conditions: Mapping[str, Any]) -> str:
        """Return a JSON line; `context` is null where requests differ in length."""
        context = None if self.point.is_mixed else self.point.longest
        point = {"point": str(self.point), "batch": self.point.batch, "context": context}
        return json.dumps(asdict(self) | point | {"conditions": conditions})


_ROW = TypeAdapter(Row)


@dataclass(frozen=True)
class DecodeTable:
    """Rows that were measured under the same conditions."""

    rows: Mapping[tuple[Point, str], Row]
    conditions: Mapping[str, Any]  # of the newest row
    days: tuple[str, ...]  # of the measurements, oldest first

    @classmethod
    def of(cls, measured: Sequence[tuple[Row, Mapping[str, Any]]]) -> Self:
        """Collect rows with their conditions; refuse two rows of one point and backend, and a
        table without a row of ours."""
        rows: dict[tuple[Point, str], Row] = {}
        for row, _ in measured:
            if (row.point, row.backend) in rows:
                raise DataError(f"{row.point} {row.backend} is recorded twice: keep one of the two")
            rows[row.point, row.backend] = row
        if BACKEND not in {backend for _, backend in rows}:
            raise DataError(f"no row is of {BACKEND}: there is nothing to compare with dense rows")
        found = sorted((conditions for _, conditions in measured), key=lambda each: each["date"])
        return cls(rows, found[-1], tuple(dict.fromkeys(each["date"][:10] for each in found)))

    @property
    def points(self) -> list[Point]:
        """Points by batch, then by context; mixed batches at the end."""
        found = {point for point, _ in self.rows}
        return sorted(found, key=lambda point: (point.is_mixed, point.batch, point.lengths))

    @property
    def dense_backends(self) -> list[str]:
        """Measured dense backends."""
        found = {backend for _, backend in self.rows}
        return [name for name in DENSE_BACKENDS if name in found]

    @property
    def policies(self) -> list[str]:
        """Measured policies beside LessIsMore, in their order."""
        found = dict.fromkeys(backend for _, backend in self.rows)
        return [name for name in found if name not in (BACKEND, *DENSE_BACKENDS)]

    @property
    def model(self) -> str:
        """The model's name, with the formats of weights and KV cache that have 8 bits."""
        found, formats = self.conditions, ""
        if found["quantization"] != "none":
            formats += f", weights in {found['quantization']}"
        if "float8" in found["kv_dtype"]:
            formats += f", KV cache in {found['kv_dtype'].removeprefix('torch.')}"
        dummy = " shape, dummy weights" if found["dummy_weights"] else ""
        return f"{found['model']}{dummy}{formats}"

    @property
    def gpus(self) -> str:
        """The GPU, with the number of those that share the heads if there are several."""
        name, number = self.conditions["gpu"], self.conditions["tp"]
        return f"{number} {TIMES} {name} (tensor parallelism)" if number > 1 else name

    def fastest_dense(self, point: Point) -> Row | None:
        """Return the dense row that LessIsMore is compared with; None where none was measured."""
        found = [row for name in self.dense_backends if (row := self.rows.get((point, name)))]
        return min(found, key=lambda row: row.step_ms.median, default=None)

    def speedup(self, point: Point) -> float | None:
        """Return the step of the fastest dense backend over ours."""
        dense, lim = self.fastest_dense(point), self.rows.get((point, BACKEND))
        return dense.step_ms.median / lim.step_ms.median if dense and lim else None

    def describe(self) -> str:
        """Return the conditions in one paragraph."""
        found, versions = self.conditions, self.conditions["versions"]
        names = {"torch": "torch", "triton": "Triton", "flashinfer-python": "FlashInfer"}
        stack = [f"{shown} {versions.get(name)}" for name, shown in names.items()]
        days = " to ".join(dict.fromkeys([self.days[0], self.days[-1]]))
        ranking = found["lim_config"].get("ranking", "rank")
        limited = found.get("context_limit")
        limit = f", of up to {limited:,} that the server allows" if limited else ""
        share = " of one GPU's bytes" if found["tp"] > 1 else ""
        by_mass = "" if ranking == "rank" else f", tokens ranked by {ranking}"
        return (
            f"{self.model}, {self.gpus}, budget {found['budget']:,}{by_mass}; B requests of S "
            f"tokens{limit}. By `lim bench decode` on {days}, "
            f"commit {short_commit(found['commit'])}, driver {found['driver']}, "
            f"{', '.join(stack)}, SGLang {versions.get('sglang')}; medians of {found['windows']} "
            f"windows of {found['steps']} steps in CUDA graphs, backends in turns; speed-up over "
            f"the fastest dense backend; byte limit{share} at the measured copy speed of "
            f"{found['copy_gb_per_s']:,.0f} GB/s."
        )

    def section(self, points: Sequence[Point]) -> str:
        """Return the rows of some points in Markdown, with the conditions below."""
        dense = [f"dense {NAMES[backend]}, ms" for backend in self.dense_backends]
        share = f"of the byte limit, dense {DOT} LessIsMore"
        head, lines = [f"decode step, B {TIMES} S", *dense, "LessIsMore, ms", "speed-up", share], []
        for point in points:
            rows = [self.rows.get((point, name)) for name in (*self.dense_backends, BACKEND)]
            steps = [f"{row.step_ms.median:.2f}" if row else NONE for row in rows]
            compared, speedup = (self.fastest_dense(point), rows[-1]), self.speedup(point)
            shares = f" {DOT} ".join(row.share if row else NONE for row in compared)
            factor = f"{speedup:.2f}" if speedup else NONE
            lines.append([point_name(point), *steps, factor, shares])
        policies = f"\n\n{self.policy_table(points)}" if self.policies else ""
        return f"{markdown_table(head, lines)}{policies}\n\n{self.describe()}"

    def policy_table(self, points: Sequence[Point]) -> str:
        """Return the rows of all policies at some points in Markdown, the fastest dense one first.

        Tokens read are those of a request by one KV head in a sparse layer: where its query heads
        have lists of their own, the union of these.
        """
        head = ["policy", f"B {TIMES} S", "ms", "dense / policy", "tokens read", "dense layers"]
        head += ["GB", "of its byte limit"]
        lines = []
        for point in points:
            dense = self.fastest_dense(point)
            ours = [self.rows.get((point, name)) for name in (BACKEND, *self.policies)]
            for row in filter(None, (dense, *ours)):
                ratio = dense.step_ms.median / row.step_ms.median if dense else None
                cells = [
                    {BACKEND: "lessismore"}.get(row.backend, row.backend),
                    point_name(point),
                    f"{row.step_ms.median:.2f}",
                    f"{ratio:.2f}" if ratio else NONE,
                    f"{row.tokens_read:,.0f}" if row.tokens_read else "all",
                    NONE if row.dense_layers is None else f"{row.dense_layers}",
                    f"{row.num_bytes / 1e9:.2f}",
                    row.share,
                ]
                lines.append(cells)
        return markdown_table(head, lines)

    def proof(self) -> str:
        """Return at most three rows of the longest context in Markdown, by the smallest, the middle
        and the largest batch, with the conditions and the range over all rows."""
        speedups = {point: found for point in self.points if (found := self.speedup(point))}
        if not speedups:
            raise DataError("no point was measured both dense and by lim: nothing to compare")
        longest = max(point.longest for point in speedups)
        shown = [point for point in speedups if point.longest == longest and not point.is_mixed]
        shown = shown or list(speedups)
        chosen = [shown[index] for index in sorted({0, len(shown) // 2, len(shown) - 1})]
        ends = (find(speedups, key=speedups.__getitem__) for find in (min, max))
        reach = " to ".join(f"{speedups[point]:.2f} ({point_name(point)})" for point in ends)
        return f"{self.section(chosen)} Speed-up over {len(speedups)} points: {reach}."


def point_name(point: Point) -> str:
    """Return a point such as `8 \N{MULTIPLICATION SIGN} 32K`, K for 1,024 tokens."""
    return " + ".join(
        f"{batch} {TIMES} {f'{context:,}' if context % 1024 else f'{context // 1024}K'}"
        for batch, context in point.groups
    )


def read_tables(paths: Sequence[Path]) -> list[DecodeTable]:
    """Read files of JSON lines: one table for the rows of the same conditions, in order."""
    groups: dict[str, list[tuple[Row, dict[str, Any]]]] = {}
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: name a file that --out has written"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            try:
                row = _ROW.validate_json(line)
                conditions = {"tp": 1} | json.loads(line)["conditions"]
                key = json.dumps([conditions[name] for name in SAME.split()], sort_keys=True)
                known = (BACKEND, *DENSE_BACKENDS, *POLICIES)
                if row.backend.split()[0] not in known or not conditions.keys() >= SHOWN:
                    raise ValueError("an unknown backend, or missing conditions")
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}, line {number} is no row of `lim bench decode`") from None
            groups.setdefault(key, []).append((row, conditions))
    if paths and not groups:
        raise DataError(f"{', '.join(map(str, paths))}: no row; record some with --out FILE")
    return [DecodeTable.of(group) for group in groups.values()]


@dataclass(frozen=True)
class DivergenceRow:
    """Result of a policy at a budget, a number for each sequence."""

    policy: str
    budget: int
    settings: Mapping[str, Any] | None
    """The policy's settings, with the layers that the model's preset gave; None if excluded."""
    kl: tuple[float, ...] = ()
    """Nats, KL(dense || sparse) of the next token, mean over the steps."""
    agreement: tuple[float, ...] = ()
    """Share of the steps whose likeliest token is the dense one."""
    reason: str | None = None
    """Why the policy's definition excludes the budget; there are no numbers then."""

    @property
    def key(self) -> tuple[str, int]:
        """Policy and budget."""
        return self.policy, self.budget

    def to_json(self, conditions: Mapping[str, Any]) -> str:
        """Return a JSON line."""
        return json.dumps({"divergence": asdict(self), "conditions": conditions})


_DIVERGENCE = TypeAdapter(DivergenceRow)

Measured = tuple[DivergenceRow, Mapping[str, Any]]
"""A row with its conditions."""


@dataclass(frozen=True)
class DivergenceTable:
    """Rows of policies and budgets that were measured under the same conditions."""

    rows: Mapping[tuple[str, int], DivergenceRow]
    conditions: Mapping[str, Any]  # of the newest row

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> Self:
        """Collect rows with their conditions; refuse two rows of one policy and budget."""
        rows: dict[tuple[str, int], DivergenceRow] = {}
        for row, _ in measured:
            if row.key in rows:
                raise DataError(f"{row.policy} at {row.budget:,} is recorded twice: keep one row")
            rows[row.key] = row
        return cls(rows, max((found for _, found in measured), key=lambda each: each["date"]))

    def section(self) -> str:
        """Return both tables in Markdown, the budgets that are not defined, and the conditions."""
        kl = self._table("KL \N{MULTIPLICATION SIGN} 1,000 at a budget of", "kl", 1000)
        agreement = self._table("same likeliest token, %, at a budget of", "agreement", 100)
        excluded = [
            f"- {row.policy} at {row.budget:,}: {row.reason}"
            for row in self.rows.values()
            if row.reason
        ]
        listed = [f"{UNDEFINED.capitalize()}:\n\n" + "\n".join(excluded)] if excluded else []
        return "\n\n".join([kl, agreement, *listed, self.describe()])

    def _table(self, title: str, name: str, factor: float) -> str:
        budgets = sorted({budget for _, budget in self.rows})
        lines = []
        order = list(POLICIES)
        named = dict.fromkeys(policy for policy, _ in self.rows)
        for policy in sorted(named, key=lambda name: order.index(name.split()[0])):
            found = [self.rows.get((policy, budget)) for budget in budgets]
            cells = [_mean_cell(row, name, factor) if row else NONE for row in found]
            lines.append([policy, *cells])
        return markdown_table([title, *(f"{budget:,}" for budget in budgets)], lines)

    def describe(self) -> str:
        """Return the conditions in one paragraph."""
        found, versions = self.conditions, self.conditions["versions"]
        return (
            f"KL(dense || policy) of the next token in nats, mean \N{PLUS-MINUS SIGN} standard "
            f"error over {counted(found['sequences'], 'sequence')} of {found['length']:,} tokens, "
            f"the last {found['steps']:,} decoded teacher-forced, the others prefilled densely. "
            f"{found['model']}, {found['gpu'] or 'CPU, f32'}, seed {found['seed']}, texts "
            f"{found['texts_sha256'][:10]}. By `lim bench divergence` on {found['date'][:10]}, "
            f"commit {short_commit(found['commit'])}, torch {versions.get('torch')}, SGLang "
            f"{versions.get('sglang')}."
        )


def _mean_cell(row: DivergenceRow, name: str, factor: float) -> str:
    if row.reason:
        return UNDEFINED
    return mean_in_words(getattr(row, name), factor)


def mean_in_words(values: Sequence[float], factor: float) -> str:
    """Return the mean of values, multiplied, with its standard error."""
    mean, error = mean_and_error([factor * each for each in values])
    if error is None:
        return _rounded(mean)
    return f"{_rounded(mean)} \N{PLUS-MINUS SIGN} {_rounded(error, digits=2)}"


def _rounded(value: float, digits: int = 3) -> str:
    """Return at least so many digits, without an exponent from 1 on."""
    whole = 10 ** (digits - 1)
    return f"{value:.0f}" if abs(value) >= whole else f"{value:.{digits}g}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of independent values and its standard error, None for a single value."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return fmean(values), error


def same_divergence(conditions: Mapping[str, Any]) -> str:
    """Return the conditions of `DIVERGENCE_SAME` and the model's digest as text."""
    found = [conditions[name] for name in DIVERGENCE_SAME.split()]
    return json.dumps([*found, conditions.get("model_sha256")], sort_keys=True)


def holds_divergences(path: Path) -> bool:
    """Return True if a file begins with a row of `lim bench divergence`."""
    with suppress(OSError, UnicodeDecodeError), path.open() as file:
        return file.readline().startswith('{"divergence"')
    return False


def read_divergences(path: Path) -> list[Measured]:
    """Read the rows of a file of JSON lines.

    Raises:
        DataError: the file cannot be read, or a line is no row.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            same_divergence(found["conditions"])
            row = _DIVERGENCE.validate_python(found["divergence"])
            if row.policy.split()[0] not in POLICIES:
                raise ValueError("an unknown policy")
            rows.append((row, found["conditions"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}, line {number} is no row of `lim bench divergence`") from None
    return rows


def divergence_tables(measured: Sequence[Measured]) -> list[DivergenceTable]:
    """Make one table for the rows of the same conditions, in order."""
    groups: dict[str, list[Measured]] = {}
    for each in measured:
        groups.setdefault(same_divergence(each[1]), []).append(each)
    return [DivergenceTable.of(group) for group in groups.values()]
