"""Each program stops where its rule says, and the samples that it does not need are aborted or
never sent."""

import inspect
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.evals.run_config import EVAL_SAMPLES
from lim_sglang.markdown_section import counted
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.program import (
    PROGRAMS,
    Outcome,
    Program,
    find_program,
    listing,
    outcome_of,
    outcome_record,
    reasons_without_vote,
    refuse_failures,
)
from lim_sglang.programs.schema import IN_A_BOX, Sample, SampleState
from lim_sglang.programs.stopping import WindowRule, confidence_threshold
from lim_sglang.programs.vote import tally
from tests.builders import make_sample
from tests.fakes.sglang_server import (
    Chain,
    FakeServer,
    completion,
    endless,
    eventually,
    serving,
    words,
)
from tests.forked_commands import ROOT
from tests.programs.harness import WAIT_S, boxed, by_sample, requests_by_seed, run_at, states

_, _, ADAPTIVE, EARLY_STOP, SHORT, CONFIDENCE, BUDGET = PROGRAMS.values()


def test_a_program_has_the_name_that_finds_it() -> None:
    assert all(find_program(name).name == name for name in PROGRAMS)
    assert find_program(" Early-Stop") is EARLY_STOP
    meant = r"unknown program 'majorty'; did you mean majority\? known, .*\n  single "
    with pytest.raises(ConfigError, match=meant):
        find_program("majorty")
    with pytest.raises(ConfigError, match="unknown program 'oracle'; known, and"):
        find_program("oracle")


def test_a_programs_file_is_a_script_that_prints_each_sample_and_last_the_answer() -> None:
    script = ROOT / "programs" / "majority.py"
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        done = subprocess.run(
            [sys.executable, str(script), "What is 17 * 23?", "--samples", "3", "--url", fake.url],
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("answer: 391  (3 votes of 3 samples, 21 tokens")
    assert done.stdout.count("\n") == 1
    for number in (1, 2, 3):
        assert f"/3  sample {number}: 391  (7 tokens" in done.stderr


@pytest.mark.parametrize(
    ("name", "samples", "options", "words"),
    [
        ("single", 2, {}, "takes 1 sample of a question, not 2: the program majority"),
        ("short", 2, {}, "wanted=3 cannot stop before it has 3 samples, and may take 2: take more"),
        ("short", 4, {"wanted": 5}, "wanted=5 .* 5 samples, and may take 4"),
        ("early_stop", 4, {}, "window=5 .* 5 samples"),
        ("adaptive", 3, {}, "confidence=0.95 .* 4 samples"),
        ("confidence", 4, {}, "confidence with warm_up=16 cannot .* 16 samples, .* lower warm_up,"),
        ("confidence", 4, {"warm_up": 5}, "warm_up=5 .* 5 samples"),
    ],
)
def test_a_number_of_samples_that_leaves_a_program_no_effect_is_refused(
    name: str, samples: int, options: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        PROGRAMS[name].check(options, samples)


@pytest.mark.parametrize("program", PROGRAMS.values())
def test_the_fewest_samples_of_a_program_are_taken(program: Program) -> None:
    program.check({}, program.samples)
    least = {"short": 3, "early_stop": 5, "adaptive": 4, "confidence": 16}
    program.check({}, least.get(program.name, 1))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_table_has_the_options_of_each_function(name: str) -> None:
    _, _, _, *options = inspect.signature(PROGRAMS[name].function.func).parameters.values()
    assert [option.name for option in options] == [*PROGRAMS[name].options]
    assert all(option.default is option.empty for option in options)  # a default stands once


def scripted(answers: list[str | None]) -> Any:
    """Let each sample state its answer, in 7 tokens."""
    texts = ["who knows" if answer is None else boxed(answer) for answer in answers]
    return by_sample({index: completion(text) for index, text in enumerate(texts)})


def as_samples(answers: list[str | None]) -> list[Sample]:
    """Return these answers as the rule sees them."""
    return [make_sample(index, answer) for index, answer in enumerate(answers)]


def assert_the_rest_was_aborted(fake: FakeServer, outcome: Outcome) -> None:
    """Check that exactly the samples in flight were aborted, of those that were sent."""
    assert eventually(lambda: fake.in_flight == 0)
    sent = {body["rid"] for body in fake.requests}
    aborted = {s.rid for s in outcome.samples if s.state is SampleState.ABORTED}
    assert set(fake.aborted) == aborted & sent
    assert aborted
    assert not fake.disconnected
    assert outcome.settled
    assert outcome.saved_tokens > 0
    assert outcome.num_not_begun + len(outcome.samples) == outcome.num_asked
    assert set(requests_by_seed(fake)) <= {sample.index for sample in outcome.samples}


@pytest.mark.parametrize("streamed", [False, True])
def test_adaptive_aborts_the_samples_in_flight_when_the_vote_is_settled(streamed: bool) -> None:
    agree = {index: Chain(words(boxed("391"), 9)) for index in (1, 2, 5, 6)}
    with serving(by_sample(agree, endless("let me"))) as fake:
        outcome = run_at(fake, 40, program=ADAPTIVE, parallel=8, seed=0, streamed=streamed)
        assert_the_rest_was_aborted(fake, outcome)
    assert outcome.vote.votes == 4
    assert {s.index for s in outcome.samples if s.state is SampleState.FINISHED} == set(agree)
    assert outcome.num_not_begun >= 40 - 8 - 3


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
def test_early_stop_takes_windows_up_to_the_first_that_agrees(answers: list[str | None]) -> None:
    samples, rule = as_samples(answers), WindowRule(5)
    settled = (n for n in (5, 10, 15) if rule.is_settled(samples[:n], 0, str.__eq__))
    stop = next(settled, 20)
    with serving(scripted(answers)) as fake:
        outcome = run_at(fake, 20, program=EARLY_STOP, seed=0)
    assert requests_by_seed(fake) == dict.fromkeys(range(stop), 1)
    assert outcome.settled == (stop < 20)
    assert outcome.saved_tokens == 7 * (20 - stop)
    assert not fake.aborted


def test_early_stop_begins_a_window_only_after_the_one_before() -> None:
    held = Event()
    chains = {4: Chain((boxed("2"),), until=held)}
    ended: list[int] = []

    def note(sample: Sample) -> None:
        ended.append(sample.index)
        if sorted(ended) == [0, 1, 2, 3]:
            assert eventually(lambda: len(fake.requests) == 5)
            held.set()

    with serving(by_sample(chains, completion(boxed("1")))) as fake:
        outcome = run_at(fake, 15, note, program=EARLY_STOP, seed=0)
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
        following = {5: 2, 2: 7}
        if sample.index in following:
            gates[following[sample.index]].set()
        elif {0, 3} <= set(order):
            gates[5].set()

    with serving(by_sample(chains, endless("let me think"))) as fake:
        outcome = run_at(fake, 10, note, program=SHORT, seed=0)
        assert_the_rest_was_aborted(fake, outcome)
    assert [index for index in order if index in gates] == [5, 2, 7]
    assert {s.index for s in outcome.samples if s.state is SampleState.ABORTED} == {1, 4, 6, 8, 9}
    assert outcome.vote.winner == "b"
    assert (outcome.vote.failed, outcome.vote.aborted) == (1, 5)


def test_budget_counts_tokens_in_flight_and_only_finished_samples_vote() -> None:
    usual = endless(*["hm "] * 5)
    with serving(by_sample({2: Chain(words(boxed("391"), 10))}, usual)) as fake:
        outcome = run_at(fake, 8, program=BUDGET, parallel=4, seed=0, options={"tokens": 25})
        assert_the_rest_was_aborted(fake, outcome)
    assert outcome.vote.winner == "391"
    assert 25 <= outcome.spent_tokens <= 30  # one more was begun when the third had ended
    assert len(outcome.samples) in (4, 5)


def test_budget_is_spent_while_no_sample_ends() -> None:
    with serving(lambda _: endless(*["hm "] * 5)) as fake:
        outcome = run_at(fake, 4, program=BUDGET, parallel=4, seed=0, options={"tokens": 20})
        assert eventually(lambda: fake.in_flight == 0)
    assert states(outcome) == ["aborted"] * 4
    assert outcome.settled
    assert outcome.elapsed_s < WAIT_S
    assert (outcome.spent_tokens, outcome.vote.winner, outcome.saved_tokens) == (20, None, 0)


FAILED = make_sample(0, None, SampleState.FAILED, error="gone")
STOPPED = make_sample(1, None, SampleState.ABORTED)
TOO_LONG = make_sample(
    0,
    None,
    SampleState.FAILED,
    error="HTTP 400: Requested token count exceeds the model's maximum context length of 8192",
)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ((FAILED, FAILED), "the server failed all 2 samples, the first with: gone"),
        ((FAILED,), "the server failed the only sample: gone"),
        ((TOO_LONG,), r".*maximum context length of 8192.* \(lower --max-tokens, or ask a .*\)"),
        ((FAILED, STOPPED), "the server failed 1 of 2 samples and none ended: gone"),
        ((FAILED, make_sample(1, None)), None),
        ((FAILED, make_sample(1, None, SampleState.TRUNCATED)), None),
        ((STOPPED,), None),
        ((), None),
    ],
)
def test_failures_are_an_error_unless_a_sample_has_ended(
    samples: tuple[Sample, ...], words: str | None
) -> None:
    outcome = Outcome(samples, tally(samples, str.__eq__), len(samples), False, 1.0)
    with pytest.raises(ServerError, match=f"^{words}$") if words else nullcontext():
        refuse_failures(outcome)


@pytest.mark.parametrize(
    ("text", "is_hinted"),
    [
        ("So the final answer is: **Paris**, since", True),
        ("The answer is blue", True),
        ("The answer is 12", False),
        (r"The answer is \frac{1}", False),
        ("Let us answer this", False),
    ],
)
def test_words_of_a_sample_that_was_cut_off_are_told_to_count_in_a_box_only(
    text: str, is_hinted: bool
) -> None:
    sample = replace(make_sample(0, None, SampleState.TRUNCATED), text=text)
    outcome = Outcome((sample,), tally([sample], str.__eq__), 1, False, 1.0)
    (reason,) = reasons_without_vote(outcome, PROGRAMS["majority"], 10)
    assert reason.mend.startswith(": raise --max-tokens; ")
    assert (f"; {IN_A_BOX};" in reason.mend) == is_hinted


def test_a_failed_sample_is_no_evidence_but_its_tokens_are_spent() -> None:
    broken = Chain(words("so", 3), reason="length")
    answers = {0: broken, 1: (400, {"message": "no"})}
    with serving(by_sample(answers, completion(boxed("1"), num_tokens=2))) as fake:
        outcome = run_at(fake, 5, seed=0, parallel=1, program=BUDGET, options={"tokens": 5})
    assert states(outcome) == ["truncated", "failed", "finished"]
    assert outcome.spent_tokens == 5
    without_vote = {"unanswered": 0, "truncated": 1, "failed": 1, "aborted": 0}
    assert outcome_record(outcome)["without_vote"] == without_vote


WARM_UP = {
    0: Chain((boxed("1"), "", "."), confidences=(6.0, 4.0, 6.0)),
    1: Chain((boxed("1"), " x", "."), confidences=(9.0, 7.0, 9.0)),
    2: Chain((boxed("2"), " x", "."), confidences=(5.0, 5.0, 5.0)),
    3: Chain((boxed("2"), " x", "."), confidences=(8.0, 8.0, 2.0)),
}
"""Lowest means of two tokens: 6 (a token without text has no logprobs), 8, 5, 5."""
OPTIONS = {"warm_up": 4, "window": 2, "keep": 0.5, "agreement": 0.99}


def test_confidence_aborts_unsure_chains_and_weighs_the_votes() -> None:
    assert confidence_threshold([6.0, 8.0, 5.0, 5.0], 0.5) == 5.5
    after = {
        4: endless("so", "then", "wait", confidences=(6.0, 5.5, 4.0)),
        5: Chain((boxed("3"), " x", "."), confidences=(30.0, 30.0, 30.0)),
        6: endless("hm", "hm", confidences=(5.5, 5.4)),
        7: Chain((boxed("1"), " x", "."), confidences=(5.5, 5.5, 5.5)),
    }
    with serving(by_sample({**WARM_UP, **after})) as fake:
        outcome = run_at(fake, 8, program=CONFIDENCE, seed=0, options=OPTIONS)
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


def test_an_unsure_chain_has_no_vote_even_if_it_ended_before_the_abort() -> None:
    unsure = Chain((boxed("1"), " x", "."), confidences=(5.0, 5.0, 5.0))
    with serving(by_sample({**WARM_UP, 4: unsure})) as fake:
        outcome = run_at(fake, 5, program=CONFIDENCE, seed=0, options=OPTIONS)
    assert states(outcome)[4] == "aborted"
    assert outcome.vote.votes == 2


def test_confidence_stops_once_the_warm_up_agrees() -> None:
    usual = Chain((boxed("1"), " x"), confidences=(3.0, 3.0))
    with serving(by_sample({}, usual)) as fake:
        outcome = run_at(fake, 32, program=CONFIDENCE, seed=0, options=OPTIONS)
    assert requests_by_seed(fake) == dict.fromkeys(range(4), 1)
    assert outcome.settled
    assert outcome.saved_tokens == 2 * 28


def test_confidence_stops_at_the_chain_that_gives_the_leader_its_share() -> None:
    usual = Chain((boxed("1"), " x"), confidences=(8.0, 8.0))
    shares = [22 / 32, 30 / 40, 38 / 48, 46 / 56]  # of 14 + 8 n against 10
    stop = next(n for n, share in enumerate(shares, 1) if share >= 0.8)
    with serving(by_sample(WARM_UP, usual)) as fake:
        options = {**OPTIONS, "agreement": 0.8}
        outcome = run_at(fake, 32, program=CONFIDENCE, parallel=1, seed=0, options=options)
    assert requests_by_seed(fake) == dict.fromkeys(range(4 + stop), 1)
    assert outcome.vote.winner == "1"


def test_a_sample_that_was_cut_off_has_no_vote_if_only_finished_ones_count() -> None:
    cut = completion(boxed("5"), reason="length")
    answers = {0: cut, 1: cut, 2: completion(boxed("7"))}
    with serving(by_sample(answers)) as fake:
        by_short = run_at(fake, 3, program=SHORT, seed=0, parallel=1)
        by_votes = run_at(fake, 3, seed=0, parallel=1)
    assert (by_short.vote.winner, by_short.vote.truncated) == ("7", 2)
    assert by_votes.vote.winner == "5"


def test_a_sample_that_ends_before_the_abort_is_kept_and_does_not_vote() -> None:
    answers = {index: completion(boxed(str(index % 2))) for index in range(6)}
    with serving(by_sample(answers)) as fake:

        def wait_for_all(_: Sample) -> None:
            # The display takes its time: meanwhile all others end.
            assert eventually(lambda: len(fake.requests) == 6 and fake.in_flight == 0)

        outcome = run_at(fake, 6, wait_for_all, program=SHORT, seed=0, options={"wanted": 2})
    assert outcome.settled
    assert sum(group.votes for group in outcome.vote.groups) == 2
    finished = [s for s in outcome.samples if s.state is SampleState.FINISHED]
    assert outcome.num_late == len(finished) - 2


def test_tokens_of_samples_that_an_interruption_leaves_out_are_spent() -> None:
    ended, running = [make_sample(0, "391", num_tokens=10)], InFlightSample(1)
    running.num_tokens = 50
    run: Any = SimpleNamespace(
        ended=ended, voters=ended, in_flight={1: running}, equivalent=str.__eq__, settled=False
    )
    found = outcome_of(PROGRAMS["majority"], run, 3, 1.0, interrupted=True)
    assert outcome_record(found)["tokens_spent"] == 10 + 50
    assert [sample.index for sample in found.samples] == [0]


def test_the_list_names_the_samples_of_each_program_and_those_of_eval_that_differ() -> None:
    for program in PROGRAMS.values():
        other = f" (lim eval: {program.eval_samples})" if program.eval_samples else ""
        assert f"  {counted(program.samples, 'sample')}{other}" in listing()
        assert EVAL_SAMPLES[program.name] == (program.eval_samples or program.samples)
    assert "8 samples (lim eval: 4)" in listing()
