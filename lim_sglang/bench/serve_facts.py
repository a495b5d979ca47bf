"""What of a running server a number depends on, by its own account."""

from collections.abc import Mapping
from typing import Any

from lim_sglang.errors import ModelError
from lim_sglang.server import lim_state

FACTS = (
    *("attention_backend", "decode_attention_backend", "prefill_attention_backend", "load_format"),
    *("dtype", "kv_cache_dtype", "quantization", "page_size", "mem_fraction_static"),
    *("max_running_requests", "chunked_prefill_size", "schedule_conservativeness"),
    *("disable_overlap_schedule", "disable_radix_cache", "incremental_streaming_output"),
    *("skip_tokenizer_init", "stream_interval", "device"),
)
"""What of `/server_info` a number depends on."""


def server_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of a server, by its own account, a number depends on."""
    state = info["internal_states"][0]
    live = lim_state(info) or {}
    return {
        "server": {name: info.get(name) for name in FACTS},
        "model_path": info["model_path"],
        "sglang_version": info.get("version"),
        "kv_capacity": state["memory_usage"]["token_capacity"],
        "lim_config": live.get("config"),
        "roles": live.get("roles"),
    }


def vocabulary(model_path: str) -> int:
    """Tokens that the served model knows.

    Raises:
        ModelError: its configuration is not on this machine.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the configuration of {model_path}, which the server serves, cannot be read: {reason}"
        ) from None
    return int(config.get_text_config().vocab_size)
