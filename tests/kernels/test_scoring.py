"""Dense attention that stores scores: what its kernel, which needs a GPU, could not store."""

import pytest
import torch

from lim_sglang.kernels.scoring import ScoringAttention


@pytest.mark.parametrize("strides", [(364, 91, 1), (135, 45, 1), (177, 44, 1)])
def test_scores_that_cannot_be_stored_in_pairs_are_refused(
    strides: tuple[int, ...],
) -> None:
    attention = object.__new__(ScoringAttention)  # compiled only where there is a GPU
    query = torch.zeros(2, 4, 64)
    cache = (torch.zeros(200, 2, 64), torch.zeros(200, 2, 64))
    scores = torch.empty_strided((2, 3, 44), strides)
    with pytest.raises(ValueError, match="multiples of two elements, not at strides"):
        attention.run(None, query, cache, 1.0, scores, budget=32)
