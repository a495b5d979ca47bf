"""Small random models, written offline, and prompts for the Qwen3, which tell kept sets apart.

Its attention is peaked enough for a wrong set to change tokens, and no prompt hangs on rounding.
`stories` are prompts for SmolLM2.
"""

import math
import random
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 512
FIRST_WORD = 5
"""Ids from here are ordinary words; those below are special tokens and roles."""
NUM_LAYERS = 8
SELECT_LAYERS = (2, 5)
"""Leaves two REUSE layers above each."""
MAX_LENGTH = 4096
"""Longest sequence of the model in tokens."""

Prompt = list[int]
"""Token ids."""

NUM_NEW = 64
"""Tokens that each request generates."""

BUDGET = 256
"""Tokens that a sparse layer reads in all end-to-end tests."""

_SEED = 7
_WEIGHT_GAIN = 1.0
"""Standard deviation of random matrices over √fan-in: each layer changes much."""
_BIAS_STD = 0.2
_QK_NORM_GAIN = 1.5
"""Scale of q and k: a head prefers few tokens, and a wrong set moves the output."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} "
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def build_tiny_qwen3(folder: Path) -> Path:
    """Write a Hugging Face folder: 8 layers, 6 query heads over 2 KV heads, fp32, a tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(num_attention_heads=6, num_key_value_heads=2, head_dim=16, **_SIZES)
    _write_random(Qwen3ForCausalLM(config), folder)
    write_tokenizer(folder)
    return folder


def build_tiny_qwen2(folder: Path) -> Path:
    """Write a folder without a tokenizer: 8 layers, 4 query heads over 2 KV heads with biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **_SIZES)
    _write_random(Qwen2ForCausalLM(config), folder)
    return folder


def build_tiny_qwen3_moe(folder: Path) -> Path:
    """Write a folder without a tokenizer: 8 layers, 8 experts of which a token takes 2."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = Qwen3MoeConfig(**heads, **experts, norm_topk_prob=True, **_SIZES)
    _write_random(Qwen3MoeForCausalLM(config), folder)
    return folder


def _write_random(model: Any, folder: Path) -> None:
    """Fill a model with random values, and write it."""
    model.to(torch.float32)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _fill(name, weight, generator)
    model.save_pretrained(folder)


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    """Fill one parameter with random values, in place."""
    if name.endswith("bias"):
        weight.normal_(0.0, _BIAS_STD, generator=generator)
        return
    if weight.dim() == 1:
        is_qk_norm = name.endswith(("q_norm.weight", "k_norm.weight"))
        weight.fill_(_QK_NORM_GAIN if is_qk_norm else 1.0)
        return
    is_embedding = name.endswith("embed_tokens.weight")
    std = 1.0 if is_embedding else _WEIGHT_GAIN / math.sqrt(weight.shape[1])
    weight.normal_(0.0, std, generator=generator)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token a word: the special ones, the two roles, `w5`, `w6`, …"""
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


# (tokens, seed) of the tiny model, (sentences, seed) of SmolLM2. With these seeds there is no near
# tie: relative noise of 1e-5 in every layer's attention, a hundred times the rounding of fp32,
# moves neither a token nor a kept set of the oracle.
_LONG = ((650, 9), (720, 1), (850, 0), (1050, 0), (1250, 0), (1450, 0))
_CROSSING = ((240, 0), (255, 0), (256, 7), (300, 0))
_SHORT = ((40, 0), (120, 0), (190, 0))
_STORIES = ((45, 2), (57, 201), (75, 500), (99, 900))

_PEOPLE = ("the baker", "a young engineer", "my neighbour", "the old captain", "our teacher")
_ACTS = ("carried", "counted", "painted", "repaired", "borrowed", "sold", "forgot", "weighed")
_THINGS = ("lanterns", "maps", "copper kettles", "violins", "letters", "wooden boats", "clocks")
_PLACES = ("the harbour", "the library", "a quiet station", "the market", "the northern gate")
_WHENS = ("In spring", "Before noon", "On Tuesday", "Late at night", "After the storm")


def random_prompt(length: int, seed: int) -> Prompt:
    """Return `length` random words of the tiny model, without special tokens."""
    rng = random.Random(1000 * length + seed)
    return [rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(length)]


def long_prompts() -> list[Prompt]:
    """Return six prompts of 650 to 1,450 tokens: every decode step is sparse."""
    return [random_prompt(*sized) for sized in _LONG]


def crossing_prompts() -> list[Prompt]:
    """Return four prompts about as long as the budget: three start dense or cross it at once."""
    return [random_prompt(*sized) for sized in _CROSSING]


def short_prompts() -> list[Prompt]:
    """Return three prompts that stay within the budget to their last token."""
    return [random_prompt(*sized) for sized in _SHORT]


def stories() -> list[str]:
    """Return four texts, 655 to 1,472 tokens of SmolLM2, that a small model can continue."""
    return [story(*sized) for sized in _STORIES]


def story(num_sentences: int, seed: int) -> str:
    """Return sentences of plain English."""
    rng = random.Random(seed)
    return " ".join(_sentence(rng) for _ in range(num_sentences))


def _sentence(rng: random.Random) -> str:
    words = [rng.choice(_WHENS), rng.choice(_PEOPLE), rng.choice(_ACTS), str(rng.randint(2, 99))]
    return " ".join([*words, rng.choice(_THINGS), "at", rng.choice(_PLACES)]) + "."
