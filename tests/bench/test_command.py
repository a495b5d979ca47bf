"""`lim bench` on a machine without a GPU: what it refuses, and in which words."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lim_sglang import compat
from lim_sglang.bench import capacity, command, kernel
from lim_sglang.bench import runner as runner_module
from lim_sglang.bench.capacity import Capacity
from lim_sglang.bench.command import bench
from lim_sglang.bench.launches import ListedGraph
from lim_sglang.bench.points import DecodeOptions, Point, Precision
from lim_sglang.bench.runner import check_backends, make_contender, with_backend
from lim_sglang.errors import ConfigError, LimError, ServerError
from lim_sglang.kernels.bench import OpTiming, Spread, StepShape, TimedOp, prepare
from lim_sglang.kernels.verify import Batch

CASE = StepShape(8, 32768, 32, 8, 128, 2048)


def run(*words: str) -> Any:
    """What a command does."""
    return CliRunner().invoke(bench, list(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decode", "--point", "8x32k"), "either --shape"),
        (("decode", "--shape", "qwen3-8b"), "at least one point"),
        (("decode", "--shape", "qwen9", "--point", "1x1k"), "unknown shape 'qwen9'"),
        (("decode", "--shape", "qwen3-8b", "--point", "8"), "8x32768 or 8x32k"),
        (
            ("decode", "--shape", "qwen3-8b", "--point", "1x1k", "--backends", "flashinfer"),
            "must name lim",
        ),
        (
            ("decode", "--shape", "qwen3-8b", "--point", "1x1k", "--kv-cache-dtype", "nvfp4"),
            "--kv-cache-dtype nvfp4 is not measured: use auto, fp8_e4m3, fp8_e5m2",
        ),
        (
            ("decode", "--shape", "qwen3-8b", "--point", "1x1k", "--quantization", "awq"),
            "--quantization awq is not measured: use none, fp8",
        ),
        (
            (
                *("decode", "--shape", "qwen3-8b", "--point", "1x1k", "--backends", "lim,fa3"),
                *("--kv-cache-dtype", "fp8_e5m2"),
            ),
            "FlashAttention 3 reads no KV cache of fp8_e5m2",
        ),
        (("capacity",), "either --shape"),
        (
            (
                *("capacity", "--shape", "qwen3-8b", "--backends", "lim,fa3"),
                *("--kv-cache-dtype", "fp8_e5m2"),
            ),
            "FlashAttention 3 reads no KV cache of fp8_e5m2",
        ),
        (("kernel", "--op", "sort"), "unknown --op sort"),
        (("kernel", "--context", "100"), "--context 100 is within --budget 2048"),
        (("kernel", "--heads", "9", "--dim", "96"), "no multiple of --kv-heads 8; --dim 96"),
        (
            ("kernel", "--op", "sparse-attention-cuda-cores", "--heads", "56"),
            "takes 1, 2, 3, 4, 8 query heads a KV head, not 7: choose other --heads",
        ),
        (
            ("kernel", "--op", "sparse-attention-tensor-cores", "--dim", "32"),
            "--op sparse-attention-tensor-cores takes --dim 64, 128, 256, not 32",
        ),
        (
            ("kernel", "--op", "sparse-attention", "--dim", "1024"),
            "--op sparse-attention takes --dim 512 or less, not 1024",
        ),
        (
            ("kernel", "--op", "sparse-attention", "--context", "100"),
            "--context 100 is within --budget 2048",
        ),
    ],
)
def test_bad_use_is_refused_before_anything_starts(words: tuple[str, ...], message: str) -> None:
    error = run(*words).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


@pytest.mark.parametrize("option", ["--budget", "--windows", "--steps"])
def test_nothing_is_measured_zero_times(option: str) -> None:
    assert run("decode", "--shape", "qwen3-8b", "--point", "1x1k", option, "0").exit_code == 2


def test_capacities_are_compared_with_dense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = [Capacity("lim", 388_000), Capacity("flashinfer", 391_000)]
    asked: list[Any] = []

    def measure(*_: Any, **options: Any) -> list[Capacity]:
        asked.append(options["precision"])
        return found

    monkeypatch.setattr(capacity, "measure_capacities", measure)
    out = tmp_path / "capacity.jsonl"
    formats = ("--kv-cache-dtype", "fp8_e4m3", "--quantization", "fp8")
    shown = run("capacity", "--shape", "qwen3-8b", *formats, "--out", str(out)).output
    assert "qwen3-8b, weights fp8, KV cache fp8_e4m3\n" in shown
    assert "388,000 tokens (99.23 % of dense)" in shown
    line = json.loads(out.read_text())
    assert line["kv_capacity"] == {"lim": 388_000, "flashinfer": 391_000}
    assert line["conditions"]["kv_cache_dtype"] == "fp8_e4m3"
    assert line["conditions"]["quantization"] == "fp8"
    assert asked == [Precision("fp8_e4m3", "fp8")]


def test_a_backend_without_its_binary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "missing_backend", {"fa3": "no binary"}.get)
    check_backends(["flashinfer", "triton"])
    with pytest.raises(LimError, match="--backends fa3: no binary"):
        check_backends(["flashinfer", "fa3"])


def test_a_dense_backend_is_built_under_its_own_name_and_ours_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = SimpleNamespace(attention_backend="lim", decode_attention_backend=None)
    args.override = lambda _source, **fields: vars(args).update(fields)
    seen: list[str] = []
    runner = SimpleNamespace(
        server_args=args, init_decode_cuda_graph=lambda: seen.append(args.attention_backend)
    )
    base = SimpleNamespace(
        init_attention_backends=lambda built: seen.append(built.server_args.attention_backend)
    )
    monkeypatch.setitem(vars(compat), "ModelRunner", base)
    with_backend(runner, "triton")
    assert seen == ["triton", "triton"]
    assert args.attention_backend == "lim"


def test_every_dense_backend_can_be_measured_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[DecodeOptions] = []
    monkeypatch.setattr(command, "_show_decode", lambda options, _out: bool(asked.append(options)))
    named = "triton,lim,fa3,flashinfer"
    run("decode", "--shape", "qwen3-8b", "--point", "1x1k", "--backends", named)
    assert asked[0].backends == ("lim", "triton", "fa3", "flashinfer")
    assert asked[0].precision == Precision()


def test_formats_and_mixed_batches_are_asked_for_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[DecodeOptions] = []
    monkeypatch.setattr(command, "_show_decode", lambda options, _out: bool(asked.append(options)))
    formats = ("--kv-cache-dtype", "fp8_e5m2", "--quantization", "fp8")
    run("decode", "--shape", "qwen3-8b", "--point", "4x32k+4x1k", "--point", "8x1k", *formats)
    assert asked[0].points == (Point((32768,) * 4 + (1024,) * 4), Point.uniform(8, 1024))
    assert (asked[0].batch_sizes, asked[0].longest) == ((8,), 32768)
    assert asked[0].precision == Precision("fp8_e5m2", "fp8")


@pytest.mark.parametrize(("built", "is_it"), [("fa3", True), ("flashinfer", False)])
def test_a_backend_is_measured_under_no_other_s_name(
    monkeypatch: pytest.MonkeyPatch, built: str, is_it: bool
) -> None:
    graphs: list[type] = []

    def build(runner: Any, _name: str) -> None:
        graphs.append(torch.cuda.CUDAGraph)
        runner.attn_backend = SimpleNamespace(decode_attention_backend_str=built)
        runner.decode_cuda_graph_runner = "graphs"

    monkeypatch.setattr(runner_module, "with_backend", build)
    if is_it:
        assert make_contender(SimpleNamespace(), "fa3").graph_runner == "graphs"
        assert graphs == [ListedGraph]
        return
    with pytest.raises(ServerError, match="built SimpleNamespace for the backend fa3"):
        make_contender(SimpleNamespace(), "fa3")


@pytest.mark.parametrize(
    ("batch", "context", "rows"), [(8, 32768, 2), (1, 32768, 1), (8, 800_000, 1)]
)
def test_the_case_itself_is_checked_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, batch: int, context: int, rows: int
) -> None:
    case = StepShape(batch, context, 40, 10, 64, 1000)
    asked: list[Batch] = []

    def differences(checked: Batch, device: str) -> list[str]:
        assert device == "cuda"
        asked.append(checked)
        return ["row 1 of 32768 tokens keeps another set"]

    for name in ("require_gpu", "check_exactness"):
        monkeypatch.setattr(kernel, name, lambda: None)
    monkeypatch.setattr(kernel, "selection_differences", differences)
    with pytest.raises(LimError, match=r"not exact on this case:\n  - row 1 of 32768") as caught:
        next(kernel.measure_ops(["score"], case, 1))
    assert "no time is shown" in str(caught.value)
    assert asked == [Batch((context,) * rows, 40, 10, 64, 1000, dtype=torch.bfloat16)]


def test_an_operation_s_line_holds_its_shape_and_speed() -> None:
    timing = OpTiming(Spread(50.0, 49.0, 52.0), Spread(40.0, 39.0, 41.0), 100_000_000)
    row = kernel.OpRow("score", timing, 3000.04)
    line = json.loads(kernel.op_line(row, CASE, 30))
    assert line["gb_per_s"] == pytest.approx(2000)
    assert line["copy_share"] == pytest.approx(2 / 3, abs=1e-4)
    assert line["conditions"]["copy_gb_per_s"] == 3000.0
    assert (line["op"], line["case"]["heads"], line["conditions"]["repeats"]) == ("score", 32, 30)
    table = kernel.op_table([row], CASE)
    assert table.row_count == 1
    assert [list(column.cells) for column in table.columns[-2:]] == [["2,000"], ["67 %"]]
    assert table.columns[-1].header == "share of copy bandwidth"


def test_an_operation_without_necessary_bytes_has_no_bandwidth() -> None:
    spread = Spread(1.0, 1.0, 1.0)
    row = kernel.OpRow("select", OpTiming(spread, spread, TimedOp(print, None).num_bytes), 3000.0)
    assert row.timing.gb_per_s is None
    assert row.copy_share is None
    assert list(kernel.op_table([row], CASE).columns[-1].cells) == ["-"]


@pytest.mark.parametrize(("op", "context"), [("sort", 4096), ("score", 2048)])
def test_an_operation_without_work_is_refused(op: str, context: int) -> None:
    with pytest.raises(ValueError, match=r"unknown operation|nothing to select"):
        prepare(op, StepShape(1, context, 2, 1, 64, 2048), "cpu")
