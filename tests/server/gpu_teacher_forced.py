"""A real model, served and by the oracle, fed the same tokens; prints how far they are apart.

Run by `test_oracle.py` in a process of its own for each model.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.server.gpu_rig import Rig
from tests.server.oracle import Oracle
from tests.server.prompts import story

NUM_PROMPTS, NUM_STEPS = 20, 64
BUDGET = 256


@dataclass(frozen=True)
class Distance:
    """Of two runs over the same positions."""

    top1: float
    """Share of positions with the same likeliest token."""
    kl: float
    """KL(oracle ‖ served) of the next token, in nats, mean over positions."""


def distance(oracle: Tensor, served: Tensor) -> Distance:
    """Compare logits [B, n, V]."""
    expected, found = oracle.float().log_softmax(-1), served.float().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    same = (oracle.argmax(-1) == served.argmax(-1)).float().mean()
    return Distance(float(same), float(kl))


def make_prompts(model: Path) -> list[list[int]]:
    """Stories of 300 to 1,400 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(2)
    stories = [story(rng.randrange(22, 95), 7000 + n) for n in range(NUM_PROMPTS)]
    return [tokenizer(text)["input_ids"] for text in stories]


def by_oracle(
    model: Path,
    select: Sequence[int],
    prompts: list[list[int]],
    forced: list[list[int]] | None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, list[list[int]]]:
    """Logits of the decode steps [B, n, V], and the tokens that were fed."""
    oracle = Oracle(model, select_layers=select, budget=BUDGET, dtype=dtype, device="cuda")
    logits, fed = [], []
    for number, prompt in enumerate(prompts):
        run = oracle.generate(prompt, NUM_STEPS, forced=forced[number] if forced else None)
        logits.append(oracle.logits().half())
        fed.append(list(run.tokens))
    return torch.stack(logits), fed


def main() -> None:
    """`MODEL SELECT_LAYERS`, the layers separated by commas."""
    model, select = Path(sys.argv[1]), [int(layer) for layer in sys.argv[2].split(",")]
    prompts = make_prompts(model)
    dense, forced = by_oracle(model, (), prompts, None)
    sparse, _ = by_oracle(model, select, prompts, forced)
    exact, _ = by_oracle(model, select, prompts, forced, torch.float32)
    rig = Rig(model)
    rig.use_dense()
    served_dense = rig.teacher_forced(prompts, forced)
    rig.use_lim(BUDGET, select)
    served_sparse = rig.teacher_forced(prompts, forced)
    rig.use_lim(BUDGET, [select[0], select[1] + 3])
    served_otherwise = rig.teacher_forced(prompts, forced)
    found = {
        "dense": asdict(distance(dense, served_dense)),
        "lim": asdict(distance(exact, served_sparse)),
        "oracle_in_fp16": asdict(distance(exact, sparse)),
        "dense_oracle_to_lim": asdict(distance(dense, served_sparse)),
        "oracle_to_other_select_layers": asdict(distance(sparse, served_otherwise)),
        "shortest": min(map(len, prompts)),
        "longest": max(map(len, prompts)) + NUM_STEPS,
    }
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
