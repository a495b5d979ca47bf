"""Two runs against each other: statistics against simulated truth, pairs, `lim compare`."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import binomtest
from typer.testing import CliRunner, Result

from lim_sglang.cli import app
from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.commands import MULTIPLE_COMPARISONS
from lim_sglang.evals.compare import (
    Interval,
    compare,
    distinct_names,
    mcnemar_p,
    mean_interval,
    ratio_interval,
    resampled_means,
)
from lim_sglang.evals.metrics import NO_MAJORITY, Summary
from lim_sglang.evals.summaries import read_summary, write_summaries
from lim_sglang.evals.tables import SAYS_NOTHING, comparison_table, sentence, too_few
from lim_sglang.programs.schema import SampleState
from tests.evals.summaries import FULL, five_runs, question, run, simulated

ABORTED, TRUNCATED = SampleState.ABORTED, SampleState.TRUNCATED
SIMULATIONS, SAMPLES = 1000, 4
RESAMPLES = 400
"""Fewer than a user's 10,000, to save time; the coverage differs only by noise."""
EASY, HARD = 0.5, 0.7
"""Parameters of the beta distribution of each question's probability, U-shaped as in benchmarks:
42 % right on average, many questions near 0 or 1."""
WRONG = np.cumsum([0.5, 0.3, 0.2])
"""Shares of the wrong answers among wrong samples."""
RATIO = 1.05


def simulate(
    generator: np.random.Generator, loss: float, questions: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Simulate the samples of two runs over the same questions.

    Args:
        loss: probability that run b spoils a right sample.

    Returns:
        Share of right samples, verdict on the majority's answer, mean tokens; [questions, 2] each.
    """
    chance = generator.beta(EASY, HARD, (questions, 1, 1))
    right = generator.random((questions, 2, SAMPLES)) < chance * np.array([[1], [1 - loss]])
    wrong = 1 + np.searchsorted(WRONG, generator.random(right.shape))
    groups = np.where(right, 0, wrong)
    votes = (groups[..., None] == np.arange(4)).sum(axis=2)
    first = np.argmax(groups[..., None] == np.arange(4), axis=2)  # wins ties
    winner = np.argmax(votes - first / (SAMPLES + 1), axis=2)
    typical = 400 * np.exp(0.5 * generator.standard_normal((questions, 1, 1)))
    noise = np.exp(0.4 * generator.standard_normal(right.shape) - 0.08)
    lengths = typical * np.array([[1], [RATIO]]) * noise
    return right.mean(axis=2), winner == 0, lengths.mean(axis=2)


@pytest.mark.parametrize(
    ("loss", "questions"),
    [(0.0, 150), (0.1, 150), (0.1, 20)],
    ids=["no difference", "a loss", "few questions"],
)
def test_intervals_cover_the_truth_and_tests_find_what_is_there(
    loss: float, questions: int
) -> None:
    truth = -loss * EASY / (EASY + HARD)
    generator = np.random.default_rng(20251125)
    counts = dict.fromkeys(("covered", "rejected", "votes rejected", "ratio covered", "mcnemar"), 0)
    for seed in range(SIMULATIONS):
        shares, right, lengths = simulate(generator, loss, questions)
        bootstrap = {"seed": seed, "resamples": RESAMPLES}
        low, high = mean_interval(shares[:, 1] - shares[:, 0], **bootstrap)
        counts["covered"] += low <= truth <= high
        counts["rejected"] += low > 0 or high < 0
        low, high = mean_interval(right[:, 1] - right[:, 0].astype(float), **bootstrap)
        counts["votes rejected"] += low > 0 or high < 0
        low, high = ratio_interval(lengths[:, 0], lengths[:, 1], **bootstrap)
        counts["ratio covered"] += low <= RATIO <= high
        a, b = right[:, 0], right[:, 1]
        counts["mcnemar"] += mcnemar_p(int((a & ~b).sum()), int((b & ~a).sum())) <= 0.05
    rates = {name: int(count) / SIMULATIONS for name, count in counts.items()}
    print(f"loss {loss}, {questions} questions: {rates}")  # noqa: T201 - shown with -rP, for docs/log
    assert rates["covered"] == pytest.approx(0.95, abs=0.02)
    assert rates["ratio covered"] == pytest.approx(0.95, abs=0.02)
    if not loss:
        assert rates["rejected"] == pytest.approx(0.05, abs=0.015)
        assert rates["votes rejected"] == pytest.approx(0.05, abs=0.015)
        assert 0.02 < rates["mcnemar"] <= 0.06
    elif questions == 150:
        assert rates["rejected"] > 0.4
        assert rates["mcnemar"] > 0.1


@pytest.mark.parametrize(("differ", "worse"), [(0.02, 1.0), (0.05, 0.7), (0.1, 0.7), (0.2, 0.8)])
def test_intervals_cover_the_truth_where_few_questions_differ(differ: float, worse: float) -> None:
    """One sample of 30 questions, as many as AIME has.

    Bare percentiles cover the truth 45, 64, 87 and 93 times of 100 here.
    """
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(1000):
        luck = generator.random(30)
        values = np.where(luck < differ * worse, -1.0, np.where(luck < differ, 1.0, 0.0))
        low, high = mean_interval(values, seed=seed, resamples=RESAMPLES)
        covered += low <= differ * (1 - 2 * worse) <= high
    assert covered / 1000 > 0.945


def test_the_interval_is_that_of_a_t_distribution_for_many_different_values() -> None:
    low, high = mean_interval([0.1 * (n % 3) for n in range(60)], seed=0, resamples=20_000)
    # Mean 0.1, standard error 0.0823 / sqrt(60), t(59) = 2.001; means are in steps of 1/600.
    assert high - low == pytest.approx(2 * 2.001 * 0.08234 / 60**0.5, abs=2 / 600)
    assert (high + low) / 2 == pytest.approx(0.1, abs=1 / 600)


def test_the_interval_of_two_questions_is_wide() -> None:
    # Resampled means are 0, 0.5 and 1; t(1) / z = 6.48, times sqrt(2) for n - 1.
    low, high = ratio_interval([1.0, 1.0], [1.0, math.e**2], seed=0, resamples=1000)
    mean = math.log((1 + math.e**2) / 2)
    assert math.log(high) == pytest.approx(mean + (2 - mean) * 6.4829 * 2**0.5, rel=1e-3)
    assert math.log(low) == pytest.approx(mean - mean * 6.4829 * 2**0.5, rel=1e-3)


@pytest.mark.parametrize("count", [30, 500])
def test_without_a_differing_question_the_interval_follows_their_number(count: int) -> None:
    low, high = mean_interval([0.0] * count, seed=0, resamples=10_000)
    # Of two opposite values among n + 2, resamples have a sum of 3 or more in 100 on each side.
    assert (low, high) == pytest.approx((-3 / (count + 2), 3 / (count + 2)), rel=0.07)


def test_nine_differing_questions_are_few_and_ten_are_not() -> None:
    low, high = mean_interval([0.5] * 9, seed=0, resamples=2000)
    assert high - low > 0.3  # nine that agree do not say that all others would
    assert mean_interval([0.5] * 10, seed=0, resamples=2000) == (0.5, 0.5)


def test_pseudo_observations_are_as_large_as_the_largest_difference() -> None:
    low, high = mean_interval([0.25, -0.5, *[0.0] * 38], seed=0, resamples=20_000)
    spread = (0.25**2 + 3 * 0.5**2) / 42
    half = stdtrit(41, 0.975) * math.sqrt(spread / 41)
    assert high - low == pytest.approx(2 * half, abs=0.25 / 42)


def test_resamples_draw_whole_questions_with_replacement() -> None:
    values = np.array([[0.0, 5.0], [1.0, 7.0], [0.0, 5.0]])
    means = resampled_means(values, seed=3, resamples=3000)
    assert means.shape == (3000, 2)
    np.testing.assert_allclose(means[:, 1], 5 + 2 * means[:, 0])  # the columns stay together
    shares = [np.mean(np.isclose(means[:, 0], ones / 3)) for ones in range(4)]
    np.testing.assert_allclose(shares, [8 / 27, 12 / 27, 6 / 27, 1 / 27], atol=0.03)


def test_many_questions_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(50)
    in_one = mean_interval(values, seed=1, resamples=4000)
    monkeypatch.setattr("lim_sglang.evals.compare.BLOCK", 50 * 333)
    assert mean_interval(values, seed=1, resamples=4000) == pytest.approx(in_one, rel=0.02)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(1, 0), (3, 9), (9, 3), (12, 12), (0, 20), (210, 160), (900, 1000)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected)
    assert mcnemar_p(0, 0) == 1.0


TIMES = 4
"""Repetitions of five questions, so that there are enough for an interval."""


def run_of(*shares: tuple[int, int], policy: str = "full", length: int = 100) -> Summary:
    """Make a run from each question's number of right samples of all; the majority votes."""
    questions = (
        question(
            f"q{n}",
            [0] * right + [1] * (total - right),
            tokens=[length + n % 5] * total,
            chosen=0 if 2 * right >= total else 1,
        )
        for n, (right, total) in enumerate(shares)
    )
    return run(*questions, policy=policy)


A = run_of(*[(4, 4), (2, 4), (1, 4), (0, 4), (3, 4)] * TIMES)
B = run_of(*[(4, 4), (1, 4), (1, 4), (0, 4), (1, 4)] * TIMES, policy="lim", length=150)


def test_differences_are_those_of_the_questions_means() -> None:
    found = compare(A, B)
    assert found.difference.value == pytest.approx((0 - 1 / 4 + 0 + 0 - 2 / 4) / 5)
    low, high = found.difference.bounds or (0, 0)
    assert low < found.difference.value < high
    assert found.answers.value == pytest.approx(-2 / 5)
    assert found.length_ratio.value == found.spent_ratio.value == pytest.approx(152 / 102)
    low, high = found.length_ratio.bounds or (0, 0)
    assert 1.4 < low < found.length_ratio.value < high < 1.6
    assert (found.a, found.b, found.num_questions) == ("full", "lim", 5 * TIMES)
    assert (found.mcnemar.only_a, found.mcnemar.only_b) == (2 * TIMES, 0)
    assert found.mcnemar.p == 2 / 2 ** (2 * TIMES)
    assert (found.other_differences, found.stops_by_itself) == ((), False)
    assert found.headline_difference == found.difference
    assert found.headline_ratio == found.length_ratio


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([(0, 4), (1, 1)] * 10, [(1, 1), (0, 4)] * 10, 0),
        ([(4, 4), (0, 1)] * 10, [(1, 1), (4, 4)] * 10, 1 / 2),
        ([(4, 4)] * 20, [(0, 4)] * 20, -1),
        ([(0, 4)] * 20, [(4, 4)] * 20, 1),
    ],
)
def test_questions_count_alike_and_no_interval_exceeds_the_possible_values(
    a: list[tuple[int, int]], b: list[tuple[int, int]], expected: float
) -> None:
    found = compare(run_of(*a), run_of(*b, policy="lim")).difference
    assert found.value == expected
    low, high = found.bounds or (0, 0)
    assert -1 <= low <= high <= 1


def test_swapped_runs_give_mirrored_results_in_any_order_of_the_questions() -> None:
    there, back = compare(A, B), compare(B, replace(A, questions=A.questions[::-1]))
    assert back.difference.value == -there.difference.value
    low, high = there.difference.bounds or (0, 0)
    assert back.difference.bounds == pytest.approx((-high, -low), abs=0.02)
    assert back.length_ratio.value == pytest.approx(1 / there.length_ratio.value)
    assert (back.mcnemar.only_a, back.mcnemar.only_b) == (0, 2 * TIMES)


def test_a_run_compared_with_itself_leaves_room_for_differences_not_seen() -> None:
    found = compare(A, A)
    assert (found.difference.value, found.mcnemar.p) == (0, 1.0)
    low, high = found.difference.bounds or (0, 0)
    assert -0.2 < low < -0.1  # of twenty questions, one in seven may differ
    assert high == pytest.approx(-low, abs=0.05)
    assert found.length_ratio == Interval(1.0, 1.0, 1.0)


def test_a_program_that_stops_early_is_compared_by_its_votes() -> None:
    stopped = {"tokens": [10, 10, 31], "states": {2: ABORTED}}
    early = run(
        *(
            question(each.question_id, [*each.group[:2], None], chosen=chosen, **stopped)
            for each, chosen in zip(A.questions, [0, 0, 0, None, None] * TIMES, strict=True)
        ),
        program="adaptive",
    )
    found = compare(A, early)
    assert found.stops_by_itself
    assert (found.headline_difference, found.headline_ratio) == (found.answers, found.spent_ratio)
    assert found.answers.value == 0
    assert found.length_ratio.value == pytest.approx(10 / 102)
    assert found.spent_ratio.value == pytest.approx(51 / 408)


def test_both_runs_have_their_figures_beside_the_difference() -> None:
    cut = question("q4", [None, 0], states={0: TRUNCATED}, tokens=[300, 100], chosen=0)
    found = compare(A, replace(B, questions=(*B.questions[:4], cut)), common=True)
    a, b = found.figures_a, found.figures_b
    assert (a.completed, b.completed) == (20, 18)
    assert b.pass_at_1 - a.pass_at_1 == pytest.approx(found.difference.value)
    assert b.right_votes - a.right_votes == pytest.approx(found.answers.value)
    assert b.mean_tokens / a.mean_tokens == pytest.approx(found.length_ratio.value)
    assert b.tokens_per_question / a.tokens_per_question == pytest.approx(found.spent_ratio.value)
    assert (a.no_answer, a.cut_off) == (0, 0)
    assert (b.no_answer, b.cut_off) == (1 / 18, 1 / 18)


@pytest.mark.parametrize(("num_without", "is_said"), [(0, False), (7, False), (8, True)])
def test_the_sentence_names_the_shares_without_answer_where_they_differ_much(
    num_without: int, is_said: bool
) -> None:
    groups = [[None] * (n < num_without) + [0] * (4 - (n < num_without)) for n in range(20)]
    other = run(*(question(f"q{n}", each, chosen=0) for n, each in enumerate(groups)), policy="lim")
    found = compare(A, other)
    assert found.answers_differ_in_number is is_said
    assert ("no answer" in sentence(found)) is is_said
    assert (f"{100 * num_without / 80:.1f} % of those of lim" in sentence(found)) is is_said


@pytest.mark.parametrize(
    ("samples", "has_majority"), [((1, 1), True), ((2, 2), False), ((2, 4), False), ((3, 3), True)]
)
def test_votes_of_two_samples_are_no_part_of_a_comparison(
    samples: tuple[int, int], has_majority: bool
) -> None:
    a, b = (run(question("q", [0] * count, chosen=0), policy=f"p{count}") for count in samples)
    found = compare(a, b)
    table = comparison_table(found)
    assert found.has_majority is has_majority
    assert ("right votes" in str(table.rows)) is has_majority
    assert (table.caption == NO_MAJORITY) is not has_majority


def test_an_aborted_question_has_no_share_and_no_right_answer() -> None:
    gone = question("q4", [None], states={0: ABORTED}, tokens=[5])
    five = replace(A, questions=A.questions[:5])
    found = compare(five, replace(B, questions=(*B.questions[:4], gone)))
    assert found.num_questions == 5
    assert found.difference.value == pytest.approx(-1 / 4 / 4)
    assert found.answers.value == pytest.approx(-2 / 5)
    assert found.length_ratio.value == pytest.approx(151.5 / 101.5)
    assert found.spent_ratio.value == pytest.approx((4 * 606 + 5) / (4 * 510))


def test_ratios_are_of_means_and_questions_without_tokens_count_one() -> None:
    def with_tokens(*tokens: int) -> Summary:
        each = (question(f"q{n}", [0], tokens=[tokens[n % 2]]) for n in range(20))
        return run(*each)

    found = compare(with_tokens(100, 101), with_tokens(400, 1)).length_ratio
    assert found.value == pytest.approx(401 / 201)
    empty = compare(with_tokens(0, 0), with_tokens(0, 0))
    assert empty.spent_ratio == empty.length_ratio == Interval(1.0, 1.0, 1.0)


GONE = question("q", [None], states={0: ABORTED})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (A, run(*A.questions, task="other"), "task sums and run has task other"),
        (A, run(*A.questions, questions="changed"), "one id may stand for two questions"),
        (
            A,
            replace(run(*A.questions[:18]), source="runs/b"),
            r"\(runs/b lacks 2 of 20 questions.* q18, q19\); compare the questions of both by",
        ),
        (
            A,
            run(*A.questions[:18], asked=20),
            r"lacks 2 of 20 questions.* q18, q19\); complete the runs with lim eval, or compare",
        ),
        (
            run_of((1, 1), (1, 1)),
            run_of(*[(1, 1)] * 10),
            r"lacks 8 of 10 .* ids q2, q3, q4 and 5 more\)",
        ),
        (
            run(*A.questions[8:11]),
            run(*A.questions[7:10]),
            r"lacks 1 of 4 .* id q7; .* id q10\); .*both by lim compare --common",
        ),
        (
            run(*A.questions[:10][::-1], num_failed=1),
            run(*A.questions[11:12], num_failed=2),
            r"lacks 10 of 11 .* q2 and 7 more.*1 sample of run and 2 samples of run .*--ret",
        ),
        (run(GONE), run(GONE), "share no question with completed samples"),
    ],
)
def test_runs_of_different_questions_are_not_compared(a: Summary, b: Summary, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(a, b)


def test_the_questions_of_both_runs_are_compared_on_demand() -> None:
    found = compare(A, run(*B.questions[:2], questions="fewer"), common=True)
    assert found.num_questions == 2
    assert found.difference.value == pytest.approx(-1 / 8)
    lacks = "run lacks 18 of 20 questions, with the ids q2, q3, q4 and 15 more of run"
    left_out = f"their questions, of which these are left out: {lacks}"
    assert found.other_differences == (left_out, "asked: 20 and 2")
    part = compare(A, run(*B.questions[:19]), common=True)
    lacks = "run lacks 1 of 20 questions, with the id q19"
    assert part.other_differences[0].endswith(f"left out: {lacks}")


def test_samples_that_failed_are_told_with_what_follows() -> None:
    part = replace(run(*B.questions[:2], policy="lim"), num_failed=7)
    found = compare(A, part, common=True)
    assert (found.figures_a.completed, found.figures_a.failed) == (8, 0)
    assert (found.figures_b.completed, found.figures_b.failed) == (8, 7)
    told = "0 samples of full and 7 of lim failed and are left out: long samples fail first"
    assert told in sentence(found)
    rows = {name: cells for name, *cells in comparison_table(found).rows}
    assert rows["samples"] == ["8", "8", ""]
    assert rows["failed, left out"] == ["0", "7", ""]
    first = compare(replace(A, num_failed=1), B)
    assert "1 sample of full and 0 of lim failed and are left out" in sentence(first)
    none = compare(A, B)
    assert "failed" not in sentence(none) + str(comparison_table(none))


def test_nineteen_questions_have_no_interval_and_twenty_have_one() -> None:
    for count, expected in ((1, False), (19, False), (20, True)):
        a, b = (run_of(*[(1, 4), (3, 4)] * 10, policy=name) for name in ("full", "lim"))
        a, b = (replace(each, questions=each.questions[:count]) for each in (a, b))
        found = compare(a, b)
        intervals = (found.difference, found.answers, found.length_ratio, found.spent_ratio)
        assert [bool(each.bounds) for each in intervals] == [expected] * 4
        assert not found.difference.excludes_zero


def test_a_run_that_is_not_complete_is_named_beside_the_sentence() -> None:
    cut = replace(DENSE, questions=DENSE.questions[:19])
    gap = "full: 19 of 20 samples: the run is not complete, the same lim eval command resumes it."
    assert sentence(compare(cut, past(102), common=True)).endswith(f" {gap}")
    assert sentence(compare(cut, past(101), common=True)).endswith(f" {gap}")
    assert "not complete" not in sentence(compare(DENSE, past(102)))


def past(
    length: int, *, prompt: int | None = 50, budget: int = 100, policy: str = "lim"
) -> Summary:
    """Make a run of 20 questions with one sample of a length in tokens, the prompt's included."""
    tokens = length - (prompt or 0)
    made = (question(f"q{n}", [0], tokens=[tokens], chosen=0) for n in range(20))
    questions = [replace(each, prompt_tokens=prompt) for each in made]
    return run(*questions, policy=policy, budget=budget, samples=1)


DENSE = run(*past(500).questions, samples=1)


@pytest.mark.parametrize(
    ("a", "b", "reads_everything"),
    [
        (DENSE, past(101), True),  # the last token is generated from the 100 before it
        (DENSE, past(102), False),
        (past(101), past(80, budget=90), True),
        (past(102), past(80, budget=90), False),
        (DENSE, past(101, prompt=None), False),  # prompts were not counted, so nobody knows
        (DENSE, DENSE, False),
    ],
)
def test_a_comparison_in_which_no_sample_grew_past_the_budget_says_so(
    a: Summary, b: Summary, reads_everything: bool
) -> None:
    found = compare(a, b, names=("one", "two"))
    assert found.reads_everything is reads_everything
    says = "both runs read everything, so the comparison says nothing about sparse attention."
    assert (says in sentence(found)) is reads_everything
    if b.conditions["budget"]:
        assert f"samples of two grew past the budget of {b.conditions['budget']}" in sentence(found)
    else:
        assert "budget" not in sentence(found)


def test_a_comparison_that_reads_everything_tells_its_reservations_too() -> None:
    """Too few questions for intervals, and one run with far more samples without an answer."""
    answered = replace(DENSE, questions=DENSE.questions[:8])
    unread = (question(f"q{n}", [None], tokens=[51]) for n in range(8))
    made = [replace(each, prompt_tokens=50) for each in unread]
    silent = replace(past(101), questions=tuple(made))
    told = sentence(compare(answered, silent))
    assert SAYS_NOTHING in told
    assert too_few(8) in told
    assert "have no answer that could be read" in told


def test_differing_conditions_other_than_the_policy_are_named() -> None:
    policy = {"policy": "lim", "budget": 256, "dense_layers": [0], "commit": "other", "seed": 7}
    other = {"max_tokens": 20, "versions": {"torch": "3"}, "prompt_sha256": "b" * 64}
    usual = {"max_tokens": 10, "versions": {"torch": "2"}, "prompt_sha256": "a" * 64}
    other["concurrency"], usual["concurrency"] = 32, 4
    found = compare(run(*A.questions, **usual), run(*A.questions, **policy, **other))
    assert found.other_differences == (
        "most requests at a time (the lower of --concurrency and the servers' limit): 4 and 32",
        "max_tokens: 10 and 20",
        "prompt_sha256: 'aaaaaaaa…' and 'bbbbbbbb…'",
        "versions.torch: '2' and '3'",
    )


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (run(policy="lim", budget=256), ("full", "lim 256")),
        (run(program="adaptive"), ("full majority", "full adaptive")),
        (run(model="big"), ("tiny full", "big full")),
        (replace(A, run_id="other"), ("run", "other")),
        (A, ("run (1)", "run (2)")),
    ],
)
def test_runs_are_named_by_the_first_difference(other: Summary, names: tuple[str, ...]) -> None:
    assert distinct_names([A, other]) == names


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Summaries of full attention, 128, 256, 512 and 1,024."""
    return [str(path) for path in write_summaries(five_runs(40), tmp_path)]


def lim_compare(*words: str) -> Result:
    result = CliRunner().invoke(app, ["compare", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_compares_all_runs_with_the_first(paths: list[str]) -> None:
    dense, *sparse = (read_summary(Path(path)) for path in paths[:3])
    expected = [compare(dense, each) for each in sparse]
    shown = lim_compare(*paths[:3]).stdout
    assert shown.count("against full\n") == 2
    assert all(sentence(found) in shown for found in expected)
    assert MULTIPLE_COMPARISONS in shown
    lines = [json.loads(line) for line in lim_compare(*paths[:3], "--json").stdout.splitlines()]
    for line, found in zip(lines, expected, strict=True):
        assert line.items() >= json.loads(json.dumps(asdict(found))).items()
        assert line["sentence"] == sentence(found)


def test_the_command_warns_of_other_differences(paths: list[str], tmp_path: Path) -> None:
    (other,) = write_summaries([simulated(questions=40, device_name="other")], tmp_path / "b")
    result = lim_compare(paths[0], str(other))
    assert "warning: full and LessIsMore 256 differ in device_name" in result.stderr
    assert MULTIPLE_COMPARISONS not in result.stdout


def test_the_seed_is_that_of_the_bootstrap(paths: list[str]) -> None:
    one, again, other = (
        json.loads(lim_compare(*paths[:2], "--json", "--seed", seed).stdout)["length_ratio"]
        for seed in "001"
    )
    assert one == again != other
    assert one["value"] == other["value"]


def test_the_command_needs_two_runs_of_a_task(paths: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"two runs of a task.*{paths[0]} is the only run"):
        lim_compare(paths[0])
    (other,) = write_summaries([simulated(questions=40, task="sums")], tmp_path / "other")
    with pytest.raises(ConfigError, match=f"run of math500; {other} is the only run of sums"):
        lim_compare(paths[0], str(other))


def test_files_of_two_names_are_told_to_be_two_tasks(tmp_path: Path) -> None:
    runs = [simulated(questions=40, task=f"file:{name}", origin="own") for name in ("own", "own2")]
    with pytest.raises(ConfigError, match="only run of file:own2; files of one name are one task"):
        lim_compare(*map(str, write_summaries(runs, tmp_path / "runs")))


def test_folders_of_runs_are_compared_task_by_task_dense_runs_first(tmp_path: Path) -> None:
    delta = simulated(questions=40, policy="delta")  # sorted before full by its name
    write_summaries([delta, simulated(questions=40, **FULL)], tmp_path / "one")
    assert lim_compare(str(tmp_path / "one")).stdout.startswith("DELTA 256 against full\n")
    write_summaries(
        [simulated(questions=40, task=task) for task in ("sums", "math500", "more")],
        tmp_path / "two",
    )
    write_summaries([simulated(questions=40, task="sums", **FULL)], tmp_path / "three")
    result = lim_compare(*(str(tmp_path / name) for name in ("three", "two", "one")))
    assert [line for line in result.stdout.splitlines() if " against " in line] == [
        "sums: LessIsMore 256 against full",
        "math500: full against LessIsMore 256",
        "math500: DELTA 256 against LessIsMore 256",
    ]
    assert "warning: left out: " in result.stderr
    assert "is the only run of more\n" in result.stderr
    lines = lim_compare(str(tmp_path / "three"), str(tmp_path / "two"), "--json").stdout
    assert [json.loads(line)["task"] for line in lines.splitlines()] == ["sums"]


def test_tasks_that_cannot_be_compared_are_left_out_by_name_with_the_reason(
    tmp_path: Path,
) -> None:
    for name, policy, questions in (("a", FULL, 9), ("b", {}, 5)):
        runs = [simulated(questions=9, task="sums", **policy)]
        runs += [simulated(questions=questions, task="unfinished", **policy)]
        write_summaries(runs, tmp_path / name)
    empty = tmp_path / "b" / "begun"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    (empty / "samples.jsonl").touch()
    both = [str(tmp_path / name) for name in ("a", "b")]
    result = lim_compare(*both)
    assert [line for line in result.stdout.splitlines() if " against " in line] == [
        "sums: LessIsMore 256 against full"
    ]
    first, second = (line for line in result.stderr.splitlines() if line.startswith("warning: "))
    assert first == f"warning: left out: {empty} has no sample yet"
    assert re.search(r"left out: .*/a/unfinished-full\S+ and .* lacks 4 of 9 questions", second)
    alone = [str(next((tmp_path / name).glob("unfinished*"))) for name in ("a", "b")]
    with pytest.raises(DataError, match="have different questions"):
        lim_compare(*alone)
    with pytest.raises(ConfigError, match=r"begun has no sample yet; \S+ is the only run of su"):
        lim_compare(str(empty), str(next((tmp_path / "a").glob("sums*"))))


def test_the_command_refuses_a_run_beside_itself(paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(paths[0])
    for words in ([paths[0]] * 2, [paths[0], str(tmp_path / "link.json")], [*paths[:2], paths[1]]):
        with pytest.raises(ConfigError) as caught:
            lim_compare(*words)
        assert words[-1] in str(caught.value)


@pytest.mark.parametrize("words", [["none"], ["none", "gone"], ["none", "{first}", "gone"]])
def test_paths_that_do_not_exist_are_all_named(words: list[str], paths: list[str]) -> None:
    missing = [word for word in words if "{" not in word]
    with pytest.raises(ConfigError, match=f"cannot read {', '.join(missing)} .no such file"):
        lim_compare(*(word.format(first=paths[0]) for word in words))


def test_messages_name_a_run_by_the_users_path(paths: list[str], tmp_path: Path) -> None:
    (short,) = write_summaries([simulated(questions=38)], tmp_path / "short")
    with pytest.raises(DataError) as caught:
        lim_compare(paths[0], str(short))
    assert f"{short} lacks 2 of 40 questions" in str(caught.value)
    assert "q038, q039" in str(caught.value)
    assert str(caught.value).startswith(f"{paths[0]} and {short} have different questions")


def test_title_and_conditions_are_lines_in_one_piece_without_a_terminal(paths: list[str]) -> None:
    lines = lim_compare(*paths[:2]).stdout.splitlines()
    assert lines[0].endswith("against full")
    assert [line for line in lines if line != line.rstrip()] == []
