"""A decode batch whose context is really there: every layer's K and V, in scattered slots."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench.points import Point
from lim_sglang.errors import LimError

FILL_ROWS = 1 << 16
"""Slots of one layer that are drawn at a time."""


@dataclass(frozen=True)
class FilledBatch:
    """Requests in the middle of decoding."""

    point: Point
    slots: tuple[Tensor, ...]
    """[S] int64 a request: where its tokens lie, oldest first."""
    forward_batch: Any


def fill_cache(pool: Any, seed: int) -> None:
    """Draw K and V of every slot and layer from a normal distribution, in place."""
    generator = torch.Generator(pool.k_buffer[0].device).manual_seed(seed)
    for buffer in [*pool.k_buffer, *pool.v_buffer]:
        for piece in buffer.split(FILL_ROWS):
            drawn = torch.randn(
                piece.shape, generator=generator, device=piece.device, dtype=torch.bfloat16
            )
            piece.copy_(drawn.to(pool.dtype).view(pool.store_dtype))


def check_room(runner: Any, points: tuple[Point, ...]) -> None:
    """Refuse points that the KV cache or the model's context cannot hold, all at once."""
    room, context = runner.max_total_num_tokens, runner.model_config.context_len
    reasons = [
        f"{point} fills {point.num_tokens:,} slots, the KV cache has {room:,}"
        for point in points
        if point.num_tokens > room
    ]
    reasons += [
        f"{point} is longer than the model's context of {context:,} tokens"
        for point in points
        if point.longest > context
    ]
    if reasons:
        raise LimError("; ".join(reasons))


@contextmanager
def filled_batch(runner: Any, point: Point, seed: int) -> Iterator[FilledBatch]:
    """Give a batch its slots, in random order, for as long as it is measured.

    The newest token of each request has a slot like the others; each step writes its K and V there
    again and the length stays, so that all steps of all windows do the same.
    """
    device = runner.device
    generator = torch.Generator(device).manual_seed(seed)
    allocator, pool = runner.token_to_kv_pool_allocator, runner.req_to_token_pool
    free = allocator.alloc(point.num_tokens)
    if free is None or len(pool.free_slots) < point.batch:
        raise LimError(f"the runner has no room for {point}")
    order = torch.randperm(point.num_tokens, generator=generator, device=device)
    slots = free[order].split(point.lengths)
    requests = pool.free_slots[: point.batch]
    for request, mine in zip(requests, slots, strict=True):
        pool.req_to_token[request, : len(mine)] = mine.to(torch.int32)
    rows = torch.tensor(requests, dtype=torch.int64, device=device)
    tokens = torch.randint(
        runner.model_config.vocab_size, (point.batch,), generator=generator, device=device
    )
    try:
        yield FilledBatch(point, slots, _decode_batch(runner, point, rows, slots, tokens))
    finally:
        allocator.clear()


def _decode_batch(
    runner: Any, point: Point, rows: Tensor, slots: Sequence[Tensor], tokens: Tensor
) -> Any:
    """The fields that SGLang's decode reads, as `ForwardBatch.init_new` fills them."""
    lengths = torch.tensor(point.lengths, dtype=torch.int64)
    on_device = lengths.to(runner.device)
    return compat.ForwardBatch(
        forward_mode=compat.ForwardMode.DECODE,
        batch_size=point.batch,
        input_ids=tokens,
        req_pool_indices=rows,
        seq_lens=on_device,
        out_cache_loc=torch.stack([mine[-1] for mine in slots]),
        seq_lens_sum=point.num_tokens,
        seq_lens_cpu=lengths,
        orig_seq_lens=on_device,
        positions=on_device - 1,
        spec_algorithm=runner.spec_algorithm,
        capture_hidden_mode=compat.CaptureHiddenMode.NULL,
        num_token_non_padded_cpu=point.batch,
    )


def prepare_kept(runner: Any) -> None:
    """Empty the kept slots and the scores, so that what the next step does not write is seen."""
    kept = getattr(runner, "lim_kept_slots", None)
    if kept is not None:
        kept.zero_()
    selector = getattr(runner, "lim_selector", None)
    if selector is not None:
        selector.deciding_scores.fill_(torch.nan)


def kept_slots(runner: Any, point: Point, budget: int) -> tuple[Tensor, ...] | None:
    """What each row of the last step keeps, [min(S, budget)] int64 a row; a copy.

    None where the runner keeps no slots, as on a CPU.
    """
    kept = getattr(runner, "lim_kept_slots", None)
    if kept is None:
        return None
    counts = [min(length, budget) for length in point.lengths]
    return kept[: sum(counts)].long().split(counts)


def check_kept(runner: Any, batch: FilledBatch, budget: int) -> str | None:
    """What is wrong with the kept slots of the step that just ran, None where nothing is.

    Every row must keep different slots of its own, in order of position, its newest token among
    them: as many as the budget allows, so that a row within it keeps all.
    """
    point = batch.point
    kept = kept_slots(runner, point, budget)
    if kept is None or not point.rows_over(budget):
        return None
    wrong = [
        row
        for row, (mine, found) in enumerate(zip(batch.slots, kept, strict=True))
        if not keeps_own(mine, found)
    ]
    if not wrong:
        return None
    return (
        f"{point}: row {', '.join(map(str, wrong))} does not keep {budget:,} slots, or all that it "
        "has, of its own, in order, its newest among them"
    )


def keeps_own(slots: Tensor, kept: Tensor) -> bool:
    """Whether a row's kept slots are its own, in order of position, and end with its newest.

    Args:
        slots: [S] int64, oldest first, each once.
        kept: [n] int64.
    """
    ascending, position = slots.sort()
    places = torch.searchsorted(ascending, kept).clamp(max=len(slots) - 1)
    found = position[places]
    own = (ascending[places] == kept).all()
    in_order = (found[1:] > found[:-1]).all()
    return bool(own & in_order & (found[-1] == len(slots) - 1))
