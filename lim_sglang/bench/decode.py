"""`lim bench decode`: the same decode steps by our backend and by SGLang's dense ones, in turns.

The byte limit of a step is the time of its necessary bytes at the speed of a copy.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench import model_runner
from lim_sglang.bench.model_runner import Contender, FilledBatch, run_step
from lim_sglang.bench.ranks import ALONE, Rank, Report, run_ranks
from lim_sglang.bench.results import Row, StepSplit, surroundings
from lim_sglang.bench.verify import (
    require_exact_kernels,
    require_exact_steps,
    require_gpu,
    sparse_reads,
)
from lim_sglang.bench.workloads import ModelChoice, Point, options_of_policies, step_bytes
from lim_sglang.config import BACKEND, LimConfig
from lim_sglang.errors import ConfigError
from lim_sglang.kernels.bench import Run, Spread, cache_flush, capture, copy_gb_per_s, time_graph
from lim_sglang.policies.policy import SPARSE, Role

WARM_UP_STEPS = 3
LAYER_REPEATS = 20  # replays of the layers of one role; their median counts
NOTES = (
    "no prefill: K and V are random, in slots of random order",
    "the length stays: each step writes its newest token again",
    "queries meet random keys, so heads agree on fewer tokens than a real model's",
    "no scheduler and no sampling; the host is at most one step ahead",
    "reads and writes of selection itself are not in the byte limit",
)
"""Limits of the method, recorded with each row."""
RANK_NOTES = (
    "bytes, heads and the byte limit are those of one GPU",
    "what GPUs send each other is not in the byte limit",
)
"""Further limits where several GPUs share the heads."""


@dataclass(frozen=True)
class DecodeOptions:
    """The options of `lim bench decode`."""

    model: ModelChoice
    points: tuple[Point, ...]
    backends: tuple[str, ...]
    budget: int = 2048
    policies: Mapping[str, LimConfig] = field(default_factory=dict)  # by name, beside LessIsMore
    mem_fraction_static: float = 0.88
    windows: int = 7  # of each backend; the median of their mean steps is the result
    steps: int = 20  # in one window
    split: bool = True  # also divide the step into its parts
    seed: int = 0
    context_limit: int | None = None  # tokens of the longest request that the server allows
    tp: int = 1  # GPUs that share the heads of each layer

    def __post_init__(self) -> None:
        if self.context_limit is not None and self.context_limit < self.longest:
            raise ConfigError(
                f"--context-limit {self.context_limit:,} is less than the {self.longest:,} tokens "
                "of the longest request: give at least as many, or leave it out"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(point.longest for point in self.points)


@dataclass(frozen=True)
class Bench:
    """A loaded model and the backends that take turns on it."""

    options: DecodeOptions
    runner: Any
    contenders: Sequence[Contender]
    conditions: Mapping[str, Any]
    flush: Run  # empties the L2 cache

    @torch.no_grad()
    def measure(self, point: Point) -> list[Row]:
        """Fill the context of a point, check the steps, and time every backend."""
        runner, budget = self.runner, self.options.budget
        with model_runner.filled_batch(runner, point, self.options.seed) as batch:
            for contender in self.contenders:
                model_runner.summarize_rows(runner, contender, batch.slots)
            sparse_rows = require_exact_steps(runner, batch, self.contenders, budget)
            times = time_windows(runner, batch, self.contenders, self.options)
            return [
                self.row(batch, each, times[each.name], sparse_rows.get(each.name))
                for each in self.contenders
            ]

    def row(
        self, batch: FilledBatch, contender: Contender, step_ms: Spread, sparse_rows: int | None
    ) -> Row:
        """Time the parts of a step by one backend."""
        is_ours, backend = contender.is_ours, contender.attn_backend
        contender.take_over(self.runner)
        reads = None
        if is_ours and self.runner.lim_policy:
            run_step(self.runner, batch)
            reads = sparse_reads(self.runner, batch)
        num_bytes = step_bytes(batch.point, self.conditions, reads)
        limit_ms = num_bytes / (self.conditions["copy_gb_per_s"] * 1e6)
        replay_ms, split = time_replays(self.runner, batch, contender, self.options), None
        # Layers of other backends than FlashInfer's cannot be timed by themselves,
        # and layers that several GPUs share exchange what they select within SGLang's graphs alone.
        is_alone = self.options.tp == 1 and isinstance(backend, compat.FlashInferAttnBackend)
        if self.options.split and is_alone:
            roles = self.runner.lim_roles
            roles = roles if is_ours else (Role.FULL,) * len(roles)
            layer_ms = time_layers(self.runner, batch, contender, roles, self.flush)
            split = split_step(step_ms.median, roles, layer_ms)
        return Row(
            point=batch.point,
            backend=contender.name,
            step_ms=step_ms,
            replay_ms=replay_ms,
            sparse_rows=sparse_rows,
            num_bytes=num_bytes,
            limit_share=limit_ms / step_ms.median,
            kernel_launches=model_runner.count_kernels(contender),
            split=split,
            tokens_read=round(reads.tokens / batch.point.batch, 1) if reads else None,
            dense_layers=len(self.runner.lim_roles) - reads.num_layers if reads else None,
        )


def prepare(options: DecodeOptions, report: Report) -> tuple[LimConfig, Sequence[int]]:
    """Check the GPU, its backends and the kernels, before a model is loaded.

    Returns:
        LessIsMore's settings, which are in the environment now, and the batch sizes, ascending.
    """
    require_gpu()
    model_runner.check_backends(options.backends)
    report("Checking the kernels on this GPU")
    require_exact_kernels()
    config = model_runner.settings_for(options.budget)
    return config, sorted({point.batch for point in options.points})


def make_contenders(runner: Any, options: DecodeOptions, report: Report) -> list[Contender]:
    """Capture the decode graphs of all backends, ours first."""
    contenders = []
    for name in options.backends:
        report(f"Capturing the decode graphs of {name}")
        contenders.append(model_runner.make_contender(runner, name))
    return contenders


Measured = tuple[Row, dict[str, Any]]
"""A row with its conditions."""


def measure(options: DecodeOptions, report: Report) -> Iterator[Measured]:
    """Check the kernels, load the model once, capture the graphs of all backends, and yield the
    rows of each point with their conditions; `report` shows the current activity.

    Several GPUs have a process each; the rows are those of the first one.
    """
    require_gpu()
    with options.model.as_folder(options.context_limit or options.longest) as folder:
        if options.tp == 1:
            yield from measure_rank(options, folder, report)
            return
        ours = {BACKEND: model_runner.settings_for(options.budget)}
        model_runner.check_ranks(folder, options.tp, ours | dict(options.policies))
        report(f"Starting {options.tp} ranks")
        log = model_runner.log_as_here()
        yield from run_ranks(measure_rank, (options, folder), options.tp, report, log)


def measure_rank(
    options: DecodeOptions, folder: str, report: Report, rank: Rank = ALONE
) -> Iterator[Measured]:
    """Measure in the process of one rank. All ranks take the same steps, and wait for each other
    in each: nothing here may depend on a time, or on what a rank's own heads hold.

    Args:
        folder: of the model.
    """
    model = options.model
    if rank.size > 1:
        torch.cuda.set_device(rank.number)
    config, batch_sizes = prepare(options, report)
    model_runner.check_policies(folder, options.policies, model.kv_cache_dtype)
    report(f"Loading {model.name}")
    runner = model_runner.load_runner(
        folder,
        backend=BACKEND,
        mem_fraction_static=options.mem_fraction_static,
        batch_sizes=batch_sizes,
        rank=rank,
        context_length=options.context_limit,
        **model.load_options,
        **options_of_policies(options.policies, batch_sizes[-1]),
    )
    model_runner.check_formats(runner, model)
    model_runner.check_room(runner, options.points)
    contenders = make_contenders(runner, options, report)
    for name, policy in options.policies.items():
        report(f"Capturing the decode graphs of {name}")
        contenders.append(model_runner.make_contender(runner, name, policy))
    report("Filling the KV cache")
    # The heads of each rank have K and V of their own.
    model_runner.fill_cache(runner.token_to_kv_pool, options.seed + rank.number)
    contenders[0].take_over(runner)
    chosen = ("budget", "mem_fraction_static", "windows", "steps", "seed", "context_limit", "tp")
    conditions = surroundings() | {name: getattr(options, name) for name in chosen}
    conditions |= model_runner.model_facts(runner) | {
        "model": model.name,
        "dummy_weights": model.is_dummy,
        "kv_cache_dtype": model.kv_cache_dtype,
        "lim_config": config.settings(),
        "graph_batch_sizes": batch_sizes,
        "kernels_exact": True,  # or require_exact_kernels would have refused
        "copy_gb_per_s": round(copy_gb_per_s(), 1),
        "notes": [*NOTES, *(RANK_NOTES if rank.size > 1 else ())],
    }
    bench = Bench(options, runner, contenders, conditions, cache_flush())
    for point in options.points:
        report(f"{point}: checking the steps, then {options.windows} windows of each backend")
        yield from ((row, conditions) for row in bench.measure(point))


def time_windows(
    runner: Any,
    batch: FilledBatch,
    contenders: Sequence[Contender],
    options: DecodeOptions,
    sample: Callable[[Tensor], object] = lambda _: None,
) -> dict[str, Spread]:
    """Return the milliseconds per step of each backend; backends take turns window by window.

    Args:
        sample: draws from the logits of each step, [B, V].
    """
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.take_over(runner)
        for _ in range(WARM_UP_STEPS):
            run_step(runner, batch)
    for _ in range(options.windows):
        for contender in contenders:
            contender.take_over(runner)
            samples[contender.name].append(
                time_window(lambda: sample(run_step(runner, batch)), options.steps)
            )
    return {name: Spread.of(found) for name, found in samples.items()}


def time_window(launch: Callable[[], object], steps: int) -> float:
    """Return the milliseconds per step over one window.

    The host plans and launches a step while the device runs the one before, and is never further
    ahead, as under SGLang's overlap scheduling.
    """
    torch.cuda.synchronize()
    launch()
    ends = [_record_event()]
    for _ in range(steps):
        launch()
        ends.append(_record_event())
        ends[-2].synchronize()
    ends[-1].synchronize()
    return ends[0].elapsed_time(ends[-1]) / steps


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_replays(
    runner: Any, batch: FilledBatch, contender: Contender, options: DecodeOptions
) -> Spread:
    """Return the milliseconds of the step's CUDA graph alone, replayed without a new plan."""
    contender.take_over(runner)
    run_step(runner, batch)
    graphs, key = contender.graph_runner.backend, contender.graph_runner._replay_graph_key
    samples = []
    for _ in range(options.windows):
        torch.cuda.synchronize()
        graphs.replay(key, batch.forward_batch)
        start = _record_event()
        for _ in range(options.steps):
            graphs.replay(key, batch.forward_batch)
        end = _record_event()
        end.synchronize()
        samples.append(start.elapsed_time(end) / options.steps)
    return Spread.of(samples)


def time_layers(
    runner: Any, batch: FilledBatch, contender: Contender, roles: Sequence[Role], flush: Run
) -> dict[Role, float]:
    """Return the milliseconds of attention in one layer of each role, on the layers' own K and V.

    All layers of a role are captured in one graph, after a step that has planned them. Queries are
    random, and the cache is not written: in a step both belong to the rest. `flush` empties the L2
    cache, as the weights between two layers do.
    """
    contender.take_over(runner)
    run_step(runner, batch)
    backend, layers = contender.attn_backend, list(compat.attention_layers(runner.model))
    width = layers[0].tp_q_head_num * layers[0].head_dim

    def time_role(role: Role) -> float:
        query = torch.randn(batch.point.batch, width, device=runner.device, dtype=runner.dtype)
        chosen = [layer for layer, found in zip(layers, roles, strict=True) if found is role]

        def run() -> None:
            for layer in chosen:
                backend.forward_decode(
                    query, None, None, layer, batch.forward_batch, save_kv_cache=False
                )

        times = time_graph(capture(run), LAYER_REPEATS, flush)
        return Spread.of(times).median / len(chosen)

    planned = backend.forward_metadata
    # A replayed step leaves the metadata of the last captured batch size behind.
    wrappers = backend.decode_cuda_graph_metadata[batch.point.batch]
    backend.forward_metadata = replace(planned, decode_wrappers=wrappers)
    try:
        return {role: time_role(role) for role in Role if role in roles}
    finally:
        backend.forward_metadata = planned


def split_step(step_ms: float, roles: Sequence[Role], layer_ms: Mapping[Role, float]) -> StepSplit:
    """Divide a step by the milliseconds of attention in one layer of each role.

    Without a FULL layer in the model, all time of SELECT layers counts as dense.
    """
    count = Counter(roles)
    select_ms = layer_ms.get(Role.SELECT, 0.0)
    full_ms = layer_ms.get(Role.FULL, select_ms)
    dense_ms = (count[Role.FULL] + count[Role.SELECT]) * full_ms
    selection_ms = count[Role.SELECT] * (select_ms - full_ms) if count[Role.SELECT] else 0.0
    sparse_ms = sum(count[role] * layer_ms.get(role, 0.0) for role in SPARSE)
    rest_ms = step_ms - dense_ms - selection_ms - sparse_ms
    return StepSplit(dense_ms, selection_ms, sparse_ms, rest_ms)
