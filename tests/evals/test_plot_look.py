"""Colours of the plots: seen by everyone, in light and in dark."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lim_sglang.plot_style import (
    DARK,
    LIGHT,
    SERIES,
    STAND_INS,
    Palette,
    budget_name,
    finish,
    thousands,
    wrapped,
)


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_lines_stand_out_from_the_paper(palette: Palette) -> None:
    for name, colour in palette.items():
        if name not in ("paper", "grid"):
            least = 4.5 if name in ("ink", "faint") else 3.0
            assert contrast(colour, palette["paper"]) >= least, name


CONE_LOSS = {
    "no red cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}
"""Machado, Oliveira, Fernandes, 2009: what is left of linear RGB."""


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("loss", CONE_LOSS)
def test_colours_with_a_meaning_differ_for_colour_blind_readers(
    palette: Palette, loss: str
) -> None:
    def seen(name: str) -> Any:
        channels = np.array([int(palette[name][n : n + 2], 16) / 255 for n in (1, 3, 5)])
        return np.clip(np.array(CONE_LOSS[loss]) @ channels**2.2, 0, 1) ** (1 / 2.2)

    for a, b in (("right", "wrong"), ("full", "s0"), ("right", "none"), ("wrong", "none")):
        assert np.abs(seen(a) - seen(b)).max() > 0.2, (a, b)


def test_lists_of_colours_agree() -> None:
    assert list(LIGHT) == list(DARK) == list(STAND_INS)
    assert len(set(STAND_INS.values())) == len(STAND_INS)
    assert all(a != b for palette in (LIGHT, DARK) for a, b in pairwise(palette[s] for s in SERIES))


def test_a_colour_that_is_no_stand_in_is_refused() -> None:
    drawn = '<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt">{}</svg>'
    path = '<path style="fill: #123456; stroke-width: 2"/>'
    with pytest.raises(ValueError, match="#123456 is none of the plots' colours"):
        finish(drawn.format(path), name="a", title="t", description="d", alone=True)


def test_words_on_axes_are_short() -> None:
    assert [thousands(value) for value in (128, 1024, 9999, 65_536, 200_000)] == [
        *("128", "1,024", "9,999", "65.5K", "200K")
    ]
    assert [budget_name(n) for n in (128, 1024, 8192, 16_384, 20_000, 65_536)] == [
        *("128", "1,024", "8,192", "16K", "20,000", "64K")
    ]
    assert wrapped("LessIsMore 256, ranking mass", 18) == "LessIsMore 256,\nranking mass"
