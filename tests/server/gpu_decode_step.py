"""One decode step of one SELECT and one REUSE layer, eager or as a CUDA graph, and its reference.

Slots are shuffled over the KV pool, lengths are ragged, and q, k and v are drawn: what the layers
compute is known from the definition alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.kernels.reference import attend_tokens, keep_tokens, score_tokens, softmax_mass
from lim_sglang.kernels.selector import MassSelector
from lim_sglang.kernels.verify import MASS_TOLERANCE, SCORE_TOLERANCE, relative_error
from tests.server.gpu_rig import Rig

SELECT, REUSE = 2, 3
"""Layers of the rig's schedule."""


@dataclass(frozen=True)
class Step:
    """What a step finds: B rows, some of them padding of a graph's batch."""

    forward_batch: Any
    slots: list[Tensor]
    query: tuple[Tensor, Tensor]
    """[B, H * D] of the SELECT and of the REUSE layer."""
    new_kv: tuple[Tensor, Tensor]
    """[B, G * D] each."""


@dataclass(frozen=True)
class Outcome:
    """What a step left: copies."""

    outputs: tuple[Tensor, Tensor]
    kept: list[Tensor]
    """The slots of each row."""
    scores: Tensor
    deciding_scores: Tensor
    """The scores, or the mass of each token as of one head."""


def fill_cache(rig: Rig, seed: int = 0) -> None:
    """Draw the K and V of both layers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pool = rig.runner.token_to_kv_pool
    for layer in (SELECT, REUSE):
        for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer)):
            drawn = torch.randn(buffer.shape, generator=generator, device="cuda")
            buffer.copy_(drawn)


def make_step(rig: Rig, lengths: Sequence[int], *, padding: int = 0, seed: int = 0) -> Step:
    """Rows of these lengths in shuffled slots, then rows as SGLang pads a graph's batch."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads, kv_heads, dim = rig.heads
    table = rig.runner.req_to_token_pool.req_to_token
    order = 1 + torch.randperm(70_000, generator=generator, device="cuda").int()
    slots, first = [], 0
    for row, length in enumerate(lengths, start=1):
        slots.append(order[first : first + length])
        table[row, :length] = slots[-1]
        first += length
    all_lengths = [*lengths, *[1] * padding]
    rows = len(all_lengths)

    def drawn(width: int) -> Tensor:
        drawn = torch.randn(rows, width, generator=generator, device="cuda")
        return drawn.to(rig.runner.dtype)

    lens = torch.tensor(all_lengths, dtype=torch.int64)
    new_slots = [int(row[-1]) for row in slots] + [0] * padding
    batch = SimpleNamespace(
        batch_size=rows,
        forward_mode=compat.ForwardMode.DECODE,
        req_pool_indices=torch.tensor(
            [*range(1, len(lengths) + 1), *[0] * padding], dtype=torch.int64, device="cuda"
        ),
        seq_lens=lens.cuda(),
        seq_lens_cpu=lens,
        seq_lens_sum=sum(all_lengths),
        out_cache_loc=torch.tensor(new_slots, dtype=torch.int64, device="cuda"),
        positions=lens.cuda() - 1,
        encoder_lens=None,
        spec_info=None,
    )
    slots += [torch.zeros(1, dtype=torch.int32, device="cuda")] * padding
    query = (drawn(heads * dim), drawn(heads * dim))
    return Step(batch, slots, query, (drawn(kv_heads * dim), drawn(kv_heads * dim)))


def layers_of(rig: Rig) -> tuple[Any, Any]:
    """The attention layers that the step runs."""
    layers = list(compat.attention_layers(rig.runner.model))
    return layers[SELECT], layers[REUSE]


def run_layers(rig: Rig, backend: Any, step: Step) -> tuple[Tensor, Tensor]:
    """Both layers, on whatever is planned."""
    outputs = [
        backend.forward_decode(query, *step.new_kv, layer, step.forward_batch)
        for query, layer in zip(step.query, layers_of(rig), strict=True)
    ]
    return outputs[0], outputs[1]


def run_eager(rig: Rig, backend: Any, step: Step) -> Outcome:
    """Plan and run layer by layer."""
    poison(backend)
    backend.init_forward_metadata(step.forward_batch)
    return outcome(backend, step, run_layers(rig, backend, step))


def poison(backend: Any) -> None:
    """Leave nothing of an earlier step that could be taken for this one's."""
    backend.selector.scores.fill_(torch.nan)
    backend.selector.deciding_scores.fill_(torch.nan)
    backend.sparse_decode.kept_slots.zero_()


def outcome(backend: Any, step: Step, outputs: tuple[Tensor, Tensor]) -> Outcome:
    """Copy what a step left."""
    ends = backend.sparse_decode.kept_indptr.tolist()
    kept = backend.sparse_decode.kept_slots.clone()
    rows = step.forward_batch.batch_size
    return Outcome(
        (outputs[0].clone(), outputs[1].clone()),
        [kept[first:last] for first, last in itertools.pairwise(ends)],
        backend.selector.scores[:rows].clone(),
        backend.selector.deciding_scores[:rows].clone(),
    )


class Graph:
    """Both layers captured for one batch size, replayed for other steps of that size."""

    def __init__(self, rig: Rig, backend: Any, step: Step) -> None:
        self._backend = backend
        self._static = step
        backend.init_forward_metadata_out_graph(step.forward_batch, in_capture=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run_layers(rig, backend, step)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = run_layers(rig, backend, step)

    def plan(self, step: Step) -> None:
        """Plan a replay, as SGLang does, with the inputs of another step."""
        for mine, theirs in zip(self._inputs(self._static), self._inputs(step), strict=True):
            mine.copy_(theirs)
        self._backend.init_forward_metadata_out_graph(step.forward_batch)

    def replay(self) -> None:
        """Run what is planned."""
        self._graph.replay()

    def run(self, step: Step) -> Outcome:
        """Plan, replay, and copy what is left."""
        poison(self._backend)
        self.plan(step)
        self.replay()
        return self.outcome(step)

    def outcome(self, step: Step) -> Outcome:
        """Copy what the last replay left."""
        return outcome(self._backend, step, self._outputs)

    @staticmethod
    def _inputs(step: Step) -> list[Tensor]:
        batch = step.forward_batch
        inputs = [batch.out_cache_loc, batch.req_pool_indices, batch.seq_lens]
        return [*step.query, *step.new_kv, *inputs]


def wrong_rows(rig: Rig, backend: Any, step: Step, found: Outcome) -> list[str]:
    """Rows of which anything is not what the definition gives for the step's q, k and v."""
    heads, _, dim = rig.heads
    pool = rig.runner.token_to_kv_pool
    keys = [pool.get_key_buffer(layer) for layer in (SELECT, REUSE)]
    values = [pool.get_value_buffer(layer) for layer in (SELECT, REUSE)]
    budget = backend.selector.budget_split.budget
    wrong = []
    for row, slots in enumerate(step.slots):
        name = f"row {row} of {len(slots)} tokens"
        query = [q[row].view(heads, dim).float() for q in step.query]
        scores = found.scores[row, :, : len(slots)]
        if len(slots) > budget:
            expected = score_tokens(query[0], keys[0][slots.long()].float())
            error = relative_error(scores, expected)
            if not error <= SCORE_TOLERANCE:
                wrong.append(f"{name}: scores are off by {error:.1e}")
            if isinstance(backend.selector, MassSelector):
                mass = softmax_mass(scores, layers_of(rig)[0].scaling)
                error = relative_error(found.deciding_scores[row, 0, : len(slots)], mass)
                if not error <= 10 * MASS_TOLERANCE:  # the normalisers are FlashInfer's
                    wrong.append(f"{name}: masses are off by {error:.1e}")
        deciding_scores = found.deciding_scores[row, :, : len(slots)]
        kept = slots[keep_tokens(deciding_scores, backend.selector.budget_split)]
        if not torch.equal(found.kept[row], kept):
            wrong.append(f"{name} keeps other slots")
        for place, read in enumerate((slots, kept)):
            scale = layers_of(rig)[place].scaling
            expected = attend_tokens(query[place], keys[place], values[place], read.long(), scale)
            error = relative_error(found.outputs[place][row].view(heads, dim), expected)
            if not error <= rig.tolerance:
                wrong.append(f"{name}: layer {(SELECT, REUSE)[place]} is off by {error:.1e}")
    return wrong
