"""What a number depends on: model, memory, versions, device, commit."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lim_sglang import compat
from lim_sglang.bench.limit import Traffic, read_weight_bytes
from lim_sglang.bench.points import ModelChoice
from lim_sglang.bench.shapes import write_shape
from lim_sglang.environment import driver_version, installed_versions, project_commit
from lim_sglang.errors import ModelError


@contextmanager
def model_folder(model: ModelChoice, longest: int) -> Iterator[str]:
    """A folder that SGLang can load: the user's, or one with a published shape's configuration.

    Args:
        longest: tokens of the longest context that is measured.
    """
    if model.folder is not None:
        if not (Path(model.folder) / "config.json").is_file():
            raise ModelError(f"{model.folder} holds no config.json: name a model folder")
        yield model.folder
        return
    with tempfile.TemporaryDirectory(prefix="lim-bench-") as folder:
        write_shape(model.name, Path(folder), longest=longest)
        yield folder


def traffic_of(runner: Any) -> Traffic:
    """What of this runner's model a decode step reads."""
    pool = runner.token_to_kv_pool
    sizes = {name: weight.nbytes for name, weight in runner.model.named_parameters()}
    return Traffic(
        weight_bytes=read_weight_bytes(sizes),
        token_bytes=pool.k_buffer[0][0].nbytes + pool.v_buffer[0][0].nbytes,
        roles=runner.lim_roles,
    )


def model_facts(runner: Any, traffic: Traffic) -> dict[str, Any]:
    """What of the model and its memory a number depends on."""
    layer = next(compat.attention_layers(runner.model))
    by_dtype: Counter[str] = Counter()
    for weight in runner.model.parameters():
        by_dtype[str(weight.dtype)] += weight.nbytes
    return {
        # SGLang's name of it, asked for or found in the checkpoint.
        "quantization": runner.model_config.quantization or "none",
        "weight_bytes_by_dtype": dict(by_dtype),
        "weight_bytes_read": traffic.weight_bytes,
        "kv_bytes_per_token_and_layer": traffic.token_bytes,
        "roles": [role.value for role in traffic.roles],
        "heads": layer.tp_q_head_num,
        "kv_heads": layer.tp_k_head_num,
        "head_dim": layer.head_dim,
        "dtype": str(runner.dtype),
        "kv_dtype": str(runner.kv_cache_dtype),
        "page_size": runner.page_size,
        "context_length": runner.model_config.context_len,
        "kv_capacity": runner.max_total_num_tokens,
    }


def surroundings() -> dict[str, Any]:
    """When, where and with which code a number was made."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": project_commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": installed_versions(),
    }
