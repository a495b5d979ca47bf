"""Some decode steps of each policy over time, host above GPU: an SVG.

A row a policy and load. On the left a few steps, on the right what lies between two replays of the
decode graph, wide enough to see single kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lim_sglang.bench.serve_rows import ServeRow
from lim_sglang.bench.svg import document, group, line, words
from lim_sglang.bench.timeline import Span, Strip, Timeline, clipped, union
from lim_sglang.validation import BACKEND

LEFT, TOP, RIGHT, BOTTOM = 170, 96, 24, 72
STEPS_WIDTH, BETWEEN_WIDTH, GAP = 520, 320, 40
ROW_HEIGHT = 82
HOST, GPU = (0, 12), (16, 30)
"""Top and height of a row's two lanes."""
BETWEEN_US = 400.0
"""Shown around the end of a replay, or more where it takes longer to the next one."""
LEAST_PX = 0.6
"""Width of what would be too short to be seen."""
STYLE = ".lane { fill: none; } .grid { stroke-width: 1; } .small { font-size: 11px; }"

Shown = tuple[ServeRow, Timeline, Strip]


@dataclass(frozen=True)
class Window:
    """A stretch of time and the pixels that it takes."""

    start_us: float
    end_us: float
    pixels: int

    @property
    def us_per_px(self) -> float:
        """How much time a pixel is."""
        return (self.end_us - self.start_us) / self.pixels

    def place(self, at_us: float) -> float:
        """Pixels from the window's beginning."""
        return (at_us - self.start_us) / self.us_per_px

    def bars(self, spans: Sequence[Span], lane: tuple[int, int], classes: str) -> str:
        """Spans as one path; those less than half a pixel apart are joined."""
        top, height = lane
        shown = union(clipped(spans, self.start_us, self.end_us), self.us_per_px / 2)
        parts = []
        for start, end in shown:
            x, width = self.place(start), max((end - start) / self.us_per_px, LEAST_PX)
            parts.append(f"M{x:.1f} {top}h{width:.1f}v{height}h-{width:.1f}z")
        return f'<path class="{classes}" d="{"".join(parts)}"/>'


def draw_timelines(rows: Sequence[ServeRow], conditions: Mapping[str, Any]) -> str | None:
    """The plot as the text of an SVG file; None where no row was profiled."""
    shown = [(row, row.timeline, row.strip) for row in rows if row.timeline and row.strip]
    if not shown:
        return None
    shown.sort(key=lambda each: each[0].concurrency)
    model = conditions.get("model") or conditions.get("model_path")
    title = f"Decode steps on the GPU, {model}, {conditions['gpu']}"
    longest = max(strip.length_us for _, _, strip in shown)
    steps = Window(0.0, longest, STEPS_WIDTH)
    parts = [*_legend(), *_headings()]
    for number, each in enumerate(shown):
        parts += group(LEFT, TOP + number * ROW_HEIGHT, _row(each, steps, _between(shown)))
    bottom = TOP + len(shown) * ROW_HEIGHT
    between = STEPS_WIDTH + GAP
    parts += group(LEFT, bottom, _axis(steps))
    parts += group(LEFT + between, bottom, _axis(_window(0.0, _between(shown))))
    parts += _below(bottom + 52, steps)
    size = LEFT + between + BETWEEN_WIDTH + RIGHT, bottom + BOTTOM
    return document(title, size, parts, left=24, style=STYLE)


def _between(shown: Sequence[Shown]) -> float:
    """How many microseconds the right side shows: the same for all rows."""
    longest = max(later - earlier for each in shown for earlier, later in _borders(each[2]))
    return max(BETWEEN_US, 2 * longest)


def _borders(strip: Strip) -> list[Span]:
    """From each replay's end to the next one's start."""
    starts = [start for start, _ in strip.replays[1:]] + [strip.length_us]
    return [(end, start) for (_, end), start in zip(strip.replays, starts, strict=True)]


def _window(end_us: float, width_us: float) -> Window:
    """The right side, a third of it before a replay's end."""
    start_us = end_us - width_us / 3
    return Window(start_us, start_us + width_us, BETWEEN_WIDTH)


def _row(shown: Shown, steps: Window, between_us: float) -> list[str]:
    """One policy: its name and figures, its steps, and the end of a replay of the usual step."""
    row, timeline, strip = shown
    borders = _borders(strip)
    end_us, _ = borders[min(1, len(borders) - 1)]
    plural = "s" if row.concurrency > 1 else ""
    return [
        words(-LEFT + 24, 10, f"{row.policy}, {row.concurrency} request{plural}"),
        words(-LEFT + 24, 27, f"GPU busy {100 * timeline.busy_share:.1f} %"),
        words(-LEFT + 24, 44, f"{timeline.idle_us_per_step:,.0f} \N{MICRO SIGN}s idle a step,"),
        words(-LEFT + 24, 61, f"{timeline.between_us_per_step:,.0f} between replays"),
        *_lanes(row.policy, strip, steps),
        *group(STEPS_WIDTH + GAP, 0, _lanes(row.policy, strip, _window(end_us, between_us))),
    ]


def _lanes(policy: str, strip: Strip, window: Window) -> list[str]:
    """Host above GPU; a mark where each replay begins."""
    name = BACKEND if policy == BACKEND else "dense"
    marks = [start for start, _ in strip.replays if window.start_us <= start <= window.end_us]
    bottom = GPU[0] + GPU[1]
    width = min(window.place(strip.length_us), window.pixels)
    return [
        *(
            f'<rect class="grid lane" y="{top}" width="{width:.1f}" height="{height}"/>'
            for top, height in (HOST, GPU)
        ),
        window.bars(strip.waits, HOST, "wait"),
        window.bars(strip.calls, HOST, "call"),
        window.bars(strip.launches, HOST, name),
        window.bars(strip.busy, GPU, name),
        *(
            line([(window.place(at), bottom), (window.place(at), bottom + 6)], "frame")
            for at in marks
        ),
    ]


def _axis(window: Window) -> list[str]:
    """Microseconds under a column."""
    step = next(
        digit * 10**power
        for power in range(12)
        for digit in (1, 2, 5)
        if digit * 10**power * 8 >= window.end_us - window.start_us
    )
    first = -(-window.start_us // step)
    ticks = [step * (first + n) for n in range(9) if step * (first + n) <= window.end_us]
    return [
        line([(0, 0), (window.pixels, 0)], "frame"),
        *(words(window.place(tick), 18, f"{tick:,.0f}", "middle") for tick in ticks),
    ]


def _headings() -> list[str]:
    """What the two columns are."""
    return [
        words(LEFT, TOP - 12, "consecutive steps, \N{MICRO SIGN}s from a replay's first kernel"),
        words(
            LEFT + STEPS_WIDTH + GAP,
            TOP - 12,
            "between two replays, \N{MICRO SIGN}s from a replay's end",
        ),
    ]


def _below(y: float, steps: Window) -> list[str]:
    """What the plot leaves out."""
    least_us = steps.us_per_px / 2
    text = (
        f"On the left, gaps under {least_us:,.0f} \N{MICRO SIGN}s are too narrow to be drawn. The "
        "profiler was on: without it, launches take less time."
    )
    return [words(24, y, text)]


def _legend() -> list[str]:
    """What the bars are, in one line under the title."""
    parts, x = [], 24.0
    entries = (
        ("dense", "dense: GPU busy, graph launched", 250),
        (BACKEND, "LessIsMore: the same", 190),
        ("call", "host: other CUDA calls", 195),
        ("wait", "host waits for the GPU", 200),
    )
    swatch = Window(0.0, 28.0, 28)
    for classes, meaning, width in entries:
        parts += group(x, 42, [swatch.bars([(0.0, 28.0)], (0, 12), classes)])
        parts.append(words(x + 34, 53, meaning))
        x += width
    return parts
