"""Early-stopping self-consistency: stop after a window of samples that all agree.

Source and guarantee: `stopping.WindowRule`, after Li et al., "Escape Sky-high Cost: Early-stopping
Self-Consistency for Multi-step Reasoning", arXiv 2401.10480. A window is drawn side by side, the
next one only after all of it has ended. Also a script: `python programs/early_stop.py QUESTION`.
"""

from collections.abc import Sequence
from typing import Any

import sglang as sgl

from lim_sglang.programs.drawing import Drawing, add_messages
from lim_sglang.programs.program import Program
from lim_sglang.programs.stopping import Never, WindowRule


@sgl.function
def early_stop(s: Any, drawing: Drawing, indices: Sequence[int], window: int = 5) -> None:
    """Draw window by window, until one agrees."""
    rule = WindowRule(window)
    add_messages(s, drawing.question.messages)
    for first in range(0, len(indices), window):
        drawing.draw(s, indices[first : first + window], Never())
        if first + window < len(indices) and drawing.settles(rule):
            return


EARLY_STOP = Program(
    "early_stop",
    early_stop,
    stops_when="a window of samples agrees",
    source="ESC, arXiv 2401.10480",
)


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script(EARLY_STOP.name)
