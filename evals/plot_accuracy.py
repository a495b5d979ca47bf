"""Plots of accuracy: over the budget, and over the tokens that it takes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lim_sglang.evals.plot_look import (
    MARKERS,
    SERIES,
    Palette,
    budget_name,
    fit_percent,
    legend_below,
    legend_height,
    open_axes,
    thousands,
    tick_at,
)
from lim_sglang.evals.report import Group, Row
from lim_sglang.evals.score import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Z95 = 1.959964
"""Standard errors to each side of an estimate that make a 95 % interval."""
APART = 1.06
"""Factor between points of the same budget, so that none hides another."""
FEWEST_TICKS = 3
ROOM = 1.3
"""Factor by which an axis goes beyond what it shows."""


def interval(estimate: Estimate) -> tuple[float, float]:
    """The 95 % interval in percent; the value itself where one question shows no spread."""
    half = Z95 * (estimate.error or 0.0)
    return 100 * max(estimate.value - half, 0.0), 100 * min(estimate.value + half, 1.0)


def draw_accuracy(panel: "SubFigure", group: Group, palette: Palette) -> None:
    """pass@1 over the budget; full attention, which has none, is a band."""
    (axes,) = open_axes(panel)
    rows = shown_rows(group)
    for row in rows:
        if not row.budget:
            _draw_band(axes, row, palette["full" if row.is_full else "s6"])
    for number, (name, found) in enumerate(_series(rows).items()):
        _draw_series(axes, name, found, number, palette)
    budgets = sorted({row.budget for row in rows if row.budget})
    if budgets:
        axes.set_xscale("log", base=2)
        tick_at(axes, budgets, budget_name)
        axes.set_xlim(budgets[0] / ROOM, budgets[-1] * ROOM)
    else:
        axes.set_xticks([])
    axes.margins(y=0.12)
    fit_percent(axes)
    axes.set_xlabel("budget: tokens that a sparse layer reads")
    measure = "pass@1" if rows[0].draws_all else "vote right"
    axes.set_ylabel(f"{measure}, % (95 % intervals)")
    legend_below(panel, axes)


def shown_rows(group: Group) -> list[Row]:
    """Those with a pass@1; of a table of programs that stop by themselves, all, by their votes."""
    return [row for row in group.rows if row.draws_all] or list(group.rows)


def accuracy_height(group: Group) -> int:
    """Pixels of a panel."""
    rows = shown_rows(group)
    bands = [row.name for row in rows if not row.budget]
    return 270 + legend_height([*bands, *_series(rows)])


def _draw_band(axes: "Axes", row: Row, colour: str) -> None:
    low, high = interval(row.accuracy)
    axes.axhspan(low, high, color=colour, alpha=0.16, linewidth=0)
    look: dict[str, Any] = {"color": colour, "linewidth": 1.8, "linestyle": (0, (5, 3))}
    axes.axhline(100 * row.accuracy.value, label=row.name, **look)


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows with a budget, from the smallest."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.budget:
            found.setdefault(row.series, []).insert(0, row)
    return found


def _draw_series(axes: "Axes", name: str, rows: list[Row], number: int, palette: Palette) -> None:
    values = [100 * row.accuracy.value for row in rows]
    ends = [interval(row.accuracy) for row in rows]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    axes.errorbar(
        [(row.budget or 0) * APART**number for row in rows],
        values,
        yerr=[below, above],
        label=name,
        color=palette[SERIES[number % len(SERIES)]],
        marker=MARKERS[number % len(MARKERS)],
        markersize=7,
        capsize=4,
        linewidth=1.8,
    )


def describe_accuracy(group: Group) -> str:
    """The plot's figures in words."""
    rows, parts = shown_rows(group), []
    for row in rows:
        low, high = interval(row.accuracy)
        parts.append(f"{row.name} {100 * row.accuracy.value:.1f} % ({low:.1f} to {high:.1f})")
    measure = "pass@1" if rows[0].draws_all else "Right votes"
    return f"{measure} with 95 % intervals: {'; '.join(parts)}."


def draw_tokens(panel: "SubFigure", group: Group, palette: Palette) -> None:
    """maj@k above pass@k, over the tokens that k samples of a question take on average."""
    top, bottom = open_axes(panel, rows=2)
    for row, number in numbered(group):
        colour = palette["full" if number is None else SERIES[number % len(SERIES)]]
        marker = "o" if number is None else _marker(number)
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 6,
            "linewidth": 1.5,
        }
        for axes, found in ((top, majority_line(row)), (bottom, pass_line(row))):
            if found:
                axes.plot(list(found), list(found.values()), label=row.name, **look)
    top.set_xscale("log")
    low, high = top.get_xlim()
    tick_at(top, round_values(low, high), thousands)
    top.set_ylabel("vote right, %")
    bottom.set_ylabel("any right, %")
    bottom.set_xlabel("mean tokens a question, of 1, 2, 4, \N{HORIZONTAL ELLIPSIS} samples")
    panel.align_ylabels([top, bottom])
    for axes in (top, bottom):
        fit_percent(axes)
    legend_below(panel, top)


def tokens_height(group: Group) -> int:
    """Pixels of a panel."""
    return 380 + legend_height([row.name for row in group.rows])


def _marker(number: int) -> str:
    """Another one where the colours begin anew."""
    return MARKERS[(number + 1 + number // len(SERIES)) % len(MARKERS)]


def numbered(group: Group) -> list[tuple[Row, int | None]]:
    """Rows with the number of their colour; full attention has its own."""
    others = [row for row in group.rows if not row.is_full]
    return [(row, None if row.is_full else others.index(row)) for row in group.rows]


def majority_line(row: Row) -> Mapping[float, float]:
    """Percent of right votes by mean tokens a question; a program that stops by itself has one
    point.
    """
    if not row.draws_all:
        return {row.score.tokens_per_question: 100 * row.score.answered.value}
    return _by_tokens(row, row.score.majority_at)


def pass_line(row: Row) -> Mapping[float, float]:
    """Percent of questions that any of k samples answers, by mean tokens of k samples."""
    return _by_tokens(row, row.score.pass_at) if row.draws_all else {}


def _by_tokens(row: Row, at: Mapping[int, Estimate]) -> Mapping[float, float]:
    return {k * row.score.mean_tokens: 100 * found.value for k, found in at.items()}


def round_values(low: float, high: float) -> list[float]:
    """Between two values: 1, 2, 5 times powers of ten, or finer ones where those are too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        found = [tick for tick in ticks if low <= tick <= high]
        if len(found) >= FEWEST_TICKS:
            break
    return found


def describe_tokens(group: Group) -> str:
    """The plot's figures in words."""
    parts = []
    for row in group.rows:
        votes = ", ".join(f"{y:.1f} % at {thousands(x)}" for x, y in majority_line(row).items())
        parts.append(f"{row.name}: {votes}")
    return f"Right votes by mean tokens a question: {'; '.join(parts)}."
