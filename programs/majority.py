"""Self-consistency: several chains of thought for one question, and the most frequent answer.

Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
arXiv 2203.11171. Also a script: `python programs/majority.py QUESTION --samples 8`.
"""

from collections.abc import Sequence
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages


@sgl.function
def majority(s: Any, run: SamplingRun, indices: Sequence[int]) -> None:
    """Generate all samples."""
    add_messages(s, run.question.messages)
    run.sample(s, indices)


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("majority")
