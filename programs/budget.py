"""A token budget for all samples of a question: those that have finished when it is spent vote.

The method of no paper, but the baseline that others are compared with at equal cost. Four samples
are in flight unless the caller says otherwise, so that some have finished by then.
Also a script: `python programs/budget.py QUESTION --set tokens=8192`.
"""

from collections.abc import Sequence
from typing import Any

from lim_sglang.frontend import sgl
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.stopping import TokenBudgetRule


@sgl.function
def budget(s: Any, run: SamplingRun, indices: Sequence[int], tokens: int) -> None:
    """Generate samples until all of them together have generated `tokens` tokens."""
    add_messages(s, run.question.messages)
    run.sample(s, indices, TokenBudgetRule(tokens))


if __name__ == "__main__":
    from lim_sglang.programs.ask import run_script

    run_script("budget")
