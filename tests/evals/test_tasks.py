"""The records of the benchmarks: what is asked of each, and how one is named."""

import unicodedata
from pathlib import Path

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.grading import AnswerKind
from lim_sglang.evals.tasks import TASKS, Task, find_task
from lim_sglang.programs.schema import CHOICE_PROMPT, MATH_PROMPT, ask_messages

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
    # A stored run has the name alone, and its answers are graded again by it.
    assert find_task(name).name == name
    assert find_task(name).answer_kind is kind


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_task("file:~/sums.jsonl").file == tmp_path / "sums.jsonl"
