"""What is asked of a GPU before anything loads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lim_sglang.config import LimConfig
from lim_sglang.validation import (
    Gpu,
    has_nvcc,
    head_dim_of,
    reasons_against_gpu,
    reasons_against_kv_cache,
    reasons_against_selection,
)

H100 = Gpu("H100", (9, 0), compiles=True, shared_bytes=232_448)
A100 = Gpu("A100", (8, 0), compiles=True, shared_bytes=166_912)
A10 = Gpu("A10", (8, 6), compiles=True, shared_bytes=101_376)
CONTEXT = 131_072
MODEL = SimpleNamespace(hidden_size=4096, num_attention_heads=32)


def test_a_supported_gpu_and_model_are_served() -> None:
    assert reasons_against_gpu(H100, MODEL, {}) == []
    assert reasons_against_gpu(H100, None, {}) == []


def test_every_reason_is_named_at_once() -> None:
    old = Gpu("T4", (7, 5), compiles=False, shared_bytes=65_536)
    odd = SimpleNamespace(hidden_size=2560, num_attention_heads=32)
    environment = {"LIM_TRACE": "/somewhere", "TRITON_INTERPRET": "1"}
    reasons = reasons_against_gpu(old, odd, environment)
    expected = ["T4 has compute capability 7.5", "no nvcc", "heads of 80 dimensions", "LIM_AUDIT"]
    expected.append("TRITON_INTERPRET is set")
    assert len(reasons) == len(expected)
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason


@pytest.mark.parametrize(("value", "refused"), [("TRUE", True), ("on", True), ("0", False)])
def test_interpreting_is_refused_as_triton_reads_it(value: str, refused: bool) -> None:
    reasons = reasons_against_gpu(H100, MODEL, {"TRITON_INTERPRET": value})
    assert len(reasons) == refused


@pytest.mark.parametrize(
    ("gpu", "budget", "limit"),
    [
        (H100, 21_845, None),  # 16,384 selected
        (H100, 21_847, 21_845),
        (A100, 21_845, None),
        (A100, 30_000, 21_845),
        (A10, 10_922, None),  # 8,192 selected
        (A10, 10_924, 10_922),
        (A10, CONTEXT - 1, 10_922),
        (A10, CONTEXT, None),  # all layers are dense
    ],
)
def test_a_budget_is_refused_that_no_program_could_sort(
    gpu: Gpu, budget: int, limit: int | None
) -> None:
    reasons = reasons_against_selection(gpu, LimConfig(budget=budget), CONTEXT, "auto")
    assert len(reasons) == (limit is not None)
    for reason in reasons:
        assert f"a budget of {budget} selects {int(budget * 0.75)} tokens" in reason
        assert f"--lim-budget {limit} or less" in reason
        assert gpu.name in reason


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.9, 0.999])
def test_the_budget_that_is_proposed_is_served(ratio: float) -> None:
    refused = LimConfig(budget=2**30, recent_ratio=ratio)
    (reason,) = reasons_against_selection(A10, refused, 2**31, "auto")
    proposed = int(reason.split("--lim-budget ")[1].split()[0])
    config = LimConfig(budget=proposed, recent_ratio=ratio)
    assert reasons_against_selection(A10, config, 2**31, "auto") == []


def test_a_budget_without_selected_tokens_is_served() -> None:
    config = LimConfig(budget=100_000, recent_ratio=1)
    assert reasons_against_selection(A10, config, CONTEXT, "auto") == []


@pytest.mark.parametrize(
    ("gpu", "budget", "dtype", "refused"),
    [
        (A100, 2048, "fp8_e4m3", True),
        (A100, 2048, "fp8_e5m2", False),
        (A100, CONTEXT, "fp8_e4m3", False),  # all layers are dense
        (H100, 2048, "fp8_e4m3", False),
    ],
)
def test_an_option_for_a_cache_that_cannot_be_read_is_refused(
    gpu: Gpu, budget: int, dtype: str, refused: bool
) -> None:
    reasons = reasons_against_selection(gpu, LimConfig(budget=budget), CONTEXT, dtype)
    assert len(reasons) == refused


@pytest.mark.parametrize(
    ("dtype", "capability", "words"),
    [
        (torch.bfloat16, (8, 0), None),
        (torch.float16, (8, 0), "a KV cache of float16 cannot be scored with queries of bfloat16"),
        (torch.float8_e5m2, (8, 0), None),
        (torch.float8_e4m3fn, (8, 0), "8.9 (Ada) or newer, not 8.0"),
        (torch.float8_e4m3fn, (8, 6), "use --kv-cache-dtype fp8_e5m2"),
        (torch.float8_e4m3fn, (8, 9), None),
        (torch.float8_e4m3fn, (12, 0), None),
        (torch.float4_e2m1fn_x2, (10, 0), "a KV cache of float4_e2m1fn_x2 cannot be scored"),
    ],
)
def test_a_cache_is_served_whose_keys_can_be_scored(
    dtype: torch.dtype, capability: tuple[int, int], words: str | None
) -> None:
    reasons = reasons_against_kv_cache(dtype, torch.bfloat16, capability)
    assert len(reasons) == (words is not None)
    assert all(words in reason for reason in reasons if words)


@pytest.mark.parametrize(
    ("config", "dimensions"),
    [
        ({"hidden_size": 576, "num_attention_heads": 9}, 64),
        ({"hidden_size": 2560, "num_attention_heads": 32, "head_dim": 128}, 128),
        ({"hidden_size": 2560, "num_attention_heads": 32, "head_dim": None}, 80),
    ],
)
def test_the_stated_head_dimension_wins(config: dict, dimensions: int) -> None:
    assert head_dim_of(SimpleNamespace(**config)) == dimensions


def test_nvcc_is_looked_for_where_cuda_home_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not has_nvcc()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert has_nvcc()
