"""What the step that is timed really did, against the definition.

Everything here looks at what a replay of the timed CUDA graph has left, or replays it once more.

Shapes: B requests, S tokens of one of them, of which min(S, K) are kept under a budget of K; H
query heads, G KV heads, D head_dim; R rows a chunk of the selector.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench.batch import FilledBatch, kept_slots
from lim_sglang.config import Role
from lim_sglang.kernels.reference import keep_tokens
from lim_sglang.kernels.verify import ATTENTION_TOLERANCE, attention_error


def differences(
    runner: Any, batch: FilledBatch, budget: int, step: Callable[[], Tensor]
) -> list[str]:
    """Where our backend's step is not the definition's; nothing where no row is sparse.

    Args:
        runner: our backend serves, and has just served a step.
        step: runs one more step; the logits [B, V].
    """
    roles, point = runner.lim_roles, batch.point
    sparse = point.rows_over(budget)
    if Role.REUSE not in roles or not sparse:
        return []
    last_select = max(layer for layer, role in enumerate(roles) if role is Role.SELECT)
    above = [
        layer for layer, role in enumerate(roles) if role is Role.REUSE and layer > last_select
    ]
    if not above:
        return [f"{point}: layer {last_select} selects for no layer, so its set is not proved"]
    layer = list(compat.attention_layers(runner.model))[above[-1]]
    kept = kept_slots(runner, point, budget)
    if kept is None:
        return [f"{point}: the runner keeps no slots, so no set is proved"]
    last, pool = sparse[-1], runner.token_to_kv_pool
    return [
        f"{point}: {problem}"
        for problem in (
            *differing_sets(runner.lim_selector, batch, kept),
            *differing_attention(runner, batch, kept, layer),
            *differing_reads(pool, last, batch.slots[last], kept[last], layer.layer_id, step),
        )
    ]


def differing_sets(selector: Any, batch: FilledBatch, kept: Sequence[Tensor]) -> list[str]:
    """Rows over the budget that keep other slots than their scores give.

    Only those whose scores in the last SELECT layer are still there: a later chunk's row over the
    budget overwrites an earlier one's in the same place. For all others there is `check_kept`.

    Args:
        kept: [min(S, K)] int64 a row.
    """
    chunk = selector.deciding_scores.shape[0]
    scored = {row % chunk: row for row in batch.point.rows_over(selector.budget_split.budget)}
    found = []
    for place, row in sorted(scored.items(), key=lambda item: item[1]):
        scores = selector.deciding_scores[place, :, : batch.point.lengths[row]]
        if not scores.isfinite().all():
            found.append(f"row {row} has scores that are not finite, or not written")
        elif not torch.equal(
            kept[row], batch.slots[row][keep_tokens(scores, selector.budget_split)]
        ):
            found.append(f"row {row} keeps another set than its scores give")
    return found


def differing_attention(
    runner: Any, batch: FilledBatch, kept: Sequence[Tensor], layer: Any
) -> list[str]:
    """Rows whose attention in a REUSE layer is not that over the kept slots.

    A replay shows nobody its queries, so the layer runs once more by itself, over the slots that
    the replay left, with a query that is drawn. K and V of an fp8 cache are exact in
    f32; a layer's scales of them are SGLang's.
    """
    rows, heads, dim = batch.point.batch, layer.tp_q_head_num, layer.head_dim
    query = torch.randn(rows, heads * dim, device=runner.device, dtype=runner.dtype)
    output = runner.attn_backend.forward_decode(
        query, None, None, layer, batch.forward_batch, save_kv_cache=False
    )
    pool = runner.token_to_kv_pool
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    scale, v_scale = layer.scaling * (layer.k_scale_float or 1.0), layer.v_scale_float or 1.0
    found = []
    for row in range(rows):
        shown, asked = (tensor[row].view(heads, dim) for tensor in (output, query))
        error = attention_error(shown, asked, keys, values, kept[row], scale, v_scale)
        if not error <= ATTENTION_TOLERANCE[runner.dtype]:
            found.append(f"row {row}: attention in layer {layer.layer_id} is off by {error:.1e}")
    return found


def differing_reads(
    pool: Any, row: int, slots: Tensor, kept: Tensor, layer: int, step: Callable[[], Tensor]
) -> list[str]:
    """Whether the timed graph reads in a REUSE layer just what a row over the budget keeps.

    The layer's V is overwritten for one step each: by what cannot be missed where the row keeps
    nothing, which must not be seen, and by zeros where it does, which must.

    Args:
        row: its place in the batch.
        slots: [S] int64, the row's.
        kept: [K] int64.
    """
    others = slots[~torch.isin(slots, kept)]
    # A layer above the last SELECT layer decides nothing about the sets.
    before = step()[row].clone()
    # Not every conversion of fp8 keeps NaN (FlashInfer's moves bits, vec_dtypes.cuh).
    survives = pool.dtype.itemsize > 1
    with _overwritten(pool, layer, others, torch.nan if survives else torch.finfo(pool.dtype).max):
        after = step()
        seen = not after.isfinite().all() or not (survives or torch.equal(after[row], before))
        found = [f"layer {layer} reads more than the kept slots"] if seen else []
    with _overwritten(pool, layer, kept, 0.0):
        found += [f"layer {layer} reads no kept slot"] if torch.equal(step()[row], before) else []
    return found


@contextmanager
def _overwritten(pool: Any, layer: int, slots: Tensor, value: float) -> Iterator[None]:
    """Replace the V of some slots in one layer, and put it back."""
    buffer = pool.v_buffer[layer]
    saved = buffer[slots]
    filler = torch.full(saved.shape, value, device=saved.device)
    buffer[slots] = filler.to(pool.dtype).view(pool.store_dtype)
    try:
        yield
    finally:
        buffer[slots] = saved
