"""Which runs share a table, what they are called there, and what each is compared with."""

from dataclasses import replace
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import compare
from lim_sglang.evals.metrics import Summary, score
from lim_sglang.evals.report import FULL, Group, make_groups
from tests.evals import made_summaries
from tests.evals.made_summaries import five_runs


def made(budget: int = 256, **changed: Any) -> Summary:
    return made_summaries.made(questions=12, budget=budget, **changed)


def full(**changed: Any) -> Summary:
    return made_summaries.made(questions=12, **made_summaries.FULL | changed)


def group_of(*summaries: Summary) -> Group:
    (group,) = make_groups(summaries)
    return group


def names(*summaries: Summary) -> list[str]:
    return [row.name for row in group_of(*summaries).rows]


def test_full_attention_comes_first_then_the_largest_budget_whatever_the_order_given() -> None:
    runs = five_runs(12)
    expected = ["full", "LessIsMore 1,024", "LessIsMore 512", "LessIsMore 256", "LessIsMore 128"]
    assert names(*runs) == names(*reversed(runs)) == expected


def test_each_run_is_scored_and_compared_with_full_attention() -> None:
    dense, sparse = full(), made(harm=1.0)
    first, second = group_of(sparse, dense).rows
    assert (first.summary, first.against_full) == (dense, None)
    assert second.score == score(sparse)
    assert second.against_full == compare(dense, sparse, names=("full", "LessIsMore 256"))


def test_without_full_attention_nothing_is_compared() -> None:
    assert [row.against_full for row in group_of(made(128), made(256)).rows] == [None, None]


def test_tasks_models_questions_and_limits_have_tables_of_their_own() -> None:
    runs = [
        full(),
        made(),
        made(task="aime24"),
        made(model="a/model"),
        made(max_tokens=400),
    ]
    found = {group.title: [row.name for row in group.rows] for group in make_groups(runs)}
    coder = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    assert found == {
        f"aime24, {coder}": ["LessIsMore 256"],
        f"math500, {coder}, max tokens 400": ["LessIsMore 256"],
        f"math500, {coder}, max tokens 2,048": ["full", "LessIsMore 256"],
        "math500, a/model": ["LessIsMore 256"],
    }


def test_other_questions_of_the_same_task_are_never_in_one_table() -> None:
    mine = full()
    other = replace(made(), conditions={**made().conditions, "questions": "ab" * 32})
    first, second = make_groups([mine, other])
    assert {first.title[-18:], second.title[-18:]} == {"questions 9b1f9b1f", "questions abababab"}
    assert first.rows[0].against_full is second.rows[0].against_full is None


def test_what_is_unusual_is_part_of_a_name() -> None:
    assert names(made(), made(ranking="mass"), made(program="adaptive")) == [
        "LessIsMore 256",
        "LessIsMore 256, program adaptive",
        "LessIsMore 256, ranking mass",
    ]


def test_runs_of_one_name_are_told_apart_by_the_first_condition_that_differs() -> None:
    runs = [made(select_layers=[2]), made(select_layers=[2, 14]), made(128, select_layers=[2])]
    assert names(*runs) == [
        "LessIsMore 256, select layers [2, 14]",
        "LessIsMore 256, select layers [2]",
        "LessIsMore 128, select layers [2]",
    ]
    assert names(made(seed=None), made(seed_honoured=True)) == [
        "LessIsMore 256, seed honoured False",
        "LessIsMore 256, seed honoured True",
    ]


def test_rows_that_differ_in_their_budget_alone_are_one_series() -> None:
    rows = group_of(made(128), made(256), made(128, ranking="mass"), full()).rows
    assert [row.series for row in rows] == [
        *("full", "LessIsMore", "LessIsMore", "LessIsMore, ranking mass")
    ]


def test_of_several_runs_of_full_attention_the_most_similar_is_compared_with() -> None:
    runs = [full(), full(program="adaptive"), made(), made(program="adaptive")]
    found = {r.name: r.against_full.a for r in group_of(*runs).rows if r.against_full}
    assert found == {
        "LessIsMore 256": "full",
        "LessIsMore 256, program adaptive": "full, program adaptive",
    }


def test_the_same_conditions_twice_are_refused_also_of_another_day_and_commit() -> None:
    twin = replace(made(date="2026-11-26", commit="deadbeef"), run_id="twin")
    with pytest.raises(DataError) as caught:
        make_groups([made(), full(), twin])
    assert str(caught.value) == (
        "math500-lessismore-256-0 and twin are of the same conditions (LessIsMore 256): "
        "report one of them"
    )


def test_an_incomplete_run_says_so_and_is_not_compared() -> None:
    part = replace(made(), questions=made().questions[:9], num_failed=3)
    row = group_of(full(), part).rows[1]
    assert row.against_full is None
    assert row.note
    assert row.note.startswith("9 of 12 questions; 3 samples failed and are not scored; not compa")
    assert "3 are in one only" in row.note


def test_no_run_is_an_error() -> None:
    with pytest.raises(DataError, match="no run to report; name run folders"):
        make_groups([])


def test_a_run_that_does_not_say_its_conditions_is_an_error() -> None:
    dumb = replace(made(), conditions={"task": "math500", "policy": FULL})
    with pytest.raises(DataError, match="math500-lessismore-256-0 does not say its model, program"):
        make_groups([dumb])
