"""Functions of SGLang's CPU kernels that its speculative decoding calls, in torch.

The wheels for GPUs have none of SGLang's CPU kernels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def write_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    starts: Tensor,
    ends: Tensor,
    slots: Tensor,
    _row_length: int,
) -> None:
    """Write reserved slots into the rows of their requests.

    Args:
        req_pool_indices: [B], the rows.
        starts, ends: [B], positions of each row's slots.
        slots: [sum of ends - starts], of all rows one after the other.
    """
    lengths = (ends - starts).long()
    rows = req_pool_indices.long().repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    columns = torch.arange(len(slots)) + (starts.long() - first).repeat_interleave(lengths)
    req_to_token[rows, columns] = slots.to(req_to_token.dtype)


def copy_in_place(_data: Tensor, _strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy keys and values of slots onto themselves, as SGLang does once for warming up.

    Drafts are a chain, whose accepted keys and values are where they belong.
    """
    if not torch.equal(targets, sources):
        raise NotImplementedError("keys and values of drafts are never moved on a CPU")


REPLACED: Mapping[str, Callable[..., Any]] = {
    "assign_req_to_token_pool_cpu": write_slots,
    "copy_all_layer_kv_cache_cpu": copy_in_place,
}
"""By the name in `sgl_kernel`."""
