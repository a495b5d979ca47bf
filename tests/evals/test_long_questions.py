"""Questions of a stated length: generated tasks, solved questions before others, names of both."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.long_questions import (
    COPIED,
    GENERATORS,
    NUM_QUESTIONS,
    VOCABULARY,
    count_tokens,
    spread,
)
from lim_sglang.evals.tasks import (
    Origin,
    Question,
    find_task,
    load_questions,
    question_origin,
    questions_digest,
    selection_digest,
    sized_name,
    task_title,
)
from tests.fakes.sglang_server import Chain, serving, words
from tests.fakes.sums import lim, rows, run_record

DIGESTS = {
    "needle:1024": "d13f61f9eaae41656a69db478a4e9aae557e63b633f24cc37080f19b8e7a814a",
    "chain:1024": "ec6fd62225e2460884941acd5a63f09c11a54b2be78ac1686a265589d11147b5",
    "copy:1024": "d8b1c7fe620853b258d842478c950fc2b7db3954f56e48c0c018bd21a9c1f85f",
    "sum:1024": "f3eaed4ad2380bbdd6f74a64707cd7f27c6704f1fc78cabba7fde69e6873586f",
    "needle:2048:7": "0e27e78e15c966e25cb42f64d7e989ecc17081f02d29e7e51febd3a1491323d0",
    "copy:4096:1": "d0df106afedf7fe70e8833da9a5cbccefee3b2bc17c5624f33753f2230e87e99",
}
"""`questions_digest` of tasks, on every machine: another one needs another version of the task."""


@pytest.mark.parametrize("name", DIGESTS)
def test_generated_questions_are_those_of_their_version(name: str) -> None:
    task = find_task(name)
    assert task.version == 1
    assert questions_digest(load_questions(task)) == DIGESTS[name]


@pytest.mark.parametrize("length", [256, 1000, 3000])
@pytest.mark.parametrize("name", GENERATORS)
def test_questions_have_the_length_that_is_named(name: str, length: int) -> None:
    questions = load_questions(find_task(f"{name}:{length}"))
    longest_sentence = 16
    assert len(questions) == NUM_QUESTIONS
    assert len({each.text for each in questions}) == NUM_QUESTIONS
    for each in questions:
        assert length - longest_sentence < count_tokens(each.text) <= length


@pytest.mark.parametrize("name", GENERATORS)
def test_another_seed_or_length_asks_other_questions(name: str) -> None:
    texts = [
        {each.text for each in load_questions(find_task(f"{name}:{size}"))}
        for size in ("300", "300:1", "301")
    ]
    assert len(set.union(*texts)) == 3 * NUM_QUESTIONS


def test_tokens_are_words_digits_signs_ends_of_lines_and_spaces_before_numbers() -> None:
    assert count_tokens("The old lamp_is 42.\n\nNo") == len(
        ["The", "old", "lamp", "_", "is", " ", "4", "2", ".", "\n\n", "No"]
    )


def text_of(question: Question) -> str:
    """Return the part of a question between its first and its last paragraph."""
    head, text, *_ = question.text.split("\n\n")
    assert head == "Read this text. A question about it follows."
    return text


def assert_spread(questions: list[Question]) -> None:
    """Assert that the answers of the first 3, 15 and 63 questions stand as far from each other as
    from both ends of the text.
    """
    depths = [text_of(each).index(each.gold) / len(text_of(each)) for each in questions]
    for count in (4, 16, 64):
        first = sorted(depths[: count - 1])
        assert all(abs(depth - (n + 1) / count) < 0.03 for n, depth in enumerate(first))
        assert abs(sum(first) / len(first) - 0.5) < 0.02


def test_a_needles_code_stands_once_and_the_depths_are_spread() -> None:
    questions = load_questions(find_task("needle:3000"))
    for each in questions:
        asked = re.search(r"the code of the (\w+)\?$", each.text)
        assert asked
        codes = dict(re.findall(r"The code of the (\w+) is (\d{5})\.", text_of(each)))
        assert len(codes) == 4
        assert codes[asked[1]] == each.gold
    assert_spread(questions)


def test_the_first_questions_are_spread_evenly_over_the_depths() -> None:
    assert [spread(n) for n in range(7)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_a_chain_ends_in_the_code_that_is_asked_for() -> None:
    orders = set()
    for each in load_questions(find_task("chain:600")):
        text = text_of(each)
        same = dict(re.findall(r"The (\w+) has the same code as the (\w+)\.", text))
        codes = dict(re.findall(r"The code of the (\w+) is (\d{5})\.", text))
        asked = re.search(r"the code of the (\w+)\?$", each.text)
        assert asked
        assert (len(same), len(codes)) == (4, 4)
        assert len(set(codes.values())) == 4
        assert codes[same[asked[1]]] == each.gold
        orders.add(text.index(f"The {asked[1]} has") < text.index(each.gold))
    assert orders == {True, False}  # so the link that is read last may be the first


def test_copied_words_are_those_of_the_note_that_is_named() -> None:
    questions = load_questions(find_task("copy:3000"))
    for each in questions:
        writer = each.text.rpartition("the note of ")[2].partition(",")[0]
        notes = re.findall(r"The note of (\w+) says: ([a-z ]+)\.", text_of(each))
        assert (len(notes), dict(notes)[writer]) == (4, each.gold)
        assert len(set(each.gold.split())) == 12
    assert_spread(questions)


def test_a_sum_is_that_of_one_persons_payments() -> None:
    for each in load_questions(find_task("sum:600")):
        asked = re.search(r"does (\w+) pay in all\?$", each.text)
        payments = re.findall(r"(\w+) pays (\d+) coins", text_of(each))
        assert asked
        assert len(payments) == 9
        assert sum(int(coins) for payer, coins in payments if payer == asked[1]) == int(each.gold)


def test_no_word_of_a_list_occurs_twice() -> None:
    for listed in (*VOCABULARY.values(), COPIED):
        assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("name", "length", "seed", "sized"),
    [
        ("needle", 2048, None, "needle:2048"),
        ("needle", 2048, 0, "needle:2048"),
        ("needle", 4096, 7, "needle:4096:7"),
        ("math500", 8192, 1, "math500:8192:1"),
        ("math500", None, None, "math500"),
        ("needle:512", None, None, "needle:512"),
        ("file:own.jsonl:text", None, None, "file:own.jsonl:text"),
    ],
)
def test_length_and_seed_become_part_of_a_tasks_name(
    name: str, length: int | None, seed: int | None, sized: str
) -> None:
    assert sized_name(name, length, seed) == sized
    if name != "file:own.jsonl:text":
        task = find_task(sized)
        assert task.name == find_task(task.name).name == (sized if ":" in sized else name)


def test_a_generated_task_has_a_length_without_one_in_its_name() -> None:
    task = find_task("needle")
    assert task.name == f"needle:{task.length}"
    assert sized_name("needle", None, 3) == f"needle:{task.length}:3"
    names = ("needle", task.name, f"{task.name}:0")
    assert {sized_name(name, None, None) for name in names} == {task.name}
    twice = lim("eval", *names[:2])
    assert twice.code == 2
    assert f"{task.name} is named twice" in twice.error


@pytest.mark.parametrize(
    ("name", "length", "seed", "complaint"),
    [
        ("needle:512", 1024, None, "needle:512: --length and --question-seed go with"),
        ("file:own.jsonl", 1024, None, "file:own.jsonl: --length and --question-seed go with"),
        ("math500", None, 1, "math500: --question-seed chooses the solved questions"),
        ("needle", 200, None, "needle: expected a length of 256 to 1,000,000 tokens, got 200"),
        ("neddle", 512, None, "did you mean needle?"),
    ],
)
def test_a_length_that_cannot_be_is_refused(
    name: str, length: int | None, seed: int | None, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        sized_name(name, length, seed)


@pytest.mark.parametrize("name", ["needle:", "needle:many", "needle:512:x", "needle:512:1:2"])
def test_a_size_that_is_none_is_refused_with_the_form(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("expected needle:LENGTH or needle:LENGTH:S")):
        find_task(name)


def test_generated_questions_are_their_tasks_own_and_come_from_no_file(tmp_path: Path) -> None:
    task = find_task("sum:400:2")
    questions = load_questions(task, tmp_path)
    assert question_origin(task, questions, from_hub=False) is Origin.PUBLISHED
    assert task_title("math500:8192", Origin.OWN) == "math500:8192 (own questions)"


def solved_file(folder: Path, *, num: int = 40, solution: bool = True) -> Path:
    """Write questions, each of 8 tokens, with solutions of 20, which makes 38 with the frame."""
    rows = [
        {"problem": f"Add {n:02} and {n:02}, please.", "answer": 2 * n}
        | ({"solution": " ".join([f"step{'abcdefghij'[n % 10]}"] * 20)} if solution else {})
        for n in range(num)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "math500.jsonl").write_text(text)
    return folder


def test_solved_questions_stand_before_each_and_never_the_question_itself(tmp_path: Path) -> None:
    task = find_task("math500:400")
    questions = load_questions(task, solved_file(tmp_path))
    for each in questions:
        assert each.asked == each.shots + each.text
        assert each.shots.endswith("\n\nProblem:\n")
        shown = re.findall(r"Add \d\d and \d\d, please\.", each.shots)
        assert len(shown) == len(set(shown)) == each.shots.count("\n\nSolution:\nstep")
        assert each.text not in shown
        assert 350 < count_tokens(each.asked) <= 400
    beginnings = {each.shots[:200] for each in questions}
    assert len(beginnings) <= 3  # a server keeps the beginning that prompts share


def test_the_same_problem_under_another_id_is_not_shown_before_itself(tmp_path: Path) -> None:
    folder = solved_file(tmp_path)
    with (folder / "math500.jsonl").open("a") as file:
        row = {"problem": " Add 00 and 00, please. ", "answer": "0", "solution": "none " * 20}
        file.write(json.dumps(row) + "\n")
    for each in load_questions(find_task("math500:1200"), folder):
        assert each.text.strip() not in each.shots


def test_shots_change_what_is_asked_but_not_whose_questions_they_are(tmp_path: Path) -> None:
    folder = solved_file(tmp_path)
    plain, *shot = (
        load_questions(find_task(name), folder)
        for name in ("math500", "math500:400", "math500:400:1", "math500:500")
    )
    assert {questions_digest(plain)} == {questions_digest(each) for each in shot}
    assert len({selection_digest(each) for each in (plain, *shot)}) == 4
    assert [each.asked for each in plain] == [each.text for each in plain]


@pytest.mark.parametrize(
    ("length", "solution", "complaint"),
    [
        (400, False, "40 of 40 questions have no solution to show before others: give --data-dir"),
        (5000, True, "all 40 questions with their solutions are "),
    ],
)
def test_shots_that_cannot_be_are_refused(
    length: int, solution: bool, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)):
        load_questions(find_task(f"math500:{length}"), solved_file(tmp_path, solution=solution))


def test_a_length_without_room_for_any_solved_question_is_refused(tmp_path: Path) -> None:
    folder = tmp_path
    row = {"problem": "Add 1 and 1.", "answer": "2", "solution": "so " * 300}
    rows = [row, {**row, "problem": "Add 1 and 2."}, {**row, "problem": "Add 1 and 3" + " x" * 9}]
    (folder / "math500.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    with pytest.raises(DataError, match="--length 256 has no room for a solved question") as found:
        load_questions(find_task("math500:256:1"), folder)
    assert "before 3 of 3 questions" in str(found.value)
    more = re.search(r"raise it by (\d+) tokens", str(found.value))
    assert more
    assert len(load_questions(find_task(f"math500:{256 + int(more[1])}:1"), folder)) == 3
    with pytest.raises(DataError, match=r"before 1 of 3 questions: raise it by 1 token$"):
        load_questions(find_task(f"math500:{255 + int(more[1])}:1"), folder)


def finding(body: Mapping[str, Any]) -> Chain:
    """Answer a needle's question by the code in its text."""
    text = body["messages"][-1]["content"]
    building = re.search(r"code of the (\w+)\?", text)
    code = re.search(rf"The code of the {building[1]} is (\d+)" if building else r"(-)", text)
    return Chain(words(f"so \\boxed{{\\text{{{code[1] if code else '?'}}}}}", 7))


def test_runs_of_another_length_or_seed_neither_mix_nor_compare(tmp_path: Path) -> None:
    out = tmp_path / "run"
    how = ["--limit", "3", "--samples", "1", "--out", str(out)]
    with serving(finding) as fake:
        command = ["eval", "needle", "--length", "300", *how, "--url", fake.url]
        first = lim(*command)
        assert first.code == 0, first.error
        assert [row["correct"] for row in rows(out)] == [True] * 3
        settings = run_record(out)["settings"]
        assert settings["task"] == "needle:300"
        source = run_record(out)["about"]["questions_from"]
        assert source == "the generator of needle:300, version 1"
        assert settings["questions"]["length"] == 300
        assert settings["questions"]["seed"] == 0
        assert len(fake.requests) == 3
        for words_ in (["--question-seed", "1"], ["--length", "301"]):
            other = lim(*command, *words_)
            assert other.code == 1
            assert f"{words_[0]}) was" in other.error
        again = lim(*command)
        assert (again.code, len(fake.requests)) == (0, 3)
        seeded = lim(*command[:-1], fake.url, "--question-seed", "1", "--out", str(out) + "1")
        assert seeded.code == 0, seeded.error
    compared = lim("compare", str(out), str(out) + "1")
    assert compared.code == 2
    assert "needle:300:1" in compared.error
    graded = lim("grade", str(out))
    assert "3 of 3 right, 0 changed" in graded.output


def test_a_run_sends_the_solved_questions_and_stores_the_question_alone(tmp_path: Path) -> None:
    folder, out = solved_file(tmp_path), tmp_path / "run"
    with serving(lambda _: Chain(words("so \\boxed{0}", 7))) as fake:
        done = lim(
            *("eval", "math500", "--length", "400", "--data-dir", str(folder), "--limit", "2"),
            *("--samples", "1", "--out", str(out), "--url", fake.url),
        )
    assert done.code == 0, done.error
    (asked, _) = (request["messages"][-1]["content"] for request in fake.requests)
    questions = load_questions(find_task("math500:400"), folder)
    assert any(asked.startswith(f"{each.asked}\n\nPlease reason") for each in questions[:2])
    stored = (out / "questions.jsonl").read_text()
    assert [json.loads(line)["text"] for line in stored.splitlines()] == [
        each.text for each in questions[:2]
    ]
    assert "math500:400 (own questions)" in done.output
