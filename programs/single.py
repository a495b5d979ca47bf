"""One chain of thought and its answer: the baseline of the other programs.

Also a script: `python programs/single.py QUESTION`.
"""

from collections.abc import Sequence
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages


@sgl.function
def single(s: Any, run: SamplingRun, indices: Sequence[int]) -> None:
    """Generate one sample."""
    add_messages(s, run.question.messages)
    run.sample(s, indices)


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("single")
