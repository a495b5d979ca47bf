"""The samples of a question on SGLang's frontend: in flight, ended, aborted, and never more than
there are slots. As a script, it takes many samples at once and prints what that cost:

    python tests/programs/test_sampler.py URL COUNT
"""

import json
import re
import resource
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sglang.lang.interpreter import StreamExecutor

from lim_sglang.programs.backend import Backend
from lim_sglang.programs.program import PROGRAMS, Outcome, Program
from lim_sglang.programs.sampler import FrontendBackend, SamplingRun
from lim_sglang.programs.schema import Access, Sample
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import (
    Answerer,
    Chain,
    FakeServer,
    completion,
    endless,
    eventually,
    serving,
)
from tests.forked_commands import Forker
from tests.programs.harness import (
    WAIT_S,
    boxed,
    by_sample,
    in_thread,
    no_thread_is_left,
    run_at,
    run_on,
    states,
)

TOKENS = 20
MOST_LEFT = 3
"""Threads of a process whose samples have ended."""


@dataclass
class Site:
    """A fake server, a backend for it, and the runs of its questions."""

    fake: FakeServer
    backend: SglangBackend
    runs: list[SamplingRun] = field(default_factory=list)

    def run(self, *arguments: Any, **options: Any) -> Outcome:
        """Run a program on one question."""
        return run_on(self.backend, *arguments, on_begin=self.runs.append, **options)

    def start(self, *arguments: Any, **options: Any) -> Future[Outcome]:
        """Run a program on one question, in a thread of its own."""
        return in_thread(self.run, *arguments, **options)


@contextmanager
def site(answer: Answerer, max_concurrency: int = 64) -> Iterator[Site]:
    """Run a fake server and a backend; check that all slots are given back."""
    with (
        serving(answer) as fake,
        closing(SglangBackend(Access(fake.url, max_concurrency=max_concurrency))) as backend,
    ):
        found = Site(fake, backend)
        try:
            yield found
            assert eventually(lambda: backend.limiter.num_free == max_concurrency)
        finally:
            for run in found.runs:  # so that a failing test ends, too
                run.stop()


def test_a_busy_program_handles_samples_in_the_order_in_which_they_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = [3, 1, 4, 2]
    gates = {index: threading.Event() for index in order}
    handled: list[int] = []
    generated: list[Any] = []
    generate = FrontendBackend.generate

    def generate_and_note(*arguments: Any, **words: Any) -> Any:
        found = generate(*arguments, **words)
        generated.append(found)
        return found

    monkeypatch.setattr(FrontendBackend, "generate", generate_and_note)

    def note(sample: Sample) -> None:
        handled.append(sample.index)
        if sample.index == 0:
            # Meanwhile the others end, one after the other.
            for num_ended, index in enumerate(order, start=2):
                gates[index].set()
                assert eventually(lambda num_ended=num_ended: len(generated) == num_ended)

    chains = {index: Chain((), until=gate) for index, gate in gates.items()}
    with serving(by_sample(chains, completion(""))) as fake:
        outcome = run_at(fake, 5, note, seed=0)
    assert handled == [0, *order]
    assert [sample.index for sample in outcome.samples] == [0, 1, 2, 3, 4]


def test_questions_share_one_slot_and_all_come_to_their_end() -> None:
    with site(lambda _: completion(boxed("1")), max_concurrency=1) as at:
        futures = [at.start(6, program=program, seed=0) for program in PROGRAMS.values()]
        outcomes = [future.result(WAIT_S) for future in futures]
    assert at.fake.most_running == 1
    assert {outcome.vote.winner for outcome in outcomes} == {"1"}


def test_a_program_that_is_busy_with_a_sample_keeps_no_slot_from_another_question() -> None:
    busy, go_on = threading.Event(), threading.Event()

    def note(_: Sample) -> None:
        busy.set()
        assert go_on.wait(WAIT_S)

    with site(lambda _: completion(""), max_concurrency=1) as at:
        first = at.start(2, note)
        assert busy.wait(WAIT_S)
        assert len(at.start(3).result(WAIT_S).samples) == 3
        go_on.set()
        assert len(first.result(WAIT_S).samples) == 2


def test_a_run_that_another_thread_stops_aborts_its_samples_and_ends() -> None:
    with site(lambda _: endless("so")) as at:
        future = at.start(5, parallel=2)
        assert eventually(lambda: at.fake.in_flight == 2)
        at.runs[0].stop()
        outcome = future.result(WAIT_S)
    assert outcome.settled
    assert states(outcome) == ["aborted", "aborted"]
    assert len(at.fake.requests) == 2


def test_a_run_that_waits_for_a_slot_is_stopped_at_once() -> None:
    with site(lambda _: endless("so"), max_concurrency=2) as at:
        ahead = at.start(2)
        assert eventually(lambda: at.fake.in_flight == 2)
        behind = at.start(3)
        assert eventually(lambda: len(at.backend.limiter.waiting) == 1)
        at.runs[1].stop()
        assert behind.result(WAIT_S).samples == ()
        assert not ahead.done()
        at.runs[0].stop()
        ahead.result(WAIT_S)
    assert len(at.fake.requests) == 2


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_an_error_of_the_frontend_before_the_generation_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gen = StreamExecutor._execute_gen

    def break_later(executor: Any, expression: Any) -> None:
        if executor.variables["in_flight"].index > 1:
            raise RuntimeError("broken frontend")
        gen(executor, expression)

    monkeypatch.setattr(StreamExecutor, "_execute_gen", break_later)
    with no_thread_is_left(), site(lambda _: endless("so"), max_concurrency=5) as at:
        with pytest.raises(RuntimeError, match="broken frontend"):
            at.start(8).result(WAIT_S)
        assert eventually(lambda: at.fake.in_flight == 0)


def test_a_thread_that_cannot_be_started_costs_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(StreamExecutor, "fork", refuse)
    with site(lambda _: completion("")) as at, pytest.raises(RuntimeError, match="new thread"):
        at.run(3)


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_an_unexpected_error_of_the_backend_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Backend, "generate", fail)
    with site(lambda _: completion("")) as at, pytest.raises(ZeroDivisionError):
        at.start(3).result(WAIT_S)


def interrupt(_: Sample) -> None:
    """Raise what Ctrl-C raises in the program's thread."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_ctrl_c_aborts_the_samples_in_flight_and_leaves_no_thread(program: Program) -> None:
    answer = by_sample({0: completion(boxed("1"))}, endless("let me"))
    with no_thread_is_left(), site(answer) as at:
        with pytest.raises(KeyboardInterrupt):
            at.run(20, interrupt, program=program, parallel=8, seed=0)
        # The backend is still open: others may use it.
        assert eventually(lambda: at.fake.in_flight == 0)
        in_flight = {body["rid"] for body in at.fake.requests if body["seed"] != 0}
        assert set(at.fake.aborted) == in_flight
        assert len(in_flight) <= 7
        assert not at.fake.disconnected


def test_closing_the_backend_in_a_vote_fails_all_samples() -> None:
    with no_thread_is_left(), site(lambda _: endless("let me"), max_concurrency=2) as at:
        future = at.start(6, parallel=4, seed=0)
        assert eventually(lambda: at.fake.in_flight == 2)
        at.backend.close()
        outcome = future.result(WAIT_S)
        assert eventually(lambda: at.fake.in_flight == 0)
        assert set(at.fake.aborted) == {body["rid"] for body in at.fake.requests}
    assert states(outcome) == ["failed"] * 6


def killed_after(fake: FakeServer, count: int, num_sent: int) -> Any:
    """Kill the server once some samples have ended and it has received some requests."""
    ended: list[int] = []

    def note(sample: Sample) -> None:
        ended.append(sample.index)
        if len(ended) == count:
            assert eventually(lambda: len(fake.requests) == num_sent)
            fake.kill()

    return note


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_killed_in_mid_vote_takes_no_finished_sample_with_it(streamed: bool) -> None:
    good = {index: completion("\\boxed{391}") for index in range(3)}
    with site(by_sample(good, endless("so ", "far"))) as at:
        outcome = at.run(8, killed_after(at.fake, 3, 8), seed=0, streamed=streamed)
    assert states(outcome) == ["finished"] * 3 + ["failed"] * 5
    assert outcome.elapsed_s < 3.0
    assert (outcome.vote.winner, outcome.vote.votes, outcome.vote.failed) == ("391", 3, 5)
    assert [sample.tokens_at_least for sample in outcome.samples] == [False] * 3 + [True] * 5
    for sample in outcome.samples[3:]:
        assert re.search("went away in mid-answer, and no server|was lost", str(sample.error))


def test_samples_that_had_not_begun_when_the_server_died_fail_too() -> None:
    with site(lambda _: completion("\\boxed{391}")) as at:
        outcome = at.run(6, killed_after(at.fake, 2, 2), seed=0, parallel=1)
    assert states(outcome) == ["finished"] * 2 + ["failed"] * 4
    assert not outcome.spent_at_least  # no server was there to generate anything


def test_512_samples_at_once_take_a_thread_and_little_memory_each(
    forker: Forker, tmp_path: Path
) -> None:
    chain = Chain((*["hm "] * (TOKENS - 1), "\\boxed{391}"), pace_s=0.02)
    with serving(lambda _: chain) as fake:
        code, command = forker.run(tmp_path, __file__, fake.url, "512")
        assert code == 0, command.error
    record = json.loads(command.output)
    assert record["states"] == {"finished": 512}
    assert record["tokens"] == 512 * TOKENS
    assert len({body["rid"] for body in fake.requests}) == 512
    assert not fake.aborted
    assert record["threads"] <= 512 + 8
    assert record["grown_bytes"] < 100e6
    assert record["end"], f"more than {MOST_LEFT} threads are left"
    assert record["seconds"] < 30


def peak_bytes() -> int:
    """Return the most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_many(url: str, count: int) -> None:
    """Take this number of samples at once, and print what that cost."""
    threads: list[int] = []
    before_bytes = peak_bytes()
    with closing(SglangBackend(Access(url, max_concurrency=count))) as backend:
        outcome = run_on(
            backend,
            count,
            lambda _: threads.append(threading.active_count()),
            parallel=count,
            seed=0,
            streamed=True,
        )
    record = {
        "threads": max(threads),
        "grown_bytes": peak_bytes() - before_bytes,
        "seconds": outcome.elapsed_s,
        "states": Counter(states(outcome)),
        "tokens": outcome.spent_tokens,
        "end": eventually(lambda: threading.active_count() <= MOST_LEFT),
    }
    sys.stdout.write(json.dumps(record))


if __name__ == "__main__":
    take_many(sys.argv[1], int(sys.argv[2]))
