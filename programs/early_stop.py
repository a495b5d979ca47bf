"""Early-stopping self-consistency: stop after a window of samples that all agree.

Source and guarantee: `stopping.WindowRule`, after Li et al., "Escape Sky-high Cost: Early-stopping
Self-Consistency for Multi-step Reasoning", arXiv 2401.10480. The samples of a window are generated
side by side; the next window begins only after all of them have ended.
Also a script: `python programs/early_stop.py QUESTION`.
"""

from collections.abc import Sequence
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.stopping import WindowRule, window_agrees


@sgl.function
def early_stop(s: Any, run: SamplingRun, indices: Sequence[int], window: int) -> None:
    """Generate window after window, until one agrees."""
    size = WindowRule(window).size
    add_messages(s, run.question.messages)
    for first in range(0, len(indices), size):
        num_before = len(run.ended)
        run.sample(s, indices[first : first + size])
        agrees = window_agrees(run.ended[num_before:], size, run.equivalent)
        if run.settled or (agrees and first + size < len(indices)):
            run.settled = True
            return


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("early_stop")
