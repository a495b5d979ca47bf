"""Votes at equal time: pairs of counts and votes against plain enumeration."""

import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from typer.testing import CliRunner

from lim_sglang.cli import app
from lim_sglang.errors import DataError
from lim_sglang.evals.equal_time import equal_times
from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.evals.summaries import write_summary
from tests.evals.summaries import question, run

SEVEN = {"requests_by_session": [7]}


def drawn(num_questions: int, samples: int, seconds: float, **conditions: Any) -> Summary:
    """Return a run whose answers are drawn, group 0 being right."""
    draw = random.Random(samples)
    questions = [
        question(
            f"q{n}",
            [draw.choice((0, 0, 1, None)) for _ in range(samples)],
            chosen=0,
            seconds=[seconds] * samples if seconds else None,
        )
        for n in range(num_questions)
    ]
    return run(*questions, **(SEVEN | conditions))


def compared(folder: Path, *words: str) -> str:
    """Return what `lim compare` prints for a slow and a fast run with these options."""
    paths = [folder / "slow.json", folder / "fast.json"]
    for path, summary in zip(paths, (drawn(5, 6, 3.0), drawn(5, 9, 2.0)), strict=True):
        write_summary(replace(summary, run_id=path.stem), path)
    result = CliRunner().invoke(app, ["compare", *map(str, paths), *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def majority(found: QuestionResult, count: int) -> float:
    """Return the share of all subsets whose most frequent answer, the earlier of two, is right."""
    rights = []
    for subset in combinations(range(len(found.group)), count):
        groups = [found.group[n] for n in subset if found.group[n] is not None]
        rights.append(bool(groups) and max(groups, key=groups.count) == 0)
    return fmean(rights)


def test_each_row_has_the_samples_that_fit_and_the_votes_of_all_subsets() -> None:
    slow, fast = drawn(5, 6, 3.0), drawn(5, 9, 2.0)
    rows = equal_times(slow, fast)
    counts = [(row.seconds, row.samples_a, row.samples_b) for row in rows]
    assert counts == [(3, 1, 1), (6, 2, 3), (9, 3, 4), (12, 4, 6), (18, 6, 9)]
    for row in rows:
        expected = [
            fmean(majority(each, count) for each in of_run.questions)
            for of_run, count in ((slow, row.samples_a), (fast, row.samples_b))
        ]
        assert [row.majority_a, row.majority_b] == pytest.approx(expected)
        assert row.difference.value == pytest.approx(expected[1] - expected[0])


def test_a_count_that_a_run_has_not_drawn_ends_the_table() -> None:
    assert [row.samples_b for row in equal_times(drawn(5, 6, 3.0), drawn(5, 5, 1.0))] == [3]


def test_there_is_an_interval_from_twenty_questions_on() -> None:
    few, many = (equal_times(drawn(n, 3, 2.0), drawn(n, 6, 1.0))[0] for n in (19, 20))
    assert few.difference.bounds is None
    assert many.difference.bounds
    assert many.difference.bounds[0] <= many.difference.value <= many.difference.bounds[1]


@pytest.mark.parametrize(
    ("slow", "fast", "reason"),
    [
        (drawn(3, 3, 2.0), drawn(3, 3, 1.0, requests_by_session=[8]), "depend on the load"),
        (drawn(3, 3, 2.0), drawn(3, 3, 0.0), "did not record"),
        (drawn(3, 1, 1.0), drawn(3, 3, 2.0), "name the slower run first"),
        (drawn(3, 3, 9.0), drawn(3, 3, 1.0), "draw more samples of the faster run"),
        (drawn(3, 3, 2.0, program="adaptive"), drawn(3, 3, 1.0), "stops early"),
    ],
)
def test_runs_whose_seconds_say_nothing_are_refused(
    slow: Summary, fast: Summary, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        equal_times(slow, fast)


def test_the_command_shows_the_rows_where_it_is_asked_to(tmp_path: Path) -> None:
    lines = compared(tmp_path, "--per-second").splitlines()
    cells = [
        [cell.strip() for cell in line.split("\N{BOX DRAWINGS LIGHT VERTICAL}")] for line in lines
    ]
    assert ["18.0", "6", "9"] in [row[1:4] for row in cells]
    assert "equal time" not in compared(tmp_path)


def test_the_rows_are_part_of_the_record(tmp_path: Path) -> None:
    record = json.loads(compared(tmp_path, "--per-second", "--json"))
    assert [row["samples_b"] for row in record["equal_time"]] == [1, 3, 4, 6, 9]
    assert "equal_time" not in json.loads(compared(tmp_path, "--json"))
