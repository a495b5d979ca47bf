"""Step time over context, dense and LessIsMore, with what the bytes alone would take: an SVG.

One panel a batch, all on the same axes, both logarithmic. Shapes tell the lines apart without
colours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lim_sglang.bench.points import Point
from lim_sglang.bench.recorded import Recorded, RecordedRow
from lim_sglang.bench.svg import document, group, line, words
from lim_sglang.errors import DataError

PANEL_WIDTH, PANEL_HEIGHT = 280, 240
LEFT, TOP, RIGHT, BOTTOM = 64, 84, 20, 56
GAP_X, GAP_Y = 44, 80
PER_ROW = 3
MARK = 4
"""Half the width of a measured point."""
CURVE_STEPS = 48
SHORTEST = 1024
"""Tokens at which the limits begin, or the shortest measured context."""
ROOM = 1.15
"""Factor by which the axes go beyond what they have to show."""

STYLE = """.measured { stroke-width: 2; fill: none; } .frame { fill: none; }
.limit { stroke-width: 1.5; stroke-dasharray: 5 4; fill: none; }"""
Y_TITLE = (
    f'<text transform="translate(-44 {PANEL_HEIGHT / 2:g}) rotate(-90)" text-anchor="middle">'
    "decode step, ms</text>"
)


@dataclass(frozen=True)
class Axis:
    """A logarithmic scale from values to pixels of a panel."""

    low: float
    high: float
    pixels: int

    def place(self, value: float) -> float:
        """Pixels from the axis's beginning."""
        return self.pixels * math.log(value / self.low) / math.log(self.high / self.low)


def draw(recorded: Recorded) -> str:
    """The plot as the text of an SVG file; the same rows give the same text.

    Raises:
        DataError: no row is of requests that are all of one length.
    """
    batches = _batches(recorded)
    x_axis, y_axis = _axes(recorded, batches)
    columns = min(len(batches), PER_ROW)
    rows = -(-len(batches) // PER_ROW)
    width = LEFT + columns * PANEL_WIDTH + (columns - 1) * GAP_X + RIGHT
    height = TOP + rows * PANEL_HEIGHT + (rows - 1) * GAP_Y + BOTTOM
    width = max(width, 620)  # the title and the legend
    found = recorded.conditions
    model = f"{found['model']}{recorded.formats}"
    title = f"Decode step, {model}, {found['gpu']}, budget {found['budget']:,}"
    parts = [_legend()]
    for number, batch in enumerate(batches):
        left = LEFT + number % PER_ROW * (PANEL_WIDTH + GAP_X)
        top = TOP + number // PER_ROW * (PANEL_HEIGHT + GAP_Y)
        panel = _panel(recorded, batch, x_axis, y_axis)
        parts += group(left, top, [*panel, *([] if number % PER_ROW else [Y_TITLE])])
    return document(title, (width, height), parts, left=LEFT, style=STYLE)


def _plotted(recorded: Recorded) -> list[Point]:
    """All but mixed batches: the axis is the context of each request, and they have several."""
    return [point for point in recorded.points if not point.is_mixed]


def _batches(recorded: Recorded) -> list[int]:
    """A panel each."""
    batches = sorted({point.batch for point in _plotted(recorded)})
    if not batches:
        raise DataError(
            "every row is of a mixed batch, which has no one context to plot it over: record "
            "points such as 8x32k, or leave --plot out"
        )
    return batches


def _limits(recorded: Recorded) -> dict[str, Callable[[Point], float]]:
    """The milliseconds that a point's bytes take, dense and by LessIsMore."""
    traffic, budget = recorded.traffic, recorded.conditions["budget"]
    return {
        "dense": lambda point: recorded.limit_ms(traffic.dense_bytes(point)),
        "lim": lambda point: recorded.limit_ms(traffic.lim_bytes(point, budget)),
    }


def _axes(recorded: Recorded, batches: Sequence[int]) -> tuple[Axis, Axis]:
    """Tokens of context, and milliseconds: wide enough for all panels."""
    points = _plotted(recorded)
    contexts = [point.longest for point in points]
    low, high = min(SHORTEST, *contexts) / ROOM, max(contexts) * ROOM
    shown = [row.step_ms for row in recorded.rows.values() if row.point in points]
    limits = _limits(recorded).values()
    for batch in batches:
        shown += [limit(Point.uniform(batch, int(x))) for limit in limits for x in (low, high)]
    return (
        Axis(low, high, PANEL_WIDTH),
        Axis(min(shown) / ROOM, max(shown) * ROOM, PANEL_HEIGHT),
    )


def _panel(recorded: Recorded, batch: int, x_axis: Axis, y_axis: Axis) -> list[str]:
    """One batch: grid, limits, measured points, labels."""

    def at(context: float, ms: float) -> tuple[float, float]:
        return x_axis.place(context), PANEL_HEIGHT - y_axis.place(ms)

    parts = _grid(x_axis, y_axis)
    for name, limit in _limits(recorded).items():
        contexts = [
            x_axis.low * (x_axis.high / x_axis.low) ** (step / CURVE_STEPS)
            for step in range(CURVE_STEPS + 1)
        ]
        places = [at(each, limit(Point.uniform(batch, round(each)))) for each in contexts]
        parts.append(line(places, f"{name} limit"))
    points = [point for point in _plotted(recorded) if point.batch == batch]
    for name, read in (("dense", recorded.fastest_dense), ("lim", recorded.lim)):
        rows = [row for point in points if (row := read(point))]
        places = [at(row.point.longest, row.step_ms) for row in rows]
        parts.append(line(places, f"{name} measured"))
        parts += [_mark(*place, name, row) for place, row in zip(places, rows, strict=True)]
    plural = "s" if batch > 1 else ""
    return [
        *parts,
        f'<rect class="frame" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}"/>',
        words(PANEL_WIDTH / 2, -8, f"{batch} request{plural}", "middle"),
        words(PANEL_WIDTH / 2, PANEL_HEIGHT + 38, "context of each request, tokens", "middle"),
    ]


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for tokens in _powers_of_two(x_axis.low, x_axis.high):
        x = f"{x_axis.place(tokens):.1f}"
        parts.append(f'<line class="grid" x1="{x}" y1="0" x2="{x}" y2="{PANEL_HEIGHT}"/>')
        label = f"{tokens // 1024}K" if tokens >= 1024 else f"{tokens}"
        parts.append(f'<text x="{x}" y="{PANEL_HEIGHT + 18}" text-anchor="middle">{label}</text>')
    for ms in _one_two_five(y_axis.low, y_axis.high):
        y = PANEL_HEIGHT - y_axis.place(ms)
        parts.append(f'<line class="grid" x1="0" y1="{y:.1f}" x2="{PANEL_WIDTH}" y2="{y:.1f}"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{ms:g}</text>')
    return parts


def _powers_of_two(low: float, high: float) -> list[int]:
    """Up to about six, so that their labels do not touch."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first + 1) / 6))
    return [1 << power for power in range(last, first - 1, -step)][::-1]


def _one_two_five(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _mark(x: float, y: float, name: str, row: RecordedRow | None = None) -> str:
    """A square for dense, a circle for LessIsMore; the figure shows under the pointer."""
    told = f"<title>{row.point} {row.backend}: {row.step_ms:.3f} ms</title>" if row else ""
    if name == "lim":
        return f'<circle class="lim" cx="{x:.1f}" cy="{y:.1f}" r="{MARK}">{told}</circle>'
    return (
        f'<rect class="dense" x="{x - MARK:.1f}" y="{y - MARK:.1f}" width="{2 * MARK}" '
        f'height="{2 * MARK}">{told}</rect>'
    )


def _legend() -> str:
    """What the lines are, in one line under the title."""
    parts, x = [], float(LEFT)
    entries = (
        ("dense measured", "fastest dense", 130),
        ("dense limit", "its byte limit", 135),
        ("lim measured", "LessIsMore", 120),
        ("lim limit", "its byte limit", 135),
    )
    for classes, meaning, width in entries:
        parts.append(line([(x, 48), (x + 28, 48)], classes))
        name, kind = classes.split()
        if kind == "measured":
            parts.append(_mark(x + 14, 48, name))
        parts.append(words(x + 34, 52, meaning))
        x += width
    return "\n".join(parts)
