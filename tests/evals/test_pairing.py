"""Questions of two runs that were asked different ones, paired by their texts."""

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import compare
from lim_sglang.evals.metrics import Summary, summarise
from lim_sglang.evals.pairing import paired_questions
from lim_sglang.evals.run_store import AskedQuestion
from lim_sglang.evals.summaries import read_summary, write_summary
from tests.evals.summaries import RECORD, SAMPLES, equivalent, question, run


def asked(
    *questions: tuple[str, str | None, bool],
    name: str,
    references: str = "",
    num_failed: int = 0,
    **conditions: Any,
) -> Summary:
    """Return a run of one sample of questions with an id, a digest and a verdict.

    Args:
        references: one a question; empty: as read from a summary.
    """
    made = (
        replace(
            question(row_id, [0], 0 if is_right else 1), text_digest=digest, reference=reference
        )
        for (row_id, digest, is_right), reference in zip_longest(questions, references)
    )
    differing = {"questions": name, "benchmark": name, "samples": 1, "origin": "own", **conditions}
    return replace(run(*made, num_failed=num_failed, **differing), source=name)


def unread(summary: Summary) -> Summary:
    """Return a run as an older version would have summed it up, without digests."""
    bare = (replace(each, text_digest=None) for each in summary.questions)
    return replace(summary, questions=tuple(bare))


ROWS = (("0", "a", True), ("1", "b", True), ("2", "c", False))
OLD = asked(*ROWS, name="old")
"""Three questions, by rows of a file without ids."""
NEW = asked(("0", "n", True), name="new")


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
    ids = [(x.question_id, y.question_id) for x, y in paired_questions(OLD, new, common=True)]
    assert ids == [("0", "1"), ("1", "2"), ("2", "3")]


def test_an_edited_question_is_another_one() -> None:
    new = asked(("0", "a", True), ("1", "edited", False), ("2", "c", False), name="new")
    edited = "the texts differ in 1 of 3 questions, with the id 1"
    with pytest.raises(DataError, match=rf"\({edited}\); compare the questions of both by"):
        compare(OLD, new)
    found = compare(OLD, new, common=True)
    assert (found.num_questions, found.difference.value) == (2, 0.0)
    left_out = f"their questions, of which these are left out: {edited}"
    assert found.other_differences[0] == left_out


def test_edited_added_and_removed_questions_are_told_apart() -> None:
    rows = [(f"q{n}", f"text {n}", True) for n in range(8)]
    before = asked(*rows, name="before", references="12345678")
    edited = [("q0", "another", True), *rows[1:3], ("new", "n", True)]
    after = asked(*edited, name="after", references="1204")
    found = compare(before, after, common=True)
    assert found.num_questions == 1
    assert found.other_differences[0] == (
        "their questions, of which these are left out: before lacks 1 of 9 questions, with the id "
        "new of after; after lacks 5 of 9 questions, with the ids q3, q4, q5 and 2 more of before; "
        "the texts differ in 1 of 9 questions, with the id q0; "
        "the references differ in 1 of 9 questions, with the id q2"
    )


def test_only_compared_questions_count_as_grown_past_the_budget() -> None:
    """The edited question alone was longer than the budget, and is not compared."""
    new = asked(("0", "a", True), ("1", "edited", False), ("2", "c", False), name="new", budget=64)
    long = replace(new.questions[1], tokens=(100,))
    new = replace(new, questions=(new.questions[0], long, new.questions[2]))
    found = compare(OLD, new, common=True).past_budget_b
    assert found is not None
    assert (found.count, found.num_samples) == (0, 2)


def test_the_same_questions_under_other_ids_are_compared() -> None:
    new = asked(("x", "c", True), ("y", "a", True), ("z", "b", True), name="new")
    found = compare(OLD, new)
    assert (found.num_questions, found.difference.value) == (3, pytest.approx(1 / 3))


def test_a_question_that_is_asked_twice_is_paired_twice() -> None:
    twice = asked(("0", "a", True), ("1", "a", False), ("2", "b", True), name="twice")
    assert compare(OLD, twice, common=True).num_questions == 2
    assert compare(twice, replace(twice, conditions=OLD.conditions)).num_questions == 3


def test_of_equal_questions_those_with_equal_ids_are_paired_first() -> None:
    both = asked(("x", "a", True), ("y", "a", False), ("z", "b", True), name="both")
    one = asked(("y", "a", False), ("z", "b", True), name="one")
    with pytest.raises(DataError, match="one lacks 1 of 3 questions, with the id x of both"):
        compare(both, one)
    found = compare(both, one, common=True)
    assert (found.num_questions, found.difference.value) == (2, 0.0)
    assert not any("seeds" in each for each in found.other_differences)


def test_equal_questions_of_other_ids_are_paired_in_the_order_of_these() -> None:
    """As text, 10 comes before 9."""
    before = asked(("9", "a", True), ("8", "a", True), name="before")
    after = asked(("10", "a", True), ("9", "b", True), ("11", "a", True), name="after")
    pairs = paired_questions(before, after, common=True)
    assert [(x.question_id, y.question_id) for x, y in pairs] == [("9", "11"), ("8", "10")]


@pytest.mark.parametrize("is_common", [False, True])
@pytest.mark.parametrize("other", [unread(NEW), NEW])
def test_runs_that_do_not_record_their_texts_are_not_paired_by_ids(
    other: Summary, is_common: bool
) -> None:
    """The advice is the same with `--common` and without: it would not help."""
    with pytest.raises(DataError, match="one id may stand for two questions: in the place") as told:
        compare(unread(OLD), other, common=is_common)
    assert "--common" not in str(told.value)
    assert ("old and new do not record" in str(told.value)) == (other is not NEW)


def test_the_folder_of_a_run_without_texts_is_not_asked_for_again() -> None:
    folders = [
        unread(asked(("p", "a", True), *more, name=name, references="12"[: 1 + len(more)]))
        for name, *more in (("old",), ("grown", ("q", "b", True)))
    ]
    with pytest.raises(DataError, match=r"two questions: compare runs over the same questions$"):
        compare(*folders, common=True)


def test_a_reordered_file_without_ids_is_refused() -> None:
    """Its digest does not depend on the order, and its rows have taken each other's ids."""
    same = {"benchmark": "old", "origin": "own"}
    moved = asked(("0", "c", False), ("1", "a", True), ("2", "b", True), name="moved", **same)
    for a, b in ((OLD, unread(moved)), (unread(OLD), moved), (unread(OLD), unread(moved))):
        with pytest.raises(DataError, match="or the same ones in another order"):
            compare(a, b, common=True)
    assert compare(OLD, moved, common=True).num_questions == 3


@pytest.mark.parametrize(
    ("ids", "origin", "is_paired"),
    [("012", "own", False), ("012", "published", True), ("pqr", "own", True)],
)
def test_the_first_questions_of_a_file_are_paired_by_ids_where_its_order_is_no_matter(
    ids: str, origin: str, is_paired: bool
) -> None:
    rows = [(row_id, None, True) for row_id in ids]
    same = {"benchmark": "file", "origin": origin}
    whole, first = asked(*rows, name="whole", **same), asked(*rows[:2], name="first", **same)
    if is_paired:
        assert compare(whole, first, common=True).num_questions == 2
    else:
        with pytest.raises(DataError, match="were asked different questions"):
            compare(whole, first, common=True)


def test_an_edited_reference_makes_another_question_where_it_is_known() -> None:
    rows = [("p", "a", True), ("q", "b", True)]
    before = asked(*rows, name="before", references="12")
    after = asked(*rows, name="after", references="13")
    assert compare(before, after, common=True).num_questions == 1
    written = asked(*rows, name="written")
    found = compare(before, written)
    assert found.num_questions == 2
    assert found.other_differences[-1].startswith("references, perhaps: a summary keeps none")
    limited = {"benchmark": "before", "asked": 3}
    after = unread(asked(*rows, name="after", references="13", **limited))
    assert compare(unread(before), after, common=True).num_questions == 1


def test_only_a_run_of_the_same_questions_is_told_to_be_completed() -> None:
    """No sample of the old file is a sample of the row that it grew by."""
    grown = asked(*((str(n), digest, True) for n, digest in enumerate("abcd")), name="grown")
    part = replace(OLD, questions=OLD.questions[:2], source="part")
    for run_of_old in (part, replace(OLD, num_failed=1)):
        with pytest.raises(DataError, match=r"of grown\); compare the questions of both by"):
            compare(run_of_old, grown)
    with pytest.raises(DataError, match=r"the id 2\); complete the runs with lim eval, or compare"):
        compare(OLD, part)
    failed = asked(*ROWS[:2], name="old", num_failed=1, asked=3)
    with pytest.raises(DataError, match="with --retry-failed tries them again, or compare"):
        compare(OLD, failed)


def test_a_summary_keeps_the_digests_of_texts_and_no_reference(tmp_path: Path) -> None:
    """A text's white space makes no difference; no text, no digest."""
    asked_by_id = {"a": AskedQuestion("4", "2 + 2?"), "b": AskedQuestion("4", None)}
    summary = summarise(RECORD, SAMPLES, equivalent, asked=asked_by_id)
    digest, none = (each.text_digest for each in summary.questions[:2])
    assert (len(digest or ""), none) == (16, None)
    assert summary.questions[0].reference == "SECRET gold"
    write_summary(summary, tmp_path / "s.json")
    assert "SECRET" not in (tmp_path / "s.json").read_text()
    assert read_summary(tmp_path / "s.json") == summary
    for asked_otherwise, is_same in ((("5", " 2 + 2?\n"), True), (("4", "2 + 3?"), False)):
        other = summarise(RECORD, SAMPLES, equivalent, asked={"a": AskedQuestion(*asked_otherwise)})
        assert (other.questions[0].text_digest == digest) == is_same


def test_digests_with_references_of_an_earlier_version_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    write_summary(asked(("0", "a", True), name="new"), path)
    path.write_text(path.read_text().replace('"text_digest"', '"digest"'))
    assert [each.text_digest for each in read_summary(path).questions] == [None]
