"""What the step that is timed really did, against the definition.

Everything here looks at what a replay of the timed CUDA graph has left, or replays it once more.

Shapes: B requests of S tokens each, more than the K that the budget allows; H query heads, G KV
heads, D head_dim; R rows a chunk of the selector.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench.batch import FilledBatch
from lim_sglang.kernels.check import ATTENTION_TOLERANCE, relative_error
from lim_sglang.kernels.reference import attend_tokens, keep_tokens
from lim_sglang.schedule import Role


def differences(
    runner: Any, batch: FilledBatch, budget: int, step: Callable[[], Tensor]
) -> list[str]:
    """Where our backend's step is not the definition's; nothing where no row is sparse.

    Args:
        runner: our backend serves, and has just served a step.
        step: runs one more step; the logits [B, V].
    """
    roles, point = runner.lim_roles, batch.point
    if Role.REUSE not in roles or point.context <= budget:
        return []
    last_select = max(layer for layer, role in enumerate(roles) if role is Role.SELECT)
    above = [
        layer for layer, role in enumerate(roles) if role is Role.REUSE and layer > last_select
    ]
    if not above:
        return [f"{point}: layer {last_select} selects for no layer, so its set is not proved"]
    layer = list(compat.attention_layers(runner.model))[above[-1]]
    kept = runner.lim_kept_slots[: point.batch * budget].view(point.batch, budget).long()  # a copy
    return [
        f"{point}: {problem}"
        for problem in (
            *differing_sets(runner.lim_selector, batch, kept),
            *differing_attention(runner, batch, kept, layer),
            *differing_reads(runner.token_to_kv_pool, batch, kept, layer.layer_id, step),
        )
    ]


def differing_sets(selector: Any, batch: FilledBatch, kept: Tensor) -> list[str]:
    """Rows that keep other slots than their scores give: those whose scores are still there.

    These are the rows of the last chunk in the last SELECT layer; for rows of earlier chunks there
    is `check_kept`.

    Args:
        kept: [B, K] int64.
    """
    chunk = selector.decisive.shape[0]
    first = (batch.point.batch - 1) // chunk * chunk
    found = []
    for row in range(first, batch.point.batch):
        scores = selector.decisive[row - first, :, : batch.point.context]
        if not scores.isfinite().all():
            found.append(f"row {row} has scores that are not finite, or not written")
        elif not torch.equal(kept[row], batch.slots[row, keep_tokens(scores, selector.shares)]):
            found.append(f"row {row} keeps another set than its scores give")
    return found


def differing_attention(runner: Any, batch: FilledBatch, kept: Tensor, layer: Any) -> list[str]:
    """Rows whose attention in a REUSE layer is not that over the kept slots.

    A replay shows nobody its queries, so the layer runs once more by itself, on the plan and the
    slots that the replay left, with a query that is drawn.
    """
    rows, heads, dim = batch.point.batch, layer.tp_q_head_num, layer.head_dim
    query = torch.randn(rows, heads * dim, device=runner.device, dtype=runner.dtype)
    output = runner.attn_backend.forward_decode(
        query, None, None, layer, batch.forward_batch, save_kv_cache=False
    )
    pool = runner.token_to_kv_pool
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    found = []
    for row in range(rows):
        wanted = attend_tokens(
            query[row].view(heads, dim).float(), keys, values, kept[row], layer.scaling
        )
        error = relative_error(output[row].view(heads, dim), wanted)
        if not error <= ATTENTION_TOLERANCE[runner.dtype]:
            found.append(f"row {row}: attention in layer {layer.layer_id} is off by {error:.1e}")
    return found


def differing_reads(
    pool: Any, batch: FilledBatch, kept: Tensor, layer: int, step: Callable[[], Tensor]
) -> list[str]:
    """Whether the timed graph reads in a REUSE layer just what the last row keeps.

    The layer's V is overwritten for one step each: by NaN where the row keeps nothing, which must
    not be seen, and by zeros where it does, which must.
    """
    mine, others = kept[-1], batch.slots[-1][~torch.isin(batch.slots[-1], kept[-1])]
    # A layer above the last SELECT layer decides nothing about the sets.
    before = step()[-1].clone()
    with _overwritten(pool, layer, others, torch.nan):
        found = [] if step().isfinite().all() else [f"layer {layer} reads more than the kept slots"]
    with _overwritten(pool, layer, mine, 0.0):
        found += [f"layer {layer} reads no kept slot"] if torch.equal(step()[-1], before) else []
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
