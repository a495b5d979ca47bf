"""A letter that is certainly no option of its question is refused with its line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import DataError
from lim_sglang.evals.tasks import find_task, load_questions

TEXT = "Which is prime?\nA) 4\nB) 5"
BARE = "Which is prime?"
CHOICES = {"choices": ["4", "5"]}
NOT_STATED = "answer is E, but the options in the text are A, B: correct the answer, or add"
NOT_READ = "answer is the letter B, but 'choices' cannot be seen: write the options into"


@pytest.mark.parametrize(
    ("ending", "row", "complaint"),
    [
        (":choice", {"question": TEXT, "answer": "E"}, NOT_STATED),
        (":choice", {"question": "Which? (A) 4 (B) 5", "answer": "(E)"}, NOT_STATED),
        (":choice", {"question": "Which?\n- A. 4\n- B. 5", "answer": "e)"}, NOT_STATED),
        (":choice", {"question": TEXT, "answer": "B", **CHOICES}, None),
        (":choice", {"question": f"{TEXT}, else E", "answer": "E"}, None),
        (":choice", {"question": "Which?\nA) 4\nB) 5\ne) 6", "answer": "E"}, None),
        (":choice", {"question": "Which?\nA) 4\nB) 5\nD) 6", "answer": "E"}, None),
        (":choice", {"question": "Is vitamin A) good?", "answer": "E"}, None),
        (":choice", {"question": BARE, "answer": "E"}, None),
        (":choice", {"question": BARE, "answer": "B", **CHOICES}, NOT_READ),
        ("", {"question": BARE, "answer": "B", **CHOICES}, NOT_READ),
        ("", {"question": BARE, "answer": "B", "A": "4", "B": "5"}, "but 'A' and 'B' cannot be"),
        ("", {"question": TEXT, "answer": "B", **CHOICES}, None),
        ("", {"question": TEXT, "answer": "E"}, None),
        ("", {"question": BARE, "answer": "B", "choices": []}, None),
        ("", {"question": BARE, "answer": "AB", **CHOICES}, None),
        ("", {"question": BARE, "answer": "5", **CHOICES}, None),
        (":integer", {"question": BARE, "answer": "5", **CHOICES}, None),
    ],
)
def test_a_letter_that_names_no_option_is_refused_where_that_is_certain(
    ending: str, row: dict[str, Any], complaint: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl"
    good = {"question": f"And then?\n{TEXT}", "answer": "5" if ending == ":integer" else "B"}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    task = find_task(f"file:{file}{ending}")
    if complaint is None:
        assert len(load_questions(task)) == 2
        return
    with pytest.raises(DataError, match=re.escape(f"{file}, line 2: ")) as caught:
        load_questions(task)
    assert complaint in str(caught.value)
