"""Dense attention that stores scores: what its kernel, which needs a GPU, could not store."""

import pytest
import torch

from lim_sglang.kernels.scores import ScoreStoringAttention

PAIRS = "multiples of 8 bytes, not at address"


@pytest.mark.parametrize(
    ("strides", "offset", "dtype", "reason"),
    [
        *(((364, 91, 1), 0, torch.float32, PAIRS), ((135, 45, 1), 0, torch.float32, PAIRS)),
        *(((177, 44, 1), 0, torch.float32, PAIRS), ((132, 44, 1), 1, torch.float32, PAIRS)),
        ((132, 44, 1), 0, torch.bfloat16, "must be float32, not torch.bfloat16"),
    ],
)
def test_scores_that_cannot_be_stored_are_refused(
    strides: tuple[int, ...], offset: int, dtype: torch.dtype, reason: str
) -> None:
    attention = object.__new__(ScoreStoringAttention)  # compiled only where there is a GPU
    query = torch.zeros(2, 4, 64)
    cache = (torch.zeros(200, 2, 64), torch.zeros(200, 2, 64))
    scores = torch.zeros(1000, dtype=dtype).as_strided((2, 3, 44), strides, offset)
    with pytest.raises(ValueError, match=reason):
        attention.run(None, query, cache, 1.0, scores, budget=32)
