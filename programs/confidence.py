"""DeepConf, online: chains of low confidence are aborted, and the others vote by confidence.

Source, and our choices where the paper is silent: `stopping.ConsensusRule` and `GroupConfidence`,
after Fu et al., "Deep Think with Confidence", arXiv 2508.15260. A warm-up of complete chains gives
the threshold under which later chains are aborted. Asks the server for log-probabilities.
Also a script: `python programs/confidence.py QUESTION --samples 32`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.schema import COMPLETED_STATES
from lim_sglang.programs.stopping import (
    ConsensusRule,
    GroupConfidence,
    confidence_threshold,
)


@sgl.function
def confidence(
    s: Any,
    run: SamplingRun,
    indices: Sequence[int],
    warm_up: int,
    keep: float,
    agreement: float,
    window: int,
) -> None:
    """Generate the warm-up completely, then the rest until the leader's share is large enough.

    `keep` is the paper's eta: 0.1 is DeepConf-low, 0.9 DeepConf-high.
    """
    rule = ConsensusRule(agreement, warm_up)
    measure = partial(GroupConfidence, window)

    add_messages(s, run.question.messages)
    run.sample(s, indices[:warm_up], confidence=measure)
    completed = [sample for sample in run.ended if sample.state in COMPLETED_STATES]
    rest = indices[warm_up:]
    if not rest or not completed or run.settles(rule):
        return
    lowest = [sample.confidence for sample in completed if sample.confidence is not None]
    threshold = confidence_threshold(lowest, keep)
    run.sample(s, rest, rule, confidence=measure, threshold=threshold)


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("confidence")
