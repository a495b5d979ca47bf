"""Cells against figures computed here from the samples, and the sections of documents."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.evals.compare import Comparison, Interval, McNemar, compare
from lim_sglang.evals.metrics import (
    MIN_QUESTIONS,
    NO_MAJORITY,
    Estimate,
    PastBudget,
    Summary,
    score,
)
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.evals.sections import (
    COUNTED,
    MCNEMAR,
    METHOD,
    NOT_MEASURED,
    READ,
    STOPPING,
    conditions_text,
    method_text,
    proof_rows,
    proof_section,
    results_section,
)
from lim_sglang.evals.tables import (
    ALL_READ,
    MINUS,
    NONE,
    PLUS_MINUS,
    TIMES,
    comparison_table,
    condition_table,
    disagreement_table,
    group_table,
    number,
    p_value,
    past_budget,
    percent,
    points,
    print_table,
    ratio,
    reasons_without_answer,
    score_table,
    sentence,
    share,
    signed,
    too_few,
)
from lim_sglang.programs.schema import UNANSWERED, SampleState
from tests.evals.summaries import (
    COMMITTED,
    CONDITIONS,
    FOUR,
    FULL,
    five_runs,
    question,
    run,
    simulated,
)

CODER = CONDITIONS["model"]
GPU = CONDITIONS["device_name"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(Estimate(0.3712, 0.0171)), f"37.1 {PLUS_MINUS} 1.7"),
        (percent(Estimate(0.5, None)), "50.0"),
        (points(Interval(-0.0123)), f"{MINUS}1.2"),
        (ratio(Interval(1.024)), "1.02"),
        (past_budget(PastBudget(1200, 2000, 256, is_exact=True)), "1,200 of 2,000"),
        (past_budget(PastBudget(0, 12, 256, is_exact=False)), "at least 0 of 12"),
        (past_budget(None), NONE),
        (too_few(1), "1 question is too few for standard errors and intervals, which need 20"),
        (too_few(4), "4 questions are too few for standard errors and intervals, which need 20"),
        (percent(None), NONE),
        (share(0.0449), "4.5"),
        (points(Interval(-0.0123, -0.0301, 0.0057)), f"{MINUS}1.2 ({MINUS}3.0 to +0.6)"),
        (signed(-0.0001), "0.0"),
        (signed(0.0001), "0.0"),
        (ratio(Interval(1.024, 0.987, 1.05)), "1.02 (0.99 to 1.05)"),
        (number(1403.4), "1,403"),
        (number(None), NONE),
        (p_value(1.0), "1.00"),
        (p_value(0.38), "0.38"),
        (p_value(0.0874), "0.087"),
        (p_value(4e-9), "< 0.001"),
        (p_value(0.2241, decimals=3), "0.224"),
    ],
)
def test_formatters(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize("stops_early", [False, True])
@pytest.mark.parametrize(
    ("interval", "relation", "support"),
    [
        ((-0.052, -0.08, -0.02), "5.2 points below", "show a loss"),
        ((0.04, 0.01, 0.07), "4.0 points above", "show a gain"),
        ((-0.012, -0.031, 0.007), "1.2 points below", ("3.1", "0.7")),
        ((0.0004, -0.02, 0.02), "equal to", ("2.0", "2.0")),
    ],
)
def test_a_sentence_says_what_the_data_support(
    interval: tuple[float, float, float],
    relation: str,
    support: str | tuple[str, str],
    stops_early: bool,
) -> None:
    difference, none = Interval(*interval), McNemar(0, 0, 1.0)
    length, spent = Interval(1.02, 0.99, 1.05), Interval(0.12, 0.1, 0.14)
    found = Comparison("a", "b", 9, difference, difference, none, length, spent, stops_early, ())
    ends = f"{signed(interval[1])} to {signed(interval[2])}"
    measured, cost = "pass@1", "samples are 1.02 times as long (0.99 to 1.05)"
    if stops_early:
        measured = "share of right votes"
        cost = "questions take 0.12 times as many tokens (0.10 to 0.14)"
    if isinstance(support, tuple):
        loss, gain = support
        support = "do not show a difference, and exclude a loss of more than "
        support += f"{loss} points and a gain of more than {gain}"
    assert sentence(found) == (
        f"The {measured} of b is {relation} that of a (95 % interval {ends}): "
        f"the data {support}; {cost}."
    )


def test_a_sentence_on_a_few_questions_claims_no_support() -> None:
    found = compare(FOUR, replace(FOUR, conditions={**FOUR.conditions, "policy": "b"}))
    assert sentence(found) == (
        "The pass@1 of b is equal to that of full, but 4 questions are too few for standard errors "
        "and intervals, which need 20; samples are 1.00 times as long. 3 samples of full and 3 of "
        "b failed and are left out: long samples fail first, by timeouts for example, so scores "
        "and lengths are biased (lim eval --retry-failed tries them again)."
    )


TRUNCATED, ABORTED = SampleState.TRUNCATED, SampleState.ABORTED


def scores_of(summary: Summary) -> dict[str, str]:
    """Return the cells of a run's score table by their names."""
    return dict(score_table(summary.conditions, score(summary)).rows)


def test_a_score_table_has_a_row_for_every_score() -> None:
    assert scores_of(FOUR) == {
        "questions": "4",
        "samples": "16",
        "pass@1": "43.8 %",
        "pass@2": "58.3 %",
        "pass@4": "75.0 %",
        "right votes of 4": "50.0 %",
        "cut off": "31.2 %",
        "no answer": "31.2 %",
        "mean tokens": "25",
        "tokens, 50 % are within": "25",
        "tokens, 90 % are within": "40",
        "tokens a question": "100",
        "tokens a right sample": "57",
        "failed, not scored": "3",
    }


EARLY = replace(FOUR, conditions={**FOUR.conditions, "program": "adaptive"})


@pytest.mark.parametrize(
    ("summary", "name", "cell"),
    [
        (EARLY, "right votes by adaptive", "50.0 %"),
        (EARLY, "pass@1 of the samples taken", "43.8 %"),
        (run(question("a", [0, 1]), question("b", [0])), "pass@2, 1 question", "100.0 %"),
        (run(question("q", [0, None], states={1: ABORTED})), "aborted early", "50.0 %"),
    ],
)
def test_a_score_table_of_other_runs(summary: Summary, name: str, cell: str) -> None:
    assert scores_of(summary)[name] == cell


def test_samples_without_an_answer_have_a_reason_each() -> None:
    found = run(
        question("a", [0, None, None], states={2: TRUNCATED}),
        question("b", [0, 1, None], states={0: TRUNCATED, 2: TRUNCATED}),
    )
    cut_off, unanswered = reasons_without_answer(found.conditions, score(found))
    assert cut_off.startswith("3 of 6 samples were cut off, 2 of them with no answer, after")
    assert "30 tokens" in cut_off
    assert cut_off.endswith("so the server's context is full: serve a longer context")
    short = {**found.conditions, "max_tokens": 30}
    assert next(reasons_without_answer(short, score(found))).endswith("raise --max-tokens")
    assert unanswered.startswith("1 of 6 samples ended")
    assert f" {UNANSWERED};" in unanswered
    one = run(question("a", [0, None], states={1: TRUNCATED}))
    assert next(reasons_without_answer(one.conditions, score(one))).startswith(
        "1 of 2 samples was cut off with no answer"
    )
    assert not [*reasons_without_answer(FOUR.conditions, score(run(question("q", [0, 1]))))]


@pytest.mark.parametrize(("groups", "is_noted"), [([0], False), ([0, 1], True), ([0] * 3, False)])
def test_two_samples_have_no_majority_and_the_table_says_so(
    groups: list[int], is_noted: bool
) -> None:
    questions = [question(f"q{n}", groups) for n in range(MIN_QUESTIONS)]
    summary = run(*questions, samples=len(groups))
    assert (NO_MAJORITY in score_table(FOUR.conditions, score(summary)).caption) == is_noted
    sparse = {**summary.conditions, "policy": "lessismore", "budget": 256}
    (group,) = make_groups([summary, replace(summary, conditions=sparse)])
    report = results_section([group])
    assert (NO_MAJORITY in report) == is_noted
    assert ("McNemar" in report) != is_noted
    assert ("right votes" in report) == (len(groups) > 2)


def test_title_and_conditions_stand_unbroken_above_the_cells() -> None:
    with (console := Console(width=40)).capture() as text:
        print_table(console, score_table(FOUR.conditions, score(FOUR)))
    caption = f"samples 4, at most 2048, temperature 0.6, top_p 0.95, top_k -1, {GPU}; {too_few(4)}"
    title, below, *grid = text.get().splitlines()
    assert (title, below) == ("sums, tiny, full", caption)
    assert "43.8 %" in "".join(grid)
    assert all(line == line.rstrip() for line in grid)


def test_a_terminal_shows_names_as_they_are() -> None:
    name = "[red]x[/red]:smile:"
    found = run(*FOUR.questions, task=name, model=name, policy=name)
    with (console := Console(width=200)).capture() as text:
        print_table(console, score_table(found.conditions, score(found)))
        comparison = compare(replace(found, num_failed=0), found, names=(name, name))
        print_table(console, comparison_table(comparison))
    # Task, model and policy in the first title; both runs in title and head of the second table.
    assert text.get().count(name) == 3 + 4


@pytest.mark.parametrize(
    ("budget", "read"),
    [(100, 1.0), (12, (11 + 12 * 3) / (11 + 12 + 13 + 14)), (5, 5 * 4 / (11 + 12 + 13 + 14))],
)
def test_the_share_of_tokens_that_sparse_layers_read(budget: int, read: float) -> None:
    """A prompt of 10 tokens and 5 new ones: four decode steps, over 11, 12, 13 and 14 tokens."""
    asked = replace(question("q", [0, 0], tokens=[5, 1]), prompt_tokens=10)
    sparse = run(asked, policy="lessismore", budget=budget)
    cell = f"{(budget < 14) + (budget < 10)} of 2 ({share(read)} % of tokens read)"
    assert scores_of(sparse)[f"grew past the budget of {budget}"] == cell
    (group,) = make_groups([run(asked), sparse])
    assert [cells(group, n)["grew past the budget"] for n in (0, 1)] == [NONE, cell]
    assert READ in method_text([group])
    found = comparison_table(compare(run(asked), sparse))
    assert ("grew past the budget", NONE, cell, "") in found.rows
    unknown = run(question("q", [0], tokens=[5]), policy="lessismore", budget=budget)
    assert scores_of(unknown)[f"grew past the budget of {budget}"] == "at least 0 of 1"
    assert READ not in method_text(make_groups([unknown]))


def test_a_run_within_its_budget_is_said_to_have_read_everything() -> None:
    questions = [replace(each, prompt_tokens=20) for each in FOUR.questions]
    for budget, grown, read, noted in (
        (59, "0 of 16", "100.0", True),
        (58, "4 of 16", "100.0", False),
    ):
        found = run(*questions, policy="lessismore", budget=budget)
        cell = f"{grown} ({read} % of tokens read)"
        assert scores_of(found)[f"grew past the budget of {budget}"] == cell
        assert (ALL_READ in score_table(found.conditions, score(found)).caption) is noted
        (group,) = make_groups([FOUR, found])
        note = ALL_READ if noted else f"{grown} samples grew past the budget"  # fewer than half
        assert f"LessIsMore {budget}: {note}." in conditions_text(group)
        assert cells(group, 1)["grew past the budget"] == cell
        assert (cells(group, 1)["difference to full, points (95 %)"] == NONE) is noted


def test_a_table_that_is_too_wide_for_a_terminal_has_its_columns_as_rows(group: Group) -> None:
    table = group_table(replace(group, rows=group.rows[:2]))
    shown = {}
    for width in (80, 300):
        console = Console(width=width, force_terminal=True, color_system=None)
        with console.capture() as text:
            print_table(console, table)
        shown[width] = text.get()
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown[width]
        assert max(map(len, shown[width].splitlines())) <= width
    rows = [line.split("\N{BOX DRAWINGS LIGHT VERTICAL}") for line in shown[80].splitlines()]
    mean = next(row for row in rows if len(row) > 1 and row[1].strip() == "mean tokens")
    column = table.head.index("mean tokens")
    assert [cell.strip() for cell in mean[2:-1]] == [row[column] for row in table.rows]
    assert len(shown[300].splitlines()) < len(shown[80].splitlines())


def test_a_table_is_as_wide_as_it_needs_to_be_where_there_is_no_terminal(group: Group) -> None:
    table = group_table(group)
    console = Console(width=80, file=io.StringIO())
    print_table(console, table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == len(table.rows) + 4
    assert max(map(len, lines)) > 80
    assert all(title in lines[1] for title in table.head)


def test_a_comparison_table_has_both_runs_and_their_difference() -> None:
    other = run(*FOUR.questions[:2], question("wrong by vote", [0, 1], 1, chosen=1), policy="b")
    table = comparison_table(compare(FOUR, other, common=True, names=("a", "b")))
    assert table.head == ("measure", "a", "b", "difference")
    # pass@1 by question: 1, 1/2, 1/4 and 1, 1/2, 1/2; tokens: 100 each, and 100, 100, 30.
    assert {name: cells for name, *cells in table.rows} == {
        "questions": ["3", "3", ""],
        "samples": ["12", "10", ""],
        "failed, left out": ["3", "0", ""],
        "pass@1": ["58.3 %", "66.7 %", "+8.3 points"],
        "right votes": ["66.7 %", "100.0 %", "+33.3 points"],
        "right votes of this run only": ["0", "1", ""],
        "no answer": ["8.3 %", "10.0 %", "+1.7 points"],
        "cut off": ["8.3 %", "10.0 %", "+1.7 points"],
        "mean tokens of a sample": ["25", "22", f"{TIMES} 0.87"],
        "tokens a question": ["100", "77", f"{TIMES} 0.77"],
    }


def timed(*seconds: float, sessions: list[int | None] | None, **conditions: Any) -> Summary:
    """Make a run of one question, whose samples have 9 tokens each."""
    asked = question("q", [0] * len(seconds), tokens=[9] * len(seconds), seconds=seconds)
    return run(asked, requests_by_session=sessions, **conditions)


@pytest.mark.parametrize(
    ("sessions", "why"),
    [
        (([8], [8]), ""),
        (([8], [4]), "each server was sent at most 8 (a) and 4 (b) requests at a time"),
        (([8], [8, 4]), "b was resumed"),
        (([8, 8], [8, 4]), "a and b were resumed"),
        (([None, 8], [8]), "a was resumed"),
        (([8], None), "no record says whether b was resumed"),
        ((None, None), "no record says whether the runs were resumed"),
    ],
)
def test_seconds_compare_where_both_runs_had_the_same_requests_at_a_time_in_one_session(
    sessions: tuple[list[int | None] | None, list[int | None] | None], why: str
) -> None:
    slow = timed(2.0, 4.0, sessions=sessions[0], concurrency=8)
    fast = timed(1.0, 0.5, sessions=sessions[1], policy="b", concurrency=8)
    found = compare(slow, fast, names=("a", "b"))
    quotient = f"{TIMES} 0.25" if not why else ""
    table = comparison_table(found)
    assert table.rows[-1] == ("seconds a sample", "3.0", "0.8", quotient)
    assert table.caption.partition("depend on the load: ")[2] == why
    assert not found.other_differences
    (both,) = make_groups([slow, fast])
    assert [cells(both, n)["seconds a sample"] for n in (0, 1)] == ["3.0", "0.8"]
    assert ("Seconds a sample do not compare" in results_section([both])) == bool(why)
    assert ", at most 8 requests at a time;" in conditions_text(both)
    assert scores_of(slow)["seconds a sample"] == "3.0"


def test_pass_at_1_of_a_program_that_stops_early_is_said_to_be_of_the_samples_taken() -> None:
    table = comparison_table(compare(FOUR, EARLY, names=("a", "b")))
    assert "pass@1 of the samples taken" in [row[0] for row in table.rows]


def test_runs_without_seconds_have_no_ratio_and_no_note() -> None:
    timed_run = timed(2.0, 4.0, sessions=[8])
    unknown = run(question("q", [0, 0], tokens=[9, 9]), policy="b", requests_by_session=[4])
    table = comparison_table(compare(timed_run, unknown, names=("a", "b")))
    assert (table.rows[-1], table.caption) == (("seconds a sample", "3.0", NONE, ""), NO_MAJORITY)
    (both,) = make_groups([timed_run, unknown])
    assert [cells(both, n)["seconds a sample"] for n in (0, 1)] == ["3.0", NONE]
    assert "do not compare" not in results_section([both])
    (alone,) = make_groups([unknown])
    assert "seconds a sample" not in cells(alone, 0)


def test_a_comparison_of_many_questions_has_intervals(group: Group) -> None:
    found = group.rows[1].against_full
    assert found
    table = comparison_table(found)
    cells = {name: cells for name, *cells in table.rows}
    assert "95 %" in table.head[-1]
    assert cells["mean tokens of a sample"][-1].endswith(ratio(found.length_ratio))
    for bound in found.difference.bounds or ():
        assert signed(bound) in cells["pass@1"][-1]
    assert cells["right votes of this run only"][-1].startswith("McNemar p ")
    assert "McNemar p" in group_table(group).head


@pytest.fixture(scope="module")
def group() -> Group:
    (found,) = make_groups(five_runs(61))
    return found


def cells(group: Group, number: int) -> dict[str, str]:
    """Return a row of the table by its titles."""
    table = group_table(group)
    return dict(zip(table.head, table.rows[number], strict=True))


def test_every_cell_is_the_figure_of_the_samples() -> None:
    worse = run(
        question("all right", [0, 0, 0, 1], tokens=[20] * 4, chosen=0),
        question("right by vote", [0, 0, 1, None], 1, states={3: TRUNCATED}, chosen=0),
        *FOUR.questions[2:],
        policy="lessismore",
        budget=256,
    )
    (found,) = make_groups([FOUR, worse])
    row = found.rows[1]
    assert row.against_full
    difference, length = row.against_full.difference, row.against_full.length_ratio
    # pass@1 by question: 3/4, 1/4, 1/4, 0; of full: 1, 1/2, 1/4, 0; tokens: 80 and 3 times 100.
    assert difference.value == pytest.approx((-1 / 4 - 1 / 4) / 4)
    assert length.value == pytest.approx(380 / 400)
    assert cells(found, 1) == {
        "policy and budget": "LessIsMore 256",
        "pass@1, %": "31.2",
        "right votes, %": "25.0",
        "pass@4, %": "75.0",
        "difference to full, points (95 %)": points(difference),
        "cut off, %": "31.2",
        "no answer, %": "31.2",
        "grew past the budget": "at least 0 of 16",
        "mean tokens": "24",
        "length ratio (95 %)": ratio(length),
        "tokens a right sample": "76",
    }
    unknown = ("difference to full, points (95 %)", "length ratio (95 %)")
    assert [cells(found, 0)[title] for title in unknown] == [NONE] * 2


def test_columns_follow_the_runs() -> None:
    (single,) = make_groups([simulated(samples=1)])
    assert group_table(single).head[1:3] == ("pass@1, %", "difference to full, points (95 %)")
    full, adaptive = simulated(**FULL), simulated(program="adaptive", samples=16)
    (mixed,) = make_groups([full, simulated(samples=8, budget=128), adaptive])
    assert group_table(mixed).head[1:4] == ("pass@1, %", "right votes, %", "pass@4, %")


def test_a_partial_run_has_no_column_twice_and_tells_the_questions_of_a_figure() -> None:
    begun = run(question("a", [0], chosen=0), question("b", [1], chosen=1), samples=4, asked=4)
    (group,) = make_groups([begun])
    assert [title for title in group_table(group).head if "pass@" in title] == ["pass@1, %"]
    more = run(question("a", [1, 1], chosen=1), question("b", [0], chosen=0), samples=4, asked=4)
    (group,) = make_groups([more])
    assert cells(group, 0)["pass@1, %"] == "50.0"
    assert cells(group, 0)["pass@2, %"] == "0.0, 1 question"


def test_a_program_that_stops_early_is_judged_by_its_votes() -> None:
    runs = [simulated(questions=61, **FULL), simulated(questions=61, program="adaptive")]
    (mixed,) = make_groups(runs)
    shown = cells(mixed, 1)
    found = mixed.rows[1].against_full
    assert found
    assert shown["difference to full, points (95 %)"] == f"{points(found.answers)}, answers"
    assert shown["length ratio (95 %)"] == f"{ratio(found.spent_ratio)}, a question"
    spent = sum(sum(asked.tokens) for asked in runs[1].questions)
    assert shown["tokens a question"] == f"{spent / 61:,.0f}"
    assert shown["pass@1, %"] == shown["pass@4, %"] == NONE
    assert results_section([mixed]).endswith(f"{METHOD} {STOPPING}")


def test_disagreements_are_ordered_by_the_distance_between_runs(group: Group) -> None:
    table = disagreement_table(group.rows, most=500)
    by_row = [{q.question_id: sum(q.correct) for q in row.summary.questions} for row in group.rows]
    counts = {name: [row[name] for row in by_row] for name in by_row[0]}
    spread = {name: max(found) - min(found) for name, found in counts.items()}
    names = sorted((n for n in spread if spread[n]), key=lambda n: (-spread[n], n))
    assert table.rows == tuple((n, *(f"{count} of 4" for count in counts[n])) for n in names)
    assert disagreement_table(group.rows).rows == table.rows[:20]


def test_a_question_that_a_run_lacks_is_a_dash() -> None:
    runs = [simulated(**FULL), simulated(), simulated(questions=2, asked=9, budget=128)]
    (short,) = make_groups(runs)
    rows = disagreement_table(short.rows).rows
    assert {counts[2] == NONE for name, *counts in rows if name > "q001"} == {True}
    assert {counts[2] == NONE for name, *counts in rows if name <= "q001"} <= {False}


def test_conditions_that_all_runs_share_have_one_cell(group: Group) -> None:
    found = {name: cells for name, *cells in condition_table(group).rows}
    assert set(CONDITIONS) - {"versions", "server"} <= set(found)
    assert found["versions.torch"] == ["2.11.0"]
    assert found["max_tokens"] == ["2,048"]
    assert found["budget"] == [NONE, "1,024", "512", "256", "128"]
    assert found["dense_layers"] == [NONE, *["0, 1"] * 4]
    assert found["seed_honoured"] == ["no"]


def test_results_state_their_conditions_and_gaps() -> None:
    changes = {"commit": "c0ffee0123456789+d61e43b333", "date": "2026-11-26", "device_name": None}
    first = {"commit": "1be6cc2", "date": "2026-11-25", "device_name": "NVIDIA H100 80GB HBM3"}
    runs = [simulated(**FULL, **first), replace(simulated(**changes), num_failed=2)]
    table, below, method, plot = results_section(make_groups(runs), "a.svg").split("\n\n")
    assert table == group_table(make_groups(runs)[0]).markdown()
    assert below == (
        f"math500, {CODER}: 9 questions {TIMES} 4 samples, at most 2,048 new tokens, "
        "temperature 0.6, top_p 0.95, top_k -1, at most 256 requests at a time; NVIDIA H100 80GB "
        "HBM3 and unknown device name, "
        "SGLang 0.5.16, torch 2.11.0, Math-Verify 0.9.0. By `lim eval` on 2026-11-25 and "
        "2026-11-26, commit 1be6cc2 and c0ffee0123 with local edits d61e43b333. 9 questions are "
        "too few for standard errors and intervals, which need 20. LessIsMore 256: 2 samples "
        "failed, not scored."
    )
    # Nine questions are too few for McNemar's test, too.
    assert (method, plot) == (COUNTED.removeprefix(MCNEMAR), "![Accuracy over budget](a.svg)")


def test_each_table_has_its_conditions() -> None:
    parts = results_section(make_groups([simulated(), simulated(task="aime24")])).split("\n\n")
    assert [part.split(",")[0] for part in parts[1:4:2]] == ["aime24", "math500"]
    assert len(parts) == 5


def test_the_rows_of_proof_lie_on_both_sides_of_the_limit() -> None:
    groups = make_groups([*COMMITTED.values(), simulated(task="aime24"), simulated(task="gpqa")])
    chosen = proof_rows(groups)  # of the group with the most samples
    assert [row.name for _, row in chosen] == ["LessIsMore 256", "LessIsMore 128"]
    table, conditions, method = proof_section(groups, "docs/results.md").split("\n\n")
    for line, (group, row) in zip(table.splitlines()[2:], chosen, strict=True):
        assert row.against_full
        for estimate in (group.rows[0].score.pass_at_1, row.score.pass_at_1):
            assert f"| {percent(estimate)} |" in line
        assert f"| {points(row.against_full.difference)} |" in line
    assert conditions in results_section(groups)
    assert method.endswith("[All rows](docs/results.md).")


def test_a_few_questions_and_runs_that_read_everything_are_no_proof() -> None:
    assert not proof_rows(make_groups([simulated(**FULL), simulated(questions=9)]))
    rival = simulated(policy="quest", questions=61)
    assert not proof_rows(make_groups([simulated(**FULL, questions=61), rival]))
    short = [simulated(questions=40, **FULL), simulated(questions=40, budget=1_000_000)]
    for prompts in (None, 10):
        runs = [
            replace(r, questions=tuple(replace(q, prompt_tokens=prompts) for q in r.questions))
            for r in short
        ]
        assert not proof_rows(make_groups(runs))


def test_nothing_measured_is_stated() -> None:
    assert results_section(()) == proof_section(()) == NOT_MEASURED
    assert proof_section(make_groups([simulated()])) == NOT_MEASURED
