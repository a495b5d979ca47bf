"""Passes over the rows of a cycle, each captured as a CUDA graph for some numbers of rows.

Shapes: B requests, w tokens of each, V tokens of the vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.kernels.coupled_sampling import pick_coupled
from lim_sglang.lossless import internals
from lim_sglang.lossless.gpu_backends import DraftBackend, DraftMemory
from lim_sglang.lossless.passes import CycleRows
from lim_sglang.lossless.widths import StepTimes

TIMED_REPLAYS = 5


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: Any
    queries: Tensor | None
    """[rows, layers that keep theirs, H, D], in the graph's own memory; None if none does."""


class RowPass:
    """A pass over one token of each of its rows, with inputs that stay in place for CUDA graphs."""

    def __init__(self, runner: Any, backend: Any, max_rows: int) -> None:
        """Allocate the inputs.

        Args:
            backend: attention of the pass, which plans each step if it has to.
        """
        self._runner, self.backend, self.max_rows = runner, backend, max_rows
        self._padding = torch.tensor([[0], [0], [0], [0], [1]], device=runner.device)
        """Inputs of a row that pads a graph: it writes to SGLang's slot 0 and reads it."""
        self._inputs = self._padding.repeat(1, max_rows)
        self.tokens, self.positions, self.slots, self.requests, self.lengths = self._inputs
        self.host_lengths = torch.ones(max_rows, dtype=torch.int64)
        self._graphs: dict[int, _Graph] = {}

    def set_inputs(self, *inputs: Tensor) -> None:
        """Set the inputs of one pass, by few launches.

        Args:
            inputs: [rows] int64 each: tokens, positions and slots; of a pass that is planned the
                requests and their lengths, too.
        """
        rows, kinds = len(inputs[0]), len(inputs)
        self._inputs[:kinds, :rows] = torch.stack(inputs)
        self._inputs[:kinds, rows:] = self._padding[:kinds]

    def set_host_lengths(self, lengths: Tensor) -> None:
        """Set the lengths by which a pass is planned, [rows] on the host."""
        rows = len(lengths)
        self.host_lengths[:rows], self.host_lengths[rows:] = lengths, 1

    def run(self, rows: int, *, with_hidden_states: bool = False) -> tuple[Any, Tensor | None]:
        """Run the pass over the first rows.

        Args:
            with_hidden_states: return the last layer's, too, which graphs do not have.

        Returns:
            SGLang's output, and the queries that the backend keeps, [rows, layers, H, D], if any;
            the next pass overwrites both.
        """
        size = self.size_for(rows)
        if size is None or with_hidden_states:
            batch = self._batch(rows, with_hidden_states=with_hidden_states)
            self.backend.init_forward_metadata(batch)
            return self._forward(batch), self._queries()
        self.backend.init_forward_metadata_out_graph(self._batch(size))
        found = self._graphs[size]
        found.graph.replay()
        logits = found.output.next_token_logits[:rows]
        return compat.LogitsProcessorOutput(next_token_logits=logits), found.queries

    def size_for(self, rows: int) -> int | None:
        """Return the rows of the graph that serves as many; None if there is none."""
        return min((size for size in self._graphs if size >= rows), default=None)

    def capture(self, sizes: Iterable[int], logits: Tensor) -> None:
        """Capture a CUDA graph for each number of rows; the largest first, so that all of them use
        its memory.

        Args:
            logits: [>= the largest size, V] f32, which the graphs write.
        """
        for size in sorted(sizes, reverse=True):
            batch = self._batch(size, logits=logits[:size])
            self.backend.init_forward_metadata_out_graph(batch, in_capture=True)
            graph, found = internals.capture_graph(partial(self._captured, batch))
            self._graphs[size] = _Graph(graph, *found)

    def time_graphs(self, *, rows_of_request: int = 1) -> StepTimes:
        """Return the times of the passes of all captured sizes, with the inputs as they are."""
        sizes = sorted(self._graphs)
        requests = [size // rows_of_request for size in sizes]
        return StepTimes(requests, [self.time_graph(size) for size in sizes])

    def time_graph(self, size: int) -> float:
        """Return the median milliseconds of the pass of a captured size, with the inputs as they
        are."""
        times = []
        self.backend.init_forward_metadata_out_graph(self._batch(size))
        for _ in range(1 + TIMED_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._graphs[size].graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return median(times[1:])

    def _batch(
        self, rows: int, *, logits: Tensor | None = None, with_hidden_states: bool = False
    ) -> Any:
        return internals.decode_batch(
            self._runner,
            tokens=self.tokens[:rows],
            requests=self.requests[:rows],
            positions=self.positions[:rows],
            lengths=self.lengths[:rows],
            host_lengths=self.host_lengths[:rows],
            slots=self.slots[:rows],
            logits=logits,
            with_hidden_states=with_hidden_states,
        )

    def _captured(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Do what a graph captures; return the output and the queries."""
        return self._forward(batch), self._queries()

    def _queries(self) -> Tensor | None:
        kept = [self.backend.queries[layer] for layer in self.backend.query_layers]
        return torch.stack(kept, 1) if kept else None

    def _forward(self, batch: Any) -> Any:
        return internals.call_model(self._runner, batch, self.backend)


class DraftLoop(RowPass):
    """Drafts, each a replay of one CUDA graph, which takes the last draft and draws the next.

    A replay knows by `_step` how many drafts there are. Draws heed temperature, filters and seeds;
    a request's bias and least number of tokens are left to verification.
    """

    def __init__(self, runner: Any, backend: DraftBackend, memory: DraftMemory, most: int) -> None:
        """Allocate the inputs.

        Args:
            most: drafts of a cycle.
        """
        rows, device = memory.max_rows, runner.device
        super().__init__(runner, backend, rows)
        self._memory, self._most = memory, most
        self._drafted = torch.zeros(rows, most + 1, dtype=torch.int64, device=device)
        self._first_positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._all_slots = torch.zeros_like(self._drafted)
        self.kept_ends = memory.ends.clone()
        """[rows] int32, where the lists of each row end before its drafts."""
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._temperatures = torch.ones(rows, 1, device=device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._top_ks = torch.ones(rows, dtype=torch.int32, device=device)
        self._top_ps, self._min_ps = torch.ones(2, rows, device=device)

    def draft(self, rows: CycleRows, newest: Tensor, info: Any) -> Tensor:
        """Draft w - 1 tokens behind the newest of each request.

        Args:
            newest: [B] int64.
            info: SGLang's sampling parameters of the batch.

        Returns:
            [B, w] int64, the newest token first.
        """
        count, width = rows.positions.shape
        size = self.size_for(count)
        assert size is not None
        self._drafted[:count, 0] = newest
        self._first_positions[:count] = rows.positions[:, :1]
        self._all_slots[:count, :width], self._all_slots[count:] = rows.slots, 0
        self.kept_ends.copy_(self._memory.ends)
        self._temperatures[:count] = info.temperatures
        self._seeds[:count], self._top_ks[:count] = info.sampling_seed, info.top_ks
        self._top_ps[:count], self._min_ps[:count] = info.top_ps, info.min_ps
        self._step.zero_()
        for _ in range(width - 1):
            self._graphs[size].graph.replay()
        return self._drafted[:count, :width].clone()

    def _captured(self, batch: Any) -> tuple[Any, None]:
        """Run the model over the last draft of each row, and draw the next one."""
        rows, step = batch.batch_size, self._step
        self.tokens[:rows] = self._drafted[:rows].index_select(1, step)[:, 0]
        self.slots[:rows] = self._all_slots[:rows].index_select(1, step)[:, 0]
        self.positions[:rows] = (self._first_positions[:rows] + step)[:, 0]
        self._memory.ends[:rows] = self.kept_ends[:rows] + step + 1
        output = self._forward(batch)
        probs = (output.next_token_logits / self._temperatures[:rows]).softmax(-1)
        drawn = pick_coupled(
            probs,
            self._seeds[:rows],
            self.positions[:rows],
            self._top_ks[:rows],
            self._top_ps[:rows],
            self._min_ps[:rows],
        )
        self._drafted[:rows].index_copy_(1, step + 1, drawn[:, None])
        step.add_(1).remainder_(self._most)  # so that timed replays stay in bounds
        return output, None
