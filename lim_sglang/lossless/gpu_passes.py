"""The forward passes of a cycle on a GPU, each a CUDA graph.

A draft is a step of B rows whose layers all attend to lists: one graph a batch size serves all
drafts of a cycle, and draws them. A verification has w rows a request, which attend to its tokens
together: a graph for each batch size and w. Neither is planned. A verification of one token is
SGLang's dense decode step, in SGLang's plan.

Shapes: B requests, w tokens of each, R rows of a pass, S SELECT layers, K budget, N drafts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lim_sglang.audit import Audit, AuditedStep
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.lossless import internals
from lim_sglang.lossless.gpu_backends import DraftBackend, DraftMemory, RunMemory, VerifyBackend
from lim_sglang.lossless.passes import CycleRows, Passes
from lim_sglang.lossless.row_pass import DraftLoop, RowPass
from lim_sglang.lossless.sampling import RunSampling
from lim_sglang.lossless.widths import PassTimes, StepTimes

logger = logging.getLogger(__name__)

TIMED_TOKENS = 1 << 18
"""Tokens of all requests of the pass by which dense attention is timed."""


class GpuPasses(Passes):
    """Passes that call the model themselves, each with the backend that it needs."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._memory: DraftMemory = runner.lim_draft_memory
        widths = [number + 1 for number in self.choices if number]
        self._runs = RunMemory.allocate(
            self.backend, self._memory.max_rows, widths[-1], self.req_to_token.shape[1]
        )
        self._verifications = {
            width: RowPass(
                runner,
                VerifyBackend(self.backend, self._runs, width),
                self._memory.max_rows * width,
            )
            for width in widths
        }
        self._queries: Tensor | None = None
        """[rows, S, H, D], of the last verification."""
        self._audit: Audit | None = runner.lim_audit
        drafts = DraftBackend(self.backend, self._memory, self.policy)
        self._draft = DraftLoop(runner, drafts, self._memory, self.choices[-1])
        self._dense = RowPass(runner, self.backend, runner.req_to_token_pool.size)

    @property
    def max_drafted(self) -> int:
        """Requests of the largest batch that drafts."""
        return self._memory.max_rows

    def needs_exact_lengths(self, width: int) -> bool:
        """Return True for SGLang's dense step, which is planned by lengths, and for an audit."""
        return width == 1 or self._audit is not None

    def capture(self) -> None:
        """Capture drafts, and dense steps of one token, at the batch sizes of SGLang's graphs."""
        sizes = internals.graph_batch_sizes(self.runner)
        if not sizes:
            return
        most = max(sizes)
        self.backend.init_cuda_graph_state(most, most)
        vocab = self.runner.model_config.vocab_size
        drafted = {min(size, self.max_drafted) for size in sizes}
        rows = max(most, max(drafted) * (1 + self.choices[-1]))
        logits = torch.zeros(rows, vocab, dtype=torch.float32, device=self.runner.device)
        logger.info("LessIsMore: capturing dense steps of %s and drafts up to %d", sizes, most)
        with internals.graph_capture():
            self._dense.capture(sizes, logits)
            self._draft.capture(drafted, logits)
            for width, verification in self._verifications.items():
                verification.capture([size * width for size in drafted], logits)
        if len(self.choices) > 1:
            self.times = self._time_passes()
            logger.info("LessIsMore: passes took %s", self.times)

    def _time_passes(self) -> PassTimes:
        """Time the captured passes, before any request comes.

        Lists of drafts, and the tokens of long contexts, are spread over the KV cache; K and V are
        not written but in slot 0, which no request has.
        """
        lists, layers = self._memory.lists, len(self.backend.roles)
        lists.copy_(self._spread(lists.shape))
        self._draft.kept_ends.copy_(self._memory.starts[:-1] + self.policy.budget)
        draft = self._draft.time_graphs()
        dense = {1: self._time_dense(self._dense, 1, self._write_table)}
        for width, verification in self._verifications.items():
            dense[width] = self._time_dense(verification, width, self._write_runs)
        self._runs.indptr.zero_()
        return PassTimes(draft, dense, layers, len(self.select))

    def _time_dense(
        self, timed: RowPass, width: int, write_contexts: Callable[[int, int], None]
    ) -> StepTimes:
        """Time a dense pass without contexts, and that of most requests with long ones.

        Args:
            write_contexts: gives as many requests contexts of as many tokens.
        """
        write_contexts(timed.max_rows // width, 1)
        short = timed.time_graphs(rows_of_request=width)
        requests = short.rows[-1]
        length = max(2, min(self._longest(requests), TIMED_TOKENS // requests))
        write_contexts(requests, length)
        more = timed.time_graph(requests * width) - short.ms[-1]
        return replace(short, token_ms=max(0.0, more) / (requests * (length - 1)))

    def _longest(self, requests: int) -> int:
        """Return the tokens of a context that as many requests can have at once."""
        return min(self.req_to_token.shape[1], self.runner.max_total_num_tokens // requests)

    def _write_table(self, requests: int, length: int) -> None:
        """Give the first requests contexts for dense steps: rows of `req_to_token`."""
        dense, table = self._dense, self.req_to_token
        table[:requests, :length] = self._spread((requests, length))
        dense.requests[:requests] = torch.arange(requests, device=table.device)
        dense.lengths[:requests], dense.host_lengths[:requests] = length, length

    def _write_runs(self, requests: int, length: int) -> None:
        """Give the first requests contexts for verifications, and the others none."""
        runs = self._runs
        runs.slots[: requests * length] = self._spread((requests * length,))
        runs.indptr.fill_(requests * length)
        runs.indptr[:requests] = length * torch.arange(requests, device=runs.indptr.device)

    def _spread(self, shape: Sequence[int]) -> Tensor:
        """Return slots from anywhere in the KV cache."""
        device = self.req_to_token.device
        return torch.randint(1, self.runner.max_total_num_tokens, shape, device=device)

    def begin(self, rows: CycleRows, queries: Tensor | None) -> None:
        """Write the lists of the drafts, and the slots that their verification reads."""
        self.rows = rows
        if queries is None:
            return
        lengths, indptr = rows.lengths + rows.width, self._runs.indptr
        count = len(lengths)
        indptr[1 : count + 1] = lengths.cumsum(0)
        indptr[count + 1 :] = indptr[count]
        self._gather_into(lengths, indptr, self._runs.slots)
        self._select_lists(*self._gather(rows.lengths, int(rows.host_lengths.sum())), queries)

    def draft(self, newest: Tensor, sampling: RunSampling) -> Tensor:
        """Draft in a graph, if there is one."""
        if self.rows.width == 1 or self._draft.size_for(len(newest)) is None:
            return super().draft(newest, sampling)
        return self._draft.draft(self.rows, newest, sampling.info)

    def draft_step(self, tokens: Tensor, step: int) -> Tensor:
        """Run all layers over the lists, of which a draft reads one token more than the last."""
        rows, count = self.rows, len(tokens)
        self._draft.set_inputs(tokens, rows.positions[:, step], rows.slots[:, step])
        self._memory.ends[:count] += 1
        output, _ = self._draft.run(count)
        logits: Tensor = output.next_token_logits
        return logits

    def verify(self, tokens: Tensor) -> Any:
        """Run a dense pass: one row a request as SGLang does, or w rows a request."""
        rows = self.rows
        inputs = [each.flatten() for each in (tokens, rows.positions, rows.slots)]
        if rows.width == 1:
            verification = self._dense
            inputs += [rows.requests, rows.lengths + 1]
            verification.set_host_lengths(rows.host_lengths + 1)
        else:
            verification = self._verifications[rows.width]
        verification.set_inputs(*inputs)
        output, self._queries = verification.run(
            tokens.numel(),
            with_hidden_states=any(each.return_hidden_states for each in rows.batch.reqs),
        )
        return output

    def queries_of(self, rows: Tensor) -> Tensor:
        """Return the queries of the last verification's rows."""
        assert self._queries is not None
        return self._queries[rows]

    def _gather(self, lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return where the tokens of each request begin, [B + 1] int32, and the slots of all.

        Args:
            lengths: [B] int64, tokens of each request.
            total: their sum, or more.
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
