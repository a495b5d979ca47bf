"""The tables at the end of a run and of a comparison: every score, under its conditions."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lim_sglang.evals.compare import MINUS, Interval, compare
from lim_sglang.evals.metrics import score
from lim_sglang.evals.table import comparison_table, p_value, points, ratio, score_table
from lim_sglang.programs.schema import SampleState
from tests.evals.results import CONDITIONS, result, summary

FOUR = summary(
    result("all right", [0, 0, 0, 0], chosen=0),
    result("right by vote", [0, 1, 1, None], 1, states={3: SampleState.TRUNCATED}, chosen=1),
    result("wrong by vote", [0, 0, 1, 2], 1, chosen=0),
    result("silent", [None] * 4, states=dict.fromkeys(range(4), SampleState.TRUNCATED)),
    num_failed=3,
)


def rows(table: Table, width: int = 100) -> dict[str, list[str]]:
    """What is shown, by the first cell of each line."""
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    lines = [line.strip("│┃ ").replace("┃", "│") for line in text.getvalue().splitlines()]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    return {first: others for first, *others in cells}


def test_every_score_has_a_row() -> None:
    conditions = CONDITIONS | {"samples": 4, "max_tokens": 2048, "device_name": "GPU"}
    found = rows(score_table(conditions, score(FOUR)))
    assert "sums, tiny, full" in found
    assert "samples 4, at most 2048, GPU" in found
    shown = {name: value for name, (value, *_) in ((n, c) for n, c in found.items() if c)}
    assert shown == {
        "measure": "value",
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


def test_a_program_that_stops_by_itself_is_scored_by_its_answers() -> None:
    conditions: dict[str, Any] = dict(CONDITIONS) | {"program": "adaptive", "budget": 256}
    found = rows(score_table(conditions | {"policy": "lessismore"}, score(FOUR)))
    assert found["answered by adaptive"] == ["50.0 ± 28.9 %"]
    assert found["pass@1 of what was drawn"] == ["43.8 ± 21.3 %"]
    assert not any(name.startswith(("pass@4", "maj@")) for name in found)
    assert "sums, tiny, lessismore-256" in found


def test_scores_of_fewer_questions_say_so() -> None:
    found = rows(score_table(CONDITIONS, score(summary(result("a", [0, 1]), result("b", [0])))))
    assert found["pass@1"] == ["75.0 ± 25.0 %"]
    assert found["pass@2, 1 questions"] == ["100.0 ± ? %"]


def test_aborted_samples_are_shown_where_there_are_any() -> None:
    aborted = result("q", [0, None], states={1: SampleState.ABORTED}, chosen=0)
    assert rows(score_table(CONDITIONS, score(summary(aborted))))["aborted early"] == ["50.0 %"]


def test_each_run_that_is_compared_has_a_column() -> None:
    other = summary(*FOUR.questions[:2], result("wrong by vote", [0, 1], 1, chosen=1), policy="b")
    found = compare(FOUR, other, common=True, names=("a", "b"))
    shown = rows(comparison_table([found, found]))
    assert shown["measure"] == ["b", "b"]
    assert shown["questions"] == ["3", "3"]
    assert shown["pass@1, points"] == [points(found.difference)] * 2
    assert shown["answers, points"] == [points(found.answers)] * 2
    assert shown["answered by it only"] == ["1", "1"]
    assert shown["by the first only"] == ["0", "0"]
    assert shown["McNemar's p"] == ["1.000", "1.000"]
    assert shown["length of samples"] == [ratio(found.length_ratio)] * 2
    assert shown["tokens a question"] == [ratio(found.spent_ratio)] * 2


def test_points_ratios_and_p_values_are_read_at_a_glance() -> None:
    assert points(Interval(-0.012, -0.0311, 0.0068)) == f"{MINUS}1.2 ({MINUS}3.1 to +0.7)"
    assert ratio(Interval(1.024, 0.987, 1.05)) == "1.02 (0.99 to 1.05)"


@pytest.mark.parametrize(("p", "shown"), [(0.0412, "0.041"), (1.0, "1.000"), (4e-9, "< 0.001")])
def test_no_p_value_is_zero(p: float, shown: str) -> None:
    assert p_value(p) == shown
