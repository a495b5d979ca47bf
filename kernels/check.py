"""Runs the selection kernels on a random batch and judges every stage by the reference.

Buffers are poisoned first, slots are in random order, and scores come on a grid so that ties are
real. Used on the CPU, where Triton interprets, and on a GPU, where it compiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.rank import rank_tokens
from lim_sglang.kernels.reference import Shares, split_budget
from lim_sglang.kernels.score import score_tokens
from lim_sglang.kernels.selector import Selector
from lim_sglang.kernels.union import compact_slots, unite_rankings

POISON = -77
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative RMS by dtype."""


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


def check_scores(batch: Batch, device: str) -> None:
    """Every score of long rows within the dtype's tolerance; short rows and gaps untouched."""
    tensors = draw(batch, device)
    shape = (len(batch.lengths), batch.heads, max(batch.lengths) + 3)
    out = torch.full(shape, torch.nan, device=device)
    score_tokens(tensors.query, tensors.keys, tensors.indptr, tensors.slots, batch.budget, out)
    for row, length in enumerate(batch.lengths):
        written = length if row in batch.sparse else 0
        assert out[row, :, written:].isnan().all()
        if written:
            keys = tensors.keys[row_slots(tensors, row)].to(batch.dtype)
            wanted = reference.score_tokens(tensors.query[row], keys)
            error = (out[row, :, :length] - wanted).square().mean().sqrt()
            assert error <= TOLERANCE[torch.float32] * wanted.square().mean().sqrt()


def check_selection(batch: Batch, device: str) -> None:
    """Given equal scores, rankings and kept slots are exactly the reference's."""
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
    for row in batch.sparse:
        candidates = tensors.scores[row, :, shares.sinks : batch.lengths[row] - shares.recent]
        wanted = reference.rank_tokens(candidates)[:, : shares.selected] + shares.sinks
        assert torch.equal(ranking[row].long(), wanted)
    assert_kept(batch, tensors, tensors.scores, kept)
    assert (kept[-5:] == POISON).all()


def check_pipeline(batch: Batch, device: str, max_rows: int) -> None:
    """From query and cache to slots, in chunks: the reference's set on the kernel's own scores."""
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
    assert_kept(batch, tensors, scores, kept)


def assert_kept(batch: Batch, tensors: Tensors, scores: Tensor, kept: Tensor) -> None:
    """Each row's kept slots are those of the reference's set, in order of position."""
    for row, length in enumerate(batch.lengths):
        wanted = reference.keep_tokens(scores[row, :, :length], batch.shares)
        first, last = tensors.kept_indptr[row : row + 2].tolist()
        assert torch.equal(kept[first:last].long(), row_slots(tensors, row)[wanted]), row
