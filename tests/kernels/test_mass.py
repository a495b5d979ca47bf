"""Attention mass and the tokens with most of it. `test_selector.py` runs the whole selection."""

from lim_sglang.kernels.verify import Batch, softmax_mass_differences, topk_differences
from tests.kernels.batches import LARGE, SMALL, on_both


def finite(batches: dict[str, Batch]) -> dict[str, Batch]:
    """Return the batches whose scores have a softmax."""
    return {name: batch for name, batch in batches.items() if not batch.non_finite}


@on_both(finite(SMALL), finite(LARGE))
def test_masses_are_the_reference_s(batch: Batch, device: str) -> None:
    assert not softmax_mass_differences(batch, device)


@on_both()
def test_the_set_is_exactly_the_reference_s(batch: Batch, device: str) -> None:
    assert not topk_differences(batch, device)
