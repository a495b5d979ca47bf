"""Runs the selection kernels on a random batch and judges every stage by the reference.

Buffers are poisoned first, slots are in random order, and scores can come on a grid so that ties
are real. Serves the tests, interpreted on a CPU and compiled on a GPU, and `lim doctor` and
`lim bench`, which trust no GPU before it has passed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.launch import NEEDS_FULL_RANKING, NEVER
from lim_sglang.kernels.lengths import count_kept
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.score import score_tokens
from lim_sglang.kernels.selector import RankSelector

POISON = -77
ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative RMS of one layer's attention, by its dtype."""
SCORE_TOLERANCE = 1e-5
"""Relative RMS: products of fp16 or bf16 are exact in f32, and so are all sums up to rounding."""


@dataclass(frozen=True)
class Batch:
    """A decode step's requests: how long, how many heads, how much is kept."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    budget: int = 32
    recent_ratio: float = 0.25
    sinks: int = 4
    dtype: torch.dtype = torch.float16
    key_dtype: torch.dtype | None = None
    spread: int = 0
    """Scores are drawn from this many values of either sign; 0 draws them freely."""
    alike: bool = False
    """Every head has the same scores, so that the union has to go as deep as it can."""
    odd: bool = False
    """Some candidates are NaN or infinite."""

    @property
    def budget_split(self) -> BudgetSplit:
        """The budget's parts."""
        return split_budget(self.budget, self.recent_ratio, self.sinks)

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.dim**-0.5

    @property
    def sparse(self) -> list[int]:
        """Rows over the budget."""
        return [row for row, length in enumerate(self.lengths) if length > self.budget]


@dataclass(frozen=True)
class Tensors:
    """What a step finds on the device."""

    query: Tensor
    keys: Tensor
    indptr: Tensor
    slots: Tensor
    kept_indptr: Tensor
    scores: Tensor


def draw(batch: Batch, device: str, seed: int = 0) -> Tensors:
    """Random tensors for a batch."""
    generator = torch.Generator().manual_seed(seed)
    total, pool = sum(batch.lengths), sum(batch.lengths) + 9

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kept = [min(length, batch.budget) for length in batch.lengths]
    width = max(batch.lengths) + 3
    shape = (len(batch.lengths), batch.heads, width)
    scores = normal(*shape)
    if batch.spread:
        scores = torch.randint(-batch.spread, batch.spread + 1, shape, generator=generator) / 8
        scores = torch.where(torch.rand(shape, generator=generator) < 0.5, -scores, scores)
    if batch.alike:
        scores = scores[:, :1].expand(shape).contiguous()
    if batch.odd:
        scores[..., ::5], scores[..., 3::7], scores[..., 4::11] = torch.nan, -torch.inf, torch.inf
    for row, length in enumerate(batch.lengths):
        scores[row, :, length:] = torch.nan  # columns past the end must not be looked at
    return Tensors(
        query=normal(len(batch.lengths), batch.heads, batch.dim).to(batch.dtype).to(device),
        keys=normal(pool, batch.kv_heads, batch.dim)
        .to(batch.dtype)
        .to(batch.key_dtype or batch.dtype)
        .to(device),
        indptr=torch.tensor([0, *batch.lengths]).cumsum(0).int().to(device),
        slots=torch.randperm(pool, generator=generator)[:total].int().to(device),
        kept_indptr=torch.tensor([0, *kept]).cumsum(0).int().to(device),
        scores=scores.float().to(device),
    )


def row_slots(tensors: Tensors, row: int) -> Tensor:
    """The slots of one row's tokens, oldest first."""
    return tensors.slots[tensors.indptr[row] : tensors.indptr[row + 1]].long()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of what is wanted; NaN if either has one."""
    difference = (found.float() - wanted.float()).square().mean().sqrt()
    return float(difference / wanted.float().square().mean().sqrt())


def poisoned_slots(tensors: Tensors) -> Tensor:
    """Room for what is kept, and for five slots more, which must stay as they are."""
    total = int(tensors.kept_indptr[-1])
    return torch.full((total + 5,), POISON, dtype=torch.int32, device=tensors.slots.device)


def differing_lengths(batch: Batch, device: str) -> list[str]:
    """Where `count_kept` is not the reference's."""
    lengths = torch.tensor(batch.lengths, device=device)
    out = torch.full((len(batch.lengths) + 5,), POISON, dtype=torch.int32, device=device)
    count_kept(lengths, batch.budget, out[:-4])
    wanted = [*reference.count_kept(lengths, batch.budget).tolist(), *[POISON] * 4]
    return [] if out.tolist() == wanted else [f"kept lengths {out.tolist()}, expected {wanted}"]


def differing_scores(batch: Batch, device: str) -> list[str]:
    """Rows whose scores are beyond tolerance, and places that should not have been written."""
    tensors = draw(batch, device)
    shape = (len(batch.lengths), batch.heads, max(batch.lengths) + 3)
    out = torch.full(shape, torch.nan, device=device)
    score_tokens(tensors.query, tensors.keys, tensors.indptr, tensors.slots, batch.budget, out)
    found = []
    for row, length in enumerate(batch.lengths):
        written = length if row in batch.sparse else 0
        if not out[row, :, written:].isnan().all():
            found.append(f"row {row}: scores written past its {written}")
        if written:
            keys = tensors.keys[row_slots(tensors, row)].to(batch.dtype)
            wanted = reference.score_tokens(tensors.query[row], keys)
            error = relative_error(out[row, :, :length], wanted)
            if not error <= SCORE_TOLERANCE:
                found.append(f"row {row}: scores are off by {error:.2e}")
    return found


def prepared_selector(batch: Batch, tensors: Tensors, device: str) -> RankSelector:
    """A selector for the whole batch that holds its scores; all else is poisoned."""
    selector = RankSelector.allocate(
        batch.budget_split,
        max_rows=len(batch.lengths),
        num_heads=batch.heads,
        context=tensors.scores.shape[2],
        device=device,
    )
    if selector.max_rows < len(batch.lengths):
        raise ValueError("the batch is larger than a chunk of the selector")
    selector.scores[..., : tensors.scores.shape[2]].copy_(tensors.scores)
    if batch.budget_split.selected:
        for name in ("ranking", "depth", "last_turn", "chosen_counts"):
            getattr(selector, name).fill_(POISON)
    return selector


def shortlisted(batch: Batch, tensors: Tensors) -> RankSelector:
    """A selector that has just tried shortlists."""
    selector = prepared_selector(batch, tensors, str(tensors.scores.device))
    selector.shortlist(tensors.indptr)
    return selector


def differing_shortlists(batch: Batch, device: str) -> list[str]:
    """Heads whose shortlist is not the beginning of the reference's ranking."""
    tensors, budget_split = draw(batch, device), batch.budget_split
    if not budget_split.selected:
        return []
    selector = shortlisted(batch, tensors)
    found = []
    for row in batch.sparse:
        wanted = ranked_candidates(batch, tensors, row)
        for head, depth in enumerate(selector.depth[row].tolist()):
            ranking = selector.ranking[row, head, :depth].long()
            if not 0 <= depth <= wanted.shape[1] or not torch.equal(ranking, wanted[head, :depth]):
                found.append(f"row {row}, head {head}: another shortlist of {depth}")
    return found


def differing_rankings(batch: Batch, device: str) -> list[str]:
    """Rows whose whole ranking, or whose set by way of it, is not the reference's."""
    tensors, budget_split = draw(batch, device), batch.budget_split
    if not budget_split.selected:
        return []
    selector = prepared_selector(batch, tensors, device)
    selector.last_turn.fill_(NEEDS_FULL_RANKING)
    selector.rank(tensors.indptr)
    found = []
    for row in batch.sparse:
        ranking = selector.ranking[row, :, : budget_split.selected].long()
        if not torch.equal(
            ranking, ranked_candidates(batch, tensors, row)[:, : budget_split.selected]
        ):
            found.append(f"row {row}: another ranking")
    return found + differing_compaction(batch, tensors, selector)


def differing_sets(batch: Batch, device: str) -> list[str]:
    """Rows whose kept slots are not exactly the reference's, given equal scores."""
    tensors = draw(batch, device)
    selector = prepared_selector(batch, tensors, device)
    selector.choose(tensors.indptr)
    return differing_compaction(batch, tensors, selector)


def differing_compaction(batch: Batch, tensors: Tensors, selector: RankSelector) -> list[str]:
    """Rows whose slots are not those of the turns that won, or not the reference's set."""
    kept = poisoned_slots(tensors)
    first_turns = selector.first_turn.clone()
    selector.compact(tensors.indptr, tensors.slots, tensors.kept_indptr, kept)
    found = [] if (kept[-5:] == POISON).all() else ["slots written past the last row"]
    for row, length in enumerate(batch.lengths):
        turns, last = first_turns[row, :length], int(selector.last_turn[row])
        wanted = reference.compact_slots(row_slots(tensors, row), turns, last, batch.budget_split)
        if not torch.equal(kept_of(tensors, kept, row), wanted):
            found.append(f"row {row} of {length} tokens: turns are compacted to other slots")
    if not (selector.first_turn == NEVER).all():
        found.append("turns are left for the next step")
    if selector.new_tokens_per_rank.any():
        found.append("counts of turns are left for the next step")
    return found + differing_rows(batch, tensors, tensors.scores, kept)


def ranked_candidates(batch: Batch, tensors: Tensors, row: int) -> Tensor:
    """The reference's ranking [H, C] of one row, as positions."""
    budget_split = batch.budget_split
    candidates = tensors.scores[
        row, :, budget_split.sinks : batch.lengths[row] - budget_split.recent
    ]
    return reference.rank_tokens(candidates) + budget_split.sinks


def kept_of(tensors: Tensors, kept: Tensor, row: int) -> Tensor:
    """What a row keeps, in order of position."""
    first, last = tensors.kept_indptr[row : row + 2].tolist()
    return kept[first:last].long()


def differing_pipeline(batch: Batch, device: str, max_rows: int) -> list[str]:
    """From query and cache to slots, in chunks: rows that are not what the scores give."""
    tensors = draw(batch, device)
    width = max(batch.lengths)
    selector = RankSelector.allocate(
        batch.budget_split, max_rows=max_rows, num_heads=batch.heads, context=width, device=device
    )
    kept = torch.full_like(tensors.slots, POISON)
    selector.keep_slots(
        *(tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr, kept),
        scale=batch.scale,
    )
    scores = torch.zeros(len(batch.lengths), batch.heads, width, device=device)
    score_tokens(tensors.query, tensors.keys, tensors.indptr, tensors.slots, batch.budget, scores)
    return differing_rows(batch, tensors, scores, kept)


def differing_rows(batch: Batch, tensors: Tensors, scores: Tensor, kept: Tensor) -> list[str]:
    """Rows whose kept slots are not the reference's set in order of position."""
    found = []
    for row, length in enumerate(batch.lengths):
        wanted = reference.keep_tokens(scores[row, :, :length], batch.budget_split)
        if not torch.equal(kept_of(tensors, kept, row), row_slots(tensors, row)[wanted]):
            found.append(f"row {row} of {length} tokens keeps another set")
    return found


def differences(batch: Batch, device: str) -> list[str]:
    """All of the above."""
    return [
        *differing_lengths(batch, device),
        *differing_scores(batch, device),
        *differing_shortlists(batch, device),
        *differing_rankings(batch, device),
        *differing_sets(batch, device),
        *differing_pipeline(batch, device, max_rows=2),
    ]
