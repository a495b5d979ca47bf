"""Findings of `lim doctor` on the environment and on a GPU."""

import subprocess
import sys
import time
from contextlib import suppress

import pytest
import typer

from lim_sglang import compat, doctor, progress
from lim_sglang.doctor import (
    Finding,
    Verdict,
    _decode_stack,
    _environment,
    _gpus,
    _kernels,
    compare_packages,
)
from tests.builders import Screen


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


def test_several_gpus_are_counted_and_other_kinds_named() -> None:
    assert [each.text for each in _gpus(["H200"])] == ["GPU H200"]
    _, serving = _gpus(["H200"] * 4)
    assert "4 GPUs: lim serve MODEL --replicas 4 serves a copy" in serving.text
    *_, other = _gpus(["H200", "A10", "H200"])
    assert (other.verdict, "A10: only H200 is checked" in other.text) == (Verdict.NOTE, True)


def test_kernels_that_fail_are_off_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lim_sglang.verify_gpu.verify_gpu", lambda: ["Qwen3-8B: no memory left"])
    (off,) = _kernels((9, 0))
    assert (off.verdict, off.text) == (Verdict.OFF, "kernels: Qwen3-8B: no memory left")
    monkeypatch.setattr("lim_sglang.verify_gpu.verify_gpu", list)
    (fine,) = _kernels((8, 0))
    assert "fp8_e5m2 cache" in fine.text
    assert "fp8_e4m3 cache" not in fine.text


@pytest.mark.parametrize(
    ("installed", "verdict", "words"),
    [
        ({}, Verdict.OFF, "engine is missing: needed to serve, pip install 'engine==1.5'"),
        ({"engine": "1.4"}, Verdict.OFF, "engine 1.4: exactly 1.5 is needed, pip install"),
        ({"engine": "1.5"}, Verdict.OK, "as tested: engine 1.5, "),
        ({"httpx": "9"}, Verdict.NOTE, "httpx 9: harmless, tested was 2.0.1"),
        ({"httpx": None}, Verdict.OFF, "httpx is missing: needed to serve"),
        (
            {"math-verify": None},
            Verdict.NOTE,
            "math-verify is missing: needed by lim ask, proxy, eval and grade, not to serve; "
            "pip install 'math-verify[antlr4_13_2]==0.9.0'",
        ),
        ({"math-verify": "1.0"}, Verdict.NOTE, "math-verify 1.0: harmless, tested was 0.9.0"),
        ({"pytest": None}, Verdict.OK, "as tested: httpx 2.0.1, math-verify 0.9.0"),
    ],
)
def test_a_package_that_is_missing_or_differs_is_needed_or_harmless(
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str | None],
    verdict: Verdict,
    words: str,
) -> None:
    there = {"httpx": "2.0.1", "math-verify": "0.9.0"} | installed
    monkeypatch.setattr(doctor, "installed_version", there.get)
    requirements = ["engine==1.5", "httpx==2.0.1", "math-verify[antlr4_13_2]==0.9.0"]
    requirements.append('pytest==9.2.0; extra == "dev"')
    findings = list(compare_packages(requirements, ["engine"]))
    assert [f for f in findings if f.verdict is verdict and f.text.startswith(words)], findings


def test_an_sglang_that_is_tried_is_noted_and_not_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIM_ALLOW_SGLANG", "9.9")
    found = {"sglang": "9.9", "engine": "1.4"}
    for module in (compat, doctor):
        monkeypatch.setattr(module, "installed_version", found.get)
    monkeypatch.setattr(doctor, "requires", lambda _: ["sglang==0.5.16", "engine==1.5"])
    assert list(doctor._packages()) == [
        Finding(Verdict.NOTE, "LIM_ALLOW_SGLANG=9.9 lets this SGLang serve, unverified"),
        Finding(Verdict.NOTE, "sglang 9.9: tested was 0.5.16"),
        Finding(Verdict.NOTE, "engine 1.4: tested was 1.5"),
    ]


def test_on_a_terminal_a_finding_with_a_command_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "a package is missing: needed to serve, pip install 'package==1.0'"
    found = [Finding(verdict, text) for verdict in (Verdict.OK, Verdict.OFF)]
    monkeypatch.setattr(doctor, "examine", lambda _: iter(found))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    with pytest.raises(typer.Exit):
        doctor.doctor()
    assert f"  ok  {text[:-15]}\n      'package==1.0'\n" in screen.getvalue()
    assert f"  {text}\n" in screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_wait_is_announced_before_it_begins_in_a_pipe_too(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Finding:
        told.append(capsys.readouterr().err)
        return Finding(Verdict.OK, "loaded")

    told: list[str] = []
    monkeypatch.setattr(doctor, "_device", lambda: iter(()))
    monkeypatch.setattr(doctor, "_backend", load)
    if is_terminal:
        monkeypatch.setattr(sys, "stdout", Screen())
    with suppress(typer.Exit):
        doctor.doctor()
    assert "loading SGLang's server and the plugin\n" in told[0]


def test_a_long_wait_shows_its_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def load() -> Finding:
        told.append("")
        while "waiting" not in told[-1] and time.monotonic() < deadline_s:
            time.sleep(0.01)
            told.append(told[-1] + capsys.readouterr().err)
        return Finding(Verdict.OK, "loaded")

    monkeypatch.setattr(progress, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(doctor, "_device", lambda: iter(()))
    monkeypatch.setattr(doctor, "_backend", load)
    deadline_s = time.monotonic() + 5
    with suppress(typer.Exit):
        doctor.doctor()
    assert "loading SGLang's server and the plugin\n  waiting, 0 s\n" in told[-1]


def test_every_pin_is_one_that_the_doctor_can_read() -> None:
    """Each finding of this environment, which is as tested, is the one of agreement."""
    (fine,) = doctor._packages()
    assert fine.verdict is Verdict.OK
    assert all(f"{name} " in fine.text for name in ("sglang", "math-verify", *doctor.USED_BY))


def test_the_first_lines_need_nothing_heavy() -> None:
    program = (
        "import sys; from lim_sglang.doctor import examine; found = examine(); "
        "[next(found) for _ in range(6)]; print({'torch', 'sglang'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout.strip() == "set()", shown.stderr
