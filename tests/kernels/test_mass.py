"""Attention mass and the tokens with most of it. `test_selector.py` runs the whole selection."""

from lim_sglang.kernels.verify import (
    Batch,
    head_differences,
    largest_mass_differences,
    softmax_mass_differences,
    topk_differences,
    window_differences,
)
from tests.kernels.batches import LARGE, SMALL, on_both, some


def finite(batches: dict[str, Batch]) -> dict[str, Batch]:
    """Return the batches whose scores have a softmax."""
    return {name: batch for name, batch in batches.items() if not batch.non_finite}


@on_both(finite(SMALL), finite(LARGE))
def test_masses_are_the_reference_s(batch: Batch, device: str) -> None:
    assert not softmax_mass_differences(batch, device)


@on_both()
def test_the_set_is_exactly_the_reference_s(batch: Batch, device: str) -> None:
    assert not topk_differences(batch, device)


SEVERAL = ("mixed-lengths", "ties", "nan-and-infinities")


@on_both(some(SMALL, *SEVERAL, "more-heads-than-selected"), LARGE)
def test_the_largest_weights_of_tokens_and_pages_are_the_reference_s(
    batch: Batch, device: str
) -> None:
    assert not largest_mass_differences(batch, device)


@on_both(some(SMALL, *SEVERAL, "no-recency", "budget-of-one", "no-groups"), LARGE)
def test_each_heads_list_is_the_reference_s(batch: Batch, device: str) -> None:
    assert not head_differences(batch, device)


@on_both(some(SMALL, *SEVERAL, "budget-of-one", "longer-than-a-block"), LARGE)
def test_sinks_and_window_are_the_reference_s(batch: Batch, device: str) -> None:
    assert not window_differences(batch, device)
