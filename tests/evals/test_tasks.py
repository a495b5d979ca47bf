"""Tasks: names and prompts; questions from files and the hub, checked row by row; digests."""

import hashlib
import json
import logging
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.grading import AnswerKind
from lim_sglang.evals.tasks import (
    TASKS,
    Question,
    Task,
    find_task,
    load_questions,
    questions_digest,
    questions_source,
    selection_digest,
    short_name,
)
from lim_sglang.programs.schema import CHOICE_PROMPT, MATH_PROMPT, ask_messages

MATH = TASKS["math500"]
AIME = TASKS["aime24"]
GPQA = TASKS["gpqa_diamond"]
GSM8K = TASKS["gsm8k"]
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EVERY = [*TASKS.values(), find_task("file:mine.jsonl"), find_task("file:mine.jsonl:choice")]


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_a_prompt_is_text_that_asks_the_question_once_and_wants_a_box(task: Task) -> None:
    controls = [c for c in task.prompt if unicodedata.category(c) == "Cc" and c != "\n"]
    assert controls == []
    assert task.prompt.count("{question}") == 1
    (message,) = ask_messages("Is {this} it?", template=task.prompt)
    assert message["content"].startswith("Is {this} it?\n\n")
    assert message["content"].endswith(r"within \boxed{}.")


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_choices_and_no_others_are_asked_for_a_letter(task: Task) -> None:
    assert ("letter" in task.prompt) is (task.answer_kind is AnswerKind.CHOICE)


def test_the_aime_has_integers_and_gpqa_letters() -> None:
    kinds = {name: task.answer_kind for name, task in TASKS.items()}
    assert kinds == {
        **dict.fromkeys(["aime24", "aime25", "aime26"], AnswerKind.INTEGER),
        **dict.fromkeys(["math500", "gsm8k"], AnswerKind.EXPRESSION),
        "gpqa_diamond": AnswerKind.CHOICE,
    }


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_name_and_says_where_it_comes_from(name: str) -> None:
    task = find_task(name)
    assert task.name == name
    assert task.version >= 1
    assert task.source
    assert task.file is None


@pytest.mark.parametrize("name", ["math5000", "MATH500", "", "file", "file:"])
def test_an_unknown_task_lists_the_known_ones(name: str) -> None:
    with pytest.raises(DataError) as caught:
        find_task(name)
    known = ", ".join(TASKS)
    assert str(caught.value) == f"unknown task {name!r}; the tasks are {known}, and file:PATH.jsonl"


@pytest.mark.parametrize(
    ("words", "name", "file", "kind"),
    [
        ("file:sums.jsonl", "file:sums", "sums.jsonl", AnswerKind.EXPRESSION),
        ("file:a/b.c/sums.jsonl", "file:sums", "a/b.c/sums.jsonl", AnswerKind.EXPRESSION),
        ("file:sums.jsonl:choice", "file:sums:choice", "sums.jsonl", AnswerKind.CHOICE),
        ("file:sums.jsonl:integer", "file:sums:integer", "sums.jsonl", AnswerKind.INTEGER),
        ("file:sums.jsonl:expression", "file:sums:expression", "sums.jsonl", AnswerKind.EXPRESSION),
        ("file:odd:name.jsonl", "file:odd:name", "odd:name.jsonl", AnswerKind.EXPRESSION),
        ("file:choice", "file:choice", "choice", AnswerKind.EXPRESSION),
    ],
)
def test_a_users_own_file_is_a_task_with_the_kind_of_answer_that_is_named(
    words: str, name: str, file: str, kind: AnswerKind
) -> None:
    task = find_task(words)
    assert (task.name, task.file, task.answer_kind) == (name, Path(file), kind)
    assert task.prompt == (CHOICE_PROMPT if kind is AnswerKind.CHOICE else MATH_PROMPT)
    assert short_name(words) == name
    # A stored run has the short name alone, by which its answers are graded again.
    assert find_task(name).name == short_name(name) == name
    assert find_task(name).answer_kind is kind


def test_the_short_name_of_an_unknown_task_is_itself() -> None:
    assert [short_name(name) for name in ("aime1924", "file:")] == ["aime1924", "file:"]


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_task("file:~/sums.jsonl").file == tmp_path / "sums.jsonl"


def write(folder: Path, name: str, *rows: object) -> Path:
    """Write a data folder whose `<name>.jsonl` holds the rows; a text goes in as it is."""
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
        ({"problem": "  ", "answer": "3"}, "problem must be a non-empty text"),
        ({"problem": 7, "answer": "3"}, "problem must be a non-empty text"),
        ({"problem": "P", "answer": ""}, "answer must be a number or a non-empty text"),
        ({"problem": "P", "answer": True}, "answer must be a number or a non-empty text"),
        ({"problem": "P", "answer": ["3"]}, "answer must be a number or a non-empty text"),
        ('{"problem": "P", "answer": NaN}', "answer must be a number or a non-empty text"),
        ({"problem": "P", "answer": "1", "id": "first"}, "'first' occurs a second time"),
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
    rows = [{"problem": "P"}] * 25
    with pytest.raises(DataError, match="and 15 more") as caught:
        load_questions(MATH, write(tmp_path, "math500", *rows))
    assert str(caught.value).count("has no answer") == 10


@pytest.mark.parametrize("answer", ["0", "033", 999, 25.0, "$70$", r"\text{8}."])
def test_aime_takes_integers_up_to_999(tmp_path: Path, answer: object) -> None:
    load_questions(AIME, write(tmp_path, "aime24", {"problem": "P", "answer": answer}))


@pytest.mark.parametrize("answer", ["1000", -1, 0.5, "x", "1/2", "12 34"])
def test_aime_refuses_all_but_integers_up_to_999(tmp_path: Path, answer: object) -> None:
    with pytest.raises(DataError, match="integer from 0 to 999"):
        load_questions(AIME, write(tmp_path, "aime24", {"problem": "P", "answer": answer}))


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


def test_a_users_own_file_is_read_whatever_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path, "sums", {"problem": "P", "answer": 4, "id": "s"})
    task = find_task(f"file:{tmp_path / 'sums.jsonl'}")
    for data_dir in (None, tmp_path / "none"):
        assert load_questions(task, data_dir) == [Question("s", "P", "4")]
        assert questions_source(task, data_dir) == str(tmp_path / "sums.jsonl")


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [("", None), (":integer", "integer from 0 to 999"), (":choice", "the letter of an option")],
)
def test_a_users_own_file_is_checked_for_its_kind_of_answer(
    kind: str, complaint: str | None, tmp_path: Path
) -> None:
    write(tmp_path, "mine", {"problem": "P", "answer": "x^2"})
    task = find_task(f"file:{tmp_path / 'mine.jsonl'}{kind}")
    if complaint is None:
        assert load_questions(task) == [Question("0", "P", "x^2")]
    else:
        with pytest.raises(DataError, match=complaint):
            load_questions(task)


@pytest.mark.parametrize("name", ["none.jsonl", "", "a\0b"])
def test_a_file_that_cannot_be_read_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_questions(find_task(f"file:{tmp_path / name}"))
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


Hub = dict[str, Any]


def put_on_hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> Hub:
    """Fake a hub whose data sets all have these rows; return the arguments of the last call."""
    asked: Hub = {}

    def load_dataset(path: str, **options: str | None) -> list[dict[str, Any]]:
        asked.update(options, path=path)
        return list(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


DATA_SETS: dict[str, tuple[dict[str, Any], Hub]] = {
    "math500": (
        {"problem": "P", "answer": "1", "unique_id": "u"},
        {"path": "HuggingFaceH4/MATH-500", "name": None, "split": "test"},
    ),
    "aime24": (
        {"id": 60, "problem": "P", "solution": "S", "answer": "7", "url": "U"},
        {"path": "HuggingFaceH4/aime_2024", "name": None, "split": "train"},
    ),
    "aime25": (
        {"problem": "P", "answer": "7", "id": "0"},
        {"path": "math-ai/aime25", "name": None, "split": "test"},
    ),
    "aime26": (
        {"problem_idx": 1, "answer": 7, "problem": "P"},
        {"path": "MathArena/aime_2026", "name": None, "split": "train"},
    ),
    "gsm8k": (
        {"question": "P", "answer": "S\n#### 7"},
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
    ),
    "gpqa_diamond": (
        {
            "Question": "P",
            "Correct Answer": "1",
            **{f"Incorrect Answer {n}": f"{n + 1}" for n in (1, 2, 3)},
            "Record ID": "r",
        },
        {"path": "Idavidrein/gpqa", "name": "gpqa_diamond", "split": "train"},
    ),
}
"""A row with the columns of each data set, and the expected arguments of the call."""
IDS = {"math500": "u", "aime24": "60", "aime25": "0", "aime26": "1", "gsm8k": "0"}


@pytest.mark.parametrize("name", TASKS)
def test_each_data_set_is_asked_for_at_its_revision_and_read_by_its_fields(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, expected = DATA_SETS[name]
    asked = put_on_hub(monkeypatch, row)
    (question,) = load_questions(TASKS[name])
    assert question.text.startswith("P")
    assert question.question_id == IDS.get(name, "r")
    assert asked == {**expected, "revision": TASKS[name].revision}
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


def options(number: int) -> dict[str, str]:
    """Return a row with GPQA's columns."""
    wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    return {
        "Question": "Which?\n",
        "Correct Answer": "right\n",
        **wrong,
        "Record ID": f"rec{number}",
    }


def test_the_options_are_shuffled_and_the_gold_letter_is_that_of_the_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_on_hub(monkeypatch, *map(options, range(400)))
    questions = load_questions(GPQA)
    for question in questions:
        text, space, *lines = question.text.split("\n")
        assert (text, space, [line[:3] for line in lines]) == (
            "Which?",
            "",
            ["A) ", "B) ", "C) ", "D) "],
        )
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
