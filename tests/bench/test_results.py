"""Rows of decode steps: as JSON lines, in tables, in the README."""

import json
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.bench.results import SECTION, DecodeTable, point_name, read_tables
from lim_sglang.bench.workloads import Point
from lim_sglang.errors import ConfigError, DataError
from tests.bench.recorded import CONDITIONS, LINES, line, row, table, write

ROOT = Path(__file__).parents[2]
TIMES, DOT = "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}"


def cells(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without the rule under the titles."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines if "---" not in line]


@pytest.mark.parametrize(("point", "context"), [("8x32k", 32768), ("4x32k+4x1k", None)])
def test_a_json_line_holds_the_row_and_its_conditions(point: str, context: int | None) -> None:
    found = json.loads(row("lim", point).to_json(CONDITIONS))
    assert (found["batch"], found["context"], found["backend"]) == (8, context, "lim")
    assert found["step_ms"] == {"median": 10.0, "low": 9.9, "high": 10.2}
    assert found["split"]["selection_ms"] == 0.25
    assert (found["sparse_rows"], found["limit_share"], found["kernel_launches"]) == (8, 0.8, 518)
    assert found["conditions"] == CONDITIONS


def test_a_recorded_row_is_read_as_it_was_measured(tmp_path: Path) -> None:
    measured = [row("lim", "4x32k+4x1k"), row("flashinfer", "4x32k+4x1k", 20.0)]
    found = table(tmp_path, *(json.loads(each.to_json(CONDITIONS)) for each in measured))
    assert list(found.rows.values()) == measured
    assert found == DecodeTable.of([(each, CONDITIONS) for each in measured])


def test_a_row_in_one_line_has_every_part() -> None:
    assert row("lim").describe() == (
        "8x32768 lim: 10.000 ms a step (9.900 - 10.200), graph 9.700, 518 kernels, dense 1.500, "
        "selection 0.250, sparse 1.000, rest 7.250, 80 % of the byte limit"
    )
    assert row("triton", share=1.12).describe().endswith("518 kernels, 112 % (!) of the byte limit")


def test_the_table_is_by_batch_then_context_with_a_dash_for_a_missing_row(tmp_path: Path) -> None:
    mixed = line("lim", "4x32k+4x1500", 8.0), line("flashinfer", "4x32k+4x1500", 12.0)
    found = table(tmp_path, *mixed, *LINES)
    assert cells(found.section(found.points)) == [
        [
            f"decode step, B {TIMES} S",
            "dense FlashInfer, ms",
            "dense FlashAttention 3, ms",
            "LessIsMore, ms",
            "speed-up",
            f"of the byte limit, dense {DOT} LessIsMore",
        ],
        [f"1 {TIMES} 32K", "8.40", "-", "7.00", "1.20", f"80 % {DOT} 80 %"],
        [f"8 {TIMES} 1,500", "-", "-", "7.50", "-", f"- {DOT} 80 %"],
        [f"8 {TIMES} 32K", "20.00", "19.00", "10.00", "1.90", f"120 % (!) {DOT} 75 %"],
        [f"4 {TIMES} 32K + 4 {TIMES} 1,500", "12.00", "-", "8.00", "1.50", f"80 % {DOT} 80 %"],
    ]


def test_dense_with_our_layers_is_a_dense_backend(tmp_path: Path) -> None:
    """So that the smaller speed-up is the one that is shown."""
    times = {"lim": 10.0, "flashinfer": 20.0, "flashinfer+layers": 18.0}
    found = table(tmp_path, *(line(name, "8x32k", ms) for name, ms in times.items()))
    head, row_of_8 = cells(found.section(found.points))
    assert head[1:3] == ["dense FlashInfer, ms", "dense FlashInfer with our layers, ms"]
    assert row_of_8[1:5] == ["20.00", "18.00", "10.00", "1.80"]


def test_the_order_of_files_and_lines_changes_nothing_and_days_are_named(tmp_path: Path) -> None:
    first, second = write(tmp_path, *LINES[:3]), write(tmp_path, *LINES[3:], name="more.jsonl")
    (found,), (again,) = read_tables([first, second]), read_tables([second, first])
    assert found.section(found.points) == again.section(again.points)
    later = line("lim", "1x1k", date="2026-11-25T01:00:00+00:00")
    assert "on 2026-11-24 to 2026-11-25, commit" in table(tmp_path, later, *LINES).describe()


def test_the_proof_is_of_the_longest_contexts_and_tells_the_range(tmp_path: Path) -> None:
    steps = {"1x32k": 8.4, "8x1k": 10.0, "4x32k+4x1k": 12.0}
    steps |= {f"{batch}x32k": 20.0 + batch for batch in (2, 8, 11)}
    lines = [line("flashinfer", point, step_ms) for point, step_ms in steps.items()]
    proof = table(tmp_path, *lines, *(line("lim", point) for point in steps)).proof()
    assert [cells[0] for cells in cells(proof)[1:]] == [f"{n} {TIMES} 32K" for n in (1, 8, 11)]
    assert proof.endswith(f"Speed-up over 6 points: 0.84 (1 {TIMES} 32K) to 3.10 (11 {TIMES} 32K).")
    with pytest.raises(DataError, match="nothing to compare"):
        table(tmp_path, line("lim")).proof()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "qwen3-8b shape, dummy weights, NVIDIA H100 80GB HBM3, budget 2,048; B requests"),
        ({}, "on 2026-11-24, commit c0ffee0123, driver 580.95, torch 2.11.0, Triton 3.6.0"),
        ({}, "medians of 7 windows of 20 steps"),
        ({"quantization": "fp8"}, "dummy weights, weights in fp8, NVIDIA"),
        ({"kv_dtype": "torch.float8_e4m3fn"}, "dummy weights, KV cache in float8_e4m3fn, NVIDIA"),
        ({"lim_config": {"ranking": "mass"}}, "budget 2,048, tokens ranked by mass; B"),
        ({"commit": "0123456789abcdef+d61e43"}, "commit 0123456789 with local edits d61e43,"),
        ({"commit": None}, "commit unknown,"),
        ({"model": "/models/x", "dummy_weights": False}, "/models/x, NVIDIA"),
        ({"tp": 2}, f"weights, 2 {TIMES} NVIDIA H100 80GB HBM3 (tensor parallelism), budget"),
        ({"tp": 2}, "byte limit of one GPU's bytes at the measured copy speed"),
    ],
)
def test_below_a_table_stand_its_conditions(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    assert words in table(tmp_path, line("lim", **changed)).describe()


OTHER = {
    "commit": "deadbeef",
    "gpu": "NVIDIA H200",
    "model": "qwen3-4b",
    "budget": 512,
    "lim_config": {"sinks": 9},
    "roles": ["full"] * 4,
    "kv_dtype": "torch.float8_e5m2",
    "quantization": "fp8",
    "versions": {"torch": "2.12.0"},
    "dummy_weights": False,
    "tp": 2,
}


@pytest.mark.parametrize("name", OTHER)
def test_rows_of_other_conditions_are_in_a_table_of_their_own(tmp_path: Path, name: str) -> None:
    lines = line("lim"), line("flashinfer"), line("lim", "1x32k", **{name: OTHER[name]})
    first, second = read_tables([write(tmp_path, *lines)])
    assert [len(first.rows), len(second.rows)] == [2, 1]


def test_rows_of_before_there_was_tensor_parallelism_are_of_one_gpu(tmp_path: Path) -> None:
    old = line("flashinfer")
    del old["conditions"]["tp"]
    assert len(table(tmp_path, line("lim"), old).rows) == 2


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no row; record some"),
        ([line("flashinfer")], "no row is of lim"),
        ([line("lim"), line("lim")], "8x32768 lim is recorded twice"),
        ([line("lim"), line("lim") | {"backend": "vllm"}], "line 2 is no row of"),
        ([{"kv_capacity": {"lim": 5}, "conditions": CONDITIONS}], "line 1 is no row of"),
        (["median 10 ms"], "line 1 is no row of"),
        ([line("lim") | {"point": "0x5"}], "line 1 is no row of"),
        ([line("lim") | {"point": 5}], "line 1 is no row of"),
        ([line("lim") | {"conditions": {"commit": "x"}}], "line 1 is no row of"),
    ],
)
def test_lines_that_make_no_table_are_refused(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_tables([write(tmp_path, *lines)])


def test_a_file_that_does_not_exist_is_a_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: name a file"):
        read_tables([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match="cannot be read"):
        read_tables([tmp_path])


@pytest.mark.parametrize(
    ("name", "point", "expected"),
    [
        ("decode", "11x32k", ["24.75", "26.62", "10.14", "2.44", "91 % · 78 %"]),
        ("decode", "4x32k+4x1k", ["13.66", "20.71", "8.35", "1.64", "85 % · 75 %"]),
        ("decode-fp8", "11x32k", ["18.26", "7.78", "2.35", "63 % · 54 %"]),
        ("decode-mass", "8x32k", ["19.81", "9.16", "2.16", "90 % · 78 %"]),
        ("decode-qwen3-1.7b", "128x3k", ["18.00", "23.93", "14.06", "1.28", "89 % · 84 %"]),
        ("decode-within-budget", "1x2k", ["6.78", "7.35", "6.73", "1.01", "75 % · 76 %"]),
    ],
)
def test_committed_rows_give_the_published_figures(
    name: str, point: str, expected: list[str]
) -> None:
    (found,) = read_tables([ROOT / f"docs/measured/2026-11-26-h100-{name}.jsonl"])
    rows = {cells[0]: cells[1:] for cells in cells(found.section(found.points))}
    assert rows[point_name(Point.parse(point))] == expected


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_project_has_a_place_for_the_table(name: str) -> None:
    assert "| new |" in SECTION.replace((ROOT / name).read_text(), "| new |", name)
