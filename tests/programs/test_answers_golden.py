"""Verdicts that were written by hand, and their differences from math-verify's own.

A row of `tests/golden/answers.jsonl` has a gold answer, a prediction, whether that is correct, and
why. With `reply`, the prediction is a text in which the answer has to be found. `known_miss` says
why our verdict is still wrong. `math_verify` argues for our verdict if math-verify, used as its
README says, comes to another one.
"""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.evals.grading import AnswerKind, Grader
from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.equivalence import EquivalenceChecker

Row = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "answers.jsonl"
ROWS: list[Row] = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
NUMBERS = range(len(ROWS))


def name(number: int) -> str:
    """Return the row's line in the file, and the answers that it compares."""
    row = ROWS[number]
    return f"{number + 1}: {row['gold'][:20]} {row['prediction'][:30]}"


@pytest.fixture(scope="module")
def verdicts() -> Iterator[list[bool]]:
    """Return our verdicts on all rows."""
    with EquivalenceChecker() as checker, ThreadPoolExecutor(2) as pool:
        yield list(pool.map(lambda row: verdict(row, checker), ROWS))


def verdict(row: Row, checker: EquivalenceChecker) -> bool:
    """Return our verdict."""
    answer = extract_answer(row["prediction"]) if "reply" in row else row["prediction"]
    return Grader(AnswerKind(row["kind"]), checker).correct(row["gold"], answer)


def verdict_of_math_verify(row: Row) -> bool:
    """Return math-verify's verdict, with its defaults; an answer is put in a box as in a reply."""
    from math_verify import parse, verify

    text = row["prediction"] if "reply" in row else rf"\boxed{{{row['prediction']}}}"
    return bool(verify(parse(f"${row['gold']}$"), parse(text)))


def test_the_set_is_large_and_has_as_many_wrong_answers_as_a_grader_could_let_pass() -> None:
    assert len(ROWS) == 473
    assert sum(not row["correct"] for row in ROWS) == 213
    assert Counter(row["kind"] for row in ROWS) == {"expression": 380, "integer": 46, "choice": 47}
    assert sum("known_miss" in row for row in ROWS) == 22
    assert sum("math_verify" in row for row in ROWS) == 63


def test_no_row_occurs_twice() -> None:
    seen = Counter(
        (row["kind"], row["gold"], row["prediction"], row.get("reply", False)) for row in ROWS
    )
    assert [row for row, count in seen.items() if count > 1] == []


@pytest.mark.parametrize("number", NUMBERS, ids=name)
def test_the_verdict_is_the_one_that_was_written_by_hand(number: int, verdicts: list[bool]) -> None:
    row = ROWS[number]
    if "known_miss" in row:
        assert verdicts[number] is not row["correct"], "mended: strike known_miss from the row"
    else:
        assert verdicts[number] is row["correct"], row["why"]


def test_where_math_verify_judges_otherwise_the_row_says_why_we_do_not(
    verdicts: list[bool],
) -> None:
    differing = [name(n) for n in NUMBERS if verdict_of_math_verify(ROWS[n]) is not verdicts[n]]
    assert differing == [name(n) for n in NUMBERS if "math_verify" in ROWS[n]]
