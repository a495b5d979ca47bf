"""Run the selection of ranks of tensor parallelism, and compare it with the selection by all heads.

The definition knows no ranks: it ranks the scores of all heads.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lim_sglang.kernels.selector import MassSelector, RankSelector
from lim_sglang.kernels.verify import (
    MASS_TOLERANCE,
    AnySelector,
    Batch,
    RandomStep,
    compaction_differences,
    kept_differences,
    random_step,
    relative_error,
    scored_selector,
)


@dataclass
class PlayedRanks:
    """One of several ranks on one device: a first pass records its parts, a second shows all."""

    rank: int
    recorded: list[list[Tensor]]
    """Parts by rank and gather, of all ranks."""
    _gathers: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.recorded)

    def gather_into(self, part: Tensor, out: Tensor) -> None:
        """Record the part; write the parts of all ranks to `out` once they are recorded."""
        if all(len(parts) > self._gathers for parts in self.recorded):
            parts = [parts[self._gathers] for parts in self.recorded]
            out.copy_(torch.stack(parts).view(out.shape))
        else:
            self.recorded[self.rank].append(part.clone())
        self._gathers += 1


def play_ranks(num_ranks: int, run: Callable[[PlayedRanks], object]) -> None:
    """Run what each rank does, twice: what comes of the first time is not to be used."""
    recorded: list[list[Tensor]] = [[] for _ in range(num_ranks)]
    for _ in range(2):
        for rank in range(num_ranks):
            run(PlayedRanks(rank, recorded))


def heads_of_rank(batch: Batch, step: RandomStep, ranks: PlayedRanks) -> tuple[Batch, RandomStep]:
    """Return what a rank has of a batch: H / ranks of the heads' scores."""
    heads = batch.heads // ranks.size
    own = slice(ranks.rank * heads, (ranks.rank + 1) * heads)
    kv_heads = max(1, batch.kv_heads // ranks.size)
    part = replace(step, scores=step.scores[:, own])
    return replace(batch, heads=heads, kv_heads=kv_heads), part


def selectors_of_ranks(
    kind: type[AnySelector],
    batch: Batch,
    step: RandomStep,
    num_ranks: int,
    unite: Callable[[AnySelector], object],
) -> Iterable[AnySelector]:
    """Return each rank's selector, with its heads' scores, once it has united what ranks have."""
    selectors: dict[int, AnySelector] = {}

    def run(ranks: PlayedRanks) -> None:
        own_batch, own_step = heads_of_rank(batch, step, ranks)
        selectors[ranks.rank] = scored_selector(kind, own_batch, own_step, ranks)
        unite(selectors[ranks.rank])

    play_ranks(num_ranks, run)
    return selectors.values()


def turn_exchange_differences(batch: Batch, device: str, num_ranks: int) -> list[str]:
    """Compare the kept slots of `RankSelector` on each rank, given the heads' scores."""
    step = random_step(batch, device)

    def unite(selector: RankSelector) -> None:
        selector.unite(step.slots.indptr)

    found = selectors_of_ranks(RankSelector, batch, step, num_ranks, unite)
    return [
        f"rank {rank}: {each}"
        for rank, selector in enumerate(found)
        for each in compaction_differences(batch, step, selector)
    ]


def mass_exchange_differences(batch: Batch, device: str, num_ranks: int) -> list[str]:
    """Compare the masses of `MassSelector`, and what it keeps by them, on each rank."""
    step = random_step(batch, device)

    def weigh(selector: MassSelector) -> None:
        selector.select_scored(step.slots, scale=batch.scale, has_lse=False)

    found = selectors_of_ranks(MassSelector, batch, step, num_ranks, weigh)
    return [
        f"rank {rank}: {each}"
        for rank, selector in enumerate(found)
        for each in united_mass_differences(batch, step, selector)
    ]


def united_mass_differences(batch: Batch, step: RandomStep, selector: MassSelector) -> list[str]:
    """Compare one rank's masses with those that all heads give, and its top-k by them."""
    masses = selector.deciding_scores.rows(step.ends)
    selector.topk(step.slots)
    differences = kept_differences(
        batch, step.slots, lambda row, length: selector.keep(masses[row], length)
    )
    for row in batch.rows_over_budget:
        length = batch.lengths[row]
        expected = selector.masses(step.scores[row, :, :length], batch.scale)
        error = relative_error(masses[row][0, :length], expected)
        if not error <= MASS_TOLERANCE:
            differences.append(f"row {row}: masses are off by {error:.2e}")
    return differences
