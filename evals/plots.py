"""The plots of a report: accuracy over budget, votes, lengths, accuracy over tokens.

A panel, one for each table, is about as wide as a phone's screen, so that its text stays readable
there. Sizes are pixels.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lim_sglang.evals.metrics import MIN_QUESTIONS, NO_MAJORITY, Estimate, QuestionResult
from lim_sglang.evals.report import Group, Row
from lim_sglang.evals.tables import RIGHT_VOTES, measure, too_few
from lim_sglang.plot_style import (
    LIGHT,
    MARKERS,
    SERIES,
    SMALL,
    fit_percent,
    legend_below,
    name_rows,
    settings,
    short_number,
    tick_at,
    to_png,
    to_svg,
)
from lim_sglang.programs.schema import SampleState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Z95 = 1.959964
"""Standard errors on each side of an estimate in a 95 % interval."""
DODGE = 1.05
"""Factor between the x values of two series with the same budget, so that both are visible; the
values of all series lie around the budget."""
X_MARGIN = 1.3
"""Factor by which the budget axis exceeds the budgets."""
MIN_TICKS = 3


def interval(estimate: Estimate) -> tuple[float, float]:
    """Return the 95 % interval in percent; the value alone where the error is unknown."""
    half = Z95 * (estimate.error or 0.0)
    return 100 * max(estimate.value - half, 0.0), 100 * min(estimate.value + half, 1.0)


def plot_accuracy(panel: "SubFigure", group: Group) -> None:
    """Plot pass@1 over the budget, with a band for full attention, which has no budget.

    Programs that stop early have no pass@1. If all runs are of such programs, plot their votes.
    """
    axes = panel.subplots()
    rows = [row for row in group.rows if not row.stops_early] or list(group.rows)
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.budget:
            series.setdefault(row.series, []).insert(0, row)  # ascending budget
        else:
            _plot_band(axes, row)
    for number, (name, members) in enumerate(series.items()):
        _plot_series(axes, name, members, number, DODGE ** (number - (len(series) - 1) / 2))
    if budgets := sorted({row.budget for row in rows if row.budget}):
        axes.set_xscale("log", base=2)
        tick_at(axes, budgets, short_number)
        axes.set_xlim(budgets[0] / X_MARGIN, budgets[-1] * X_MARGIN)
    else:
        axes.set_xticks([])
    axes.margins(y=0.12)
    fit_percent(axes)
    axes.set_xlabel("budget: tokens that a sparse layer reads")
    axes.set_ylabel(f"{measure(rows[0])}, % (95 % intervals)")
    legend_below(panel, axes)


def _plot_band(axes: "Axes", row: Row) -> None:
    colour = LIGHT["full" if row.is_full else "faint"]
    axes.axhspan(*interval(row.accuracy), color=colour, alpha=0.16, linewidth=0)
    axes.axhline(
        100 * row.accuracy.value,
        label=row.name,
        color=colour,
        linewidth=1.8,
        linestyle=(0, (5, 3)),
    )


def _plot_series(axes: "Axes", name: str, rows: Sequence[Row], number: int, dodge: float) -> None:
    values = [100 * row.accuracy.value for row in rows]
    intervals = [interval(row.accuracy) for row in rows]
    axes.errorbar(
        [(row.budget or 0) * dodge for row in rows],
        values,
        yerr=[
            [value - low for value, (low, _) in zip(values, intervals, strict=True)],
            [high - value for value, (_, high) in zip(values, intervals, strict=True)],
        ],
        label=name,
        color=LIGHT[SERIES[number % len(SERIES)]],
        marker=MARKERS[number % len(MARKERS)],
        markersize=7,
        capsize=4,
        linewidth=1.8,
    )


MAX_BANDS = 5
OPACITIES = (1.0, 0.74, 0.52, 0.34, 0.2)
"""Opacities of the bands of votes, most votes first."""
BAR_HEIGHT = 0.62
BAR_MARGIN = 1.42
"""Length of the axis over the longest bar, which leaves room for the figure at its end."""


@dataclass(frozen=True)
class Bands:
    """Up to five bands of the number of votes for an answer, most votes first."""

    names: tuple[str, ...]
    find: Callable[[int, int], int]
    """Returns the band of a number of votes and a number of samples."""


def vote_bands(num_samples: int) -> Bands:
    """Return one band for each number of votes, or bands of vote shares for many samples."""
    if num_samples <= MAX_BANDS:
        names = tuple(f"{votes} of {num_samples}" for votes in range(num_samples, 0, -1))
        return Bands(names, lambda votes, _: num_samples - votes)
    floors = (1.0, 0.75, 0.5, 0.25, 0.0)
    names = ("all", "3/4 or more", "half or more", "1/4 or more", "fewer")
    return Bands(names, lambda votes, of: next(n for n, f in enumerate(floors) if votes >= f * of))


@dataclass(frozen=True)
class VoteShares:
    """Shares of a run's questions by the verdict on the answer and its band of votes."""

    right: tuple[float, ...]
    """By band."""
    wrong: tuple[float, ...]
    """By band."""
    no_answer: float


def count_votes(row: Row, bands: Bands) -> VoteShares:
    """Return how the votes of a run split."""
    questions = row.summary.questions
    counts = Counter(_verdict_and_band(question, bands) for question in questions)
    right, wrong = (
        tuple(counts[verdict, band] / len(questions) for band in range(len(bands.names)))
        for verdict in (True, False)
    )
    return VoteShares(right, wrong, counts[None] / len(questions))


def _verdict_and_band(question: QuestionResult, bands: Bands) -> tuple[bool, int] | None:
    if question.chosen is None:
        return None
    groups = [g for g, late in zip(question.group, question.late, strict=True) if not late]
    return question.answer_correct, bands.find(groups.count(question.chosen), len(groups))


def plot_votes(panel: "SubFigure", group: Group) -> None:
    """Plot right answers to the right and wrong ones to the left, opaque where votes agree."""
    axes = panel.subplots()
    bands = vote_bands(group.num_samples)
    longest = 0.0
    for position, row in enumerate(reversed(group.rows)):
        votes = count_votes(row, bands)
        right = _stack_bars(axes, position, votes.right, "s0", direction=1)
        left = -_stack_bars(axes, position, votes.wrong, "full", direction=-1)
        no_answer = -100 * votes.no_answer
        axes.barh(position, no_answer, left=left, color=LIGHT["none"], height=BAR_HEIGHT)
        left += no_answer
        for end, align, shift in ((right, "left", 4), (left, "right", -4)):
            axes.annotate(
                f"{abs(end):.1f}",
                (end, position),
                xytext=(shift, 0),
                textcoords="offset pixels",
                ha=align,
                va="center",
                fontsize=SMALL,
            )
        longest = max(longest, right, -left)
    name_rows(axes, [row.name for row in group.rows])
    axes.axvline(0, color=LIGHT["ink"], linewidth=1.2)
    axes.set_xlim(-BAR_MARGIN * longest, BAR_MARGIN * longest)
    axes.set_ylim(-0.6, len(group.rows) - 0.4)
    axes.xaxis.set_major_formatter(lambda share, _: f"{abs(share):.0f}")
    axes.set_xlabel("wrong \N{LEFTWARDS ARROW}  % of questions  \N{RIGHTWARDS ARROW} right")
    _vote_legend(panel, bands)


def _stack_bars(
    axes: "Axes", position: int, shares: Sequence[float], colour: str, direction: int
) -> float:
    """Stack bars from the middle outwards and return their length in percent."""
    length = 0.0
    for share, opacity in zip(shares, OPACITIES, strict=False):
        axes.barh(
            position,
            direction * 100 * share,
            left=direction * length,
            height=BAR_HEIGHT,
            color=LIGHT[colour],
            alpha=opacity,
        )
        length += 100 * share
    return length


def _vote_legend(panel: "SubFigure", bands: Bands) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    handles: list[Any] = [
        tuple(Patch(facecolor=LIGHT[colour], alpha=opacity) for colour in ("full", "s0"))
        for opacity, _ in zip(OPACITIES, bands.names, strict=False)
    ]
    panel.legend(
        [*handles, Patch(facecolor=LIGHT["none"])],
        [*bands.names, "no answer"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=3,
        title="votes for the answer",
    )


BINS = 48
PEAK_HEIGHT = 0.7
"""Height of the highest bar of all histograms; the rows are 1 apart."""
LABEL_HEIGHT = 0.95


def plot_lengths(panel: "SubFigure", group: Group) -> None:
    """Plot a histogram of the finished samples' lengths for each run, all on one scale."""
    import numpy as np

    axes = panel.subplots()
    end = _axis_end(group)
    edges = np.linspace(0, end, BINS + 1)
    histograms = [np.histogram(finished_lengths(row), bins=edges)[0] for row in group.rows]
    shares = [counts / max(counts.sum(), 1) for counts in histograms]
    scale = PEAK_HEIGHT / (max(share.max() for share in shares) or 1.0)
    for position, (row, share) in enumerate(
        zip(reversed(group.rows), reversed(shares), strict=True)
    ):
        colour = LIGHT["full" if row.is_full else "s0"]
        tops = position + scale * share
        axes.stairs(tops, edges, baseline=position, fill=True, color=colour, alpha=0.4)
        axes.stairs(tops, edges, baseline=position, color=colour, linewidth=1.2)
        median = row.score.percentiles[50]
        axes.vlines(median, position, position + PEAK_HEIGHT, color=LIGHT["ink"], linewidth=1.8)
        axes.text(
            end,
            position + LABEL_HEIGHT,
            f"median {median:,.0f}, {100 * row.score.truncated:.1f} % cut off",
            ha="right",
            va="top",
            fontsize=SMALL,
            color=LIGHT["faint"],
        )
    name_rows(axes, [row.name for row in group.rows], offset=PEAK_HEIGHT / 2)
    axes.set_xlim(0, end)
    axes.set_ylim(-0.02, len(group.rows))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.set_xlabel("tokens of a finished sample")


def finished_lengths(row: Row) -> list[int]:
    """Return the generated tokens of the samples that the model ended itself."""
    return [
        tokens
        for question in row.summary.questions
        for tokens, state in zip(question.tokens, question.states, strict=True)
        if state is SampleState.FINISHED
    ]


def _axis_end(group: Group) -> float:
    """Return the token limit, or the longest sample if it is below half of the limit."""
    limit = float(max(row.conditions["max_tokens"] for row in group.rows))
    longest = float(max(max(finished_lengths(row), default=0) for row in group.rows))
    return longest if 0 < longest < limit / 2 else limit


def plot_tokens(panel: "SubFigure", group: Group) -> None:
    """Plot maj@k above pass@k, over the mean tokens of k samples."""
    with_pass_at = any(map(pass_line, group.rows))
    top, *rest = panel.subplots(1 + with_pass_at, 1, sharex=True, squeeze=False)[:, 0]
    others = [row for row in group.rows if not row.is_full]
    for row in group.rows:
        number = 0 if row.is_full else others.index(row)
        colour = LIGHT["full" if row.is_full else SERIES[number % len(SERIES)]]
        # The marker changes where the colours start again.
        place = 0 if row.is_full else number + 1 + number // len(SERIES)
        for axes, line in zip((top, *rest), (majority_line(row), pass_line(row)), strict=False):
            if line:
                axes.plot(
                    list(line),
                    list(line.values()),
                    label=row.name,
                    color=colour,
                    marker=MARKERS[place % len(MARKERS)],
                    markersize=6,
                    linewidth=1.5,
                )
    top.set_xscale("log")
    tick_at(top, round_values(*top.get_xlim()), short_number)
    top.set_ylabel(f"{RIGHT_VOTES}, %")
    for bottom in rest:
        bottom.set_ylabel("any right, %")
    (top, *rest)[-1].set_xlabel(
        "mean tokens a question, of 1, 2, 4, \N{HORIZONTAL ELLIPSIS} samples"
    )
    panel.align_ylabels([top, *rest])
    for axes in (top, *rest):
        fit_percent(axes)
    legend_below(panel, top)


def majority_line(row: Row) -> Mapping[float, float]:
    """Return the percent of right votes by mean tokens a question, one point for each k.

    A program that stops early has a single point.
    """
    if row.stops_early:
        return {row.score.tokens_per_question: 100 * row.score.vote_correct.value}
    return _by_tokens(row, row.score.majority_at)


def pass_line(row: Row) -> Mapping[float, float]:
    """Return the percent of questions that any of k samples answers, by mean tokens of k samples.

    A program that stops early has none.
    """
    return {} if row.stops_early else _by_tokens(row, row.score.pass_at)


def _by_tokens(row: Row, estimates: Mapping[int, Estimate]) -> Mapping[float, float]:
    return {k * row.score.mean_tokens: 100 * found.value for k, found in estimates.items()}


def round_values(low: float, high: float) -> list[float]:
    """Return the values 1, 2, 5 times powers of ten in a range, or more of them if too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        candidates = [digit * 10.0**power for power in powers for digit in digits]
        values = [value for value in candidates if low <= value <= high]
        if len(values) >= MIN_TICKS:
            break
    return values


def lacks_budgets(group: Group) -> str | None:
    """Return why there is no accuracy over budget, None if there is."""
    if any(row.budget for row in group.rows):
        return None
    return "no run has a budget"


def lacks_votes(group: Group) -> str | None:
    """Return why there are no votes, None if there are."""
    if group.num_samples == 1:
        return "every question has one sample, so there is no vote"
    return None if any(row.score.has_majority for row in group.rows) else NO_MAJORITY


def lacks_lengths(group: Group) -> str | None:
    """Return why there are no lengths of samples, None if there are."""
    if any(map(finished_lengths, group.rows)):
        return None
    return "no sample ended by itself, before the limit of new tokens"


WIDTH = 380
MARGIN = 6
TITLE_HEIGHT = 20
TITLE_WIDTH = 46
"""Characters in a line of a panel's title."""


@dataclass(frozen=True)
class Plot:
    """One kind of plot."""

    name: str
    """Name of its files."""
    title: str
    caption: str
    """Explanation for readers of the plot."""
    draw: "Callable[[SubFigure, Group], None]"
    height: int
    """Height of a panel without title and rows."""
    row_height: int
    """Height that each run adds."""
    lacks_data: Callable[[Group], str | None]
    """Returns why a group has nothing to plot, None if it has."""

    def missing(self, group: Group) -> str | None:
        """Return why a group has no such plot, as a sentence; None if it has one."""
        if group.num_questions < MIN_QUESTIONS:
            return f"No plots: {too_few(group.num_questions)}."
        reason = self.lacks_data(group)
        return f"No plot of {self.title[0].lower()}{self.title[1:]}: {reason}." if reason else None


PLOTS = (
    Plot(
        name="accuracy",
        title="Accuracy over budget",
        caption=(
            "Bars and the band of full attention are 95 % intervals of each run alone. Runs share "
            "their questions, so differences are known better: see the table. Programs that stop "
            "early have no pass@1."
        ),
        draw=plot_accuracy,
        lacks_data=lacks_budgets,
        height=290,
        row_height=6,
    ),
    Plot(
        name="votes",
        title="How votes split",
        caption=(
            "Questions by the votes for their answer: strong colours are agreement. Right answers "
            "are to the right, wrong ones to the left."
        ),
        draw=plot_votes,
        lacks_data=lacks_votes,
        height=150,
        row_height=36,
    ),
    Plot(
        name="lengths",
        title="Lengths of samples",
        caption=(
            "Samples that the model ended itself; the share of samples cut off at the limit stands "
            "beside them. The line is the median of both."
        ),
        draw=plot_lengths,
        lacks_data=lacks_lengths,
        height=80,
        row_height=54,
    ),
    Plot(
        name="tokens",
        title="Accuracy over tokens",
        caption=(
            "More samples cost more tokens. Above: questions whose most frequent answer is right "
            "(right votes); below: questions that at least one sample answers correctly (pass@k)."
        ),
        draw=plot_tokens,
        lacks_data=lacks_votes,
        height=392,
        row_height=17,
    ),
)


def draw_svg(plot: Plot, groups: Sequence[Group]) -> str:
    """Return an SVG file with one panel for each group; none of them may lack the plot."""
    with settings():
        description = f"{'; '.join(group.title for group in groups)}. {plot.caption}"
        return to_svg(_figure(plot, groups), title=plot.title, description=description)


def draw_png(plot: Plot, groups: Sequence[Group]) -> bytes:
    """Return a PNG file with one panel for each group, for viewers without SVG."""
    with settings():
        return to_png(_figure(plot, groups))


def _figure(plot: Plot, groups: Sequence[Group]) -> "Figure":
    import textwrap

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    titles = ["\n".join(textwrap.wrap(group.title, TITLE_WIDTH)) for group in groups]
    heights = [
        plot.height + plot.row_height * len(group.rows) + TITLE_HEIGHT * len(title.splitlines())
        for group, title in zip(groups, titles, strict=True)
    ]
    layout = ConstrainedLayoutEngine(w_pad=MARGIN / 72, h_pad=MARGIN / 72)
    figure = Figure(figsize=(WIDTH / 72, sum(heights) / 72), layout=layout)
    panels = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights).flat
    for panel, group, title in zip(panels, groups, titles, strict=True):
        panel.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        plot.draw(panel, group)
    return figure
