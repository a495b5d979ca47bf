"""`lim eval` from its words to its table, on fake servers: what is refused, what a crash, a lost
server or a full disk costs, and every program.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from lim_sglang.evals.tasks import TASKS
from tests.fakes.openai_server import Streamed, serving_openai
from tests.fakes.sglang_server import Chain, FakeServer, endless, eventually, serving, words
from tests.fakes.sums import (
    INTEGERS,
    NUM_TOKENS,
    answering,
    asked,
    comparable,
    eval_words,
    keys,
    lim,
    rows,
    run_record,
    said,
    write_sums,
)
from tests.forked_commands import Command, Forker
from tests.soak.eval_kills import Soak

DISK_SIZE = 64 * 1024
FILE_SIZE = 12 * 1024
PACE_S = 0.01
"""Time that a server takes for each of seven tokens."""
WAIT_S = 120.0


def run_again(questions: Path, out: Path, *options: str) -> FakeServer:
    """Resume a run on a new, healthy server, and return the server."""
    with serving(answering()) as healthy:
        done = lim(*eval_words(questions, out, healthy), *options)
        assert done.code == 0, done.error
    return healthy


@pytest.mark.parametrize(
    ("given", "messages", "code"),
    [
        ("aime1924 math500", ["unknown task 'aime1924'", "math500.jsonl"], 2),
        ("file:{folder}/none.jsonl", ["cannot read {folder}/none.jsonl"], 2),
        ("file:{folder}/no_answer.jsonl:letters", ["unknown kind ':letters'"], 2),
        ("file:{folder}/no_answer.jsonl", ['no_answer.jsonl, line 2: lacks "answer"'], 1),
        ("aime24 --program oracle", ["unknown program 'oracle'"], 2),
        ("aime24 --program short --set wanted=0", ["wanted: expected at least 1, got 0"], 2),
        ("aime24 --budget 256", ["--budget", "--serve MODEL"], 2),
        ("aime24 --out /dev/null/run", ["cannot write to /dev/null"], 1),
        ("aime24 --url 127.0.0.1:9", ["no server answers at http://127.0.0.1:9"], 1),
    ],
)
def test_mistakes_are_refused_before_anything_is_sampled(
    given: str, messages: list[str], code: int, tmp_path: Path
) -> None:
    write_sums(tmp_path, 2)
    lines = [{"problem": "What is 1 + 1?", "answer": "2"}, {"problem": "What is 1 + 2?"}]
    (tmp_path / "no_answer.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    with serving(answering()) as fake:
        where = ["--data-dir", str(tmp_path), "--url", fake.url]
        out = [] if "--out" in given else ["--out", str(tmp_path / "run")]
        done = lim("eval", *given.format(folder=tmp_path).split(), *where, *out)
        assert not fake.requests
    assert (done.code, done.output) == (code, "")
    assert "Traceback" not in done.error
    expected = ("error: ", *(message.format(folder=tmp_path) for message in messages))
    assert all(message in done.error for message in expected), done.error
    assert not (tmp_path / "run").exists()


def test_a_question_with_two_answers_is_warned_of_before_a_sample_and_noted_at_the_end(
    tmp_path: Path,
) -> None:
    questions = tmp_path / "twice.jsonl"
    lines = ({"problem": "What is 1 + 1?", "answer": answer} for answer in (2, 3))
    questions.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    told: list[str] = []

    def answer(body: dict[str, Any]) -> Chain:
        told.append(sys.stderr.getvalue())  # type: ignore[attr-defined]  # `lim` redirects it
        return Chain(words(said(body), NUM_TOKENS))

    with serving(answer) as fake:
        options = ("--samples", "1", "--out", str(tmp_path / "run"), "--url", fake.url)
        done = lim("eval", f"file:{questions}:integer", *options)
    assert done.code == 0, done.error
    note = f"{questions}, lines 1-2: the same question with the reference answers '2' and '3'"
    assert all(f"warning: {note}" in each for each in told)
    assert len(told) == 2
    assert done.error.count(f"\n{note}") == 1


def test_names_are_printed_as_they_are_and_own_questions_are_named_so(tmp_path: Path) -> None:
    name = "[red]six:smile:"
    with serving(answering()) as fake:
        own = lim(*eval_words(write_sums(tmp_path, 2, name), tmp_path / name, fake))
        other = lim(*eval_words(write_sums(tmp_path, 2), tmp_path / "other", fake))
    assert (own.code, other.code) == (0, 0), own.error + other.error
    assert f"in {tmp_path / name}, questions from {tmp_path / name}.jsonl" in own.error
    assert f"file:{name}: 8/8 samples" in own.error
    assert f"file:{name}, fake" in own.output
    for text in (other.output, other.error, lim("report", str(tmp_path / "other")).output):
        assert "aime24 (own questions)" in text
    assert "aime24," not in other.output


def test_ctrl_c_leaves_a_run_that_is_resumed(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 6), tmp_path / "run"
    answer = answering()
    with serving(lambda body: answer(body) if asked(body) < 3 else endless("so")) as fake:
        command = forker.start(tmp_path, *eval_words(questions, out, fake))
        stored = out / "samples.jsonl"
        assert eventually(lambda: stored.exists() and len(rows(out)) == 12, WAIT_S), command.error
        command.interrupt()
        assert command.wait() == 130
        assert eventually(lambda: fake.in_flight == 0)
    assert f"interrupted; finished samples are safe in {out}" in command.error
    assert "Traceback" not in command.error
    stored = rows(out)
    assert len(run_again(questions, out).requests) == 12
    assert rows(out)[:12] == stored
    assert len(set(keys(out))) == len(keys(out)) == 24


def test_a_server_that_is_lost_in_mid_run_loses_nothing(tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 10), tmp_path / "run"

    def answer(body: dict[str, Any]) -> Any:
        if len(fake.requests) >= 13:
            threading.Thread(target=fake.kill).start()
        return answering(PACE_S)(body)

    with serving(answer) as fake:
        done = lim(*eval_words(questions, out, fake), "--concurrency", "4")
    assert done.code == 1
    assert f"error: no server answers at {fake.url}" in done.error
    assert "the same command resumes the run" in done.error
    assert "Traceback" not in done.error
    stored = rows(out)
    assert 0 < len(stored) < 40
    assert len(run_again(questions, out).requests) == 40 - len(stored)
    assert rows(out)[: len(stored)] == stored
    assert len(set(keys(out))) == len(keys(out)) == 40


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[Command], None]]:
    """Put a folder on a disk that is full soon, a small tmpfs.

    Where none may be mounted, the yielded function limits the size of the files that a command
    writes.
    """
    mount = ("mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(folder))
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield lambda _: None
        finally:
            subprocess.run(("umount", "--lazy", str(folder)), check=True)
        return

    def limit(command: Command) -> None:
        resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))

    yield limit


def test_a_full_disk_ends_the_run_and_loses_nothing(forker: Forker, tmp_path: Path) -> None:
    questions, disk = write_sums(tmp_path, 60), tmp_path / "disk"
    disk.mkdir()
    out, other = disk / "run", tmp_path / "other"
    with serving(answering(0.001)) as fake, small_disk(disk) as limit:
        command = forker.start(Path(mkdtemp(dir=tmp_path)), *eval_words(questions, out, fake))
        limit(command)
        assert command.wait() == 1, command.error
        assert f"error: cannot write {out / 'samples.jsonl'} (" in command.error
        assert "make room" in command.error
        assert "Traceback" not in command.error
        assert (out / "samples.jsonl").read_bytes().endswith(b"\n")
        stored = rows(out)
        assert 0 < len(stored) < 240
        # The same run on a disk that has room.
        other.mkdir()
        for name in ("run.json", "samples.jsonl"):
            (other / name).write_bytes((out / name).read_bytes())
    assert len(run_again(questions, other).requests) == 240 - len(stored)
    assert rows(other)[: len(stored)] == stored
    assert len(set(keys(other))) == len(keys(other)) == 240


def kill_repeatedly(
    forker: Forker, fake: FakeServer, folder: Path, command: list[str], *, times: int
) -> list[int]:
    """Start a command and kill it at a random moment; return the number of lines after each time.

    A moment follows from the number of requests, so that a slow machine is as random as a fast
    one: before the first request, or up to eight samples later.
    """
    moments = random.Random(20261125)
    out = Path(command[command.index("--out") + 1])
    counts = []
    for number in range(times):
        wanted = len(fake.requests) + (0 if number == 0 else moments.randrange(9))
        started = forker.start(Path(mkdtemp(dir=folder)), *command)
        assert eventually(lambda wanted=wanted: len(fake.requests) >= wanted, WAIT_S), started.error
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(started.pid, signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL, f"the command had ended before: {started.error}"
        stored = keys(out) if (out / "samples.jsonl").exists() else []
        assert len(stored) == len(set(stored))
        counts.append(len(stored))
    return counts


def test_a_run_whose_command_and_server_are_killed_loses_and_doubles_nothing(
    forker: Forker, tmp_path: Path
) -> None:
    report = Soak(forker, tmp_path, seed=3).run(command_kills=3, server_kills=1)
    assert (report.command_kills, report.server_kills) == (3, 1)
    assert report.is_clean, report
    # Killed with samples stored and others missing: otherwise nothing was shown.
    assert 0 < report.samples_after[-1] < report.samples == 80


def test_a_program_that_stops_early_repeats_a_question_when_it_is_killed(
    forker: Forker, tmp_path: Path
) -> None:
    questions = write_sums(tmp_path, 12)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    options = ["--program", "early_stop", "--set", "window=2", "--concurrency", "4"]
    with serving(answering(PACE_S)) as fake:
        command = [*eval_words(questions, killed, fake, samples=6), *options]
        counts = kill_repeatedly(forker, fake, tmp_path, command, times=4)
        assert counts[-1] > 0
        last = lim(*command)
        assert last.code == 0, last.error
        again = lim(*eval_words(questions, undisturbed, fake, samples=6), *options)
        assert again.output == last.output
    assert comparable(killed) == comparable(undisturbed)
    for question in {row["question"] for row in rows(killed)}:
        lines = [row for row in rows(killed) if row["question"] == question]
        assert {row["of"] for row in lines} == {len(lines)}
        assert [row["index"] for row in lines] == list(range(len(lines)))


def test_two_tasks_on_a_server_of_openais_api(tmp_path: Path) -> None:
    for name in ("aime24", "math500"):
        write_sums(tmp_path, 5, name)
    out = tmp_path / "runs"
    with serving_openai(lambda body: Streamed((said(body),), num_tokens=NUM_TOKENS)) as fake:
        how = ["--limit", "3", "--data-dir", str(tmp_path), "--out", str(out), "--seed", "7"]
        done = lim("eval", "aime24", "math500", *how, "--api", "openai", "--base-url", fake.url)
    assert done.code == 0, done.error
    assert len(fake.requests) == 2 * 3 * 4
    for name in ("aime24", "math500"):
        settings = run_record(out / name)["settings"]
        assert (settings["task"], settings["api"]) == (name, "openai")
        assert settings["questions"]["asked"] == 3
        assert settings["server"]["model_path"] == "small"
        assert sorted(keys(out / name)) == [(str(q), i) for q in range(3) for i in range(4)]
        assert f"{name} (own questions): 12/12 samples" in done.error
        assert name in done.output


def test_two_servers_share_the_questions(tmp_path: Path) -> None:
    questions, out, alone = write_sums(tmp_path, 8), tmp_path / "run", tmp_path / "one"
    with serving(answering(0.005)) as first, serving(answering(0.005)) as second:
        done = lim(*eval_words(questions, out, first, second))
        assert done.code == 0, done.error
        shares = [{asked(body) for body in fake.requests} for fake in (first, second)]
        assert all(len(share) >= 3 for share in shares)
        assert not shares[0] & shares[1]
        assert len(first.requests) + len(second.requests) == 32
        assert run_record(out)["about"]["urls"] == [first.url, second.url]
        again = lim(*eval_words(questions, alone, first))
    shown = [
        [line for line in each.output.splitlines() if "seconds" not in line]
        for each in (done, again)
    ]
    assert shown[0] == shown[1]
    assert comparable(out) == comparable(alone)
    assert run_record(out)["run_id"] == run_record(alone)["run_id"]


@pytest.mark.parametrize("program", ["majority", "adaptive"])
def test_a_server_that_dies_loses_nothing_while_another_lives(program: str, tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 20), tmp_path / "run"

    def answer(body: dict[str, Any]) -> Any:
        if len(dying.requests) >= 10:
            threading.Thread(target=dying.kill).start()
        return answering(PACE_S)(body)

    with serving(answer) as dying, serving(answering(PACE_S)) as living:
        options = ["--program", program, "--concurrency", "8"]
        done = lim(*eval_words(questions, out, dying, living), *options)
    assert done.code == 0, done.error
    assert f"{dying.url} gets no more questions" in done.error
    assert sorted(set(keys(out))) == sorted(keys(out))
    assert {row["question"] for row in rows(out)} == {str(n) for n in range(20)}
    if program == "majority":
        assert len(keys(out)) == 80
    assert not (out / "failures.jsonl").exists()


def test_another_server_at_the_address_of_the_first_is_noticed(tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 10), tmp_path / "run"

    def answer(body: dict[str, Any]) -> Any:
        if len(fake.requests) > 6:
            fake.deterministic = True
            return 400, {"detail": "who are you?"}
        return answering()(body)

    with serving(answer) as fake:
        done = lim(*eval_words(questions, out, fake), "--concurrency", "1")
    assert done.code == 1
    assert f"another server answers at {fake.url} by now:" in done.error
    assert "enable_deterministic_inference was false and is now true" in done.error
    assert not (out / "failures.jsonl").exists()


@pytest.mark.parametrize(
    ("program", "option", "most"),
    [
        ("single", None, 1),
        ("adaptive", "confidence=0.9", 8),
        ("early_stop", "window=3", 8),
        ("short", "wanted=2", 8),
        ("confidence", "warm_up=3", 8),
        ("budget", "tokens=30", 8),
    ],
)
def test_every_program_can_be_scored_and_is_resumed_question_by_question(
    program: str, option: str | None, most: int, tmp_path: Path
) -> None:
    questions, out = write_sums(tmp_path, 4), tmp_path / "run"
    with serving(answering(0.002)) as fake:
        command = [*eval_words(questions, out, fake, samples=most), "--program", program]
        command += ["--set", option] if option else []
        done = lim(*command)
        assert done.code == 0, done.error
        num_requests = len(fake.requests)
        stored = rows(out)
        assert lim(*command).output == done.output
        assert len(fake.requests) == num_requests
    settings = run_record(out)["settings"]
    assert settings["program"]["name"] == program
    assert settings["num_samples"] == most
    by_question = [[row for row in stored if row["question"] == str(n)] for n in range(4)]
    # A sample that was aborted before the server was asked is stored, too.
    assert num_requests <= sum(map(len, by_question)) == len(stored) <= 4 * most
    if option is None:
        assert all(len(lines) == 1 and "of" not in lines[0] for lines in by_question)
        return
    name, value = option.split("=")
    assert settings["program"]["options"][name] == float(value)
    for lines in by_question:
        assert all(row["of"] == len(lines) for row in lines)
        assert any(not row["late"] for row in lines)


def test_a_program_that_stops_early_knows_which_answers_are_equal(tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 2), tmp_path / "run"

    def answer(body: dict[str, Any]) -> Chain:
        zeros = "00" if body["seed"] % 2 else ""
        return Chain(words(f"\\boxed{{{zeros}{asked(body) + 1}}}", NUM_TOKENS))

    with serving(answer) as fake:
        options = ["--program", "early_stop", "--set", "window=2"]
        done = lim(*eval_words(questions, out, fake, samples=6), *options)
        assert done.code == 0, done.error
        assert len(fake.requests) == 2 * 2
    assert all(row["correct"] for row in rows(out))


def test_system_prompt_thinking_and_sampling_reach_the_server(tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 1), tmp_path / "run"
    with serving(answering()) as fake:
        command = [*eval_words(questions, out, fake, samples=2), "--system", "Be brief."]
        more = ["--no-thinking", "--temperature", "0.5", "--max-tokens", "64"]
        assert lim(*command, *more).code == 0
    for body in fake.requests:
        system, question = body["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert question["content"] == TASKS[INTEGERS].prompt.format(question="What is 0 + 1?")
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert (body["temperature"], body["max_tokens"]) == (0.5, 64)
    first, second = sorted(body["seed"] for body in fake.requests)
    assert second == first + 1
    assert first != 100  # the question's own, which the run's seed decides
    settings = run_record(out)["settings"]
    assert (settings["system"], settings["thinking"]["enabled"]) == ("Be brief.", False)


def test_a_program_has_as_many_samples_in_flight_on_each_server(tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 4), tmp_path / "run"
    small = serving(answering(PACE_S), max_running_requests=3)
    with small as first, serving(answering(PACE_S)) as second:
        command = eval_words(questions, out, first, second, samples=6)
        assert lim(*command, "--program", "early_stop").code == 0
        assert first.most_running == 3
    assert run_record(out)["settings"]["program"]["parallel"] == 3
    assert run_record(out)["about"]["concurrency"] == [3, 64]


@pytest.mark.parametrize(("program", "has_vote"), [("short", False), ("adaptive", True)])
def test_a_cut_off_sample_is_marked_where_only_finished_ones_vote(
    program: str, has_vote: bool, tmp_path: Path
) -> None:
    questions, out = write_sums(tmp_path, 2), tmp_path / "run"

    def answer(body: dict[str, Any]) -> Chain:
        reason = "length" if body["seed"] % 2 else "stop"
        return Chain(words(said(body), NUM_TOKENS), reason)

    with serving(answer) as fake:
        assert lim(*eval_words(questions, out, fake), "--program", program).code == 0
    cut_off = [row for row in rows(out) if row["state"] == "truncated"]
    assert len(cut_off) == 4
    assert all(row["answer"] and row["late"] is not has_vote for row in cut_off)


def test_a_sample_that_ends_after_its_program_has_stopped_is_marked_late(tmp_path: Path) -> None:
    questions, out = write_sums(tmp_path, 6), tmp_path / "run"
    with serving(answering(), answers_aborts=False) as fake:
        command = [*eval_words(questions, out, fake, samples=6), "--program", "short"]
        assert lim(*command, "--set", "wanted=1").code == 0
    for n in range(6):
        lines = [row for row in rows(out) if row["question"] == str(n)]
        voters = [row for row in lines if not row["late"] and row["state"] == "finished"]
        assert len(voters) == 1
        assert len(lines) == 6


def test_a_complete_run_is_scored_though_no_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    questions, out = write_sums(tmp_path, 3), tmp_path / "run"
    words = eval_words(questions, out)
    nobody, without_out = ["--url", "127.0.0.1:9"], words[: words.index("--out")]

    def fails(message: str, *words: str) -> None:
        done = lim(*words, *nobody)
        assert (done.code, done.output) == (1, "")
        assert message in done.error

    with serving(answering()) as fake:
        first = lim(*words, "--url", fake.url)
        fails("no server answers", *without_out)
        assert lim(*without_out, "--url", fake.url).code == 0
    (found,) = (tmp_path / "runs").iterdir()
    for command, path in ((words, out), (without_out, Path("runs") / found.name)):
        again = lim(*command, *nobody)
        assert (again.code, again.output.splitlines()[0]) == (0, first.output.splitlines()[0])
        assert f"{path} is complete: no server answers, so model, policy and" in again.error
    fails("num_samples (--samples) was 4 and is now 3", *words, "--samples", "3")
    fails("no server answers", *without_out, "--limit", "2")
    shutil.copytree(found, found.with_name("other"))
    fails(f"lim report runs/{found.name} runs/other`", *without_out)
    (out / "samples.jsonl").write_bytes((out / "samples.jsonl").read_bytes()[:-5])
    fails("no server answers", *words)
