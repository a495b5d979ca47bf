"""`lim bench capacity`: tokens that the KV cache holds, with LessIsMore and without.

A KV cache is sized when a server starts, so each backend starts in a process of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lim_sglang.bench.apart import run_apart
from lim_sglang.bench.points import ModelChoice, Precision


@dataclass(frozen=True)
class Capacity:
    """What one backend's KV cache holds."""

    backend: str
    num_tokens: int


def measure_capacities(
    model: ModelChoice,
    backends: Sequence[str],
    *,
    budget: int,
    mem_fraction_static: float,
    precision: Precision,
) -> list[Capacity]:
    """Start a model runner for each backend, one after the other, up to its KV cache.

    Raises:
        LimError: a process failed; its own message.
    """
    return [
        Capacity(
            backend,
            run_apart(
                f"the process for {backend}",
                _count_slots,
                model,
                backend,
                budget,
                mem_fraction_static,
                precision,
            ),
        )
        for backend in backends
    ]


def _count_slots(
    model: ModelChoice,
    backend: str,
    budget: int,
    mem_fraction_static: float,
    precision: Precision,
) -> int:
    """Runs in a process of its own."""
    from lim_sglang.bench.facts import model_folder
    from lim_sglang.bench.gate import require_gpu
    from lim_sglang.bench.runner import check_precision, load_runner, settings_for

    require_gpu()
    settings_for(budget)
    with model_folder(model, longest=1) as folder:
        runner = load_runner(
            folder,
            backend=backend,
            dummy=model.shape is not None,
            mem_fraction_static=mem_fraction_static,
            **precision.server_args,
        )
        check_precision(runner, precision)
        return int(runner.max_total_num_tokens)
