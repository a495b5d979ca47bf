"""Cells against figures that are worked out here, from the samples."""

import math
import statistics
from collections.abc import Sequence

import pytest

from lim_sglang.evals.compare import Interval
from lim_sglang.evals.metrics import Estimate, Summary
from lim_sglang.evals.report import Group, Row, make_groups
from lim_sglang.evals.tables import (
    columns,
    contested,
    listed,
    markdown,
    p_value,
    percent,
    points,
    signed,
)
from tests.evals.made_summaries import FULL, five_runs, made

MINUS, PLUS_MINUS, DASH = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}", "\N{EN DASH}"


def with_error(values: Sequence[float]) -> str:
    """Percent with the standard error over questions."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.fmean(values):.1f} {PLUS_MINUS} {100 * error:.1f}"


def worked_out(summary: Summary, full: Summary) -> dict[str, str]:
    """Every cell whose figure is no random one, from the samples of a complete run."""
    questions = summary.questions
    shares = [statistics.fmean(question.correct) for question in questions]
    full_shares = [statistics.fmean(question.correct) for question in full.questions]
    tokens = [count for question in questions for count in question.tokens]
    states = [state for question in questions for state in question.states]
    silent = [group is None for question in questions for group in question.group]
    difference = 100 * (statistics.fmean(shares) - statistics.fmean(full_shares))
    full_tokens = [count for question in full.questions for count in question.tokens]
    ratio = statistics.fmean(tokens) / statistics.fmean(full_tokens)
    answers = [
        (q.answer_correct, f.answer_correct) for q, f in zip(questions, full.questions, strict=True)
    ]
    lost, won = answers.count((False, True)), answers.count((True, False))
    tail = sum(math.comb(lost + won, n) for n in range(min(lost, won) + 1)) / 2 ** (lost + won)
    is_full = summary is full
    return {
        "pass@1, %": with_error(shares),
        "maj@4, %": with_error([float(question.answer_correct) for question in questions]),
        "pass@4, %": with_error([float(any(question.correct)) for question in questions]),
        "difference to full, points (95 %)": DASH if is_full else f"{difference:+.1f} (",
        "McNemar p": DASH if is_full else p_value(min(1.0, 2 * tail)),
        "cut off, %": f"{100 * states.count('truncated') / len(states):.1f}",
        "no answer, %": f"{100 * statistics.fmean(silent):.1f}",
        "mean tokens": f"{statistics.fmean(tokens):,.0f}",
        "length ratio (95 %)": DASH if is_full else f"{ratio:.2f} (",
        "tokens per correct": f"{sum(tokens) / sum(sum(q.correct) for q in questions):,.0f}",
    }


def cells(group: Group, row: Row) -> dict[str, str]:
    """What the table says."""
    return {column.title: column.cell(row) for column in columns(group)}


def disagreements(shown: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Columns that say something else; of an interval, the ends are random and are left out."""
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


def test_every_cell_is_what_the_samples_give(group: Group) -> None:
    full = group.rows[0].summary
    for row in group.rows:
        assert not disagreements(cells(group, row), worked_out(row.summary, full)), row.name


def test_a_wrong_number_in_any_column_is_found(group: Group) -> None:
    row, full = group.rows[2], group.rows[0].summary
    for title, text in cells(group, row).items():
        first = next(letter for letter in text if letter.isdigit())
        wrong = text.replace(first, str((int(first) + 1) % 10), 1)
        planted = cells(group, row) | {title: wrong}
        assert disagreements(planted, worked_out(row.summary, full)) == [title]


def test_intervals_are_around_their_value(group: Group) -> None:
    for row in group.rows[1:]:
        assert row.against_full
        found = row.against_full.difference
        assert found.low < found.value < found.high
        assert cells(group, row)["difference to full, points (95 %)"] == points(found)


def test_markdown_has_the_same_cells(group: Group) -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown(group).splitlines()
    ]
    shown = [column for column in columns(group) if column.in_readme]
    assert lines[0] == ["policy and budget", *(column.title for column in shown)]
    assert set(lines[1]) == {"---", "---:"}
    assert lines[2:] == [[row.name, *(c.cell(row) for c in shown)] for row in group.rows]


def test_one_sample_a_question_needs_no_columns_of_several() -> None:
    (single,) = make_groups([made(questions=9, samples=1)])
    titles = [column.title for column in columns(single)]
    assert titles[:2] == ["pass@1, %", "difference to full, points (95 %)"]


def test_runs_of_unlike_votes_are_not_called_by_one_number_of_samples() -> None:
    runs = [
        made(questions=9, **FULL),
        made(questions=9, samples=8, budget=128),
        made(questions=9, program="adaptive", samples=16),
    ]
    (mixed,) = make_groups(runs)
    titles = [column.title for column in columns(mixed)]
    assert titles[1:3] == ["vote right, %", "pass@4, %"]
    by_name = {row.name: cells(mixed, row)["pass@4, %"] for row in mixed.rows}
    assert [name for name, cell in by_name.items() if cell == DASH] == [
        "LessIsMore 256, program adaptive"
    ]


def test_a_program_that_stops_by_itself_is_judged_by_its_answers() -> None:
    full, adaptive = made(questions=61, **FULL), made(questions=61, program="adaptive")
    (mixed,) = make_groups([full, adaptive])
    row = mixed.rows[1]
    shown = cells(mixed, row)
    answers = [sum(q.answer_correct for q in run.questions) for run in (full, adaptive)]
    spent = [sum(sum(q.tokens) for q in run.questions) for run in (full, adaptive)]
    expected = f"{100 * (answers[1] - answers[0]) / 61:+.1f} (".replace("-", MINUS)
    assert shown["difference to full, points (95 %)"].startswith(expected)
    assert shown["difference to full, points (95 %)"].endswith("), answers")
    assert shown["length ratio (95 %)"].startswith(f"{spent[1] / spent[0]:.2f} (")
    assert shown["length ratio (95 %)"].endswith("), a question")
    assert shown["tokens a question"] == f"{spent[1] / 61:,.0f}"
    assert shown["pass@1, %"] == DASH
    assert row.accuracy == row.score.answered
    assert mixed.rows[0].accuracy == mixed.rows[0].score.pass_at_1


def test_figures_as_people_write_them() -> None:
    assert percent(Estimate(0.3712, 0.0171)) == f"37.1 {PLUS_MINUS} 1.7"
    assert percent(Estimate(0.5, None)) == f"50.0 {PLUS_MINUS} ?"
    assert percent(None) == DASH
    assert points(Interval(-0.0123, -0.0301, 0.0057)) == f"{MINUS}1.2 ({MINUS}3.0 to +0.6)"
    assert [signed(value) for value in (-0.0001, 0.0, 0.0001)] == ["0.0"] * 3
    assert [p_value(p) for p in (1.0, 0.38, 0.0874, 0.0004)] == ["1.00", "0.38", "0.087", "< 0.001"]
    assert [listed(values) for values in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_contested_questions_are_those_whose_rows_differ_most(group: Group) -> None:
    found = contested(group.rows, most=500)
    by_row = [{q.question_id: sum(q.correct) for q in row.summary.questions} for row in group.rows]
    spreads = {}
    for name in by_row[0]:
        counts = [row[name] for row in by_row]
        spreads[name] = max(counts) - min(counts)
    names = [question.question_id for question in found]
    assert names == sorted((n for n in spreads if spreads[n]), key=lambda n: (-spreads[n], n))
    assert [q.question_id for q in contested(group.rows)] == names[:20]
    for question in found:
        expected = tuple(f"{row[question.question_id]} of 4" for row in by_row)
        assert question.counts == expected


def test_a_question_that_a_run_lacks_is_a_dash() -> None:
    runs = [made(questions=9, **FULL), made(questions=9), made(questions=2, asked=9, budget=128)]
    (short,) = make_groups(runs)
    found = {question.question_id: question.counts for question in contested(short.rows)}
    lacking = {name for name, counts in found.items() if counts[2] == DASH}
    assert lacking
    assert lacking == {name for name in found if name > "q001"}
