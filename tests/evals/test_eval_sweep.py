"""`lim sweep` from its file to its tables: each server once, what is there is kept, all goes on."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.evals.evaluating import SEED, comparable, keys, write_questions
from tests.evals.sweeping import Manners, Sweeps
from tests.fakes.sglang_server import eventually
from tests.forked_commands import Forker

NUM_QUESTIONS, NUM_SAMPLES = 6, 3
NUM_LINES = NUM_QUESTIONS * NUM_SAMPLES
FILE = """
samples = {samples}
concurrency = {concurrency}
sampling = {{ seed = {seed}, max_tokens = 64 }}
{tasks}
[models."Org/Tiny"]
[[policies]]
policy = "full"
[[policies]]
policy = "lessismore"
budgets = [64, 128]
"""
SERVERS = [
    "Org/Tiny --lim-policy full ",
    "Org/Tiny --lim-policy lessismore --lim-budget 64 ",
    "Org/Tiny --lim-policy lessismore --lim-budget 128 ",
]
FOLDERS = [
    f"file-{task}-Org-Tiny-{policy}"
    for policy in ("full", "lessismore-64", "lessismore-128")
    for task in ("sums", "more")
]


@pytest.fixture
def sweeps(forker: Forker, tmp_path: Path) -> Sweeps:
    """Two tasks of our own, dense and at two budgets: six runs on three servers."""
    found = Sweeps(forker, tmp_path)
    for name in ("sums", "more"):
        write_questions(tmp_path, NUM_QUESTIONS, name)
    write_file(found)
    return found


def write_file(sweeps: Sweeps, samples: int = NUM_SAMPLES, concurrency: int = 8) -> None:
    tasks = "".join(f'[tasks."file:{sweeps.folder / name}.jsonl"]\n' for name in ("sums", "more"))
    text = FILE.format(samples=samples, concurrency=concurrency, seed=SEED, tasks=tasks)
    sweeps.file.write_text(text)


def assert_all_there(sweeps: Sweeps) -> None:
    """Each run of the file has each of its samples once."""
    for folder in FOLDERS:
        stored = keys(sweeps.out / folder)
        assert len(stored) == len(set(stored)) == NUM_LINES


def test_each_server_starts_once_and_what_is_complete_starts_none(sweeps: Sweeps) -> None:
    planned = sweeps.run("--dry-run")
    assert planned.output.endswith("6 runs: 0 complete, 0 begun, 6 missing; 3 servers to start\n")
    assert not sweeps.out.exists()
    done = sweeps.run()
    assert done.code == 0, done.error
    assert sweeps.starts == sweeps.ends == SERVERS
    assert_all_there(sweeps)
    record = json.loads((sweeps.out / FOLDERS[2] / "run.json").read_text())
    assert record["settings"]["lim"]["config"] == {"policy": "lessismore", "budget": 64}
    assert record["settings"]["sampling"]["max_tokens"] == 64
    assert record["about"]["places"] == [8]
    again = sweeps.run()
    assert again.code == 0, again.error
    assert sweeps.starts == []
    assert again.output == done.output
    planned = sweeps.run("--dry-run")
    assert "6 runs: 6 complete, 0 begun, 0 missing; 0 servers to start" in planned.output
    assert planned.output.count("18 of 18") == 6


def test_the_end_shows_all_scores_and_the_commands_that_say_more(
    sweeps: Sweeps, tmp_path: Path
) -> None:
    done = sweeps.run("--only", "full", "--only", "lessismore-64")
    table, commands = done.output.split("lim compare", 1)
    assert re.findall(r"(?:more|sums), Org/Tiny|full|lessismore-64", table) == [
        *("sums, Org/Tiny", "full", "lessismore-64"),
        *("more, Org/Tiny", "full", "lessismore-64"),
    ]
    scores = r"│ +18 │ +\d+\.\d ± \d+\.\d % │ +\d+\.\d ± \d+\.\d % │ +7 │ +0\.0 % │"
    assert len(re.findall(scores, table)) == 4
    first, second, report = f"lim compare{commands}".strip().split("\n")
    limiter = [str(sweeps.out / folder) for folder in FOLDERS[:4]]
    assert first.split()[2:] == [limiter[0], limiter[2]]
    assert second.split()[2:] == [limiter[1], limiter[3]]
    assert report.split() == ["lim", "report", *limiter, "--html", str(sweeps.out / "report.html")]
    compared = sweeps.forker.start(tmp_path, *first.split()[1:])
    assert compared.wait() == 0, compared.error


def test_a_start_that_fails_does_not_keep_the_others_from_theirs(sweeps: Sweeps) -> None:
    done = sweeps.run(manners=Manners(no_start=("--lim-budget 64",)))
    assert done.code == 1
    assert sweeps.starts == SERVERS
    assert sweeps.ends == [SERVERS[0], SERVERS[2]]
    log = sweeps.out / "Org-Tiny-lessismore-64.log"
    assert "CUDA out of memory" in done.error
    assert done.error.split("error: ")[1] == (
        "not all runs came to their end:\n"
        "  - Org/Tiny lessismore-64 file:sums, and 1 more on its server: it ended with code 1 "
        f"(log: {log})\nwhat is finished is safe; the same command tries the others again\n"
    )
    assert "lim compare" in done.output
    mended = sweeps.run()
    assert mended.code == 0, mended.error
    assert sweeps.starts == [SERVERS[1]]
    assert_all_there(sweeps)


def test_a_server_that_breaks_down_costs_its_own_runs_only(sweeps: Sweeps) -> None:
    lives = {"full": NUM_LINES + 4}
    done = sweeps.run(manners=Manners(lives=lives))
    assert done.code == 1
    assert "  - Org/Tiny full file:more: no server answers" in done.error
    assert sweeps.starts == sweeps.ends == SERVERS
    assert len(keys(sweeps.out / FOLDERS[0])) == NUM_LINES
    assert len(keys(sweeps.out / FOLDERS[1])) < NUM_LINES
    mended = sweeps.run()
    assert mended.code == 0, mended.error
    assert sweeps.starts == [SERVERS[0]]
    assert_all_there(sweeps)


def test_samples_that_failed_are_told_and_drawn_by_the_next_command(sweeps: Sweeps) -> None:
    done = sweeps.run("--only", "full", manners=Manners(refuses=(2,)))
    assert done.code == 1
    for task in ("sums", "more"):
        words = f"- Org/Tiny full file:{task}: {NUM_SAMPLES} samples failed, the last with: "
        assert words in done.error
    assert "the prompt is too long" in done.error
    assert done.output.count("15 of 18") == 2
    assert "lim compare" not in done.output
    assert sweeps.run("--only", "full").code == 0
    assert sweeps.starts == [SERVERS[0]]
    assert sorted(keys(sweeps.out / FOLDERS[0])) == sorted(set(keys(sweeps.out / FOLDERS[1])))


def test_killed_at_any_moment_it_goes_on_and_ends_as_one_that_nobody_disturbed(
    sweeps: Sweeps,
) -> None:
    moments = random.Random(20261125)
    write_file(sweeps, concurrency=2)
    slow = Manners(pace_s=0.005)
    counts = [0]
    for _ in range(6):
        command = sweeps.start(manners=slow)
        assert eventually(lambda: bool(sweeps.starts), 60), command.error
        wanted = counts[-1] + moments.randrange(12)
        assert eventually(lambda: num_lines(sweeps) >= wanted, 60), command.error  # noqa: B023
        time.sleep(moments.uniform(0.0, 0.1))
        os.killpg(command.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.error
        counts.append(num_lines(sweeps))
    assert 0 < counts[-1] < len(FOLDERS) * NUM_LINES
    done = sweeps.run()
    assert done.code == 0, done.error
    assert len(sweeps.starts) == len(set(sweeps.starts)) <= 3
    assert_all_there(sweeps)
    killed = {folder: comparable(sweeps.out / folder) for folder in FOLDERS}
    whole = sweeps.run("--out", str(sweeps.folder / "whole"))
    assert whole.code == 0, whole.error
    for folder in FOLDERS:
        assert comparable(sweeps.folder / "whole" / folder) == killed[folder]


def num_lines(sweeps: Sweeps) -> int:
    """Samples that are stored, of all runs."""
    return sum(
        len(keys(sweeps.out / folder))
        for folder in FOLDERS
        if (sweeps.out / folder / "samples.jsonl").exists()
    )


def test_ctrl_c_ends_the_server_and_says_how_far_it_is(sweeps: Sweeps) -> None:
    write_file(sweeps, concurrency=2)
    command = sweeps.start(manners=Manners(pace_s=0.02))
    assert eventually(lambda: num_lines(sweeps) >= NUM_LINES + 2, 60), command.error
    command.interrupt()
    assert command.wait() == 130
    assert sweeps.ends == sweeps.starts == SERVERS[:1]
    words = "interrupted; 6 runs: 1 complete, 1 begun, 4 missing; 3 servers to start; the same"
    assert words in command.error
    assert "Traceback" not in command.error
    assert sweeps.run().code == 0
    assert_all_there(sweeps)


def test_runs_of_another_file_are_refused_before_a_server_starts(sweeps: Sweeps) -> None:
    assert sweeps.run("--only", "full").code == 0
    before = comparable(sweeps.out / FOLDERS[0])
    write_file(sweeps, samples=NUM_SAMPLES + 1)
    write_questions(sweeps.folder, NUM_QUESTIONS + 1, "more")
    for words in ((), ("--dry-run",)):
        done = sweeps.run(*words)
        assert done.code == 1
        assert done.error.count("was made with other settings") == 2
        assert f"num_samples was {NUM_SAMPLES} and is now {NUM_SAMPLES + 1}" in done.error
        assert f"asked was {NUM_QUESTIONS} and is now {NUM_QUESTIONS + 1}" in done.error
        assert sweeps.starts == []
    assert comparable(sweeps.out / FOLDERS[0]) == before


def test_questions_that_cannot_be_read_are_told_before_a_server_starts(sweeps: Sweeps) -> None:
    (sweeps.folder / "more.jsonl").unlink()
    done = sweeps.run()
    assert done.code == 1
    assert sweeps.starts == []
    assert f"cannot read {sweeps.folder}/more.jsonl" in done.error
    planned = sweeps.run("--dry-run")
    assert planned.code == 0
    assert "warning: cannot read" in planned.error
    assert "6 runs: 0 complete, 0 begun, 6 missing; 3 servers to start" in planned.output


def test_questions_of_runs_that_are_complete_need_not_be_read(sweeps: Sweeps) -> None:
    assert sweeps.run("--only", "*full file:more").code == 0
    (sweeps.folder / "more.jsonl").unlink()
    done = sweeps.run("--only", "full")
    assert done.code == 0, done.error
    assert sweeps.starts == [SERVERS[0]]
    assert "file:more, Org/Tiny" in done.output


def test_a_folder_in_place_of_the_hub_is_reported_by_the_hubs_name(sweeps: Sweeps) -> None:
    folder = sweeps.folder / "models" / "tiny-hf"
    folder.mkdir(parents=True)
    place = f"Org/Tiny={folder}"
    done = sweeps.run(
        "--model", place, "--only", "*64 file:sums", "--only", "*full file:sums", "--report"
    )
    assert done.code == 0, done.error
    assert sweeps.starts == [name.replace("Org/Tiny", str(folder)) for name in SERVERS[:2]]
    assert "--name tiny-hf=Org/Tiny" in done.output
    page = (sweeps.out / "report.html").read_text()
    assert "Org/Tiny" in page
    assert "tiny-hf" not in page


@pytest.mark.parametrize("option", ["windw", "window"])
def test_an_option_that_the_program_lacks_is_refused_before_a_server_starts(
    option: str, sweeps: Sweeps
) -> None:
    text = sweeps.file.read_text()
    sweeps.file.write_text(f"program = 'early_stop'\noptions = {{ {option} = 2 }}\n{text}")
    done = sweeps.run("--only", "*full file:sums")
    if option == "windw":
        assert (done.code, sweeps.starts) == (2, [])
        assert "early_stop has no option windw" in done.error
        return
    assert done.code == 0, done.error
    assert sweeps.starts == [SERVERS[0]]
    assert sweeps.run("--only", "*full file:sums").code == 0
    assert sweeps.starts == []
