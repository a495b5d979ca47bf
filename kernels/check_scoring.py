"""Judges the dense pass that leaves its scores behind: scores by the reference, attention by bits.

Needs a GPU and nvcc, since FlashInfer's kernel is compiled.
"""

import torch
import triton

from lim_sglang.kernels import reference
from lim_sglang.kernels.check import SCORE_TOLERANCE, Batch, draw, relative_error, row_slots
from lim_sglang.kernels.scoring import ScoreStoringAttention, planned_decode


def differing_scoring(batch: Batch) -> list[str]:
    """Rows whose stored scores, normalisers or attention differ; scores where none should be.

    Rows longer than FlashInfer's chunks are split, and the last tile of a chunk computes positions
    that belong to the next one: lengths decide what is tried.
    """
    tensors = draw(batch, "cuda")
    rows, width = len(batch.lengths), triton.cdiv(tensors.scores.shape[2], 2) * 2
    values = tensors.keys.flip(0).contiguous()
    planned = planned_decode(
        tensors.indptr,
        tensors.slots,
        heads=batch.heads,
        kv_heads=batch.kv_heads,
        head_dim=batch.dim,
        dtype=batch.dtype,
    )
    cache = (tensors.keys, values)
    scores = torch.full((rows, batch.heads, width), torch.nan, device="cuda")
    lse = torch.full((rows, batch.heads), torch.nan, device="cuda")
    attention = ScoreStoringAttention(batch.dtype, batch.dim)
    output = attention.run(
        planned, tensors.query, cache, batch.scale, scores, batch.budget_split.budget, lse
    )
    found = []
    pages = (tensors.keys[:, None], values[:, None])
    if not torch.equal(output, planned.run(tensors.query, pages)):
        found.append("attention has other bits than FlashInfer's")
    for row, length in enumerate(batch.lengths):
        stored = length if row in batch.sparse else 0
        if not scores[row, :, stored:].isnan().all():
            found.append(f"row {row}: scores stored past its {stored}")
        wanted = reference.score_tokens(tensors.query[row], tensors.keys[row_slots(tensors, row)])
        if not torch.allclose(
            lse[row], reference.log_sum_exp(wanted, batch.scale), rtol=1e-4, atol=1e-4
        ):
            found.append(f"row {row}: other normalisers")
        if stored:
            error = relative_error(scores[row, :, :length], wanted)
            if not error <= SCORE_TOLERANCE:
                found.append(f"row {row}: stored scores are off by {error:.2e}")
    return found
