"""The plot of a timeline: what is drawn, and that it stays small."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from lim_sglang.bench.serve_rows import ServeRow
from lim_sglang.bench.timeline import Span, Steps, cut_strip, read_trace, summarise
from lim_sglang.bench.timeline_plot import (
    BETWEEN_US,
    BETWEEN_WIDTH,
    LEAST_PX,
    STEPS_WIDTH,
    Window,
    draw_timelines,
)
from tests.bench.test_serve_rows import CONDITIONS, profiled_row, row_of
from tests.bench.traces import event, steps, text


def bars(path: str) -> list[Span]:
    """Left and right end of each bar of a path."""
    found = re.findall(r"M(-?[\d.]+) \d+h([\d.]+)v", path)
    return [(float(x), float(x) + float(width)) for x, width in found]


def lanes(svg: str, classes: str) -> list[list[Span]]:
    """Bars of each path of a kind that is not the legend's."""
    root = ElementTree.fromstring(svg)
    paths = [each.get("d") or "" for each in root.iter() if each.get("class") == classes]
    return [bars(path) for path in paths if path][1:]


def drawn(*rows: ServeRow, **conditions: Any) -> str:
    """The plot of rows of which at least one was profiled."""
    svg = draw_timelines(rows, CONDITIONS | conditions)
    assert svg
    return svg


def test_rows_that_were_not_profiled_are_not_drawn() -> None:
    assert draw_timelines([row_of(), row_of(timeline_error="no trace")], CONDITIONS) is None
    assert drawn(row_of(policy="fa3"), profiled_row()) == drawn(profiled_row())


def test_a_row_names_policy_load_and_figures() -> None:
    svg = drawn(
        profiled_row(concurrency=64), profiled_row(policy="fa3", concurrency=1), model="x<y"
    )
    texts = [each.text for each in ElementTree.fromstring(svg).iter() if each.text]
    assert "Decode steps on the GPU, x<y, NVIDIA H100 80GB HBM3" in texts
    assert texts.index("fa3, 1 request") < texts.index("lim, 64 requests")
    assert texts.count("GPU busy 98.0 %") == 2
    assert "prefers-color-scheme: dark" in svg


def test_steps_lie_where_they_were_on_the_left_and_a_border_on_the_right() -> None:
    svg = drawn(profiled_row())
    _launches, steps_gpu, between_gpu = lanes(svg, "lim")
    # Three steps of 1,000 us, each with a gap from 900 to 920.
    per_us = STEPS_WIDTH / 3000
    assert [start for start, _ in steps_gpu] == [
        pytest.approx(at * per_us, abs=0.1) for at in (0, 920, 1920, 2920)
    ]
    # The second replay's end is a third from the left, and the gap begins there.
    per_us = BETWEEN_WIDTH / BETWEEN_US
    (_, gap_start), (gap_end, _) = between_gpu
    assert gap_start == pytest.approx(BETWEEN_WIDTH / 3, abs=0.2)
    assert gap_end - gap_start == pytest.approx(20 * per_us, abs=0.2)


def test_the_host_has_a_lane_above_with_its_waits_and_launches() -> None:
    svg = drawn(profiled_row(policy="flashinfer"))
    assert len(lanes(svg, "wait")[0]) == 3
    launches = lanes(svg, "dense")[0]
    assert [start for start, _ in launches] == [
        pytest.approx(at * STEPS_WIDTH / 3000, abs=0.1) for at in (400, 1400, 2400)
    ]


def test_a_longer_way_between_replays_is_shown_whole() -> None:
    row = profiled_row()
    assert row.strip
    apart = tuple((start, start + 300.0) for start, _ in row.strip.replays)
    svg = drawn(replace(row, strip=replace(row.strip, replays=apart)))
    texts = {each.text for each in ElementTree.fromstring(svg).iter()}
    assert "800" in texts  # 700 us between them, 1,400 shown, a third of it before the end


def test_many_kernels_make_a_small_file() -> None:
    events = []
    for each in steps(20):
        if each["cat"] == "kernel" and each["dur"] == 90.0:
            at, graph = each["ts"], each["args"]["correlation"]
            events += [event("kernel", at + 0.9 * n, 0.7, graph) for n in range(100)]
        else:
            events.append(each)
    found = Steps.of(read_trace(text(events)), 10)
    row = row_of(timeline=summarise(found), strip=cut_strip(found))
    assert len(drawn(*[replace(row, concurrency=n) for n in (1, 8, 64, 256)])) < 100_000


def test_what_is_too_short_or_too_close_is_still_seen_as_one_bar() -> None:
    window = Window(0.0, 1000.0, 100)
    lane = bars(window.bars([(0.0, 1.0), (3.0, 4.0), (500.0, 500.1), (999.0, 2000.0)], (0, 1), ""))
    assert lane == [
        (0.0, pytest.approx(LEAST_PX)),
        (50.0, pytest.approx(50.0 + LEAST_PX)),
        (pytest.approx(99.9), pytest.approx(99.9 + LEAST_PX)),
    ]
