"""Loading questions: what is read, what is refused, and how a set of questions is identified."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.grade import as_integer
from lim_sglang.evals.questions import (
    Question,
    load_questions,
    questions_digest,
    selection_digest,
)
from lim_sglang.evals.tasks import TASKS, find_task

MATH = TASKS["math500"]
AIME = TASKS["aime24"]
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("204", 204),
        ("023", 23),
        ("000", 0),
        (" $104$. ", 104),
        (r"\textbf{45}", 45),
        ("45.00", 45),
        ("45.5", None),
        ("1204", None),
        ("-4", None),
        ("two", None),
        ("", None),
        ("٣", None),
    ],
)
def test_as_integer_reads_aime_answers(text: str, expected: int | None) -> None:
    assert as_integer(text) == expected


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


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'math5000'.*math500, aime24"):
        find_task("math5000")


def test_the_hub_is_asked_at_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, **options: str | None) -> list[dict[str, Any]]:
        asked.update(options, path=path)
        return [{"problem": "P", "answer": "1", "unique_id": "u"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_questions(MATH) == [Question("u", "P", "1")]
    assert asked == {
        "path": MATH.hub_id,
        "name": None,
        "split": "test",
        "revision": MATH.revision,
    }


def test_a_missing_hub_is_one_sentence_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(path: str, **options: str | None) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        load_questions(AIME)
    message = str(caught.value)
    assert "\n" not in message
    assert "no route to host" in message
    assert "--data-dir a folder with aime24.jsonl" in message


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
