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

from lim_sglang.evals.grading import Grader
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import SampleState

Row = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "golden"


def read_table(name: str) -> list[Row]:
    """Return the rows of a table in `tests/golden`."""
    lines = (GOLDEN / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


ROWS = read_table("answers.jsonl")
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
    grader = Grader(AnswerKind(row["kind"]), checker)
    answer = grader.extract(row["prediction"]) if "reply" in row else row["prediction"]
    return grader.correct(row["gold"], answer)


def verdict_of_math_verify(row: Row) -> bool:
    """Return math-verify's verdict, with its defaults; an answer is put in a box as in a reply."""
    from math_verify import parse, verify

    text = row["prediction"] if "reply" in row else rf"\boxed{{{row['prediction']}}}"
    return bool(verify(parse(f"${row['gold']}$"), parse(text)))


def test_the_set_is_large_and_has_as_many_wrong_answers_as_a_grader_could_let_pass() -> None:
    assert len(ROWS) == 474
    assert sum(not row["correct"] for row in ROWS) == 208
    assert Counter(row["kind"] for row in ROWS) == {"expression": 381, "integer": 46, "choice": 47}
    assert sum("known_miss" in row for row in ROWS) == 1
    assert sum("math_verify" in row for row in ROWS) == 80


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


TOPICS = {
    0: "cases of public reports",
    1: "tiny values",
    2: "units",
    3: "root signs",
    4: "integers of the AIME",
    5: "choices",
    6: "typography",
    7: "counted things",
    8: "statements",
    9: "several boxes",
    10: "sets and inequalities",
    11: "relations",
    12: "other notations",
    13: "samples that were cut off",
    14: "statements that are denied or cannot be read",
    15: "numbers too large to compute",
    16: "corrections that replace an answer",
}
"""Topics of the tables of replies, whose rows say whether a reply is right. `cut_off`: its sample
reached the limit of tokens."""


def wrong_rows(rows: list[Row]) -> list[str]:
    """Return the rows of a table of replies on which our verdict is another."""
    with EquivalenceChecker() as checker, ThreadPoolExecutor(2) as pool:

        def judged(row: Row) -> bool:
            grader = Grader(AnswerKind(row["kind"]), checker)
            state = SampleState.TRUNCATED if row.get("cut_off") else SampleState.FINISHED
            answer = grader.extract(row["reply"], state)
            right = grader.correct(row["gold"], answer)
            assert answer is None or grader.correct(answer, row["gold"]) is right
            return right

        verdicts = list(pool.map(judged, rows))
    return [
        f"{TOPICS[row['topic']]}: {row['gold']} | {row['reply']}"
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict is not row["expected"]
    ]


def test_replies_of_every_topic_are_graded_as_written_by_hand() -> None:
    rows = read_table("grading.jsonl")
    assert wrong_rows(rows) == []
    refused = Counter(row["topic"] for row in rows if not row["expected"])
    assert set(refused) == set(TOPICS) - {0}
    assert min(refused.values()) >= 4
    assert sum(refused.values()) >= 100


@pytest.mark.slow
def test_more_replies_are_graded_as_written_by_hand() -> None:
    assert wrong_rows(read_table("grading_more.jsonl")) == []
