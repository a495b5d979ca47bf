"""A drawn figure as SVG that a page can hold, and as PNG.

matplotlib writes colours, fonts and ids into each element. Here colours become classes, fonts the
reader's own, and ids unlike those of another plot on the same page.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

from lim_sglang.evals.plot_look import DARK, FONT, LIGHT, STAND_INS, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
