"""DeepConf, online: chains of low confidence are aborted, and the others vote by confidence.

Source and what is ours: `stopping.ConsensusRule` and `GroupConfidence`, after Fu et al., "Deep
Think with Confidence", arXiv 2508.15260. A warm-up of whole chains gives the threshold under which
later chains are aborted. Asks the server for log-probabilities. Also a script:
`python programs/confidence.py QUESTION --samples 32`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import sglang as sgl

from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.schema import COMPLETED_STATES
from lim_sglang.programs.stopping import (
    WINDOW,
    ConsensusRule,
    GroupConfidence,
    Never,
    confidence_threshold,
)


@sgl.function
def confidence(
    s: Any,
    run: SamplingRun,
    indices: Sequence[int],
    warm_up: int = 16,
    keep: float = 0.1,
    agreement: float = 0.95,
    window: int = WINDOW,
) -> None:
    """Draw the warm-up whole, then the rest under its threshold until the leader's share is enough.

    `keep` is the paper's eta: 0.1 is DeepConf-low, 0.9 DeepConf-high.
    """
    rule = ConsensusRule(agreement, warm_up)
    measure = partial(GroupConfidence, window)
    # What cannot be is refused before anything is drawn.
    measure()
    confidence_threshold([0.0], keep)
    add_messages(s, run.question.messages)
    run.sample(s, indices[:warm_up], Never(), confidence=measure)
    whole = [sample for sample in run.ended if sample.state in COMPLETED_STATES]
    rest = indices[warm_up:]
    if not rest or not whole or run.settles(rule):
        return
    lowest = [sample.confidence for sample in whole if sample.confidence is not None]
    threshold = confidence_threshold(lowest, keep)
    run.sample(s, rest, rule, confidence=measure, threshold=threshold)


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("confidence")
