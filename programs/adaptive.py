"""Adaptive-Consistency: stop once the leading answer is probably the more frequent one.

Source, criterion and guarantee: `stopping.PosteriorRule`, after Aggarwal et al., "Let's Sample Step
by Step", arXiv 2305.11860. The paper generates at most 40 samples, one after the other; here eight
are in flight unless the caller says otherwise, and samples that are not needed are aborted.
Also a script: `python programs/adaptive.py QUESTION --samples 40`.
"""

from collections.abc import Sequence
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.stopping import PosteriorRule


@sgl.function
def adaptive(s: Any, run: SamplingRun, indices: Sequence[int], confidence: float) -> None:
    """Generate samples until the leader beats the second answer with this posterior probability."""
    add_messages(s, run.question.messages)
    run.sample(s, indices, PosteriorRule(confidence))


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("adaptive")
