"""The kernel of coupled sampling draws what its definition draws."""

import pytest
import torch
from torch import Tensor

from lim_sglang.kernels import coupled_sampling
from lim_sglang.kernels.coupled_sampling import pick_coupled
from lim_sglang.kernels.reference_sampling import (
    coupled_pick,
    exponential_noise,
    hash_tokens,
    kept_tokens,
)
from tests.kernels.batches import DEVICES

NO_LIMIT = 1 << 30
LIMITS = {
    "none": (NO_LIMIT, 1.0, 0.0),
    "greedy": (1, 1.0, 0.0),
    "top_k": (5, 1.0, 0.0),
    "top_p": (NO_LIMIT, 0.8, 0.0),
    "top_p 0": (NO_LIMIT, 0.0, 0.0),
    "min_p": (NO_LIMIT, 1.0, 0.2),
    "all": (9, 0.9, 0.05),
}
CLOSE = 1e-5
"""Relative difference of two ratios, and of a mass and its limit, that rounding may exchange."""


def draw(vocab: int, rows: int, *, device: str, peak: float = 3.0) -> tuple[Tensor, ...]:
    """Return probabilities, seeds and positions of random rows; each ends with a tie."""
    generator = torch.Generator().manual_seed(vocab * 31 + rows)
    logits = peak * torch.randn(rows, vocab, generator=generator)
    logits[:, -1] = logits[:, 0]
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 1 << 20, (rows,), generator=generator)
    return tuple(each.to(device) for each in (logits.softmax(-1), seeds, positions))


def limits_of(names: list[str], device: str) -> tuple[Tensor, ...]:
    """Return top_k, top_p and min_p of rows by their names."""
    top_ks, top_ps, min_ps = zip(*(LIMITS[name] for name in names), strict=True)
    of_rows = torch.tensor(top_ks, dtype=torch.int32), torch.tensor(top_ps), torch.tensor(min_ps)
    return tuple(each.to(device) for each in of_rows)


def is_near(row: int, found: int, wanted: int, inputs: tuple[Tensor, ...]) -> bool:
    """Return True if rounding may exchange two picks: equal ratios, or a mass at its limit."""
    probs, seeds, positions, _, top_ps, _ = (each.cpu() for each in inputs)
    noise = exponential_noise(hash_tokens(seeds[row, None], positions[row, None], probs.shape[1]))
    ratios = probs[row, [found, wanted]] / noise[0, [found, wanted]]
    before = [float(probs[row][probs[row] > probs[row, token]].sum()) for token in (found, wanted)]
    at_limit = min(abs(mass - float(top_ps[row])) for mass in before) < CLOSE
    return at_limit or abs(float(ratios[0] / ratios[1]) - 1) < CLOSE


@pytest.fixture(params=[coupled_sampling.PICK_SHARED_ROWS, 0], ids=["few rows", "many rows"])
def _shared_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of few rows, whose blocks share all races, and of many, which share the first."""
    monkeypatch.setattr(coupled_sampling, "PICK_SHARED_ROWS", request.param)


@pytest.mark.usefixtures("_shared_rows")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 8192, 20_001])
def test_draws_are_the_definitions(vocab: int, device: str) -> None:
    names = list(LIMITS) * 3
    inputs = (*draw(vocab, len(names), device=device), *limits_of(names, device))
    found, wanted = pick_coupled(*inputs), coupled_pick(*inputs)
    for row in (found != wanted).nonzero().flatten().tolist():
        assert is_near(row, int(found[row]), int(wanted[row]), inputs), (names[row], vocab)
    kept = kept_tokens(inputs[0], *inputs[3:])
    assert kept.gather(1, found[:, None]).float().mean() > 0.9


@pytest.mark.usefixtures("_shared_rows")
@pytest.mark.parametrize("device", DEVICES)
def test_races_are_run_again_until_a_kept_token_wins(device: str) -> None:
    """Flat rows, where nearly every first winner is filtered out."""
    rows, vocab = 16, 5000
    probs, seeds, positions = draw(vocab, rows, device=device, peak=0.01)
    limits = limits_of(["top_k"] * rows, device)
    found = pick_coupled(probs, seeds, positions, *limits)
    assert torch.equal(found, coupled_pick(probs, seeds, positions, *limits))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_are_not_numbers_have_a_token(device: str) -> None:
    probs, seeds, positions = draw(50, 2, device=device)
    probs[0] = float("nan")
    picks = pick_coupled(probs, seeds, positions, *limits_of(["none", "all"], device))
    assert 0 <= int(picks[0]) < 50


def test_wrong_shapes_are_refused() -> None:
    probs, seeds, positions = draw(9, 2, device="cpu")
    limits = limits_of(["none"], "cpu")
    with pytest.raises(ValueError, match="2 of each setting"):
        pick_coupled(probs, seeds, positions, *limits)
