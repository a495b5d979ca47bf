"""From the queries and keys of a decode step to records: measures of the sets that the served
policy has read, and that others would have chosen from the same queries and keys."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lim_sglang.audit import ObservedRow
from lim_sglang.kernels.reference import BudgetSplit, score_tokens
from lim_sglang.policies.policy import SPARSE, Policy, choosing_layers, sparse_policy
from lim_sglang.tracing.measures import (
    attention_recall,
    mean_jaccard,
    own_sets,
    ranks_deep,
    share_kept,
)
from lim_sglang.tracing.records import LayerRecord


class Chooser:
    """A policy that goes through the layers of a step beside the backend."""

    def __init__(self, policy: Policy, depth: int, cos_sin: Tensor | None, *, served: bool) -> None:
        """Begin before the first layer.

        Args:
            depth: layers of the model.
            cos_sin: the model's RoPE, for a policy that `reads_before_rope`.
            served: what the backend has kept is the set; any other policy chooses by its
                definition.
        """
        self._roles = policy.roles(depth)
        self._policy = sparse_policy(policy, self._roles)
        self._choosing = choosing_layers(self._roles)
        self._cos_sin, self._is_served = cos_sin, served
        self._kept: Tensor | None = None

    def selects(self, layer: int) -> bool:
        """Return True if a set is chosen in a layer."""
        return self._policy is not None and layer in self._choosing

    def reads(self, layer: int) -> bool:
        """Return True if a layer reads no more than a set."""
        return self._roles[layer] in SPARSE

    def choose(self, row: ObservedRow) -> Tensor | None:
        """Return the set after a layer, [lists, n], where the layer reads or selects one.

        The layers of a step come in their order; the row is over the budget.
        """
        if self._is_served:
            return row.kept
        if self._policy and self.selects(row.inputs.layer):
            self._kept = self._policy.keep(replace(row.inputs, cos_sin=self._cos_sin))
        return self._kept


class Recorder:
    """A `LayerObserver` that measures the steps of one request at a time."""

    def __init__(
        self, choosers: Mapping[str, Chooser], split: BudgetSplit, layers: Collection[int]
    ) -> None:
        """Begin without records.

        Args:
            choosers: the served policy and those that are compared with it, by their names.
            split: LessIsMore's parts of the budget, for the heads' own sets and the union's depth.
            layers: those that are measured.
        """
        self._records: list[LayerRecord] = []
        self._choosers, self._split, self._layers = choosers, split, layers
        self._step, self._measures = 0, False
        # Sets by policy and layer that selects, of this step and, where not reached yet, the last.
        self._sets: dict[tuple[str, int], Tensor] = {}
        # Set of the nearest layer below that selects, by policy.
        self._below: dict[str, Tensor] = {}

    def take(self) -> list[LayerRecord]:
        """Return the records of the request that has ended, and forget them."""
        records, self._records = self._records, []
        return records

    def begin_step(self, step: int, *, measures: bool) -> None:
        """Begin a step of the request, or of a next one; where `measures` is false, its sets are
        chosen, but not recorded.

        Args:
            step: from 1.
        """
        if step != self._step + 1:
            self._sets.clear()
        self._step, self._measures = step, measures
        self._below.clear()

    def note_layer(self, row: ObservedRow) -> None:
        """Choose by all policies, and record a measured layer of a row over the budget."""
        inputs, layer = row.inputs, row.inputs.layer
        length = inputs.keys.shape[0]
        if length <= self._split.budget:
            return
        measures = self._measures and layer in self._layers
        scores = score_tokens(inputs.query, inputs.keys)  # [H, S]
        weights = (scores * inputs.scale).softmax(-1)
        recall: dict[str, float] = {}
        from_step: dict[str, float] = {}
        from_layer: dict[str, float] = {}
        for name, chooser in self._choosers.items():
            kept = chooser.choose(row)
            if kept is None:
                continue
            if measures and chooser.reads(layer):
                recall[name] = attention_recall(weights, kept)
            if chooser.selects(layer):
                last, below = self._sets.get((name, layer)), self._below.get(name)
                if measures and last is not None:
                    from_step[name] = share_kept(kept, last)
                if measures and below is not None:
                    from_layer[name] = share_kept(kept, below)
                self._sets[name, layer] = self._below[name] = kept
        if measures:
            whole, ranked = own_sets(scores, self._split)
            overlaps = mean_jaccard(whole), mean_jaccard(ranked)
            deep = ranks_deep(scores, self._split)
            shares = recall, from_step, from_layer
            self._records.append(LayerRecord(self._step, length, layer, *shares, *overlaps, deep))


def sampled_steps(every: int) -> Iterator[tuple[int, bool, bool]]:
    """Yield each step from 1, whether its sets are kept, and whether it is measured: every n-th is,
    and the sets of the step before are kept to compare with."""
    step = 0
    while True:
        step += 1
        measured = step % every == 0
        yield step, measured or (step + 1) % every == 0, measured
