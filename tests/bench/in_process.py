"""Build a model runner as `lim bench decode` does, but on the CPU, and print what its steps do, in
a process of its own, because plugins change SGLang for good."""

import json
import sys

import torch

from lim_sglang.bench import model_runner
from lim_sglang.bench.model_runner import FilledBatch
from lim_sglang.bench.workloads import Point
from lim_sglang.config import BACKEND


def step(runner, batch: FilledBatch) -> tuple[torch.Tensor, int]:
    """Run one step; returns the logits and the sparse rows."""
    before = runner.lim_stats.sparse_rows
    output = runner.forward(batch.forward_batch).logits_output
    return output.next_token_logits.clone(), runner.lim_stats.sparse_rows - before


def compare(runner, point: Point) -> dict[str, object]:
    """Run a step of ours twice, and one by SGLang's own backend on the same cache."""
    with model_runner.filled_batch(runner, point, seed=0) as batch:
        ours = runner.attn_backend
        logits, sparse = step(runner, batch)
        again, _ = step(runner, batch)
        model_runner.build_dense_backend(runner, "torch_native")
        dense, _ = step(runner, batch)
        built, runner.attn_backend = type(runner.attn_backend).__name__, ours
    return {
        "finite": bool(logits.isfinite().all()),
        "sparse_rows": sparse,
        "same_again": torch.equal(logits, again),
        "rows": point.batch,
        "rows_over": point.rows_over(runner.lim_config.budget),
        "rows_as_dense": [n for n in range(point.batch) if torch.equal(logits[n], dense[n])],
        "dense_backend": built,
        "attention_backend": runner.server_args.attention_backend,
    }


def main(folder: str, budget: int, points: list[str]) -> None:
    """Load the model, fill the cache, run steps."""
    model_runner.settings_for(budget)
    runner = model_runner.load_runner(
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
    model_runner.check_room(runner, chosen)
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    model_runner.fill_cache(runner.token_to_kv_pool, seed=0)
    with torch.no_grad():
        found = {str(point): compare(runner, point) for point in chosen}
    facts = model_runner.model_facts(runner)
    sys.stdout.write("\n" + json.dumps({"points": found, "facts": facts}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
