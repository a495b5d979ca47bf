"""Timing decode steps on the GPU: whole steps, graphs alone, and layers by role."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lim_sglang import compat
from lim_sglang.bench.batch import FilledBatch
from lim_sglang.bench.launches import count_kernels
from lim_sglang.bench.points import Repeats
from lim_sglang.bench.runner import Contender
from lim_sglang.config import Role
from lim_sglang.errors import ServerError
from lim_sglang.kernels.bench import Run, Spread, capture, time_graph

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3
LAYER_REPEATS = 20
"""Replays of the layers of one role; their median counts."""


def run_step(runner: Any, batch: FilledBatch) -> torch.Tensor:
    """One decode step; the logits [B, V].

    Raises:
        ServerError: the step was not a replay of a captured graph.
    """
    output = runner.forward(batch.forward_batch)
    if not output.can_run_graph:
        raise ServerError(f"{batch.point}: the step ran without its CUDA graph")
    logits: torch.Tensor = output.logits_output.next_token_logits
    return logits


def time_windows(
    runner: Any, batch: FilledBatch, contenders: Sequence[Contender], repeats: Repeats
) -> dict[str, Spread]:
    """Milliseconds a step of each contender, which take turns window by window."""
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.take_over(runner)
        for _ in range(WARM_UP_STEPS):
            run_step(runner, batch)
    for _ in range(repeats.windows):
        for contender in contenders:
            contender.take_over(runner)
            samples[contender.name].append(_time_window(runner, batch, repeats.steps))
    return {name: Spread.of(found) for name, found in samples.items()}


def _time_window(runner: Any, batch: FilledBatch, steps: int) -> float:
    """Milliseconds a step over one window.

    The host plans and launches a step while the device runs the one before, and is never further
    ahead, as under SGLang's overlap scheduling.
    """
    torch.cuda.synchronize()
    run_step(runner, batch)
    ends = [_mark()]
    for _ in range(steps):
        run_step(runner, batch)
        ends.append(_mark())
        ends[-2].synchronize()
    ends[-1].synchronize()
    return ends[0].elapsed_time(ends[-1]) / steps


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_replays(runner: Any, batch: FilledBatch, contender: Contender, repeats: Repeats) -> Spread:
    """Milliseconds of the step's CUDA graph alone, replayed without planning anew."""
    contender.take_over(runner)
    run_step(runner, batch)
    graphs, key = contender.graph_runner.backend, contender.graph_runner._replay_graph_key
    samples = []
    for _ in range(repeats.windows):
        torch.cuda.synchronize()
        graphs.replay(key, batch.forward_batch)
        start = _mark()
        for _ in range(repeats.steps):
            graphs.replay(key, batch.forward_batch)
        end = _mark()
        end.synchronize()
        samples.append(start.elapsed_time(end) / repeats.steps)
    return Spread.of(samples)


def count_launches(contender: Contender) -> int | None:
    """Kernels in the CUDA graph that the contender's last step replayed.

    None, with a warning, where they cannot be counted: a time is not lost by it.
    """
    graphs, key = contender.graph_runner.backend, contender.graph_runner._replay_graph_key
    try:
        return count_kernels(graphs._graphs[key])
    except (ImportError, AttributeError, KeyError, RuntimeError) as error:
        logger.warning("%s: its kernels cannot be counted: %s", contender.name, error)
        return None


def time_layers(
    runner: Any,
    batch: FilledBatch,
    contender: Contender,
    roles: Sequence[Role],
    flush: Run,
) -> dict[Role, float]:
    """Milliseconds of attention in one layer of each role, on the layers' real K and V.

    All layers of a role are captured in one graph, after a step that has planned them. Queries are
    drawn, and the cache is not written: in a step both are the work of the rest.

    Args:
        roles: what each layer does under this backend.
        flush: empties the L2 cache, as the weights between two layers do.
    """
    contender.take_over(runner)
    run_step(runner, batch)
    backend = contender.attn_backend
    layers = list(compat.attention_layers(runner.model))
    by_role = {role: [layers[n] for n, r in enumerate(roles) if r is role] for role in Role}
    planned = backend.forward_metadata
    # A replayed step leaves the metadata of the last captured batch size behind.
    wrappers = backend.decode_cuda_graph_metadata[batch.point.batch]
    backend.forward_metadata = replace(planned, decode_wrappers=wrappers)
    try:
        return {
            role: _time_role(runner, batch, backend, chosen, flush)
            for role, chosen in by_role.items()
            if chosen
        }
    finally:
        backend.forward_metadata = planned


def _time_role(
    runner: Any, batch: FilledBatch, backend: Any, layers: Sequence[Any], flush: Run
) -> float:
    width = layers[0].tp_q_head_num * layers[0].head_dim
    query = torch.randn(batch.point.batch, width, device=runner.device, dtype=runner.dtype)

    def run() -> None:
        for layer in layers:
            backend.forward_decode(
                query, None, None, layer, batch.forward_batch, save_kv_cache=False
            )

    times = time_graph(capture(run), LAYER_REPEATS, flush)
    return Spread.of(times).median / len(layers)


def can_split(contender: Contender) -> bool:
    """Whether a backend's layers can be timed by themselves: FlashInfer's can."""
    return isinstance(contender.attn_backend, compat.FlashInferAttnBackend)
