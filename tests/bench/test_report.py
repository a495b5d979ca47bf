"""The README's table and the plot, from recorded rows."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lim_sglang.bench.command import bench
from lim_sglang.bench.decode_section import PART, make_section
from lim_sglang.bench.recorded import read_recorded
from lim_sglang.bench.roofline import draw
from lim_sglang.errors import DataError
from tests.bench.recorded_rows import CONDITIONS, ROWS, line, recorded, write


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


def test_a_mixed_batch_is_in_the_table_after_the_others_and_not_in_the_plot(
    tmp_path: Path,
) -> None:
    mixed = line("lim", "4x32k+4x1500", 8.0), line("flashinfer", "4x32k+4x1500", 12.0)
    found = recorded(tmp_path, *mixed, *ROWS)
    times, dot = "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}"
    rows = make_section(found).split("\n\n")[0].splitlines()
    shown = f"| 4 {times} 32K + 4 {times} 1,500 | 12.00 | - | 8.00 | 1.50 | 80 % {dot} 80 % |"
    assert rows[-1] == shown
    assert rows[:-1] == make_section(recorded(tmp_path, *ROWS)).split("\n\n")[0].splitlines()
    assert draw(found) == draw(recorded(tmp_path, *ROWS))


def test_rows_without_a_point_are_read_as_before(tmp_path: Path) -> None:
    old = [{name: value for name, value in row.items() if name != "point"} for row in ROWS]
    assert recorded(tmp_path, *old) == recorded(tmp_path, *ROWS)


def test_formats_of_eight_bits_stand_with_the_model_s_name(tmp_path: Path) -> None:
    changed = {"quantization": "fp8", "kv_dtype": "torch.float8_e4m3fn"}
    found = recorded(tmp_path, line("lim", **changed), line("flashinfer", **changed))
    shown = "weights in fp8, KV cache in float8_e4m3fn, NVIDIA H100"
    assert f"qwen3-8b shape, dummy weights, {shown}" in make_section(found)
    assert f"Decode step, qwen3-8b, {shown}" in draw(found)


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
        ({"quantization": "fp8"}, "different quantizations of the weights (none, fp8): report"),
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
        ([line("lim") | {"point": "0x5"}], "line 1 is no row of"),
        ([line("lim") | {"point": 5}], "line 1 is no row of"),
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


def test_the_readme_has_a_place_for_the_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert "| new |" in PART.replace(text, "| new |", "README.md")


def report(*words: Any) -> Any:
    """What the command does."""
    return CliRunner().invoke(bench, ["report", *map(str, words)])


def test_the_command_updates_the_file_and_draws_beside_it(tmp_path: Path) -> None:
    file, readme = write(tmp_path, *ROWS), tmp_path / "README.md"
    readme.write_text(f"{BEFORE}{PART.begin}\n{PART.end}{AFTER}")
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
