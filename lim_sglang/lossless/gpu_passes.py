"""The forward passes of a cycle on a GPU.

A draft is a step of B rows whose layers all attend to lists, through the Triton kernel that plans
nothing: one CUDA graph a batch size serves all drafts. A verification of several tokens runs
without a graph: FlashInfer would plan it for the longest run that the rows of a graph may have, not
for the run that all of them have, and the host launches it long before the drafts have ended. A
verification of one token is SGLang's dense decode step, in SGLang's plan and a graph.

Shapes: B requests, w tokens of each, R rows of a pass, S SELECT layers, K budget, N drafts.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.attention_backend import SECOND_READING
from lim_sglang.audit import Audit, AuditedStep
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.coupled_sampling import pick_coupled
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.run_attention import RunWorkspace, attend_runs
from lim_sglang.kernels.selector import Room, ScoreSelector
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens
from lim_sglang.lossless import internals
from lim_sglang.lossless.passes import CycleRows, KeptQueries, Passes, by_head
from lim_sglang.lossless.sampling import RunSampling
from lim_sglang.lossless.widths import PassTimes
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.policy import Role

logger = logging.getLogger(__name__)

MAX_VERIFIED = 432
"""Most rows of a verification that a CUDA graph captures: 48 requests of 9 tokens. Logits take 4
bytes a row and token of the vocabulary."""
MAX_DRAFTED = 48
"""Most requests of a batch that drafts: as many as SGLang's own speculation runs by default."""
TIMED_REPLAYS = 5
TIMED_TOKENS = 1 << 18
"""Tokens of all requests of the step by which dense attention is timed."""


class LosslessGpuBackend(KeptQueries, compat.FlashInferAttnBackend):
    """SGLang's FlashInfer backend, which prefills and runs dense decode steps."""

    score_source = SECOND_READING

    def __init__(self, runner: Any, **options: Any) -> None:
        super().__init__(runner, **options)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.query_layers = runner.lim_drafting.selecting(len(self.roles))
        self.queries: dict[int, Tensor] = {}


class _CycleBackend(compat.AttentionBackend):
    """Attention of decode rows that writes the new keys and values first."""

    def __init__(self, backend: LosslessGpuBackend) -> None:
        super().__init__()
        self.token_to_kv_pool = backend.token_to_kv_pool
        self.req_to_token_pool = backend.req_to_token_pool

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        """Run one layer.

        Args:
            q: [R, H * D], like the result.
            k, v: [R, KV heads * D].
            layer, batch, save_kv_cache: SGLang's.
        """
        pool = self.token_to_kv_pool
        if save_kv_cache:
            location = compat.KVWriteLoc(batch.out_cache_loc, None)
            pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
        return self.attend(by_head(q, layer).contiguous(), layer).view(len(q), -1)

    def attend(self, query: Tensor, layer: Any) -> Tensor:
        """Attend [R, H, D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class DraftMemory:
    """Lists of slots that drafts read, and the selection's memory."""

    selector: ScoreSelector
    lists: Tensor
    """[S, rows * (K + N)] int32, each row's kept slots and those of its drafts."""
    starts: Tensor
    """[rows + 1] int32, where the lists of each row begin."""
    ends: Tensor
    """[rows] int32, where the lists of each row end, for the draft that runs."""
    longest: int
    """Slots of a row's list at most, K + N."""

    @classmethod
    def allocate(
        cls,
        policy: Lossless,
        most_drafts: int,
        depth: int,
        room: Callable[[int], Room],
        max_requests: int,
    ) -> "DraftMemory":
        """Allocate for batches that draft.

        Args:
            most_drafts: of a cycle.
            depth: layers of the model.
            room: returns the selection's room, given the most rows.
            max_requests: that SGLang runs at once.
        """
        rows = min(MAX_DRAFTED, max_requests)
        selector = policy.allocate(room(rows))
        assert isinstance(selector, ScoreSelector)
        length = policy.budget + most_drafts
        device = selector.scores.values.device
        lists = torch.zeros(
            len(policy.selecting(depth)), rows * length, dtype=torch.int32, device=device
        )
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return cls(selector, lists, starts, starts[:-1].clone(), length)

    @property
    def max_rows(self) -> int:
        """Most requests of a batch that drafts."""
        return len(self.ends)


class DraftBackend(_CycleBackend):
    """Every layer of a draft reads its list."""

    queries: Mapping[int, Tensor] = MappingProxyType({})
    """None are kept."""

    def __init__(self, backend: LosslessGpuBackend, memory: DraftMemory, policy: Lossless) -> None:
        super().__init__(backend)
        shape = backend.indices_updater_decode
        self._memory = memory
        self._list_of_layer = policy.list_of_layer(len(backend.roles))
        self._workspace = SplitWorkspace.allocate(
            num_heads=shape.num_qo_heads,
            num_units=shape.num_kv_heads,
            dim=shape.head_dim,
            cache_dtype=shape.data_type,
            device=memory.lists.device,
        )

    def attend(self, query: Tensor, layer: Any) -> Tensor:
        """Attend over the kept tokens and the drafts so far."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        memory, rows = self._memory, len(query)
        return attend_tokens(
            query,
            keys,
            values,
            memory.lists[self._list_of_layer[layer.layer_id]],
            memory.starts[:rows],
            memory.ends[:rows],
            longest=memory.longest,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            workspace=self._workspace,
            out=torch.empty_like(query),
        )


@dataclass(frozen=True)
class RunMemory:
    """Slots of all tokens that a verification reads, and the kernel's memory."""

    slots: Tensor
    """[most tokens] int32, one request behind the other."""
    indptr: Tensor
    """[rows + 1] int32, where each request's begin; behind the last they stay where they are."""
    workspace: RunWorkspace

    @classmethod
    def allocate(
        cls, backend: LosslessGpuBackend, max_rows: int, max_width: int, tokens: int
    ) -> "RunMemory":
        """Allocate for batches that draft.

        Args:
            max_rows: requests.
            max_width: tokens of a run.
            tokens: of all requests together, without their runs.
        """
        shape, device = backend.indices_updater_decode, backend.kv_last_page_len.device
        return cls(
            torch.zeros(tokens + max_rows * max_width, dtype=torch.int32, device=device),
            torch.zeros(max_rows + 1, dtype=torch.int32, device=device),
            RunWorkspace.allocate(
                num_heads=shape.num_qo_heads,
                num_kv_heads=shape.num_kv_heads,
                dim=shape.head_dim,
                max_width=max_width,
                device=device,
            ),
        )


class VerifyBackend(KeptQueries, _CycleBackend):
    """Dense attention of w rows a request, each over the tokens up to its own."""

    def __init__(self, backend: LosslessGpuBackend, memory: RunMemory, width: int) -> None:
        super().__init__(backend)
        self.query_layers = backend.query_layers
        self.queries: dict[int, Tensor] = {}
        self._memory, self._width = memory, width

    def attend(self, query: Tensor, layer: Any) -> Tensor:
        """Attend; nothing is planned."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        memory = self._memory
        return attend_runs(
            query,
            keys,
            values,
            memory.slots,
            memory.indptr[: len(query) // self._width + 1],
            width=self._width,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            workspace=memory.workspace,
            out=torch.empty_like(query),
        )


class RowPass:
    """A pass over one token of each request, with inputs that stay in place for CUDA graphs."""

    def __init__(self, runner: Any, backend: Any, max_rows: int) -> None:
        """Allocate the inputs.

        Args:
            backend: attention of the pass, which plans each step if it has to.
        """
        self._runner, self.backend = runner, backend
        inputs = torch.zeros(5, max_rows, dtype=torch.int64, device=runner.device)
        self.tokens, self.positions, self.slots, self.requests, self.lengths = inputs
        self.host_lengths = torch.ones(max_rows, dtype=torch.int64)
        self.lengths.fill_(1)
        self._graphs: dict[int, _Graph] = {}

    def set_rows(self, requests: Tensor, lengths: Tensor, host_lengths: Tensor) -> None:
        """Set what all passes of a cycle share; rows that pad a graph write to SGLang's slot 0.

        Args:
            requests, lengths, host_lengths: [B], of the cycle.
        """
        rows = len(requests)
        self.requests[:rows], self.requests[rows:] = requests, 0
        self.lengths[:rows], self.lengths[rows:] = lengths, 1
        self.host_lengths[:rows], self.host_lengths[rows:] = host_lengths, 1
        self.slots[rows:] = 0

    def set_tokens(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Set the inputs of one pass, [B] each."""
        rows = len(tokens)
        self.tokens[:rows] = tokens
        self.positions[:rows] = positions
        self.slots[:rows] = slots

    def run(self, rows: int, *, with_hidden_states: bool = False) -> tuple[Any, dict[int, Tensor]]:
        """Run the pass over the first rows.

        Args:
            with_hidden_states: return the last layer's, too, which graphs do not have.

        Returns:
            SGLang's output, which the next pass overwrites, and the backend's queries.
        """
        size = self.size_for(rows)
        if size is None or with_hidden_states:
            batch = self._batch(rows, with_hidden_states=with_hidden_states)
            self.backend.init_forward_metadata(batch)
            return self._forward(batch), self.backend.queries
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
            graph, output = internals.capture_graph(partial(self._captured, batch))
            self._graphs[size] = _Graph(graph, output, dict(self.backend.queries))

    def time_graphs(self) -> list[tuple[int, float]]:
        """Return the rows of each graph, ascending, and the milliseconds of its pass."""
        return [(size, self.time_graph(size)) for size in sorted(self._graphs)]

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

    def _captured(self, batch: Any) -> Any:
        """Do what a graph captures."""
        return self._forward(batch)

    def _forward(self, batch: Any) -> Any:
        return internals.call_model(self._runner, batch, self.backend)


class DraftLoop(RowPass):
    """Drafts, each a replay of one CUDA graph, which also draws the token and moves on to it.

    Draws heed temperature, filters and seeds; a request's bias and least number of tokens are left
    to verification.
    """

    def __init__(self, runner: Any, backend: DraftBackend, memory: DraftMemory, most: int) -> None:
        """Allocate the inputs.

        Args:
            most: drafts of a cycle.
        """
        rows, device = memory.max_rows, runner.device
        super().__init__(runner, backend, rows)
        self._memory = memory
        self._drafted = torch.zeros(rows, most + 1, dtype=torch.int64, device=device)
        self._slot_table = torch.zeros_like(self._drafted)
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
        self.set_tokens(newest, rows.positions[:, 0], rows.slots[:, 0])
        self._drafted[:count, 0] = newest
        self._slot_table[:count, :width] = rows.slots
        self._temperatures[:count] = info.temperatures
        self._seeds[:count], self._top_ks[:count] = info.sampling_seed, info.top_ks
        self._top_ps[:count], self._min_ps[:count] = info.top_ps, info.min_ps
        self._step.zero_()
        self._memory.ends[:count] += 1
        graph = self._graphs[min(size for size in self._graphs if size >= count)].graph
        for _ in range(width - 1):
            graph.replay()
        return self._drafted[:count, :width].clone()

    def _captured(self, batch: Any) -> Any:
        """Run the model, draw a token of each row, and make it the input of the next draft."""
        output, rows = self._forward(batch), batch.batch_size
        probs = (output.next_token_logits / self._temperatures[:rows]).softmax(-1)
        drawn = pick_coupled(
            probs,
            self._seeds[:rows],
            self.positions[:rows],
            self._top_ks[:rows],
            self._top_ps[:rows],
            self._min_ps[:rows],
        )
        self._step.add_(1)
        self._drafted[:rows].index_copy_(1, self._step, drawn[:, None])
        self.tokens[:rows] = drawn
        self.positions[:rows] += 1
        self.slots[:rows] = self._slot_table[:rows].index_select(1, self._step)[:, 0]
        self._memory.ends[:rows] += 1
        return output


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: Any
    queries: dict[int, Tensor]
    """Those of the rows, in the graph's own memory."""


class GpuPasses(Passes):
    """Passes that call the model themselves, each with the backend that it needs."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._memory: DraftMemory = runner.lim_draft_memory
        widths = [number + 1 for number in self.choices if number]
        self._runs = RunMemory.allocate(
            self.backend, self._memory.max_rows, widths[-1], runner.max_total_num_tokens
        )
        self._verifications = {
            width: RowPass(
                runner,
                VerifyBackend(self.backend, self._runs, width),
                self._memory.max_rows * width,
            )
            for width in widths
        }
        self._queries: dict[int, Tensor] = {}
        self._audit: Audit | None = runner.lim_audit
        drafts = DraftBackend(self.backend, self._memory, self.policy)
        self._draft = DraftLoop(runner, drafts, self._memory, self.choices[-1])
        self._dense = RowPass(runner, self.backend, runner.req_to_token_pool.size)

    @property
    def max_drafted(self) -> int:
        """Requests of the largest batch that drafts."""
        return self._memory.max_rows

    def fits(self, lengths: Sequence[int]) -> bool:
        """Return True unless the requests are many, or share so many tokens that they have more
        together than the KV cache."""
        return (
            len(lengths) <= self.max_drafted
            and sum(lengths) <= self.runner.max_total_num_tokens
        )

    def capture(self) -> None:
        """Capture drafts, and dense steps of one token, at the batch sizes of SGLang's graphs."""
        sizes = internals.graph_batch_sizes(self.runner)
        if not sizes:
            return
        most = max(sizes)
        self.backend.init_cuda_graph_state(most, most)
        vocab, drafted = self.runner.model_config.vocab_size, {
            min(size, self.max_drafted) for size in sizes
        }
        verified = {
            width: [size * width for size in drafted if size * width <= MAX_VERIFIED]
            for width in self._verifications
        }
        rows = max(most, *map(max, verified.values()))
        logits = torch.zeros(rows, vocab, dtype=torch.float32, device=self.runner.device)
        logger.info("LessIsMore: capturing dense steps of %s and drafts up to %d", sizes, most)
        with internals.graph_capture():
            self._dense.capture(sizes, logits)
            self._draft.capture(drafted, logits)
            for width, of_width in verified.items():
                self._verifications[width].capture(of_width, logits)
        if len(self.choices) > 1:
            self.times = self._time_passes()
            logger.info("LessIsMore: passes took %s", self.times)

    def _time_passes(self) -> PassTimes:
        """Time the captured passes, before any request comes.

        Lists of drafts, and the tokens of the longest dense step, are spread over the KV cache; K
        and V are not written but in slot 0, which no request has.
        """
        pool_tokens = self.runner.max_total_num_tokens
        memory, table = self._memory, self.req_to_token
        spread = torch.randint(1, pool_tokens, memory.lists.shape, device=memory.lists.device)
        memory.lists.copy_(spread)
        memory.ends.copy_(memory.starts[:-1] + self.policy.budget)
        draft_rows, draft_ms = zip(*self._draft.time_graphs(), strict=True)
        rows, dense_ms = zip(*self._dense.time_graphs(), strict=True)
        most = rows[-1]
        length = max(2, min(table.shape[1], pool_tokens // most, TIMED_TOKENS // most))
        written = table[:most, :length].clone()
        table[:most, :length] = torch.randint(1, pool_tokens, written.shape, device=table.device)
        self._dense.requests[:most] = torch.arange(most, device=table.device)
        self._dense.lengths[:most], self._dense.host_lengths[:most] = length, length
        long_ms = self._dense.time_graph(most)
        table[:most, :length] = written
        token_ms = max(0.0, long_ms - dense_ms[-1]) / (most * (length - 1))
        layers = len(self.backend.roles)
        return PassTimes(rows, dense_ms, draft_rows, draft_ms, token_ms, layers, len(self.select))

    def begin(self, rows: CycleRows, queries: Tensor | None) -> None:
        """Plan the verification and write the lists of the drafts."""
        self.rows = rows
        host_lengths = rows.host_lengths.tolist()
        if queries is None:
            lengths, host = rows.lengths + 1, rows.host_lengths + 1
            self._dense.set_rows(rows.requests, lengths, host)
            return
        lengths, indptr = rows.lengths + rows.width, self._runs.indptr
        count = len(lengths)
        indptr[1 : count + 1] = lengths.cumsum(0)
        indptr[count + 1 :] = indptr[count]
        self._gather_into(lengths, indptr, self._runs.slots)
        self._draft.set_rows(rows.requests, rows.lengths, rows.host_lengths)
        self._select_lists(*self._gather(rows.lengths, sum(host_lengths)), queries)

    def draft(self, newest: Tensor, sampling: RunSampling) -> Tensor:
        """Draft in a graph, if there is one."""
        if self.rows.width == 1 or self._draft.size_for(len(newest)) is None:
            return super().draft(newest, sampling)
        return self._draft.draft(self.rows, newest, sampling.info)

    def draft_step(self, tokens: Tensor, step: int) -> Tensor:
        """Run all layers over the lists, of which a draft reads one token more than the last."""
        rows, count = self.rows, len(tokens)
        self._draft.set_tokens(tokens, rows.positions[:, step], rows.slots[:, step])
        self._memory.ends[:count] += 1
        output, _ = self._draft.run(count)
        logits: Tensor = output.next_token_logits
        return logits

    def verify(self, tokens: Tensor) -> Any:
        """Run a dense pass: one row a request as SGLang does, or w rows a request."""
        rows = self.rows
        with_hidden_states = rows.batch.return_hidden_states
        if rows.width == 1:
            self._dense.set_tokens(tokens[:, 0], rows.positions[:, 0], rows.slots[:, 0])
            output, self._queries = self._dense.run(
                len(tokens), with_hidden_states=with_hidden_states
            )
            return output
        verification = self._verifications[rows.width]
        flat = (each.flatten() for each in (tokens, rows.positions, rows.slots))
        verification.set_tokens(*flat)
        verification.slots[tokens.numel() :] = 0  # rows that pad a graph
        output, self._queries = verification.run(
            tokens.numel(), with_hidden_states=with_hidden_states
        )
        return output

    def queries_of(self, rows: Tensor) -> Tensor:
        """Return the queries of the last verification's rows."""
        return self.stack(self._queries, rows)

    def _gather(self, lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return where the tokens of each request begin, [B + 1] int32, and the slots of all.

        Args:
            lengths: [B] int64, tokens of each request.
            total: their sum, which the host knows.
        """
        indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        indptr[1:] = lengths.cumsum(0)
        slots = torch.empty(total, dtype=torch.int32, device=lengths.device)
        self._gather_into(lengths, indptr, slots)
        return indptr, slots

    def _gather_into(self, lengths: Tensor, indptr: Tensor, slots: Tensor) -> None:
        internals.gather_slots(self.req_to_token, self.rows.requests, lengths, indptr, slots)

    def _record(self, audit: Audit, slots: Tensor, scores: Sequence[PackedRows]) -> None:
        """Let the audit check the lists that have just been written.

        Args:
            slots: [tokens of all requests] int32.
            scores: of each SELECT layer.
        """
        lengths, memory = self.rows.host_lengths.tolist(), self._memory
        if not memory.selector.fits(sum(lengths)):
            audit.unchecked_steps += 1
            return
        starts = memory.starts.tolist()
        kept = [
            memory.lists[:, start : start + min(length, self.policy.budget)]
            for start, length in zip(starts, lengths, strict=False)
        ]
        padded = torch.nn.utils.rnn.pad_sequence(slots.split(lengths), batch_first=True)
        audit.record(AuditedStep(tuple(lengths), padded, tuple(scores), torch.cat(kept, 1)))

    def _select_lists(self, indptr: Tensor, slots: Tensor, queries: Tensor) -> None:
        """Write each request's kept slots, and the slots of its drafts behind them."""
        rows, memory = self.rows, self._memory
        count, drafts = len(rows.requests), rows.width - 1
        selector = memory.selector.for_rows(rows.host_lengths)
        starts = memory.starts[: count + 1]
        scores = []
        for index, layer in enumerate(self.select):
            selector.select(
                queries[:, index],
                self.runner.token_to_kv_pool.get_key_buffer(layer.layer_id),
                StepSlots(indptr, slots, starts, memory.lists[index]),
                scale=layer.scaling,
            )
            if self._audit:
                scores.append(selector.deciding_scores.used(indptr.tolist()))
        if self._audit:
            self._record(self._audit, slots, scores)
        ends = starts[:count] + rows.lengths.clamp(max=self.policy.budget)
        memory.ends[:count] = ends
        memory.ends[count:] = memory.starts[count:-1]  # rows that pad a graph read nothing
        behind = ends[:, None] + torch.arange(drafts, device=ends.device)
        memory.lists[:, behind.flatten()] = rows.slots[:, :drafts].flatten().int()
