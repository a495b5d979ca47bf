"""Small models whose attention has structure: a query finds the blocks of its own topic."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.server.tiny_model import FIRST_WORD, VOCAB_SIZE, write_tokenizer

LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 2, 16
TOPICS = 4
LENGTH, BUDGET = 512, 128
"""Tokens of a text and of the sets whose recall is measured."""


def build_model(folder: Path, kind: str = "qwen3", **changes: Any) -> Path:
    """Write a model of a kind, llama, qwen2 or qwen3, with a tokenizer of one token a word."""
    import transformers

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HEADS * DIM,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 2 * LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        _give_structure(model)
    model.to(config.dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _give_structure(model: Any) -> None:
    """Embed each word near the vector of its topic, and let queries look like keys."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    topics = normal(TOPICS, HEADS * DIM)
    words = torch.arange(VOCAB_SIZE)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(topics[words % TOPICS] + 0.5 * normal(*embedding.shape))
    for layer in model.model.layers:
        keys = normal(KV_HEADS, DIM, HEADS * DIM) / (HEADS * DIM) ** 0.5
        queries = keys.repeat_interleave(HEADS // KV_HEADS, dim=0)
        layer.self_attn.k_proj.weight.copy_(keys.flatten(0, 1))
        layer.self_attn.q_proj.weight.copy_(
            1.5 * queries.flatten(0, 1) + 0.1 * normal(HEADS * DIM, HEADS * DIM)
        )
        for name, weight in layer.self_attn.named_parameters():
            if name.endswith(".bias"):
                weight.copy_(0.1 * normal(*weight.shape))
            elif "_norm" in name:
                weight.copy_(1.5 + 0.1 * normal(*weight.shape))
        layer.mlp.down_proj.weight.mul_(0.1)


def topical_words(blocks: int, seed: int) -> Tensor:
    """Draw the words of a text, 64 of one topic after another, [64 · blocks] int64."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(TOPICS, (blocks, 1), generator=generator)
    low, high = FIRST_WORD // TOPICS + 1, VOCAB_SIZE // TOPICS
    words = torch.randint(low, high, (blocks, 64), generator=generator)
    return (words * TOPICS + topics).flatten()


def write_text(path: Path, tokens: int) -> Path:
    """Write a plain text of words by topic."""
    words = topical_words(tokens // 64, seed=5)
    path.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return path
