"""Each program stops where its rule says, and what it does not need is aborted or never sent."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event
from typing import Any

import pytest

from lim_sglang.programs.program import PROGRAMS, Outcome, Program
from lim_sglang.programs.schema import Sample, SampleState
from lim_sglang.programs.sglang_backend import SglangBackend
from lim_sglang.programs.stopping import PosteriorRule, WindowRule, confidence_threshold
from tests.fakes.sglang_server import FakeServer, completion, eventually, serving
from tests.programs.chains import Chain, endless, words
from tests.programs.drawn import asked, by_sample, draw, no_thread_is_left, run_on, states

ADAPTIVE = PROGRAMS["adaptive"]
BUDGET = PROGRAMS["budget"]
CONFIDENCE = PROGRAMS["confidence"]
EARLY_STOP = PROGRAMS["early_stop"]
SHORT = PROGRAMS["short"]
SINGLE = PROGRAMS["single"]


def boxed(answer: str) -> str:
    """How a model states an answer."""
    return f"\\boxed{{{answer}}}"


def random_answers(seed: int, count: int) -> list[str | None]:
    """The leader half of the time, three others, and now and then no answer."""
    rng = random.Random(seed)
    return rng.choices(["391", "401", "7", None], weights=[6, 2, 1, 1], k=count)


def scripted(answers: list[str | None]) -> Any:
    """A server whose samples state these answers."""
    texts = ["who knows" if answer is None else boxed(answer) for answer in answers]
    return by_sample({index: completion(text) for index, text in enumerate(texts)})


def as_samples(answers: list[str | None]) -> list[Sample]:
    """What the rule sees of them."""
    return [
        Sample(
            *(index, SampleState.FINISHED, "", answer, 7, 0.0, index),
            seed_honoured=False,
            rid=str(index),
        )
        for index, answer in enumerate(answers)
    ]


def assert_the_rest_was_aborted(fake: FakeServer, outcome: Outcome) -> None:
    """Exactly the samples that had not ended, of those that the server was asked for."""
    assert eventually(lambda: fake.in_flight == 0)
    sent = {body["rid"] for body in fake.requests}
    aborted = {s.rid for s in outcome.samples if s.state is SampleState.ABORTED}
    assert set(fake.aborted) == aborted & sent
    assert aborted
    assert not fake.hung_up
    assert outcome.settled
    assert outcome.saved_tokens > 0
    assert outcome.num_undrawn + len(outcome.samples) == outcome.num_asked
    assert set(asked(fake)) <= {sample.index for sample in outcome.samples}


@pytest.mark.parametrize("seed", range(6))
def test_adaptive_stops_at_the_first_sample_that_settles_its_rule(seed: int) -> None:
    answers = random_answers(seed, 20)
    samples = as_samples(answers)
    rule = PosteriorRule(0.9)
    settled = (n for n in range(1, 20) if rule.is_settled(samples[:n], 0, str.__eq__))
    stop = next(settled, 20)
    with serving(scripted(answers)) as fake:
        outcome = draw(fake, 20, program=ADAPTIVE, parallel=1, seed=0, options={"confidence": 0.9})
    assert asked(fake) == dict.fromkeys(range(stop), 1)
    assert [sample.answer for sample in outcome.samples] == answers[:stop]
    assert outcome.settled == (stop < 20)
    assert outcome.num_undrawn == 20 - stop
    assert outcome.saved_tokens == 7 * (20 - stop)
    assert not fake.aborted


@pytest.mark.parametrize("streamed", [False, True])
def test_adaptive_aborts_what_still_runs_when_the_vote_is_settled(streamed: bool) -> None:
    agree = {index: Chain(words(boxed("391"), 9)) for index in (1, 2, 5, 6)}
    with serving(by_sample(agree, endless("let me"))) as fake:
        outcome = draw(fake, 40, program=ADAPTIVE, parallel=8, seed=0, streamed=streamed)
        assert_the_rest_was_aborted(fake, outcome)
    assert outcome.vote.votes == 4
    assert {s.index for s in outcome.samples if s.state is SampleState.FINISHED} == set(agree)
    assert outcome.num_undrawn >= 40 - 8 - 3


@pytest.mark.parametrize(
    "answers",
    [
        ["1"] * 20,
        ["1", "1", "2", "1", "1"] + ["1"] * 15,
        ["1"] * 4 + [None] + ["2"] * 15,
        ["1", "2"] * 10,
        ["1", "1", "1", "1", "2"] * 3 + ["1"] * 5,
    ],
    ids=["first", "second", "unanswered", "never", "last"],
)
def test_early_stop_draws_whole_windows_up_to_the_first_that_agrees(
    answers: list[str | None],
) -> None:
    samples, rule = as_samples(answers), WindowRule(5)
    settled = (n for n in (5, 10, 15) if rule.is_settled(samples[:n], 0, str.__eq__))
    stop = next(settled, 20)
    with serving(scripted(answers)) as fake:
        outcome = draw(fake, 20, program=EARLY_STOP, seed=0)
    assert asked(fake) == dict.fromkeys(range(stop), 1)
    assert outcome.settled == (stop < 20)
    assert outcome.saved_tokens == 7 * (20 - stop)
    assert not fake.aborted


def test_early_stop_begins_a_window_only_after_the_one_before() -> None:
    held = Event()
    chains = {4: Chain((boxed("2"),), until=held)}

    def note(sample: Sample) -> None:
        if sample.index != 4 and len(fake.requests) == 5:
            held.set()

    with serving(by_sample(chains, completion(boxed("1")))) as fake:
        outcome = draw(fake, 15, note, program=EARLY_STOP, seed=0)
    assert fake.most_running <= 5
    assert len(outcome.samples) == 10


def test_short_waits_for_the_first_three_and_a_tie_goes_to_the_shortest() -> None:
    gates = {5: Event(), 2: Event(), 7: Event()}
    chains: dict[int, Any] = {
        0: completion(boxed("cut"), reason="length"),
        3: (400, {"message": "no"}),
        5: Chain(words(boxed("a"), 9), until=gates[5]),
        2: Chain(words(boxed("b"), 4), until=gates[2]),
        7: Chain(words(boxed("c"), 6), until=gates[7]),
    }
    order: list[int] = []

    def note(sample: Sample) -> None:
        order.append(sample.index)
        nexts = {0: 5, 5: 2, 2: 7}
        if {0, 3} <= set(order) and sample.index in (0, 3):
            gates[5].set()
        elif sample.index in nexts and sample.index != 0:
            gates[nexts[sample.index]].set()

    with serving(by_sample(chains, endless("let me think"))) as fake:
        outcome = draw(fake, 10, note, program=SHORT, seed=0)
        assert_the_rest_was_aborted(fake, outcome)
    assert [index for index in order if index in gates] == [5, 2, 7]
    assert {s.index for s in outcome.samples if s.state is SampleState.ABORTED} == {1, 4, 6, 8, 9}
    assert outcome.vote.winner == "b"
    assert (outcome.vote.failed, outcome.vote.aborted) == (1, 5)


@pytest.mark.parametrize("tokens", [20, 21, 34, 35])
def test_budget_stops_at_the_sample_that_spends_it(tokens: int) -> None:
    sizes = [5, 9, 6, 1, 13, 8, 2]
    stop = next(n for n in range(1, 8) if sum(sizes[:n]) >= tokens)
    chains = {index: completion(boxed("1"), num_tokens=n) for index, n in enumerate(sizes)}
    with serving(by_sample(chains)) as fake:
        outcome = draw(
            fake,
            7,
            program=BUDGET,
            parallel=1,
            streamed=False,
            seed=0,
            options={"tokens": tokens},
        )
    assert asked(fake) == dict.fromkeys(range(stop), 1)
    assert outcome.spent_tokens == sum(sizes[:stop])


def test_budget_counts_what_is_running_and_the_finished_vote() -> None:
    usual = endless(*["hm "] * 5)
    with serving(by_sample({2: Chain(words(boxed("391"), 10))}, usual)) as fake:
        outcome = draw(fake, 8, program=BUDGET, parallel=4, seed=0, options={"tokens": 25})
        assert_the_rest_was_aborted(fake, outcome)
    assert outcome.vote.winner == "391"
    assert 25 <= outcome.spent_tokens <= 30  # one more was begun when the third had ended
    assert len(outcome.samples) in (4, 5)


WARM_UP = {
    0: Chain((boxed("1"), "", "."), confidences=(6.0, 4.0, 6.0)),
    1: Chain((boxed("1"), "x", "."), confidences=(9.0, 7.0, 9.0)),
    2: Chain((boxed("2"), "x", "."), confidences=(5.0, 5.0, 5.0)),
    3: Chain((boxed("2"), "x", "."), confidences=(8.0, 8.0, 2.0)),
}
"""Lowest means of two tokens: 6 (a token without text has no logprobs), 8, 5, 5."""
OPTIONS = {"warm_up": 4, "window": 2, "keep": 0.5, "agreement": 0.99}


def test_confidence_aborts_unsure_chains_and_weighs_the_votes() -> None:
    threshold = confidence_threshold([6.0, 8.0, 5.0, 5.0], 0.5)
    assert threshold == 5.5
    after = {
        4: endless("so", "then", "wait", confidences=(6.0, 5.5, 4.0)),
        5: Chain((boxed("3"), "x", "."), confidences=(30.0, 30.0, 30.0)),
        6: endless("hm", "hm", confidences=(5.5, 5.4)),
        7: Chain((boxed("1"), "x", "."), confidences=(5.5, 5.5, 5.5)),
    }
    with serving(by_sample({**WARM_UP, **after})) as fake:
        outcome = draw(fake, 8, program=CONFIDENCE, seed=0, options=OPTIONS)
        assert eventually(lambda: fake.in_flight == 0)
    assert states(outcome) == ["finished"] * 4 + ["aborted", "finished", "aborted", "finished"]
    assert [s.confidence for s in outcome.samples] == [6.0, 8.0, 5.0, 5.0, 4.75, 30.0, 5.45, 5.5]
    assert [outcome.samples[index].num_tokens for index in (4, 6)] == [3, 2]
    assert set(fake.aborted) == {outcome.samples[4].rid, outcome.samples[6].rid}
    assert outcome.vote.winner == "3"  # one vote of 30 against three of 19.5
    assert [(g.answer, g.votes, g.weight) for g in outcome.vote.groups] == [
        ("3", 1, 30.0),
        ("1", 3, 19.5),
        ("2", 2, 10.0),
    ]
    assert not outcome.settled


def test_an_unsure_chain_has_no_vote_though_it_ended_before_the_server_heard() -> None:
    unsure = Chain((boxed("1"), "x", "."), confidences=(5.0, 5.0, 5.0))
    with serving(by_sample({**WARM_UP, 4: unsure})) as fake:
        outcome = draw(fake, 5, program=CONFIDENCE, seed=0, options=OPTIONS)
    assert states(outcome)[4] == "aborted"
    assert outcome.vote.votes == 2


def test_confidence_stops_once_the_warm_up_agrees() -> None:
    usual = Chain((boxed("1"), "x"), confidences=(3.0, 3.0))
    with serving(by_sample({}, usual)) as fake:
        outcome = draw(fake, 32, program=CONFIDENCE, seed=0, options=OPTIONS)
    assert asked(fake) == dict.fromkeys(range(4), 1)
    assert outcome.settled
    assert outcome.saved_tokens == 2 * 28


def test_confidence_stops_at_the_chain_that_gives_the_leader_its_share() -> None:
    usual = Chain((boxed("1"), "x"), confidences=(8.0, 8.0))
    shares = [22 / 32, 30 / 40, 38 / 48, 46 / 56]  # of 14 + 8 n against 10
    stop = next(n for n, slots in enumerate(shares, 1) if slots >= 0.8)
    with serving(by_sample(WARM_UP, usual)) as fake:
        options = {**OPTIONS, "agreement": 0.8}
        outcome = draw(fake, 32, program=CONFIDENCE, parallel=1, seed=0, options=options)
    assert asked(fake) == dict.fromkeys(range(4 + stop), 1)
    assert outcome.vote.winner == "1"


def test_single_draws_one_sample_however_many_are_offered() -> None:
    with serving(lambda _: completion(boxed("1"))) as fake:
        outcome = draw(fake, 8, program=SINGLE, seed=0)
    assert asked(fake) == {0: 1}
    assert (outcome.num_asked, outcome.num_undrawn, outcome.saved_tokens) == (1, 0, 0)


def interrupt(_: Sample) -> None:
    """What Ctrl-C does to the program's thread."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_ctrl_c_aborts_what_is_in_flight_and_leaves_no_thread(program: Program) -> None:
    with (
        no_thread_is_left(),
        serving(by_sample({0: completion(boxed("1"))}, endless("let me"))) as fake,
        closing(SglangBackend(fake.url)) as backend,
    ):
        with pytest.raises(KeyboardInterrupt):
            run_on(backend, 20, interrupt, program=program, parallel=8, seed=0)
        # The endpoint is still open: others may use it.
        assert eventually(lambda: fake.in_flight == 0)
        in_flight = {body["rid"] for body in fake.requests if body["seed"] != 0}
        assert set(fake.aborted) == in_flight
        assert len(in_flight) <= 7
        assert not fake.hung_up


def test_closing_the_endpoint_in_a_vote_fails_what_runs_and_what_waits() -> None:
    with no_thread_is_left(), serving(lambda _: endless("let me")) as fake:
        backend = SglangBackend(fake.url, max_concurrency=2)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run_on, backend, 6, parallel=4, seed=0)
            assert eventually(lambda: fake.in_flight == 2)
            backend.close()
            outcome = future.result(10)
        assert eventually(lambda: fake.in_flight == 0)
        assert set(fake.aborted) == {body["rid"] for body in fake.requests}
    assert states(outcome) == ["failed"] * 6
