"""What all plots share: an SVG that reads in light and in dark, with one look for each policy.

Colours follow the reader's setting. A part of a plot is a line of text; classes say what it is.
"""

from collections.abc import Sequence
from html import escape

COLOURS = """
.paper {{ fill: {paper}; }} text {{ fill: {ink}; }} .frame {{ stroke: {ink}; }}
.grid {{ stroke: {grid}; }} .dense {{ stroke: {dense}; }} .lim {{ stroke: {lim}; }}
rect.dense {{ fill: {dense}; }} circle.lim {{ fill: {lim}; }}
path {{ stroke: none; }} path.call {{ fill: {ink}; }} path.wait {{ fill: {grid}; }}
path.dense {{ fill: {dense}; stroke: none; }} path.lim {{ fill: {lim}; stroke: none; }}
"""
LIGHT = COLOURS.format(
    paper="#ffffff", ink="#1f2328", grid="#d8dee4", dense="#bc4c00", lim="#0969da"
)
DARK = COLOURS.format(
    paper="#0d1117", ink="#e6edf3", grid="#30363d", dense="#f0883e", lim="#58a6ff"
)


def document(
    title: str, size: tuple[int, int], parts: Sequence[str], *, left: int, style: str = ""
) -> str:
    """The text of a file; the same parts give the same text.

    Args:
        size: width and height.
        left: where the title begins.
        style: of this plot's own classes.
    """
    width, height = size
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">',
            "<style>\n"
            "text { font: 12px sans-serif; } .title { font-size: 15px; font-weight: bold; }\n"
            f"{style}{LIGHT}@media (prefers-color-scheme: dark) {{{DARK}}}</style>",
            f'<rect class="paper" width="{width}" height="{height}"/>',
            f'<text class="title" x="{left}" y="28">{escape(title)}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def group(x: float, y: float, parts: Sequence[str]) -> list[str]:
    """Parts that are placed from a corner of their own."""
    return [f'<g transform="translate({x:g} {y:g})">', *parts, "</g>"]


def words(x: float, y: float, text: str, anchor: str = "start") -> str:
    """One line of text; `anchor` says which of its ends, or its middle, is at x."""
    told = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}"{told}>{escape(text)}</text>'


def line(places: Sequence[tuple[float, float]], classes: str) -> str:
    """A line through places."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{classes}" points="{path}"/>'
