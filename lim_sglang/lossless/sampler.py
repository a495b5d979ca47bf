"""`--sampling-backend lim`: coupled sampling, with a seed of its own for each request.

A request gets the same tokens alone and in any batch, up to the rounding of its logits, whatever
its temperature and filters. Defined by `kernels/reference_sampling.py`.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor

from lim_sglang.compat import Sampler, server_arguments
from lim_sglang.config import BACKEND
from lim_sglang.kernels.coupled_sampling import pick_coupled
from lim_sglang.kernels.reference_sampling import coupled_pick


class CoupledSampler(Sampler):
    """SGLang's sampler, but for the draw itself."""

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> Tensor:
        """Draw from [B, V] probabilities, for each row by its seed and position: [B] int32."""
        return _pick(probs.float(), sampling_info, positions).int()

    def draw(self, logits: Tensor, sampling_info: Any, positions: Tensor, width: int) -> Tensor:
        """Draw a token of each row, as a step does, without logprobs and masks of grammars.

        Args:
            logits: [B * width, V].
            sampling_info: SGLang's, of B requests.
            positions: [B * width], of the queries.
            width: rows of each request.

        Returns:
            [B * width] int64.
        """
        if sampling_info.is_all_greedy:
            return logits.argmax(-1)
        probs = (logits / _by_row(sampling_info.temperatures, width)).softmax(-1)
        return _pick(probs, sampling_info, positions, width)


def _pick(probs: Tensor, info: Any, positions: Tensor, width: int = 1) -> Tensor:
    settings = info.sampling_seed, info.top_ks, info.top_ps, info.min_ps
    seeds, *filters = (_by_row(each, width) for each in settings)
    pick = pick_coupled if probs.is_cuda else coupled_pick
    return pick(probs, seeds, positions, *filters)


def _by_row(values: Tensor, width: int) -> Tensor:
    return values if width == 1 else values.repeat_interleave(width, dim=0)


def fill_seeds(sampling_info: Any, _class: type, batch: Any, _vocab_size: int) -> None:
    """Give each request of a batch its seed, where SGLang gives none."""
    if server_arguments().sampling_backend != BACKEND:
        return
    seeds = torch.tensor([seed_of(request) for request in batch.reqs], dtype=torch.int64)
    sampling_info.sampling_seed = seeds.to(batch.device, non_blocking=True)


def seed_of(request: Any) -> int:
    """Return a request's seed as a signed number of 64 bits; without one, a number from its id."""
    seed = request.sampling_params.sampling_seed
    if seed is not None:
        return (seed + 2**63) % 2**64 - 2**63  # sample i has its request's seed plus i
    digest = hashlib.blake2b(str(request.rid).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
