"""`lim eval` on several servers, on another API, and with every kind of program."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.evals.tasks import TASKS
from tests.evals.evaluating import (
    NUM_TOKENS,
    answering,
    asked,
    comparable,
    keys,
    rows,
    run,
    said,
    words_for,
    write_questions,
)
from tests.fakes.openai_server import Streamed, serving_openai
from tests.fakes.sglang_server import Chain, eventually, serving, words
from tests.forked_commands import Forker

INTEGERS = "aime24"
"""Their answers are compared without math-verify, which takes seconds to start."""


def run_record(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record


def test_two_tasks_on_a_server_of_openais_api(forker: Forker, tmp_path: Path) -> None:
    for name in ("aime24", "math500"):
        write_questions(tmp_path, 5, name)
    out = tmp_path / "runs"
    with serving_openai(lambda body: Streamed((said(body),), num_tokens=NUM_TOKENS)) as fake:
        done = run(
            *(forker, tmp_path, "eval", "aime24", "math500", "--limit", "3"),
            *("--data-dir", str(tmp_path), "--out", str(out), "--seed", "7"),
            *("--api", "openai", "--base-url", fake.url),
        )
    assert done.code == 0, done.error
    assert len(fake.requests) == 2 * 3 * 4
    for name in ("aime24", "math500"):
        settings = run_record(out / name)["settings"]
        assert (settings["task"], settings["api"]) == (name, "openai")
        assert settings["questions"]["asked"] == 3
        assert settings["server"]["model_path"] == "small"
        assert sorted(keys(out / name)) == [(str(q), i) for q in range(3) for i in range(4)]
        assert f"{name}: 12/12 samples" in done.error
        assert name in done.output


def test_two_servers_share_the_questions(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 8, INTEGERS), tmp_path / "run"
    one_server = tmp_path / "one"
    with serving(answering(0.005)) as first, serving(answering(0.005)) as second:
        done = run(forker, tmp_path, *words_for(questions, out, first, second))
        assert done.code == 0, done.error
        shares = [{asked(body) for body in fake.requests} for fake in (first, second)]
        assert all(len(slots) >= 3 for slots in shares)
        assert not shares[0] & shares[1]
        assert len(first.requests) + len(second.requests) == 32
        assert run_record(out)["about"]["urls"] == [first.url, second.url]
        alone = run(forker, tmp_path, *words_for(questions, one_server, first))
        assert alone.output == done.output
    assert comparable(out) == comparable(one_server)
    assert run_record(out)["run_id"] == run_record(one_server)["run_id"]


@pytest.mark.parametrize("between", [" ", ",", ", "])
def test_one_option_may_name_several_servers(between: str, forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 4, INTEGERS), tmp_path / "run"
    with serving(answering()) as first, serving(answering()) as second:
        named = words_for(questions, out)
        urls = between.join([first.url, second.url])
        assert run(forker, tmp_path, *named, "--url", urls).code == 0
        assert first.requests
        assert second.requests


def test_servers_that_differ_are_refused_before_anything_is_drawn(
    forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 2, INTEGERS), tmp_path / "run"
    with serving(answering()) as first, serving(answering(), deterministic=True) as second:
        done = run(forker, tmp_path, *words_for(questions, out, first, second))
        assert done.code == 1
        assert not first.requests
    assert f"enable_deterministic_inference is false at {first.url} and true at" in done.error
    assert not out.exists()


@pytest.mark.parametrize("program", ["majority", "early_stop"])
def test_a_server_that_dies_loses_nothing_while_another_lives(
    program: str, forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 20, INTEGERS), tmp_path / "run"
    options = ["--program", program, "--concurrency", "8"]
    with serving(answering(0.02)) as dying, serving(answering(0.02)) as living:
        words = [*words_for(questions, out, dying, living), *options]
        command = forker.start(tmp_path, *words)
        assert eventually(lambda: len(dying.requests) >= 10, 60), command.error
        dying.kill()
        assert command.wait() == 0, command.error
        assert f"{dying.url} is asked no more, and its questions go to the others" in command.error
    assert sorted(set(keys(out))) == sorted(keys(out))
    assert {row["question"] for row in rows(out)} == {str(n) for n in range(20)}
    if program == "majority":
        assert len(keys(out)) == 80
    assert not (out / "failures.jsonl").exists()


def test_the_run_ends_when_the_last_of_the_servers_is_gone(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 20, INTEGERS), tmp_path / "run"
    with serving(answering(0.02)) as first, serving(answering(0.02)) as second:
        words = words_for(questions, out, first, second)
        command = forker.start(tmp_path, *words, "--concurrency", "4")
        assert eventually(lambda: len(second.requests) >= 16, 60), command.error
        first.kill()
        second.kill()
        assert command.wait() == 1
    assert "error: all 2 servers are gone:" in command.error
    assert "the same command goes on from there" in command.error
    assert 0 < len(keys(out)) < 80
    stored = rows(out)
    with serving(answering()) as third:
        again = run(forker, tmp_path, *words_for(questions, out, third))
        assert again.code == 0, again.error
    assert f"going on at {len(stored)} of 80 samples" in again.error
    assert rows(out)[: len(stored)] == stored
    assert len(set(keys(out))) == len(keys(out)) == 80


def test_another_server_in_the_place_of_the_first_is_not_taken_for_it(
    forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 10, INTEGERS), tmp_path / "run"
    changed = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        if len(fake.requests) > 6:
            fake.deterministic = True
            changed.set()
            return 400, {"detail": "who are you?"}
        return answering()(body)

    with serving(answer) as fake:
        done = run(forker, tmp_path, *words_for(questions, out, fake), "--concurrency", "1")
        assert done.code == 1
    assert changed.is_set()
    assert f"another server answers at {fake.url} by now:" in done.error
    assert "enable_deterministic_inference was false and is now true" in done.error
    assert not (out / "failures.jsonl").exists()


@pytest.mark.parametrize(
    ("program", "options", "most"),
    [
        ("single", [], 1),
        ("adaptive", ["--set", "confidence=0.9"], 8),
        ("early_stop", ["--set", "window=3"], 8),
        ("short", ["--set", "wanted=2"], 8),
        ("confidence", ["--set", "warm_up=3"], 8),
        ("budget", ["--set", "tokens=30"], 8),
    ],
)
def test_every_program_can_be_scored_and_goes_on_question_by_question(
    program: str, options: list[str], most: int, forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 4, INTEGERS), tmp_path / "run"
    with serving(answering(0.002)) as fake:
        words = [*words_for(questions, out, fake, samples=most), "--program", program, *options]
        done = run(forker, tmp_path, *words)
        assert done.code == 0, done.error
        drawn = len(fake.requests)
        stored = rows(out)
        assert run(forker, tmp_path, *words).output == done.output
        assert len(fake.requests) == drawn
    settings = run_record(out)["settings"]
    assert settings["program"]["name"] == program
    assert settings["num_samples"] == most
    by_question = [[row for row in stored if row["question"] == str(n)] for n in range(4)]
    # One that was ended before the server was asked is told of, too.
    assert drawn <= sum(map(len, by_question)) == len(stored) <= 4 * most
    if program == "single":
        assert all(len(lines) == 1 and "of" not in lines[0] for lines in by_question)
        return
    name, value = options[1].split("=")
    assert settings["program"]["options"][name] == float(value)
    for lines in by_question:
        assert all(row["of"] == len(lines) for row in lines)
        assert any(not row["late"] for row in lines)


def test_a_program_that_stops_by_itself_is_told_which_answers_are_equal(
    forker: Forker, tmp_path: Path
) -> None:
    rows_ = [{"id": n, "problem": f"What is {n} + 1/2 - {n}?", "answer": "0.5"} for n in range(2)]
    questions, out = tmp_path / "halves.jsonl", tmp_path / "run"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows_))

    def answer(body: dict[str, Any]) -> Chain:
        text = "\\frac{1}{2}" if body["seed"] % 2 else "0.5"
        return Chain(words(f"\\boxed{{{text}}}", NUM_TOKENS))

    with serving(answer) as fake:
        command = words_for(questions, out, fake, samples=6)
        options = ["--program", "early_stop", "--set", "window=2"]
        done = run(forker, tmp_path, *command, *options)
        assert done.code == 0, done.error
        assert len(fake.requests) == 2 * 2
    assert all(row["correct"] for row in rows(out))


def test_what_is_said_beside_a_question_arrives(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 1, INTEGERS), tmp_path / "run"
    with serving(answering()) as fake:
        command = [*words_for(questions, out, fake, samples=2), "--system", "Be brief."]
        more = ["--no-thinking", "--temperature", "0.5", "--max-tokens", "64"]
        assert run(forker, tmp_path, *command, *more).code == 0
    for body in fake.requests:
        system, question = body["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert question["content"] == TASKS[INTEGERS].prompt.format(question="What is 0 + 1?")
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert (body["temperature"], body["max_tokens"]) == (0.5, 64)
    assert sorted(body["seed"] for body in fake.requests) == [100, 101]
    settings = run_record(out)["settings"]
    assert (settings["system"], settings["thinking"]["enabled"]) == ("Be brief.", False)


def test_a_program_has_as_many_samples_in_flight_on_each_server(
    forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 4, INTEGERS), tmp_path / "run"
    small = serving(answering(0.01), max_running_requests=3)
    with small as first, serving(answering(0.01)) as second:
        words = [*words_for(questions, out, first, second, samples=6), "--program", "early_stop"]
        assert run(forker, tmp_path, *words).code == 0
        assert first.most_running == 3
    assert run_record(out)["settings"]["program"]["parallel"] == 3
    assert run_record(out)["about"]["places"] == [3, 64]


def test_a_sample_that_was_cut_off_is_marked_where_only_finished_ones_vote(
    forker: Forker, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path, 2, INTEGERS)

    def answer(body: dict[str, Any]) -> Chain:
        reason = "length" if body["seed"] % 2 else "stop"
        return Chain(words(said(body), NUM_TOKENS), reason)

    with serving(answer) as fake:
        for program, cut_off_votes in (("short", False), ("early_stop", True)):
            out = tmp_path / program
            command = [*words_for(questions, out, fake), "--program", program]
            assert run(forker, tmp_path, *command).code == 0
            cut_off = [row for row in rows(out) if row["state"] == "truncated"]
            assert len(cut_off) == 4
            assert all(row["answer"] and row["late"] is not cut_off_votes for row in cut_off)


def test_a_sample_that_ends_after_the_program_has_stopped_is_marked_late(
    forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 6, INTEGERS), tmp_path / "run"
    with serving(answering(), answers_aborts=False) as fake:
        words = [*words_for(questions, out, fake, samples=6), "--program", "short"]
        assert run(forker, tmp_path, *words, "--set", "wanted=1").code == 0
    for n in range(6):
        lines = [row for row in rows(out) if row["question"] == str(n)]
        voters = [row for row in lines if not row["late"] and row["state"] == "finished"]
        assert len(voters) == 1
        assert len(lines) == 6
