"""Rows of a benchmark: compared, shown and kept."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from lim_sglang.bench.limit import StepSplit
from lim_sglang.bench.points import Point
from lim_sglang.bench.rows import (
    Row,
    append_lines,
    cells,
    json_line,
    limit_warnings,
    make_table,
    one_line,
    under_table,
    with_speedups,
)
from lim_sglang.kernels.bench import Spread

SPLIT = StepSplit(dense_ms=1.5, selection_ms=0.25, sparse_ms=1.0, rest_ms=7.25)
CONDITIONS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.95",
    "commit": "c0ffee",
    "copy_gb_per_s": 3028.0,
    "kv_capacity": 391234,
    "kv_dtype": "torch.bfloat16",
    "quantization": "none",
    "mem_fraction_static": 0.88,
    "windows": 7,
    "steps": 20,
    "versions": {"torch": "2.11.0", "sglang": "0.5.16"},
    "notes": ["no prefill"],
}


def row(
    backend: str,
    step_ms: float,
    split: StepSplit | None = None,
    limit_share: float = 0.615,
    point: str = "8x32k",
) -> Row:
    """A row at 8 x 32K, or elsewhere."""
    return Row(
        point=Point.parse(point),
        backend=backend,
        step_ms=Spread(step_ms, step_ms - 0.1, step_ms + 0.2),
        replay_ms=Spread(step_ms - 0.3, 0.0, 0.0),
        sparse_rows=8 if backend == "lim" else None,
        num_bytes=10**10,
        limit_share=limit_share,
        kernel_launches=1234 if split else None,
        split=split,
    )


def test_a_spread_is_the_median_and_the_reach() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([4.0, 2.0]).median == 3.0


def test_speed_is_compared_with_the_fastest_dense_backend() -> None:
    rows = with_speedups([row("lim", 10.0), row("flashinfer", 21.0), row("triton", 30.0)])
    assert [each.speedup for each in rows] == [2.1, 1.0, 0.7]


def test_without_a_dense_backend_nothing_is_compared() -> None:
    assert with_speedups([row("lim", 10.0)])[0].speedup is None


def test_tokens_per_second_are_those_of_the_whole_batch() -> None:
    assert row("lim", 10.0).tokens_per_s == pytest.approx(800)


def test_a_json_line_holds_the_row_and_its_conditions() -> None:
    line = json.loads(json_line(row("lim", 10.0, SPLIT), CONDITIONS))
    assert (line["batch"], line["context"], line["backend"]) == (8, 32768, "lim")
    assert line["point"] == "8x32768"
    assert line["step_ms"] == {"median": 10.0, "low": 9.9, "high": 10.2}
    assert line["split"]["selection_ms"] == 0.25
    assert line["sparse_rows"] == 8
    assert line["tokens_per_s"] == 800
    assert (line["limit_share"], line["over_limit"]) == (0.615, False)
    assert line["kernel_launches"] == 1234
    assert line["conditions"] == CONDITIONS


def test_lines_are_added_to_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    append_lines(out, ["{}"])
    append_lines(out, ["[]"])
    assert out.read_text() == "{}\n[]\n"


def test_a_table_line_has_every_part() -> None:
    shown = cells(with_speedups([row("lim", 10.0, SPLIT), row("flashinfer", 21.0)])[0], 2048)
    assert shown[:4] == ["8", "32,768", "2,048", "lim"]
    assert shown[4:8] == ["10.000", "9.900 - 10.200", "9.700", "2.10"]
    assert shown[8:] == ["1.500", "0.250", "1.000", "7.250", "1,234", "800", "62 %"]


def test_a_mixed_batch_is_named_by_its_groups() -> None:
    mixed = row("lim", 10.0, point="4x32k+4x1k")
    assert cells(mixed, 2048)[:4] == ["4+4", "32,768+1,024", "2,048", "lim"]
    assert one_line(mixed).startswith("4x32768+4x1024 lim: 10.000 ms a step")
    line = json.loads(json_line(mixed, CONDITIONS))
    assert (line["point"], line["batch"], line["context"]) == ("4x32768+4x1024", 8, None)
    assert line["tokens_per_s"] == 800


def test_what_was_not_measured_is_a_dash() -> None:
    shown = cells(row("triton", 10.0), 2048)
    assert shown[2] == "-"
    assert shown[7:13] == ["-"] * 6


def test_the_table_fits_into_160_columns() -> None:
    console = Console(width=160, record=True, file=None, force_terminal=False, quiet=True)
    rows = [
        row("lim", 10.0, SPLIT, point="4x32k+4x1k"),
        row("flashinfer", 21.0, SPLIT, limit_share=1.12),
    ]
    table = make_table(rows, title="qwen3-8b", budget=2048)
    assert console.measure(table).maximum <= 160


def test_below_the_table_stand_the_conditions() -> None:
    text = under_table(CONDITIONS)
    for words in ("H100", "580.95", "c0ffee", "3,028 GB/s", "391,234 tokens", "0.88"):
        assert words in text
    assert "391,234 tokens of bfloat16 at mem_fraction_static 0.88, weights not quantized" in text
    eight_bits = CONDITIONS | {"kv_dtype": "torch.float8_e4m3fn", "quantization": "fp8"}
    text = under_table(eight_bits)
    assert "tokens of float8_e4m3fn at mem_fraction_static 0.88, weights in fp8" in text
    assert "median of 7 windows of 20 steps; no prefill" in text
    assert "torch 2.11.0, triton None" in text


def test_a_row_is_one_line_while_the_rest_is_measured() -> None:
    rows = with_speedups([row("lim", 10.0), row("flashinfer", 21.0)])
    expected = "8x32768 lim: 10.000 ms a step (9.900 - 10.200), 2.10 x, 62 % of the limit"
    assert one_line(rows[0]) == expected


def test_a_step_faster_than_its_bytes_is_marked_wherever_it_is_shown() -> None:
    fine, impossible = row("lim", 10.0), row("flashinfer", 19.7, limit_share=1.12)
    assert json.loads(json_line(impossible, CONDITIONS))["over_limit"] is True
    assert cells(impossible, 2048)[-1] == "112 % (!)"
    assert one_line(impossible).endswith("112 % (!) of the limit")
    (warning,) = limit_warnings([fine, impossible])
    assert "8x32768 flashinfer is at 112 % (!) of the byte limit, which cannot be" in warning
