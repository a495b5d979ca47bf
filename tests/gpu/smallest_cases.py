"""The kernels on their smallest cases, for compute-sanitizer."""

import torch

from lim_sglang.kernels.check import Batch, differences

BATCHES = (
    Batch((90, 40, 1), 4, 2, 64, 32),
    Batch((70,), 9, 3, 64, 37, dtype=torch.bfloat16, spread=2),
    Batch((60, 90), 4, 4, 64, 50, alike=True),  # whole rankings decide
)


def main() -> None:
    """Run every kernel; a difference is an error, too."""
    found = [difference for batch in BATCHES for difference in differences(batch, "cuda")]
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
