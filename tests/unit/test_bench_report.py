"""The README's table and the plot, from recorded rows."""

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lim_sglang.bench.command import bench
from lim_sglang.bench.decode_section import BEGIN, END, make_section, replace_section
from lim_sglang.bench.points import Point
from lim_sglang.bench.recorded import Recorded, read_recorded
from lim_sglang.bench.roofline import MARK, draw
from lim_sglang.errors import DataError

CONDITIONS: dict[str, Any] = {
    "date": "2026-11-24T19:09:16+00:00",
    "commit": "c0ffee0123456789abcdef",
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.95",
    "versions": {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "flashinfer-python": "0.6.14",
        "sglang": "0.5.16",
    },
    "model": "qwen3-8b",
    "dummy_weights": True,
    "lim_config": {"policy": "lessismore", "budget": 2048},
    "budget": 2048,
    "roles": ["full", "select", "reuse", "reuse"],
    "kv_dtype": "torch.bfloat16",
    "copy_gb_per_s": 3000.0,
    "weight_bytes_read": 15_000_000_000,
    "kv_bytes_per_token_and_layer": 4096,
    "windows": 7,
    "steps": 20,
}


def line(
    backend: str, point: str = "8x32k", step_ms: float = 10.0, share: float = 0.8, **changed: Any
) -> dict[str, Any]:
    """One row as `lim bench decode --out` writes it, as far as it is read."""
    where = Point.parse(point)
    return {
        "batch": where.batch,
        "context": where.context,
        "backend": backend,
        "step_ms": {"median": step_ms, "low": step_ms, "high": step_ms},
        "limit_share": share,
        "conditions": CONDITIONS | changed,
    }


def write(folder: Path, *lines: Any, name: str = "decode.jsonl") -> Path:
    """A file of recorded lines."""
    path = folder / name
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return path


def recorded(folder: Path, *lines: Any) -> Recorded:
    """What is read of them."""
    return read_recorded([write(folder, *lines)])


ROWS = (
    line("lim", "8x32k", 10.0, 0.75),
    line("flashinfer", "8x32k", 20.0, 0.9),
    line("lim", "1x32k", 7.0),
    line("flashinfer", "1x32k", 8.4),
    line("fa3", "8x32k", 19.0, 1.2),
    line("lim", "8x1500", 7.5),
)


def test_the_table_is_by_batch_then_context_with_a_dash_for_what_is_missing(
    tmp_path: Path,
) -> None:
    table = make_section(recorded(tmp_path, *ROWS)).split("\n\n")[0].splitlines()
    assert table[0].split(" | ")[1:5] == [
        "dense FlashInfer, ms",
        "dense FlashAttention 3, ms",
        "LessIsMore, ms",
        "speed-up",
    ]
    times, dot = "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}"
    assert table[2:] == [
        f"| 1 {times} 32K | 8.40 | - | 7.00 | 1.20 | 80 % {dot} 80 % |",
        f"| 8 {times} 1,500 | - | - | 7.50 | - | - {dot} 80 % |",
        f"| 8 {times} 32K | 20.00 | 19.00 | 10.00 | 1.90 | 120 % (!) {dot} 75 % |",
    ]


def test_the_order_of_files_and_lines_changes_nothing(tmp_path: Path) -> None:
    first, second = write(tmp_path, *ROWS[:3]), write(tmp_path, *ROWS[3:], name="more.jsonl")
    section = make_section(read_recorded([first, second]))
    assert make_section(read_recorded([second, first])) == section
    assert make_section(recorded(tmp_path, *reversed(ROWS))) == section


def test_below_the_table_stand_the_conditions(tmp_path: Path) -> None:
    later = line("flashinfer", date="2026-11-25T01:00:00+00:00")
    text = make_section(recorded(tmp_path, line("lim"), later)).split("\n\n")[1]
    for words in ("qwen3-8b shape, dummy weights, NVIDIA H100", "budget 2,048", "3,000 GB/s"):
        assert words in text
    assert "on 2026-11-24 to 2026-11-25, commit c0ffee0123, driver 580.95, torch 2.11.0" in text
    assert "medians of 7 windows of 20 steps" in text


@pytest.mark.parametrize(
    ("commit", "shown"),
    [
        ("0123456789abcdef+d61e43b333", "commit 0123456789 with local edits d61e43b333,"),
        (None, "commit unknown,"),
    ],
)
def test_code_that_no_commit_holds_is_told(tmp_path: Path, commit: str | None, shown: str) -> None:
    assert shown in make_section(recorded(tmp_path, line("lim", commit=commit)))


def test_real_weights_are_no_dummy_shape(tmp_path: Path) -> None:
    text = make_section(recorded(tmp_path, line("lim", model="/models/x", dummy_weights=False)))
    assert "\n\n/models/x, NVIDIA" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"commit": "deadbeef"}, "different commits (c0ffee0123456789abcdef, deadbeef): report"),
        ({"gpu": "NVIDIA H200"}, "different GPUs (NVIDIA H100 80GB HBM3, NVIDIA H200): report"),
        ({"model": "qwen3-4b"}, "different models (qwen3-8b, qwen3-4b): report"),
        ({"commit": "x", "gpu": "y"}, "0123456789abcdef, x) and GPUs (NVIDIA"),
        ({"budget": 512}, "budgets (2048, 512)"),
        ({"lim_config": {"sinks": 9}}, "settings of LessIsMore ("),
        ({"roles": ["full"] * 4}, "schedules ("),
        ({"kv_dtype": "torch.float8_e5m2"}, "dtypes of the KV cache"),
        ({"versions": {"torch": "2.12.0"}}, "different versions: report"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused_in_one_sentence(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        recorded(tmp_path, line("lim"), line("flashinfer"), line("lim", "1x32k", **changed))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no row; record some"),
        ([line("flashinfer")], "no row is of lim"),
        ([line("lim"), line("lim")], "8x32768 lim is recorded twice"),
        ([{"kv_capacity": {"lim": 5}, "conditions": CONDITIONS}], "line 1 is no row of"),
        ([line("lim"), line("vllm")], "line 2 is no row of"),
        ([["lim"]], "line 1 is no row of"),
        ([line("lim") | {"conditions": {"commit": "x"}}], "line 1 does not say gpu, driver"),
    ],
)
def test_what_is_no_recorded_row_is_refused(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        recorded(tmp_path, *lines)
    assert words in str(caught.value)


def test_a_missing_file_and_one_that_is_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_recorded([tmp_path / "none.jsonl"])
    (tmp_path / "log.jsonl").write_text("median 10 ms\n")
    with pytest.raises(DataError, match=r"log.jsonl, line 1 is no row"):
        read_recorded([tmp_path / "log.jsonl"])


BEFORE, AFTER = "# Title\n\ntext\n\n", "\n\nmore | text |\n"


def test_only_the_text_between_the_markers_is_replaced() -> None:
    text = f"{BEFORE}{BEGIN}\n| old |\n{END}{AFTER}"
    once = replace_section(text, "| new |", "README.md")
    assert once == f"{BEFORE}{BEGIN}\n| new |\n{END}{AFTER}"
    assert replace_section(once, "| new |", "README.md") == once


@pytest.mark.parametrize(
    "text",
    ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}", f"{BEGIN}\n{BEGIN}\n{END}"],
)
def test_markers_that_are_missing_twofold_or_swapped_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"README.md needs one line <!-- lim bench decode: begin"):
        replace_section(text, "| new |", "README.md")


def test_the_readme_has_a_place_for_the_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert "| new |" in replace_section(text, "| new |", "README.md")


def report(*words: Any) -> Any:
    """What the command does."""
    return CliRunner().invoke(bench, ["report", *map(str, words)])


def test_the_command_updates_the_file_and_draws_beside_it(tmp_path: Path) -> None:
    file, readme = write(tmp_path, *ROWS), tmp_path / "README.md"
    readme.write_text(f"{BEFORE}{BEGIN}\n{END}{AFTER}")
    plot = tmp_path / "docs" / "decode.svg"
    done = report(file, "--update", readme, "--plot", plot)
    assert done.exit_code == 0, done.exception
    text = readme.read_text()
    assert text.startswith(BEFORE)
    assert text.endswith(AFTER)
    assert "(docs/decode.svg)" in text
    assert plot.read_text() == draw(read_recorded([file]))


def test_without_a_file_to_update_the_table_is_printed(tmp_path: Path) -> None:
    done = report(write(tmp_path, *ROWS))
    assert done.output.startswith("| decode step")


def test_a_refusal_writes_nothing(tmp_path: Path) -> None:
    readme, plot = tmp_path / "README.md", tmp_path / "decode.svg"
    readme.write_text("no markers")
    done = report(write(tmp_path, *ROWS), "--update", readme, "--plot", plot)
    assert isinstance(done.exception, DataError)
    assert readme.read_text() == "no markers"
    assert not plot.exists()


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
