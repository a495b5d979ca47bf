"""Run every kernel on its smallest cases: a script for compute-sanitizer (`make sanitize-gpu`)."""

import torch

from lim_sglang.kernels.verify import (
    Batch,
    mass_differences,
    selection_differences,
    stored_score_differences,
)
from lim_sglang.kernels.verify_attention import attention_differences, run_attention_differences

BATCHES = (
    Batch((90, 40, 1), 4, 2, 64, 32),
    Batch((70,), 9, 3, 64, 37, dtype=torch.bfloat16, levels=2),
    Batch((60, 90), 4, 4, 64, 50, heads_agree=True),  # full rankings decide
)
RUNS = Batch((5, 700, 64), 4, 2, 64, dtype=torch.bfloat16)


def main() -> None:
    """Run the kernels; a difference is an error, too."""
    checks = (selection_differences, mass_differences, attention_differences)
    found = [problem for batch in BATCHES for check in checks for problem in check(batch, "cuda")]
    found += stored_score_differences(BATCHES[0])
    for width in (1, 5):
        found += run_attention_differences(RUNS, "cuda", width)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
