"""Questions of two runs that were asked different ones, paired by what they ask."""

from dataclasses import replace
from pathlib import Path

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import compare
from lim_sglang.evals.metrics import Summary, summarise
from lim_sglang.evals.run_store import AskedQuestion
from lim_sglang.evals.summaries import read_summary, write_summary
from tests.evals.summaries import RECORD, SAMPLES, equivalent, question, run


def asked(*questions: tuple[str, str, bool], name: str) -> Summary:
    """Return a run of questions with an id, a digest and a verdict."""
    made = (
        replace(question(row_id, [0], 0 if is_right else 1), digest=digest)
        for row_id, digest, is_right in questions
    )
    return replace(run(*made, questions=name, benchmark=name), source=name)


OLD = asked(("0", "a", True), ("1", "b", True), ("2", "c", False), name="old")
"""Three questions, by rows of a file without ids."""


def test_a_row_put_first_shifts_no_question() -> None:
    """Ids of rows go up by one; each question meets itself, and the new one is left out."""
    new = asked(
        ("0", "n", False), ("1", "a", True), ("2", "b", True), ("3", "c", False), name="new"
    )
    with pytest.raises(
        DataError, match=r"\(old lacks 1 of 4 questions, with the id 0 of new\); com"
    ):
        compare(OLD, new)
    found = compare(OLD, new, common=True)
    assert (found.num_questions, found.difference.value) == (3, 0.0)
    moved = "the ids of 3 questions, and so in the seeds of their samples"
    assert found.other_differences[-1] == moved


def test_an_edited_question_is_another_one() -> None:
    new = asked(("0", "a", True), ("1", "edited", False), ("2", "c", False), name="new")
    with pytest.raises(
        DataError, match=r"id 1 of new; new lacks 1 of 4 questions, with the id 1 of"
    ):
        compare(OLD, new)
    found = compare(OLD, new, common=True)
    assert (found.num_questions, found.difference.value) == (2, 0.0)


def test_the_same_questions_under_other_ids_are_compared() -> None:
    new = asked(("x", "c", True), ("y", "a", True), ("z", "b", True), name="new")
    found = compare(OLD, new)
    assert (found.num_questions, found.difference.value) == (3, pytest.approx(1 / 3))


def test_a_question_that_is_asked_twice_is_paired_twice() -> None:
    twice = asked(("0", "a", True), ("1", "a", False), ("2", "b", True), name="twice")
    assert compare(OLD, twice, common=True).num_questions == 2
    assert compare(twice, replace(twice, conditions=OLD.conditions)).num_questions == 3


def test_files_of_questions_that_are_not_recorded_are_not_paired_by_ids() -> None:
    """A summary of an older version has no digests."""
    old = replace(OLD, questions=tuple(replace(each, digest=None) for each in OLD.questions))
    with pytest.raises(DataError, match="come from different files of questions"):
        compare(old, asked(("0", "n", True), name="new"), common=True)


def test_a_summary_keeps_the_digests_of_what_was_asked(tmp_path: Path) -> None:
    """A text's white space makes no difference, a reference does; no text, no digest."""
    asked_by_id = {"a": AskedQuestion("4", "2 + 2?"), "b": AskedQuestion("4", None)}
    summary = summarise(RECORD, SAMPLES, equivalent, asked=asked_by_id)
    digest, none = (each.digest for each in summary.questions[:2])
    assert (len(digest or ""), none) == (16, None)
    write_summary(summary, tmp_path / "s.json")
    assert read_summary(tmp_path / "s.json") == summary
    for asked_otherwise, is_same in ((("4", " 2 + 2?\n"), True), (("5", "2 + 2?"), False)):
        other = summarise(RECORD, SAMPLES, equivalent, asked={"a": AskedQuestion(*asked_otherwise)})
        assert (other.questions[0].digest == digest) == is_same
