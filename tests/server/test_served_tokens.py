"""The check of served tokens against dense passes tells a fault from rounding."""

import pytest
import torch

from lim_sglang.kernels.reference_sampling import coupled_pick
from tests.soak.served_tokens import NEAR, TEMPERATURE, TOP_P, race_leads

NUM_ROWS, VOCAB, SEED, FIRST = 200, 700, 9, 50


def drawn(logits: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the coupled sampler draws from logits, [T]."""
    return coupled_pick(
        (logits / TEMPERATURE).softmax(-1),
        torch.full((NUM_ROWS,), SEED),
        FIRST + torch.arange(NUM_ROWS),
        torch.full((NUM_ROWS,), VOCAB + 1),
        torch.full((NUM_ROWS,), TOP_P),
        torch.zeros(NUM_ROWS),
    )


@pytest.mark.parametrize(
    ("rounding", "seed", "moved", "fewest_lost", "most_lost", "most_not_near"),
    [
        (0.0, SEED, 0, 0.0, 0.0, 0.0),
        (0.01, SEED, 0, 0.001, 0.04, 0.0),
        (0.0, SEED, 1, 0.3, 0.7, 0.7),
        (0.0, SEED, -1, 0.3, 0.7, 0.7),
        (0.0, SEED + 1, 0, 0.3, 0.7, 0.7),
    ],
)
def test_rounding_loses_few_races_narrowly_and_other_noise_loses_many(
    rounding: float,
    seed: int,
    moved: int,
    fewest_lost: float,
    most_lost: float,
    most_not_near: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(NUM_ROWS, VOCAB, generator=generator)
    tokens = drawn(logits + rounding * torch.randn(NUM_ROWS, VOCAB, generator=generator))
    leads = race_leads(logits, tokens, seed, FIRST + moved)
    assert fewest_lost <= (leads > 0).float().mean() <= most_lost
    assert (leads > NEAR).float().mean() <= most_not_near


def test_a_token_that_the_filter_drops_has_lost_for_certain() -> None:
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, :2] = torch.tensor([5.0, 4.0])
    leads = race_leads(logits, torch.tensor([2]), SEED, FIRST)
    assert leads.tolist() == [float("inf")]
