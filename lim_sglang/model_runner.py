"""`LimModelRunner`: SGLang's model runner with a schedule, counters and proof that we are live."""

import logging
import os
from dataclasses import asdict
from typing import Any

from lim_sglang import __version__, compat
from lim_sglang.config import ENV_VAR, PRESETS, LimConfig, resolve_settings, with_preset
from lim_sglang.errors import RefusedError, ServerError
from lim_sglang.refusals import (
    model_shape,
    reasons_against,
    reasons_against_layers,
    reasons_against_model,
)
from lim_sglang.schedule import Role, layer_roles
from lim_sglang.stats import Stats

logger = logging.getLogger(__name__)


class LimModelRunner(compat.ModelRunner):
    """Decides the roles before the model is loaded, and checks later that they are in force."""

    def __init__(self, *, model_config: Any, server_args: Any, **rest: Any) -> None:
        text_config = model_config.hf_text_config
        config = resolve_settings(os.environ.get(ENV_VAR), None, {})
        on_cpu = compat.serves_on_cpu()
        reasons = reasons_against(server_args, on_cpu=on_cpu)
        reasons += reasons_against_model(text_config, config)
        if reasons:
            raise RefusedError(reasons)
        shape = model_shape(text_config)
        self.lim_config: LimConfig = with_preset(config, shape)
        self.lim_roles: tuple[Role, ...] = layer_roles(self.lim_config, shape.num_layers)
        self.lim_stats = Stats()
        if config.policy == "lessismore" and config.select_layers is None and shape not in PRESETS:
            logger.warning(
                "SELECT layers %s were not measured for this model: compare it with --lim-policy "
                "full before you rely on it",
                self.lim_config.select_layers,
            )
        super().__init__(model_config=model_config, server_args=server_args, **rest)

    def init_attention_backends(self) -> None:
        """Build SGLang's backends, then refuse to go on when decode would not be ours."""
        super().init_attention_backends()
        live = compat.decode_backend(self.attn_backend)
        # The backends carry the roles that they act on; SGLang's own have none.
        if getattr(live, "roles", None) is not self.lim_roles:
            raise ServerError(
                f"the live decode backend is {type(live).__name__}, expected one of lim-sglang: "
                "another plugin replaced it"
            )
        layers = list(compat.attention_layers(self.model))
        reasons = reasons_against_layers(layers, len(self.lim_roles), on_cpu=compat.serves_on_cpu())
        if reasons:
            raise RefusedError(reasons)
        logger.info("LessIsMore: %s", describe(self))


def describe(runner: LimModelRunner) -> str:
    """One line for the log: what each layer does."""
    by_role = {
        role.value: [layer for layer, found in enumerate(runner.lim_roles) if found is role]
        for role in Role
    }
    return f"{runner.lim_config.to_json()} {by_role}"


def live_state(runner: LimModelRunner) -> dict[str, Any]:
    """What `/server_info` shows: version, configuration, roles and counters."""
    return {
        "version": __version__,
        "config": asdict(runner.lim_config),
        "roles": [role.value for role in runner.lim_roles],
        **asdict(runner.lim_stats),
    }
