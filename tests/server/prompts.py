"""Prompts of the end-to-end tests, as token ids or as text, drawn once by seed."""

import random

from tests.server.tiny_models import FIRST_WORD, VOCAB_SIZE

Prompt = list[int]
"""Token ids."""

NUM_NEW = 64
"""Tokens that each request generates."""

BUDGET = 256
"""Tokens that a sparse layer reads in all these tests."""

# (tokens, seed) of the tiny model, (sentences, seed) of SmolLM2. With these seeds nothing hangs on
# a near tie: relative noise of 1e-5 in every layer's attention, a hundred times what fp32 rounds
# away, moves neither a token nor a set of the oracle.
_LONG = (
    *((650, 9), (720, 1), (850, 0), (900, 0), (980, 1)),
    *((1050, 0), (1150, 1), (1250, 0), (1350, 0), (1450, 0)),
)
_CROSSING = ((240, 0), (255, 0), (256, 7), (300, 0))
_SHORT = ((40, 0), (120, 0), (190, 0))
_STORIES = (
    *((45, 2), (51, 100), (57, 201), (63, 301), (69, 400)),
    *((75, 500), (81, 601), (87, 702), (93, 802), (99, 900)),
)

_PEOPLE = ("the baker", "a young engineer", "my neighbour", "the old captain", "our teacher")
_ACTS = ("carried", "counted", "painted", "repaired", "borrowed", "sold", "forgot", "weighed")
_THINGS = ("lanterns", "maps", "copper kettles", "violins", "letters", "wooden boats", "clocks")
_PLACES = ("the harbour", "the library", "a quiet station", "the market", "the northern gate")
_WHENS = ("In spring", "Before noon", "On Tuesday", "Late at night", "After the storm")


def random_prompt(length: int, seed: int) -> Prompt:
    """`length` words of the tiny model, special tokens left out."""
    rng = random.Random(1000 * length + seed)
    return [rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(length)]


def long_prompts() -> list[Prompt]:
    """Ten prompts of 650 to 1,450 tokens: every decode step is sparse."""
    return [random_prompt(*drawn) for drawn in _LONG]


def crossing_prompts() -> list[Prompt]:
    """Four prompts about as long as the budget: three start dense or grow past it at once."""
    return [random_prompt(*drawn) for drawn in _CROSSING]


def short_prompts() -> list[Prompt]:
    """Three prompts that stay within the budget to their last token."""
    return [random_prompt(*drawn) for drawn in _SHORT]


def stories() -> list[str]:
    """Ten texts, 655 to 1,472 tokens of SmolLM2, that a small model can go on with."""
    return [story(*drawn) for drawn in _STORIES]


def story(num_sentences: int, seed: int) -> str:
    """Plain English."""
    rng = random.Random(seed)
    return " ".join(_sentence(rng) for _ in range(num_sentences))


def _sentence(rng: random.Random) -> str:
    words = [rng.choice(_WHENS), rng.choice(_PEOPLE), rng.choice(_ACTS), str(rng.randint(2, 99))]
    return " ".join([*words, rng.choice(_THINGS), "at", rng.choice(_PLACES)]) + "."
