"""How the plots look: colours for light and dark, matplotlib's settings, axes.

A plot is drawn in stand-in colours, which `plot_svg.py` turns into classes for a style sheet to
colour. A PNG is drawn in the light colours themselves.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Palette = Mapping[str, str]
"""From a colour's name to its value."""

LIGHT: Palette = MappingProxyType(
    {
        **{"paper": "#ffffff", "ink": "#1f2328", "faint": "#57606a", "grid": "#d8dee4"},
        **{"full": "#bc4c00", "right": "#0969da", "wrong": "#bc4c00", "none": "#8c959f"},
        **{"s0": "#0969da", "s1": "#0b7a63", "s2": "#8250df", "s3": "#bf3989"},
        **{"s4": "#7a6400", "s5": "#0a3069", "s6": "#57606a"},
    }
)
DARK: Palette = MappingProxyType(
    {
        **{"paper": "#0d1117", "ink": "#e6edf3", "faint": "#9da7b3", "grid": "#30363d"},
        **{"full": "#f0883e", "right": "#58a6ff", "wrong": "#f0883e", "none": "#7d8590"},
        **{"s0": "#58a6ff", "s1": "#3fb99a", "s2": "#bc8cff", "s3": "#f778ba"},
        **{"s4": "#d4b106", "s5": "#a5d6ff", "s6": "#9da7b3"},
    }
)
STAND_INS: Palette = MappingProxyType(
    {name: f"#0102{number:02x}" for number, name in enumerate(LIGHT)}
)
SERIES = tuple(name for name in LIGHT if re.fullmatch(r"s\d", name))
"""Of policies other than full attention, in the order in which they are given out."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
"""Beside each colour of `SERIES`, so that no line is told by colour alone."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
"""Of the page and its plots. Plots are laid out in DejaVu Sans, which is wider than all of these,
so that no label grows out of its place."""
SMALL = 11.0
"""Size of what is not read first; everything else is 12."""

LEAST_RANGE = 4.0
"""Percent that an axis shows at least."""
SHORT_NAME = 20
"""Characters of a name that fits into half a panel."""

MOST_UPRIGHT = 6

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lim report",
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "axes.labelsize": 12.0,
    "axes.labelpad": 6.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "legend.frameon": False,
    "legend.fontsize": 11.0,
    "figure.dpi": 72.0,  # a point is a pixel
}


@contextmanager
def settings(palette: Palette) -> Iterator[None]:
    """Matplotlib's defaults while a plot is drawn and written."""
    from matplotlib import rc_context

    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    faint = ("axes.edgecolor", "xtick.color", "ytick.color")
    colours = {
        **dict.fromkeys((*inks, "xtick.labelcolor", "ytick.labelcolor"), palette["ink"]),
        **dict.fromkeys(papers, palette["paper"]),
        **dict.fromkeys(faint, palette["faint"]),
        "grid.color": palette["grid"],
    }
    chosen: dict[Any, Any] = {**SETTINGS, **colours}
    with rc_context(chosen):
        yield


def open_axes(panel: "SubFigure", rows: int = 1) -> "list[Axes]":
    """Axes one above the other over one x axis, with a quiet grid."""
    found = panel.subplots(rows, 1, sharex=True, squeeze=False)
    axes: list[Axes] = [each for line in found for each in line]
    for each in axes:
        each.grid(visible=True, linewidth=0.8)
        each.tick_params(length=0)
    return axes


def fit_percent(axes: "Axes") -> None:
    """Room around values of one size, and none far outside of 0 to 100."""
    low, high = axes.get_ylim()
    more = max(0.0, LEAST_RANGE - (high - low)) / 2
    axes.set_ylim(max(low - more, -1.0), min(high + more, 101.0))


def legend_below(panel: "SubFigure", axes: "Axes") -> None:
    """What the lines are, under the plot: in two columns if the names are short."""
    handles, labels = axes.get_legend_handles_labels()
    panel.legend(handles, labels, loc="outside lower center", ncols=_columns(labels))


def legend_height(labels: Sequence[str]) -> int:
    """Pixels that `legend_below` takes."""
    return 12 + 17 * -(-len(labels) // _columns(labels))


def _columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= SHORT_NAME else 1


def name_rows(axes: "Axes", names: Sequence[str], middle: float = 0.0) -> None:
    """Names from the top down, the last one at `middle`, a whole number between two."""
    places = [middle + place for place in range(len(names))]
    axes.set_yticks(places, [wrapped(name, 18) for name in reversed(names)])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def tick_at(axes: "Axes", values: Sequence[float], name: Callable[[float], str]) -> None:
    """Ticks of a logarithmic x axis, at these values alone; slanted where there are many."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: name(value))
    if len(values) > MOST_UPRIGHT:
        axes.tick_params(axis="x", labelrotation=45)


def thousands(value: float) -> str:
    """`2,000`; `65.5K` from 10,000."""
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:.3g}K"


def budget_name(budget: float) -> str:
    """`1,024`; `64K` for 65,536."""
    short = budget >= 10_000 and budget % 1024 == 0
    return f"{budget / 1024:.0f}K" if short else f"{budget:,.0f}"


def wrapped(text: str, width: int) -> str:
    """In lines of about so many characters."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
