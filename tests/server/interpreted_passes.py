"""The GPU's passes of a lossless cycle on a CPU server: without graphs, kernels interpreted.

`planted.py` plants them as it plants defects.
"""

from types import SimpleNamespace
from typing import Any

import torch

from lim_sglang import compat
from lim_sglang.attention_backend import SECOND_READING
from lim_sglang.lossless.gpu_passes import GpuPasses

NAME = "gpu-passes"
"""Name of the change that is planted."""
SETTINGS = {"TRITON_INTERPRET": "1"}
"""Environment of such a server."""


def serve(worker: Any) -> None:
    """Let the worker's module run the passes of a GPU."""
    worker._passes = _gpu_passes


def _gpu_passes(runner: Any) -> GpuPasses:
    """Return the passes; give the CPU's backend and runner what they ask a GPU's for."""
    backend, model = compat.decode_backend(runner.attn_backend), runner.model_config
    backend.indices_updater_decode = SimpleNamespace(
        num_qo_heads=model.num_attention_heads,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        data_type=runner.kv_cache_dtype,
    )
    backend.kv_last_page_len = torch.zeros(1)
    backend.score_source = SECOND_READING
    runner.allocate_drafts(runner.lim_drafting, runner.max_total_num_tokens)
    return GpuPasses(runner)
