"""Servers that fail: each sample has a clear state, and the others do not notice."""

import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from lim_sglang.programs import backend
from lim_sglang.programs import sglang_backend as endpoint_module
from lim_sglang.programs.http_client import Backoff
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import Sample, SampleState
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import FakeServer, completion, eventually, serving
from tests.programs.chains import CUT, Chain, Raw, endless
from tests.programs.drawn import asked, by_sample, draw, run_on, states

BUDGET = PROGRAMS["budget"]
CONFIDENCE = PROGRAMS["confidence"]

ERROR = Raw('data: {"error": {"object": "error", "message": "out of memory", "code": 503}}')
MALFORMED = Raw('data: {"choices": [{"delta"')
FOREIGN = Raw('data: {"choices": [{"text": "a completion of the old kind"}]}')
KEEP_ALIVE = Raw(": ping")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKOFF", Backoff(tries=3, first_s=0.01))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (MALFORMED, "the stream is no chat completion"),
        (FOREIGN, "the stream is no chat completion"),
        (ERROR, "the server ended the stream: out of memory"),
        (CUT, "was lost"),
    ],
    ids=["malformed", "foreign", "error", "cut"],
)
def test_a_broken_stream_is_tried_again_and_then_fails_in_words(fault: Raw, words: str) -> None:
    broken = Chain(("so ", "far ", fault, "on"))
    good = Chain(("\\boxed{391}",))
    with serving(by_sample({1: broken}, good)) as fake:
        outcome = draw(fake, 3, seed=0, streamed=True)
        assert eventually(lambda: fake.in_flight == 0)
    assert states(outcome) == ["finished", "failed", "finished"]
    assert words in str(outcome.samples[1].error)
    assert outcome.samples[1].answer is None
    assert outcome.samples[1].num_tokens == 2
    assert outcome.vote.votes == 2
    assert outcome.vote.failed == 1
    assert asked(fake) == {0: 1, 1: 3, 2: 1}
    # What the server may still be busy with, it is told to drop.
    broken_rids = {body["rid"] for body in fake.requests if body["seed"] == 1}
    assert set(fake.aborted) == broken_rids


@pytest.mark.parametrize("fault", [MALFORMED, ERROR, CUT], ids=["malformed", "error", "cut"])
def test_a_stream_that_breaks_once_is_whole_at_the_next_try(fault: Raw) -> None:
    chains = iter([Chain(("lost ", fault)), Chain(("\\boxed", "{391}"))])
    with serving(lambda _: next(chains)) as fake:
        (sample,) = draw(fake, 1, streamed=True).samples
    assert (sample.text, sample.num_tokens, sample.error) == ("\\boxed{391}", 2, None)
    assert sample.tokens_at_least  # the try that broke took some, too


def test_the_confidence_of_a_sample_is_that_of_its_last_try() -> None:
    chains = iter(
        [
            Chain(("a", "b", CUT), confidences=(0.5, 0.5)),
            Chain(("c", "d"), confidences=(8.0, 4.0)),
        ]
    )
    with serving(lambda _: next(chains)) as fake:
        (sample,) = draw(fake, 1, program=CONFIDENCE).samples
    assert sample.confidence == pytest.approx(6.0)


def test_a_stream_may_hold_what_is_no_event_and_any_character() -> None:
    pieces = ("a\u2028b", KEEP_ALIVE, "\x85", "\\boxed{", "7}")
    with serving(lambda _: Chain(pieces)) as fake:
        (sample,) = draw(fake, 1, streamed=True).samples
    assert sample.text == "a\u2028b\x85\\boxed{7}"
    assert (sample.answer, sample.num_tokens) == ("7", 4)
    assert len(fake.requests) == 1


def test_thoughts_are_counted_where_their_end_is_split_between_chunks() -> None:
    pieces = ("<think>", "hm", "</th", "ink>", "\\boxed{", "7}")
    with serving(lambda _: Chain(pieces)) as fake:
        (sample,) = draw(fake, 1, streamed=True).samples
    assert (sample.num_reasoning_tokens, sample.num_tokens) == (4, 6)
    assert not sample.reasoning_estimated


def test_too_many_requests_are_waited_out() -> None:
    replies = iter([(429, {"message": "slow down"})] * 2 + [completion("\\boxed{1}")])
    with serving(lambda _: next(replies)) as fake:
        (sample,) = draw(fake, 1).samples
    assert sample.answer == "1"
    assert (sample.num_tokens, sample.tokens_at_least) == (7, False)  # a refusal generates nothing


def test_too_many_requests_for_too_long_are_a_failure_in_the_servers_words() -> None:
    with serving(by_sample({1: (429, {"message": "slow down"})}, completion("\\boxed{1}"))) as fake:
        outcome = draw(fake, 2, seed=0)
    assert states(outcome) == ["finished", "failed"]
    assert "HTTP 429: slow down" in str(outcome.samples[1].error)
    assert not outcome.spent_at_least
    assert asked(fake) == {0: 1, 1: 3}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_sample_that_never_ends_fails_in_time_and_is_aborted(streamed: bool) -> None:
    good = completion("\\boxed{1}")
    with (
        serving(by_sample({1: endless("on and ", "on ")}, good)) as fake,
        closing(SglangBackend(fake.url, timeout_s=0.5)) as backend,
    ):
        outcome = run_on(backend, 3, seed=0, streamed=streamed)
        assert eventually(lambda: fake.in_flight == 0)
    assert states(outcome) == ["finished", "failed", "finished"]
    endless_one = outcome.samples[1]
    assert "did not answer within 0.5 seconds" in str(endless_one.error)
    assert fake.aborted == [endless_one.rid]
    assert asked(fake)[1] == 1  # the next try would take as long
    assert endless_one.num_tokens == (2 if streamed else 0)
    assert [sample.tokens_at_least for sample in outcome.samples] == [False, True, False]
    assert outcome.spent_at_least
    assert endless_one.answer is None


def test_a_server_that_hangs_costs_no_more_than_the_time_outs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_module, "ABORT_TIMEOUT_S", 0.2)
    with (
        serving(lambda _: endless(), answers_aborts=False) as fake,
        closing(SglangBackend(fake.url, timeout_s=0.3)) as backend,
    ):
        outcome = run_on(backend, 16)
        assert outcome.elapsed_s < 3.0
        assert eventually(lambda: fake.in_flight == 0)
    assert set(states(outcome)) == {"failed"}
    assert outcome.vote.winner is None


def killed_after(fake: FakeServer, count: int) -> Callable[[Sample], None]:
    """Kills the server once so many samples have ended."""
    ended: list[int] = []

    def note(sample: Sample) -> None:
        ended.append(sample.index)
        if len(ended) == count:
            fake.kill()

    return note


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_killed_in_mid_vote_takes_no_finished_sample_with_it(streamed: bool) -> None:
    good = {index: completion("\\boxed{391}") for index in range(3)}
    with serving(by_sample(good, endless("so ", "far"))) as fake:
        outcome = draw(fake, 8, killed_after(fake, 3), seed=0, streamed=streamed)
    assert states(outcome) == ["finished"] * 3 + ["failed"] * 5
    assert outcome.elapsed_s < 3.0
    assert (outcome.vote.winner, outcome.vote.votes, outcome.vote.failed) == ("391", 3, 5)
    assert [sample.tokens_at_least for sample in outcome.samples] == [False] * 3 + [True] * 5
    for sample in outcome.samples[3:]:
        assert "no server answers" in str(sample.error) or "was lost" in str(sample.error)


def test_what_had_not_begun_when_the_server_died_fails_too() -> None:
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        outcome = draw(fake, 6, killed_after(fake, 2), seed=0, parallel=1)
    assert states(outcome) == ["finished"] * 2 + ["failed"] * 4
    assert not outcome.spent_at_least  # nobody was there to generate anything


def test_a_failed_sample_is_no_evidence_but_what_it_took_is_spent() -> None:
    broken = Chain(("a", "b", "c", ERROR))
    with serving(by_sample({0: broken}, completion("\\boxed{1}", num_tokens=2))) as fake:
        outcome = draw(fake, 4, seed=0, parallel=1, program=BUDGET, options={"tokens": 5})
    assert states(outcome) == ["failed", "finished"]
    assert outcome.spent_tokens == 5


def test_the_server_may_abort_a_sample_by_itself_and_it_is_tried_again() -> None:
    chains = iter([endless("some"), Chain(("\\boxed{391}",))])

    def abort_at_the_server(fake: FakeServer) -> None:
        assert eventually(lambda: fake.num_tokens == 1)
        for live in list(fake._live.values()):
            live.aborted = True

    with serving(lambda _: next(chains)) as fake:
        thread = threading.Thread(target=abort_at_the_server, args=(fake,))
        thread.start()
        (sample,) = draw(fake, 1, streamed=True).samples
        thread.join()
    assert (sample.answer, sample.state) == ("391", SampleState.FINISHED)
    assert len(fake.requests) == 2
