"""`lim ask` and the programs' own files, as processes."""

import json
import re
import time
from pathlib import Path

import pytest

from lim_sglang.programs.options import samples_of
from lim_sglang.programs.program import PROGRAMS
from tests.fakes.sglang_server import completion, eventually, serving
from tests.programs.chains import endless
from tests.programs.drawn import by_sample
from tests.programs.forking import ROOT, Forker

QUESTION = "What is 17 * 23?"
OPTIONS = {"confidence": ("--set", "warm_up=2"), "early_stop": ("--set", "window=3")}
DRAWN = {"single": 1, "majority": 8, "adaptive": 4, "early_stop": 3, "short": 3}
DRAWN |= {"confidence": 2, "budget": 4}
"""Of eight samples that agree and have 7 tokens each, one after the other."""


def words_for(program: str) -> tuple[str, ...]:
    """Eight samples, one after the other, in the program's own manner."""
    options = OPTIONS.get(program, ())
    budget = ("--set", "tokens=28") if program == "budget" else ()
    return "--samples", "8", "--parallel", "1", "--seed", "40", *options, *budget


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_json_record_holds_all_that_happened(
    program: str, forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: completion("\\boxed{391}"), deterministic=True) as fake:
        asked = ("ask", QUESTION, "--program", program, "--url", fake.url, "--json")
        command = forker.start(tmp_path, *asked, *words_for(program))
        assert command.wait() == 0, command.error
    record = json.loads(command.output)
    assert fake.most_running == 1
    drawn = DRAWN[program]
    assert record["question"] == QUESTION
    assert record["program"] == program
    assert record["answer"] == "391"
    assert [(vote["answer"], vote["votes"]) for vote in record["votes"]] == [("391", drawn)]
    assert record["tokens_spent"] == 7 * drawn
    left = record["samples_asked"] - drawn
    assert record["samples_asked"] == (1 if program == "single" else 8)
    assert record["tokens_saved_estimate"] == 7 * left
    assert record["settled_early"] == (left > 0)
    assert 0 < record["seconds"] < 60
    assert [sample["seed"] for sample in record["samples"]] == list(range(40, 40 + drawn))
    assert all(sample["seed_honoured"] for sample in record["samples"])
    assert {sample["state"] for sample in record["samples"]} == {"finished"}
    assert set(PROGRAMS[program].options) <= set(record["options"])
    assert len(fake.requests) == drawn


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_is_a_script_too(program: str, forker: Forker, tmp_path: Path) -> None:
    script = str(ROOT / "programs" / f"{program}.py")
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        command = forker.start(tmp_path, script, QUESTION, "--samples", "3", "--url", fake.url)
        assert command.wait() == 0, command.error
    votes = 1 if program == "single" else 3
    assert command.output.startswith(f"answer: 391  ({votes} of {votes} votes, {7 * votes} tokens")
    assert command.output.count("\n") == 1
    assert command.error.count("391  (7 tokens") == votes


def test_what_was_aborted_is_told_in_the_record(forker: Forker, tmp_path: Path) -> None:
    good = {index: completion("\\boxed{391}") for index in (1, 4, 5)}
    with serving(by_sample(good, endless("let me", " see"))) as fake:
        asked = ("ask", QUESTION, "--program", "short", "--url", fake.url, "--json")
        command = forker.start(tmp_path, *asked, "--samples", "6", "--seed", "0")
        assert command.wait() == 0, command.error
        assert eventually(lambda: fake.in_flight == 0)
    record = json.loads(command.output)
    assert record["without_vote"]["aborted"] == 3
    assert record["tokens_saved_estimate"] == 3 * (7 - 2)
    aborted = {sample["rid"] for sample in record["samples"] if sample["state"] == "aborted"}
    assert set(fake.aborted) == aborted
    assert not any(sample["seed_honoured"] for sample in record["samples"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--program", "oracle"), "single      its one sample has ended"),
        (("--set", "window=3"), "the program majority has no option window; it has: none"),
        (
            ("--program", "adaptive", "--set", "window=3"),
            "the program adaptive has no option window; it has: confidence",
        ),
        (("--program", "adaptive", "--set", "confidence=2"), "above 0.5 and below 1, got 2"),
        (("--program", "early_stop", "--set", "window=0"), "at least 1, got 0"),
        (("--program", "early_stop", "--set", "window=2.5"), "window: expected a whole number"),
        (("--program", "confidence", "--set", "warm_up=1.5"), "warm_up: expected a whole number"),
        (("--program", "confidence", "--set", "keep=0"), "above 0 and at most 1, got 0"),
        (("--program", "confidence", "--set", "window=0"), "at least 1, got 0"),
        (("--program", "short", "--set", "wanted=-1"), "at least 1, got -1"),
        (("--program", "budget", "--set", "tokens=0"), "at least 1, got 0"),
        (("--program", "short", "--set", "wanted"), "--set takes NAME=VALUE with a number"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_words_before_anything_is_drawn(
    words: tuple[str, ...], message: str, forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        command = forker.start(tmp_path, "ask", QUESTION, "--url", fake.url, *words)
        assert command.wait() != 0
    assert command.error.startswith("error: ")
    assert message in command.error
    assert "Traceback" not in command.error
    assert command.output == ""
    assert not fake.requests


@pytest.mark.parametrize("program", ["majority", "confidence", "early_stop"])
def test_ctrl_c_ends_it_soon_and_leaves_nothing_at_the_server(
    program: str, forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: endless("let me")) as fake:
        asked = ("ask", QUESTION, "--program", program, "--url", fake.url, "--json")
        command = forker.start(tmp_path, *asked, "--samples", "5")
        assert eventually(lambda: fake.num_tokens == 5, 60)
        start_s = time.monotonic()
        command.interrupt()
        assert command.wait() == 130
        assert time.monotonic() - start_s < 3.0
        assert eventually(lambda: fake.in_flight == 0)
    assert set(fake.aborted) == {body["rid"] for body in fake.requests}
    assert "interrupted" in command.error
    assert "Traceback" not in command.error
    assert command.output == ""


def test_a_second_ctrl_c_and_a_server_that_hangs_do_not_keep_it(
    forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: endless("let me"), answers_aborts=False) as fake:
        command = forker.start(tmp_path, "ask", QUESTION, "--url", fake.url, "--samples", "3")
        assert eventually(lambda: fake.num_tokens == 3, 60)
        start_s = time.monotonic()
        command.interrupt()
        assert command.wait(30) == 130
        assert time.monotonic() - start_s < 15.0
        assert eventually(lambda: fake.in_flight == 0)


def test_a_record_is_printed_though_the_server_died_in_mid_vote(
    forker: Forker, tmp_path: Path
) -> None:
    good = {0: completion("\\boxed{391}"), 1: completion("\\boxed{391}")}
    with serving(by_sample(good, endless("let me"))) as fake:
        asked = ("ask", QUESTION, "--url", fake.url, "--json", "--samples", "4", "--seed", "0")
        command = forker.start(tmp_path, *asked)
        assert eventually(lambda: fake.in_flight == 2 and len(fake.requests) == 4, 60)
        fake.kill()
        assert command.wait(60) == 0, command.error
    record = json.loads(command.output)
    assert (record["answer"], record["without_vote"]["failed"]) == ("391", 2)
    assert record["server"]["url"] == fake.url
    assert record["messages"][0]["role"] == "user"


def test_a_record_is_printed_where_every_sample_failed(forker: Forker, tmp_path: Path) -> None:
    with serving(lambda _: (400, {"detail": "too long"})) as fake:
        asked = ("ask", QUESTION, "--url", fake.url, "--json", "--samples", "2")
        command = forker.start(tmp_path, *asked)
        assert command.wait() == 1
    assert json.loads(command.output)["without_vote"]["failed"] == 2
    assert "the server failed all 2 samples" in command.error


def test_the_programs_are_known_without_sglang() -> None:
    assert [name for name, program in PROGRAMS.items() if name != program.name] == []
    assert samples_of("adaptive", None) == 40
    assert samples_of("short", 3) == 3


def test_the_readmes_table_of_programs_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("| `--program` | stops when |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    told = {row[1].strip("`"): row for row in rows}
    assert list(told) == list(PROGRAMS)
    for name, (_, _, stops_when, answer, options, _) in told.items():
        link = re.search(r"\[(.+)\]\(https://arxiv.org/abs/([\d.]+)\)", f"{stops_when} {answer}")
        assert re.sub(r" \(\[.*\]\(.*\)\)", "", stops_when) == PROGRAMS[name].stops_when
        if link:
            assert PROGRAMS[name].source == f"{link[1]}, arXiv {link[2]}"
        defaults = " ".join(f"{name}={value}" for name, value in PROGRAMS[name].options.items())
        assert options.strip("`") == defaults


def test_a_question_mark_lists_when_each_program_stops(forker: Forker, tmp_path: Path) -> None:
    command = forker.start(tmp_path, "ask", "--program", "?")
    assert command.wait() == 0, command.error
    for (name, about), line in zip(PROGRAMS.items(), command.output.splitlines(), strict=True):
        assert line.split()[0] == name
        assert about.stops_when in line
        assert about.source in line


def test_an_unknown_program_is_refused_before_a_server_is_looked_for(
    forker: Forker, tmp_path: Path
) -> None:
    command = forker.start(
        tmp_path, "ask", QUESTION, "--program", "majorty", "--url", "http://127.0.0.1:9"
    )
    assert command.wait() != 0
    assert "unknown program 'majorty'; known, and when each stops:\n  single " in command.error
    assert "  short       the first m of k samples have finished (short-m@k" in command.error
