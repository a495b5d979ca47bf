"""The look of all plots: colours for light and dark, matplotlib's settings, axes, and SVG whose
colours are classes of a style sheet.

A plot is drawn in stand-in colours, which become classes. A PNG is drawn in the light colours.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

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


SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
PNG_DPI = 144
"""Two pixels a point."""
ALONE = 1.25
"""How much larger than on a phone a file is shown where there is room."""
NUMBERS = ("d", "x", "y", "transform", "points")
"""Attributes that hold coordinates."""


def to_svg(figure: "Figure") -> str:
    """What matplotlib writes: the same text for the same figure."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(written, metadata=nameless)
    return written.getvalue()


def to_png(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written = io.BytesIO()
    figure.set_dpi(PNG_DPI)
    FigureCanvasAgg(figure).print_png(written, metadata={"Software": None})
    return written.getvalue()


def style_sheet(palette: Palette) -> str:
    """The classes of a plot in these colours, or in variables of their names."""
    return "".join(
        f".f-{name}{{fill:{value}}}.s-{name}{{stroke:{value}}}" for name, value in palette.items()
    )


PAGE_STYLE = style_sheet({name: f"var(--{name})" for name in LIGHT})
"""For a page that sets the variables."""
FILE_STYLE = (
    f"text{{font-family:{FONT}}}*{{stroke-linejoin:round}}{style_sheet(LIGHT)}"
    f"@media (prefers-color-scheme: dark){{{style_sheet(DARK)}}}"
)
"""For a file that stands alone, a picture in a README: it follows the reader's setting, too."""


def finish(drawn: str, *, name: str, title: str, description: str, alone: bool) -> str:
    """An SVG that says what it shows.

    Args:
        drawn: what `to_svg` gave, in stand-in colours.
        name: begins each id.
        alone: whether it is a file of its own, with a style sheet and a size.

    Raises:
        ValueError: a colour is no stand-in, so that it would stay the same in the dark.
    """
    root = ElementTree.fromstring(drawn)
    _drop(root, "metadata", "style")
    used = set(re.findall(r"#([\w.-]+)", drawn))
    for element in root.iter():
        _rename(element, name, used)
        _shorten(element)
        _restyle(element)
    width, height = (root.attrib.pop(side).removesuffix("pt") for side in ("width", "height"))
    if alone:
        root.set("width", f"{float(width) * ALONE:g}")
        root.set("height", f"{float(height) * ALONE:g}")
        _put_first(root, "style", FILE_STYLE)
    _put_first(root, "desc", description, f"{name}-desc")
    _put_first(root, "title", title, f"{name}-title")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _drop(root: ElementTree.Element, *tags: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in [f"{{{SVG}}}{tag}" for tag in tags]:
                parent.remove(child)


def _put_first(root: ElementTree.Element, tag: str, text: str, identity: str | None = None) -> None:
    element = ElementTree.Element(f"{{{SVG}}}{tag}")
    element.text = text
    if identity:
        element.set("id", identity)
    root.insert(0, element)


def _rename(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Keep only ids that something refers to, with the plot's name before them."""
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.set("id", f"{name}-{identity}")
    if HREF in element.attrib:
        element.set("href", element.attrib.pop(HREF).replace("#", f"#{name}-"))
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-"))


def _shorten(element: ElementTree.Element) -> None:
    """Two decimals are plenty, and the same on every machine; line breaks say nothing."""
    for key in NUMBERS:
        if key in element.attrib:
            rounded = re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.2f}", element.attrib[key])
            element.set(key, " ".join(rounded.split()))
    if element.text and not element.text.strip():
        element.text = None
    if element.tail and not element.tail.strip():
        element.tail = None


def _restyle(element: ElementTree.Element) -> None:
    kept, classes = [], []
    for part in filter(None, element.attrib.pop("style", "").split("; ")):
        key, value = part.split(": ", 1)
        if key in ("fill", "stroke") and value.startswith("#"):
            classes.append(f"{key[0]}-{_colour_name(value)}")
        elif key != "font-family":
            kept.append(f"{key}:{value}")
    if kept:
        element.set("style", ";".join(kept))
    if classes:
        element.set("class", " ".join(classes))


def _colour_name(value: str) -> str:
    for name, stand_in in STAND_INS.items():
        if stand_in == value:
            return name
    raise ValueError(f"{value} is none of the plots' colours")
