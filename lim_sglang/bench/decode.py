"""`lim bench decode`: the same decode steps by our backend and by SGLang's dense ones, in turns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lim_sglang.bench.batch import (
    FilledBatch,
    check_kept,
    check_room,
    fill_cache,
    filled_batch,
    prepare_kept,
)
from lim_sglang.bench.exact import differences
from lim_sglang.bench.facts import model_facts, model_folder, surroundings, traffic_of
from lim_sglang.bench.gate import check_exactness, require_gpu
from lim_sglang.bench.limit import StepSplit, Traffic, share_of_limit, split_step
from lim_sglang.bench.points import DecodeOptions, Point
from lim_sglang.bench.rows import Row, with_speedups
from lim_sglang.bench.runner import (
    Contender,
    check_backends,
    check_precision,
    load_runner,
    make_contender,
    settings_for,
)
from lim_sglang.bench.timing import (
    can_split,
    count_launches,
    run_step,
    time_layers,
    time_replays,
    time_windows,
)
from lim_sglang.config import LimConfig, Role
from lim_sglang.errors import LimError
from lim_sglang.kernels.bench import Run, Spread, cache_flush, copy_gb_per_s
from lim_sglang.validation import BACKEND

NOTES = (
    "no prefill: K and V are drawn, in slots of random order",
    "the length stays: each step writes its newest token again",
    "queries meet drawn keys, so heads agree on fewer tokens than a real model's",
    "no scheduler and no sampling; the host is at most one step ahead",
    "what selection itself reads and writes is not in the byte limit",
)
"""What a reader of the numbers has to know."""

Report = Callable[[str], None]
"""Shows what is being done."""


@dataclass(frozen=True)
class Bench:
    """A loaded model with its contenders, and what is the same at every point."""

    options: DecodeOptions
    runner: Any
    contenders: Sequence[Contender]
    traffic: Traffic
    gb_per_s: float
    flush: Run
    conditions: dict[str, Any]

    @torch.no_grad()
    def measure(self, point: Point, report: Report) -> list[Row]:
        """Fill the context of one point and time every contender on it."""
        runner, options = self.runner, self.options
        with filled_batch(runner, point, options.seed) as batch:
            report(f"{point}: are the steps exact?")
            sparse_rows = self._verify(batch)
            report(f"{point}: {options.repeats.windows} windows of each backend")
            steps = time_windows(runner, batch, self.contenders, options.repeats)
            rows = []
            for contender in self.contenders:
                report(f"{point}: the parts of a step by {contender.name}")
                replay = time_replays(runner, batch, contender, options.repeats)
                step = steps[contender.name]
                rows.append(self._row(batch, contender, step, replay, sparse_rows))
            return with_speedups(rows)

    def _row(
        self,
        batch: FilledBatch,
        contender: Contender,
        step: Spread,
        replay: Spread,
        sparse_rows: int,
    ) -> Row:
        ours = contender.name == BACKEND
        split, error = self._split(batch, contender, step.median)
        num_bytes = (
            self.traffic.lim_bytes(batch.point, self.options.budget)
            if ours
            else self.traffic.dense_bytes(batch.point)
        )
        return Row(
            point=batch.point,
            backend=contender.name,
            step_ms=step,
            replay_ms=replay,
            sparse_rows=sparse_rows if ours else None,
            num_bytes=num_bytes,
            limit_share=share_of_limit(num_bytes, self.gb_per_s, step.median),
            kernel_launches=count_launches(contender),
            split=split,
            split_error=error,
        )

    def _split(
        self, batch: FilledBatch, contender: Contender, step_ms: float
    ) -> tuple[StepSplit | None, str | None]:
        """The parts of a step, or why they are missing: the step's own time is not lost by it."""
        if not self.options.split or not can_split(contender):
            return None, None
        roles = self.traffic.roles
        if contender.name != BACKEND:
            roles = (Role.FULL,) * len(roles)
        try:
            layer_ms = time_layers(self.runner, batch, contender, roles, self.flush)
        except (RuntimeError, AttributeError, TypeError, KeyError) as error:
            return None, f"{type(error).__name__}: {error}"
        return split_step(step_ms, roles, layer_ms), None

    def _verify(self, batch: FilledBatch) -> int:
        """Run a step of each contender and look at what it did.

        Returns:
            The rows of our step that the runner counted as sparse.

        Raises:
            LimError: logits that are not finite, or a step of ours that is not the definition's.
        """
        runner, point = self.runner, batch.point
        problems = []
        sparse = 0
        for contender in self.contenders:
            contender.take_over(runner)
            before = runner.lim_stats.sparse_rows
            prepare_kept(runner)
            if not run_step(runner, batch).isfinite().all():
                problems.append(f"{point}: {contender.name} gives logits that are not finite")
            if contender.name == BACKEND:
                sparse = runner.lim_stats.sparse_rows - before
                problems += self._differences(batch)
        if problems:
            raise LimError("no time is shown: " + "; ".join(problems))
        return sparse

    def _differences(self, batch: FilledBatch) -> list[str]:
        """What is wrong with the step of ours that just ran."""
        runner, budget = self.runner, self.options.budget
        problem = check_kept(runner, batch, budget)
        if problem:  # slots of nobody cannot be looked at more closely
            return [problem]
        return differences(runner, batch, budget, partial(run_step, runner, batch))


@contextmanager
def set_up(options: DecodeOptions, report: Report) -> Iterator[Bench]:
    """Check the GPU, load the model once, and capture the graphs of all contenders."""
    require_gpu()
    check_backends([name for name in options.backends if name != BACKEND])
    report("Are the kernels exact on this GPU?")
    check_exactness()
    config = settings_for(options.budget)
    with model_folder(options.model, options.longest) as folder:
        report(f"Loading {options.title}")
        runner = load_runner(
            folder,
            backend=BACKEND,
            dummy=options.model.shape is not None,
            mem_fraction_static=options.mem_fraction_static,
            batch_sizes=options.batch_sizes,
            **options.precision.server_args,
        )
        check_precision(runner, options.precision)
        check_room(runner, options.points)
        contenders = []
        for name in options.backends:
            report(f"Capturing the decode graphs of {name}")
            contenders.append(make_contender(runner, name))
        report("Filling the KV cache")
        fill_cache(runner.token_to_kv_pool, options.seed)
        traffic, gb_per_s = traffic_of(runner), copy_gb_per_s()
        conditions = surroundings() | asked(options, config) | model_facts(runner, traffic)
        conditions |= {
            "kernels_exact": True,  # or check_exactness would have refused
            "copy_gb_per_s": round(gb_per_s, 1),
            "notes": list(NOTES),
        }
        yield Bench(options, runner, contenders, traffic, gb_per_s, cache_flush(), conditions)


def asked(options: DecodeOptions, config: LimConfig) -> dict[str, Any]:
    """The options that every number depends on."""
    return {
        "model": options.model.name,
        "dummy_weights": options.model.shape is not None,
        "lim_config": asdict(config),
        "budget": options.budget,
        "mem_fraction_static": options.mem_fraction_static,
        "graph_batch_sizes": list(options.batch_sizes),
        "seed": options.seed,
        "kv_cache_dtype": options.precision.kv_cache_dtype,
        **asdict(options.repeats),
    }


def measure(options: DecodeOptions, report: Report) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """The rows of each point as they are measured, with their conditions."""
    with set_up(options, report) as bench:
        for point in options.points:
            yield bench.measure(point, report), bench.conditions
