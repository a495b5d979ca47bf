"""Rows of a serving benchmark: what they say of a run, how they are shown and kept."""

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.bench.driver import Occupancy, Run
from lim_sglang.bench.load import Load
from lim_sglang.bench.serve_rows import (
    BIN_S,
    ServeRow,
    cells,
    json_line,
    make_row,
    make_table,
    one_line,
    timeline_line,
    under_table,
    warnings,
)
from lim_sglang.bench.streams import Latencies, Stream
from lim_sglang.bench.timeline import Steps, Timeline, cut_strip, read_trace, summarise
from lim_sglang.errors import LimError
from tests.bench.traces import steps, text

LOAD = Load(concurrency=2, prompt_tokens=10, new_tokens=81)


def at_pace(wait_s: float, num_tokens: int = 81, first_s: float = 100.0) -> Stream:
    """A stream of single tokens."""
    found = Stream(finished=True)
    for number in range(num_tokens):
        found.arrive(first_s + number * wait_s, number + 1)
    return found


def run_of(*streams: Stream, cut: bool = False, client_share: float = 0.1) -> Run:
    """A run whose KV cache fills by a tenth each second."""
    told = tuple(Occupancy(100.0 + n, 2, 0, 100 * n, 0.1 * n) for n in range(10))
    return Run(streams, told, cut, client_share)


def row_of(**fields: Any) -> ServeRow:
    """A row of ours, changed."""
    row, _ = make_row("lim", LOAD, run_of(at_pace(0.1), at_pace(0.1)), dense=[], sparse_rows=7)
    return replace(row, **fields)


def profiled_row(**fields: Any) -> ServeRow:
    """A row of ours with the timeline of hand-written steps."""
    found = Steps.of(read_trace(text(steps(20))), 10)
    return row_of(timeline=summarise(found), strip=cut_strip(found), **fields)


def test_a_row_says_what_the_run_says() -> None:
    row, _ = make_row("lim", LOAD, run_of(at_pace(0.1), at_pace(0.1)), dense=[], sparse_rows=7)
    assert (row.policy, row.concurrency, row.num_tokens, row.cut) == ("lim", 2, 160, False)
    assert row.seconds == pytest.approx(8.0)
    assert row.tokens_per_s == pytest.approx(20.0)
    assert row.itl_ms == Latencies(pytest.approx(100.0), pytest.approx(100.0))
    assert row.kv_share == pytest.approx(0.8)  # what is told after the last token is no part of it
    assert (row.speedup, row.sparse_rows, row.retractions, row.waiting) == (None, 7, 0, 0)


def test_speed_and_occupancy_are_told_over_time() -> None:
    bins = row_of().bins
    assert [(each.from_s, each.to_s) for each in bins] == [(0.0, BIN_S), (BIN_S, pytest.approx(8))]
    assert [each.tokens_per_s for each in bins] == [pytest.approx(20, rel=0.05)] * 2
    assert [each.occupancy and each.occupancy.kv_tokens for each in bins] == [500, 800]


def test_ours_is_compared_with_the_fastest_dense_policy() -> None:
    dense = [
        make_row("x", LOAD, run_of(at_pace(pace), at_pace(pace)), dense=[], sparse_rows=None)[1]
        for pace in (0.3, 0.2)
    ]
    row, _ = make_row("lim", LOAD, run_of(at_pace(0.1), at_pace(0.1)), dense=dense, sparse_rows=1)
    assert row.speedup == pytest.approx(2.0, rel=0.02)


def test_a_run_without_a_decoded_token_is_no_row() -> None:
    with pytest.raises(LimError, match="lim, 2 requests: too few tokens came"):
        make_row("lim", LOAD, run_of(at_pace(1, 1), Stream()), dense=[], sparse_rows=None)


CONDITIONS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.95",
    "commit": "c0ffee",
    "versions": {"torch": "2.11.0", "sglang": "0.5.16"},
    "prompt_tokens": 200,
    "new_tokens": 8192,
    "notes": ["first chunks are not counted"],
}


def test_a_json_line_holds_the_row_over_time_and_its_conditions() -> None:
    line = json.loads(json_line(row_of(speedup=1.5), CONDITIONS))
    assert line["conditions"] == CONDITIONS
    row = line["serve"]
    assert (row["policy"], row["concurrency"], row["speedup"]) == ("lim", 2, 1.5)
    assert row["itl_ms"]["p99"] == pytest.approx(100.0)
    assert row["bins"][0]["occupancy"] == {
        "running": 2,
        "waiting": 0,
        "kv_tokens": 500,
        "kv_share": 0.5,
    }


def test_a_json_line_holds_the_figures_of_a_timeline_and_not_its_picture() -> None:
    row = json.loads(json_line(profiled_row(), CONDITIONS))["serve"]
    assert "strip" not in row
    assert row["timeline_error"] is None
    assert set(row["timeline"]) == set(Timeline.__dataclass_fields__)
    assert row["timeline"]["busy_share"] == pytest.approx(0.98)
    assert len(json.dumps(row["timeline"])) < 500
    failed = json.loads(json_line(row_of(timeline_error="no trace"), CONDITIONS))["serve"]
    assert (failed["timeline"], failed["timeline_error"]) == (None, "no trace")


def test_a_timeline_is_one_line_of_text() -> None:
    assert timeline_line(row_of()) is None
    start = (
        "lim, 2 requests: GPU busy 98.0 % over 10 steps of 1,000 \N{MICRO SIGN}s, "
        "20 \N{MICRO SIGN}s idle a step (20 between replays), "
        "longest gap of a step 20 \N{MICRO SIGN}s (p99 20), largest 20"
    )
    row = profiled_row()
    ahead = ", launched 500 \N{MICRO SIGN}s ahead (at least 500)"
    assert timeline_line(row) == start + ahead
    assert row.timeline
    without = replace(row.timeline, ahead_p50_us=None, ahead_least_us=None)
    assert timeline_line(replace(row, timeline=without)) == start


def test_a_table_line_says_whether_the_run_was_cut() -> None:
    shown = cells(row_of(speedup=1.5, cut=True, waiting=3, retractions=4))
    assert shown[:6] == ["2", "lim", "20", "1.50", "100.00", "100.00"]
    assert shown[6:] == ["80 %", "3", "4", "8.0", "cut"]
    assert cells(row_of(kv_share=None))[3:7:3] == ["-", "-"]
    assert cells(row_of())[-1] == "whole"
    assert one_line(row_of(cut=True, speedup=1.5)).endswith(
        "20 tokens/s, 1.50 x, 100.00 ms a token (p99 100.00), 8.0 s, cut"
    )


def test_the_table_fits_and_groups_by_concurrency() -> None:
    console = Console(width=160, record=True, quiet=True)
    rows = [row_of(), row_of(concurrency=64), row_of(policy="flashinfer")]
    table = make_table(rows, title="qwen3-8b")
    assert console.measure(table).maximum <= 160
    assert list(table.columns[0].cells) == ["2", "2", "64"]
    assert "8,192 new ones a request; first chunks are not counted" in under_table(CONDITIONS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"waiting": 3}, "up to 3 waited and 0 retractions"),
        ({"retractions": 5}, "up to 0 waited and 5 retractions"),
        ({"client_share": 0.9}, "client took 90 % of a core"),
        ({"timeline_error": "no trace"}, "lim, 2 requests: no timeline: no trace"),
    ],
)
def test_what_makes_a_row_doubtful_is_said(fields: dict[str, Any], words: str) -> None:
    (warning,) = warnings([row_of(), row_of(**fields)])
    assert words in warning
