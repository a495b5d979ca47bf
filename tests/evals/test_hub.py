"""Questions from the hub: each data set by its own fields, its options shuffled for good."""

import logging
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.tasks import TASKS, Question, load_questions

GPQA = TASKS["gpqa_diamond"]
GSM8K = TASKS["gsm8k"]

Hub = dict[str, Any]


def put_on_hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> Hub:
    """A hub whose data sets all have these rows; it remembers what it was asked for."""
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
"""A row with the fields that each data set has, and how it is to be asked for."""
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
    assert "openai/gsm8k, row 1: question must be a text that is not empty" in message


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
    """A row as GPQA has them."""
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
