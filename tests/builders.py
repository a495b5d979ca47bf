"""Plain objects for tests: samples, graded samples, an equivalence of texts, a terminal."""

import io
from dataclasses import replace
from typing import Any, Self

from lim_sglang.evals.run_store import GradedSample
from lim_sglang.programs.schema import Sample, SampleState


def make_sample(
    index: int,
    answer: str | None,
    state: SampleState = SampleState.FINISHED,
    *,
    num_tokens: int = 10,
    confidence: float | None = None,
    error: str = "connection refused",
    tokens_at_least: bool = False,
) -> Sample:
    """Return a sample that says its answer; a failed one has the error."""
    return Sample(
        index=index,
        state=state,
        text=f"It is {answer}.",
        answer=answer,
        num_tokens=num_tokens,
        latency_s=1.5,
        seed=None,
        seed_honoured=False,
        rid=f"r{index}",
        error=error if state is SampleState.FAILED else None,
        confidence=confidence,
        tokens_at_least=tokens_at_least,
    )


def make_graded(
    index: int = 0,
    question_id: str = "q",
    answer: str | None = "4",
    gold: str = "4",
    **changes: Any,
) -> GradedSample:
    """Return a graded sample; `changes` are fields of its `Sample`."""
    sample = replace(make_sample(index, answer), **changes)
    return GradedSample(question_id, gold, answer == gold, sample)


class TextEquivalence:
    """Stand-in for math-verify: answers are equal if their texts are."""

    def equivalent(self, a: str, b: str) -> bool:
        return a == b

    def warm_up(self) -> None:
        """Start nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Screen(io.StringIO):
    """A text file that is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True
