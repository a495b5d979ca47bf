"""Published model shapes, so that speed can be measured without anyone's weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lim_sglang.errors import ConfigError

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_COMMON: dict[str, Any] = {"hidden_act": "silu", "torch_dtype": "bfloat16", "use_cache": True}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json, and so on.
    "qwen3-8b": _QWEN3
    | _COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
    "qwen3-4b": _QWEN3
    | _COMMON
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "qwen3-1.7b": _QWEN3
    | _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    # Llama-3.1-8B and DeepSeek-R1-Distill-Llama-8B.
    "llama-8b": _LLAMA3
    | _COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
"""Hugging Face configurations by the name that `lim bench --shape` takes."""


def check_shape(name: str) -> str:
    """Refuse a name that is no published shape."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known shapes: {', '.join(SHAPES)}")
    return name


def write_shape(name: str, folder: Path, *, longest: int) -> int:
    """Write a model folder that holds configurations and nothing else.

    Args:
        longest: tokens of the longest context that is measured. A shape made for less is
            stretched: with dummy weights, positions beyond the training change no timing.

    Returns:
        The context that the folder's model has.
    """
    config = dict(SHAPES[check_shape(name)])
    context = max(int(config["max_position_embeddings"]), longest)
    config["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends) + "\n")
    return context
