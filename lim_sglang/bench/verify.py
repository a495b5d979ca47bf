"""Exactness before any time: of the kernels on this GPU, and of the step that is timed.

The step is judged by the memory that a replay of the timed CUDA graph leaves, or by another replay.
Shapes: S tokens of a request, of which n are kept under a budget of K.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench.model_runner import Contender, FilledBatch, run_step
from lim_sglang.bench.workloads import Point, SparseReads
from lim_sglang.config import BACKEND
from lim_sglang.errors import LimError, bullets
from lim_sglang.kernels.launch import interpreted
from lim_sglang.kernels.packed import row_ends
from lim_sglang.kernels.verify_attention import ATTENTION_TOLERANCE, attention_error
from lim_sglang.policies.policy import SPARSE, Role


def require_gpu() -> None:
    """Refuse to measure without a GPU, or with interpreted kernels."""
    if not torch.cuda.is_available():
        raise LimError("lim bench needs an NVIDIA GPU: on a CPU, timings prove nothing")
    if interpreted():
        raise LimError("TRITON_INTERPRET is set: unset it, interpreted kernels have no speed")


def require_exact_kernels() -> None:
    """Refuse to measure without a GPU, or on one whose kernels differ from the definition."""
    from lim_sglang.verify_gpu import verify_gpu

    require_gpu()
    refuse_differences(verify_gpu(), "on this GPU")


def check_this_gpu(console: Console) -> None:
    """Refuse a GPU on which a kernel is not exact; a machine without a GPU needs no check."""
    if torch.cuda.is_available():
        console.print("Checking the kernels on this GPU")
        require_exact_kernels()


def refuse_differences(differences: Sequence[str], where: str) -> None:
    """Raise a `LimError` with the list of differences, if there are any."""
    if differences:
        raise LimError(f"no time is shown: kernels are not exact {where}:{bullets(differences)}")


def require_exact_steps(
    runner: Any, batch: FilledBatch, contenders: Sequence[Contender], budget: int
) -> dict[str, int]:
    """Run a step of each contender, and refuse logits that are not finite and a step of ours that
    differs from the definition.

    The first contender with a problem is refused at once: with several ranks, the others may wait
    in a collective operation that a rank with a problem does not come to.

    Returns:
        The rows that were counted as sparse in each step of ours, by the contender's name.
    """
    num_sparse = {}
    for contender in contenders:
        problems = []
        contender.take_over(runner)
        before = runner.lim_stats.sparse_rows
        # A step that does not write kept slots and scores is noticed.
        if getattr(runner, "lim_kept_slots", None) is not None:
            runner.lim_kept_slots.zero_()
            if (scores := runner.lim_selector.own_scores) is not None:
                scores.values.fill_(torch.nan)
        if not run_step(runner, batch).isfinite().all():
            problems.append(f"{contender.name} gives logits that are not finite")
        if contender.is_ours:
            num_sparse[contender.name] = runner.lim_stats.sparse_rows - before
            prefix = "" if contender.name == BACKEND else f"{contender.name}: "
            problems += [f"{prefix}{each}" for each in step_differences(runner, batch, budget)]
        if problems:
            raise LimError(f"no time is shown of {batch.point}: {'; '.join(problems)}")
    return num_sparse


def kept_slots(runner: Any, point: Point) -> tuple[Tensor, ...] | None:
    """Return a copy of the slots that each row of the last step keeps, [n] int64; None on a CPU,
    where the runner keeps no slots."""
    kept = getattr(runner, "lim_kept_slots", None)
    if kept is None:
        return None
    counts = [runner.lim_policy.count_read(length) for length in point.lengths]
    return kept[..., : sum(counts)].long().split(counts, dim=-1)


def sparse_reads(runner: Any, batch: FilledBatch) -> SparseReads:
    """Return what the sparse layers of the step that our backend has just run have read; the lists
    are those of the last such layer."""
    roles, point = runner.lim_roles, batch.point
    kv_heads = next(compat.attention_layers(runner.model)).tp_k_head_num
    tokens = 0.0
    for lists in map(torch.atleast_2d, kept_slots(runner, point) or ()):
        # The query heads of a KV head may have lists of their own.
        unions = [len(of_head.unique()) for of_head in lists.chunk(min(len(lists), kv_heads))]
        tokens += sum(unions) / len(unions)
    policy = runner.lim_policy
    over = (point.lengths[row] for row in point.rows_over(policy.budget))
    blocks = sum(-(-length // policy.block) - 1 for length in over)  # but for the newest
    summaries = getattr(runner, "lim_summaries", {})
    return SparseReads(
        num_layers=sum(role in SPARSE for role in roles),
        tokens=tokens,
        summary_bytes=sum(
            blocks * each[0].nbytes + runner.lim_selector.read_once(layer)
            for layer, each in summaries.items()
        ),
    )


def step_differences(runner: Any, batch: FilledBatch, budget: int) -> list[str]:
    """List where the step that our backend has just run differs from the definition; empty if no
    row is sparse."""
    roles, point = runner.lim_roles, batch.point
    sparse, kept = point.rows_over(budget), kept_slots(runner, point)
    if not sparse:
        return []
    if kept is not None and (wrong := rows_with_wrong_slots(batch, kept)):
        # Slots of other requests cannot be examined more closely.
        return [
            f"row {', '.join(map(str, wrong))} does not keep {budget:,} slots, or all of a shorter "
            "row, of its own, in order, its newest among them"
        ]
    if not any(role in SPARSE for role in roles):
        return []
    selecting = [layer for layer, role in enumerate(roles) if role is Role.SELECT]
    last_select = max(selecting, default=-1)  # -1: written as the step begins, or in each layer
    above = [n for n, role in enumerate(roles) if role in SPARSE and n > last_select]
    if not above:
        return [f"layer {last_select} selects for no layer, so its set is not proved"]
    if kept is None:
        return ["the runner keeps no slots, so no set is proved"]
    layer = list(compat.attention_layers(runner.model))[above[-1]]
    return [
        *differing_sets(runner.lim_selector, batch, kept),
        *differing_attention(runner, batch, layer),
        *differing_reads(runner, batch, sparse[-1], kept[sparse[-1]], layer.layer_id),
    ]


def rows_with_wrong_slots(batch: FilledBatch, kept: Sequence[Tensor]) -> list[int]:
    """List the rows whose kept slots are not their own, in order of position, newest last."""

    def is_right(slots: Tensor, found: Tensor) -> bool:
        ascending, position = slots.sort()
        index = torch.searchsorted(ascending, found).clamp(max=len(slots) - 1)
        positions = position[index]
        own = (ascending[index] == found).all()
        in_order = (positions[1:] > positions[:-1]).all()
        return bool(own & in_order & (positions[-1] == len(slots) - 1))

    pairs = zip(batch.slots, map(torch.atleast_2d, kept), strict=True)
    return [
        row
        for row, (slots, lists) in enumerate(pairs)
        if not all(is_right(slots, found) for found in lists)
    ]


def differing_sets(selector: Any, batch: FilledBatch, kept: Sequence[Tensor]) -> list[str]:
    """List the rows over the budget that keep other slots than their scores give.

    Only rows of the last chunk with a row over the budget, whose scores of the last SELECT layer
    are still in memory. The others have `rows_with_wrong_slots`. All ranks call this together.
    """
    if (own_scores := selector.own_scores) is None:
        over = batch.point.rows_over(selector.budget)
        keeps = {row: selector.keep(None, batch.point.lengths[row]) for row in over}
        wrong = [row for row in over if not torch.equal(kept[row], batch.slots[row][keeps[row]])]
        return [f"row {row} keeps another set than its length gives" for row in wrong]
    over, lengths, found = batch.point.rows_over(selector.budget), batch.point.lengths, []
    first = over[-1] // own_scores.max_rows * own_scores.max_rows
    of_chunk = lengths[first : first + own_scores.max_rows]
    in_chunk = own_scores.rows(row_ends(of_chunk))
    for row in (row for row in over if row >= first):
        length = lengths[row]
        own = in_chunk[row - first][:, : selector.num_candidates(length)]
        scores = selector.of_all_ranks(own)  # before all that hangs on this rank's own scores
        if not scores.isfinite().all():
            found.append(f"row {row} has scores that are not finite, or not written")
        elif not torch.equal(kept[row], batch.slots[row][selector.keep(scores, length)]):
            found.append(f"row {row} keeps another set than its scores give")
    return found


def differing_attention(runner: Any, batch: FilledBatch, layer: Any) -> list[str]:
    """List the rows whose attention in a sparse layer is not the attention over the kept slots.

    A replay does not expose its queries, so the layer runs once more by itself, with a random
    query, over the slots that the replay kept, or that a PICK layer keeps now. K and V of an fp8
    cache are exact in f32; the layer's scales of K and V are SGLang's.
    """
    rows, heads, dim = batch.point.batch, layer.tp_q_head_num, layer.head_dim
    query = torch.randn(rows, heads * dim, device=runner.device, dtype=runner.dtype)
    output = runner.attn_backend.forward_decode(
        query, None, None, layer, batch.forward_batch, save_kv_cache=False
    )
    kept = kept_slots(runner, batch.point) or ()
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
    runner: Any, batch: FilledBatch, row: int, kept: Tensor, layer: int
) -> list[str]:
    """List the ways in which the timed graph reads other slots of a row than the kept ones.

    Two steps run with a part of V overwritten, in a layer above the last SELECT layer, which does
    not decide about the sets: huge values in the slots that a row over the budget does not keep
    must not change the row's logits, zeros in the slots that the row keeps, [K] int64, must.
    """
    pool, slots, found = runner.token_to_kv_pool, batch.slots[row], []
    others = slots[~torch.isin(slots, kept)]
    before = run_step(runner, batch)[row].clone()
    # Not every conversion of fp8 keeps NaN (FlashInfer's moves bits, vec_dtypes.cuh).
    keeps_nan = pool.dtype.itemsize > 1
    with _overwritten(pool, layer, others, torch.nan if keeps_nan else torch.finfo(pool.dtype).max):
        after = run_step(runner, batch)
        if not after.isfinite().all() or not (keeps_nan or torch.equal(after[row], before)):
            found.append(f"layer {layer} reads more than the kept slots")
    with _overwritten(pool, layer, kept, 0.0):
        if torch.equal(run_step(runner, batch)[row], before):
            found.append(f"layer {layer} reads no kept slot")
    return found


@contextmanager
def _overwritten(pool: Any, layer: int, slots: Tensor, value: float) -> Iterator[None]:
    """Replace the V of some slots in one layer until the block ends."""
    buffer = pool.v_buffer[layer]
    saved = buffer[slots]
    filler = torch.full(saved.shape, value, device=saved.device)
    buffer[slots] = filler.to(pool.dtype).view(pool.store_dtype)
    try:
        yield
    finally:
        buffer[slots] = saved
