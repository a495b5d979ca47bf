"""Functions that tests run in the processes of ranks; light, since each process imports them."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lim_sglang.bench.ranks import Rank, run_ranks
from lim_sglang.errors import LimError

BUDGET, LENGTH, SEED = 32, 200, 5


def set_nothing_up() -> None:
    """Leave a rank's process as it is."""


def act(
    folder: str, ends: Mapping[int, str], report: Callable[[str], None], rank: Rank
) -> Iterator[tuple[int, int]]:
    """Yield the rank twice, then do as told: return, die, wait forever, or fail with a text.

    Args:
        folder: gets a file for each rank, named by its process.
        ends: what each rank does; a text that ends with `!` is that of an error in the code.
    """
    Path(folder, str(os.getpid())).touch()
    report(f"rank {rank.number} of {rank.size}")
    yield rank.number, 1
    yield rank.number, 2
    match ends.get(rank.number, "return"):
        case "return":
            return
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            threading.Event().wait()
        case text if text.endswith("!"):
            raise RuntimeError(text)
        case text:
            raise LimError(text)


def decode_on_cpu(folder: str, report: Callable[[str], None], rank: Rank) -> Iterator[Any]:
    """Load a model by all ranks, run a sparse step on the CPU, and yield what the ranks find."""
    from lim_sglang import compat

    os.environ |= {compat.CPU_ENGINE_VAR: "1"}
    import torch

    from lim_sglang.bench import model_runner
    from lim_sglang.bench.workloads import Point
    from lim_sglang.config import BACKEND
    from lim_sglang.mends import bind_rank

    bind_rank(SimpleNamespace(server_args=SimpleNamespace(tp_size=rank.size)))
    model_runner.settings_for(BUDGET)
    runner = model_runner.load_runner(
        folder,
        backend=BACKEND,
        dummy=False,
        mem_fraction_static=0.3,
        batch_sizes=(1,),
        rank=rank,
        device="cpu",
        dtype="float32",
        max_total_tokens=1024,
        max_running_requests=2,
    )
    model_runner.make_contender(runner, BACKEND)
    model_runner.fill_cache(runner.token_to_kv_pool, SEED + rank.number)
    ranks = compat.Ranks.of_runner(runner)
    with torch.no_grad(), model_runner.filled_batch(runner, Point((LENGTH,)), SEED) as batch:
        logits = model_runner.run_step(runner, batch)
        (kept,) = runner.attn_backend.kept
        found = {
            "keys": runner.token_to_kv_pool.k_buffer[0].flatten(),
            "slots": batch.slots[0],
            "logits": logits.flatten(),
            "kept": kept.flatten(),
        }
        same = {
            name: bool((each := of_all(ranks, part)).eq(each[0]).all())
            for name, part in found.items()
        }
    facts = model_runner.model_facts(runner)
    yield {
        "same": same,
        "kept": kept.numel(),
        "finite": bool(logits.isfinite().all()),
        "sparse_rows": runner.lim_stats.sparse_rows,
        "ranks": of_all(ranks, torch.tensor([ranks.rank])).flatten().tolist(),
        "heads": (facts["heads"], facts["kv_heads"]),
    }


def of_all(ranks: Any, part: Any) -> Any:
    """Return the parts of all ranks, [ranks, n], of one part, [n], a rank of `compat.Ranks`."""
    parts = part.new_empty(ranks.size, len(part))
    ranks.gather_into(part.contiguous(), parts)
    return parts


if __name__ == "__main__":
    for item in run_ranks(act, (sys.argv[1], {0: "wait", 1: "wait"}), 2, print, set_nothing_up):
        sys.stdout.write(f"{item}\n")
        sys.stdout.flush()
