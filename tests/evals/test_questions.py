"""Loading questions: what is read, what is refused, and how a set of questions is identified."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.tasks import (
    TASKS,
    Question,
    Task,
    find_task,
    load_questions,
    questions_digest,
    selection_digest,
)

MATH = TASKS["math500"]
AIME = TASKS["aime24"]
GPQA = TASKS["gpqa_diamond"]
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(folder: Path, name: str, *rows: object) -> Path:
    """A data folder whose `<name>.jsonl` holds the rows; a text goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
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
        ({"problem": "P", "answer": "1", "id": 60}, Question("60", "P", "1")),
        ({"problem": "P", "answer": "1", "unique_id": "a/b"}, Question("a/b", "P", "1")),
        ({"problem": "P", "answer": "1", "id": "x", "unique_id": "y"}, Question("x", "P", "1")),
        ({"problem": "P", "answer": "1", "id": None}, Question("0", "P", "1")),
        ({"problem": "P", "answer": "1", "level": 5, "url": ""}, Question("0", "P", "1")),
    ],
)
def test_a_row_becomes_a_question(tmp_path: Path, row: dict[str, Any], expected: Question) -> None:
    assert load_questions(MATH, write(tmp_path, "math500", row)) == [expected]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "expected an object with problem and answer"),
        ({"answer": "3"}, "has no problem"),
        ({"problem": "P"}, "has no answer"),
        ({"question": "P"}, "has no problem and no answer"),
        ({"problem": "  ", "answer": "3"}, "problem must be a text that is not empty"),
        ({"problem": 7, "answer": "3"}, "problem must be a text that is not empty"),
        ({"problem": "P", "answer": ""}, "answer must be a number or a text"),
        ({"problem": "P", "answer": True}, "answer must be a number or a text"),
        ({"problem": "P", "answer": ["3"]}, "answer must be a number or a text"),
        ('{"problem": "P", "answer": NaN}', "answer must be a number or a text"),
        ({"problem": "P", "answer": "1", "id": "first"}, "'first' occurs a second time"),
        ({"problem": "P", "answer": "1", "id": ""}, "id must be a text that is not empty"),
        ('{"problem": "P\\ud800", "answer": "1"}', "problem holds half a surrogate pair"),
        ('{"problem": "P", "answer": "\\ud800"}', "answer holds half a surrogate pair"),
        ('{"problem": "P", "answer": 1e400}', "answer must be a number or a text"),
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
    rows = [{"problem": "P"}] * 25
    with pytest.raises(DataError, match="and 15 more") as caught:
        load_questions(MATH, write(tmp_path, "math500", *rows))
    assert str(caught.value).count("has no answer") == 10


@pytest.mark.parametrize("answer", ["0", "033", 999, 25.0, "$70$", r"\text{8}."])
def test_aime_takes_integers_up_to_999(tmp_path: Path, answer: object) -> None:
    load_questions(AIME, write(tmp_path, "aime24", {"problem": "P", "answer": answer}))


@pytest.mark.parametrize("answer", ["1000", -1, 0.5, "x", "1/2", "12 34"])
def test_aime_refuses_what_is_no_integer_up_to_999(tmp_path: Path, answer: object) -> None:
    with pytest.raises(DataError, match="integer from 0 to 999"):
        load_questions(AIME, write(tmp_path, "aime24", {"problem": "P", "answer": answer}))


def test_a_limit_takes_the_first_questions(tmp_path: Path) -> None:
    rows = [{"problem": f"Add {n} and 1.", "answer": n + 1} for n in range(5)]
    folder = write(tmp_path, "math500", *rows)
    assert [q.question_id for q in load_questions(MATH, folder, limit=2)] == ["0", "1"]
    assert len(load_questions(MATH, folder, limit=50)) == 5


def test_a_line_separator_inside_a_text_does_not_split_the_line(tmp_path: Path) -> None:
    folder = write(tmp_path, "math500", '{"problem": "a\u2028b", "answer": "1"}')
    assert load_questions(MATH, folder)[0].text == "a\u2028b"


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir must be a folder with math500\.jsonl"):
        load_questions(MATH, tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no question"):
        load_questions(MATH, write(tmp_path, "math500", ""))


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [("B", None), ("(D)", None), ("K", "letter"), ("4.2", "letter"), ("A or B", "letter")],
)
def test_a_file_of_choices_has_the_options_in_the_text_and_a_letter_as_answer(
    answer: str, complaint: str | None, tmp_path: Path
) -> None:
    row = {"problem": "Which?\n\nA) 1\nB) 2\nC) 3\nD) 4", "answer": answer}
    folder = write(tmp_path, "gpqa_diamond", row)
    if complaint is None:
        assert load_questions(GPQA, folder) == [Question("0", row["problem"], answer)]
    else:
        with pytest.raises(
            DataError, match=r"line 1: answer must be the letter of an option, A to J"
        ):
            load_questions(GPQA, folder)


def own(path: Path, kind: str = "") -> Task:
    return find_task(f"file:{path}{kind}")


def test_a_users_own_file_is_read_whatever_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path, "sums", {"problem": "P", "answer": 4, "id": "s"})
    for data_dir in (None, tmp_path / "none"):
        assert load_questions(own(tmp_path / "sums.jsonl"), data_dir) == [Question("s", "P", "4")]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [("", None), (":integer", "integer from 0 to 999"), (":choice", "the letter of an option")],
)
def test_a_users_own_file_is_checked_for_its_kind_of_answer(
    kind: str, complaint: str | None, tmp_path: Path
) -> None:
    write(tmp_path, "mine", {"problem": "P", "answer": "x^2"})
    task = own(tmp_path / "mine.jsonl", kind)
    if complaint is None:
        assert load_questions(task) == [Question("0", "P", "x^2")]
    else:
        with pytest.raises(DataError, match=complaint):
            load_questions(task)


@pytest.mark.parametrize("name", ["none.jsonl", "", "a\0b"])
def test_a_file_that_cannot_be_read_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_questions(own(tmp_path / name))
    message = str(caught.value)
    assert message.startswith(f"cannot read {tmp_path / name} (")
    assert "file:PATH must name a file, one JSON object a line with problem and answer" in message
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
