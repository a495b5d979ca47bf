"""What is pinned, without SGLang and FlashInfer."""

import re
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from lim_sglang import compat
from lim_sglang.compat import (
    FLASHINFER_VERSION,
    SGLANG_VERSION,
    missing_attributes,
    reasons_against_decode_stack,
    wrong_signatures,
)
from lim_sglang.errors import ServerError

ROOT = Path(__file__).parents[2]
HERE = __name__


def decorated(function: Any) -> Any:
    """Wrap as FlashInfer wraps its interface."""

    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


class Wrapper:
    """Stands in for FlashInfer's decode wrapper."""

    @decorated
    def __init__(self, workspace: Any) -> None:
        self._workspace = workspace
        assert not hasattr(self, "_only_read")


def test_the_pins_are_those_of_the_package() -> None:
    pins = dict(re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert pins["sglang"] == SGLANG_VERSION
    assert pins["flashinfer-python"] == FLASHINFER_VERSION


@pytest.mark.parametrize("found", ["0.5.17", None])
def test_another_sglang_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: found)
    with pytest.raises(ServerError, match=rf"sglang 0\.5\.16 exactly, found {found or 'none'}"):
        compat.check_version()


@pytest.mark.parametrize("found", ["0.6.13", "0.6.15", None])
def test_another_flashinfer_is_a_reason_of_its_own(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: found)
    (reason,) = reasons_against_decode_stack()
    assert f"flashinfer-python 0.6.14 exactly, found {found or 'none'}" in reason


@pytest.mark.parametrize(
    ("signatures", "buffers", "words"),
    [
        ({f"{HERE}.decorated": ("function",)}, ("_workspace",), []),
        ({f"{HERE}.decorated": ("method",)}, ("_workspace",), ["takes ('function',)"]),
        ({f"{HERE}.decorated": ("function",)}, ("_gone",), ["has no _gone"]),
    ],
)
def test_the_pinned_flashinfer_must_have_what_is_used(
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, tuple[str, ...]],
    buffers: tuple[str, ...],
    words: list[str],
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: FLASHINFER_VERSION)
    monkeypatch.setattr(compat, "USED_ON_GPU", signatures)
    monkeypatch.setattr(compat, "WRAPPER", f"{HERE}.Wrapper")
    monkeypatch.setattr(compat, "WRAPPER_BUFFERS", buffers)
    reasons = reasons_against_decode_stack()
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_a_hooked_function_with_other_parameters_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "HOOKED", {"json.dumps": ("text",)})
    with pytest.raises(ServerError, match=r"json\.dumps takes \('obj', "):
        compat.check_signatures()


def test_what_does_not_load_is_named_and_ends_the_search() -> None:
    (reason,) = wrong_signatures({"json.gone": (), "json.dumps": ("text",)})
    assert reason.startswith("json.gone does not load")


def test_attributes_are_those_that_the_decorated_constructor_sets() -> None:
    names = ("_workspace", "_only_read", "_gone")
    (reason,) = missing_attributes(f"{HERE}.Wrapper", names)
    assert "has no _only_read, _gone" in reason
    assert missing_attributes(f"{HERE}.Wrapper", names[:1]) == []
