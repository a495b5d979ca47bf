"""`LimModelRunner`: SGLang's model runner with layer roles, counters and a check of the backend.

A decode step begins here: `forward` counts the step's rows, dense and sparse, and SGLang then calls
`LimAttnBackend` (`attention_backend.py`, or `cpu_backend.py`) layer by layer.
"""

import logging
import os
from dataclasses import asdict
from typing import Any

import torch

from lim_sglang import __version__, compat
from lim_sglang.audit import Audit
from lim_sglang.config import (
    CONFIG_VAR,
    PRESETS,
    LimConfig,
    Role,
    layer_roles,
    resolve_settings,
    with_preset,
)
from lim_sglang.counters import Stats, step_lengths
from lim_sglang.errors import RefusedError, ServerError
from lim_sglang.kernels.reference import BudgetSplit, split_budget
from lim_sglang.kernels.selector import MassSelector, RankSelector, Selector
from lim_sglang.validation import (
    model_shape,
    reasons_against,
    reasons_against_kv_cache,
    reasons_against_layers,
    reasons_against_model,
)

logger = logging.getLogger(__name__)

SELECTORS: dict[str, type[Selector]] = {"rank": RankSelector, "mass": MassSelector}
"""Selectors by `LimConfig.ranking`."""
MAX_RUNNING_REQUESTS = 4096
"""Requests that SGLang runs at once, at most, if the user sets no limit."""


class LimModelRunner(compat.ModelRunner):
    """A model runner with layer roles: fixed before the model is loaded, and checked afterwards."""

    def __init__(self, *, model_config: Any, server_args: Any, **rest: Any) -> None:
        text_config = model_config.hf_text_config
        config = resolve_settings(os.environ.get(CONFIG_VAR), None, {})
        on_cpu = compat.serves_on_cpu()
        reasons = reasons_against(server_args, on_cpu=on_cpu)
        reasons += reasons_against_model(text_config, config)
        if reasons:
            raise RefusedError(reasons)
        shape = model_shape(text_config)
        self.lim_config: LimConfig = with_preset(config, shape)
        self.lim_roles: tuple[Role, ...] = layer_roles(self.lim_config, shape.num_layers)
        if config.budget >= model_config.context_len and Role.REUSE in self.lim_roles:
            logger.warning(
                "the budget of %d tokens covers the whole context of %d: every layer is dense",
                config.budget,
                model_config.context_len,
            )
            self.lim_roles = (Role.FULL,) * shape.num_layers
        self.lim_stats = Stats()
        if config.policy == "lessismore" and config.select_layers is None and shape not in PRESETS:
            logger.warning(
                "SELECT layers %s were not measured for this model: compare it with --lim-policy "
                "full before you rely on it",
                self.lim_config.select_layers,
            )
        super().__init__(model_config=model_config, server_args=server_args, **rest)

    def alloc_memory_pool(self, *arguments: Any, **options: Any) -> None:
        """Allocate the selection's memory first, so that the KV pool is sized by the rest."""
        self.lim_selector: Selector | None = None
        self.lim_audit: Audit | None = None
        if Role.REUSE in self.lim_roles and not compat.serves_on_cpu():
            capability = torch.cuda.get_device_capability()
            reasons = reasons_against_kv_cache(self.kv_cache_dtype, self.dtype, capability)
            if reasons:  # SGLang may have found the dtype in the checkpoint
                raise RefusedError(reasons)
            self.allocate_selection()
        super().alloc_memory_pool(*arguments, **options)

    def forward(self, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
        """Run one step; count a decode step by its real rows, never by a CUDA graph's padding."""
        if forward_batch.forward_mode.is_decode():
            lengths = forward_batch.seq_lens_cpu[: forward_batch.batch_size].tolist()
            self.lim_stats.count_step(step_lengths(lengths, self.lim_sparse_budget))
        output = super().forward(forward_batch, *arguments, **options)
        if self.lim_audit:
            self.lim_audit.end_step()
        return output

    @property
    def lim_sparse_budget(self) -> int | None:
        """Tokens that REUSE layers read; None where no layer reuses, so that every row is dense."""
        return self.lim_config.budget if Role.REUSE in self.lim_roles else None

    @property
    def lim_budget_split(self) -> BudgetSplit:
        """The parts of the budget: sinks, selected tokens, recency share."""
        config = self.lim_config
        return split_budget(config.budget, config.recent_ratio, config.sinks)

    def allocate_selection(self) -> None:
        """Allocate the memory that the configuration's selection needs."""
        config = self.lim_config
        max_rows = self.server_args.max_running_requests or MAX_RUNNING_REQUESTS
        self.lim_kept_slots = torch.zeros(
            max_rows * config.budget, dtype=torch.int32, device=self.device
        )
        self.lim_selector = SELECTORS[config.ranking].allocate(
            self.lim_budget_split,
            max_rows=max_rows,
            num_heads=self.model_config.num_attention_heads,
            context=self.model_config.context_len + compat.extra_context(self.server_args),
            device=self.device,
        )
        if Audit.is_wanted():
            select = [n for n, role in enumerate(self.lim_roles) if role is Role.SELECT]
            self.lim_audit = Audit(self.lim_selector, self.lim_kept_slots, select, max_rows)
        taken = self.lim_selector.num_bytes + self.lim_kept_slots.nbytes
        logger.info("LessIsMore: %.0f MiB for selection", taken / 2**20)

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
                "another plugin replaced it"
            )
        layers = list(compat.attention_layers(self.model))
        reasons = reasons_against_layers(
            layers, self.lim_roles, self.lim_config, on_cpu=compat.serves_on_cpu()
        )
        if reasons:
            raise RefusedError(reasons)
        logger.info("LessIsMore: %s", describe(self))


def describe(runner: LimModelRunner) -> str:
    """Return the configuration and the layers of each role, as one line for the log."""
    by_role = {
        role.value: [layer for layer, found in enumerate(runner.lim_roles) if found is role]
        for role in Role
    }
    return f"{runner.lim_config.to_json()} {by_role}"


def live_state(runner: LimModelRunner) -> dict[str, Any]:
    """Return LessIsMore's part of `/server_info`.

    Version, device, configuration, roles, the model's sampling defaults, counters; on a GPU also
    the source of the scores, the selector's counters and, under `LIM_AUDIT`, the audit's.
    """
    state = {
        "version": __version__,
        "device_name": "CPU" if compat.serves_on_cpu() else torch.cuda.get_device_name(),
        "config": asdict(runner.lim_config),
        "roles": [role.value for role in runner.lim_roles],
        "sampling_defaults": runner.model_config.get_default_sampling_params(),
        **asdict(runner.lim_stats),
    }
    if runner.lim_selector:
        state |= runner.lim_selector.counts()
        state["score_source"] = compat.decode_backend(runner.attn_backend).score_source
    if runner.lim_audit:
        state |= runner.lim_audit.counts()
    return state
