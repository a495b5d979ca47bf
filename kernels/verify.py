"""Run each kernel on a random batch and judge every stage by the reference.

Buffers are poisoned first, slots are in random order, and scores can come on a grid so that ties
are real. Serves the tests, interpreted on a CPU and compiled on a GPU, and `lim doctor` and `lim
bench`, which trust no GPU before it has passed.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.nn import functional

from lim_sglang.kernels import reference
from lim_sglang.kernels.compact import count_kept
from lim_sglang.kernels.launch import NEEDS_FULL_RANKING, NEVER
from lim_sglang.kernels.mass import log_sum_exp, softmax_mass
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.scores import ScoreStoringAttention, planned_decode, score_tokens
from lim_sglang.kernels.selector import MassSelector, RankSelector
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens

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


def shortlist_depths(batch: Batch, device: str) -> list[int]:
    """How many ranks each head of each row has in its shortlist."""
    return [int(depth) for depth in shortlisted(batch, draw(batch, device)).depth.flatten()]


def full_ranking_rows(batch: Batch, device: str) -> tuple[list[int], int]:
    """Rows over the budget whose shortlists are not deep enough for the union, and their count
    after the whole selection."""
    tensors = draw(batch, device)
    selector = shortlisted(batch, tensors)
    undecided = [row for row in batch.sparse if selector.last_turn[row] == NEEDS_FULL_RANKING]
    selector.forget()
    selector.full_ranking_rows.zero_()
    selector.choose(tensors.indptr)
    return undecided, selector.counts()["rows_ranked_whole"]


MASS_TOLERANCE = 2e-5
"""Relative RMS of a row's masses: exponentials and sums in f32."""


def prepared_mass_selector(
    batch: Batch, tensors: Tensors, device: str, max_rows: int
) -> MassSelector:
    """A selector whose memory is poisoned."""
    selector = MassSelector.allocate(
        batch.budget_split,
        max_rows=max_rows,
        num_heads=batch.heads,
        context=tensors.scores.shape[2],
        device=device,
    )
    for tensor in (selector.scores, selector.normalisers, selector.mass):
        tensor.fill_(torch.nan)
    selector.candidates.fill_(POISON)
    return selector


def differing_masses(batch: Batch, device: str) -> list[str]:
    """Rows whose normalisers or masses are beyond tolerance; places written that should not be."""
    tensors = draw(batch, device)
    selector = prepared_mass_selector(batch, tensors, device, len(batch.lengths))
    selector.scores[..., : tensors.scores.shape[2]].copy_(tensors.scores)
    step = (batch.budget_split.budget, batch.scale)
    log_sum_exp(selector.scores, tensors.indptr, *step, selector.normalisers)
    softmax_mass(selector.scores, tensors.indptr, selector.normalisers, *step, selector.mass)
    found = []
    for row, length in enumerate(batch.lengths):
        written = length if row in batch.sparse else 0
        if not selector.mass[row, written:].isnan().all():
            found.append(f"row {row}: masses written past its {written}")
        if written:
            scores = tensors.scores[row, :, :length]
            lse = reference.log_sum_exp(scores, batch.scale)
            if not torch.allclose(selector.normalisers[row], lse, rtol=1e-5, atol=1e-5):
                found.append(f"row {row}: other normalisers")
            wanted = reference.softmax_mass(scores, batch.scale)
            error = relative_error(selector.mass[row, :length], wanted)
            if not error <= MASS_TOLERANCE:
                found.append(f"row {row}: masses are off by {error:.2e}")
    return found


def differing_heaviest(batch: Batch, device: str) -> list[str]:
    """Rows whose kept slots are not exactly the reference's, given equal masses."""
    tensors = draw(batch, device)
    selector = prepared_mass_selector(batch, tensors, device, len(batch.lengths))
    masses = tensors.scores[:, 0]  # any numbers will do
    selector.mass[:, : masses.shape[1]].copy_(masses)
    kept = poisoned_slots(tensors)
    selector.write(tensors.indptr, tensors.slots, tensors.kept_indptr, kept)
    return differing_mass_rows(batch, tensors, masses, kept)


def differing_mass_pipeline(batch: Batch, device: str, max_rows: int) -> list[str]:
    """From query and cache to slots, in chunks: rows that are not what the masses give."""
    tensors = draw(batch, device)
    rows = len(batch.lengths)
    whole, chunked = (prepared_mass_selector(batch, tensors, device, n) for n in (rows, max_rows))
    kept = []
    for selector in (whole, chunked):
        kept.append(poisoned_slots(tensors))
        selector.keep_slots(
            *(tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr),
            kept[-1],
            scale=batch.scale,
        )
    if not torch.equal(*kept):
        return [f"chunks of {max_rows} rows keep other slots"]
    return differing_mass_rows(batch, tensors, whole.mass, kept[0])


def differing_mass_rows(batch: Batch, tensors: Tensors, masses: Tensor, kept: Tensor) -> list[str]:
    """Rows whose kept slots are not the reference's for these masses, in order of position."""
    found = [] if (kept[-5:] == POISON).all() else ["slots written past the last row"]
    for row, length in enumerate(batch.lengths):
        wanted = reference.topk_by_mass(masses[row, :length], batch.budget_split)
        if not torch.equal(kept_of(tensors, kept, row), row_slots(tensors, row)[wanted]):
            found.append(f"row {row} of {length} tokens keeps another set by mass")
    return found


def mass_differences(batch: Batch, device: str) -> list[str]:
    """All of the above."""
    masses = [] if batch.odd else differing_masses(batch, device)
    return masses + differing_heaviest(batch, device) + differing_mass_pipeline(batch, device, 2)


def lost_mass(batch: Batch, device: str) -> float:
    """Attention mass that the pipeline's sets lose against the reference's own, at most.

    The reference scores in f32 from the same query and cache; mass is a head's softmax over all
    tokens, scaled by 1 / sqrt(D), summed over the kept ones.
    """
    tensors = draw(batch, device)
    selector = RankSelector.allocate(
        batch.budget_split,
        max_rows=len(batch.lengths),
        num_heads=batch.heads,
        context=max(batch.lengths),
        device=device,
    )
    kept = torch.full_like(tensors.slots, POISON)
    selector.keep_slots(
        *(tensors.query, tensors.keys, tensors.indptr, tensors.slots, tensors.kept_indptr, kept),
        scale=batch.scale,
    )
    lost = 0.0
    for row in batch.sparse:
        slots = row_slots(tensors, row)
        scores = reference.score_tokens(tensors.query[row], tensors.keys[slots].to(batch.dtype))
        mass = (scores * batch.scale).softmax(-1)
        ours = torch.isin(slots, kept_of(tensors, kept, row))
        wanted = reference.keep_tokens(scores, batch.budget_split)
        lost = max(lost, float((mass[:, wanted].sum(-1) - mass[:, ours].sum(-1)).abs().max()))
    return lost


VALUE_SCALE = 0.5
"""Of a quantised cache; a power of two, so that it changes no error."""


def differing_attention(batch: Batch, device: str) -> list[str]:
    """Rows whose attention over the batch's slots is beyond tolerance, and what else is amiss.

    Rows are taken whole, whatever the budget. Slots that no row reads are NaN, the first among
    them, and no tensor is without gaps.
    """
    step = draw_step(batch, device)
    workspace = SplitWorkspace.allocate(
        num_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        dim=batch.dim,
        cache_dtype=step.keys.dtype,
        device=device,
    )
    found = []
    # As many programs a row as there are; and one, as where rows are many.
    for name, some in (
        ("shared", workspace),
        ("alone", replace(workspace, outputs=workspace.outputs[:0])),
    ):
        outputs = [attended(batch, step, some) for _ in range(2)]
        if not torch.equal(*outputs):
            found.append(f"{name}: the same again gives other bits")
        if workspace.block_counters.any():
            found.append(f"{name}: arrivals are left, so the next step would end too early")
            workspace.block_counters.zero_()
        found += [f"{name}, {text}" for text in differing_attention_rows(batch, step, outputs[0])]
    return found


@dataclass(frozen=True)
class Step:
    """What attention finds on the device; B rows, P slots."""

    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[P, G, D]."""
    values: Tensor
    """[P, G, D]."""
    indptr: Tensor
    """[B + 1] int32."""
    slots: Tensor
    """[indptr[B]] int32, none of them 0."""


def draw_step(batch: Batch, device: str) -> Step:
    """The batch's query, keys and slots, and values beside them."""
    tensors = draw(batch, device)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(tensors.keys.shape, generator=generator).to(batch.dtype)
    unread = torch.ones(len(values), dtype=torch.bool)
    unread[tensors.slots.long().cpu()] = False

    def cache(drawn: Tensor, more_heads: int, more_dims: int) -> Tensor:
        poisoned = drawn.cpu().float().masked_fill(unread[:, None, None], torch.nan)
        return _within(poisoned, (1, 0), more_heads, more_dims).to(tensors.keys.dtype).to(device)

    _, kv_heads, dim = values.shape
    keys = cache(tensors.keys, more_heads=1, more_dims=0)[:, :kv_heads]
    values = cache(values, more_heads=0, more_dims=16)[..., :dim]
    query = _within(tensors.query, (0, 0), 1, 16)[:, : batch.heads, :dim]
    return Step(query, keys, values, tensors.indptr, tensors.slots + 1)


def _within(drawn: Tensor, more_rows: tuple[int, int], more_heads: int, more_dims: int) -> Tensor:
    """A tensor of three dimensions with NaN around it."""
    return functional.pad(drawn, (0, more_dims, 0, more_heads, *more_rows), value=torch.nan)


def attended(batch: Batch, step: Step, workspace: SplitWorkspace) -> Tensor:
    """[B, H, D] over each row's slots, in memory that was NaN."""
    return attend_tokens(
        *(step.query, step.keys, step.values, step.slots, step.indptr),
        longest=max(batch.lengths),
        scale=batch.scale,
        value_scale=VALUE_SCALE,
        workspace=workspace,
        out=torch.full_like(step.query, torch.nan),
    )


def attention_error(
    found: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scale: float,
    value_scale: float = 1.0,
) -> float:
    """Relative RMS of one row's attention [H, D] against the reference's in f32."""
    wanted = reference.attend_tokens(query.float(), keys, values, slots, scale)
    return relative_error(found, value_scale * wanted)


def differing_attention_rows(batch: Batch, step: Step, found: Tensor) -> list[str]:
    """Rows that are not the reference's."""
    keys, values = step.keys.float(), step.values.float()
    ends = step.indptr.tolist()
    wrong = []
    for row, length in enumerate(batch.lengths):
        slots = step.slots[ends[row] : ends[row + 1]].long()
        error = attention_error(
            found[row], step.query[row], keys, values, slots, batch.scale, VALUE_SCALE
        )
        if not error <= ATTENTION_TOLERANCE[batch.dtype]:
            wrong.append(f"row {row} of {length} tokens: attention is off by {error:.1e}")
    return wrong


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
