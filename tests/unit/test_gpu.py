"""What is asked of a GPU before anything loads."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lim_sglang.gpu import Gpu, has_nvcc, head_dim_of, reasons_against_gpu

H100 = Gpu("H100", (9, 0), compiles=True)
MODEL = SimpleNamespace(hidden_size=4096, num_attention_heads=32)


def test_a_supported_gpu_and_model_are_served() -> None:
    assert reasons_against_gpu(H100, MODEL, {}) == []
    assert reasons_against_gpu(H100, None, {}) == []


def test_every_reason_is_named_at_once() -> None:
    old = Gpu("T4", (7, 5), compiles=False)
    odd = SimpleNamespace(hidden_size=2560, num_attention_heads=32)
    reasons = reasons_against_gpu(old, odd, {"LIM_TRACE": "/somewhere"})
    expected = ["T4 has compute capability 7.5", "no nvcc", "heads of 80 dimensions", "LIM_AUDIT"]
    assert len(reasons) == len(expected)
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason


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
