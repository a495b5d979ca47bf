"""Samples for tests of what happens to them afterwards."""

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
    """A sample that says its answer; a failed one has the error."""
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
