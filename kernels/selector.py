"""Selection of kept slots: memory allocated once, and the kernels that run in it, in order.

`RankSelector` is LessIsMore's selection; `MassSelector` ranks tokens, or pages of them, by
attention mass; `HeadSelector` ranks tokens for each query head; `BoundSelector` ranks pages by
bounds on their scores and `GateSelector` by a trained gate's logits; `WindowSelector` keeps by
position, without scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import triton
from torch import Tensor

from lim_sglang.kernels import reference, reference_rivals
from lim_sglang.kernels.block_gate import compress_blocks, gate_logits
from lim_sglang.kernels.compact import StepSlots, compact_slots, copy_window
from lim_sglang.kernels.full_ranking import rank_tokens
from lim_sglang.kernels.launch import COUNTED_SCORES, RowBuffers
from lim_sglang.kernels.mass import candidate_capacity, log_sum_exp, softmax_mass, topk_by_mass
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.page_bounds import page_bounds, summarize_pages
from lim_sglang.kernels.reference import BudgetSplit, keep_tokens
from lim_sglang.kernels.reference_rivals import BlockGate
from lim_sglang.kernels.scores import score_tokens
from lim_sglang.kernels.shortlist import shortlist_capacity, shortlist_tokens
from lim_sglang.kernels.union import RankingBuffers

MAX_CHUNK_ROWS = 256
"""Most rows of a chunk: SGLang captures CUDA graphs of up to as many."""
MAX_CANDIDATE_BYTES = 256 << 20
"""Most bytes for the rankings, or the candidates, of a chunk of rows."""
SUMMARY_TOLERANCE = 2.0**-7
"""Largest relative error of a gate's summary of a block, which has 8 bits in a bf16 cache; Triton's
interpreter cuts what a GPU rounds."""


@dataclass(frozen=True)
class Room:
    """The batches that memory is allocated for."""

    max_rows: int
    """Most rows of a batch."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads."""
    context: int
    """Tokens of the longest row there can be."""
    tokens: int
    """Tokens of all rows of a chunk together; a step with more takes smaller chunks."""
    device: torch.device | str
    cos_sin: Tensor | None = None
    """[positions, D] f32, the model's RoPE, for a policy that rotates back."""


@dataclass(frozen=True)
class Selector(RowBuffers, ABC):
    """Selection of the kept slots of a batch. B rows of the batch, H query heads."""

    budget_split: BudgetSplit
    """Parts of the budget, in tokens or, where pages are kept, in pages."""

    @property
    def budget(self) -> int:
        """Tokens that a row keeps at most."""
        return self.budget_split.budget

    @property
    def deciding_scores(self) -> PackedRows | None:
        """Scores that decide what is kept, a list for each head that takes turns; None if the
        lengths decide."""
        return None

    @abstractmethod
    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the positions that a row keeps, by the definition in torch: [n], or [lists, n]
        where heads have lists of their own.

        Args:
            deciding_scores: [heads that take turns, candidates] of the row.
            length: tokens of the row.
        """

    def chunks(
        self, query: Tensor, step: StepSlots, max_rows: int
    ) -> Iterator[tuple[int, Self, Tensor, StepSlots]]:
        """Yield, for each chunk of rows, the first row, memory for the chunk, queries and slots."""
        for first in range(0, query.shape[0], max_rows):
            rows = min(max_rows, query.shape[0] - first)
            yield first, self.first_rows(rows), query[first : first + rows], step.chunk(first, rows)

    def in_chunks_of(self, num_rows: int) -> Self:
        """Return the same memory for chunks of fewer rows, where there are chunks."""
        return self

    def fits(self, num_tokens: int) -> bool:
        """Return True if a step whose rows have so many tokens together needs no smaller chunks.

        Tokens that rows share count for each of them, so rows may have more than the KV cache.
        """
        return self.deciding_scores is None or self.deciding_scores.fits(num_tokens)

    def for_rows(self, lengths: Tensor) -> Self:
        """Return the same memory, with chunks that rows of these lengths fit into.

        Args:
            lengths: [B] int64, on the host.
        """
        scores = self.deciding_scores
        if scores is None or self.fits(int(lengths.sum())):
            return self
        num_rows = max(1, scores.tokens // int(lengths.max()))
        return self.in_chunks_of(min(num_rows, scores.max_rows))

    def num_candidates(self, length: int) -> int:
        """Return the deciding scores of one list that a row of this length has."""
        return length

    def counts(self) -> dict[str, int]:
        """Return counters for `/server_info`; waits for the device."""
        return {}


@dataclass(frozen=True)
class WindowSelector(Selector):
    """Selection of the oldest and the newest tokens, once a step."""

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return sinks and window."""
        return reference_rivals.keep_by_position(length, self.budget, self.budget_split.sinks)[0]

    def keep_slots(self, step: StepSlots) -> None:
        """Write each row's kept slots to `step.kept`."""
        copy_window(step, self.budget_split)


@dataclass(frozen=True)
class ScoreSelector(Selector):
    """Selection by scores, chunk by chunk of R rows."""

    scores: PackedRows
    """Raw q·k, a list for each query head."""
    lse: Tensor | None
    """[>= B, H] f32, log-sum-exp of the scaled scores to base 2; None if selection ignores it."""

    @classmethod
    @abstractmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room) -> Self:
        """Allocate for batches that keep `budget_split`."""

    @property
    def deciding_scores(self) -> PackedRows:
        """Raw q·k: scale and softmax change no head's ranking."""
        return self.scores

    @property
    def max_rows(self) -> int:
        """R, the most rows of a chunk."""
        return self.scores.max_rows

    def in_chunks_of(self, num_rows: int) -> Self:
        """Return the same memory for chunks of fewer rows."""
        return replace(self, scores=self.scores.first_rows(num_rows))

    def select(
        self,
        query: Tensor,
        keys: Tensor,
        step: StepSlots,
        *,
        scale: float,
        first_chunk_is_scored: bool = False,
    ) -> None:
        """Write each row's kept slots to `step.kept`.

        Args:
            query: [B, H, D].
            keys: [P, G, D], one layer of the KV cache.
            step: slots of B rows.
            scale: factor on q·k before the softmax.
            first_chunk_is_scored: `scores` and `lse` hold the first chunk's, from a dense pass
                that stores them (`scores.ScoreStoringAttention`).
        """
        for first, chunk, of_rows, lists in self.chunks(query, step, self.max_rows):
            is_scored = first == 0 and first_chunk_is_scored
            if not is_scored:
                chunk.score(of_rows, keys, lists)
            chunk.select_scored(lists, scale=scale, has_lse=is_scored)

    def score(self, query: Tensor, keys: Tensor, step: StepSlots) -> None:
        """Write raw q·k of a chunk of R rows to `scores`."""
        score_tokens(query, keys, step.indptr, step.slots, self.budget, self.scores)

    @abstractmethod
    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Write the kept slots of a chunk of R rows whose scores are in `scores`.

        Args:
            step: slots of R rows.
            scale: factor on q·k before the softmax.
            has_lse: `lse` holds the chunk's.
        """


def allocate_scores(room: Room, lists: int, num_candidates: int, page: int = 1) -> PackedRows:
    """Allocate the scores of a chunk of rows; `MAX_CANDIDATE_BYTES` limits the rows.

    Args:
        lists: of a row.
        num_candidates: ranks, or candidates, that a row has room for besides, in all of its lists.
        page: tokens of each score.
    """
    rows = min(room.max_rows, MAX_CHUNK_ROWS, MAX_CANDIDATE_BYTES // (4 * num_candidates))
    return PackedRows.allocate(
        lists=lists,
        max_rows=max(1, rows),
        longest=room.context,
        tokens=room.tokens,
        device=room.device,
        page=page,
    )


def allocate_candidates(scores: PackedRows, capacity: int) -> Tensor:
    """Allocate the candidates of each list of a chunk of rows, [R, lists, capacity] int32.

    Raises:
        ValueError: a row may have more scores than are counted.
    """
    if scores.columns >= COUNTED_SCORES:
        raise ValueError(
            f"at most {COUNTED_SCORES - 1} scores of a row can be counted, not {scores.columns}"
        )
    shape = scores.max_rows, scores.lists, capacity
    return torch.zeros(shape, dtype=torch.int32, device=scores.values.device)


@dataclass(frozen=True)
class RankSelector(ScoreSelector):
    """LessIsMore's selection: heads take turns, each by its own ranking."""

    buffers: RankingBuffers

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room) -> Self:
        """Allocate scores and rankings."""
        depth = max(budget_split.selected, shortlist_capacity(budget_split.selected))
        scores = allocate_scores(room, room.num_heads, room.num_heads * depth)
        return cls(budget_split, scores, None, RankingBuffers.allocate(scores, depth))

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the union of the heads' rankings, sinks and recent tokens."""
        assert deciding_scores is not None
        return keep_tokens(deciding_scores[:, :length], self.budget_split)

    def counts(self) -> dict[str, int]:
        """Return the rows that shortlists left to a full ranking, counted per SELECT layer."""
        return {"rows_fully_ranked": int(self.buffers.rows_fully_ranked)}

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Rank, unite and compact."""
        self.unite(step.indptr)
        self.compact(step)

    def unite(self, indptr: Tensor) -> None:
        """Find each row's last turn, with shortlists and, where they fail, full rankings."""
        if self.budget_split.selected:  # else nothing but sinks and recent tokens is kept
            self.shortlist(indptr)
            self.rank_fully(indptr)

    def shortlist(self, indptr: Tensor) -> None:
        """Try shortlists in every row over the budget."""
        shortlist_tokens(self.scores, indptr, self.budget_split, self.buffers)

    def rank_fully(self, indptr: Tensor) -> None:
        """Rank the rows that shortlists left open; count the chosen tokens of every row."""
        rank_tokens(self.scores, indptr, self.budget_split, self.buffers)

    def compact(self, step: StepSlots) -> None:
        """Write the slots of sinks, chosen and recent tokens."""
        compact_slots(step, self.budget_split, self.buffers)


@dataclass(frozen=True)
class MassSelector(ScoreSelector):
    """Selection by attention mass: of a token the heads' softmax weights, summed, or the largest of
    them; of a page the sum over its tokens."""

    lse: Tensor
    mass: PackedRows
    """One list of tokens or pages."""
    candidates: Tensor
    """[R, 1, `candidate_capacity(selected)`] int32."""
    by_largest: bool = False
    """A token's mass is the largest of the heads' weights, not their sum."""

    @property
    def page(self) -> int:
        """Tokens that are kept or dropped together."""
        return self.mass.page

    @classmethod
    def allocate(
        cls, budget_split: BudgetSplit, room: Room, *, by_largest: bool = False, page: int = 1
    ) -> Self:
        """Allocate for batches that keep `budget_split` pages."""
        capacity = candidate_capacity(budget_split.selected)
        scores = allocate_scores(room, room.num_heads, capacity)
        mass = allocate_scores(room, 1, capacity, page)
        return cls(
            budget_split=budget_split,
            scores=scores,
            # A dense pass writes every row's.
            lse=scores.values.new_zeros(room.max_rows, room.num_heads),
            mass=mass,
            candidates=allocate_candidates(mass, capacity),
            by_largest=by_largest,
        )

    @property
    def budget(self) -> int:
        """Tokens that a row keeps at most."""
        return self.budget_split.budget * self.page

    @property
    def deciding_scores(self) -> PackedRows:
        """The masses, as the scores of one head."""
        return self.mass

    def num_candidates(self, length: int) -> int:
        """Return the row's tokens, or pages."""
        return triton.cdiv(length, self.page)

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the tokens of the top-k pages, sinks and recent pages."""
        assert deciding_scores is not None
        pages = keep_tokens(deciding_scores[:, : self.num_candidates(length)], self.budget_split)
        tokens = pages[:, None] * self.page + torch.arange(self.page, device=pages.device)
        return tokens[tokens < length]

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Weigh tokens or pages and keep the top-k."""
        if not has_lse:
            log_sum_exp(self.scores, step.indptr, self.budget, scale, self.lse)
        self.weigh(step.indptr, scale)
        self.topk(step)

    def masses(self, scores: Tensor, scale: float) -> Tensor:
        """Return the masses of one row [H, S] by the definition in torch, of tokens or pages."""
        weigh = reference_rivals.max_mass if self.by_largest else reference.softmax_mass
        mass = weigh(scores, scale)
        return mass if self.page == 1 else reference_rivals.page_mass(mass, self.page)

    def weigh(self, indptr: Tensor, scale: float) -> None:
        """Write the masses of every row over the budget."""
        softmax_mass(
            self.scores,
            indptr,
            self.lse,
            self.budget,
            scale,
            self.mass,
            by_largest=self.by_largest,
        )

    def topk(self, step: StepSlots) -> None:
        """Write the slots of sinks, top-k by mass and recent pages."""
        topk_by_mass(self.mass, step, self.budget_split, self.candidates)


@dataclass(frozen=True)
class HeadSelector(ScoreSelector):
    """Selection by each query head for itself, by raw q·k."""

    candidates: Tensor
    """[R, H, `candidate_capacity(selected)`] int32."""

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room) -> Self:
        """Allocate scores and candidates."""
        capacity = candidate_capacity(budget_split.selected)
        scores = allocate_scores(room, room.num_heads, room.num_heads * capacity)
        return cls(budget_split, scores, None, allocate_candidates(scores, capacity))

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return each head's own list, [H, n]."""
        assert deciding_scores is not None
        return reference_rivals.keep_per_head(deciding_scores[:, :length], self.budget_split)

    def select_scored(self, step: StepSlots, *, scale: float, has_lse: bool) -> None:
        """Keep each head's top-k."""
        topk_by_mass(self.scores, step, self.budget_split, self.candidates)


@dataclass(frozen=True)
class PageSelector(Selector):
    """Selection of pages by summaries of their keys, in the layer that reads them."""

    page_scores: PackedRows
    """Scores of pages, for each list of kept slots."""
    candidates: Tensor
    """[R, lists, `candidate_capacity(selected)`] int32."""

    @property
    def page(self) -> int:
        """Tokens that are kept or dropped together."""
        return self.page_scores.page

    @property
    def budget(self) -> int:
        """Tokens that a row keeps at most."""
        return self.budget_split.budget * self.page

    @property
    def deciding_scores(self) -> PackedRows:
        """The scores of pages."""
        return self.page_scores

    def in_chunks_of(self, num_rows: int) -> Self:
        """Return the same memory for chunks of fewer rows."""
        return replace(self, page_scores=self.page_scores.first_rows(num_rows))

    def num_candidates(self, length: int) -> int:
        """Return the row's pages but for the newest, which is kept anyway."""
        return triton.cdiv(length, self.page) - 1

    def keep(self, deciding_scores: Tensor | None, length: int) -> Tensor:
        """Return the tokens of the newest page and of the others of largest score, [n] or
        [lists, n]."""
        assert deciding_scores is not None
        others = deciding_scores[:, : self.num_candidates(length)]
        kept = reference_rivals.keep_pages(others, length, self.budget, self.page)
        return kept[0] if len(kept) == 1 else kept

    def select(self, layer: int, query: Tensor, summaries: Tensor, step: StepSlots) -> None:
        """Write each row's kept slots to `step.kept`.

        Args:
            layer: index of the layer.
            query: [B, H, D].
            summaries: [pages of the cache, …], the layer's, from `summarize`.
            step: slots of B rows.
        """
        for _, chunk, of_rows, lists in self.chunks(query, step, self.page_scores.max_rows):
            chunk.score(layer, of_rows, summaries, lists)
            topk_by_mass(chunk.page_scores, lists, self.budget_split, chunk.candidates)

    def read_once(self, layer: int) -> int:
        """Return the bytes that one step reads of a layer's weights of the selection."""
        return 0

    @abstractmethod
    def summarize(
        self, layer: int, keys: Tensor, lengths: Tensor, slots: Tensor, summaries: Tensor
    ) -> None:
        """Summarize the pages that new tokens complete.

        Args:
            layer: index of the layer.
            keys: [P, G, D], the layer's, the new tokens' keys included.
            lengths: [T] int, tokens of the request up to each new token, the token included.
            slots: [T] int, slot of each new token.
            summaries: [>= P / page, …], written at `slot // page`.
        """

    @abstractmethod
    def score(self, layer: int, query: Tensor, summaries: Tensor, step: StepSlots) -> None:
        """Write the scores of the pages of a chunk of R rows to `page_scores`."""

    @abstractmethod
    def summarized(self, layer: int, keys: Tensor) -> Tensor:
        """Return the summaries of complete pages by the definition.

        Args:
            layer: index of the layer.
            keys: [pages · page, G, D], of one request from its first token on.

        Returns:
            [pages, …] f32.
        """

    def has_right_summaries(self, layer: int, keys: Tensor, summaries: Tensor) -> Tensor:
        """Compare summaries with the definition.

        Args:
            layer: index of the layer.
            keys: [pages · page, G, D], of one request from its first token on.
            summaries: [pages, …], of the same pages.

        Returns:
            [pages] bool.
        """
        return (summaries.float() == self.summarized(layer, keys)).flatten(1).all(1)


@dataclass(frozen=True)
class BoundSelector(PageSelector):
    """Selection of pages by bounds on their scores (Quest)."""

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room, *, lists: int, page: int) -> Self:
        """Allocate for batches that keep `budget_split` pages in each of a row's lists."""
        capacity = candidate_capacity(budget_split.selected)
        bounds = allocate_scores(room, lists, lists * capacity, page)
        return cls(budget_split, bounds, allocate_candidates(bounds, capacity))

    def summarize(
        self, layer: int, keys: Tensor, lengths: Tensor, slots: Tensor, summaries: Tensor
    ) -> None:
        """Write the least and the greatest keys; see `page_bounds.summarize_pages`."""
        summarize_pages(keys, lengths, slots, self.page, summaries)

    def summarized(self, layer: int, keys: Tensor) -> Tensor:
        """Return [pages, 2, G, D]: least, greatest."""
        return torch.stack(reference_rivals.summarize_pages(keys, self.page), 1).float()

    def score(self, layer: int, query: Tensor, summaries: Tensor, step: StepSlots) -> None:
        """Write bounds."""
        page_bounds(query, summaries, step.indptr, step.slots, self.budget, self.page_scores)


@dataclass(frozen=True)
class ModelGates:
    """Gates of a model's layers, with the model's RoPE, on one device."""

    of_layer: Mapping[int, BlockGate]
    cos_sin: Tensor
    """[positions, D] f32, as in `reference_rivals.rotate`."""

    @classmethod
    def load(cls, gates: Sequence[BlockGate], room: Room) -> Self:
        """Copy the gates of all layers to a device.

        Raises:
            ValueError: the room has no RoPE.
        """
        if room.cos_sin is None:
            raise ValueError("a gate needs the model's RoPE")
        of_layer = {}
        for layer, gate in enumerate(gates):
            moved: dict[str, Any] = {
                name: value.to(room.device).contiguous()
                for name, value in vars(gate).items()
                if isinstance(value, Tensor)
            }
            of_layer[layer] = replace(gate, **moved)
        return cls(of_layer, room.cos_sin)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.of_layer[0].block

    @property
    def num_bytes(self) -> int:
        """Device memory held, in bytes."""
        tensors = (each for gate in self.of_layer.values() for each in vars(gate).values())
        weights = sum(each.nbytes for each in tensors if isinstance(each, Tensor))
        return weights + self.cos_sin.nbytes


@dataclass(frozen=True)
class GateSelector(PageSelector):
    """Selection of blocks by a trained gate, for each KV head (SeerAttention-R)."""

    projected: Tensor
    """[R, G, D] f32, the projected queries."""
    gates: ModelGates

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room, gates: ModelGates) -> Self:
        """Allocate for batches that keep `budget_split` blocks for each KV head."""
        capacity = candidate_capacity(budget_split.selected)
        lists = room.num_kv_heads
        logits = allocate_scores(room, lists, lists * capacity, gates.block)
        shape = logits.max_rows, logits.lists, gates.cos_sin.shape[1]
        return cls(
            budget_split=budget_split,
            page_scores=logits,
            candidates=allocate_candidates(logits, capacity),
            projected=logits.values.new_zeros(shape),
            gates=gates,
        )

    @property
    def num_bytes(self) -> int:
        """Device memory held, in bytes."""
        return super().num_bytes + self.gates.num_bytes

    def read_once(self, layer: int) -> int:
        """Return the bytes of the weights that project queries."""
        return self.gates.of_layer[layer].query_weight.nbytes

    def summarize(
        self, layer: int, keys: Tensor, lengths: Tensor, slots: Tensor, summaries: Tensor
    ) -> None:
        """Write compressed keys; see `block_gate.compress_blocks`."""
        gate, table = self.gates.of_layer[layer], self.gates.cos_sin
        compress_blocks(keys, lengths, slots, gate, table, summaries)

    def summarized(self, layer: int, keys: Tensor) -> Tensor:
        """Return [blocks, G, D], the compressed keys before they are rounded to the cache."""
        gate, table = self.gates.of_layer[layer], self.gates.cos_sin[: len(keys)]
        before_rope = reference_rivals.rotate_back(keys, table)
        summaries = reference_rivals.summarize_blocks(before_rope, self.page)
        return reference_rivals.compress_blocks(summaries, gate, table)

    def has_right_summaries(self, layer: int, keys: Tensor, summaries: Tensor) -> Tensor:
        """Compare each KV head's compressed key, but for rounding."""
        expected = self.summarized(layer, keys)
        error = (summaries.float() - expected).square().sum(-1)
        bound = SUMMARY_TOLERANCE**2 * expected.square().sum(-1)
        return (error <= bound).all(1)

    def score(self, layer: int, query: Tensor, summaries: Tensor, step: StepSlots) -> None:
        """Write logits."""
        gate_logits(
            query,
            summaries,
            step.indptr,
            step.slots,
            self.budget,
            self.gates.of_layer[layer],
            self.gates.cos_sin,
            self.projected,
            self.page_scores,
        )
