"""Where each row's kept tokens begin. `test_selector.py` compares the compacted slots."""

import pytest
import torch

from lim_sglang.kernels.compact import count_kept
from lim_sglang.kernels.verify import Batch, length_differences
from tests.kernels.batches import on_both


@on_both(
    {
        "mixed": Batch((5, 33, 200, 32, 1)),
        "one": Batch((7,)),
        "two-blocks": Batch(tuple(range(1, 1101))),
    },
    {str(n): Batch(tuple(range(1, n + 1)), budget=300) for n in (1, 64, 1024, 3000)},
)
def test_kept_lengths_are_the_reference_s(batch: Batch, device: str) -> None:
    assert not length_differences(batch, device)


def test_lengths_for_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="out must have 3 elements, not 5"):
        count_kept(torch.tensor([4, 5]), 3, torch.zeros(5, dtype=torch.int32))
