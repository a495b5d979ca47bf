"""Selection of kept slots by summaries of the keys of pages, in the layer that reads them.

`BoundSelector` ranks pages by bounds on their scores and `GateSelector` by a trained gate's logits.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import triton
from torch import Tensor

from lim_sglang.kernels import reference_rivals
from lim_sglang.kernels.block_gate import compress_blocks, gate_logits
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.exchange import ScoreExchange
from lim_sglang.kernels.mass import candidate_capacity, topk_by_mass
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.page_bounds import page_bounds, summarize_pages
from lim_sglang.kernels.reference import BudgetSplit
from lim_sglang.kernels.reference_rivals import BlockGate
from lim_sglang.kernels.selector import Room, Selector, allocate_candidates, allocate_scores

SUMMARY_TOLERANCE = 2.0**-7
"""Largest relative error of a gate's summary of a block, which has 8 bits in a bf16 cache; Triton's
interpreter cuts what a GPU rounds."""


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

    exchange: ScoreExchange | None = None
    """None if this rank has all heads that share a list."""

    @classmethod
    def allocate(cls, budget_split: BudgetSplit, room: Room, *, lists: int, page: int) -> Self:
        """Allocate for batches that keep `budget_split` pages in each of a row's lists."""
        capacity = candidate_capacity(budget_split.selected)
        bounds = allocate_scores(room, lists, lists * capacity, page)
        exchange = ScoreExchange.allocate(room.ranks, bounds, by_largest=True)
        return cls(budget_split, bounds, allocate_candidates(bounds, capacity), exchange)

    @property
    def own_scores(self) -> PackedRows:
        """The bounds of this rank's heads."""
        return self.exchange.own if self.exchange else self.page_scores

    def of_all_ranks(self, own_scores: Tensor) -> Tensor:
        """Return the largest bounds of all heads that share a list."""
        return self.exchange.of_all_ranks(own_scores) if self.exchange else own_scores

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
        page_bounds(query, summaries, step.indptr, step.slots, self.budget, self.own_scores)
        if self.exchange:
            self.exchange.unite(self.page_scores)


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
