"""Cells against figures computed here from the samples, and the sections of documents."""

import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.evals.compare import Comparison, Interval, McNemar, compare
from lim_sglang.evals.metrics import Estimate, Summary, score
from lim_sglang.evals.report import Group, Row, make_groups
from lim_sglang.evals.tables import (
    METHOD,
    MINUS,
    NOT_MEASURED,
    PLUS_MINUS,
    STOPPING,
    TIMES,
    Table,
    comparison_table,
    condition_table,
    disagreement_table,
    group_table,
    number,
    p_value,
    percent,
    points,
    proof_rows,
    proof_section,
    ratio,
    results_section,
    score_table,
    sentence,
    share,
    signed,
)
from lim_sglang.evals.tables import NONE as DASH
from lim_sglang.programs.schema import SampleState
from tests.evals.summaries import CONDITIONS, FOUR, FULL, five_runs, question, run, simulated

CODER = CONDITIONS["model"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(Estimate(0.3712, 0.0171)), f"37.1 {PLUS_MINUS} 1.7"),
        (percent(Estimate(0.5, None)), f"50.0 {PLUS_MINUS} ?"),
        (percent(None), DASH),
        (share(0.0449), "4.5"),
        (points(Interval(-0.0123, -0.0301, 0.0057)), f"{MINUS}1.2 ({MINUS}3.0 to +0.6)"),
        (signed(-0.0001), "0.0"),
        (signed(0.0001), "0.0"),
        (ratio(Interval(1.024, 0.987, 1.05)), "1.02 (0.99 to 1.05)"),
        (number(1403.4), "1,403"),
        (number(None), DASH),
        (p_value(1.0), "1.00"),
        (p_value(0.38), "0.38"),
        (p_value(0.0874), "0.087"),
        (p_value(4e-9), "< 0.001"),
        (p_value(0.2241, decimals=3), "0.224"),
    ],
)
def test_formatters(shown: str, expected: str) -> None:
    assert shown == expected


EXCLUDED = "the data do not show a difference, and exclude a loss of more than"


@pytest.mark.parametrize("stops_early", [False, True])
@pytest.mark.parametrize(
    ("interval", "relation", "support"),
    [
        ((-0.052, -0.08, -0.02), "5.2 points below", "the data show a loss"),
        ((0.04, 0.01, 0.07), "4.0 points above", "the data show a gain"),
        (
            (-0.012, -0.031, 0.007),
            "1.2 points below",
            f"{EXCLUDED} 3.1 points and a gain of more than 0.7",
        ),
        (
            (0.0004, -0.02, 0.02),
            "equal to",
            f"{EXCLUDED} 2.0 points and a gain of more than 2.0",
        ),
    ],
)
def test_a_sentence_says_what_the_data_support(
    interval: tuple[float, float, float], relation: str, support: str, stops_early: bool
) -> None:
    difference, none = Interval(*interval), McNemar(0, 0, 1.0)
    length, spent = Interval(1.02, 0.99, 1.05), Interval(0.12, 0.1, 0.14)
    found = Comparison("a", "b", 9, difference, difference, none, length, spent, stops_early, ())
    measured = "share of right votes" if stops_early else "pass@1"
    ends = f"{signed(difference.low)} to {signed(difference.high)}"
    cost = (
        "questions take 0.12 times as many tokens (0.10 to 0.14)"
        if stops_early
        else "samples are 1.02 times as long (0.99 to 1.05)"
    )
    assert sentence(found) == (
        f"The {measured} of b is {relation} that of a (95 % interval {ends}): {support}; {cost}."
    )


TRUNCATED, ABORTED = SampleState.TRUNCATED, SampleState.ABORTED


def scores_of(summary: Summary) -> dict[str, str]:
    """Return the cells of a run's score table by their names."""
    return dict(score_table(summary.conditions, score(summary)).rows)


def test_a_score_table_has_a_row_for_every_score() -> None:
    assert scores_of(FOUR) == {
        "questions": "4",
        "samples": "16",
        "pass@1": "43.8 ± 21.3 %",
        "pass@2": "58.3 ± 22.0 %",
        "pass@4": "75.0 ± 25.0 %",
        "maj@4": "50.0 ± 28.9 %",
        "truncated": "31.2 %",
        "without answer": "31.2 %",
        "mean tokens": "25",
        "tokens, 50 % are within": "25",
        "tokens, 90 % are within": "40",
        "tokens, 99 % are within": "40",
        "tokens a question": "100",
        "tokens a right sample": "57",
        "failed, not scored": "3",
    }


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (
            replace(FOUR, conditions={**FOUR.conditions, "program": "adaptive"}),
            {
                "answered by adaptive": "50.0 ± 28.9 %",
                "pass@1 of the samples taken": "43.8 ± 21.3 %",
            },
        ),
        (
            run(question("a", [0, 1]), question("b", [0])),
            {"pass@1": "75.0 ± 25.0 %", "pass@2, 1 questions": "100.0 ± ? %"},
        ),
        (run(question("q", [0, None], states={1: ABORTED})), {"aborted early": "50.0 %"}),
    ],
    ids=["stops early", "fewer questions", "aborted"],
)
def test_a_score_table_of_other_runs(summary: Summary, expected: dict[str, str]) -> None:
    assert expected.items() <= scores_of(summary).items()


def test_a_terminal_shows_title_cells_and_conditions() -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(score_table(FOUR.conditions, score(FOUR)))
    for part in ("sums, tiny, full", "43.8 ± 21.3 %", "samples 4, at most 2048, temperature 0.6"):
        assert part in text.getvalue()


def test_a_comparison_table_has_a_column_for_each_run() -> None:
    other = run(*FOUR.questions[:2], question("wrong by vote", [0, 1], 1, chosen=1), policy="b")
    found = compare(FOUR, other, common=True, names=("a", "b"))
    table = comparison_table([found, found])
    assert (table.title, table.head) == ("against a", ("measure", "b", "b"))
    assert {name: cells for name, *cells in table.rows} == {
        "questions": ["3", "3"],
        "pass@1, points": [points(found.difference)] * 2,
        "answers, points": [points(found.answers)] * 2,
        "answered by it only": ["1", "1"],
        "by the first only": ["0", "0"],
        "McNemar's p": ["1.000", "1.000"],
        "length of samples": [ratio(found.length_ratio)] * 2,
        "tokens a question": [ratio(found.spent_ratio)] * 2,
    }


def with_error(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.fmean(values):.1f} {PLUS_MINUS} {100 * error:.1f}"


def expected_cells(summary: Summary, full: Summary) -> dict[str, str]:
    """Compute a complete run's cells from its samples; `(` ends a cell before a random interval."""
    questions = summary.questions
    shares = [statistics.fmean(each.correct) for each in questions]
    full_shares = [statistics.fmean(each.correct) for each in full.questions]
    tokens = [count for each in questions for count in each.tokens]
    full_tokens = [count for each in full.questions for count in each.tokens]
    states = [state for each in questions for state in each.states]
    unanswered = [group is None for each in questions for group in each.group]
    difference = 100 * (statistics.fmean(shares) - statistics.fmean(full_shares))
    length_ratio = statistics.fmean(tokens) / statistics.fmean(full_tokens)
    verdicts = [
        (q.answer_correct, f.answer_correct) for q, f in zip(questions, full.questions, strict=True)
    ]
    lost, won = verdicts.count((False, True)), verdicts.count((True, False))
    tail = sum(math.comb(lost + won, n) for n in range(min(lost, won) + 1)) / 2 ** (lost + won)
    is_full = summary is full
    return {
        "pass@1, %": with_error(shares),
        "maj@4, %": with_error([float(each.answer_correct) for each in questions]),
        "pass@4, %": with_error([float(any(each.correct)) for each in questions]),
        "difference to full, points (95 %)": DASH if is_full else f"{difference:+.1f} (",
        "McNemar p": DASH if is_full else p_value(min(1.0, 2 * tail)),
        "cut off, %": f"{100 * states.count(TRUNCATED) / len(states):.1f}",
        "no answer, %": f"{100 * statistics.fmean(unanswered):.1f}",
        "mean tokens": f"{statistics.fmean(tokens):,.0f}",
        "length ratio (95 %)": DASH if is_full else f"{length_ratio:.2f} (",
        "tokens per correct": f"{sum(tokens) / sum(sum(q.correct) for q in questions):,.0f}",
    }


def cells(group: Group, row: Row) -> dict[str, str]:
    """Return a row of the table by its titles."""
    table = group_table(group, in_page=True)
    return dict(zip(table.head[1:], table.rows[group.rows.index(row)][1:], strict=True))


def disagreements(shown: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return the titles of differing cells."""
    return [
        title
        for title in {**shown, **expected}
        if not (
            shown[title].replace(MINUS, "-").startswith(expected[title])
            if expected[title].endswith("(")
            else shown[title] == expected[title]
        )
    ]


@pytest.fixture(scope="module")
def group() -> Group:
    # No mean over 61 questions of 4 samples lies half-way between two printed figures.
    (found,) = make_groups(five_runs(61))
    return found


def test_every_cell_is_the_figure_of_the_samples(group: Group) -> None:
    full = group.rows[0].summary
    for row in group.rows:
        assert not disagreements(cells(group, row), expected_cells(row.summary, full)), row.name
        if row.against_full:
            shown = cells(group, row)["difference to full, points (95 %)"]
            assert shown == points(row.against_full.difference)


def test_a_wrong_figure_in_any_column_is_found(group: Group) -> None:
    row, full = group.rows[2], group.rows[0].summary
    for title, text in cells(group, row).items():
        first = next(letter for letter in text if letter.isdigit())
        wrong = text.replace(first, str((int(first) + 1) % 10), 1)
        planted = cells(group, row) | {title: wrong}
        assert disagreements(planted, expected_cells(row.summary, full)) == [title]


@pytest.mark.parametrize(
    ("runs", "titles", "dashes"),
    [
        (
            [simulated(questions=9, samples=1)],
            ["pass@1, %", "difference to full, points (95 %)", "McNemar p"],
            [],
        ),
        (
            [
                simulated(questions=9, **FULL),
                simulated(questions=9, samples=8, budget=128),
                simulated(questions=9, program="adaptive", samples=16),
            ],
            ["pass@1, %", "vote right, %", "pass@4, %"],
            ["LessIsMore 256, program adaptive"],
        ),
    ],
    ids=["one sample", "unlike votes"],
)
def test_columns_follow_the_runs(runs: Any, titles: list[str], dashes: list[str]) -> None:
    (found,) = make_groups(runs)
    table = group_table(found)
    assert list(table.head[1:4]) == titles
    assert [row.name for row in found.rows if cells(found, row)["pass@1, %"] == DASH] == dashes


def test_a_program_that_stops_early_is_judged_by_its_votes() -> None:
    full, adaptive = simulated(questions=61, **FULL), simulated(questions=61, program="adaptive")
    (mixed,) = make_groups([full, adaptive])
    row = mixed.rows[1]
    shown = cells(mixed, row)
    right = [sum(q.answer_correct for q in each.questions) for each in (full, adaptive)]
    spent = [sum(sum(q.tokens) for q in each.questions) for each in (full, adaptive)]
    difference = f"{100 * (right[1] - right[0]) / 61:+.1f} (".replace("-", MINUS)
    assert re.fullmatch(
        rf"{re.escape(difference)}.*\), answers", shown["difference to full, points (95 %)"]
    )
    assert re.fullmatch(
        rf"{spent[1] / spent[0]:.2f} \(.*\), a question", shown["length ratio (95 %)"]
    )
    assert shown["tokens a question"] == f"{spent[1] / 61:,.0f}"
    assert shown["pass@1, %"] == shown["pass@4, %"] == DASH
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
    runs = [
        simulated(questions=9, **FULL),
        simulated(questions=9),
        simulated(questions=2, asked=9, budget=128),
    ]
    (short,) = make_groups(runs)
    lacking = {name for name, *counts in disagreement_table(short.rows).rows if counts[2] == DASH}
    shown = {name for name, *_ in disagreement_table(short.rows).rows}
    assert lacking == {name for name in shown if name > "q001"} != set()


def test_conditions_that_all_runs_share_have_one_cell(group: Group) -> None:
    found = {name: cells for name, *cells in condition_table(group).rows}
    for row in group.rows:
        assert set(row.conditions) - {"versions"} <= set(found)
    assert found["versions.torch"] == ["2.11.0"]
    assert found["max_tokens"] == ["2,048"]
    assert found["budget"] == [DASH, "1,024", "512", "256", "128"]
    assert found["select_layers"] == [DASH, *["2, 14"] * 4]
    assert found["seed_honoured"] == ["no"]


def test_markdown_has_the_cells_of_the_table(group: Group) -> None:
    lines = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in group_table(group).markdown().splitlines()
    ]
    assert set(lines[1]) == {"---", "---:"}
    assert Table(lines[0], tuple(lines[2:])) == group_table(group)


def test_results_state_their_conditions() -> None:
    runs = [
        simulated(questions=9, **FULL),
        simulated(questions=9, commit="c0ffee0123456789+d61e43b333", date="2026-11-26"),
    ]
    table, below, method, plot = results_section(make_groups(runs), "a.svg").split("\n\n")
    assert table == group_table(make_groups(runs)[0]).markdown()
    assert below == (
        f"math500, {CODER}: 9 questions {TIMES} 4 samples, at most 2,048 new tokens, "
        "temperature 0.6, top_p 0.95, top_k 20; NVIDIA H100 80GB HBM3, SGLang 0.5.16, "
        "torch 2.11.0, Math-Verify 0.9.0. By `lim eval` on 2026-11-25 and 2026-11-26, commit "
        "c0ffee0123 and c0ffee0123 with local edits d61e43b333."
    )
    assert (method, plot) == (METHOD, "![Accuracy over budget](a.svg)")


def test_unknown_conditions_and_gaps_are_stated() -> None:
    summary = simulated(questions=9, device_name=None, commit=None, versions={})
    section = results_section(make_groups([replace(summary, num_failed=2)]))
    assert "; unknown device name. By `lim eval` on 2026-11-25, commit unknown. " in section
    assert " LessIsMore 256: 2 samples failed and are not scored.\n" in section


def test_each_table_has_its_conditions() -> None:
    runs = [simulated(questions=9), simulated(questions=9, task="aime24")]
    parts = results_section(make_groups(runs)).split("\n\n")
    assert [part.split(",")[0] for part in parts[1:4:2]] == ["aime24", "math500"]
    assert len(parts) == 5


def test_the_rows_of_proof_lie_on_both_sides_of_the_limit() -> None:
    groups = make_groups(five_runs(500))
    names = [row.name for _, row in proof_rows(groups)]
    lost = [
        row.name
        for row in groups[0].rows
        if row.against_full and row.against_full.difference.high < 0
    ]
    assert lost == ["LessIsMore 256", "LessIsMore 128"]
    assert names == ["LessIsMore 512", "LessIsMore 256"]
    table, conditions, method = proof_section(groups, "docs/results.md").split("\n\n")
    first = table.splitlines()[2]
    full, row = groups[0].rows[0], groups[0].rows[2]
    assert row.against_full
    for figure in (
        percent(full.score.pass_at_1),
        percent(row.score.pass_at_1),
        points(row.against_full.difference),
    ):
        assert f"| {figure} |" in first
    assert conditions in results_section(groups)
    assert method.endswith("[All rows](docs/results.md).")


def test_the_group_with_most_samples_is_the_first_proof() -> None:
    runs = [*five_runs(20), *five_runs(40, task="aime24")]
    chosen = proof_rows(make_groups(runs))
    assert 1 <= len(chosen) <= 2
    assert [group.title.split(",")[0] for group, _ in chosen][:1] == ["aime24"]


def test_nothing_measured_is_stated() -> None:
    assert results_section(()) == proof_section(()) == NOT_MEASURED
    assert proof_section(make_groups([simulated(questions=9)])) == NOT_MEASURED
