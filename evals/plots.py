"""The plots of a report: what there is, and how a panel a table becomes a picture.

Sizes are pixels of a panel that is about as wide as a phone's screen, so that words stay readable
there; on wide screens panels stand side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lim_sglang.evals.plot_accuracy import (
    accuracy_height,
    describe_accuracy,
    describe_tokens,
    draw_accuracy,
    draw_tokens,
    tokens_height,
)
from lim_sglang.evals.plot_look import LIGHT, STAND_INS, Palette, settings, wrapped
from lim_sglang.evals.plot_samples import (
    describe_lengths,
    describe_votes,
    draw_lengths,
    draw_votes,
    lengths_height,
    votes_height,
)
from lim_sglang.evals.plot_svg import finish, to_png, to_svg
from lim_sglang.evals.report import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

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
