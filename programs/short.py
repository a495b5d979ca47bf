"""short-m@k: of k samples, the first m to finish vote, and a tie goes to the shorter chain.

Source: `stopping.FirstRule`, after Hassid et al., "Don't Overthink it", arXiv 2505.17813. All k
should be in flight at the same time: a sample that waits cannot finish first.
Also a script: `python programs/short.py QUESTION --samples 8`.
"""

from collections.abc import Sequence
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.stopping import FirstRule


@sgl.function
def short(s: Any, run: SamplingRun, indices: Sequence[int], wanted: int) -> None:
    """Generate all samples, and abort the rest once `wanted` have finished."""
    add_messages(s, run.question.messages)
    run.sample(s, indices, FirstRule(wanted))


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("short")
