"""How long attention over a kept set takes: as a REUSE layer runs it, and FlashInfer in its place.

What is timed is compared with `reference.attend_tokens` before; `bench.py` times it.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels.attend import attend_tokens
from lim_sglang.kernels.bench import Case
from lim_sglang.kernels.check import ATTENTION_TOLERANCE
from lim_sglang.kernels.check_attend import attention_error
from lim_sglang.kernels.parts import SplitWorkspace
from lim_sglang.kernels.scoring import planned_decode

OURS = "sparse-attention"
"""What REUSE layers run."""
TENSOR_CORES, CUDA_CORES = "sparse-attention-tensor-cores", "sparse-attention-cuda-cores"
"""FlashInfer's decode at page size 1; SGLang takes the former from 4 query heads a KV head on."""
FLASHINFER_OPS = (TENSOR_CORES, CUDA_CORES)
ATTENTION_OPS = (OURS, *FLASHINFER_OPS)
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads a KV head that FlashInfer compiles for CUDA cores (DISPATCH_GQA_GROUP_SIZE)."""


LAYERS = 8
"""Layers with K and V of their own that run one after the other, as in a step: so the launch of a
graph is no part of a layer's time, and each finds a cache that others have filled."""
MAX_CACHE_BYTES = 16 << 30
"""Of K and V together, from which on there are fewer layers."""


class OwnAttention:
    """`attend.py` in the place of FlashInfer's wrapper."""

    def __init__(self, case: Case, indptr: Tensor, slots: Tensor) -> None:
        self._case, self._indptr, self._slots = case, indptr, slots
        self._workspace = SplitWorkspace.allocate(
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            dim=case.dim,
            cache_dtype=case.dtype,
            device=slots.device,
        )

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """Attend [B, H, D] over the kept slots, in pages of one token."""
        keys, values = (cache.squeeze(1) for cache in pages)
        return attend_tokens(
            *(query, keys, values, self._slots, self._indptr),
            longest=self._case.budget,
            scale=self._case.scale,
            workspace=self._workspace,
            out=out,
        )


@dataclass(frozen=True)
class AttentionLayers:
    """Some layers' attention over kept slots, ready to run again and again.

    Shapes: L layers, B rows that keep K slots each of a pool of P = B * context; H query heads,
    G KV heads, D head_dim.
    """

    case: Case
    attention: Any
    """FlashInfer's planned wrapper, or `OwnAttention`."""
    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[L, P, G, D]."""
    values: Tensor
    """[L, P, G, D]."""
    slots: Tensor
    """[B, K] int32, ascending in a row; no slot belongs to two rows."""
    outputs: Tensor
    """[L, B, H, D], NaN until they have run."""

    @property
    def times(self) -> int:
        """L."""
        return len(self.outputs)

    @property
    def num_bytes(self) -> int:
        """K and V of the kept tokens, queries and output of a layer: what cannot be avoided."""
        kept = self.slots.numel() * self.case.kv_heads * self.case.dim * self.keys.itemsize
        return 2 * kept + 2 * self.query.nbytes

    def run(self) -> None:
        """Attend once a layer; a CUDA graph may capture it."""
        for keys, values, output in zip(self.keys, self.values, self.outputs, strict=True):
            pages = keys.unsqueeze(1), values.unsqueeze(1)  # of one token
            self.attention.run(self.query, pages, out=output)

    def differences(self) -> list[str]:
        """Rows of the last run that are not the definition's, beyond the tolerance."""
        found = []
        for layer, row in product(range(self.times), range(self.case.batch)):
            error = attention_error(
                self.outputs[layer, row],
                self.query[row],
                self.keys[layer],
                self.values[layer],
                self.slots[row].long(),
                self.case.scale,
            )
            if not error <= ATTENTION_TOLERANCE[self.case.dtype]:
                found.append(f"layer {layer}, row {row}: attention is off by {error:.1e}")
        return found


def prepare_attention(
    op: str, case: Case, device: torch.device | str, seed: int = 0
) -> AttentionLayers:
    """Draw a batch and its kept slots, and make ready what runs in a CUDA graph.

    Raises:
        ValueError: the operation is unknown.
    """
    if op not in ATTENTION_OPS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(ATTENTION_OPS)}")
    generator = torch.Generator(device).manual_seed(seed)
    pool = case.batch * case.context

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    drawn = torch.randperm(pool, generator=generator, device=device)[: case.batch * case.budget]
    slots = drawn.view(case.batch, case.budget).sort(dim=1).values.int()
    indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.budget
    attention: Any
    if op == OURS:
        attention = OwnAttention(case, indptr, slots.view(-1))
    else:
        attention = planned_decode(
            indptr,
            slots.view(-1),
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.dim,
            dtype=case.dtype,
            tensor_cores=op == TENSOR_CORES,
            in_graph=True,
        )
    query = normal(case.batch, case.heads, case.dim)
    layer_bytes = 2 * pool * case.kv_heads * case.dim * case.dtype.itemsize
    layers = max(1, min(LAYERS, MAX_CACHE_BYTES // layer_bytes))
    keys, values = (normal(layers, pool, case.kv_heads, case.dim) for _ in range(2))
    outputs = torch.full((layers, *query.shape), torch.nan, dtype=query.dtype, device=query.device)
    return AttentionLayers(case, attention, query, keys, values, slots, outputs)
