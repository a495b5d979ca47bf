"""What the plugin asks before SGLang starts on a GPU, without SGLang and without a GPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang import compat, plugin
from lim_sglang.errors import RefusedError
from lim_sglang.validation import Gpu

A10 = Gpu("A10", (8, 6), compiles=True, shared_bytes=101_376)
MODEL = SimpleNamespace(
    model_type="qwen3", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32
)
CONTEXT = 40_960


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Ask about a start with these options and settings; returns the reasons against it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("LIM_TRACE", raising=False)
    monkeypatch.setattr(compat, "load_model_config", lambda _options: MODEL)
    monkeypatch.setattr(compat, "context_length", lambda _options, _model: CONTEXT)
    monkeypatch.setattr(compat, "reasons_against_decode_stack", lambda: ["another flashinfer"])

    def ask(settings: str = "{}", gpu: Gpu | None = A10, **options: Any) -> list[str]:
        monkeypatch.setattr(compat, "serves_on_cpu", lambda: gpu is None)
        monkeypatch.setattr(plugin, "find_gpu", lambda: gpu)
        monkeypatch.setenv("LIM_CONFIG", settings)
        given = {
            "attention_backend": "lim",
            "decode_attention_backend": None,
            "prefill_attention_backend": None,
            "kv_cache_dtype": "auto",
        }
        try:
            plugin._refuse(SimpleNamespace(**(given | options)))
        except RefusedError as error:
            return list(error.reasons)
        return []

    return ask


def test_what_decodes_is_looked_at_on_a_gpu_only(start: Callable[..., list[str]]) -> None:
    assert start() == ["another flashinfer"]
    assert start(gpu=None) == []
    assert start(attention_backend="flashinfer") == []


def test_selection_is_asked_about_with_everything_else(start: Callable[..., list[str]]) -> None:
    reasons = start('{"budget": 20000}', kv_cache_dtype="fp8_e4m3", tp_size=2)
    expected = ["--tp-size 2", "another flashinfer", "a budget of 20000", "fp8_e4m3 needs"]
    assert len(reasons) == len(expected)
    for words, reason in zip(expected, reasons, strict=True):
        assert words in reason


@pytest.mark.parametrize(
    "settings",
    [
        '{"budget": 20000, "policy": "full"}',
        '{"budget": 20000, "select_layers": []}',
        f'{{"budget": {CONTEXT}}}',
    ],
)
def test_nothing_is_asked_of_a_selection_that_never_runs(
    start: Callable[..., list[str]], settings: str
) -> None:
    assert start(settings, kv_cache_dtype="fp8_e4m3") == ["another flashinfer"]


def test_settings_that_are_wrong_are_named_once(start: Callable[..., list[str]]) -> None:
    assert len(start('{"budget": 0}', gpu=None)) == 1
    assert len(start('{"select_layers": [99]}', gpu=None)) == 1
