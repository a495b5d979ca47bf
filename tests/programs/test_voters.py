"""Whose answers count: samples that had finished when the vote was settled."""

from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import Sample, SampleState
from tests.fakes.sglang_server import completion, eventually, serving
from tests.programs.drawn import by_sample, draw
from tests.programs.test_stopping_early import boxed

SHORT = PROGRAMS["short"]


def test_a_sample_that_was_cut_off_has_no_vote_where_finished_ones_are_counted() -> None:
    cut = completion(boxed("5"), reason="length")
    answers = {0: cut, 1: cut, 2: completion(boxed("7"))}
    with serving(by_sample(answers)) as fake:
        by_short = draw(fake, 3, program=SHORT, seed=0, parallel=1)
        by_votes = draw(fake, 3, seed=0, parallel=1)
    assert (by_short.vote.winner, by_short.vote.truncated) == ("7", 2)
    assert by_votes.vote.winner == "5"


def test_what_ends_before_the_abort_is_kept_and_does_not_vote() -> None:
    answers = {index: completion(boxed(str(index % 2))) for index in range(6)}
    with serving(by_sample(answers)) as fake:

        def wait_for_all(_: Sample) -> None:
            # The display takes its time: meanwhile all others end.
            assert eventually(lambda: len(fake.requests) == 6 and fake.in_flight == 0)

        outcome = draw(fake, 6, wait_for_all, program=SHORT, seed=0, options={"wanted": 2})
    assert outcome.settled
    assert sum(group.votes for group in outcome.vote.groups) == 2
    whole = [s for s in outcome.samples if s.state is SampleState.FINISHED]
    assert outcome.num_late == len(whole) - 2
