"""Results of questions for tests of scores and comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.programs.schema import SampleState

CONDITIONS: Mapping[str, Any] = {
    "task": "sums",
    "questions": "digest",
    "model": "tiny",
    "policy": "full",
    "budget": None,
    "program": "majority",
}


def result(
    name: str,
    groups: Sequence[int | None],
    right: int | None = 0,
    *,
    states: Mapping[int, SampleState] = {},
    late: Sequence[int] = (),
    tokens: Sequence[int] | None = None,
    chosen: int | None = None,
) -> QuestionResult:
    """A question whose samples gave these groups of answers, of which one is right.

    Samples are of 10, 20, … tokens where nothing else is said, and finished.
    """
    count = len(groups)
    return QuestionResult(
        question_id=name,
        indices=tuple(range(count)),
        correct=tuple(group is not None and group == right for group in groups),
        group=tuple(groups),
        states=tuple(states.get(n, SampleState.FINISHED) for n in range(count)),
        tokens=tuple(tokens or (10 * (n + 1) for n in range(count))),
        late=tuple(n in late for n in range(count)),
        chosen=chosen,
    )


def summary(*questions: QuestionResult, num_failed: int = 0, **conditions: Any) -> Summary:
    """A run of these questions."""
    return Summary("run", {**CONDITIONS, **conditions}, questions, num_failed)
