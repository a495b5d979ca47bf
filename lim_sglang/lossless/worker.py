"""One decode cycle: draft tokens with a set, verify them all at once, keep the run that stands.

Of a request L tokens have keys and values; its newest token is at position L and has none yet. A
cycle of width w drafts w - 1 tokens behind it. Drafts and verification write the keys and values of
positions L to L + w - 1 into the same slots, verification last, so that what stands is the dense
model's; what does not stand is written over by the next cycle. The sets of a cycle come from the
query of position L - 1, which the pass before has kept.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.audit import Trace
from lim_sglang.kernels.reference_sampling import count_accepted
from lim_sglang.lossless.sampling import RunSampling
from lim_sglang.policies.policy import LayerInputs


class DraftInput(compat.SpecInput):
    """State of a batch between two cycles: none, since all of it is kept by request
    (`LosslessWorker`)."""

    def __init__(self) -> None:
        # A draft's state, which no forward pass is given: `_forward` takes it off the batch.
        super().__init__(compat.SpecInputType.EAGLE_DRAFT)

    def filter_batch(
        self,
        new_indices: Tensor,
        has_been_filtered: bool = True,
        new_indices_cpu: list[int] | None = None,
    ) -> None:
        """Do nothing."""

    def merge_batch(self, spec_info: Any) -> None:
        """Do nothing."""


class TargetAsDraft:
    """The served model in the place of a draft model, for parts of SGLang that ask for its pool."""

    def __init__(self, runner: Any) -> None:
        self.draft_runner = runner
        self.draft_runners: tuple[Any, ...] = ()
        """None of its own: weights are updated once."""


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
        self._trace = Trace.from_environment()
        self._newest: dict[int, int] = {}
        """The newest token of a request, by its index in SGLang's pool."""
        self._queries: dict[int, Tensor] = {}
        """By the same index, the SELECT layers' queries of position L - 1: [layers, H, D]."""
        # A verification has w rows of each request. The process is the server's scheduler alone.
        os.environ[compat.NO_COPY_VAR] = "1"

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
        """Find the parts of the served model that a cycle uses."""
        self._backend = self._runner.attn_backend
        layers = {layer.layer_id: layer for layer in compat.attention_layers(self._runner.model)}
        self._select = [layers[number] for number in self._policy.selecting(len(layers))]

    def init_cuda_graphs(self) -> None:
        """Do nothing: a CPU has none."""

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
        if batch.forward_mode.is_decode():
            return self._run_cycle(batch)
        return self._prefill(batch)

    def _prefill(self, batch: Any) -> Any:
        """Run a prefill densely; keep each request's first token and last query."""
        result = self.target_worker.forward_batch_generation(batch)
        result.next_draft_input = DraftInput()
        result.new_seq_lens = batch.seq_lens.clone()
        if batch.forward_mode.is_idle():
            return result
        result.accept_lens = torch.ones(len(batch.reqs), dtype=torch.int32)
        result.speculative_num_draft_tokens = 1
        if result.next_token_ids is not None:
            last = torch.arange(len(batch.reqs))
            self._keep(batch.req_pool_indices.tolist(), result.next_token_ids.tolist(), last)
        return result

    def _run_cycle(self, batch: Any) -> Any:
        """Draft and verify; return the runs of all requests as SGLang's result."""
        pool, lengths = batch.req_pool_indices, batch.seq_lens
        requests = pool.tolist()
        sampling = RunSampling(batch.reqs, batch.sampling_info, self._runner.sampler)
        width = 1 + self._choose_drafts(lengths.tolist(), sampling)
        positions = lengths[:, None] + torch.arange(width)  # [B, w]
        slots = self.req_to_token_pool.req_to_token[pool[:, None], positions].long()
        tokens = torch.empty_like(positions)
        tokens[:, 0] = torch.tensor([self._newest[request] for request in requests])
        if width > 1:
            lists = self._select_lists(batch, requests)
            for step in range(width - 1):
                for of_layer in lists:
                    of_layer[:] = map(torch.cat, zip(of_layer, slots[:, step, None], strict=True))
                with self._backend.drafting(lists):
                    row = slice(step, step + 1)
                    drafted = self._forward(batch, tokens[:, row], positions[:, row], slots[:, row])
                logits = drafted.next_token_logits
                tokens[:, step + 1] = sampling.draft(logits, positions[:, step], step)
        verified = self._forward(batch, tokens, positions, slots)
        logits = verified.next_token_logits.unflatten(0, tokens.shape)
        picks = sampling.verify(logits, positions)
        accepted = count_accepted(tokens[:, 1:], picks)
        accepted[list(sampling.capped)] = 1
        last = torch.arange(len(requests)) * width + accepted - 1
        self._keep(requests, picks.flatten()[last].tolist(), last)
        self._count(lengths, width, accepted, sampling)
        if batch.return_logprob:
            compat.run_logprobs(batch, verified, picks)
        return compat.GenerationBatchResult(
            logits_output=verified,
            next_token_ids=picks.flatten(),
            accept_lens=accepted.int(),
            new_seq_lens=lengths + accepted,
            next_draft_input=DraftInput(),
            speculative_num_draft_tokens=width,
        )

    def _choose_drafts(self, lengths: Sequence[int], sampling: RunSampling) -> int:
        """Return how many tokens this cycle drafts: none where none can be gained."""
        if max(lengths) <= self._policy.budget:
            self._stats.count_undrafted("short")
        elif len(sampling.capped) == len(lengths):
            self._stats.count_undrafted("capped")
        else:
            return int(self._policy.num_drafts)
        return 0

    def _select_lists(self, batch: Any, requests: Sequence[int]) -> list[list[Tensor]]:
        """Return for each SELECT layer the slots that each request's drafts read, those of drafts
        left out: [n] int64."""
        lists: list[list[Tensor]] = [[] for _ in self._select]
        table = self.req_to_token_pool.req_to_token
        rows = zip(requests, batch.seq_lens.tolist(), batch.reqs, strict=True)
        for request, length, asked in rows:
            slots = table[request, :length].long()
            for index, (layer, of_layer) in enumerate(zip(self._select, lists, strict=True)):
                if length <= self._policy.budget:
                    of_layer.append(slots)
                    continue
                keys = self._runner.token_to_kv_pool.get_key_buffer(layer.layer_id)[slots]
                query = self._queries[request][index]
                kept = self._policy.keep(LayerInputs(query, keys, layer.scaling, layer.layer_id))
                of_layer.append(slots[kept[0]])
                if self._trace:
                    self._trace.record(
                        step=self._stats.cycles,
                        rid=asked.rid,
                        layer=layer.layer_id,
                        seq_len=length,
                        kept=kept.tolist(),
                    )
        return lists

    def _forward(self, batch: Any, tokens: Tensor, positions: Tensor, slots: Tensor) -> Any:
        """Run the model over [B, n] tokens, each a row of a decode step.

        Returns:
            SGLang's output; its logits have a row for each token.
        """
        with _fields_kept(batch):
            batch.forward_mode = compat.ForwardMode.DECODE
            batch.spec_info = None
            batch.input_ids = tokens.flatten()
            batch.out_cache_loc = slots.flatten()
            batch.seq_lens = (positions + 1).flatten()
            batch.seq_lens_cpu = batch.orig_seq_lens = batch.seq_lens
            batch.seq_lens_sum = int(batch.seq_lens.sum())
            batch.req_pool_indices = batch.req_pool_indices.repeat_interleave(tokens.shape[1])
            forward_batch = compat.ForwardBatch.init_new(
                batch, self._runner, return_hidden_states_before_norm=False
            )
            return self._runner.forward_uncounted(forward_batch).logits_output

    def _keep(self, requests: Sequence[int], newest: Sequence[int], rows: Tensor) -> None:
        """Keep each request's newest token, and the queries of its row of the last dense pass."""
        by_layer = [self._backend.queries[layer.layer_id][rows] for layer in self._select]
        queries = torch.stack(by_layer, 1)  # [B, layers, H, D]
        self._newest.update(zip(requests, newest, strict=True))
        self._queries.update(zip(requests, map(torch.clone, queries), strict=True))

    def _count(self, lengths: Tensor, width: int, accepted: Tensor, sampling: RunSampling) -> None:
        self._runner.lim_stats.count_step(lengths.numpy().astype(np.int64) + 1, None)
        self._stats.count_cycle(width, (accepted - 1).tolist(), sampling.capped)


@contextmanager
def _fields_kept(batch: Any) -> Iterator[None]:
    """Put all fields of SGLang's batch back after the block."""
    kept = dict(vars(batch))
    try:
        yield
    finally:
        vars(batch).update(kept)
