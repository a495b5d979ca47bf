"""One style for all plots: colours, matplotlib's settings, axes, and files that follow dark mode.

Plots use the colours of `LIGHT`. An SVG file also holds a style sheet that replaces each of them by
the colour of the same name in `DARK` if the reader's browser prefers dark pages; viewers without
style sheets show the light colours, as a PNG does.
"""

import base64
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Palette = Mapping[str, str]
"""From a colour's name to its value, `#rrggbb` in small letters."""

LIGHT: Palette = MappingProxyType(
    {
        "paper": "#ffffff",
        "ink": "#1f2328",
        "faint": "#57606a",
        "grid": "#d8dee4",
        "none": "#8c959f",
        "full": "#bc4c00",
        "s0": "#0969da",
        "s1": "#0b7a63",
        "s2": "#8250df",
        "s3": "#bf3989",
        "s4": "#7a6400",
        "s5": "#0a3069",
        "s6": "#cf222e",
    }
)
DARK: Palette = MappingProxyType(
    {
        "paper": "#0d1117",
        "ink": "#e6edf3",
        "faint": "#9da7b3",
        "grid": "#30363d",
        "none": "#7d8590",
        "full": "#f0883e",
        "s0": "#58a6ff",
        "s1": "#3fb99a",
        "s2": "#bc8cff",
        "s3": "#f778ba",
        "s4": "#d4b106",
        "s5": "#a5d6ff",
        "s6": "#ff7b72",
    }
)
SERIES = ("s0", "s1", "s2", "s3", "s4", "s5", "s6")
"""Colours of lines other than full attention, in the order of use."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
"""Markers of lines, so that no line is recognised by colour alone."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
"""Fonts of SVG text. The layout is computed with DejaVu Sans, which is wider than all of these, so
that no label outgrows its place."""
SMALL = 11.0
"""Font size of secondary text; other text has 12."""
PNG_DPI = 144
"""Two pixels a point."""
MIN_PERCENT_RANGE = 4.0
SHORT_NAME = 20
"""Characters of a name that fits into half the width of a plot."""
MAX_UPRIGHT_TICKS = 6


@contextmanager
def settings(palette: Palette = LIGHT) -> Iterator[None]:
    """Set matplotlib's defaults for the length of a block that plots and writes a figure."""
    from matplotlib import rc_context

    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    faint = ("axes.edgecolor", "xtick.color", "ytick.color")
    chosen: dict[Any, Any] = {
        **dict.fromkeys((*inks, "xtick.labelcolor", "ytick.labelcolor"), palette["ink"]),
        **dict.fromkeys(papers, palette["paper"]),
        **dict.fromkeys(faint, palette["faint"]),
        "grid.color": palette["grid"],
        "grid.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelpad": 6.0,
        "axes.labelsize": 12.0,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "font.family": "DejaVu Sans",
        "font.size": 12.0,
        "legend.frameon": False,
        "legend.fontsize": SMALL,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "figure.dpi": 72.0,  # a point is a pixel
        "svg.fonttype": "none",
        "svg.hashsalt": "lim",  # the same ids in every process
    }
    with rc_context(chosen):
        yield


def to_svg(figure: "Figure", *, title: str, description: str) -> str:
    """Return an SVG file that follows the reader's light or dark mode.

    The text is the same for the same figure on every machine: coordinates have two decimals.

    Args:
        title: name for readers who do not see the plot.
        description: what the plot shows, for the same readers.
    """
    file = io.StringIO()
    undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=undated)
    text = re.sub(r'="[^"]*"', lambda attribute: _rounded(attribute[0]), file.getvalue())
    names = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    text = text.replace("<svg ", '<svg role="img" ', 1)
    return text.replace(" <defs>", f" {names}<style>{STYLE_SHEET}</style>\n <defs>", 1)


def _rounded(text: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)


def _style_sheet() -> str:
    """Return rules that find light colours in `style` attributes and replace them."""
    rules = "".join(
        f'[style*="{key}: {light}"]{{{key}:{DARK[name]}!important}}'
        for name, light in LIGHT.items()
        for key in ("fill", "stroke")
    )
    font = f"text{{font-family:{FONT}!important}}"
    return f"{font}@media (prefers-color-scheme:dark){{{rules}}}"


STYLE_SHEET = _style_sheet()


def data_url(svg: str) -> str:
    """Return an SVG file as the address of an image, for pages that load nothing."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def to_png(figure: "Figure") -> bytes:
    """Return a PNG file, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return file.getvalue()


def fit_percent(axes: "Axes") -> None:
    """Give the y axis a range of at least a few percent within 0 to 100."""
    low, high = axes.get_ylim()
    more = max(0.0, MIN_PERCENT_RANGE - (high - low)) / 2
    axes.set_ylim(max(low - more, -1.0), min(high + more, 101.0))


def legend_below(panel: "SubFigure", axes: "Axes") -> None:
    """Put the legend under the plot, in two columns if the names are short."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= SHORT_NAME else 1
    panel.legend(handles, labels, loc="outside lower center", ncols=columns)


def name_rows(axes: "Axes", names: Sequence[str], offset: float = 0.0) -> None:
    """Name the rows of a plot from the top down; the last row is at `offset`, the next 1 above."""
    positions = [offset + n for n in range(len(names))]
    axes.set_yticks(positions, ["\n".join(textwrap.wrap(name, 18)) for name in reversed(names)])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def tick_at(axes: "Axes", values: Sequence[float], name: Callable[[float], str]) -> None:
    """Put the ticks of a logarithmic x axis at these values only, slanted if they are many."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: name(value))
    if len(values) > MAX_UPRIGHT_TICKS:
        axes.tick_params(axis="x", labelrotation=45)


def short_number(value: float) -> str:
    """Return `2,000`; from 10,000 on `65.5K`, or `64K` for 65,536."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1024:.0f}K" if value % 1024 == 0 else f"{value / 1000:.3g}K"
