"""One decode cycle: draft tokens with a set, verify them all at once, keep the run that stands.

Of a request L tokens have keys and values; its newest token is at position L and has none yet. A
cycle of width w drafts w - 1 tokens behind it. Drafts and verification write the keys and values of
positions L to L + w - 1 into the same slots, verification last, so that what stands is the dense
model's; what does not stand is written over by the next cycle. The sets of a cycle come from the
query of position L - 1, which the pass before has kept.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.kernels.reference_sampling import count_accepted
from lim_sglang.lossless import internals
from lim_sglang.lossless.passes import CycleRows, LaunchedCycle, Passes, host_lengths
from lim_sglang.lossless.sampling import RunSampling
from lim_sglang.lossless.widths import Cycle, GivenWidth, Widths, WidthsByCost
from lim_sglang.policies.lossless import CPU_DRAFT_TOKENS


class DraftInput(compat.SpecInput):
    """State of a batch between two cycles, for SGLang's relay: the rows of `req_to_token` by which
    it finds lengths, and newest tokens. `LosslessWorker` keeps all that a cycle needs by the same
    rows."""

    topk_p = topk_index = hidden_states = dsa_topk_indices = None
    future_dsa_topk_indices_available = False

    def __init__(self, newest: Tensor) -> None:
        """Begin without rows, which SGLang sets if it overlaps.

        Args:
            newest: [B], of each request.
        """
        # A draft's state, which no forward pass is given.
        super().__init__(compat.SpecInputType.EAGLE_DRAFT)
        self.bonus_tokens = newest
        self.future_indices: Tensor | None = None

    def filter_batch(
        self,
        new_indices: Tensor,
        has_been_filtered: bool = True,
        new_indices_cpu: list[int] | None = None,
    ) -> None:
        """Keep some requests' rows."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]

    def merge_batch(self, spec_info: Any) -> None:
        """Add another batch's rows."""
        if self.future_indices is not None:
            self.future_indices = torch.cat([self.future_indices, spec_info.future_indices])


class TargetAsDraft:
    """The served model in the place of a draft model, for parts of SGLang that ask for its pool."""

    def __init__(self, runner: Any) -> None:
        self.draft_runner = runner
        self.draft_runners: tuple[Any, ...] = ()
        """None of its own: weights are updated once."""


@dataclass(frozen=True)
class _Launched(LaunchedCycle):
    """A cycle whose accepted tokens are not known on the host yet."""

    lengths: Tensor
    """[B] on the host, before the cycle; there once the cycle has ended."""
    capped: Mapping[int, str]
    follows_cycle: bool
    """False where a prefill ran before it."""


class LosslessWorker(compat.BaseSpecWorker):
    """SGLang's worker of a decode batch, by cycles. Shapes: B requests, w tokens a cycle."""

    def __init__(
        self, server_args: Any, gpu_id: int, ps: Any, nccl_port: int, target_worker: Any
    ) -> None:
        self._target_worker = target_worker
        self._runner = target_worker.model_runner
        self._draft_worker = TargetAsDraft(self._runner)
        self._policy = self._runner.lim_drafting
        self._stats = self._runner.lim_stats.drafting
        self._launched: deque[_Launched] = deque()
        self._follows_cycle = False
        self._last_end = 0.0
        """Time at which the cycle that was counted last had ended, in seconds."""

    def alloc_memory_pool(
        self,
        memory_pool_config: Any = None,
        req_to_token_pool: Any = None,
        token_to_kv_pool_allocator: Any = None,
    ) -> None:
        """Take the pools of the served model; drafts have none of their own."""
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator

    def init_attention_backends(self) -> None:
        """Find the parts of the served model that a cycle uses; allocate what is kept between two.

        All of it is kept by a request's row of `req_to_token`, so that filtered, merged and
        retracted batches need no code.
        """
        self._passes = _passes(self._runner)
        device, rows = self._runner.device, len(self.req_to_token_pool.req_to_token)
        self._newest = torch.zeros(rows, dtype=torch.int64, device=device)
        """[rows], the newest token of a request."""
        shape = rows, *self._passes.query_shape
        self._queries = torch.zeros(shape, dtype=self._runner.dtype, device=device)
        """[rows, SELECT layers, H, D], of position L - 1."""
        self._numbers = torch.arange(rows, device=device)
        self._ones = torch.ones_like(self._numbers)

    def init_cuda_graphs(self) -> None:
        """Capture the passes of a cycle; from now on it is known how many tokens may be drafted."""
        self._passes.capture()
        self._widths = _widths(self._passes)

    def update_weights_from_disk(self, recv_req: Any) -> Any:
        """Update the served model's weights."""
        return self.target_worker.update_weights_from_disk(recv_req)

    def update_weights_from_ipc(self, recv_req: Any) -> Any:
        """Update the served model's weights."""
        return self.target_worker.update_weights_from_ipc(recv_req)

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        """Update the served model's weights."""
        return self.target_worker.update_weights_from_tensor(recv_req)

    def forward_batch_generation(self, batch: Any, on_publish: Any = None) -> Any:
        """Run a prefill, or one cycle of a decode batch."""
        is_cycle = batch.forward_mode.is_decode()
        result = self._run_cycle(batch) if is_cycle else self._prefill(batch)
        self._follows_cycle = is_cycle
        if on_publish is not None:  # the host may prepare the next cycle
            on_publish(result.new_seq_lens)
        return result

    def _prefill(self, batch: Any) -> Any:
        """Run a prefill densely; keep each request's first token and last query."""
        result = self.target_worker.forward_batch_generation(batch)
        result.new_seq_lens = batch.seq_lens.clone()
        result.next_draft_input = DraftInput(result.next_token_ids)
        if batch.forward_mode.is_idle():
            return result
        result.accept_lens = torch.ones(len(batch.reqs), dtype=torch.int32)
        result.speculative_num_draft_tokens = 1
        if result.next_token_ids is not None:
            each = torch.arange(len(batch.reqs), device=batch.seq_lens.device)
            queries = self._passes.prefill_queries(each)
            self._keep(batch.req_pool_indices, result.next_token_ids, queries)
        return result

    def _run_cycle(self, batch: Any) -> Any:
        """Draft and verify; return the runs of all requests as SGLang's result."""
        sampling = RunSampling(batch.reqs, batch.sampling_info, self._runner.sampler)
        lengths, is_exact = host_lengths(batch, self._launched)
        width = 1 + self._choose_drafts(lengths.tolist(), sampling)
        if not is_exact and self._passes.needs_exact_lengths(width):
            lengths = batch.seq_lens.cpu()  # waits for the cycle before
        rows = CycleRows.of(batch, width, lengths, self.req_to_token_pool.req_to_token)
        self._passes.begin(rows, self._queries[rows.requests] if width > 1 else None)
        tokens = self._passes.draft(self._newest[rows.requests], sampling)
        verified = self._passes.verify(tokens)
        logits = verified.next_token_logits.unflatten(0, tokens.shape)
        picks = sampling.verify(logits, rows.positions)
        accepted, last = self._runs(tokens, picks, sampling)
        newest = picks.flatten()[last]
        self._keep(rows.requests, newest, self._passes.queries_of(last))
        self._launched.append(
            _Launched(
                frozenset(map(id, batch.reqs)),
                width,
                rows.lengths.to("cpu", non_blocking=True),
                sampling.capped,
                self._follows_cycle,
            )
        )
        if batch.return_logprob:
            internals.run_logprobs(batch, verified, picks)
        return compat.GenerationBatchResult(
            logits_output=verified,
            next_token_ids=picks.flatten(),
            accept_lens=accepted.int(),
            new_seq_lens=rows.lengths + accepted,
            next_draft_input=DraftInput(newest),
            speculative_num_draft_tokens=width,
        )

    def _runs(self, tokens: Tensor, picks: Tensor, sampling: RunSampling) -> tuple[Tensor, Tensor]:
        """Return how many tokens of each request stand, and the verified row of the last: [B].

        A run of one token launches nothing: where dense steps are short, launches are what they
        wait for.

        Args:
            tokens: [B, w], the newest token and the drafts behind it.
            picks: [B, w], the verified token after each.
        """
        count, width = tokens.shape
        numbers = self._numbers[:count]
        if width == 1:
            return self._ones[:count], numbers
        accepted = sampling.cap(count_accepted(tokens[:, 1:], picks))
        return accepted, numbers * width + accepted - 1

    def _choose_drafts(self, lengths: Sequence[int], sampling: RunSampling) -> int:
        """Return how many tokens this cycle drafts: none where none can be gained.

        Args:
            lengths: tokens of each request, or more.
        """
        if max(lengths) <= self._policy.budget:
            self._stats.count_undrafted("short")
        elif len(sampling.capped) == len(lengths):
            self._stats.count_undrafted("capped")
        elif len(lengths) > self._passes.max_drafted:
            self._stats.count_undrafted("large_batch")
        elif drafts := self._widths.choose(lengths):
            return drafts
        else:
            self._stats.count_undrafted("cost")
        return 0

    def _keep(self, requests: Tensor, newest: Tensor, queries: Tensor) -> None:
        """Keep the newest token of each request, [B], and the queries of the token before."""
        self._newest.index_copy_(0, requests, newest.long())
        self._queries.index_copy_(0, requests, queries)

    def on_verify_complete_cpu(self, accepted: list[int], batch_size: int = 0) -> None:
        """Count the oldest cycle that is not counted, now that the host knows its runs.

        Args:
            accepted: drafts accepted of each request.
            batch_size: SGLang's.
        """
        cycle = self._launched.popleft()
        self._runner.lim_stats.count_step(cycle.lengths.numpy().astype(np.int64) + 1, None)
        self._stats.count_cycle(cycle.width, accepted, cycle.capped)
        free = [count for row, count in enumerate(accepted) if row not in cycle.capped]
        begin, self._last_end = self._last_end, perf_counter()
        ms = 1000 * (self._last_end - begin) if cycle.follows_cycle else None
        self._widths.saw(Cycle(cycle.lengths.tolist(), cycle.width - 1, free, ms))


def _widths(passes: Passes) -> Widths:
    """Return the choice of drafts; without times, that of a CPU where several may be drafted."""
    if passes.times:
        return WidthsByCost(passes.choices, passes.times)
    return GivenWidth(min(passes.choices[-1], max(CPU_DRAFT_TOKENS, passes.choices[0])))


def _passes(runner: Any) -> Passes:
    """Return the passes for the device that serves."""
    if compat.serves_on_cpu():
        from lim_sglang.lossless.cpu_passes import CpuPasses

        return CpuPasses(runner)
    from lim_sglang.lossless.gpu_passes import GpuPasses

    return GpuPasses(runner)
