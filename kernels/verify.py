"""Run each kernel on a random batch and compare every stage with the reference.

Buffers are poisoned first, slots are in random order, and scores can be multiples of 1/8, so that
ties are real. One implementation serves the tests, interpreted on a CPU and compiled on a GPU, and
`lim doctor` and `lim bench`, which trust no GPU before it has passed. Every `*_differences`
function returns a line of text per difference, and an empty list where there is none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.kernels.compact import StepSlots, count_kept
from lim_sglang.kernels.exchange import HeadRanks
from lim_sglang.kernels.launch import NEEDS_FULL_RANKING, NO_TURN
from lim_sglang.kernels.mass import log_sum_exp
from lim_sglang.kernels.packed import PackedRows, row_ends
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.scores import ScoreStoringAttention, plan_flashinfer_decode, score_tokens
from lim_sglang.kernels.selector import (
    HeadSelector,
    MassSelector,
    RankSelector,
    Room,
    ScoreSelector,
    WindowSelector,
)

POISON = -77
VERIFIED_PAGES = (16, 4, 2, 1)
"""Tokens of a page; the first that a budget is several of."""
SPARE = 5
"""Poisoned elements past the end of an output, which must stay as they are."""
SCORE_TOLERANCE = 1e-5
"""Relative RMS: products of fp16 or bf16 are exact in f32, and so are all sums up to rounding."""
MASS_TOLERANCE = 2e-5
"""Relative RMS of a row's masses: exponentials and sums in f32."""

AnySelector = TypeVar("AnySelector", bound=ScoreSelector)


@dataclass(frozen=True)
class Batch:
    """Shape of a decode step's requests, and the kind of scores that they have."""

    lengths: tuple[int, ...]
    """Tokens of each request, the newest included."""
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    budget: int = 32
    recent_ratio: float = 0.25
    sinks: int = 4
    dtype: torch.dtype = torch.float16
    key_dtype: torch.dtype | None = None
    """Dtype of the cache; None for `dtype`."""
    levels: int = 0
    """Scores are multiples of 1/8 from -levels / 8 to levels / 8; 0 for normal scores."""
    heads_agree: bool = False
    """Every head has the same scores, so that the union has to go as deep as it can."""
    non_finite: bool = False
    """Some candidates are NaN or infinite."""
    by_largest: bool = False
    """A token's mass is the largest of the heads' weights, not their sum."""
    page: int = 1
    """Tokens that are kept or dropped together; masses are ranked by page."""

    @property
    def budget_split(self) -> BudgetSplit:
        """Parts of the budget, in pages."""
        return split_budget(self.budget // self.page, self.recent_ratio, self.sinks)

    @property
    def kept_lengths(self) -> list[int]:
        """Tokens that each row keeps."""
        ends = reference.count_kept(torch.tensor(self.lengths), self.budget, self.page)
        return ends.diff().tolist()

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.dim**-0.5

    @property
    def rows_over_budget(self) -> list[int]:
        """Rows that have more tokens than they may keep."""
        return [row for row, length in enumerate(self.lengths) if length > self.budget]


@dataclass(frozen=True)
class RandomStep:
    """Random tensors of a batch of B rows; N is more than the longest row has tokens."""

    query: Tensor
    """[B, H, D]."""
    keys: Tensor
    """[P, G, D]."""
    slots: StepSlots
    """Slots in random order; `kept` is poisoned and has SPARE elements more than are kept."""
    scores: Tensor
    """[B, H, N] f32, independent of query and keys; NaN past each row's end."""

    @property
    def ends(self) -> list[int]:
        """[B + 1], the end of each row's tokens after a zero."""
        ends: list[int] = self.slots.indptr.tolist()
        return ends


def random_step(batch: Batch, device: str, seed: int = 0) -> RandomStep:
    """Generate the tensors of a batch."""
    generator = torch.Generator().manual_seed(seed)
    rows, num_tokens = len(batch.lengths), sum(batch.lengths)
    num_slots = num_tokens + 9

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scores = normal(rows, batch.heads, max(batch.lengths) + 3)
    if batch.levels:
        levels = (-batch.levels, batch.levels + 1)
        scores = torch.randint(*levels, scores.shape, generator=generator) / 8
        # A zero of either sign.
        flipped = torch.rand(scores.shape, generator=generator) < 0.5
        scores = torch.where(flipped, -scores, scores)
    if batch.heads_agree:
        scores = scores[:, :1].expand(scores.shape).contiguous()
    if batch.non_finite:
        scores[..., ::5], scores[..., 3::7], scores[..., 4::11] = torch.nan, -torch.inf, torch.inf
    for row, length in enumerate(batch.lengths):
        scores[row, :, length:] = torch.nan
    query = normal(rows, batch.heads, batch.dim).to(batch.dtype)
    keys = normal(num_slots, batch.kv_heads, batch.dim).to(batch.dtype)
    keys = keys.to(batch.key_dtype or batch.dtype)
    kept = batch.kept_lengths
    slots = StepSlots(
        torch.tensor([0, *batch.lengths]).cumsum(0).int().to(device),
        torch.randperm(num_slots, generator=generator)[:num_tokens].int().to(device),
        torch.tensor([0, *kept]).cumsum(0).int().to(device),
        poison(torch.empty(sum(kept) + SPARE, dtype=torch.int32, device=device)),
    )
    return RandomStep(query.to(device), keys.to(device), slots, scores.float().to(device))


def poison(tensor: Tensor) -> Tensor:
    """Fill a tensor with values that no kernel may use."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)


def allocate_poisoned(
    kind: type[AnySelector],
    batch: Batch,
    device: str,
    max_rows: int | None = None,
    ranks: HeadRanks | None = None,
) -> AnySelector:
    """Allocate a selector and poison all memory that it must write before it reads.

    Args:
        kind: of the selector.
        batch: the rows to select for.
        device: of all tensors.
        max_rows: most rows of a chunk; None for all of the batch.
        ranks: that share heads, of which the batch has those of one.
    """
    rows, tokens = len(batch.lengths), sum(batch.lengths)
    longest = max(batch.lengths) + 3
    room = Room(max_rows or rows, batch.heads, batch.kv_heads, longest, tokens, device, ranks=ranks)
    options: dict[str, Any] = {}
    if kind is MassSelector:
        options = {"by_largest": batch.by_largest, "page": batch.page}
    selector = kind.allocate(batch.budget_split, room, **options)
    if max_rows is None and selector.max_rows < rows:
        raise ValueError(f"a chunk of the selector has {selector.max_rows} rows, not all {rows}")
    written = list(vars(selector).values())
    if isinstance(selector, RankSelector) and batch.budget_split.selected:
        buffers = selector.buffers
        written += [buffers.ranking, buffers.depth, buffers.last_turn, buffers.chosen_counts]
    for value in written:
        tensor = value.values if isinstance(value, PackedRows) else value
        if isinstance(tensor, Tensor):
            poison(tensor)
    return selector


def scored_selector(
    kind: type[AnySelector], batch: Batch, step: RandomStep, ranks: HeadRanks | None = None
) -> AnySelector:
    """Allocate a poisoned selector for the whole batch that holds its scores."""
    selector = allocate_poisoned(kind, batch, str(step.scores.device), ranks=ranks)
    for row, view in enumerate(selector.scores.rows(step.ends)):
        view[:, : batch.lengths[row]].copy_(step.scores[row, :, : batch.lengths[row]])
    return selector


def token_slots(slots: StepSlots, row: int) -> Tensor:
    """Return the slots of one row's tokens, oldest first."""
    first, last = slots.indptr[row : row + 2].tolist()
    return slots.slots[first:last].long()


def kept_slots(slots: StepSlots, row: int) -> Tensor:
    """Return the slots that one row keeps, [n] or [lists, n]."""
    first, last = slots.kept_indptr[row : row + 2].tolist()
    return slots.kept[..., first:last].long()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference over the expected RMS; NaN if either tensor has one."""
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


def value_differences(
    name: str,
    batch: Batch,
    found: PackedRows,
    expected: Callable[[int], Tensor],
    tolerance: float,
) -> list[str]:
    """Compare values that a kernel writes for rows over the budget, in memory that was NaN.

    Args:
        name: of the values, plural.
        batch: the rows.
        found: overwritten.
        expected: gives a row's values, [lists, columns] or, of one list, [columns].
        tolerance: relative RMS.
    """
    differences = []
    for row, view in enumerate(found.rows(row_ends(batch.lengths))):
        length = batch.lengths[row]
        written = triton.cdiv(length, found.page) if length > batch.budget else 0
        if written:
            error = relative_error(view[:, :written], torch.atleast_2d(expected(row)))
            if missing := int(view[:, :written].isnan().sum()):
                total = view[:, :written].numel()
                differences.append(f"row {row}: {missing} of {total} {name} are missing")
            elif not error <= tolerance:
                differences.append(f"row {row}: {name} are off by {error:.2e}")
            view[:, :written] = torch.nan
    if not found.values.isnan().all():
        differences.append(f"{name} written past a row's tokens")
    return differences


def kept_differences(
    batch: Batch, slots: StepSlots, keep: Callable[[int, int], Tensor]
) -> list[str]:
    """Compare kept slots with the definition's positions for a row and its length."""
    untouched = (slots.kept[..., -SPARE:] == POISON).all()
    differences = [] if untouched else ["slots written past the last row"]
    for row, length in enumerate(batch.lengths):
        expected = keep(row, length)
        if not torch.equal(kept_slots(slots, row), token_slots(slots, row)[expected]):
            differences.append(f"row {row} of {length} tokens keeps another set")
    return differences


def length_differences(batch: Batch, device: str) -> list[str]:
    """Compare `count_kept`."""
    lengths = torch.tensor(batch.lengths, device=device)
    rows = len(lengths)
    out = poison(torch.empty(rows + 1 + SPARE, dtype=torch.int32, device=device))
    count_kept(lengths, batch.budget, out[: rows + 1], page=batch.page)
    ends = reference.count_kept(lengths, batch.budget, batch.page)
    expected = [*ends.tolist(), *[POISON] * SPARE]
    if out.tolist() == expected:
        return []
    return [f"kept lengths {out.tolist()}, expected {expected}"]


def score_differences(batch: Batch, device: str) -> list[str]:
    """Compare `score_tokens`."""
    step = random_step(batch, device)
    out = allocate_poisoned(HeadSelector, batch, device).scores
    score_tokens(step.query, step.keys, step.slots.indptr, step.slots.slots, batch.budget, out)

    def expected(row: int) -> Tensor:
        keys = step.keys[token_slots(step.slots, row)].to(batch.dtype)
        return reference.score_tokens(step.query[row], keys)

    return value_differences("scores", batch, out, expected, SCORE_TOLERANCE)


def reference_ranking(batch: Batch, step: RandomStep, row: int) -> Tensor:
    """Return the reference's ranking [H, C] of one row's candidates, as positions."""
    split = batch.budget_split
    candidates = step.scores[row, :, split.sinks : batch.lengths[row] - split.recent]
    return reference.rank_tokens(candidates) + split.sinks


def shortlist_differences(batch: Batch, device: str) -> list[str]:
    """Compare each head's shortlist with the beginning of the reference's ranking."""
    if not batch.budget_split.selected:
        return []
    step = random_step(batch, device)
    selector = scored_selector(RankSelector, batch, step)
    selector.shortlist(step.slots.indptr)
    differences = []
    for row in batch.rows_over_budget:
        expected = reference_ranking(batch, step, row)
        for head, depth in enumerate(selector.buffers.depth[row].tolist()):
            found = selector.buffers.ranking[row, head, :depth].long()
            if depth < 0 or not torch.equal(found, expected[head, :depth]):
                differences.append(f"row {row}, head {head}: another shortlist of {depth}")
    return differences


def full_ranking_differences(batch: Batch, device: str) -> list[str]:
    """Compare full rankings, and the sets that follow from them, where no row has a shortlist."""
    num_ranks = batch.budget_split.selected
    if not num_ranks:
        return []
    step = random_step(batch, device)
    selector = scored_selector(RankSelector, batch, step)
    selector.buffers.last_turn.fill_(NEEDS_FULL_RANKING)
    selector.rank_fully(step.slots.indptr)
    differences = []
    for row in batch.rows_over_budget:
        found = selector.buffers.ranking[row, :, :num_ranks].long()
        if not torch.equal(found, reference_ranking(batch, step, row)[:, :num_ranks]):
            differences.append(f"row {row}: another ranking")
    return differences + compaction_differences(batch, step, selector)


def rank_set_differences(batch: Batch, device: str) -> list[str]:
    """Compare the kept slots of `RankSelector`, given equal scores."""
    step = random_step(batch, device)
    selector = scored_selector(RankSelector, batch, step)
    selector.unite(step.slots.indptr)
    return compaction_differences(batch, step, selector)


def compaction_differences(batch: Batch, step: RandomStep, selector: RankSelector) -> list[str]:
    """Compact, and compare the slots by turns and by scores; check that buffers are reset."""
    buffers = selector.buffers
    first_turns = [turns[0].clone() for turns in buffers.first_turn.rows(step.ends)]
    selector.compact(step.slots)
    differences = []
    for row, length in enumerate(batch.lengths):
        expected = reference.compact_slots(
            token_slots(step.slots, row),
            first_turns[row][:length],
            int(buffers.last_turn[row]),
            batch.budget_split,
        )
        if not torch.equal(kept_slots(step.slots, row), expected):
            differences.append(f"row {row} of {length} tokens: turns give other slots")
    if not (buffers.first_turn.values == NO_TURN).all():
        differences.append("first turns are not reset")
    if buffers.new_tokens_per_rank.any():
        differences.append("counts of new tokens are not reset")
    return differences + kept_differences(
        batch, step.slots, lambda row, length: selector.keep(step.scores[row], length)
    )


def pipeline_differences(
    batch: Batch,
    device: str,
    max_rows: int,
    kind: type[ScoreSelector] = RankSelector,
) -> list[str]:
    """Select from query and cache, at once and in chunks of `max_rows`; compare the kept slots."""
    step = random_step(batch, device)
    in_chunks = replace(step.slots, kept=step.slots.kept.clone())
    whole = allocate_poisoned(kind, batch, device)
    chunked = allocate_poisoned(kind, batch, device, max_rows)
    whole.select(step.query, step.keys, step.slots, scale=batch.scale)
    chunked.select(step.query, step.keys, in_chunks, scale=batch.scale)
    if not torch.equal(step.slots.kept, in_chunks.kept):
        return [f"chunks of {max_rows} rows keep other slots"]
    scores = whole.deciding_scores.rows(step.ends)
    return kept_differences(batch, step.slots, lambda row, n: whole.keep(scores[row], n))


def selection_differences(batch: Batch, device: str) -> list[str]:
    """Compare every stage of the paper's selection."""
    return [
        *length_differences(batch, device),
        *score_differences(batch, device),
        *shortlist_differences(batch, device),
        *full_ranking_differences(batch, device),
        *rank_set_differences(batch, device),
        *pipeline_differences(batch, device, max_rows=2),
    ]


def softmax_mass_differences(batch: Batch, device: str) -> list[str]:
    """Compare `log_sum_exp` and `softmax_mass`."""
    step = random_step(batch, device)
    selector = scored_selector(MassSelector, batch, step)
    scores, lse, budget = selector.scores, selector.lse, batch.budget
    log_sum_exp(scores, step.slots.indptr, budget, batch.scale, lse)
    selector.weigh(step.slots.indptr, batch.scale)

    def row_scores(row: int) -> Tensor:
        return step.scores[row, :, : batch.lengths[row]]

    return [
        *lse_differences(batch, batch.rows_over_budget, lse, row_scores, tolerance=1e-5),
        *value_differences(
            "masses",
            batch,
            selector.mass,
            lambda row: selector.masses(row_scores(row), batch.scale),
            MASS_TOLERANCE,
        ),
    ]


def lse_differences(
    batch: Batch,
    rows: list[int],
    lse: Tensor,
    row_scores: Callable[[int], Tensor],
    tolerance: float,
) -> list[str]:
    """Compare the log-sum-exp [B, H] of some rows, given the scores of each."""
    return [
        f"row {row}: another log-sum-exp"
        for row in rows
        if not torch.allclose(
            lse[row],
            reference.log_sum_exp(row_scores(row), batch.scale),
            rtol=tolerance,
            atol=tolerance,
        )
    ]


def topk_differences(batch: Batch, device: str) -> list[str]:
    """Compare the kept slots of `MassSelector`, given equal masses."""
    step = random_step(batch, device)
    selector = scored_selector(MassSelector, batch, step)
    masses = selector.mass.rows(step.ends)
    for row, mass in enumerate(masses):  # any numbers will do
        columns = triton.cdiv(batch.lengths[row], batch.page)
        mass[:, :columns].copy_(step.scores[row, :1, :columns])
    selector.topk(step.slots)
    return kept_differences(
        batch, step.slots, lambda row, length: selector.keep(masses[row], length)
    )


def mass_differences(batch: Batch, device: str) -> list[str]:
    """Compare every stage of selection by mass."""
    masses = [] if batch.non_finite else softmax_mass_differences(batch, device)
    pipeline = pipeline_differences(batch, device, max_rows=2, kind=MassSelector)
    return length_differences(batch, device) + masses + topk_differences(batch, device) + pipeline


def largest_mass_differences(batch: Batch, device: str) -> list[str]:
    """Compare selection by the largest weight of any head, of tokens and of pages."""
    tokens = replace(batch, by_largest=True, recent_ratio=0.0)
    fitting = [
        page for page in VERIFIED_PAGES if batch.budget % page == 0 < batch.budget // page - 1
    ]
    pages = [replace(tokens, page=page, recent_ratio=0.25, sinks=0) for page in fitting[:1]]
    return [line for each in (tokens, *pages) for line in mass_differences(each, device)]


def head_differences(batch: Batch, device: str) -> list[str]:
    """Compare the lists of `HeadSelector`, given equal scores, and from query and cache."""
    step = random_step(batch, device)
    step = replace(step, slots=replace(step.slots, kept=step.slots.kept.repeat(batch.heads, 1)))
    selector = scored_selector(HeadSelector, batch, step)
    selector.select_scored(step.slots, scale=batch.scale, has_lse=False)
    scores = step.scores
    given = kept_differences(batch, step.slots, lambda row, n: selector.keep(scores[row], n))
    poison(step.slots.kept)
    selector.select(step.query, step.keys, step.slots, scale=batch.scale)
    found = selector.scores.rows(step.ends)
    return given + kept_differences(batch, step.slots, lambda row, n: selector.keep(found[row], n))


def window_differences(batch: Batch, device: str) -> list[str]:
    """Compare the slots that `WindowSelector` keeps."""
    step = random_step(batch, device)
    selector = WindowSelector(split_budget(batch.budget, 1.0, batch.sinks))
    selector.keep_slots(step.slots)
    return kept_differences(batch, step.slots, lambda _, length: selector.keep(None, length))


def stored_score_differences(batch: Batch) -> list[str]:
    """Compare scores, log-sum-exp and attention of `ScoreStoringAttention`; needs a GPU.

    FlashInfer splits rows longer than its chunks, and the last tile of a chunk computes positions
    of the next chunk: the lengths of the batch decide what is compared.
    """
    step = random_step(batch, "cuda")
    rows = len(batch.lengths)
    values = step.keys[torch.arange(len(step.keys)).flip(0).to("cuda")]  # fp8 has no flip
    wrapper = plan_flashinfer_decode(
        step.slots.indptr,
        step.slots.slots,
        heads=batch.heads,
        kv_heads=batch.kv_heads,
        head_dim=batch.dim,
        dtype=batch.dtype,
        cache_dtype=batch.key_dtype,
    )
    scores = allocate_poisoned(HeadSelector, batch, "cuda").scores
    lse = poison(torch.empty(rows, batch.heads, device="cuda"))
    output = ScoreStoringAttention(batch.dtype, step.keys.dtype, batch.dim).run(
        wrapper,
        step.query,
        (step.keys, values),
        batch.scale,
        scores,
        batch.budget_split.budget,
        lse,
    )
    pages = (step.keys[:, None], values[:, None])
    same_bits = torch.equal(output, wrapper.run(step.query, pages))

    def expected(row: int) -> Tensor:
        keys = step.keys[token_slots(step.slots, row)].to(batch.dtype)
        return reference.score_tokens(step.query[row], keys)

    return [
        *([] if same_bits else ["attention has other bits than FlashInfer's"]),
        *lse_differences(batch, list(range(rows)), lse, expected, tolerance=1e-4),
        *value_differences("stored scores", batch, scores, expected, SCORE_TOLERANCE),
    ]


TILE = 16
"""Tokens whose scores FlashInfer's attention computes at once; a chunk of a row may end within."""
PROBED_CHUNK = 200
"""Tokens of a chunk of the longest row of a self-test; no multiple of `TILE`."""

StoreScores = Callable[[Tensor, Tensor, Tensor, Tensor, PackedRows], object]
"""Attends, given query, keys, indptr and slots as `score_tokens` has them, and stores scores."""


def self_test_batch(
    num_processors: int,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
) -> Batch:
    """Return a few rows whose chunks end within a tile.

    FlashInfer splits rows into chunks of 128 tokens, or of more if there were more than two chunks
    and KV heads for each multiprocessor.

    Args:
        num_processors: multiprocessors of the GPU.
        heads, kv_heads, dim: H, G and D.
        dtype: of queries.
        key_dtype: of the cache.
    """
    others = (77, 32)  # over the budget, and within it; a chunk each
    chunks = max(1, 2 * num_processors // kv_heads - len(others))
    lengths = (chunks * PROBED_CHUNK - 3, *others)
    return Batch(lengths, heads, kv_heads, dim, 32, dtype=dtype, key_dtype=key_dtype)


def probe_differences(batch: Batch, device: str, store: StoreScores) -> list[str]:
    """Compare the scores that an attention stores with the definition's, within milliseconds.

    Args:
        batch: the rows.
        device: of all tensors, where they are generated.
        store: is given memory of NaN.
    """
    generator = torch.Generator(device).manual_seed(0)
    num_tokens, ends = sum(batch.lengths), row_ends(batch.lengths)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return values.to(batch.dtype)

    query = normal(len(batch.lengths), batch.heads, batch.dim)
    keys = normal(num_tokens, batch.kv_heads, batch.dim).to(batch.key_dtype or batch.dtype)
    slots = torch.randperm(num_tokens, generator=generator, device=device).int()
    indptr = torch.tensor(ends, dtype=torch.int32, device=device)
    scores = PackedRows.allocate(
        lists=batch.heads,
        max_rows=len(batch.lengths),
        longest=max(batch.lengths),
        tokens=num_tokens,
        device=device,
    )
    poison(scores.values)
    store(query, keys, indptr, slots, scores)

    def expected(row: int) -> Tensor:
        members = slots[ends[row] : ends[row + 1]].long()
        return reference.score_tokens(query[row], keys[members].to(batch.dtype))

    return value_differences("stored scores", batch, scores, expected, SCORE_TOLERANCE)


def self_test_differences(
    attention: ScoreStoringAttention, batch: Batch, workspace: Tensor
) -> list[str]:
    """Compare the scores of an attention that is about to serve; needs a GPU.

    Args:
        attention: compiled for the batch's head dimension and dtypes.
        batch: the rows, from `self_test_batch`.
        workspace: FlashInfer's, which nothing else uses meanwhile.
    """

    def store(
        query: Tensor, keys: Tensor, indptr: Tensor, slots: Tensor, scores: PackedRows
    ) -> None:
        wrapper = plan_flashinfer_decode(
            indptr,
            slots,
            heads=batch.heads,
            kv_heads=batch.kv_heads,
            head_dim=batch.dim,
            dtype=batch.dtype,
            cache_dtype=batch.key_dtype,
            workspace=workspace,
        )
        attention.run(wrapper, query, (keys, keys), batch.scale, scores, batch.budget)

    return probe_differences(batch, str(workspace.device), store)
