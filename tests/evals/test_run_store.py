"""The run's folder: what is written stays, a torn write is dropped, other settings are refused, and
readers get complete lines with the newest verdicts.
"""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.run_store import (
    AskedQuestion,
    Failure,
    GradedSample,
    RunFolder,
    RunRecord,
    load_run,
    open_run,
    read_questions,
    read_record,
    read_samples,
    refuse_other_writers,
    write_questions,
    write_record,
)
from lim_sglang.evals.tasks import Question, questions_digest, selection_digest
from lim_sglang.programs.schema import SampleState
from tests.builders import make_graded

SETTINGS: dict[str, Any] = {
    "task": "math500",
    "num_samples": 2,
    "questions": {"asked": 2},
    "lim": {"config": {"policy": "lessismore", "budget": 256, "dense_layers": (0, 1)}},
}
AWKWARD = "so \\boxed{4}\n\u2028 ½"


def graded(index: int = 0, question_id: str = "q", **changes: Any) -> GradedSample:
    """Return a sample whose text has a newline and a line separator."""
    return make_graded(index, question_id, **{"text": AWKWARD, **changes})


def question(question_id: str, of: int = 3) -> list[GradedSample]:
    """Return the samples of a question that are written together; the last has no vote."""
    return [
        replace(graded(index, question_id), written_together=of, late=index == of - 1)
        for index in range(of)
    ]


def begin(path: Path, settings: dict[str, Any] = SETTINGS) -> RunFolder:
    return open_run(path, RunRecord("math500-x", settings, {"url": "http://here"}))


def write_run(path: Path, *samples: GradedSample) -> None:
    """Store samples, each in a write of its own."""
    with begin(path) as folder:
        for sample in samples:
            folder.append(sample)


@pytest.mark.parametrize(
    ("stored", "before", "expected"),
    [
        ((), None, [8]),
        ((), [{"requests": 64}], [8]),
        ((graded(),), None, [None, 8]),
        ((graded(),), [{"requests": 64}], [64, 8]),
    ],
)
def test_sessions_are_recorded_from_the_first_stored_sample_on(
    stored: tuple[GradedSample, ...],
    before: list[dict[str, int]] | None,
    expected: list[int | None],
    tmp_path: Path,
) -> None:
    with begin(tmp_path) as folder:
        record = read_record(tmp_path)
        about = {**record.about, **({"sessions": before} if before else {})}
        write_record(tmp_path, replace(record, about=about))
        folder.append(*stored)
        folder.begin_session(8)
    found = read_record(tmp_path)
    assert [each["requests"] for each in found.about["sessions"]] == expected
    assert (found.settings["task"], found.about["url"]) == ("math500", "http://here")


def reopened(path: Path) -> list[GradedSample]:
    """Return the samples with which a run is resumed."""
    with begin(path) as folder:
        return folder.samples


def write_a_little(descriptor: int, data: memoryview, write: Any = os.write) -> int:
    """Write as a disk does that is full soon."""
    if len(data) < 100:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, data[:50])


ROW = graded(1).to_row()


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    cut_off = graded(1, state=SampleState.TRUNCATED, answer=None)
    written = [[graded(0)], [cut_off], [graded(0, "p")], question("r"), question("s", of=1)]
    with begin(tmp_path / "run") as folder:
        for together in written:
            folder.append(*together)
    found = reopened(tmp_path / "run")
    assert found == [each for together in written for each in together]
    assert [each.late for each in found[3:]] == [False, False, True, True]
    # Only rows of questions that are written together say how many belong together.
    assert not {"late", "of"} & ROW.keys()
    assert found[5].to_row().items() >= {"of": 3, "late": True}.items()


def test_lines_that_lack_a_new_field_have_its_default_and_unknown_fields_are_ignored(
    tmp_path: Path,
) -> None:
    write_run(tmp_path)
    added = {"error": None, "num_reasoning_tokens": 0, "confidence": None}
    old = {name: value for name, value in ROW.items() if name not in added}
    assert old | added == ROW
    (tmp_path / "samples.jsonl").write_text(json.dumps(old | {"later": 1}) + "\n")
    assert reopened(tmp_path) == [graded(1)]
    write_run(tmp_path, graded(2, num_reasoning_tokens=9, confidence=17.25))
    assert reopened(tmp_path)[1].sample.confidence == 17.25


def test_a_sample_is_synced_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with begin(tmp_path) as folder:
        folder.append(graded(0))
        folder.append(graded(1))
    assert synced[-1] == (tmp_path / "samples.jsonl").stat().st_size
    assert synced[-2] == (tmp_path / "samples.jsonl").read_bytes().index(b"\n") + 1


@pytest.mark.parametrize("cut", [1, 2, 60, 10_000])
def test_a_torn_last_line_is_dropped_and_can_be_redone(tmp_path: Path, cut: int) -> None:
    write_run(tmp_path, graded(0))
    file = tmp_path / "samples.jsonl"
    first = file.read_bytes()
    write_run(tmp_path, graded(1))
    second = file.read_bytes()[len(first) :]
    file.write_bytes(first + second[:-cut])
    assert reopened(tmp_path) == [graded(0)]
    write_run(tmp_path, graded(1))
    assert file.read_bytes() == first + second


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (json.dumps(ROW)[:20], "Unterminated string"),
        ("[1]", "expected an object"),
        ('{"question": "q"}', "has no gold, no correct, no index"),
        (json.dumps(ROW | {"state": "asleep"}), "unknown state 'asleep'; expected finished"),
        (json.dumps(ROW | {"index": 0}), "occurs a second time"),
        *(
            (json.dumps(ROW | {"of": of}), "of must be a number of lines, not ")
            for of in (0, -1, "3", True, 2.0)
        ),
    ],
)
def test_a_damaged_or_repeated_sample_is_an_error_with_its_line(
    tmp_path: Path, line: str, complaint: str
) -> None:
    write_run(tmp_path, graded(0))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=rf"samples\.jsonl, line 2: .*{complaint}"):
        begin(tmp_path)


def test_a_run_of_other_settings_is_not_mixed_with(tmp_path: Path) -> None:
    write_run(tmp_path, graded())
    other = {**SETTINGS, "lim": {"config": {"policy": "full", "budget": 256}}}
    with pytest.raises(DataError) as caught:
        begin(tmp_path, other)
    message = str(caught.value)
    assert 'lim.config.policy (--policy) was "lessismore" and is now "full"' in message
    assert "lim.config.dense_layers was [0, 1] and is now null" in message
    assert "budget" not in message
    assert "name another folder with --out" in message


def test_a_run_without_samples_begins_anew_with_other_settings(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append_failure(Failure("q", 0, "too long"))
    other = {**SETTINGS, "sampling": {"max_tokens": 5}}
    with begin(tmp_path, other) as folder:
        assert not folder.failures
    assert read_record(tmp_path).settings["sampling"] == {"max_tokens": 5}
    with begin(tmp_path, other) as folder:
        folder.append(graded())
    with pytest.raises(DataError, match="other settings"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("num_asked", "changes", "told"),
    [
        (2, {"gold": "5"}, "  - the reference answers have changed: own.jsonl, line 2\n"),
        (2, {"text": "Q?"}, "  - the questions have changed: own.jsonl, line 2\n"),
        (2, {"question_id": "c"}, "  - the questions have changed, or their ids or their order\n"),
        (3, {}, "  - questions.asked (--limit) was 2 and is now 3\n"),
    ],
)
def test_changed_questions_are_named_by_their_lines(
    num_asked: int, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    before = [
        Question(name, "P?", "4", location=f"own.jsonl, line {n}")
        for n, name in enumerate("abc", 1)
    ]
    now = [before[0], replace(before[1], **changes), before[2]][:num_asked]

    def settings(asked: list[Question]) -> dict[str, Any]:
        digest = selection_digest(asked)
        return {**SETTINGS, "questions": {"asked": len(asked), "asked_digest": digest}}

    with begin(tmp_path, settings(before[:2])) as folder:
        asked = {each.question_id: AskedQuestion(each.gold, each.text) for each in before[:2]}
        write_questions(tmp_path, asked)
        folder.append(graded())
    with pytest.raises(DataError) as caught:
        open_run(tmp_path, RunRecord("math500-x", settings(now), {}), now)
    message = str(caught.value)
    assert f"other settings:\n{told}use the old settings, or name another" in message
    assert ("changed ones need a new run" in message) == bool(changes)
    assert "digest" not in message


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("abc", "2 questions, now 3; new in own.jsonl, line 3"),
        ("cab", "2 questions, now 3; new in own.jsonl, line 1"),
        ("a", "2 questions, now 1; 1 gone"),
        ("acd", "2 questions, now 3; new in own.jsonl, lines 2-3; 1 gone"),
    ],
)
def test_rows_that_were_added_or_removed_are_not_blamed_on_limit(
    rows: str, told: str, tmp_path: Path
) -> None:
    """A file without ids: each row's id is its number."""
    found = refusal(tmp_path, ("ab", None), (rows, None))
    assert found == [f"the questions have changed: {told}"]


def refusal(
    path: Path, old: tuple[str, int | None], new: tuple[str, int | None], *, has_texts: bool = True
) -> list[str]:
    """Return the lines with which a run refuses another file of questions or another limit.

    Args:
        old: a letter for each row of a file without ids, and the limit.
    """
    (before, old_settings), (now, new_settings) = map(_asked_of, (old, new))
    with begin(path, old_settings) as folder:
        folder.append(graded())
        if has_texts:
            write_questions(path, {q.question_id: AskedQuestion(q.gold, q.text) for q in before})
    with pytest.raises(DataError) as caught:
        open_run(path, RunRecord("math500-x", new_settings, {}), now)
    return [line[4:] for line in str(caught.value).split("\n") if line.startswith("  - ")]


def _asked_of(file: tuple[str, int | None]) -> tuple[list[Question], dict[str, Any]]:
    rows, limit = file
    benchmark = [
        Question(str(n), text, "4", location=f"own.jsonl, line {n + 1}")
        for n, text in enumerate(rows)
    ]
    asked = benchmark[:limit]
    digests = {"digest": questions_digest(benchmark), "asked_digest": selection_digest(asked)}
    return asked, {**SETTINGS, "questions": {"asked": len(asked), **digests}}


LIMIT_2_3 = "questions.asked (--limit) was 2 and is now 3"
BEHIND_2 = "the file of questions has changed behind the first 2"
CHANGED = "the questions have changed"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (("abcd", 2), ("abcd", 3), [LIMIT_2_3]),
        (("abcd", 2), ("abcde", 3), [LIMIT_2_3, BEHIND_2]),
        (("abcdx", 2), ("abcdy", 3), [LIMIT_2_3, BEHIND_2]),
        (("abcd", 2), ("abcde", 2), [BEHIND_2]),
        (("ab", None), ("abc", 2), [BEHIND_2]),
        (("abcd", 3), ("abcde", 2), ["questions.asked (--limit) was 3 and is now 2", BEHIND_2]),
        (
            ("abcd", 2),
            ("xabcd", 3),
            [LIMIT_2_3, f"{CHANGED}: 2 questions, now 3; new in own.jsonl, line 1"],
        ),
        (("abcd", 3), ("ab", 3), [f"{CHANGED}: 3 questions, now 2; 1 gone"]),
        (
            ("ab", 3),
            ("abcd", 3),
            [f"{CHANGED}: 2 questions, now 3; new in own.jsonl, line 3"],
        ),
        (("abb", None), ("ab", None), [f"{CHANGED}: 3 questions, now 2; 1 gone"]),
    ],
)
def test_a_limit_and_a_file_that_has_changed_are_told_apart(
    old: tuple[str, int | None], new: tuple[str, int | None], told: list[str], tmp_path: Path
) -> None:
    assert refusal(tmp_path, old, new) == told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            ("ab", None),
            ("abc", None),
            [f"{CHANGED}: 2 questions, now 3; new in own.jsonl, line 3"],
        ),
        (("ab", None), ("xbc", None), [f"{CHANGED}: 2 questions, now 3"]),
        (("abcd", 2), ("abcde", 2), [BEHIND_2]),
        (("abcd", 2), ("abcde", 3), [LIMIT_2_3, BEHIND_2]),
        (
            ("abcd", 3),
            ("abcde", 2),
            ["questions.asked (--limit) was 3 and is now 2", "the file of questions has changed"],
        ),
    ],
)
def test_a_run_without_texts_says_of_its_questions_what_digests_tell(
    old: tuple[str, int | None], new: tuple[str, int | None], told: list[str], tmp_path: Path
) -> None:
    assert refusal(tmp_path, old, new, has_texts=False) == told


def test_a_folder_of_runs_is_no_folder_for_a_run(tmp_path: Path) -> None:
    with begin(tmp_path / "sparse" / "one"):
        pass
    for folder in (tmp_path, tmp_path / "sparse"):
        with pytest.raises(DataError, match=r"holds runs, such as .*one; name another folder"):
            begin(folder)
        assert len([*folder.iterdir()]) == 1


def test_a_run_without_a_sampling_version_is_read_and_never_resumed(tmp_path: Path) -> None:
    old = {**SETTINGS, "code_sha256": {"chat.py": "0"}}
    write_run(tmp_path, graded())
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "settings": old, "about": {}}))
    assert load_run(tmp_path).samples == (graded(),)
    for settings in (SETTINGS, old):
        with pytest.raises(DataError, match=r"recorded no sampling version: .* but not resumed"):
            begin(tmp_path, settings)


def test_samples_without_a_record_are_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"no run\.json"):
        begin(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "x"}'])
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match="is no record of a run"):
        begin(tmp_path)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with begin(tmp_path), pytest.raises(DataError, match="another lim eval is writing"):
        begin(tmp_path)
    with begin(tmp_path), pytest.raises(DataError, match="another lim eval is writing"):
        refuse_other_writers(tmp_path)  # before a server is started
    refuse_other_writers(tmp_path)
    refuse_other_writers(tmp_path / "none")
    write_run(tmp_path)


def test_where_a_run_began_may_differ(tmp_path: Path) -> None:
    write_run(tmp_path)
    open_run(tmp_path, RunRecord("math500-x", SETTINGS, {"url": "http://there"})).close()
    assert read_record(tmp_path).about == {"url": "http://here"}


@pytest.mark.parametrize(
    ("first", "second"),
    [([graded(0)], [graded(1)]), (question("q"), question("r"))],
    ids=["sample", "question"],
)
def test_a_full_disk_is_told_and_stores_all_of_what_belongs_together_or_nothing(
    first: list[GradedSample],
    second: list[GradedSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with begin(tmp_path) as folder:
        folder.append(*first)
        before = (tmp_path / "samples.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_a_little)
            with pytest.raises(DataError, match=r"No space left on device\); make room"):
                folder.append(*second)
        assert (tmp_path / "samples.jsonl").read_bytes() == before
        assert folder.samples == first
        folder.append(*second)
    assert reopened(tmp_path) == first + second


def test_a_full_disk_before_the_first_sample_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(DataError, match=r"cannot write .*run\.json \(No space left"):
            begin(tmp_path)
    assert not (tmp_path / "run.json").exists()
    assert reopened(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name another folder with --out"):
        begin(tmp_path / "file" / "run")


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path: Path) -> None:
    write_run(tmp_path, graded(0, text="\ud83d"))
    assert reopened(tmp_path)[0].sample.text == "?"


def test_a_question_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: memoryview) -> int:
        writes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
    assert writes == [(tmp_path / "samples.jsonl").stat().st_size]


def test_wherever_a_crash_tears_a_question_all_of_it_is_dropped(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
        kept = (tmp_path / "samples.jsonl").read_bytes()
        folder.append(*question("r"))
    file = tmp_path / "samples.jsonl"
    complete = file.read_bytes()
    line_ends = [n for n in range(len(kept), len(complete)) if complete[n : n + 1] == b"\n"]
    sizes = {len(kept), len(kept) + 1, *(end + n for end in line_ends for n in (-1, 0, 1))}
    for size in sizes - {len(complete)}:
        file.write_bytes(complete[:size])
        assert reopened(tmp_path) == question("q"), size
        assert file.read_bytes() == kept, size
    with begin(tmp_path) as folder:
        folder.append(*question("r"))
    assert file.read_bytes() == complete


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        ([*question("q")[:2], *question("r")], "the question 'q' has 2 lines before it, and sho"),
        ([*question("q")[:2], question("q")[1]], r"sample \('q', 1\) occurs a second time"),
    ],
    ids=["half", "twice"],
)
def test_a_question_of_wrong_lines_is_an_error_with_its_line(
    samples: list[GradedSample], complaint: str, tmp_path: Path
) -> None:
    with begin(tmp_path) as folder:
        folder.append(*samples)
    with pytest.raises(DataError, match=f"line 3: {complaint}"):
        begin(tmp_path)


def test_reading_leaves_a_file_as_it_is_while_another_process_writes(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    with begin(tmp_path) as folder:
        folder.append(*question("q"))
        size = file.stat().st_size
        folder.append(*question("r"))
        torn = file.read_bytes()[:-3]
        file.write_bytes(torn)
        assert read_samples(file) == (question("q"), size)
        assert load_run(tmp_path).samples == tuple(question("q"))
        assert file.read_bytes() == torn


def test_a_failure_is_remembered_until_the_sample_is_generated(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append_failure(Failure("q", 0, "HTTP 400"))
        folder.append_failure(Failure("q", 1, "HTTP 500"))
        folder.append_failure(Failure("q", 1, "HTTP 400: too long"))
    with begin(tmp_path) as folder:
        errors = [failure.error for failure in folder.failures.values()]
        assert errors == ["HTTP 400", "HTTP 400: too long"]
        folder.append(graded(1))
        assert list(folder.failures) == [("q", 0)]
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0)]
        assert folder.samples == [graded(1)]


def test_a_failure_that_a_crash_tore_off_is_forgotten_and_a_damaged_one_is_an_error(
    tmp_path: Path,
) -> None:
    with begin(tmp_path) as folder:
        folder.append_failure(Failure("q", 0, "HTTP 400"))
    file = tmp_path / "failures.jsonl"
    first = file.read_bytes()
    file.write_bytes(first + first[:20])
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0)]
        folder.append_failure(Failure("q", 1, "HTTP 400"))
    with begin(tmp_path) as folder:
        assert list(folder.failures) == [("q", 0), ("q", 1)]
    file.write_bytes(first + b'{"question": "q", "index": 0}\n')
    with pytest.raises(DataError, match=r"failures\.jsonl, line 2: has no error"):
        begin(tmp_path)


def write_grades(path: Path, *rows: dict[str, Any]) -> None:
    (path / "grades.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    failure = Failure("r", 1, "HTTP 400")
    write_run(tmp_path, graded(0, "r"), graded(1))
    with begin(tmp_path) as folder:
        folder.append_failure(failure)
    run = load_run(tmp_path)
    assert run.path == tmp_path
    assert run.record == read_record(tmp_path)
    assert run.samples == (graded(0, "r"), graded(1))
    assert run.failures == (failure,)


def test_new_verdicts_and_answers_replace_the_old_ones(tmp_path: Path) -> None:
    write_run(tmp_path, graded(), make_graded(1, answer="5"), make_graded(0, "r", None))
    write_grades(
        tmp_path,
        {"question": "q", "index": 0, "answer": None, "correct": False},
        {"question": "q", "index": 1, "answer": "4.0", "correct": True, "more": 1},
        {"question": "z", "index": 7, "answer": "4", "correct": True},
    )
    first, second, third = load_run(tmp_path).samples
    assert (first.sample.answer, first.correct) == (None, False)
    assert (second.sample.answer, second.correct) == ("4.0", True)
    assert third == make_graded(0, "r", None)
    assert (first.gold, first.sample.text) == ("4", AWKWARD)


@pytest.mark.parametrize("row", ["[]", "{", '{"question": "q", "index": 0, "answer": "4"}'])
def test_a_damaged_verdict_is_an_error_with_the_way_out(tmp_path: Path, row: str) -> None:
    write_run(tmp_path, graded())
    (tmp_path / "grades.jsonl").write_text(f"{row}\n")
    with pytest.raises(DataError, match=r"grades\.jsonl, line 1 is no verdict.*lim grade"):
        load_run(tmp_path)


def test_questions_are_read_as_they_were_written(tmp_path: Path) -> None:
    asked = {"q": AskedQuestion("4", AWKWARD), "r": AskedQuestion("5", None)}
    write_run(tmp_path, graded(0, "s"))
    assert read_questions(tmp_path) == {"s": AskedQuestion(graded().gold, None)}  # of its samples
    (tmp_path / "questions.jsonl.new").write_text('{"id": "q", "go')  # left by a kill
    write_questions(tmp_path, asked)
    assert read_questions(tmp_path) == asked


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ("{first}\n", "holds 1 of the run's 2 questions: run its lim eval command again"),
        ("{first}\n{second}", "holds 1 of the run's 2 questions: run its lim eval command again"),
        ("{first}\n{first}\n", "holds 1 of the run's 2 questions: run its lim eval command again"),
        ("", "holds 0 of the run's 2 questions: run its lim eval command again"),
        ('{{"id": "q"\n', r"line 1 is no question .*or delete the file"),
        ("[]\n", r"line 1 is no question .*or delete the file"),
        ('{{"id": "q", "gold": "4"}}\n', r"line 1 is no question .*or delete the file"),
    ],
)
def test_lost_questions_are_an_error_until_they_are_written_again(
    left: str, words: str, tmp_path: Path
) -> None:
    asked = {"q": AskedQuestion("4", AWKWARD), "r": AskedQuestion("5", None)}
    write_run(tmp_path, graded(0, "s"))
    write_questions(tmp_path, asked)
    file = tmp_path / "questions.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(left.format(first=first, second=second))
    with pytest.raises(DataError, match=words):
        read_questions(tmp_path)
    write_questions(tmp_path, asked)
    assert read_questions(tmp_path) == asked


@pytest.mark.parametrize("names", [("samples.jsonl",), ("samples.jsonl", "run.json.new")])
def test_a_run_that_was_killed_before_its_record_begins_again(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    write_run(tmp_path, graded())
    assert [each.key for each in load_run(tmp_path).samples] == [graded().key]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no record of a run"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "settings": {}, "about": {}}))
    with pytest.raises(DataError, match=r"cannot read .*samples\.jsonl"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ([graded(0), graded(1), graded(0, "r")], graded(1, "r")),
        (question("q", of=1), question("r", of=1)[0]),
    ],
    ids=["samples", "questions"],
)
def test_a_run_is_complete_when_every_sample_or_question_is_there(
    first: list[GradedSample], last: GradedSample, tmp_path: Path
) -> None:
    write_run(tmp_path, *first)
    assert not load_run(tmp_path).is_complete
    write_run(tmp_path, last)
    assert load_run(tmp_path).is_complete
