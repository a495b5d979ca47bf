"""Published shapes: complete, stretched where needed, and known to the presets."""

import json
from pathlib import Path

import pytest

from lim_sglang.bench.shapes import SHAPES, check_shape, write_shape
from lim_sglang.config import PRESETS, ModelShape
from lim_sglang.errors import ConfigError

PARAMETERS = {"qwen3-8b": 8.19e9, "qwen3-4b": 4.02e9, "qwen3-1.7b": 1.72e9, "llama-8b": 8.03e9}
"""As published, the embedding counted once where it is tied."""


def count_parameters(config: dict) -> int:
    """Matrices of a dense decoder; norms are left out."""
    hidden, heads, kv_heads = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    attention = config["head_dim"] * hidden * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(dict(SHAPES[name])) == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-4b", "llama-8b"])
def test_the_paper_s_layers_apply_to_the_shape(name: str) -> None:
    config = SHAPES[name]
    fields = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")
    assert ModelShape(*(config[field] for field in fields)) in PRESETS


def test_a_folder_has_the_published_context(tmp_path: Path) -> None:
    assert write_shape("qwen3-8b", tmp_path, longest=1024) == 40960
    assert json.loads((tmp_path / "config.json").read_text()) == dict(SHAPES["qwen3-8b"])


def test_a_longer_point_stretches_it(tmp_path: Path) -> None:
    assert write_shape("qwen3-8b", tmp_path, longest=65536) == 65536
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["max_position_embeddings"] == 65536
    assert SHAPES["qwen3-8b"]["max_position_embeddings"] == 40960


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'qwen4'; known shapes: qwen3-8b, .*llama-8b"):
        check_shape("qwen4")
