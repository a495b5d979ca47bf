"""Colours that everyone can tell apart, in light and in dark, and files that hold no others."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from lim_sglang.plot_style import (
    DARK,
    LIGHT,
    SERIES,
    Palette,
    fit_percent,
    legend_below,
    name_rows,
    settings,
    short_number,
    tick_at,
    to_svg,
)

PALETTES = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])


def channels(colour: str) -> np.ndarray:
    return np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])


def contrast(a: str, b: str) -> float:
    """Return WCAG's contrast ratio."""

    def luminance(colour: str) -> float:
        found = channels(colour)
        linear = np.where(found <= 0.04045, found / 12.92, ((found + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@PALETTES
def test_text_and_lines_stand_out_from_the_paper(palette: Palette) -> None:
    for name in set(palette) - {"paper", "grid"}:
        least = 4.5 if name in ("ink", "faint") else 3.0
        assert contrast(palette[name], palette["paper"]) >= least, name


CONE_LOSS = {
    "no red cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}
"""Matrices on linear RGB by Machado, Oliveira and Fernandes, 2009."""


@PALETTES
@pytest.mark.parametrize("loss", CONE_LOSS)
@pytest.mark.parametrize(("a", "b"), [("full", "s0"), ("s0", "none"), ("full", "none")])
def test_colours_with_a_meaning_differ_for_colour_blind_readers(
    palette: Palette, loss: str, a: str, b: str
) -> None:
    seen = [
        np.clip(np.array(CONE_LOSS[loss]) @ channels(palette[n]) ** 2.2, 0, 1) ** (1 / 2.2)
        for n in (a, b)
    ]
    assert np.abs(seen[0] - seen[1]).max() > 0.2


def test_every_light_colour_has_one_in_dark() -> None:
    assert list(LIGHT) == list(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)  # else a style sheet could not tell them apart
    assert set(SERIES) <= set(LIGHT)


def test_an_svg_replaces_each_of_its_colours_in_the_dark_and_loads_nothing() -> None:
    with settings():
        figure = Figure(layout="constrained")
        panel = figure.subfigures()
        top, bottom = panel.subplots(2, 1)
        for n, name in enumerate(SERIES):
            top.plot([1, 2048], [50 + n / 3, 51], color=LIGHT[name], marker="o", label=name)
        tick_at(top, [1, 20_000, 65_536], short_number)
        legend_below(panel, top)
        bottom.barh([0, 1], [2, 3], color=LIGHT["none"])
        name_rows(bottom, ["LessIsMore 256, ranking mass", "b"])
        text = to_svg(figure, title="A <title>", description="b & c")
    sheet, body = re.split(r"</style>", text.split("<desc>")[1], maxsplit=1)
    used = set(re.findall(r"(fill|stroke): (#\w+)", body))
    assert {LIGHT[name] for name in SERIES} < {colour for _, colour in used}
    for key, colour in used:
        dark = DARK[next(name for name, light in LIGHT.items() if light == colour)]
        assert f'[style*="{key}: {colour}"]{{{key}:{dark}!important}}' in sheet
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(text)
    assert [root.findtext(f"{svg}{tag}") for tag in ("title", "desc")] == ["A <title>", "b & c"]
    assert not re.findall(r"url\((?!#)|<image|@import", text)
    assert not re.findall(r"=\"[^\"]*\d\.\d{3}", text)  # the same on every machine


def test_an_axis_of_percent_has_a_range_and_stays_near_0_to_100() -> None:
    axes = Figure().subplots()
    axes.set_ylim(99.5, 100.5)
    fit_percent(axes)
    assert axes.get_ylim() == (98, 101)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (128, "128"),
        (9999, "9,999"),
        (16_384, "16K"),
        (20_000, "20K"),
        (65_500, "65.5K"),
        (65_536, "64K"),
        (200_000, "200K"),
    ],
)
def test_numbers_on_axes_are_short(value: float, shown: str) -> None:
    assert short_number(value) == shown
