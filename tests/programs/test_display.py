"""The vote as a person sees it."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from lim_sglang.programs.ask import (
    SHOWN,
    VoteDisplay,
    answer_so_far,
    describe,
    pace,
    running_table,
    standing,
    verdict,
)
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.program import Outcome, outcome_record
from lim_sglang.programs.schema import Sample, SampleState
from lim_sglang.programs.vote import tally
from tests.builders import make_sample

SAMPLES = [
    make_sample(0, "391"),
    make_sample(1, "[bold]"),
    make_sample(2, "391"),
    make_sample(3, None),
    make_sample(4, None, SampleState.TRUNCATED),
    make_sample(5, None, SampleState.FAILED, num_tokens=0, error="HTTP 503"),
]


def equivalent(a: str, b: str) -> bool:
    """Equality of texts."""
    return a == b


def outcome(
    samples: list[Sample], *, num_asked: int | None = None, settled: bool = False
) -> Outcome:
    """What a program made of a question."""
    vote = tally(samples, equivalent)
    return Outcome(tuple(samples), vote, num_asked or len(samples), settled, 12.34)


def shown(samples: list[Sample], *, terminal: bool) -> str:
    """What the display writes while samples come in."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100)
    with VoteDisplay(console, len(samples), equivalent) as display:
        for one in samples:
            display.add(one)
    return output.getvalue()


@pytest.mark.parametrize(
    ("index", "line"),
    [
        (0, "391  (10 tokens, 1.5 s)"),
        (3, "no answer  (10 tokens, 1.5 s)"),
        (4, "no answer  (10 tokens, 1.5 s, cut off)"),
        (5, "failed: HTTP 503"),
    ],
)
def test_a_sample_is_told_in_one_line(index: int, line: str) -> None:
    assert describe(SAMPLES[index]) == line


def test_the_standing_counts_every_sample_once() -> None:
    assert (
        standing(tally(SAMPLES, equivalent))
        == "391: 2, [bold]: 1, no answer: 1, cut off: 1, failed: 1"
    )


def test_the_verdict_says_answer_votes_failures_tokens_and_seconds() -> None:
    line = verdict(outcome(SAMPLES))
    assert line == "answer: 391  (2 of 6 votes, 1 failed, 50 tokens, 12.3 s)"


def test_the_verdict_of_a_settled_vote_says_what_it_saved() -> None:
    stopped = make_sample(6, None, SampleState.ABORTED, num_tokens=4)
    line = verdict(outcome([*SAMPLES[:3], stopped], num_asked=6, settled=True))
    assert line == "answer: 391  (2 of 3 votes, 34 tokens, about 26 saved, 12.3 s)"


def test_tokens_that_nobody_counted_are_at_least_so_many() -> None:
    lost = make_sample(6, None, SampleState.ABORTED, num_tokens=0, tokens_at_least=True)
    assert describe(lost) == "stopped  (at least 0 tokens, 1.5 s)"
    line = verdict(outcome([SAMPLES[0], lost], settled=True))
    assert line.startswith("answer: 391  (1 of 1 votes, at least 10 tokens, about 10 saved")
    assert outcome_record(outcome([SAMPLES[0], lost]))["tokens_spent_at_least"]
    assert not outcome_record(outcome(SAMPLES))["tokens_spent_at_least"]


def test_a_vote_without_answers_is_said_to_have_none() -> None:
    silent = SAMPLES[3:5]
    assert verdict(outcome(silent)).startswith("no answer  (0 of 2 votes, ")


def test_without_a_terminal_each_sample_is_a_line_with_the_vote_so_far() -> None:
    lines = shown(SAMPLES, terminal=False).splitlines()
    assert len(lines) == len(SAMPLES)
    assert lines[2] == "3/6  391  (10 tokens, 1.5 s)  |  391: 2, [bold]: 1"


def test_on_a_terminal_the_vote_stands_at_the_end_and_markup_in_answers_is_text() -> None:
    output = shown(SAMPLES, terminal=True)
    assert "[bold]" in output
    assert "██" in output
    assert "6/6" in output


def test_running_samples_are_shown_with_their_tokens_and_states() -> None:
    samples = [InFlightSample(index) for index in range(SHOWN + 5)]
    for sample in samples[:-1]:
        sample.has_started = True
    for sample in samples:
        sample.begin_try(lambda: "")
    samples[0].begin_try(lambda: r"so \boxed{391}. Wait, \boxed{40")
    samples[0].num_tokens = 1200
    samples[0]._sent_s = time.monotonic() - 30.0
    samples[1].num_tokens = 7
    samples[1].cancel()
    output = io.StringIO()
    Console(file=output, width=80).print(running_table(samples))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert lines[0] == ["sample", "tokens", "tokens/s", "state", "answer", "so", "far"]
    assert lines[1] == ["0", "1,200", "40.0", "running", "391"]
    assert (lines[2][:2], lines[2][3:]) == (["1", "7"], ["ending"])
    assert lines[3] == ["2", "0", "0.0", "waiting"]
    assert lines[1 + SHOWN] == ["…", "4", "more"]  # one has not been sent yet
    assert pace(1207, 10.0) == "1,207 tokens so far, 121 a second"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, no, \boxed{[red]} it is", "[red]"),
        (r"\boxed{1}, no, \boxed{\frac{1}{2", "1"),
        (r"\boxed{1} within \boxed{}, so \boxed{", "1"),
        (r"\boxed{7}</think>It is", "7"),
        (r"the answer is 5", ""),
        ("", ""),
    ],
)
def test_the_answer_so_far_is_the_last_box_that_is_closed(text: str, answer: str) -> None:
    assert answer_so_far(text) == answer


def test_a_long_text_keeps_no_table_waiting() -> None:
    texts = [r"\boxed{1}" + " so what" * 300_000, r"\boxed{}" * 50_000, r"\boxed{1" * 20_000]
    start_s = time.process_time()
    for text in texts * 20:
        answer_so_far(text)
    assert time.process_time() - start_s < 1.0  # of which reading all of it would take seconds


def test_on_a_terminal_running_samples_stand_below_the_vote() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    in_flight = InFlightSample(3)
    in_flight.has_started, in_flight.num_tokens = True, 77
    in_flight.begin_try(lambda: r"\boxed{12345}")
    with VoteDisplay(console, 2, equivalent) as display:
        display.begin(SimpleNamespace(in_flight={3: in_flight}, spent_tokens=87))
        display.add(SAMPLES[0])
        display._live.refresh()
    assert "87 tokens so far" in output.getvalue()
    assert "12345" in output.getvalue()
