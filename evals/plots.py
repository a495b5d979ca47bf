"""The plots of a report: accuracy over budget and tokens, votes, lengths.

Sizes are pixels of a panel that is about as wide as a phone's screen, so that words stay readable
there; on wide screens panels stand side by side.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lim_sglang.evals.metrics import Estimate, QuestionResult
from lim_sglang.evals.report import Group, Row
from lim_sglang.plot_style import (
    LIGHT,
    MARKERS,
    SERIES,
    SMALL,
    STAND_INS,
    Palette,
    budget_name,
    finish,
    fit_percent,
    legend_below,
    legend_height,
    name_rows,
    open_axes,
    settings,
    thousands,
    tick_at,
    to_png,
    to_svg,
    wrapped,
)
from lim_sglang.programs.schema import SampleState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Z95 = 1.959964
"""Standard errors to each side of an estimate that make a 95 % interval."""
APART = 1.06
"""Factor between points of the same budget, so that none hides another."""
FEWEST_TICKS = 3
AXIS_ROOM = 1.3
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
        axes.set_xlim(budgets[0] / AXIS_ROOM, budgets[-1] * AXIS_ROOM)
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


BINS = 48
PEAK, TOLD_AT = 0.7, 0.95
"""Heights of the highest bar, and of what is told above; a row is 1."""
MOST_BANDS = 5
TINTS = (1.0, 0.74, 0.52, 0.34, 0.2)
"""Opacity of the votes' bands, the most votes first."""
BAR_ROOM = 1.42
"""How much longer an axis is than the longest bar, for the figure at its end."""
BAR = 0.62
"""Thickness of a row's bar."""


def draw_lengths(panel: "SubFigure", group: Group, palette: Palette) -> None:
    """A row each: a histogram of the finished samples' lengths, all on one scale."""
    (axes,) = open_axes(panel)
    end = _end(group)
    shares = [_histogram(lengths_of(row), end) for row in group.rows]
    scale = PEAK / (max(map(max, shares)) or 1.0)
    edges = [end * n / BINS for n in range(BINS + 1)]
    for place, (row, share) in enumerate(zip(reversed(group.rows), reversed(shares), strict=True)):
        colour = palette["full" if row.is_full else "s0"]
        tops = [place + scale * value for value in share]
        axes.stairs(tops, edges, baseline=place, fill=True, color=colour, alpha=0.4)
        axes.stairs(tops, edges, baseline=place, color=colour, linewidth=1.2)
        middle = row.score.percentiles[50]
        axes.vlines(middle, place, place + PEAK, color=palette["ink"], linewidth=1.8)
        told = f"median {middle:,.0f}, {100 * row.score.truncated:.1f} % cut off"
        look: dict[str, Any] = {
            "ha": "right",
            "va": "top",
            "fontsize": SMALL,
            "color": palette["faint"],
        }
        axes.text(end, place + TOLD_AT, told, **look)
    name_rows(axes, [row.name for row in group.rows], middle=PEAK / 2)
    axes.set_xlim(0, end)
    axes.set_ylim(-0.02, len(group.rows))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.set_xlabel("tokens of a sample that the model ended")


def _end(group: Group) -> float:
    """Of the axis: the limit, unless it is far away."""
    limit = float(max(row.conditions["max_tokens"] for row in group.rows))
    longest = max(max(lengths_of(row), default=0) for row in group.rows)
    return float(longest) if 0 < longest < limit / 2 else limit


def lengths_height(group: Group) -> int:
    """Pixels of a panel."""
    return 80 + 54 * len(group.rows)


def lengths_of(row: Row) -> list[int]:
    """Tokens of the samples that the model ended itself."""
    return [
        tokens
        for question in row.summary.questions
        for tokens, state in zip(question.tokens, question.states, strict=True)
        if state is SampleState.FINISHED
    ]


def _histogram(lengths: Sequence[int], end: float) -> list[float]:
    """Shares of the samples in equal bins from 0 to `end`."""
    counts = Counter(min(int(length / end * BINS), BINS - 1) for length in lengths)
    return [counts[n] / max(len(lengths), 1) for n in range(BINS)]


def describe_lengths(group: Group) -> str:
    """The plot's figures in words."""
    parts = []
    for row in group.rows:
        at = ", ".join(f"{p} % under {tokens:,.0f}" for p, tokens in row.score.percentiles.items())
        parts.append(f"{row.name}: {at}, {100 * row.score.truncated:.1f} % cut off")
    return f"Tokens of a sample: {'; '.join(parts)}."


@dataclass(frozen=True)
class Bands:
    """Up to five bands of how many votes an answer has, the most votes first."""

    names: tuple[str, ...]
    find: Callable[[int, int], int]
    """The band of so many votes from so many samples."""


def bands_of(num_samples: int) -> Bands:
    """A band for each number of votes, or for shares of the samples where those are too many."""
    if num_samples <= MOST_BANDS:
        names = tuple(f"{votes} of {num_samples}" for votes in range(num_samples, 0, -1))
        return Bands(names, lambda votes, _: num_samples - votes)
    least = (1.0, 0.75, 0.5, 0.25, 0.0)
    names = ("all", "3/4 or more", "half or more", "1/4 or more", "fewer")
    return Bands(names, lambda votes, of: next(n for n, s in enumerate(least) if votes >= s * of))


@dataclass(frozen=True)
class Votes:
    """How the votes of a run split, in shares of its questions."""

    right: tuple[float, ...]
    """By band."""
    wrong: tuple[float, ...]
    """By band."""
    silent: float
    """Without an answer, which is not right."""


def count_votes(row: Row, bands: Bands) -> Votes:
    """Put each question into its band."""
    found = Counter(_fate(question, bands) for question in row.summary.questions)
    total = len(row.summary.questions)

    def shares(is_right: bool) -> tuple[float, ...]:
        return tuple(found[is_right, band] / total for band in range(len(bands.names)))

    return Votes(shares(True), shares(False), found[None] / total)


def _fate(question: QuestionResult, bands: Bands) -> tuple[bool, int] | None:
    """Whether the answer is right and the band of its votes; None without an answer."""
    heard = [g for g, late in zip(question.group, question.late, strict=True) if not late]
    if question.chosen is None:
        return None
    return question.answer_correct, bands.find(heard.count(question.chosen), len(heard))


def draw_votes(panel: "SubFigure", group: Group, palette: Palette) -> None:
    """Right answers to the right of the middle, wrong ones to the left, the more votes the
    stronger.
    """
    (axes,) = open_axes(panel)
    bands = bands_of(group.num_samples)
    widest = 0.0
    for place, row in enumerate(reversed(group.rows)):
        votes = count_votes(row, bands)
        right = _stack(axes, place, votes.right, palette["right"], 1)
        wrong = _stack(axes, place, votes.wrong, palette["wrong"], -1)
        silent = 100 * votes.silent
        axes.barh(place, -silent, left=-wrong, color=palette["none"], height=BAR)
        for end, side, away in ((right, "left", 4), (-wrong - silent, "right", -4)):
            look: dict[str, Any] = {"ha": side, "va": "center", "fontsize": SMALL}
            where: dict[str, Any] = {"xytext": (away, 0), "textcoords": "offset pixels"}
            axes.annotate(f"{abs(end):.1f}", (end, place), **where, **look)
        widest = max(widest, right, wrong + silent)
    name_rows(axes, [row.name for row in group.rows])
    axes.axvline(0, color=palette["ink"], linewidth=1.2)
    axes.set_xlim(-BAR_ROOM * widest, BAR_ROOM * widest)
    axes.set_ylim(-0.6, len(group.rows) - 0.4)
    axes.xaxis.set_major_formatter(lambda share, _: f"{abs(share):.0f}")
    axes.set_xlabel("wrong \N{LEFTWARDS ARROW}  % of questions  \N{RIGHTWARDS ARROW} right")
    _legend(panel, bands, palette)


def _stack(axes: "Axes", place: int, shares: Sequence[float], colour: str, way: int) -> float:
    """Bars from the middle outwards; how far they reach, in percent."""
    reached = 0.0
    for share, tint in zip(shares, TINTS, strict=False):
        axes.barh(
            place, way * 100 * share, left=way * reached, height=BAR, color=colour, alpha=tint
        )
        reached += 100 * share
    return reached


def votes_height(group: Group) -> int:
    """Pixels of a panel."""
    return 150 + 36 * len(group.rows)


def _legend(panel: "SubFigure", bands: Bands, palette: Palette) -> None:
    """Both colours of each band, and what has no answer."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    handles: list[Any] = [
        tuple(Patch(facecolor=palette[side], alpha=tint) for side in ("wrong", "right"))
        for tint, _ in zip(TINTS, bands.names, strict=False)
    ]
    panel.legend(
        [*handles, Patch(facecolor=palette["none"])],
        [*bands.names, "no answer"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=3,
        title="votes for the answer",
    )


def describe_votes(group: Group) -> str:
    """The plot's figures in words."""
    bands = bands_of(group.num_samples)
    parts = []
    for row in group.rows:
        votes = count_votes(row, bands)
        right, wrong = (
            ", ".join(f"{100 * s:.1f} % {name}" for s, name in zip(side, bands.names, strict=True))
            for side in (votes.right, votes.wrong)
        )
        parts.append(
            f"{row.name}: right with {right}; wrong with {wrong}; {100 * votes.silent:.1f} % "
            "without an answer"
        )
    return f"Questions by the votes of their answer. {'. '.join(parts)}."


WIDTH = 380
"""Of a panel."""
COLUMNS = 2
MARGIN = 6
TITLE_LINE = 18
"""Height of a line of a title."""
TITLE_WIDTH = 46
"""Characters of a panel's title in a line."""


@dataclass(frozen=True)
class Plot:
    """One kind of picture."""

    name: str
    title: str
    caption: str
    """How to read it."""
    draw: "Callable[[SubFigure, Group, Palette], None]"
    describe: Callable[[Group], str]
    height: Callable[[Group], int]
    """Of a panel without a title."""


PLOTS = (
    Plot(
        name="accuracy",
        title="Accuracy against budget",
        caption=(
            "Bars and the band of full attention are 95 % intervals of each run alone. Runs share "
            "their questions, so differences are known better: see the table. Programs that stop "
            "by themselves have no pass@1."
        ),
        draw=draw_accuracy,
        describe=describe_accuracy,
        height=accuracy_height,
    ),
    Plot(
        name="votes",
        title="How votes split",
        caption=(
            "Questions by the votes of the answer that was given: strong colours are agreement. "
            "Right answers to the right, wrong ones to the left."
        ),
        draw=draw_votes,
        describe=describe_votes,
        height=votes_height,
    ),
    Plot(
        name="lengths",
        title="Lengths of samples",
        caption=(
            "Samples that the model ended itself; those cut off at the limit are counted beside. "
            "The line is the median of all."
        ),
        draw=draw_lengths,
        describe=describe_lengths,
        height=lengths_height,
    ),
    Plot(
        name="tokens",
        title="Tokens against accuracy",
        caption=(
            "More samples cost more tokens. Above: questions whose most frequent answer is right "
            "(maj@k); below: questions that at least one sample answers rightly (pass@k)."
        ),
        draw=draw_tokens,
        describe=describe_tokens,
        height=tokens_height,
    ),
)


def draw_svg(plot: Plot, groups: Sequence[Group], *, name: str, alone: bool) -> str:
    """One picture of some tables.

    Args:
        name: begins the ids in it; no other picture of the same page may have it.
        alone: whether it is a file of its own, or part of a page that says what the table is.
    """
    with settings(STAND_INS):
        drawn = to_svg(_figure(plot, groups, STAND_INS, titled=alone))
    words = " ".join(f"{group.title}. {plot.describe(group)}" for group in groups)
    return finish(drawn, name=name, title=plot.title, description=words, alone=alone)


def draw_png(plot: Plot, groups: Sequence[Group]) -> bytes:
    """The same in light colours, for what shows no SVG."""
    with settings(LIGHT):
        return to_png(_figure(plot, groups, LIGHT, titled=True))


def _figure(plot: Plot, groups: Sequence[Group], palette: Palette, *, titled: bool) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    titles = [wrapped(group.title, TITLE_WIDTH) if titled else "" for group in groups]
    heights = [
        plot.height(group) + TITLE_LINE * len(title.splitlines())
        for group, title in zip(groups, titles, strict=True)
    ]
    columns = min(len(groups), COLUMNS)
    lines = [max(heights[n : n + columns]) for n in range(0, len(groups), columns)]
    layout = ConstrainedLayoutEngine(w_pad=MARGIN / 72, h_pad=MARGIN / 72)
    figure = Figure(figsize=(columns * WIDTH / 72, sum(lines) / 72), layout=layout)
    panels = figure.subfigures(len(lines), columns, squeeze=False, height_ratios=lines).flat
    for panel, group, title in zip(panels, groups, titles, strict=False):
        if title:
            panel.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        plot.draw(panel, group, palette)
    return figure
