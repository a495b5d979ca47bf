"""Run folders that commit b95d0a5 sampled on CPU servers: read as ever, never resumed."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import compare
from lim_sglang.evals.grading import Grader, grade_run
from lim_sglang.evals.report import make_groups
from lim_sglang.evals.run_store import RunRecord, load_run, open_run
from lim_sglang.evals.summaries import load_summaries
from lim_sglang.evals.tables import group_table
from lim_sglang.evals.tasks import find_task
from lim_sglang.programs.grading.equivalence import EquivalenceChecker

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
GROUPS: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())["groups"]
RUNS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def assert_close(found: Any, expected: Any) -> None:
    """Compare JSON value by value, floats to 9 digits."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9), (found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("name", GROUPS)
def test_comparison_and_report_are_those_of_then(name: str) -> None:
    group = GROUPS[name]
    full, sparse = load_summaries([GOLDEN / run for run in group["runs"]])
    found = json.loads(json.dumps(asdict(compare(full, sparse))))
    # The sentence is words for these figures; later versions have further fields.
    expected = {k: v for k, v in group["comparison"].items() if k != "sentence"}
    assert_close({k: found[k] for k in expected}, expected)
    tables = make_groups(load_summaries([GOLDEN / run for run in group["reported"]]))
    rows = [cells for table in tables for cells in table_cells(group_table(table).markdown())]
    then = table_cells("\n".join(group["table"]))
    assert len(rows) == len(then)
    # Later versions have further columns, and no test of few questions.
    assert all(old.pop("McNemar p") for old in then)
    assert all(now.items() >= old.items() for now, old in zip(rows, then, strict=True))


def table_cells(markdown: str) -> list[dict[str, str]]:
    """Return the rows of tables in Markdown, each with the titles of its own table."""
    head: list[str] = []
    rows = []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[0] == "policy and budget":
            head = cells
        elif cells[0] != "---":
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


READ_OTHERWISE = {
    "smollm2-full": [
        (r"\boxed{}20 + 15 = 35", "35"),
        ("within the specified constraints", None),
        ("7 * 2 = 14", "14"),
    ],
    "smollm2-lessismore": [(None, "2.25")],
}
"""Answers of a run, then and by the extraction of today."""
NUM_RIGHT_SINCE = {"smollm2-full": 1}
"""Samples whose answer of today is right, where the one of then was wrong."""


@pytest.mark.parametrize("name", RUNS)
def test_verdicts_are_renewed_and_change_with_the_answers_alone(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    shutil.copytree(GOLDEN / name, run)
    kind = find_task(load_run(run).record.settings["task"]).answer_kind
    with EquivalenceChecker() as checker:
        found = grade_run(load_run(run), Grader(kind, checker), num_threads=1)
    assert found.num_changed == NUM_RIGHT_SINCE.get(name, 0)
    answers = [
        (then.sample.answer, now.sample.answer)
        for then, now in zip(load_run(GOLDEN / name).samples, load_run(run).samples, strict=True)
    ]
    assert [pair for pair in answers if pair[0] != pair[1]] == READ_OTHERWISE.get(name, [])


def test_a_run_of_then_is_not_resumed_and_the_error_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "tiny-full", run)
    old = load_run(run).record
    settings = {**old.settings, "sampling_version": 1, "grading_version": None}
    del settings["code_sha256"]
    with pytest.raises(DataError, match=r"begun by an earlier lim-sglang.*not resumed"):
        open_run(run, RunRecord("id", settings, old.about))
    assert load_run(run).record == old
