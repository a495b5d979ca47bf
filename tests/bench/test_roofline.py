"""The plot, from recorded rows."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from lim_sglang.bench.roofline import MARK, draw
from lim_sglang.errors import DataError
from tests.bench.recorded_rows import ROWS, line, recorded


def test_a_plot_of_mixed_batches_alone_is_refused(tmp_path: Path) -> None:
    found = recorded(tmp_path, line("lim", "4x32k+4x1k"))
    with pytest.raises(DataError, match="leave --plot out"):
        draw(found)


def shapes(svg: str, tag: str, classes: str) -> list[ElementTree.Element]:
    """Elements of a kind in the panels of a plot, its legend left out."""
    root = ElementTree.fromstring(svg)
    found = root.findall(f".//{{*}}g/{{*}}{tag}")
    return [each for each in found if each.get("class") == classes]


def test_a_panel_a_batch_holds_measured_points_and_both_limits(tmp_path: Path) -> None:
    svg = draw(recorded(tmp_path, *ROWS))
    texts = [each.text for each in ElementTree.fromstring(svg).iter() if each.text]
    assert {"1 request", "8 requests", "decode step, ms", "context of each request, tokens"} <= set(
        texts
    )
    assert "Decode step, qwen3-8b, NVIDIA H100 80GB HBM3, budget 2,048" in texts
    for name in ("dense", "lim"):
        assert len(shapes(svg, "polyline", f"{name} limit")) == 2
    told = [each[0].text for each in shapes(svg, "rect", "dense")]
    assert told == ["1x32768 flashinfer: 8.400 ms", "8x32768 fa3: 19.000 ms"]
    assert len(shapes(svg, "circle", "lim")) == 3
    assert "prefers-color-scheme: dark" in svg


def height_at(line: ElementTree.Element, x: float) -> float:
    """How far down a line is at a place, in pixels."""
    places = [tuple(map(float, each.split(","))) for each in (line.get("points") or "").split()]
    (x0, y0), (x1, y1) = next(
        (left, right) for left, right in pairwise(places) if left[0] <= x <= right[0]
    )
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def test_a_step_at_its_byte_limit_lies_on_the_limit_s_line(tmp_path: Path) -> None:
    # 15 GB of weights, and 8 x 32,768 tokens of 4,096 bytes in 4 layers, or in 2 and 2,048 in 2.
    dense_ms = (15e9 + 8 * 32768 * 4096 * 4) / 3e9
    lim_ms = (15e9 + 8 * 4096 * (32768 * 2 + 2048 * 2)) / 3e9
    svg = draw(
        recorded(tmp_path, line("lim", step_ms=lim_ms), line("flashinfer", step_ms=dense_ms))
    )
    (square,), (circle,) = shapes(svg, "rect", "dense"), shapes(svg, "circle", "lim")
    (dense,), (lim,) = (shapes(svg, "polyline", f"{n} limit") for n in ("dense", "lim"))
    x, lim_y = float(circle.get("cx") or 0), float(circle.get("cy") or 0)
    dense_y = float(square.get("y") or 0) + MARK
    assert height_at(dense, x) == pytest.approx(dense_y, abs=0.5)
    assert height_at(lim, x) == pytest.approx(lim_y, abs=0.5)
    assert dense_y < lim_y - 5
