"""A program on a fake server, in one call."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from lim_sglang.programs.program import PROGRAMS, Outcome, Program, run_program
from lim_sglang.programs.schema import Sample, Sampling, SamplingRequest, ask_messages
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import Answerer, FakeServer, eventually

MAJORITY = PROGRAMS["majority"]

QUESTION = ask_messages("What is 17 * 23?")


def run_on(
    backend: SglangBackend,
    count: int,
    on_sample: Callable[[Sample], None] = lambda _: None,
    *,
    program: Program = MAJORITY,
    parallel: int = 64,
    streamed: bool | None = None,
    seeds_honoured: bool = False,
    options: dict[str, Any] | None = None,
    **sampling: Any,
) -> Outcome:
    """What a program makes of one question; answers are equal if their texts are."""
    question = SamplingRequest(
        QUESTION,
        Sampling(**sampling),
        parallel,
        streamed=program.streamed if streamed is None else streamed,
        seeds_honoured=seeds_honoured,
    )
    return run_program(
        *(program, backend, question),
        indices=range(count),
        equivalent=str.__eq__,
        options=options,
        on_sample=on_sample,
    )


def draw(
    fake: FakeServer, count: int, on_sample: Callable[[Sample], None] = lambda _: None, **how: Any
) -> Outcome:
    """The same, on an endpoint of its own."""
    with closing(SglangBackend(fake.url)) as backend:
        return run_on(backend, count, on_sample, seeds_honoured=fake.deterministic, **how)


def by_sample(answers: Mapping[int, Any], usual: Any = None) -> Answerer:
    """What each sample is answered, by its seed."""
    return lambda body: answers.get(body["seed"], usual)


def asked(fake: FakeServer) -> Counter[int]:
    """How often each sample was asked for, by its seed."""
    return Counter(body["seed"] for body in fake.requests)


def states(outcome: Outcome) -> list[str]:
    """Of the samples, by index."""
    return [str(sample.state) for sample in outcome.samples]


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    """Of the frontend, the endpoint or the fake server, when the block has ended."""
    before = set(threading.enumerate())
    yield

    def left() -> list[threading.Thread]:
        # Those of a pool wait for more work until the process ends.
        new = set(threading.enumerate()) - before
        return [thread for thread in new if not thread.name.startswith("ThreadPool")]

    assert eventually(lambda: not left()), left()
