"""Findings of `lim doctor` on the environment and on a GPU."""

import pytest

from lim_sglang import doctor
from lim_sglang.doctor import Verdict, _decode_stack, _environment, _kernels


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "LIM_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_a_clean_environment_is_fine() -> None:
    assert {finding.verdict for finding in _environment()} == {Verdict.OK}


@pytest.mark.parametrize(
    ("name", "value"),
    [("SGLANG_PLUGINS", "none"), ("SGLANG_PLATFORM", "x"), ("LIM_CONFIG", '{"budget": 0}')],
)
def test_a_variable_that_is_in_the_way_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    (off,) = [finding for finding in _environment() if finding.verdict is Verdict.OFF]
    assert name in off.text


def test_what_cannot_decode_on_a_gpu_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "reasons_against_decode_stack", lambda: ["another flashinfer"])
    (off,) = _decode_stack()
    assert (off.verdict, off.text) == (Verdict.OFF, "another flashinfer")
    monkeypatch.setattr(doctor, "reasons_against_decode_stack", list)
    (fine,) = _decode_stack()
    assert fine.verdict is Verdict.OK


def test_kernels_that_fail_are_off_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lim_sglang.verify_gpu.verify_gpu", lambda: ["Qwen3-8B: no memory left"])
    (off,) = _kernels((9, 0))
    assert (off.verdict, off.text) == (Verdict.OFF, "kernels: Qwen3-8B: no memory left")
    monkeypatch.setattr("lim_sglang.verify_gpu.verify_gpu", list)
    (fine,) = _kernels((8, 0))
    assert "fp8_e5m2 cache" in fine.text
    assert "fp8_e4m3 cache" not in fine.text
