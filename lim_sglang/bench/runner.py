"""A real SGLang model runner in this process, and the attention backends that take turns on it.

One set of weights and one KV cache serve all backends: each has its own CUDA graphs, and the pair
of backend and graphs is exchanged on the runner between two windows of one measurement.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lim_sglang import compat
from lim_sglang.bench.launches import listed_graphs
from lim_sglang.bench.points import Precision
from lim_sglang.config import CONFIG_VAR, LimConfig, resolve_settings
from lim_sglang.errors import LimError, ServerError
from lim_sglang.plugin import register
from lim_sglang.server import free_port
from lim_sglang.validation import BACKEND

SOURCE = "lim bench"
"""What SGLang records as the origin of the options that are changed here."""


@dataclass(frozen=True)
class Contender:
    """An attention backend with its captured decode graphs."""

    name: str
    attn_backend: Any
    graph_runner: Any

    def take_over(self, runner: Any) -> None:
        """Let the runner's next steps be served by this backend."""
        runner.attn_backend = self.attn_backend
        runner.decode_cuda_graph_runner = self.graph_runner


def settings_for(budget: int) -> LimConfig:
    """LessIsMore's settings: those of the environment with this budget; kept there for SGLang."""
    config = resolve_settings(os.environ.get(CONFIG_VAR), None, {"budget": budget})
    os.environ[CONFIG_VAR] = config.to_json()
    return config


def load_runner(
    folder: str,
    *,
    backend: str,
    dummy: bool,
    mem_fraction_static: float,
    batch_sizes: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Load a model and size its KV cache, exactly as a server with this backend does.

    Args:
        folder: a model folder; with `dummy`, its configuration is enough.
        batch_sizes: what decode graphs will be captured for; None for SGLang's own choice.
        options: further fields of SGLang's `ServerArgs`.
    """
    if not compat.loads_backend(BACKEND):  # a checkout that is not installed has no entry point
        register()
    server_args = compat.ServerArgs(
        model_path=folder,
        load_format="dummy" if dummy else "auto",
        skip_tokenizer_init=True,
        attention_backend=backend,
        mem_fraction_static=mem_fraction_static,
        cuda_graph_bs_decode=list(batch_sizes) if batch_sizes else None,
        # Prefill is not measured, and capturing its graphs takes minutes.
        disable_prefill_cuda_graph=True,
        disable_flashinfer_autotune=True,
        random_seed=0,
        log_level="warning",
        **options,
    )
    runner = compat.load_runner(_runner_class(backend), server_args, free_port())
    if dummy:
        drop_dummy_scales(compat.attention_layers(runner.model))
    runner.alloc_memory_pool()
    return runner


def drop_dummy_scales(layers: Iterable[Any]) -> None:
    """Set the scales of K and V that the layers of a quantized model have to 1.

    SGLang's dummy loader draws them with the weights, from -0.001 to 0.001, and believes them where
    they come out positive: attention would be near uniform, and its output lost in rounding.
    """
    for layer in layers:
        if layer.k_scale is not None:
            layer.k_scale.fill_(1.0)
            layer.v_scale.fill_(1.0)
            layer.k_scale_float = layer.v_scale_float = 1.0


def check_precision(runner: Any, precision: Precision) -> None:
    """Refuse a runner whose KV cache or weights are in another format than was asked for.

    Raises:
        ServerError: what was asked for, and what there is.
    """
    reasons = []
    cache, weights = precision.kv_cache_dtype, precision.quantization
    # torch calls fp8_e4m3 float8_e4m3fn.
    if cache != "auto" and cache.replace("fp8", "float8") not in str(runner.kv_cache_dtype):
        reasons.append(f"--kv-cache-dtype {cache} gave a KV cache of {runner.kv_cache_dtype}")
    dtypes = {str(weight.dtype) for weight in runner.model.parameters()}
    if weights != "none" and not any("float8" in dtype for dtype in dtypes):
        reasons.append(f"--quantization {weights} left weights of {', '.join(sorted(dtypes))}")
    if reasons:
        raise ServerError(
            f"{'; '.join(reasons)}: this model or version of SGLang cannot be measured so"
        )


def _runner_class(backend: str) -> type:
    if backend != BACKEND:
        dense: type = compat.ModelRunner
        return dense
    from lim_sglang.model_runner import LimModelRunner

    return LimModelRunner


def check_backends(names: Sequence[str]) -> None:
    """Refuse backends that this GPU cannot run, before a model is loaded."""
    reasons = [
        f"--backends {name}: {why}" for name in names if (why := compat.missing_backend(name))
    ]
    if reasons:
        raise LimError("; ".join(reasons))


def make_contender(runner: Any, name: str) -> Contender:
    """Build a backend on the runner and capture its decode graphs. Ours has to be the first.

    Raises:
        ServerError: another backend than the named one is live, or no graph was captured.
    """
    with listed_graphs():
        if name == BACKEND:
            runner.init_attention_backends()
            runner.init_cuda_graphs()
        else:
            with_backend(runner, name)
    live = runner.attn_backend
    # SGLang notes what it made of the name; ours alone has roles.
    if live.decode_attention_backend_str != name or hasattr(live, "roles") != (name == BACKEND):
        raise ServerError(f"SGLang built {type(live).__name__} for the backend {name}")
    if runner.decode_cuda_graph_runner is None:
        raise ServerError(f"SGLang captured no decode graph for the backend {name}")
    return Contender(name, live, runner.decode_cuda_graph_runner)


def with_backend(runner: Any, name: str) -> None:
    """Make SGLang build one of its own backends on a runner that was started with ours."""
    _set_backend(runner, name)
    try:
        # Past LimModelRunner's check that the live backend is ours: here it must not be.
        compat.ModelRunner.init_attention_backends(runner)
        runner.init_decode_cuda_graph()
    finally:
        _set_backend(runner, BACKEND)


def _set_backend(runner: Any, name: str) -> None:
    runner.server_args.override(
        SOURCE,
        attention_backend=name,
        prefill_attention_backend=None,
        decode_attention_backend=None,
    )
