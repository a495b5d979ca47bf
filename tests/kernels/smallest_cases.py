"""The kernels on their smallest cases, for compute-sanitizer."""

import torch

from lim_sglang.kernels.verify import (
    Batch,
    differences,
    differing_attention,
    differing_scoring,
    mass_differences,
)

BATCHES = (
    Batch((90, 40, 1), 4, 2, 64, 32),
    Batch((70,), 9, 3, 64, 37, dtype=torch.bfloat16, spread=2),
    Batch((60, 90), 4, 4, 64, 50, alike=True),  # whole rankings decide
)


def main() -> None:
    """Run every kernel; a difference is an error, too."""
    checks = (differences, mass_differences, differing_attention)
    found = [problem for batch in BATCHES for check in checks for problem in check(batch, "cuda")]
    found += differing_scoring(BATCHES[0])
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
