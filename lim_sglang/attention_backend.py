"""Sparse decode on a GPU, layer by layer.

`LimAttnBackend.forward_decode` acts by a layer's role. FULL and SELECT layers are SGLang's own
dense decode, through FlashInfer. A SELECT layer then writes each row's kept slots, and REUSE layers
attend to those and no others: `SparseDecodeWrapper` takes the place of FlashInfer's wrapper. A PICK
layer writes its kept slots from summaries of the keys, once the new key is in the cache, and
attends to them: `PickingWrapper`. A row's length decides how many tokens it keeps, so the start of
each row's slots follows from the lengths that a step begins with: nothing else is planned, and
nothing here waits for the device.

Which tokens are kept is the policy's matter (`lim_sglang/policies/`); its selector writes them.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lim_sglang.audit import BEGINNING, Audit, LayerObserver, ObservedRow
from lim_sglang.compat import (
    TENSOR_CORE_VAR,
    DecodeMetadata,
    FlashInferAttnBackend,
    decode_on_tensor_cores,
    flashinfer_version,
)
from lim_sglang.environment import installed_version
from lim_sglang.errors import ServerError
from lim_sglang.kernels.compact import StepSlots, count_kept
from lim_sglang.kernels.page_selector import PageSelector
from lim_sglang.kernels.scores import FP8_DTYPES, QUERY_DTYPES, ScoreStoringAttention
from lim_sglang.kernels.selector import ScoreSelector, Selector, WindowSelector
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens
from lim_sglang.kernels.verify import self_test_batch, self_test_differences
from lim_sglang.policies.policy import (
    SPARSE,
    LayerInputs,
    Role,
    SparsePolicy,
    choosing_layers,
    window_layer,
)

logger = logging.getLogger(__name__)

KvCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, [P, G, D] each."""

DENSE_PASS, SECOND_READING = "the dense pass", "a second reading of K"
"""Sources of a SELECT layer's scores."""


class DecodeWrapper(ABC):
    """A stand-in for FlashInfer's decode wrapper in SGLang's `forward_decode`."""

    def forward(
        self,
        query: Tensor,
        kv_cache: KvCache,
        *,
        sm_scale: float,
        logits_soft_cap: float | None,
        k_scale: float | None,
        v_scale: float | None,
    ) -> Tensor:
        """Attend [B, H, D]; a CUDA graph may capture it."""
        scale = sm_scale * (k_scale or 1.0)
        return self.attend(query, kv_cache, scale, logits_soft_cap or 0.0, v_scale or 1.0)

    @abstractmethod
    def attend(
        self, query: Tensor, kv_cache: KvCache, scale: float, soft_cap: float, value_scale: float
    ) -> Tensor:
        """Attend with factors on q·k and on the values; a soft-cap of 0 is none."""


class SparseDecodeWrapper(DecodeWrapper):
    """Attention of a REUSE or PICK layer over the kept slots.

    Shapes: R rows at most, K budget; B rows of the step; H query heads, D head_dim.
    """

    def __init__(self, backend: Any, kept_slots: Tensor, policy: SparsePolicy) -> None:
        """Allocate the memory of any step.

        Args:
            backend: the `FlashInferAttnBackend` whose layers are attended.
            kept_slots: [>= R * K] int32, or a row of these for each list; sparse layers read what
                is written here.
            policy: its budget and block decide how many tokens a row keeps.

        Raises:
            ServerError: `kept_slots` is too small for the rows that SGLang runs at once.
        """
        budget = policy.budget
        max_rows: int = backend.kv_last_page_len.shape[0]  # one a request
        if kept_slots.shape[-1] < max_rows * budget:
            raise ServerError(
                f"SGLang runs {max_rows} requests at once, more than LessIsMore has memory for: "
                f"set --max-running-requests {kept_slots.shape[-1] // budget} or less"
            )
        shape = backend.indices_updater_decode
        self.kept_slots = kept_slots
        self.budget = budget
        self._block = policy.block
        self._indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=kept_slots.device)
        self._workspace = SplitWorkspace.allocate(
            num_heads=shape.num_qo_heads,
            num_units=kept_slots.shape[0] if kept_slots.ndim == 2 else shape.num_kv_heads,
            dim=shape.head_dim,
            cache_dtype=shape.data_type,
            device=kept_slots.device,
        )
        self.kept_indptr = self._indptr
        """[B + 1] int32, the start of each row's slots in the step that was begun last."""

    def begin_step(self, seq_lens: Tensor) -> None:
        """Count the tokens that each row keeps, in the order of the stream.

        Args:
            seq_lens: [B] int64 on the device, the newest token included.
        """
        self.kept_indptr = self._indptr[: len(seq_lens) + 1]
        count_kept(seq_lens, self.budget, self.kept_indptr, page=self._block)

    def attend(
        self, query: Tensor, kv_cache: KvCache, scale: float, soft_cap: float, value_scale: float
    ) -> Tensor:
        """Attend over the kept slots."""
        keys, values = kv_cache
        return attend_tokens(
            query,
            keys,
            values,
            self.kept_slots,
            self.kept_indptr[:-1],
            self.kept_indptr[1:],
            longest=self.budget,
            scale=scale,
            soft_cap=soft_cap,
            value_scale=value_scale,
            workspace=self._workspace,
            out=torch.empty_like(query),
        )


@dataclass(frozen=True)
class ScoreStoringWrapper(DecodeWrapper):
    """Dense attention of a SELECT layer that leaves its scores in the selector's memory."""

    attention: ScoreStoringAttention
    planned: Any
    """FlashInfer's wrapper with the plan of this step."""
    selector: ScoreSelector

    def attend(
        self, query: Tensor, kv_cache: KvCache, scale: float, soft_cap: float, value_scale: float
    ) -> Tensor:
        """Attend over the planned slots and store the scores.

        Raises:
            ValueError: a soft-cap, which the kernel does not know.
        """
        if soft_cap:
            raise ValueError("scores are stored without a soft-cap only")
        output = self.attention.run(
            self.planned,
            query,
            kv_cache,
            scale,
            self.selector.scores,
            self.selector.budget,
            self.selector.lse,
        )
        return output if value_scale == 1.0 else output.mul_(value_scale)


@dataclass(frozen=True)
class PickingWrapper(DecodeWrapper):
    """Attention of a PICK layer: writes the kept slots, then attends to them."""

    sparse: SparseDecodeWrapper
    pick: Callable[[Tensor, Tensor], None]
    """Writes each row's kept slots, given the layer's query [B, H, D] and keys [P, G, D]."""

    def attend(
        self, query: Tensor, kv_cache: KvCache, scale: float, soft_cap: float, value_scale: float
    ) -> Tensor:
        """Pick, then attend over the kept slots; SGLang has written the new keys before."""
        self.pick(query, kv_cache[0])
        return self.sparse.attend(query, kv_cache, scale, soft_cap, value_scale)


class LimAttnBackend(FlashInferAttnBackend):
    """SGLang's FlashInfer backend whose decode layers act by their roles.

    The number of slots that each row keeps is counted outside CUDA graphs; the slots are written
    inside them. Positions become slots through the dense indices that FlashInfer's plan gathered,
    never through `req_to_token`, which the scheduler may already be writing for the next step.

    Shapes: B requests, H query heads, G KV heads, D head_dim.
    """

    forward_metadata: Any

    def __init__(self, runner: Any, **options: Any) -> None:
        # On tensor cores a dense layer of few rows takes some microseconds more, but leaves the
        # scores behind; reading K again costs more.
        with decode_on_tensor_cores(wanted=isinstance(runner.lim_selector, ScoreSelector)):
            super().__init__(runner, **options)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.selector: Selector | None = runner.lim_selector
        self.step_selector = self.selector
        """The selector with chunks that the step's rows fit into."""
        self.audit: Audit | None = runner.lim_audit
        self.summaries: Mapping[int, Tensor] = runner.lim_summaries
        """Summaries of the KV cache's blocks, by PICK layer."""
        self.window_layer = window_layer(self.roles)
        self.choosing = choosing_layers(self.roles)
        self.stats = runner.lim_stats
        self.observer: LayerObserver | None = None
        """Sees the layers of eager steps; a step that a CUDA graph replays shows none."""
        if self.selector is not None:
            self.sparse_decode = SparseDecodeWrapper(self, runner.lim_kept_slots, runner.lim_policy)
        self.scoring: ScoreStoringAttention | None = None
        """The attention kernel that stores scores; None if SGLang's decode is another."""
        if isinstance(self.selector, ScoreSelector):
            self._check_width(self.selector.scores.columns)
            self.scoring = self._load_scoring()
            if self.scoring:
                self._test_scoring(self.scoring)
            logger.info("LessIsMore: SELECT layers' scores come from %s", self.score_source)
        if isinstance(self.selector, PageSelector):
            self._check_width(self.selector.page_scores.columns * self.selector.page)

    def _check_width(self, width: int) -> None:
        longest = self.req_to_token_pool.req_to_token.shape[1]
        if longest > width:
            raise ServerError(
                f"a request may have {longest} tokens, and LessIsMore has memory for {width}: "
                "this version of SGLang is not supported"
            )

    @property
    def score_source(self) -> str | None:
        """The source of a SELECT layer's scores; None where none are computed."""
        if not isinstance(self.selector, ScoreSelector):
            return None
        return SECOND_READING if self.scoring is None else DENSE_PASS

    def _load_scoring(self) -> ScoreStoringAttention | None:
        updater = self.indices_updater_decode
        dtype, cache_dtype = updater.q_data_type, updater.data_type
        if not self.decode_use_tensor_cores or dtype not in QUERY_DTYPES:
            return None
        if cache_dtype not in (dtype, *FP8_DTYPES):
            return None
        return ScoreStoringAttention(dtype, cache_dtype, updater.head_dim)

    def _test_scoring(self, scoring: ScoreStoringAttention) -> None:
        """Store the scores of a few random rows as a SELECT layer does, before anything is served.

        Raises:
            ServerError: scores are missing or wrong, so that every kept set would be.
        """
        updater, began_s = self.indices_updater_decode, time.monotonic()
        batch = self_test_batch(
            torch.cuda.get_device_properties().multi_processor_count,
            heads=updater.num_qo_heads,
            kv_heads=updater.num_kv_heads,
            dim=updater.head_dim,
            dtype=updater.q_data_type,
            key_dtype=updater.data_type,
        )
        if wrong := self_test_differences(scoring, batch, self.workspace_buffer):
            raise ServerError(
                "SELECT layers would choose by wrong scores: in a self-test with FlashInfer "
                f"{installed_version('flashinfer-python')} {'; '.join(wrong)}. Install "
                f"flashinfer-python=={flashinfer_version()}, or set {TENSOR_CORE_VAR}=false, by "
                "which scores come from a second reading of K"
            )
        took_ms = 1e3 * (time.monotonic() - began_s)
        logger.info("LessIsMore: a self-test of %.0f ms found all stored scores right", took_ms)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Begin an eager step; the plan is SGLang's dense one."""
        super().init_forward_metadata(forward_batch)
        if self.selector and forward_batch.forward_mode.is_decode() and forward_batch.batch_size:
            self._begin_step(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Begin a step that a CUDA graph captures or replays."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if self.selector and forward_batch.forward_mode.is_decode_or_idle():
            self._begin_step(forward_batch, is_audited=not in_capture)

    def _begin_step(self, forward_batch: Any, *, is_audited: bool = True) -> None:
        rows = forward_batch.batch_size
        if self.selector is not None:
            self.step_selector = self.selector.for_rows(forward_batch.seq_lens_cpu[:rows])
        self.sparse_decode.begin_step(forward_batch.seq_lens[:rows])
        if self.audit and is_audited:
            self.audit.begin_step(forward_batch, self.req_to_token_pool.req_to_token)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *others: Any, **options: Any
    ) -> Tensor:
        """Run one layer of a decode step; the layer's role decides what is read.

        Args:
            q: [B, H * D], like the result.
            k, v: [B, G * D].
            layer: SGLang's attention layer.
            batch: SGLang's batch of the step.
            others, options: passed on to SGLang.
        """
        role = self.roles[layer.layer_id]
        planned = self.forward_metadata
        if layer.layer_id == self.window_layer:
            self._keep_window()
        if role is Role.REUSE:  # SGLang's decode, but over the kept slots
            self.forward_metadata = DecodeMetadata([self.sparse_decode])
        elif role is Role.PICK:
            pick = partial(self._pick, layer, self._step_slots(), batch)
            self.forward_metadata = DecodeMetadata([PickingWrapper(self.sparse_decode, pick)])
        scoring = self._score_storing_wrapper(layer) if role is Role.SELECT else None
        if scoring:
            self.forward_metadata = DecodeMetadata([scoring])
        try:
            output: Tensor = super().forward_decode(q, k, v, layer, batch, *others, **options)
        finally:
            self.forward_metadata = planned
        if role is Role.SELECT:
            self._select(q, layer, is_scored=scoring is not None)
        elif role in SPARSE and self.audit:
            self._audit_attention(self.audit, q, layer, output)
        if self.observer:
            self._show(self.observer, q, layer, batch)
        return output

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *others: Any, **options: Any
    ) -> Tensor:
        """Run one layer of a prefill densely, and summarize the blocks of keys that it completes.

        Args:
            q, k, v, layer, batch, others, options: as for `forward_decode`, of T new tokens.
        """
        output: Tensor = super().forward_extend(q, k, v, layer, batch, *others, **options)
        if layer.layer_id in self.summaries:
            keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            slots = batch.out_cache_loc
            # A prefill graph pads the positions.
            self._summarize(layer.layer_id, keys, batch.positions[: len(slots)] + 1, slots)
        return output

    def _summarize(self, layer: int, keys: Tensor, lengths: Tensor, slots: Tensor) -> None:
        """Summarize the blocks that tokens in these slots complete.

        Args:
            lengths: [T], tokens of the request up to each new one, the new one included.
            slots: [T].
        """
        selector = cast(PageSelector, self.selector)
        selector.summarize(layer, keys, lengths, slots, self.summaries[layer])

    def _pick(self, layer: Any, step: StepSlots, batch: Any, query: Tensor, keys: Tensor) -> None:
        """Write each row's kept slots for the layer that is about to read them."""
        if isinstance(self.selector, ScoreSelector):
            self._select_slots(query, keys, layer, step, is_scored=False)
            return
        rows = len(query)
        self._summarize(layer.layer_id, keys, batch.seq_lens[:rows], batch.out_cache_loc[:rows])
        selector = cast(PageSelector, self.step_selector)
        selector.select(layer.layer_id, query, self.summaries[layer.layer_id], step)
        if self.audit:
            self.audit.note_layer(layer.layer_id)

    def _keep_window(self) -> None:
        """Write the slots that lengths alone decide."""
        cast(WindowSelector, self.selector).keep_slots(self._step_slots())
        if self.audit:
            self.audit.note_layer(BEGINNING)

    def _select(self, q: Tensor, layer: Any, *, is_scored: bool) -> None:
        """Write each row's kept slots from this layer's queries and keys."""
        if self.selector is None:  # no layer above reuses
            return
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        self._select_slots(query, keys, layer, self._step_slots(), is_scored=is_scored)

    def _select_slots(
        self, query: Tensor, keys: Tensor, layer: Any, step: StepSlots, *, is_scored: bool
    ) -> None:
        """Write each row's kept slots by its scores, which the dense pass has stored or which are
        computed here."""
        cast(ScoreSelector, self.step_selector).select(
            query,
            keys,
            step,
            scale=layer.scaling * (layer.k_scale_float or 1.0),
            first_chunk_is_scored=is_scored,
        )
        if self.audit:
            self.audit.note_layer(layer.layer_id)

    def _step_slots(self) -> StepSlots:
        """Return the slots of the dense plan, and where the kept ones are written."""
        dense_wrapper = self.forward_metadata.decode_wrappers[0]
        return StepSlots(
            dense_wrapper._paged_kv_indptr_buf,
            dense_wrapper._paged_kv_indices_buf,
            self.sparse_decode.kept_indptr,
            self.sparse_decode.kept_slots,
        )

    def _score_storing_wrapper(self, layer: Any) -> ScoreStoringWrapper | None:
        """Return the planned decode of a SELECT layer that stores scores; None if it cannot."""
        if self.scoring is None or layer.logit_cap:
            return None
        selector = cast(ScoreSelector, self.step_selector)  # no other has its scores stored
        return ScoreStoringWrapper(self.scoring, self.forward_metadata.decode_wrappers[0], selector)

    def _audit_attention(self, audit: Audit, q: Tensor, layer: Any, output: Tensor) -> None:
        shape = (-1, layer.tp_q_head_num, layer.head_dim)
        audit.note_attention(
            q.view(shape),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            output.view(shape),
            self.sparse_decode.kept_indptr,
            layer,
        )

    def _show(self, observer: LayerObserver, q: Tensor, layer: Any, batch: Any) -> None:
        """Show each row of a layer that has just run to an observer; waits for the device."""
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        scale = layer.scaling * (layer.k_scale_float or 1.0)
        has_kept = self.selector is not None and layer.layer_id >= min(self.choosing)
        for row, length in enumerate(batch.seq_lens_cpu[: len(query)].tolist()):
            request = batch.req_pool_indices[row]
            slots = self.req_to_token_pool.req_to_token[request, :length].long()
            kept = torch.arange(length, device=slots.device)[None]
            if has_kept and length > self.sparse_decode.budget:
                kept = self._kept_positions(row, slots)
            inputs = LayerInputs(query[row], keys[slots], scale, layer.layer_id)
            selects = layer.layer_id in self.choosing
            observer.note_layer(ObservedRow(self.stats.decode_steps, None, inputs, kept, selects))

    def _kept_positions(self, row: int, slots: Tensor) -> Tensor:
        """Return the positions of the slots that a row keeps, [lists, n] int64, ascending.

        Args:
            slots: [S] int64, of all its tokens.
        """
        first, last = self.sparse_decode.kept_indptr[row : row + 2].tolist()
        kept = self.sparse_decode.kept_slots[..., first:last].long()
        ordered, positions = slots.sort()
        return positions[torch.searchsorted(ordered, kept)].sort().values.view(-1, last - first)
