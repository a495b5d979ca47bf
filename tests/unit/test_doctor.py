"""What `lim doctor` says of the environment."""

import pytest

from lim_sglang.doctor import Verdict, _environment


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


def test_a_list_of_plugins_with_ours_in_it_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other, lim")
    assert {finding.verdict for finding in _environment()} == {Verdict.OK}
