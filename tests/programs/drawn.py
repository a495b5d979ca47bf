"""A program on a fake server, in one call."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

from lim_sglang.programs.drawing import Question
from lim_sglang.programs.endpoint import Endpoint
from lim_sglang.programs.majority import MAJORITY
from lim_sglang.programs.program import Outcome, Program, run_program
from lim_sglang.programs.prompts import ask_messages
from lim_sglang.programs.records import Sample, Sampling
from tests.programs.fake_server import FakeServer

QUESTION = ask_messages("What is 17 * 23?")


def run_on(
    endpoint: Endpoint,
    count: int,
    on_sample: Callable[[Sample], None] = lambda _: None,
    *,
    program: Program = MAJORITY,
    parallel: int = 64,
    watched: bool | None = None,
    seeds_honoured: bool = False,
    options: dict[str, Any] | None = None,
    **sampling: Any,
) -> Outcome:
    """What a program makes of one question; answers are equal if their texts are."""
    question = Question(
        QUESTION,
        Sampling(**sampling),
        parallel,
        watched=program.watched if watched is None else watched,
        seeds_honoured=seeds_honoured,
    )
    return run_program(
        *(program, endpoint, question),
        indices=range(count),
        same=str.__eq__,
        options=options,
        on_sample=on_sample,
    )


def draw(
    fake: FakeServer, count: int, on_sample: Callable[[Sample], None] = lambda _: None, **how: Any
) -> Outcome:
    """The same, on an endpoint of its own."""
    with closing(Endpoint(fake.url)) as endpoint:
        return run_on(endpoint, count, on_sample, seeds_honoured=fake.deterministic, **how)
