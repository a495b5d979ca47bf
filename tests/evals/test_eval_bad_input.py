"""`lim eval` where something is wrong: a sentence each, and nothing is lost."""

import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.evals.evaluating import (
    Done,
    answering,
    asked,
    comparable,
    keys,
    rows,
    run,
    words_for,
    write_questions,
)
from tests.fakes.sglang_server import endless, eventually, serving
from tests.forked_commands import Command, Forker

INTEGERS = "aime24"
"""Their answers are compared without math-verify, which takes seconds to start."""
DISK_SIZE = 64 * 1024
FILE_SIZE = 12 * 1024


def refused(done: Done, *messages: str, code: int = 1) -> None:
    """It said why, in words, and printed no result."""
    assert done.code == code, done.error
    assert "error: " in done.error
    assert "Traceback" not in done.error
    assert done.output == ""
    for message in messages:
        assert message in done.error


@pytest.mark.parametrize(
    ("words", "messages", "code"),
    [
        (["aime1924"], ["unknown task 'aime1924'"], 1),
        (["aime1924", "math500"], ["unknown task 'aime1924'", "math500.jsonl"], 1),
        (["file:{folder}/none.jsonl"], ["none.jsonl"], 1),
        (["file:{folder}/sums.jsonl"] * 2, ["is named twice"], 2),
        (["file:{folder}/no_answer.jsonl"], ["no_answer.jsonl, line 2: has no answer"], 1),
        (["aime24"], ["aime24.jsonl, line 1", "integer from 0 to 999", "1000"], 1),
        (["file:{folder}/sums.jsonl", "--program", "oracle"], ["unknown program 'oracle'"], 2),
        (
            ["file:{folder}/sums.jsonl", "--set", "window=3"],
            ["the program majority has no option window"],
            2,
        ),
        (
            ["file:{folder}/sums.jsonl", "--program", "short", "--set", "wanted=0"],
            ["wanted: expected at least 1, got 0"],
            2,
        ),
        (
            ["file:{folder}/sums.jsonl", "--program", "single", "--samples", "2"],
            ["single draws one sample a question, not 2"],
            2,
        ),
        (["file:{folder}/sums.jsonl", "--budget", "256"], ["--lim-budget", "--serve MODEL"], 2),
        (["file:{folder}/sums.jsonl", "--", "--dtype", "half"], ["what follows --"], 2),
        (["file:{folder}/sums.jsonl", "--out", "/dev/null/run"], ["cannot write to /dev/null"], 1),
        (["file:{folder}/sums.jsonl", "--url", "{url}"], ["is named twice"], 2),
        (
            ["file:{folder}/sums.jsonl", "--url", "127.0.0.1:9", "--url", "127.0.0.1:7"],
            ["no server answers at http://127.0.0.1:9", "no server answers at http://127.0.0.1:7"],
            1,
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    words: list[str], messages: list[str], code: int, forker: Forker, tmp_path: Path
) -> None:
    write_questions(tmp_path, 2)
    good = {"problem": "What is 1 + 1?", "answer": "2"}
    lines = [good, {"problem": "What is 1 + 2?"}]
    (tmp_path / "no_answer.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "aime24.jsonl").write_text(json.dumps({**good, "answer": 1000}) + "\n")
    with serving(answering()) as fake:
        said = [word.format(folder=tmp_path, url=fake.url) for word in words]
        given = ["--data-dir", str(tmp_path), "--url", fake.url]
        border = said.index("--") if "--" in said else len(said)
        out = [] if "--out" in said else ["--out", str(tmp_path / "run")]
        done = run(forker, tmp_path, "eval", *said[:border], *given, *out, *said[border:])
        refused(done, *messages, code=code)
        assert not fake.requests
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_settings_is_not_mixed_with(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 2, INTEGERS), tmp_path / "run"
    with serving(answering()) as fake:
        words = words_for(questions, out, fake)
        run(forker, tmp_path, *words)
        before = (out / "samples.jsonl").read_bytes()
        changed = [*words, "--max-tokens", "64", "--system", "Be brief.", "--no-thinking"]
        done = run(forker, tmp_path, *changed)
        refused(
            done,
            "sampling.max_tokens was 2048 and is now 64",
            'system was null and is now "Be brief."',
            "thinking.enabled was null and is now false",
        )
    assert (out / "samples.jsonl").read_bytes() == before


def test_two_commands_do_not_write_to_one_folder(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 2, INTEGERS), tmp_path / "run"
    with serving(lambda _: endless("so")) as fake:
        words = words_for(questions, out, fake)
        first = forker.start(tmp_path, *words)
        assert eventually(lambda: len(fake.requests) == 8, 60), first.error
        refused(run(forker, tmp_path, *words), "another lim eval is writing to")
        first.interrupt()
        assert first.wait() == 130


def test_ctrl_c_leaves_a_run_that_goes_on(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 6, INTEGERS), tmp_path / "run"
    answer = answering()
    with serving(lambda body: answer(body) if asked(body) < 3 else endless("so")) as fake:
        words = words_for(questions, out, fake)
        command = forker.start(tmp_path, *words)
        assert eventually(lambda: out.exists() and len(rows(out)) == 12, 60), command.error
        command.interrupt()
        assert command.wait() == 130
        assert eventually(lambda: fake.in_flight == 0)
    assert "interrupted; what is finished is safe in" in command.error
    assert "Traceback" not in command.error
    stored = rows(out)
    with serving(answering()) as fake:
        done = run(forker, tmp_path, *words_for(questions, out, fake))
        assert done.code == 0, done.error
        assert len(fake.requests) == 12
    assert rows(out)[:12] == stored
    assert len(set(keys(out))) == 24


def test_a_server_that_is_gone_in_mid_run_loses_nothing(forker: Forker, tmp_path: Path) -> None:
    questions, out = write_questions(tmp_path, 10, INTEGERS), tmp_path / "run"
    with serving(answering(0.01)) as fake:
        command = forker.start(tmp_path, *words_for(questions, out, fake), "--concurrency", "4")
        assert eventually(lambda: len(fake.requests) > 12, 60), command.error
        fake.kill()
        assert command.wait() == 1
    assert f"error: no server answers at {fake.url}" in command.error
    assert "the same command goes on from there" in command.error
    assert "Traceback" not in command.error
    stored = rows(out)
    assert 0 < len(stored) < 40
    with serving(answering()) as other:
        assert run(forker, tmp_path, *words_for(questions, out, other)).code == 0
        assert len(other.requests) == 40 - len(stored)
    assert rows(out)[: len(stored)] == stored


def test_what_a_living_server_fails_is_told_left_out_and_drawn_again_on_request(
    forker: Forker, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, 4, INTEGERS), tmp_path / "run"
    good = answering()

    def answer(body: dict[str, Any]) -> Any:
        too_long = asked(body) == 2 and body["seed"] % 2
        return (400, {"message": "the prompt is too long"}) if too_long else good(body)

    with serving(answer) as fake:
        words = words_for(questions, out, fake)
        done = run(forker, tmp_path, *words)
        assert done.code == 1
        assert "2 samples failed" in done.error
        assert "the prompt is too long" in done.error
        assert "--retry-failed draws them again" in done.error
        assert len(rows(out)) == 14
        again = run(forker, tmp_path, *words)
        assert (again.code, again.output) == (1, done.output)
        assert "2 that failed before are left out" in again.error
        assert len(fake.requests) == 16
    with serving(answering()) as healthy:
        mended = run(forker, tmp_path, *words_for(questions, out, healthy), "--retry-failed")
        assert mended.code == 0, mended.error
        assert len(healthy.requests) == 2
    assert len(set(keys(out))) == len(keys(out)) == 16


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[Command], None]]:
    """A folder on a disk that is soon full: a small tmpfs. Where none may be mounted, there is a
    limit to the size of any file that the command writes, and the call sets it.
    """
    mount = ("mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(folder))
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield lambda _: None
        finally:
            subprocess.run(("umount", "--lazy", str(folder)), check=True)
        return
    limits = (FILE_SIZE, FILE_SIZE)
    yield lambda command: _no_more(resource.prlimit(command.pid, resource.RLIMIT_FSIZE, limits))


def _no_more(_: object) -> None:
    """Nothing: a limit was set."""


def test_a_full_disk_ends_the_run_and_loses_nothing(forker: Forker, tmp_path: Path) -> None:
    questions, disk = write_questions(tmp_path, 60, INTEGERS), tmp_path / "disk"
    disk.mkdir()
    out, other = disk / "run", tmp_path / "other"
    started = tmp_path / "started"
    started.mkdir()
    with serving(answering(0.001)) as fake:
        with small_disk(disk) as limit:
            command = forker.start(started, *words_for(questions, out, fake))
            limit(command)
            assert command.wait() == 1, command.error
            assert f"error: cannot write {out / 'samples.jsonl'} (" in command.error
            assert "make room" in command.error
            assert "Traceback" not in command.error
            assert (out / "samples.jsonl").read_bytes().endswith(b"\n")
            stored = rows(out)
            assert 0 < len(stored) < 240
            # Made room: the same run, where there is some.
            other.mkdir()
            for name in ("run.json", "samples.jsonl"):
                (other / name).write_bytes((out / name).read_bytes())
        done = run(forker, tmp_path, *words_for(questions, other, fake))
        assert done.code == 0, done.error
        assert f"going on at {len(stored)} of 240 samples" in done.error
    assert rows(other)[: len(stored)] == stored
    assert len(comparable(other)) == len(set(keys(other))) == 240
