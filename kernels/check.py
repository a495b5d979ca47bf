"""Runs the selection kernels on a random batch and judges every stage by the reference.

Buffers are poisoned first, slots are in random order, and scores can come on a grid so that ties
are real. Serves the tests, interpreted on a CPU and compiled on a GPU, and `lim doctor` and
`lim bench`, which trust no GPU before it has passed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.lengths import count_kept
from lim_sglang.kernels.rank import rank_tokens
from lim_sglang.kernels.reference import Shares, split_budget
from lim_sglang.kernels.score import score_tokens
from lim_sglang.kernels.selector import Selector
from lim_sglang.kernels.union import compact_slots, unite_rankings

POISON = -77
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

    @property
    def shares(self) -> Shares:
        """The budget's parts."""
        return split_budget(self.budget, self.recent_ratio, self.sinks)

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
            error = (out[row, :, :length] - wanted).square().mean().sqrt()
            if not error <= SCORE_TOLERANCE * wanted.square().mean().sqrt():
                found.append(f"row {row}: scores are off by {error:.2e}")
    return found


def differing_sets(batch: Batch, device: str) -> list[str]:
    """Rows whose ranking or kept slots are not exactly the reference's, given equal scores."""
    tensors, shares = draw(batch, device), batch.shares
    rows, width = len(batch.lengths), tensors.scores.shape[2]

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, POISON, dtype=torch.int32, device=device)

    ranking, first_turn = poisoned(rows, batch.heads, shares.selected), poisoned(rows, width)
    last_turn, kept = poisoned(rows), poisoned(int(tensors.kept_indptr[-1]) + 5)
    ends = {"sinks": shares.sinks, "recent": shares.recent}
    rank_tokens(tensors.scores, tensors.indptr, budget=batch.budget, out=ranking, **ends)
    unite_rankings(
        ranking,
        tensors.indptr,
        budget=batch.budget,
        selected=shares.selected,
        first_turn=first_turn,
        last_turn=last_turn,
    )
    compact_slots(
        tensors.indptr,
        tensors.slots,
        tensors.kept_indptr,
        budget=batch.budget,
        first_turn=first_turn,
        last_turn=last_turn,
        out=kept,
        **ends,
    )
    found = []
    for row in batch.sparse:
        candidates = tensors.scores[row, :, shares.sinks : batch.lengths[row] - shares.recent]
        wanted = reference.rank_tokens(candidates)[:, : shares.selected] + shares.sinks
        if not torch.equal(ranking[row].long(), wanted):
            found.append(f"row {row}: another ranking")
    found += differing_rows(batch, tensors, tensors.scores, kept)
    return found + ([] if (kept[-5:] == POISON).all() else ["slots written past the last row"])


def differing_pipeline(batch: Batch, device: str, max_rows: int) -> list[str]:
    """From query and cache to slots, in chunks: rows that are not what the scores give."""
    tensors = draw(batch, device)
    width = max(batch.lengths)
    selector = Selector.allocate(
        batch.shares, max_rows=max_rows, num_heads=batch.heads, context=width, device=device
    )
    kept = torch.full_like(tensors.slots, POISON)
    selector.keep_slots(
        tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr, kept
    )
    scores = torch.zeros(len(batch.lengths), batch.heads, width, device=device)
    score_tokens(tensors.query, tensors.keys, tensors.indptr, tensors.slots, batch.budget, scores)
    return differing_rows(batch, tensors, scores, kept)


def lost_mass(batch: Batch, device: str) -> float:
    """Attention mass that the pipeline's sets lose against the reference's own, at most.

    The reference scores in f32 from the same query and cache; mass is a head's softmax over all
    tokens, scaled by 1 / sqrt(D), summed over the kept ones.
    """
    tensors = draw(batch, device)
    selector = Selector.allocate(
        batch.shares,
        max_rows=len(batch.lengths),
        num_heads=batch.heads,
        context=max(batch.lengths),
        device=device,
    )
    kept = torch.full_like(tensors.slots, POISON)
    selector.keep_slots(
        tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr, kept
    )
    lost = 0.0
    for row in batch.sparse:
        slots = row_slots(tensors, row)
        scores = reference.score_tokens(tensors.query[row], tensors.keys[slots].to(batch.dtype))
        mass = (scores / batch.dim**0.5).softmax(-1)
        first, last = tensors.kept_indptr[row : row + 2].tolist()
        ours = torch.isin(slots, kept[first:last].long())
        wanted = reference.keep_tokens(scores, batch.shares)
        lost = max(lost, float((mass[:, wanted].sum(-1) - mass[:, ours].sum(-1)).abs().max()))
    return lost


def differing_rows(batch: Batch, tensors: Tensors, scores: Tensor, kept: Tensor) -> list[str]:
    """Rows whose kept slots are not the reference's set in order of position."""
    found = []
    for row, length in enumerate(batch.lengths):
        wanted = reference.keep_tokens(scores[row, :, :length], batch.shares)
        first, last = tensors.kept_indptr[row : row + 2].tolist()
        if not torch.equal(kept[first:last].long(), row_slots(tensors, row)[wanted]):
            found.append(f"row {row} of {length} tokens keeps another set")
    return found


def differences(batch: Batch, device: str) -> list[str]:
    """All of the above."""
    return [
        *differing_lengths(batch, device),
        *differing_scores(batch, device),
        *differing_sets(batch, device),
        *differing_pipeline(batch, device, max_rows=2),
    ]
