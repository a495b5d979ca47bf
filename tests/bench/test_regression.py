"""`lim bench regress`: pairs of rows, verdicts, the exit code."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lim_sglang.bench.commands import bench
from lim_sglang.bench.regression import Change, Verdict, find_changes
from lim_sglang.bench.workloads import Point
from lim_sglang.errors import DataError
from lim_sglang.kernels.bench import Spread
from tests.bench.recorded import line, write


def regress(old: Path, new: Path, *words: str) -> tuple[bool, str]:
    """Run the command; return True if it passed, and its output."""
    result = CliRunner().invoke(bench, ["regress", str(old), str(new), *words])
    assert result.exception is None or isinstance(result.exception, DataError)
    return result.exception is None, result.output


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (Spread(10.0, 9.9, 10.1), Spread(10.19, 10.15, 10.3), Verdict.SAME),
        (Spread(10.0, 9.9, 10.1), Spread(10.21, 10.15, 10.3), Verdict.SLOWER),
        (Spread(10.0, 9.9, 10.16), Spread(10.21, 10.15, 10.3), Verdict.UNCLEAR),
        (Spread(10.0, 9.9, 10.1), Spread(9.81, 9.7, 9.9), Verdict.SAME),
        (Spread(10.0, 9.9, 10.1), Spread(9.79, 9.7, 9.9), Verdict.FASTER),
    ],
)
def test_a_verdict_needs_two_percent_and_windows_apart(
    old: Spread, new: Spread, verdict: Verdict
) -> None:
    assert Change("m", Point.parse("8x32k"), "lim", old, new).verdict(0.02) is verdict


def test_a_slower_policy_fails_and_a_slower_dense_backend_does_not(tmp_path: Path) -> None:
    old = write(tmp_path, line("lim"), line("quest"), line("flashinfer"), name="old.jsonl")
    same = write(tmp_path, line("lim"), line("flashinfer", step_ms=12.0), name="same.jsonl")
    slow = write(tmp_path, line("lim"), line("quest", step_ms=11.0), name="slow.jsonl")
    passed, shown = regress(old, same)
    assert passed
    assert "flashinfer | 10.000 (9.900 to 10.200) | 12.000 (11.900 to 12.200) | +20.0 |" in shown
    passed, shown = regress(old, slow)
    assert not passed
    assert "quest | 10.000 (9.900 to 10.200) | 11.000 (10.900 to 11.200) | +10.0 | SLOWER" in shown
    assert regress(old, slow, "--most", "10.5")[0]
    assert regress(slow, old)[0]  # faster


def test_rows_are_paired_by_all_conditions_but_the_code(tmp_path: Path) -> None:
    code: dict[str, Any] = {"commit": "other", "versions": {"torch": "3"}}
    newest = line("lim", step_ms=9.0, date="2026-11-26T00:00:00+00:00", **code)
    old = write(tmp_path, newest, line("lim", step_ms=8.0), name="old.jsonl")
    new = write(tmp_path, line("lim"), line("lim", "1x1k"), name="new.jsonl")
    (found,) = find_changes(old, new)
    assert (found.old.median, found.new.median) == (9.0, 10.0)
    for condition in ({"gpu": "NVIDIA H200"}, {"budget": 7}, {"kv_dtype": "torch.float8_e4m3fn"}):
        other = write(tmp_path, line("lim", **condition), name="other.jsonl")
        with pytest.raises(DataError, match="no step in common"):
            find_changes(old, other)
