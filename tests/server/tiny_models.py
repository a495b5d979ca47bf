"""A small random Qwen3, written offline, whose attention is peaked enough to tell sets apart."""

import math
from pathlib import Path

VOCAB_SIZE = 512
FIRST_WORD = 5
"""Ids from here are ordinary words; those below are special tokens and roles."""
NUM_LAYERS = 8
SELECT_LAYERS = (2, 5)
"""Leaves two REUSE layers above each."""
MAX_LENGTH = 4096
"""Longest sequence of the model in tokens."""

_SEED = 7
_WEIGHT_GAIN = 1.0
"""Matrices are drawn with this standard deviation over √fan-in, so that each layer changes much."""
_QK_NORM_GAIN = 1.5
"""Scales q and k, so that a head prefers few tokens and a wrong set moves the output."""
_SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} "
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def build_tiny_qwen3(folder: Path) -> Path:
    """Write a Hugging Face folder: 8 layers, 6 query heads over 2 KV heads, fp32, a tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _draw(name, weight, generator)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _draw(name: str, weight, generator) -> None:
    """Fill one parameter in place."""
    if weight.dim() == 1:
        is_qk_norm = name.endswith(("q_norm.weight", "k_norm.weight"))
        weight.fill_(_QK_NORM_GAIN if is_qk_norm else 1.0)
        return
    is_embedding = name.endswith("embed_tokens.weight")
    std = 1.0 if is_embedding else _WEIGHT_GAIN / math.sqrt(weight.shape[1])
    weight.normal_(0.0, std, generator=generator)


def _write_tokenizer(folder: Path) -> None:
    """One word a token: `w3`, `w4`, … after the special ones and the two roles."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, "user", "assistant"]
    words += [f"w{number}" for number in range(len(words), VOCAB_SIZE)]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
