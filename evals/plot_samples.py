"""Plots of samples: how long they are, and how their votes split."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lim_sglang.evals.plot_look import SMALL, Palette, name_rows, open_axes
from lim_sglang.evals.report import Group, Row
from lim_sglang.evals.summary import QuestionResult
from lim_sglang.programs.records import SampleState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

BINS = 48
PEAK, TOLD_AT = 0.7, 0.95
"""Heights of the highest bar, and of what is told above; a row is 1."""
MOST_BANDS = 5
TINTS = (1.0, 0.74, 0.52, 0.34, 0.2)
"""Opacity of the votes' bands, the most votes first."""
ROOM = 1.42
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
    axes.set_xlim(-ROOM * widest, ROOM * widest)
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
