"""Tasks: names and prompts; questions from files and the hub, checked row by row; digests."""

import hashlib
import json
import logging
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.sources import ROW_FORM
from lim_sglang.evals.tasks import (
    TASKS,
    Origin,
    Question,
    Task,
    answers_digest,
    find_task,
    load_questions,
    question_origin,
    questions_digest,
    questions_source,
    selection_digest,
    short_name,
    task_title,
)
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import CHOICE_PROMPT, MATH_PROMPT, ask_messages

MATH = TASKS["math500"]
GPQA = TASKS["gpqa_diamond"]
GSM8K = TASKS["gsm8k"]
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EVERY = [*TASKS.values(), find_task("file:mine.jsonl"), find_task("file:mine.jsonl:choice")]


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_a_prompt_is_text_that_asks_the_question_once_and_wants_a_box(task: Task) -> None:
    controls = [c for c in task.prompt if unicodedata.category(c) == "Cc" and c != "\n"]
    assert controls == []
    assert task.prompt.count("{question}") == 1
    assert ("letter" in task.prompt) is (task.answer_kind is AnswerKind.CHOICE)
    (message,) = ask_messages("Is {this} it?", template=task.prompt)
    assert message["content"].startswith("Is {this} it?\n\n")
    assert message["content"].endswith(r"within \boxed{}.")


def test_each_task_has_its_kind_of_answer() -> None:
    assert {name: find_task(name).answer_kind for name in TASKS} == {
        **dict.fromkeys(["aime24", "aime25", "aime26"], AnswerKind.INTEGER),
        **dict.fromkeys(["math500", "gsm8k", "needle", "chain"], AnswerKind.EXPRESSION),
        "gpqa_diamond": AnswerKind.CHOICE,
        "copy": AnswerKind.TEXT,
        "sum": AnswerKind.INTEGER,
    }


@pytest.mark.parametrize("name", ["math5000", "MATH500", "", "file", "file:"])
def test_an_unknown_task_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_task(name)
    known = ", ".join(TASKS)
    guess = "did you mean math500? " if name.lower().startswith("math") else ""
    assert str(caught.value) == (
        f"unknown task {name!r}; {guess}the tasks are {known}, and file:PATH.jsonl"
    )
    assert short_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["six.jsonl", "six.json", "mine/six", "six.csv", "six.jsonl:choice", "here", "[red]x.jsonl"],
)
def test_a_file_that_is_named_like_a_task_is_recognised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    with pytest.raises(ConfigError, match=re.escape(f"are named file:{name}; the tasks are")):
        find_task(name)


@pytest.mark.parametrize(
    ("words", "name", "file", "kind"),
    [
        ("file:a/b.c/sums.jsonl", "file:sums", "a/b.c/sums.jsonl", AnswerKind.EXPRESSION),
        ("file:~/sums.jsonl", "file:sums", "/own/sums.jsonl", AnswerKind.EXPRESSION),
        ("file:sums.jsonl:choice", "file:sums:choice", "sums.jsonl", AnswerKind.CHOICE),
        ("file:sums.jsonl:integer", "file:sums:integer", "sums.jsonl", AnswerKind.INTEGER),
        ("file:sums.jsonl:text", "file:sums:text", "sums.jsonl", AnswerKind.TEXT),
        ("file:sums.jsonl:expression", "file:sums:expression", "sums.jsonl", AnswerKind.EXPRESSION),
        ("file:odd:name.jsonl", "file:odd:name", "odd:name.jsonl", AnswerKind.EXPRESSION),
        ("file:choice", "file:choice", "choice", AnswerKind.EXPRESSION),
    ],
)
def test_a_users_own_file_is_a_task_with_the_kind_of_answer_that_is_named(
    words: str, name: str, file: str, kind: AnswerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/own")
    task = find_task(words)
    assert (task.name, task.file, task.answer_kind) == (name, Path(file), kind)
    assert task.prompt == (CHOICE_PROMPT if kind is AnswerKind.CHOICE else MATH_PROMPT)
    assert short_name(words) == name
    # A stored run has the short name alone, by which its answers are graded again.
    assert find_task(name).name == short_name(name) == name
    assert find_task(name).answer_kind is kind


def write(folder: Path, name: str, *rows: object) -> Path:
    """Write a data folder whose `<name>.jsonl` holds the rows; a text goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"problem": "Add 1 and 2.", "answer": "3"}, Question("0", "Add 1 and 2.", "3")),
        ({"problem": "Add.", "answer": 3}, Question("0", "Add.", "3")),
        ({"problem": "Add.", "answer": 3.0}, Question("0", "Add.", "3")),
        ({"problem": "Halve 1.", "answer": 0.5}, Question("0", "Halve 1.", "0.5")),
        ({"problem": "P", "answer": " x + 1 "}, Question("0", "P", "x + 1")),
        ({"problem": "a\u2028b", "answer": "1"}, Question("0", "a\u2028b", "1")),
        ({"problem": "P", "answer": "1", "id": 60}, Question("60", "P", "1")),
        ({"problem": "P", "answer": "1", "unique_id": "a/b"}, Question("a/b", "P", "1")),
        ({"problem": "P", "answer": "1", "id": "x", "unique_id": "y"}, Question("x", "P", "1")),
        ({"problem": "P", "answer": "1", "id": None}, Question("0", "P", "1")),
        ({"problem": "P", "answer": "1", "level": 5, "url": ""}, Question("0", "P", "1")),
        ({"question": "P", "answer": "1"}, Question("0", "P", "1")),
        ({"problem": "P", "question": 7, "answer": "1"}, Question("0", "P", "1")),
        ({"problem": None, "question": "P", "answer": "1"}, Question("0", "P", "1")),
        ({"problem": "P", "answer": 0}, Question("0", "P", "0")),
        ({"problem": "P", "answer": 1e-7}, Question("0", "P", "0.0000001")),
        ({"problem": "P", "answer": 1e22}, Question("0", "P", "10000000000000000000000")),
    ],
)
def test_a_row_becomes_a_question(tmp_path: Path, row: dict[str, Any], expected: Question) -> None:
    assert load_questions(MATH, write(tmp_path, "math500", row)) == [expected]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", 'expected one JSON object a line with "problem" (or "question") and "answer"'),
        ("7", 'and "answer", not 7'),
        (
            {"Problem": "P", "answer": "3"},
            'lacks "problem" or "question"; it has "Problem", "answer", and needs "problem" or '
            '"question" and "answer"',
        ),
        ({"problem": "P"}, 'lacks "answer"; it has "problem", and needs'),
        ({"question": "P", "answer": None}, 'lacks "answer"; it has "question", "answer" (null)'),
        ({}, 'lacks "problem" or "question" and "answer"; it has no field'),
        ({"problem": "  ", "answer": "3"}, "problem must be a non-empty text"),
        ({"question": ["P"], "answer": "3"}, 'question must be a non-empty text, not ["P"]'),
        ({"problem": "P", "answer": False}, "non-empty text, not false"),
        ({"problem": "P", "answer": "x", "id": True}, "id must be a text or a whole number"),
        ({"problem": "P", "answer": "x", "id": 1.5}, "whole number, not 1.5"),
        ({"problem": "P", "answer": "one word after another " * 7}, "answer is a text of 16"),
        ({"problem": "P", "answer": "#### 12\nThat is all."}, "end the solution with #### and"),
        ({"problem": 7, "answer": "3"}, "problem must be a non-empty text"),
        ({"problem": "P", "answer": ""}, "answer must be a number or a non-empty text"),
        ({"problem": "P", "answer": True}, "answer must be a number or a non-empty text"),
        ({"problem": "P", "answer": ["3"]}, "answer must be a number or a non-empty text"),
        ('{"problem": "P", "answer": NaN}', "answer must be a number or a non-empty text"),
        ({"problem": "P", "answer": "1", "id": "first"}, "'first' occurs a second time, after "),
        ({"problem": "P", "answer": "1", "id": ""}, "id must be a non-empty text"),
        ('{"problem": "P\\ud800", "answer": "1"}', "problem holds half a surrogate pair"),
        ('{"problem": "P", "answer": "\\ud800"}', "answer holds half a surrogate pair"),
        ('{"problem": "P", "answer": 1e400}', "answer must be a number or a non-empty text"),
        (f'{{"problem": "P", "answer": {"9" * 5000}}}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, row: object, complaint: str) -> None:
    good = {"problem": "Add 1 and 2.", "answer": "3", "id": "first"}
    with pytest.raises(DataError) as caught:
        load_questions(MATH, write(tmp_path, "math500", good, "", row))
    assert f"{tmp_path / 'math500.jsonl'}, line 3: " in str(caught.value)
    assert complaint in str(caught.value)


def test_all_bad_rows_are_named_at_once_but_not_without_end(tmp_path: Path) -> None:
    rows = [{"problem": "P", f"field{n}": 1} for n in range(25)]
    with pytest.raises(DataError, match="and 15 more") as caught:
        load_questions(MATH, write(tmp_path, "math500", *rows))
    assert str(caught.value).count('lacks "answer"') == 10


GOOD_ROW, NO_ANSWER = {"problem": "P", "answer": "1"}, {"problem": "P"}


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([NO_ANSWER] * 6, "all 6 rows of {file}"),
        ([NO_ANSWER], "{file}, line 1"),
        ([GOOD_ROW, *[NO_ANSWER] * 3], "{file}, lines 2-4"),
        ([NO_ANSWER, GOOD_ROW, NO_ANSWER, NO_ANSWER], "{file}, lines 1, 3-4"),
        ([NO_ANSWER, GOOD_ROW] * 11, "{file}, lines 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, …"),
    ],
)
def test_a_problem_of_many_rows_is_told_once(
    rows: list[dict[str, str]], place: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        load_questions(MATH, write(tmp_path, "math500", *rows))
    where = place.format(file=tmp_path / "math500.jsonl")
    assert f'{where}: lacks "answer"' in str(caught.value)
    assert str(caught.value).count('lacks "answer"') == 1


def test_a_folder_without_the_file_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data-dir must be a folder with math500\.jsonl"):
        load_questions(MATH, tmp_path)
    with pytest.raises(DataError, match="holds no question"):
        load_questions(MATH, write(tmp_path, "math500", ""))


NO_INTEGER, NO_LETTER = "integer from 0 to 999", "must be the letter of an option, A to J"


@pytest.mark.parametrize(
    ("task", "answers", "complaint"),
    [
        ("aime24", ["0", "033", 999, 25.0, "$70$", r"\text{8}."], None),
        ("aime24", ["1000", -1, 0.5, "x", "1/2", "12 34"], NO_INTEGER),
        ("gpqa_diamond", ["B", "(D)"], None),
        ("gpqa_diamond", ["K", "4.2", "A or B"], NO_LETTER),
        ("file:{folder}/mine.jsonl", ["x^2", r"\{1\}", r"\left\{1\right.", "a\nb", "1\t2"], None),
        ("file:{folder}/mine.jsonl", [r"\frac{1}{2", "{1}}"], "close each brace"),
        ("file:{folder}/mine.jsonl", ["[-2, 2", "(1, (2, 3)"], "close each brace and bracket"),
        ("file:{folder}/mine.jsonl", ["\frac{1}{2}", "\boxed{1}"], r"\\\\(frac|boxed)"),
        ("file:{folder}/mine.jsonl", ["2\times 3", "5\text{ m}", "x \neq 3"], r"\\\\[tn]e?"),
        ("file:{folder}/mine.jsonl", ["2\tau", "\n" + "u", "2\nu", "\rangle"], r"\\\\[tnr]"),
        ("file:{folder}/mine.jsonl", ["4\x00", "4\x075", "4\r5", "4\x7f5"], 'control character "'),
        ("file:{folder}/mine.jsonl", ["a\r\nb", "4\r", "v = 1\nu = 2"], None),
        ("file:{folder}/mine.jsonl:choice", ["12"], "letter of an option.*without :choice"),
        ("file:{folder}/mine.jsonl:integer", ["x^2"], NO_INTEGER),
        ("file:{folder}/mine.jsonl:choice", ["x^2"], NO_LETTER),
    ],
)
def test_the_answers_of_a_file_are_checked_for_their_kind(
    task: str, answers: list[Any], complaint: str | None, tmp_path: Path
) -> None:
    for answer in answers:
        row = {"problem": "Which?\n\nA) 1\nB) 2\nD) 3", "answer": answer}
        name = "mine" if task.startswith("file:") else task
        folder, found = write(tmp_path, name, row), find_task(task.format(folder=tmp_path))
        if complaint is None:
            assert load_questions(found, folder)[0].text == row["problem"]
        else:
            with pytest.raises(DataError, match=rf"line 1: answer .*{complaint}"):
                load_questions(found, folder)


def test_a_lost_command_in_a_problem_is_refused(tmp_path: Path) -> None:
    task = find_task(f"file:{tmp_path / 'sums.jsonl'}")
    write(tmp_path, "sums", {"problem": "Not a\nnot,\ta table\r\nof two\nu", "answer": 4})
    assert load_questions(task)
    write(tmp_path, "sums", {"problem": "Give $\theta$ and $\right)$", "answer": 4})
    with pytest.raises(DataError, match=r"line 1: problem holds a control character for .t: in"):
        load_questions(task)


def test_a_users_own_file_is_read_whatever_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path, "sums", {"problem": "P", "answer": 4, "id": "s"})
    task = find_task(f"file:{tmp_path / 'sums.jsonl'}")
    for data_dir in (None, tmp_path / "none"):
        assert load_questions(task, data_dir) == [Question("s", "P", "4")]
        assert questions_source(task, data_dir) == str(tmp_path / "sums.jsonl")


GOOD_LINE = '{"problem": "P", "answer": "1"}'
TWO_QUESTIONS = [Question("0", "P", "1"), Question("1", "Q", "2")]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"problem": "P", "answer": "1"}\r\n\r\n{"question": "Q", "answer": 2}\r\n',
        b'\n  \n{"problem": "P", "answer": "1"}\n\n{"problem": "Q", "answer": "2"}',
        b' [{"problem": "P", "answer": 1},\n\n  {"problem": "Q",\n "answer": "2"}]\n',
        b'\xef\xbb\xbf[\r\n{"problem": "P", "answer": "1"}, {"problem": "Q", "answer": "2"}\r\n]',
    ],
    ids=["byte order mark and CRLF", "blank lines", "JSON array", "array after a mark"],
)
def test_files_of_other_programs_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    assert load_questions(find_task(f"file:{tmp_path / 'own.jsonl'}")) == TWO_QUESTIONS


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("own.csv", b"problem,answer\nP,1\n", "no JSONL file: line 1 is not JSON"),
        ("own.csv", b"problem,answer\nP,1\n", "csv.DictReader(sys.stdin)"),
        ("own.jsonl", b'{"problem": "P",\n "answer": "1"}\n', "nor is any other line"),
        ("own.jsonl", b'{"problem": "P", "answer": "1"\n', "is no JSONL file: line 1 is not JSON"),
        ("own.jsonl", GOOD_LINE.encode("utf-16"), "not UTF-8 at byte 0"),
        ("own.jsonl", b'{"problem": "caf\xe9", "answer": "1"}', "not UTF-8 at byte 16"),
        ("own.json", b'{"data": [{"problem": "P", "answer": "1"}]}', 'it has "data", and needs'),
        ("own.json", b'[{"problem": "P"}]', 'own.json, item 1: lacks "answer"'),
        ("own.json", b'["a", "b"]', "item 2: expected one JSON object a line"),
        ("own.json", b'["a"]', "own.json, item 1: expected one JSON object a line"),
        ("own.json", b"[]", "holds no question"),
        ("own.jsonl", b"[" * 100_000, "is not JSON"),
        ("own.jsonl", b"\xef\xbb\xbf\r\n", "holds no question"),
    ],
)
def test_files_of_other_forms_are_refused_in_words(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_questions(find_task(f"file:{tmp_path / name}"))
    assert complaint in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("own", "own.jsonl exists"),
        ("own.jsonl:choices", "may end in :expression, :integer, :choice"),
    ],
)
def test_the_path_that_was_meant_is_named(name: str, hint: str, tmp_path: Path) -> None:
    write(tmp_path, "own", {"problem": "P", "answer": 4})
    with pytest.raises(ConfigError, match=re.escape(hint)):
        load_questions(find_task(f"file:{tmp_path / name}"))


@pytest.mark.parametrize("name", ["own.jsonl:choices", "none.jsonl:choices", "own.jsonl:"])
def test_an_unknown_kind_is_told_before_all_else(name: str, tmp_path: Path) -> None:
    write(tmp_path, "own", {"problem": "P", "answer": 4})
    with pytest.raises(ConfigError) as caught:
        load_questions(find_task(f"file:{tmp_path / name}"))
    assert str(caught.value).startswith(f"unknown kind ':{name.rpartition(':')[2]}'")


def test_a_question_knows_its_place_and_the_fields_that_are_not_read(tmp_path: Path) -> None:
    row = {"problem": "P", "question": "", "answer": 4, "unique_id": "a", "choices": [], "Id": 3}
    path = write(tmp_path, "own", "", row) / "own.jsonl"
    (found,) = load_questions(find_task(f"file:{path}"))
    assert found.location == f"{path}, line 2"
    assert found.unread == ("choices", "Id")


def test_a_row_without_an_id_may_not_take_the_id_of_another(tmp_path: Path) -> None:
    named, unnamed = {"problem": "P", "answer": 4, "id": 1}, {"problem": "Q", "answer": 4}
    write(tmp_path, "own", named, unnamed)
    with pytest.raises(DataError, match=r"line 2: the id '1' occurs .*after .*line 1; a row witho"):
        load_questions(find_task(f"file:{tmp_path / 'own.jsonl'}"))


@pytest.mark.parametrize(
    ("answer", "gold", "mark"),
    [
        ("She has 3 * 4 = <<3*4=12>>12 eggs.\nThat is all.\n#### 12", "12", "####"),
        ("So many.\n#### 1,234,567\n", "1234567", "####"),
        ("So much.\n####$1,050.50", "$1050.50", "####"),
        ("A point.\n#### (1,234)", "(1,234)", "####"),
        ("#### 72 clips", "72 clips", "####"),
        ("#### Step 1\nNothing.\n#### Step 2\r\n#### 7\r\n", "7", "####"),
        ("Hence the area is $\\boxed{\\frac{1}{2}}$, as claimed.", r"\frac{1}{2}", r"\boxed{}"),
        (r"$\boxed{391}$", "391", None),
        (r"x \text{ or } y", r"x \text{ or } y", None),
        ("She sold 48 + 24 = 72 clips. #### 72", "72", "####"),
        (r"#### Step 1" "\n" r"So $\boxed{7}$.", "7", r"\boxed{}"),
    ],
)
def test_the_reference_of_a_whole_solution_is_what_its_mark_shows(
    answer: str, gold: str, mark: str | None, tmp_path: Path
) -> None:
    write(tmp_path, "own", {"question": "P", "answer": answer})
    expected = [Question("0", "P", gold, mark)]
    assert load_questions(find_task(f"file:{tmp_path / 'own.jsonl'}")) == expected


def with_digest(task: Task, questions: list[Question], **changes: Any) -> Task:
    """Return a task whose published questions are these."""
    digests = {
        "digest": questions_digest(questions),
        "answers_digest": answers_digest(questions, task.answer_kind),
    }
    return replace(task, num_questions=len(questions), **{**digests, **changes})


@pytest.mark.parametrize(
    ("changes", "asked", "from_hub", "expected"),
    [
        ({}, [("P", "1"), ("Q", "2")], False, Origin.PUBLISHED),
        ({}, [("Q\n", " 2"), ("P", "1")], False, Origin.PUBLISHED),
        ({}, [("P", "1"), ("R", "2")], False, Origin.OWN),
        ({}, [("P", "1"), ("Q", "3")], False, Origin.OWN),
        ({}, [("P", "1")], False, Origin.OWN),
        ({}, [("P", "1"), ("R", "2")], True, Origin.OWN),
        ({"digest": None}, [("P", "1"), ("R", "2")], True, Origin.PUBLISHED),
        ({"digest": None}, [("P", "1"), ("R", "2")], False, Origin.UNVERIFIED),
        ({"digest": None}, [("P", "1")], False, Origin.OWN),
        ({"file": Path("own.jsonl")}, [("P", "1"), ("Q", "2")], False, Origin.OWN),
    ],
)
def test_questions_that_are_not_the_published_ones_are_told_apart(
    changes: dict[str, Any], asked: list[tuple[str, str]], from_hub: bool, expected: Origin
) -> None:
    task = with_digest(MATH, TWO_QUESTIONS, **changes)
    questions = [Question(str(n), text, gold) for n, (text, gold) in enumerate(asked)]
    assert question_origin(task, questions, from_hub=from_hub) is expected


@pytest.mark.parametrize(
    ("name", "origin", "title"),
    [
        ("math500", Origin.PUBLISHED, "math500"),
        ("math500", Origin.OWN, "math500 (own questions)"),
        ("aime25", Origin.UNVERIFIED, "aime25 (unverified questions)"),
        ("file:six", Origin.OWN, "file:six"),
    ],
)
def test_a_title_names_no_benchmark_that_was_not_asked(
    name: str, origin: Origin, title: str
) -> None:
    assert task_title(name, origin) == title


@pytest.mark.parametrize("name", ["none.jsonl", "", "a\0b", "/", "."])
def test_a_file_that_cannot_be_read_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name) if name == "." else tmp_path / name
    with pytest.raises(ConfigError) as caught:
        load_questions(find_task(f"file:{path}"))
    message = str(caught.value)
    assert message.startswith(f"cannot read {path} (")
    assert "file:PATH must name a file" in message
    assert f", {ROW_FORM}" in message
    assert "\n" not in message


def test_the_digest_ignores_order_ids_answers_and_outer_space() -> None:
    one, two = Question("0", "b\n", "1"), Question("1", " a", "2")
    expected = hashlib.sha256(b"a\nb").hexdigest()
    assert questions_digest([one, two]) == questions_digest([two, one]) == expected
    assert questions_digest([Question("9", "a", "0"), Question("8", "b", "0")]) == expected


def test_the_selection_digest_sees_order_ids_and_answers() -> None:
    one, two = Question("0", "a", "1"), Question("1", "b", "2")
    variants = [[one, two], [two, one], [one], [one, Question("1", "b", "3")]]
    assert len({selection_digest(questions) for questions in variants}) == len(variants)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmark files are not beside it")
@pytest.mark.parametrize(("name", "count"), [("math500", 500), ("aime24", 30)])
def test_the_known_benchmarks_have_their_digest(name: str, count: int) -> None:
    questions = load_questions(TASKS[name], SHARED_DATA)
    assert len(questions) == count
    assert questions_digest(questions) == TASKS[name].digest
    assert question_origin(TASKS[name], questions, from_hub=False) is Origin.PUBLISHED


Hub = dict[str, Any]


def put_on_hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> Hub:
    """Fake a hub whose data sets all have these rows; return the arguments of the last call."""
    asked: Hub = {}

    def load_dataset(path: str, **options: str | None) -> list[dict[str, Any]]:
        asked.update(options, path=path)
        return list(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def options(number: int) -> dict[str, str]:
    """Return a row with GPQA's columns."""
    wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    right = {"Question": "P\n", "Correct Answer": "right\n"}
    return right | wrong | {"Record ID": f"rec{number}"}


DATA_SETS: dict[str, tuple[dict[str, Any], str, tuple[str, str | None, str]]] = {
    "math500": (
        {"problem": "P", "answer": "1", "unique_id": "u"},
        "u",
        ("HuggingFaceH4/MATH-500", None, "test"),
    ),
    "aime24": (
        {"id": 60, "problem": "P", "solution": "S", "answer": "7", "url": "U"},
        "60",
        ("HuggingFaceH4/aime_2024", None, "train"),
    ),
    "aime25": (
        {"problem": "P", "answer": "7", "id": "0"},
        "0",
        ("math-ai/aime25", None, "test"),
    ),
    "aime26": (
        {"problem_idx": 1, "answer": 7, "problem": "P"},
        "1",
        ("MathArena/aime_2026", None, "train"),
    ),
    "gsm8k": ({"question": "P", "answer": "S\n#### 7"}, "0", ("openai/gsm8k", "main", "test")),
    "gpqa_diamond": (options(5), "rec5", ("Idavidrein/gpqa", "gpqa_diamond", "train")),
}
"""A row with the columns of each data set, its id, and the path, name and split of the call."""


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub_id])
def test_each_data_set_is_asked_for_at_its_revision_and_read_by_its_fields(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, question_id, (path, subset, split) = DATA_SETS[name]
    asked = put_on_hub(monkeypatch, row)
    (question,) = load_questions(TASKS[name])
    assert question.text.startswith("P")
    assert question.question_id == question_id
    revision = TASKS[name].revision
    assert asked == {"path": path, "name": subset, "split": split, "revision": revision}
    assert len(asked["revision"]) == 40


def test_a_bad_row_of_the_hub_is_named_by_its_own_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_hub(monkeypatch, {"question": "P", "answer": "no mark"}, {"question": " ", "answer": ""})
    with pytest.raises(DataError) as caught:
        load_questions(GSM8K)
    message = str(caught.value)
    assert "openai/gsm8k, row 0: answer must end in #### and the number" in message
    assert "openai/gsm8k, row 1: question must be a non-empty text" in message


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("3 * 6 = 18\n#### 18", "18"), ("#### -1,234.5", "-1234.5"), ("a #### b\n####  7 ", "7")],
)
def test_the_answer_of_gsm8k_is_what_follows_the_mark(
    answer: str, gold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_hub(monkeypatch, {"question": "P", "answer": answer})
    assert load_questions(GSM8K) == [Question("0", "P", gold)]


def test_the_options_are_shuffled_and_the_gold_letter_is_that_of_the_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_on_hub(monkeypatch, *map(options, range(400)))
    questions = load_questions(GPQA)
    for question in questions:
        text, space, *lines = question.text.split("\n")
        assert (text, space, "".join(line[:3] for line in lines)) == ("P", "", "A) B) C) D) ")
        assert sorted(line[3:] for line in lines) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert f"{question.gold}) right" in lines
    counts = Counter(question.gold for question in questions)
    assert set(counts) == set("ABCD")
    assert min(counts.values()) > 70  # 100 expected, 70 is 3.5 deviations away


def test_the_order_of_options_follows_from_the_seed_and_the_id_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_on_hub(monkeypatch, *map(options, range(12)))
    letters = "".join(question.gold for question in load_questions(GPQA))
    assert letters == "ACAABCAABCDB"  # in every version of Python
    put_on_hub(monkeypatch, *map(options, reversed(range(12))))
    assert "".join(question.gold for question in load_questions(GPQA)) == letters[::-1]
    other = replace(GPQA, shuffle_seed=1)
    assert "".join(question.gold for question in load_questions(other)) != letters[::-1]


def test_a_missing_hub_is_one_sentence_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load_dataset(path: str, **options: str | None) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        load_questions(TASKS["aime24"])
    message = str(caught.value)
    assert "\n" not in message
    assert "no route to host" in message
    assert "--data-dir a folder with aime24.jsonl" in message
    assert caplog.text == ""
