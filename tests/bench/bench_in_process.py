"""Builds a model runner as `lim bench decode` does, but on the CPU, and prints what its steps do.

Run by `test_bench_runner.py` in a process of its own, because plugins change SGLang for good.
"""

import json
import sys

import torch

from lim_sglang import compat
from lim_sglang.bench.batch import FilledBatch, check_room, fill_cache, filled_batch
from lim_sglang.bench.facts import model_facts, traffic_of
from lim_sglang.bench.points import Point
from lim_sglang.bench.runner import load_runner, settings_for, with_backend
from lim_sglang.validation import BACKEND


def step(runner, batch: FilledBatch) -> tuple[torch.Tensor, int]:
    """The logits of one step, and its sparse rows."""
    before = runner.lim_stats.sparse_rows
    output = runner.forward(batch.forward_batch).logits_output
    return output.next_token_logits.clone(), runner.lim_stats.sparse_rows - before


def compare(runner, point: Point) -> dict[str, object]:
    """A step of ours, once more, and by SGLang's own backend on the same cache."""
    with filled_batch(runner, point, seed=0) as batch:
        ours = runner.attn_backend
        logits, sparse = step(runner, batch)
        again, _ = step(runner, batch)
        with_backend(runner, "torch_native")
        dense, _ = step(runner, batch)
        built, runner.attn_backend = type(runner.attn_backend).__name__, ours
    over = point.rows_over(runner.lim_config.budget)
    return {
        "finite": bool(logits.isfinite().all()),
        "sparse_rows": sparse,
        "same_again": torch.equal(logits, again),
        "same_as_dense": torch.equal(logits, dense),
        "rows_over": over,
        "rows_as_dense": [n for n in range(point.batch) if torch.equal(logits[n], dense[n])],
        "dense_backend": built,
        "attention_backend": runner.server_args.attention_backend,
    }


def main(folder: str, budget: int, points: list[str]) -> None:
    """Load, fill, step."""
    settings_for(budget)
    runner = load_runner(
        folder,
        backend=BACKEND,
        dummy=False,
        mem_fraction_static=0.3,
        batch_sizes=(1, 4),
        device="cpu",
        dtype="float32",
        max_total_tokens=8192,
        max_running_requests=8,
    )
    chosen = tuple(Point.parse(text) for text in points)
    check_room(runner, chosen)
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    fill_cache(runner.token_to_kv_pool, seed=0)
    with torch.no_grad():
        found = {str(point): compare(runner, point) for point in chosen}
    facts = model_facts(runner, traffic_of(runner))
    facts["layers"] = len(list(compat.attention_layers(runner.model)))
    sys.stdout.write("\n" + json.dumps({"points": found, "facts": facts}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
