"""One chain of thought, and its answer: what the others are compared with.

Also a script: `python programs/single.py QUESTION`.
"""

from collections.abc import Sequence
from typing import Any

import sglang as sgl

from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.stopping import Never


@sgl.function
def single(s: Any, run: SamplingRun, indices: Sequence[int]) -> None:
    """Draw one sample."""
    add_messages(s, run.question.messages)
    run.sample(s, indices, Never())


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("single")
