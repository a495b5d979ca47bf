"""Questions that are perhaps not read as they are meant are named by their lines."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.evals.question_notes import question_notes
from lim_sglang.evals.run_config import RunConfig
from lim_sglang.evals.runner import load_benchmarks


def notes_of(folder: Path, *rows: dict[str, Any], ending: str = "") -> list[str]:
    """Return the notes on the questions of a file, whose lines are blank between the rows."""
    (folder / "own.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    config = RunConfig(f"file:{folder / 'own.jsonl'}{ending}")
    return list(question_notes(load_benchmarks([config], Console(quiet=True))))


@pytest.mark.parametrize(
    ("ending", "golds", "said"),
    [
        ("", ["5", "x", "AB"], None),
        ("", ["5", "D", "x"], "line 3"),
        ("", ["A", "5", "B"], "lines 1, 5"),
    ],
)
def test_letters_in_a_file_of_expressions_are_named_by_their_lines(
    ending: str, golds: list[str], said: str | None, tmp_path: Path
) -> None:
    rows = ({"problem": f"q{n}", "answer": gold} for n, gold in enumerate(golds))
    found = notes_of(tmp_path, *rows, ending=ending)
    assert len(found) == (said is not None)
    assert all(note.startswith(f"{tmp_path / 'own.jsonl'}, {said}: ") for note in found)


@pytest.mark.parametrize(
    ("ending", "texts", "golds", "said"),
    [
        (":choice", ["Which?\nA) 1\nB) 2"], ["B"], None),
        (
            ":choice",
            ["Which? A) 1 B) 2, or E", "Which? (A) 3 (B) 4 e) 5"],
            ["E", "E"],
            "lines 1, 3: .* is E, .* A, B",
        ),
        (":choice", ["Which?\nA. 1\nB. 2\nC - 3"], ["C"], "line 1: .* is C, but"),
        (":choice", ["Which?\nA. 1\nB. 2\nD. 3"], ["E"], "line 1: .* are A, B, D"),
        ("", ["P"], ["infinitely many"], "line 1: .* 'infinitely many', is read as no expression"),
        ("", ["P", "Q"], ["it depends on x", "5"], "line 1: .* the same words is right"),
        ("", ["P"], ["the price is 5"], "line 1: .* 'the price is 5', is read as no expression"),
        ("", ["P", "Q", "R"], ["two", "10 apples", "none"], None),
        ("", ["P", "Q"], ["5", "Evelyn"], r"line 3: .* 'Evelyn', is a word, .*:text"),
        (":text", ["P", "Q"], ["5", "Evelyn"], None),
        ("", ["P", "Q"], [r"\begin{pmatrix}1\\2\end{pmatrix}", "x=5 and y=3"], None),
        ("", ["P", "Q", "R"], ["May 3, 2020", "A, C", "no solution"], None),
        (
            ":choice",
            ["P", "Which?\nA) 1\nB) 2", "Q"],
            ["B", "B", "A"],
            "lines 1, 5: no options A, B",
        ),
        (":choice", ["P"], ["B because it is prime"], "line 1: no options A, B"),
        (":choice", ["Is vitamin A) good? See B."], ["E"], "no options A, B, … are found"),
        ("", ["P", " P ", "Q"], ["4", "5", "4"], "lines 1, 3: the same question .*'4' and '5'"),
        ("", ["P", "P"], ["x + 1", "x  + 1"], None),
        ("", ["P", "Q", " P "], ["4", "4", "4"], "lines 1, 5: the same .* counts 2 times: leave"),
        (":integer", ["P", "P"], ["033", "33"], None),
        (":integer", ["P", "P"], ["33", "34"], "'33' and '34'"),
    ],
)
def test_answers_that_can_hardly_be_right_are_named(
    ending: str, texts: list[str], golds: list[str], said: str | None, tmp_path: Path
) -> None:
    pairs = zip(texts, golds, strict=True)
    rows = ({"problem": text, "answer": gold} for text, gold in pairs)
    found = notes_of(tmp_path, *rows, ending=ending)
    assert len(found) == (said is not None)
    assert all(re.search(str(said), note) for note in found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["subject", "level", "solution", "answer_type", "question_id", "uid"], []),
        (["choices"], ["choices"]),
        (["Options"], ["Options"]),
        (["A", "B", "C", "D", "subject"], ["'A', 'B', 'C' and 'D'"]),
        (["option_a", "choice 2", "Incorrect Answer 1"], ["'option_a', 'choice 2' and"]),
        (["Answer"], ["mean 'answer'"]),
        (["anwser", "ID"], ["mean 'answer'", "mean 'id'"]),
        (["choices", "Problem"], ["choices", "mean 'problem'"]),
    ],
)
@pytest.mark.parametrize("ending", ["", ":choice"])
def test_fields_that_look_like_options_or_misspelt_are_named(
    fields: list[str], expected: list[str], ending: str, tmp_path: Path
) -> None:
    row = {"question": "Which?\nA) 4\nB) 5", "answer": "4" if not ending else "A"}
    other = {**row, "question": "And which?\nA) 4\nB) 5", **dict.fromkeys(fields, "x")}
    found = notes_of(tmp_path, row, other, ending=ending)
    assert len(found) == len(expected)
    for note, part in zip(found, expected, strict=True):
        assert note.startswith(f"{tmp_path / 'own.jsonl'}, line 3: ")
        assert part in note
