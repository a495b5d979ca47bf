"""`lim bench kernel`: its cases are checked before they are timed, its rows have bandwidths."""

import json
from typing import Any

import pytest
import torch

from lim_sglang.bench import kernel
from lim_sglang.bench.kernel import OpRow, check_case, measure_ops, op_table
from lim_sglang.errors import ConfigError, LimError
from lim_sglang.kernels.bench import OpTiming, Spread, StepShape
from lim_sglang.kernels.verify import Batch

CASE = StepShape(8, 32768, 32, 8, 128, 2048)


@pytest.mark.parametrize(
    ("op", "changed", "words"),
    [
        ("sort", {}, "unknown --op sort; known: score, shortlist"),
        ("score", {"context": 100}, "--context 100 is within --budget 2048"),
        ("score", {"heads": 9, "dim": 96}, "no multiple of --kv-heads 8; --dim 96 is no power"),
        ("sparse-attention-cuda-cores", {"heads": 56}, "takes 1, 2, 3, 4, 8 query heads per KV"),
        ("sparse-attention-tensor-cores", {"dim": 32}, "takes --dim 64, 128, 256, not 32"),
        ("sparse-attention", {"dim": 1024}, "takes --dim 512 or less, not 1024"),
        ("run-attention", {"dim": 32}, "takes --dim 64, 128, 256, not 32"),
        ("run-attention", {"width": 17}, "takes --width 16 or less with 4 query heads per KV head"),
        ("run-attention-flashinfer", {"width": 40_000}, "is more than --context 32768"),
    ],
)
def test_a_case_without_a_kernel_is_refused(op: str, changed: dict[str, int], words: str) -> None:
    fields = {"batch": 8, "context": 32768, "heads": 32, "kv_heads": 8, "dim": 128, "budget": 2048}
    with pytest.raises(ConfigError) as caught:
        check_case(StepShape(**(fields | changed)), [op])
    assert words in str(caught.value)
    check_case(CASE, [])


@pytest.mark.parametrize(
    ("batch", "context", "rows"), [(8, 32768, 2), (1, 32768, 1), (8, 800_000, 1)]
)
def test_the_case_itself_is_checked_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, batch: int, context: int, rows: int
) -> None:
    checked: list[Batch] = []

    def differences(batch: Batch, device: str) -> list[str]:
        assert device == "cuda"
        checked.append(batch)
        return ["row 1 of 32768 tokens keeps another set"]

    monkeypatch.setattr(kernel, "require_exact_kernels", lambda: None)
    monkeypatch.setattr(kernel, "selection_differences", differences)
    with pytest.raises(LimError, match=r"no time .* not exact on this case:\n  - row 1 of 32768"):
        next(measure_ops(["score"], StepShape(batch, context, 40, 10, 64, 1000), 1))
    assert checked == [Batch((context,) * rows, 40, 10, 64, 1000, dtype=torch.bfloat16)]


@pytest.mark.parametrize(
    ("num_bytes", "gb_per_s", "share", "cells"),
    [(100_000_000, 2000.0, 2 / 3, "| 2,000 | 67 % |"), (None, None, None, "| - | - |")],
)
def test_a_row_has_a_bandwidth_where_bytes_are_necessary(
    num_bytes: int | None, gb_per_s: Any, share: Any, cells: str
) -> None:
    timing = OpTiming(Spread(50.0, 49.0, 52.0), Spread(40.0, 39.0, 41.0), num_bytes)
    row = OpRow("score", timing, 3000.04)
    line = json.loads(row.to_json(CASE, 30))
    assert line["gb_per_s"] == pytest.approx(gb_per_s)
    assert line["copy_share"] == pytest.approx(share, abs=1e-4)
    assert (line["op"], line["case"]["dtype"]) == ("score", "torch.bfloat16")
    assert (line["conditions"]["repeats"], line["conditions"]["copy_gb_per_s"]) == (30, 3000.0)
    assert line["cold_us"] == {"median": 50.0, "low": 49.0, "high": 52.0}
    shown = op_table([row]).splitlines()[-1]
    assert shown == f"| score | 50.0 | 49.0 - 52.0 | 40.0 | 39.0 - 41.0 {cells}"
