"""Summaries of runs, and scores against figures worked out by hand or by listing all subsets."""

import math
import operator
import random
import re
import time
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals import metrics
from lim_sglang.evals.metrics import (
    Estimate,
    QuestionResult,
    majority_at_k,
    pass_at_k,
    score,
    summarise,
    winning_subsets,
)
from lim_sglang.evals.run_store import GradedSample, RunRecord
from lim_sglang.programs.schema import SampleState
from lim_sglang.programs.vote import tally
from tests.builders import make_sample
from tests.evals.summaries import (
    ABOUT,
    CONDITIONS,
    CONFIG,
    FOUR,
    RECORD,
    SAMPLES,
    SAMPLING,
    SETTINGS,
    equivalent,
    graded,
    question,
    run,
)

FINISHED, TRUNCATED, ABORTED = SampleState.FINISHED, SampleState.TRUNCATED, SampleState.ABORTED


def summarise_one(*samples: GradedSample, program: str = "majority") -> QuestionResult:
    """Summarise the samples of a single question."""
    settings = {**SETTINGS, "program": {"name": program, "options": {}}}
    (found,) = summarise(RunRecord("r", settings, ABOUT), samples, equivalent).questions
    return found


def test_votes_are_counted_by_index_in_any_order_of_completion() -> None:
    found = summarise(RECORD, SAMPLES, equivalent, num_failed=1)
    assert found == summarise(RECORD, SAMPLES[::-1], equivalent, num_failed=1)
    a, b = found.questions
    assert (a.question_id, a.indices, a.group, a.chosen) == ("a", (0, 1, 2, 3), (0, 0, 1, 1), 0)
    assert (a.correct, a.tokens[0]) == ((True, False, False, False), 70)  # as graded
    assert a.answer_correct
    assert (b.group, b.chosen, b.answer_correct) == ((0, 1, None, 0), 0, False)
    assert b.states[2] is TRUNCATED


def test_the_verdict_on_an_answer_is_that_of_its_earliest_voter() -> None:
    """Equality is not transitive: answers that share a vote may be graded differently."""
    late_wrong = graded("q", 0, " 4", late=True)
    others = [graded("q", 1, "4"), graded("q", 2, " 4"), graded("q", 3, "5")]
    found = summarise_one(late_wrong, *others)
    assert (found.group, found.chosen, found.answer_correct) == ((0, 0, 0, 1), 0, True)
    assert found.voters == (1, 2, 3)
    assert not summarise_one(*others[1:]).answer_correct


def test_aborted_and_late_samples_have_no_vote() -> None:
    aborted = graded("q", 0, None, state=ABORTED, num_tokens=7)
    found = summarise_one(aborted, graded("q", 1, "4", state=TRUNCATED))
    assert (found.group, found.chosen, found.completed) == ((None, 0), 0, (1,))
    assert (found.share_correct, found.tokens) == (1, (7, 10))
    nothing = summarise_one(aborted)
    assert (nothing.share_correct, nothing.chosen, nothing.answer_correct) == (None, None, False)
    late = [graded("q", 0, "4"), *(graded("q", n, "6", late=True) for n in (1, 2))]
    assert summarise_one(*late).chosen == 0


@pytest.mark.parametrize(("program", "chosen"), [("majority", 0), ("short", 1), ("confidence", 1)])
def test_each_program_ranks_its_groups_in_its_own_way(program: str, chosen: int) -> None:
    weights = (1.0, 3.0) if program == "confidence" else (None, None)
    long = graded("q", 0, "4", num_tokens=50, confidence=weights[0])
    short = graded("q", 1, "6", num_tokens=20, confidence=weights[1])
    assert summarise_one(long, short, program=program).chosen == chosen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"model": "tiny", "server": {"tokenizer_path": "tiny", "tp_size": 1}, "budget": 256}),
        ({}, {"task_version": 1, "versions": {"torch": "2", "math_verify": "0.9.0"}}),
        ({}, {"dense_layers": [0, 1], "select_layers": [2, 4], "date": "2026-11-25", **SAMPLING}),
        ({}, {"concurrency": 20, "requests_by_session": None}),
        ({"system": None}, {"system_sha256": None, "thinking": True, "thinking_budget": 50}),
        ({"lim": None, "api": "openai"}, {"policy": "openai", "budget": None}),
        ({"lim": None}, {"dense_layers": None, "select_layers": None}),
        (
            {"lim": {"config": {**CONFIG, "policy": "full"}, "roles": ["full"] * 6}},
            {"policy": "full", "budget": None, "dense_layers": None, "select_layers": None},
        ),
        ({"program": None}, {"program": "majority", "options": {}}),  # of the oldest records
    ],
)
def test_conditions_say_what_the_scores_hold_for(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    record = RunRecord("r", {**SETTINGS, **changes}, ABOUT)
    found = summarise(record, [], equivalent).conditions
    assert expected.items() <= found.items()
    later = ("sampling_version", "concurrency", "requests_by_session")
    assert [name for name in found if name not in later] == [
        n for n in CONDITIONS if n not in later
    ]
    assert "SECRET" not in str(found)


@pytest.mark.parametrize(
    ("program", "expected"),
    [("majority", False), ("single", False), ("adaptive", True), ("of the future", True)],
)
def test_unknown_programs_are_taken_to_stop_early(program: str, expected: bool) -> None:
    assert metrics.stops_early({"program": program}) is expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/data/models/tiny/", "tiny"),
        ("models/deep/tiny", "tiny"),
        ("./tiny", "tiny"),
        ("~/tiny", "tiny"),
        ("tiny", "tiny"),
    ],
)
def test_a_folder_of_this_machine_is_not_published(path: str, expected: str) -> None:
    assert metrics.published_name(path) == expected


TWO = (question("a", [0, 0]), question("b", [0]))


@pytest.mark.parametrize(
    ("conditions", "gap"),
    [
        ({"samples": 2}, "3 of 4 samples: the run is not complete, the same lim eval command res"),
        ({"samples": 2, "num_failed": 1}, ""),
        ({"samples": 3, "num_failed": 1}, "3 of 6 samples: .* command with --retry-failed resumes"),
        ({"samples": 40, "program": "adaptive"}, ""),
        ({"samples": 40, "program": "adaptive", "asked": 3}, "2 of 3 questions: the run is not"),
        ({"samples": 40, "program": "adaptive", "asked": 3, "num_failed": 1}, "--retry-failed"),
    ],
)
def test_a_run_that_is_not_complete_says_so_and_how_to_resume(
    conditions: dict[str, Any], gap: str
) -> None:
    found = run(*TWO, **conditions).gap
    assert re.search(gap, found)
    assert bool(gap) == bool(found)


def test_scores_equal_those_worked_out_by_hand() -> None:
    found = score(FOUR)
    # pass@1 by question: 1, 1/2, 1/4, 0; the vote: 1, 1, 0, 0.
    assert found.pass_at_1 == found.pass_at[1]
    assert found.pass_at_1.value == pytest.approx(7 / 16)
    assert found.pass_at_1.error is None  # of four questions
    assert found.pass_at[4].value == 3 / 4
    assert found.pass_at[2].value == pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4)
    assert found.majority_at[4].value == found.vote_correct.value == 1 / 2
    assert (found.num_questions, found.num_samples, found.num_failed) == (4, 16, 3)
    assert (found.truncated, found.no_answer, found.aborted) == (5 / 16, 5 / 16, 0)
    # Four samples each of 10, 20, 30 and 40 tokens.
    assert (found.mean_tokens, found.percentiles) == (25, {50: 25, 90: 40})
    assert found.questions_at == {1: 4, 2: 4, 4: 4}
    assert (found.tokens_per_question, found.tokens_per_correct) == (100, 400 / 7)


def test_an_error_is_that_of_questions_and_needs_twenty() -> None:
    repeated = [replace(each, question_id=f"{n}") for n, each in enumerate(FOUR.questions * 5)]
    squares = [(share - 7 / 16) ** 2 for share in (1, 1 / 2, 1 / 4, 0)]
    found = score(run(*repeated))
    assert found.pass_at_1.error == pytest.approx(math.sqrt(5 * sum(squares) / 19 / 20))
    assert found.vote_correct.error == pytest.approx(math.sqrt(20 * 0.25 / 19 / 20))
    assert score(run(*repeated[:19])).pass_at_1.error is None
    assert list(score(run(*repeated * 2)).percentiles) == [50, 90, 99]  # of 160 samples


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ((None, None), (1, False)),
        ((62, 61), (3, True)),
        ((61, None), (1, False)),
        ((100, 100), (4, True)),
        ((1, 1), (1, True)),
    ],
)
def test_a_sample_grew_past_the_budget_if_its_last_step_had_more_tokens(
    prompts: tuple[int | None, ...], expected: tuple[int, bool]
) -> None:
    """The step that generates token n of a prompt of P tokens reads P + n - 1."""
    tokens = ([40, 102], [20, 41])
    questions = (
        replace(question(f"{n}", [0, 0], tokens=each), prompt_tokens=prompt)
        for n, (prompt, each) in enumerate(zip(prompts, tokens, strict=True))
    )
    found = score(run(*questions, budget=100)).past_budget
    assert found
    assert (found.count, found.is_exact, found.num_samples) == (*expected, 4)
    assert score(FOUR).past_budget is None


def test_an_aborted_sample_costs_tokens_and_is_neither_right_nor_wrong() -> None:
    stopped = question("q", [0, 1, None], states={2: ABORTED}, tokens=[10, 20, 70], chosen=0)
    found = score(run(stopped))
    assert (found.pass_at_1.value, found.num_samples, found.aborted) == (1 / 2, 2, 1 / 3)
    assert (found.mean_tokens, found.tokens_per_question) == (15, 100)
    assert found.percentiles == {50: 15}  # two samples have no ninth tenth
    assert (found.tokens_per_correct, found.no_answer) == (100, 0)
    cut = score(run(replace(stopped, group=(0, None, None), states=(FINISHED, TRUNCATED, ABORTED))))
    assert cut.truncated == cut.no_answer == 1 / 2


def test_a_late_sample_counts_for_pass_and_has_no_vote() -> None:
    summary = run(question("q", [0, 1, 1], 1, late=[2], chosen=0))
    assert pass_at_k(summary, 1).value == pytest.approx(2 / 3)
    assert pass_at_k(summary, 3).value == 1
    assert majority_at_k(summary, 2).value == 0  # one vote each, the earlier one wins
    with pytest.raises(DataError, match="no question with 3"):
        majority_at_k(summary, 3)


def test_questions_with_too_few_samples_are_left_out_of_larger_k_only() -> None:
    found = score(run(question("long", [1, 0, 0]), question("short", [1])))
    assert found.pass_at_1.value == pytest.approx((2 / 3 + 0) / 2)
    assert found.pass_at[3] == Estimate(1.0, None)
    assert list(found.majority_at) == [1, 2, 3]
    assert found.questions_at == {1: 2, 2: 1, 3: 1}


def test_a_question_without_a_completed_sample_has_no_share_and_no_answer() -> None:
    gone = question("gone", [None], states={0: ABORTED})
    found = score(run(question("q", [0], chosen=0), gone))
    assert (found.pass_at_1, found.vote_correct.value) == (Estimate(1.0, None), 1 / 2)
    assert (found.num_questions, found.num_samples, found.aborted) == (2, 1, 1 / 2)
    assert found.tokens_per_question == (10 + 10) / 2
    assert score(run(question("q", [1, 1]))).tokens_per_correct is None
    with pytest.raises(DataError, match="nothing to score"):
        score(run(gone))


def winner_position(groups: list[int | None], subset: tuple[int, ...]) -> int | None:
    """Return the position of a subset's answer."""
    votes: dict[int, list[int]] = {}
    for position in subset:
        if (group := groups[position]) is not None:
            votes.setdefault(group, []).append(position)
    return min(votes.values(), key=lambda voters: (-len(voters), voters[0]))[0] if votes else None


@pytest.mark.parametrize("mixed", [False, True], ids=["one group is right", "any sample may be"])
def test_both_scores_of_k_samples_equal_the_mean_over_all_subsets(mixed: bool) -> None:
    rng = random.Random(0)
    for _ in range(360):
        groups = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(1, 9))]
        asked = question("q", groups, rng.choice([0, 1, 2]))
        if mixed:
            correct = tuple(group is not None and rng.random() < 0.5 for group in groups)
            asked = replace(asked, correct=correct)
        k = rng.randint(1, len(groups))
        subsets = list(combinations(range(len(groups)), k))
        passed = sum(any(asked.correct[n] for n in subset) for subset in subsets)
        winners = [winner_position(groups, subset) for subset in subsets]
        voted = sum(n is not None and asked.correct[n] for n in winners)
        summary = run(asked)
        assert pass_at_k(summary, k).value == pytest.approx(passed / len(subsets), abs=1e-12)
        assert majority_at_k(summary, k).value == pytest.approx(voted / len(subsets), abs=1e-12)


def test_the_majority_is_the_one_that_programs_vote_for() -> None:
    rng = random.Random(11)
    for _ in range(200):
        groups = [rng.choice([None, 0, 1, 2]) for _ in range(rng.randint(1, 8))]
        samples = [make_sample(n, None if g is None else str(g)) for n, g in enumerate(groups)]
        winner = tally(samples, operator.eq).winner
        summary = run(question("q", groups, 1))
        assert majority_at_k(summary, len(groups)).value == float(winner == "1")


def test_votes_of_64_samples_are_counted_exactly_and_in_time() -> None:
    rng = random.Random(4)
    groups = tuple(rng.choice([None, 0, 0, 0, 1, 1, 2, 3, 4, 5]) for _ in range(64))
    began_s = time.process_time()
    right, wrong = (
        winning_subsets(groups, tuple(g is not None and (g == 0) == is_right for g in groups))
        for is_right in (True, False)
    )
    assert time.process_time() - began_s < 1
    unanswered = groups.count(None)
    for k in range(65):  # each subset is right, wrong or without an answer
        assert right[k] + wrong[k] + math.comb(unanswered, k) == math.comb(64, k)
    assert 0.5 < right[32] / math.comb(64, 32) < 1
