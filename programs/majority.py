"""Self-consistency: several chains of thought for one question, and the answer most of them give.

Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
arXiv 2203.11171. Also a script: `python programs/majority.py QUESTION --samples 8`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import sglang as sgl

from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.endpoint import SEED, Endpoint, Generation
from lim_sglang.programs.prompts import MATH_PROMPT
from lim_sglang.programs.records import Sample, SampleState, Sampling

SOLUTION = "solution"
WAVE = 64
"""Chains that run at the same time: the frontend starts a thread for each."""
POLL_S = 0.02
"""The frontend tells of the end of a branch only to those who wait for this one branch."""


@sgl.function
def majority(  # type: ignore[no-untyped-def]  # its state has no public type
    s,
    question: str,
    indices: Sequence[int],
    sampling: Sampling,
    on_sample: Callable[[Sample], None],
) -> None:
    """Draw the samples `indices` of one question, each in a branch of its own."""
    s += sgl.user(MATH_PROMPT.format(question=question))
    left = iter(indices)
    while wave := list(islice(left, WAVE)):
        branches = s.fork(len(wave))
        for index, branch in zip(wave, branches, strict=True):
            branch[SEED] = seed_of(sampling, index)
            branch += sgl.assistant(
                sgl.gen(
                    SOLUTION,
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                )
            )
        for place in _as_they_end([branch.stream_executor for branch in branches]):
            on_sample(_read_sample(branches[place], wave[place]))
        branches.join()


def run_majority(
    endpoint: Endpoint,
    question: str,
    *,
    indices: Sequence[int],
    sampling: Sampling,
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Draw samples of one question and return them in the order of `indices`.

    Args:
        indices: which samples; they give each its seed and its name.
        on_sample: called with each sample as it ends, in the caller's thread.
    """
    samples: dict[int, Sample] = {}
    honoured = sampling.seed is not None and endpoint.honours_seeds

    def deliver(sample: Sample) -> None:
        sample = replace(sample, seed_honoured=honoured)
        samples[sample.index] = sample
        on_sample(sample)

    majority.run(
        question=question,
        indices=tuple(indices),
        sampling=sampling,
        on_sample=deliver,
        backend=endpoint,
    )
    return [samples[index] for index in indices]


def seed_of(sampling: Sampling, index: int) -> int | None:
    """The seed that one sample is sent."""
    return None if sampling.seed is None else sampling.seed + index


def _as_they_end(executors: Sequence[Any]) -> Iterator[int]:
    """The places of the branches, in the order in which their generations end."""
    running = dict(enumerate(executors))
    while running:
        ended = [n for n, e in running.items() if e.variable_event[SOLUTION].is_set()]
        for place in ended:
            del running[place]
            yield place
        if not ended:
            time.sleep(POLL_S)


def _read_sample(branch: Any, index: int) -> Sample:
    """The sample of a branch whose generation has ended.

    Raises:
        Exception: whatever ended the branch, when that was no failure of the server.
    """
    found: Generation | None = branch.get_meta_info(SOLUTION)
    if found is None:
        raise branch.error()
    state = SampleState.TRUNCATED if found.truncated else SampleState.FINISHED
    return Sample(
        index=index,
        state=state if found.error is None else SampleState.FAILED,
        text=found.text,
        answer=extract_answer(found.text),
        num_tokens=found.num_tokens,
        latency_s=found.latency_s,
        seed=branch[SEED],
        seed_honoured=False,
        rid=found.rid,
        error=found.error,
    )


if __name__ == "__main__":
    import typer

    from lim_sglang.errors import errors_in_words
    from lim_sglang.programs.ask import ask

    with errors_in_words():
        typer.run(ask)
