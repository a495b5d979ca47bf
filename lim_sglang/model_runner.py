"""`LimModelRunner`: SGLang's model runner with layer roles, counters and a check of the backend.

A decode step begins here: `forward` counts the step's rows, dense and sparse, and SGLang then calls
`LimAttnBackend` (`attention_backend.py`, or `cpu_backend.py`) layer by layer.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from lim_sglang import __version__, compat
from lim_sglang.audit import BEGINNING, Audit
from lim_sglang.config import (
    BACKEND,
    CHECKED_MARK,
    CONFIG_VAR,
    LAYER_KERNELS_VAR,
    LimConfig,
    Preset,
    find_preset,
    resolve_settings,
    with_preset,
)
from lim_sglang.counters import DraftStats, Stats
from lim_sglang.errors import RefusedError, ServerError
from lim_sglang.kernels.decode_layer import MEASURED_CAPABILITY
from lim_sglang.kernels.selector import Room, Selector
from lim_sglang.layers.attention import AttentionLayers
from lim_sglang.layers.linear import SkinnyLinears
from lim_sglang.lossless.sampler import CoupledSampler
from lim_sglang.lossless.widths import draft_choices, reasons_against_verifying
from lim_sglang.models import weights_fingerprint
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.policy import Role, SparsePolicy, sparse_policy
from lim_sglang.validation import (
    model_shape,
    model_traits,
    reasons_against,
    reasons_against_drafts,
    reasons_against_kv_cache,
    reasons_against_layers,
    reasons_against_model,
    reasons_against_ranks,
    reasons_against_summaries,
)

logger = logging.getLogger(__name__)

MAX_RUNNING_REQUESTS = 4096
"""Requests that SGLang runs at once, at most, if the user sets no limit."""


class LimModelRunner(compat.ModelRunner):
    """A model runner with layer roles: fixed before the model is loaded, and checked afterwards."""

    decode_cuda_graph_runner: Any
    pre_model_load_memory: float
    """GiB that were free before the model was loaded, of which SGLang leaves a share free."""

    def __init__(self, *, model_config: Any, server_args: Any, **rest: Any) -> None:
        if not getattr(server_args, CHECKED_MARK, False):
            raise ServerError(
                f"lim-sglang's checks of options, model and GPU were skipped: SGLang did not call "
                f"the hook on {compat.Target.POST_INIT} that makes them. Install sglang=="
                f"{compat.SGLANG_VERSION}, and make ServerArgs only once plugins are loaded"
            )
        text_config = model_config.hf_text_config
        config = resolve_settings(os.environ.get(CONFIG_VAR), None, {})
        on_cpu = compat.serves_on_cpu()
        reasons = reasons_against(server_args, on_cpu=on_cpu)
        reasons += reasons_against_model(text_config, config)
        reasons += reasons_against_ranks(server_args.tp_size, text_config, config, on_cpu=on_cpu)
        if not on_cpu:
            reasons += reasons_against_summaries(server_args, config)
        if isinstance(config.make_policy(), Lossless):
            reasons += reasons_against_drafts(server_args)
            if not on_cpu:
                reasons += reasons_against_verifying(text_config)
        if reasons:
            raise RefusedError(reasons)
        shape = model_shape(text_config)
        self.lim_config: LimConfig = with_preset(config, shape)
        policy = self.lim_config.make_policy()
        self.lim_roles: tuple[Role, ...] = policy.roles(shape.num_layers)
        self.lim_policy: SparsePolicy | None = sparse_policy(policy, self.lim_roles)
        """None where every layer is dense, so that every row is."""
        if self.lim_policy and self.lim_policy.budget >= model_config.context_len:
            logger.warning(
                "the budget of %d tokens covers the whole context of %d: every layer is dense",
                self.lim_policy.budget,
                model_config.context_len,
            )
            self.lim_roles = (Role.FULL,) * shape.num_layers
            self.lim_policy = None
        self.lim_drafting: Lossless | None = None
        """None where nothing is drafted."""
        if isinstance(policy, Lossless):
            self.lim_drafting = policy
            self.lim_draft_choices = draft_choices(policy, model_config, on_cpu=on_cpu)
        self.lim_stats = Stats(drafting=DraftStats() if self.lim_drafting else None)
        super().__init__(model_config=model_config, server_args=server_args, **rest)
        self.lim_preset: Mapping[str, Any] | None = None
        """The model that the SELECT layers were measured on, and how the served one differs; None
        where the user named the layers, or none selects."""
        selects = self.lim_drafting or Role.SELECT in self.lim_roles
        if selects and config.select_layers is None:
            self.lim_preset = self._compare_with_measured(find_preset(config, shape))

    def _compare_with_measured(self, preset: Preset | None) -> Mapping[str, Any]:
        """Compare the loaded model with the one that its preset was measured on; log differences.

        Args:
            preset: None: no model of this shape was measured.
        """
        layers, differences = self.lim_config.select_layers, ["no model of its shape was measured"]
        if preset:
            traits = model_traits(self.model_config.hf_text_config)
            if preset.fingerprint:
                source = self.model_config.model_path, self.model_config.revision
                traits["fingerprint"] = weights_fingerprint(*source)
            differences = preset.differences(traits)
        if differences:
            logger.warning(
                "SELECT layers %s were not measured for this model (%s%s): find its own by lim "
                "calibrate, or compare it with --lim-policy full before you rely on it",
                layers,
                f"{preset.model} was, and this model has " if preset else "",
                ", ".join(differences),
            )
        return {"measured_on": preset.model if preset else None, "differences": differences}

    def load_model(self) -> None:
        """Load the model, and let its linear layers multiply few rows by our kernel."""
        super().load_model()
        layers = compat.unquantized_linears(self.model) if uses_layer_kernels() else ()
        self.lim_linears = SkinnyLinears(layers)

    @contextmanager
    def sglang_layers(self) -> Iterator[None]:
        """Run layers by SGLang's kernels alone, also in CUDA graphs that the block captures."""
        self.lim_linears.enabled = self.lim_attentions.enabled = False
        try:
            yield
        finally:
            self.lim_linears.enabled = self.lim_attentions.enabled = True

    def alloc_memory_pool(self, *arguments: Any, **options: Any) -> None:
        """Allocate the selection's memory first, so that the KV pool is sized by the rest."""
        self.lim_selector: Selector | None = None
        self.lim_audit: Audit | None = None
        self.lim_summaries: Mapping[int, torch.Tensor] = {}
        self.lim_cos_sin = self.rope_table(self.lim_policy)
        reserved = None
        selecting = self.lim_policy or self.lim_drafting
        if selecting and not compat.serves_on_cpu():
            capability = torch.cuda.get_device_capability()
            reasons = reasons_against_kv_cache(
                self.kv_cache_dtype, self.dtype, capability, selecting
            )
            if reasons:  # SGLang may have found the dtype in the checkpoint
                raise RefusedError(reasons)
            if self.lim_drafting:
                self.allocate_drafts(self.lim_drafting, self._estimate_tokens())
            else:
                self.allocate_selection(selecting, self._estimate_tokens())
                reserved = self._reserve_summaries(selecting)
        super().alloc_memory_pool(*arguments, **options)
        attentions = compat.rotary_attention_layers(self.model) if uses_layer_kernels() else ()
        self.lim_attentions = AttentionLayers(attentions, self.token_to_kv_pool, self.dtype)
        self._compare_memory()
        if reserved is not None and self.lim_policy:
            del reserved
            torch.cuda.empty_cache()
            self.allocate_summaries(self.lim_policy)

    def _compare_memory(self) -> None:
        """Warn if the KV cache became larger than the estimate that selection's memory is for."""
        if (
            self.lim_policy
            and self.lim_selector
            and not self.lim_selector.fits(self.max_total_num_tokens)
        ):
            logger.warning(
                "the KV cache holds %d tokens, more than selection has memory for: steps that read "
                "all of them run without a CUDA graph",
                self.max_total_num_tokens,
            )

    def forward(self, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
        """Run one step; count a decode step by its real rows, never by a CUDA graph's padding."""
        seq_lens = None
        if forward_batch.forward_mode.is_decode():
            seq_lens = forward_batch.seq_lens_cpu[: forward_batch.batch_size].numpy().copy()
        output = super().forward(forward_batch, *arguments, **options)
        if seq_lens is not None:  # counted while the GPU works
            self.lim_stats.count_step(seq_lens, self.lim_policy)
        if self.lim_audit:
            self.lim_audit.end_step()
        return output

    def forward_uncounted(self, forward_batch: Any) -> Any:
        """Run a step of a cycle, which is counted as a whole."""
        return super().forward(forward_batch)

    def _forward_raw(self, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
        """Run one step; without a CUDA graph where rows share so many tokens that they take more
        than the one chunk that a graph captures."""
        selector = self.lim_selector if forward_batch.forward_mode.is_decode() else None
        if selector is None or selector.fits(int(forward_batch.seq_lens_cpu.sum())):
            return super()._forward_raw(forward_batch, *arguments, **options)
        self.lim_stats.oversized_steps += 1
        with compat.without_decode_graphs(self):
            return super()._forward_raw(forward_batch, *arguments, **options)

    def allocate_selection(self, policy: SparsePolicy, num_tokens: int) -> None:
        """Allocate the memory that a policy's selection needs.

        Args:
            num_tokens: of the KV cache.
        """
        max_rows, (heads, kv_heads) = self._max_requests(), self._heads_of_rank
        lists = policy.sharing.num_lists(heads, kv_heads)
        shape = (max_rows * policy.budget,) if lists == 1 else (lists, max_rows * policy.budget)
        self.lim_kept_slots = torch.zeros(shape, dtype=torch.int32, device=self.device)
        ranks = compat.Ranks.of_runner(self)
        merging = ranks if policy.needs_all_heads and ranks.size > 1 else None
        self.lim_selector = policy.allocate(
            replace(self._room(max_rows, num_tokens), ranks=merging)
        )
        if Audit.is_wanted():
            selecting = (Role.SELECT, Role.PICK)
            layers = [n for n, role in enumerate(self.lim_roles) if role in selecting]
            self.lim_audit = Audit(
                self.lim_selector, self.lim_kept_slots, policy, layers or [BEGINNING], max_rows
            )
        taken = self.lim_selector.num_bytes + self.lim_kept_slots.nbytes
        logger.info("LessIsMore: %.0f MiB for selection", taken / 2**20)

    def allocate_drafts(self, policy: Lossless, num_tokens: int) -> None:
        """Allocate the memory of drafts: their lists, and what selects them.

        Args:
            num_tokens: of the KV cache.
        """
        from lim_sglang.lossless.gpu_backends import DraftMemory

        self.lim_draft_memory = memory = DraftMemory.allocate(
            policy,
            self.lim_draft_choices[-1],
            len(self.lim_roles),
            lambda rows: self._room(rows, num_tokens),
            self._max_requests(),
        )
        self.lim_selector = memory.selector
        if Audit.is_wanted():
            select = policy.selecting(len(self.lim_roles))
            self.lim_audit = Audit(
                memory.selector, memory.lists[0], policy, select, memory.max_rows
            )
        taken = memory.selector.num_bytes + memory.lists.nbytes
        logger.info("LessIsMore: %.0f MiB for drafts", taken / 2**20)

    @property
    def _heads_of_rank(self) -> tuple[int, int]:
        """The query heads and the KV heads of this rank of tensor parallelism."""
        size, config = compat.Ranks.of_runner(self).size, self.model_config
        return config.get_num_attention_heads(size), config.get_num_kv_heads(size)

    def _max_requests(self) -> int:
        return self.server_args.max_running_requests or MAX_RUNNING_REQUESTS

    def _room(self, max_rows: int, num_tokens: int) -> Room:
        """Return the room that a selection needs.

        Args:
            max_rows: of a batch.
            num_tokens: of the KV cache.
        """
        context = self.model_config.context_len + compat.extra_context(self.server_args)
        heads, kv_heads = self._heads_of_rank
        return Room(
            max_rows=max_rows,
            num_heads=heads,
            num_kv_heads=kv_heads,
            context=context,
            tokens=max(context, num_tokens),
            device=self.device,
            cos_sin=self.lim_cos_sin,
        )

    def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
        """Capture SGLang's graphs; where tokens are drafted those of decode steps are ours."""
        super().init_cuda_graphs(capture_decode_cuda_graph and self.lim_drafting is None)

    def init_decode_cuda_graph(self) -> None:
        """Capture SGLang's graphs of decode steps anew, if it has any."""
        if self.lim_drafting is None:
            super().init_decode_cuda_graph()

    @property
    def lim_sampler(self) -> str:
        """The backend of the live sampler: ours, or `sglang` for any other."""
        return BACKEND if isinstance(self.sampler, CoupledSampler) else "sglang"

    def rope_table(self, policy: SparsePolicy | None) -> torch.Tensor | None:
        """Return the model's RoPE, [positions, D] f32, for a policy that rotates back."""
        if policy is None or not policy.reads_before_rope:
            return None
        extra = compat.extra_context(self.server_args)
        return model_rope(self.model, self.model_config.context_len, extra)

    def _reserve_summaries(self, policy: SparsePolicy) -> torch.Tensor | None:
        """Take the memory that summaries of the KV cache will need, while SGLang sizes the cache;
        None if the policy has none.

        Whatever the estimate is off by is added to, or taken from, the memory that SGLang leaves
        free: the summaries are allocated by the cache's size.
        """
        shape = self._summary_shape(policy)
        if shape is None:
            return None
        summaries = self.lim_roles.count(Role.PICK) * math.prod(shape)
        summary_bytes = summaries * self.kv_cache_dtype.itemsize / policy.block  # a token
        num_bytes = int(self._estimate_tokens(summary_bytes) * summary_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _estimate_tokens(self, more_bytes: float = 0) -> int:
        """Estimate the tokens of the KV cache that SGLang is about to make.

        Args:
            more_bytes: that each token takes beside its keys and values.
        """
        config = self.model_config
        cache_bytes = self._heads_of_rank[1] * (config.head_dim + config.v_head_dim)
        cache_bytes *= len(self.lim_roles) * self.kv_cache_dtype.itemsize
        free, _ = torch.cuda.mem_get_info()
        left_free = self.pre_model_load_memory * 2**30 * (1 - self.mem_fraction_static)
        tokens = (free - left_free) / (cache_bytes + more_bytes)
        tokens = max(0, int(min(tokens, self.server_args.max_total_tokens or tokens)))
        # Chunks of rows follow from it, and each chunk is an exchange: all ranks need the same.
        return compat.Ranks.of_runner(self).least(tokens)

    def _summary_shape(self, policy: SparsePolicy) -> tuple[int, ...] | None:
        return policy.summary_shape(self._heads_of_rank[1], self.model_config.head_dim)

    def allocate_summaries(self, policy: SparsePolicy) -> None:
        """Allocate a summary for each block of the KV cache and PICK layer, if the policy has any.

        A block's tokens lie in consecutive slots, since SGLang's pages are whole blocks.
        """
        shape, self.lim_summaries = self._summary_shape(policy), {}
        if shape is None:
            return
        layers = [layer for layer, role in enumerate(self.lim_roles) if role is Role.PICK]
        num_blocks = -(-len(self.token_to_kv_pool.get_key_buffer(layers[0])) // policy.block)
        num_bytes = len(layers) * num_blocks * math.prod(shape) * self.kv_cache_dtype.itemsize
        if num_bytes > (free := torch.cuda.mem_get_info()[0]):
            raise ServerError(
                f"summaries of keys take {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
                "free: set --mem-fraction-static lower"
            )
        summaries = torch.zeros(
            len(layers), num_blocks, *shape, dtype=self.kv_cache_dtype, device=self.device
        )
        self.lim_summaries = dict(zip(layers, summaries, strict=True))
        logger.info("LessIsMore: %.0f MiB for summaries of keys", summaries.nbytes / 2**20)
        if self.lim_audit:
            self.lim_audit.watch_summaries(self.token_to_kv_pool, self.lim_summaries)

    def init_attention_backends(self) -> None:
        """Build SGLang's backends, then refuse to go on if another backend would serve decode.

        Raises:
            ServerError: the live decode backend is not ours.
            RefusedError: the loaded model has attention layers that cannot be served.
        """
        super().init_attention_backends()
        live = compat.decode_backend(self.attn_backend)
        # Our backends carry the roles that they act on; SGLang's own have none.
        if getattr(live, "roles", None) is not self.lim_roles:
            raise ServerError(
                f"the live decode backend is {type(live).__name__}, expected one of lim-sglang: "
                "another plugin replaced it, or SGLang, for a model with layers of other kinds"
            )
        if self.server_args.sampling_backend == BACKEND and self.lim_sampler != BACKEND:
            raise ServerError(
                f"the live sampler is {type(self.sampler).__name__}, expected one of lim-sglang: "
                f"another plugin replaced it; remove that plugin, or --sampling-backend {BACKEND}"
            )
        layers = list(compat.attention_layers(self.model))
        reasons = reasons_against_layers(
            layers, self.lim_roles, self.lim_config, on_cpu=compat.serves_on_cpu()
        )
        if reasons:
            raise RefusedError(reasons)
        logger.info("LessIsMore: %s", describe(self))


def uses_layer_kernels() -> bool:
    """Return True where layers of decode steps run by our kernels: on GPUs of the kind on which
    these were measured, unless the user forbids it."""
    return (
        not compat.serves_on_cpu()
        and os.environ.get(LAYER_KERNELS_VAR) != "0"
        and torch.cuda.get_device_capability() == MEASURED_CAPABILITY
    )


def model_rope(model: Any, context: int, extra: int) -> torch.Tensor:
    """Return a copy of a loaded model's RoPE, [context + extra, D] f32: cosines, then sines.

    Args:
        context: tokens of the longest request.
        extra: rows beyond, for the surplus step of a request that has just filled the context.
            Positions that no token has may repeat the last one.

    Raises:
        RefusedError: the layers differ in RoPE, or it is not half-split over whole heads, or it
            ends before the context does.
    """
    ropes = {id(each): each for each in model.modules() if hasattr(each, "cos_sin_cache")}
    if len(ropes) != 1:
        reason = f"the model has {len(ropes)} kinds of RoPE, a gate is made for one"
        raise RefusedError([f"{reason}: serve another policy"])
    (rope,) = ropes.values()
    if not rope.is_neox_style or rope.rotary_dim != rope.head_size:
        reason = "the model's RoPE is not half-split over whole heads, as a gate's is"
        raise RefusedError([f"{reason}: serve another policy"])
    positions = context + extra
    table: torch.Tensor = rope.cos_sin_cache.float()
    if len(table) < context:
        reason = f"the model's RoPE has {len(table)} positions, a context of {context} needs more"
        raise RefusedError([f"{reason}: use --context-length {len(table)} or less"])
    last = table[-1:].expand(max(0, positions - len(table)), -1)
    return torch.cat([table[:positions], last])


def describe(runner: LimModelRunner) -> str:
    """Return the configuration and the layers of each role, as one line for the log."""
    by_role = {
        role.value: [layer for layer, found in enumerate(runner.lim_roles) if found is role]
        for role in Role
    }
    return f"{runner.lim_config.to_json()} {by_role}"


def live_state(runner: LimModelRunner) -> dict[str, Any]:
    """Return LessIsMore's part of `/server_info`.

    Version, device, configuration and digests of the files that it names, roles, the model's
    sampling defaults, the sampler, counters of the host; on a GPU also the source of the scores; an
    SGLang that is tried.
    Equal on all ranks of tensor parallelism.
    """
    state = {
        "version": __version__,
        "device_name": "CPU" if compat.serves_on_cpu() else torch.cuda.get_device_name(),
        "config": runner.lim_config.settings(),
        **runner.lim_config.make_policy().digests(),
        "roles": [role.value for role in runner.lim_roles],
        "sampling_defaults": runner.model_config.get_default_sampling_params(),
        "sampler": runner.lim_sampler,
        "seeds_honoured": runner.lim_sampler == BACKEND,
        **asdict(runner.lim_stats),
    }
    state |= state.pop("drafting") or {}
    if runner.lim_drafting:
        state["draft_tokens"] = runner.lim_draft_choices[-1]
    if tried := compat.tried_version():
        state["tried_sglang"] = tried
    kernels = {
        "skinny_gemm": len(runner.lim_linears.layers),
        "norm_rope_store": len(runner.lim_attentions.layers),
    }
    if any(kernels.values()):
        state["layer_kernels"] = kernels
    if runner.lim_preset:
        state["preset"] = dict(runner.lim_preset)
    if runner.lim_selector:
        state["score_source"] = compat.decode_backend(runner.attn_backend).score_source
    return state


def device_counts(runner: LimModelRunner) -> dict[str, int]:
    """Return the selector's counters and, under `LIM_AUDIT`, the audit's; waits for the device.

    They may differ between ranks of tensor parallelism, all of which call this together.
    """
    counts = runner.lim_selector.counts() if runner.lim_selector else {}
    return counts | (runner.lim_audit.counts() if runner.lim_audit else {})
