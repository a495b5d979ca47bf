"""`lim ask` and the programs' own files, as commands; the vote as a person sees it."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console

from lim_sglang.programs import ask as ask_module
from lim_sglang.programs.ask import (
    MAX_ROWS,
    SHOWN_LINES,
    Show,
    VoteDisplay,
    answer_so_far,
    ask,
    disagreement,
    hints,
    in_flight_table,
    last_lines,
    result_line,
    sample_line,
    shown_chains,
    speed_line,
    vote_line,
)
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.chat import StreamReader
from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.http_client import START_ONE
from lim_sglang.programs.program import PROGRAMS, Outcome, outcome_record
from lim_sglang.programs.schema import IN_A_BOX, UNANSWERED, Sample, SampleState
from lim_sglang.programs.vote import tally
from lim_sglang.progress import printable
from tests.builders import make_sample
from tests.fakes.openai_server import Streamed, serving_openai
from tests.fakes.sglang_server import completion, endless, eventually, serving
from tests.forked_commands import ROOT, Forker
from tests.programs.harness import by_sample

QUESTION = "What is 17 * 23?"
NOBODY = "http://127.0.0.1:9"
OPTIONS = {"confidence": ("warm_up=2",), "early_stop": ("window=3",), "budget": ("tokens=28",)}
NUM_TAKEN = {"single": 1, "majority": 8, "adaptive": 4, "early_stop": 3, "short": 3}
NUM_TAKEN |= {"confidence": 2, "budget": 4}
"""Samples taken of eight that agree and have 7 tokens each, one after the other."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_programs_file_is_a_script_whose_record_holds_vote_and_samples(
    program: str, forker: Forker, tmp_path: Path
) -> None:
    script = str(ROOT / "programs" / f"{program}.py")
    settings = [word for text in OPTIONS.get(program, ()) for word in ("--set", text)]
    samples = PROGRAMS[program].max_samples or 8
    with serving(lambda _: completion("\\boxed{391}"), deterministic=True) as fake:
        code, command = forker.run(
            tmp_path,
            *(script, QUESTION, "--url", fake.url, "--json", *settings),
            *("--samples", str(samples), "--parallel", "1", "--seed", "40"),
        )
        assert (code, "not known to heed" in command.error) == (0, False), command.error
    record = json.loads(command.output)
    assert (fake.most_running, {request["stream"] for request in fake.requests}) == (1, {True})
    num_taken, left = NUM_TAKEN[program], samples - NUM_TAKEN[program]
    assert (record["question"], record["program"], record["answer"]) == (QUESTION, program, "391")
    assert record["server"]["url"] == fake.url
    assert record["messages"][0]["role"] == "user"
    assert [(vote["answer"], vote["votes"]) for vote in record["votes"]] == [("391", num_taken)]
    assert record["tokens_spent"] == 7 * num_taken
    assert (record["samples_asked"], record["interrupted"]) == (samples, False)
    assert (record["tokens_saved_estimate"], record["settled_early"]) == (7 * left, left > 0)
    assert 0 < record["seconds"] < 60
    assert [sample["seed"] for sample in record["samples"]] == list(range(40, 40 + num_taken))
    assert {(s["state"], s["seed_honoured"]) for s in record["samples"]} == {("finished", True)}
    assert set(PROGRAMS[program].options) <= set(record["options"])
    assert len(fake.requests) == num_taken


def test_a_vote_by_openais_api_and_its_record(forker: Forker, tmp_path: Path) -> None:
    answer = Streamed(("It is ", "\\boxed{3}."), num_tokens=9)
    with serving_openai(lambda _: answer, key="k") as fake:
        code, command = forker.run(
            tmp_path,
            *("ask", "What is 1 + 2?", "--samples", "3", "--json", "--temperature", "0.8"),
            *("--api", "openai", "--base-url", f"{fake.url}/v1", "--api-key", "k"),
        )
    assert code == 0, command.error
    assert "small by OpenAI's API, which has no top_k" in command.error
    record = json.loads(command.output)
    assert (record["answer"], record["tokens_spent"]) == ("3", 27)
    server = {name: record["server"][name] for name in ("api", "model_path", "aborts")}
    assert server == {"api": "openai", "model_path": "small", "aborts": "connection closed"}
    sampling = {name: record["sampling"][name] for name in ("temperature", "top_p", "top_k")}
    assert sampling == {"temperature": 0.8, "top_p": 0.95, "top_k": -1}
    assert not any(sample["seed_honoured"] for sample in record["samples"])
    sent = {(r["model"], r["temperature"], r["top_p"]) for r in fake.requests}
    assert sent == {("small", 0.8, 0.95)}
    assert not any("top_k" in request for request in fake.requests)


def test_aborted_samples_are_in_the_record(forker: Forker, tmp_path: Path) -> None:
    good = {index: completion("\\boxed{391}") for index in (1, 4, 5)}
    with serving(by_sample(good, endless("let me", " see"))) as fake:
        code, command = forker.run(
            tmp_path,
            *("ask", QUESTION, "--program", "short", "--url", fake.url, "--json"),
            *("--samples", "6", "--seed", "0"),
        )
        assert code == 0, command.error
        assert eventually(lambda: fake.in_flight == 0)
    record = json.loads(command.output)
    assert record["without_vote"]["aborted"] == 3
    assert record["tokens_saved_estimate"] == 3 * (7 - 2)
    aborted = [sample["rid"] for sample in record["samples"] if sample["state"] == "aborted"]
    assert sorted(fake.aborted) == sorted(aborted)
    assert not any(sample["seed_honoured"] for sample in record["samples"])
    assert command.error.count("not known to heed") == 1


REPORT_IMPORTS = """
import sys
from lim_sglang.cli import main
heavy = {"torch", "transformers", "datasets", "pandas", "matplotlib", "sympy"}
connected = lambda: print("connected with", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.addaudithook(lambda event, _: connected() if event == "socket.connect" else None)
main()
"""


@pytest.mark.parametrize(
    "words", [("ask", QUESTION), ("eval", "file:{folder}/own.jsonl", "--out", "{folder}/run")]
)
def test_nothing_heavy_is_imported_when_a_server_is_asked(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "own.jsonl").write_text('{"problem": "What is 1 + 2?", "answer": "3"}\n')
    with serving(lambda _: completion("\\boxed{3}")) as fake:
        words = tuple(word.format(folder=tmp_path) for word in words)
        done = subprocess.run(
            [sys.executable, "-c", REPORT_IMPORTS, *words, "--url", fake.url, "--samples", "2"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert len(fake.requests) == 2, done.stderr
    reports = [line for line in done.stderr.splitlines() if line.startswith("connected")]
    assert len(reports) > 1  # the first request, and those of the samples
    assert set(reports) == {"connected with []"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("-",), None),
        ((), None),
        (("@question.txt",), None),
        (("@missing.txt",), "cannot read @missing.txt (No such file or directory)"),
        (("@bytes",), "it is no text in UTF-8"),
        (("@empty",), "it is empty"),
        ((" ",), "it is empty"),
    ],
)
def test_a_question_comes_from_standard_input_or_a_file(
    given: tuple[str, ...], message: str | None, tmp_path: Path
) -> None:
    files = {"question.txt": f"{QUESTION}\r\n".encode(), "bytes": b"\xff\xfe", "empty": b"\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        words = ("ask", *given, "--url", fake.url, "--samples", "1")
        done = subprocess.run(
            [sys.executable, "-m", "lim_sglang", *words],
            input=f"{QUESTION}\n",
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    if message:
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
        assert not fake.paths
    else:
        assert done.returncode == 0, done.stderr
        content = fake.requests[0]["messages"][-1]["content"]
        assert re.match(rf"{re.escape(QUESTION)}\n\n\w", content)


@pytest.mark.parametrize("as_json", [False, True])
def test_no_answer_has_an_exit_code_of_its_own_and_a_reason(
    as_json: bool, forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: completion("let me think", num_tokens=64, reason="length")) as fake:
        words = ("ask", QUESTION, "--url", fake.url, "--samples", "2", "--max-tokens", "64")
        code, command = forker.run(tmp_path, *words, *(["--json"] if as_json else []))
    assert code == 3
    advice = "without an answer: raise --max-tokens; the question has to have one short result"
    assert f"2 of 2 samples cut off after 64 tokens {advice}" in command.error
    if as_json:
        assert json.loads(command.output)["answer"] is None
    else:
        assert command.output.startswith("no answer  (0 votes of 2 samples")
        assert "let me think" in command.error


def test_standard_output_gets_one_line_as_the_help_says(forker: Forker, tmp_path: Path) -> None:
    assert "Standard output gets one line" in (ask.__doc__ or "")
    with serving(lambda _: completion("so \\boxed{391}")) as fake:
        code, command = forker.run(tmp_path, "ask", QUESTION, "--url", fake.url, "--samples", "2")
    assert code == 0, command.error
    assert command.output.startswith("answer: 391  (2 votes of 2 samples, 14 tokens, ")
    assert command.output.count("\n") == 1


def test_ctrl_c_shows_the_votes_and_the_record_so_far(forker: Forker, tmp_path: Path) -> None:
    good = {0: completion("\\boxed{391}"), 1: completion("\\boxed{392}")}
    with serving(by_sample(good, endless("let me"))) as fake:
        words = ("ask", QUESTION, "--url", fake.url, "--json", "--samples", "4", "--seed", "0")
        command = forker.start(tmp_path, *words)
        assert eventually(lambda: "2/4" in command.error and fake.in_flight == 2, 60)
        command.interrupt(), time.sleep(0.005), command.interrupt()  # as `timeout` sends it
        assert command.wait(30) == 130
    assert "interrupted after 2 of 4 samples  |  391: 1, 392: 1" in command.error
    record = json.loads(command.output)
    assert [sample["answer"] for sample in record["samples"]] == ["391", "392"]
    assert record["interrupted"] is record["tokens_spent_at_least"] is True


def test_ctrl_c_after_the_last_sample_shows_the_vote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ask_module, "shown_chains", interrupt)
    with serving(lambda _: completion("\\boxed{391}")) as fake, pytest.raises(typer.Exit) as end:
        ask(QUESTION, url=fake.url, samples=1)
    assert end.value.exit_code == 130
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.endswith("interrupted after 1 of 1 sample  |  391: 1\n")


def test_a_template_is_sent_as_it_is_but_for_the_question(forker: Forker, tmp_path: Path) -> None:
    template = r"\\frac{{1}} {question} \\boxed{}"
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        words = ("ask", QUESTION, "--url", fake.url, "--samples", "1", "--template", template)
        code, command = forker.run(tmp_path, *words)
    assert code == 0, command.error
    sent = fake.requests[0]["messages"][-1]["content"]
    assert sent == template.replace("{question}", QUESTION)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--program", "oracle"), "error: unknown program 'oracle'; known, and when each stops:"),
        (("--set", "window=3"), "option window, which early_stop and confidence have; it takes no"),
        (("--program", "adaptive", "--set", "confidence=2"), "confidence: expected above 0.5"),
        (("--program", "confidence", "--set", "keep=0"), "keep: expected above 0 and at most 1"),
        (("--program", "confidence", "--set", "window=0"), "window: expected at least 1, got 0"),
        (("--program", "early_stop", "--set", "window=2.5"), "expected a whole number, got 2.5"),
        (("--program", "short", "--samples", "2"), "short with wanted=3 cannot stop before it has"),
        (("--url", "ftp://127.0.0.1"), "error: 'ftp://127.0.0.1' is no server address: write one"),
        (("--template", "no question"), "must hold {question} exactly once"),
        (("times", "23?"), "3 words where one question was expected: put the question in quotes"),
        (("--api", "grpc"), "'grpc'"),
        (("--model", "small"), "--model goes with --api openai"),
        (("--api", "openai", "--thinking-budget", "9"), "--thinking-budget needs --api sglang"),
        (("--thinking-budget", "2048"), "leaves nothing of max_tokens 2,048 to answer"),
        (("--top-p", "0"), "0 leaves no token to sample from"),
        (("--top-k", "0"), "0 leaves no token to sample from"),
    ],
)
def test_impossible_options_are_refused_before_a_server_is_asked(
    words: tuple[str, ...], message: str, forker: Forker, tmp_path: Path
) -> None:
    code, command = forker.run(tmp_path, "ask", QUESTION, "--url", NOBODY, *words)
    assert (code, command.output) == (2, "")
    assert message in " ".join(command.error.split())
    assert "Traceback" not in command.error


def test_a_question_mark_lists_when_each_program_stops(forker: Forker, tmp_path: Path) -> None:
    code, command = forker.run(tmp_path, "ask", "--program", "?")
    assert code == 0, command.error
    lines = command.output.splitlines()[::2]
    for (name, program), line in zip(PROGRAMS.items(), lines, strict=True):
        assert line.split()[0] == name
        assert program.stops_when in line
        assert program.source in line


@pytest.mark.parametrize(
    ("program", "hangs", "within_s"),
    [
        ("majority", False, 3.0),
        ("confidence --set warm_up=5", False, 3.0),
        ("early_stop", False, 3.0),
        ("majority", True, 15.0),
    ],
)
def test_ctrl_c_ends_it_soon_and_leaves_nothing_at_the_server(
    program: str, hangs: bool, within_s: float, forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: endless("let me"), answers_aborts=not hangs) as fake:
        words = ("ask", QUESTION, "--program", *program.split(), "--url", fake.url, "--json")
        command = forker.start(tmp_path, *words, "--samples", "5")
        assert eventually(lambda: fake.num_tokens == 5, 60)
        start_s = time.monotonic()
        command.interrupt()
        assert command.wait(30) == 130
        assert time.monotonic() - start_s < within_s
        assert eventually(lambda: fake.in_flight == 0)
    assert set(fake.aborted) == {body["rid"] for body in fake.requests}
    assert "interrupted" in command.error
    assert "Traceback" not in command.error
    assert json.loads(command.output)["interrupted"]


def test_a_record_is_printed_though_the_server_died_in_mid_vote(
    forker: Forker, tmp_path: Path
) -> None:
    good = {0: completion("\\boxed{391}"), 1: completion("\\boxed{391}")}
    with serving(by_sample(good, endless("let me"))) as fake:
        words = ("ask", QUESTION, "--url", fake.url, "--json", "--samples", "4", "--seed", "0")
        command = forker.start(tmp_path, *words)
        assert eventually(lambda: fake.in_flight == 2 and len(fake.requests) == 4, 60)
        fake.kill()
        assert command.wait(60) == 0, command.error
    record = json.loads(command.output)
    assert (record["answer"], record["without_vote"]["failed"]) == ("391", 2)


def test_a_record_is_printed_though_every_sample_failed(forker: Forker, tmp_path: Path) -> None:
    with serving(lambda _: (400, {"detail": "too long"})) as fake:
        words = ("ask", QUESTION, "--url", fake.url, "--json", "--samples", "2")
        code, command = forker.run(tmp_path, *words)
    assert code == 1
    assert json.loads(command.output)["without_vote"]["failed"] == 2
    assert [command.error.count(words) for words in ("failed all 2 samples", "too long")] == [1, 2]


def running(
    in_flight: dict[int, InFlightSample], spent_tokens: int, voters: Sequence[Sample] = ()
) -> Any:
    """Return a run, as far as the display looks at it."""
    return SimpleNamespace(in_flight=in_flight, spent_tokens=spent_tokens, voters=voters)


SAMPLES = [
    make_sample(0, "391"),
    make_sample(1, "[bold]"),
    make_sample(2, "391"),
    make_sample(3, None),
    make_sample(4, None, SampleState.TRUNCATED),
    make_sample(5, None, SampleState.FAILED, num_tokens=0, error=f"HTTP 503: {START_ONE}"),
]
STOPPED = make_sample(6, None, SampleState.ABORTED, num_tokens=4)
CUT_WITH_ANSWER = make_sample(7, "391", SampleState.TRUNCATED)
LOST = make_sample(6, None, SampleState.ABORTED, num_tokens=0, tokens_at_least=True)


def outcome(
    samples: list[Sample],
    num_asked: int | None = None,
    settled: bool = False,
    program: str = "majority",
) -> Outcome:
    """Return the outcome of a question."""
    vote = PROGRAMS[program].count(samples, str.__eq__)
    return Outcome(tuple(samples), vote, num_asked or len(samples), settled, 12.34)


@pytest.mark.parametrize(
    ("sample", "line"),
    [
        (SAMPLES[0], "391  (10 tokens, 1.5 s)"),
        (SAMPLES[3], "no answer  (10 tokens, 1.5 s)"),
        (SAMPLES[4], "no answer  (10 tokens, 1.5 s, cut off)"),
        (SAMPLES[5], "failed: HTTP 503"),
        (make_sample(0, None, SampleState.FAILED, error="word " * 99), f"failed: {'word ' * 23}…"),
        (LOST, "stopped  (at least 0 tokens, 1.5 s)"),
    ],
)
def test_a_sample_is_one_line(sample: Sample, line: str) -> None:
    assert sample_line(sample, tally([sample], str.__eq__)) == line


def test_the_vote_so_far_counts_every_sample_once() -> None:
    line = "391: 2, [bold]: 1, no answer: 1, cut off: 1, failed: 1"
    assert vote_line(tally(SAMPLES, str.__eq__)) == line


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (outcome(SAMPLES), "answer: 391  (2 votes of 6 samples, 1 failed, 50 tokens, 12.3 s)"),
        (
            outcome([*SAMPLES[:3], STOPPED], num_asked=6, settled=True),
            "answer: 391  (2 votes of 3 samples, 34 tokens, about 26 saved, 12.3 s)",
        ),
        (
            outcome([SAMPLES[0], LOST], settled=True),
            "answer: 391  (1 vote of 1 sample, at least 10 tokens, about 10 saved, 12.3 s)",
        ),
        (outcome(SAMPLES[3:5]), "no answer  (0 votes of 2 samples, 20 tokens, 12.3 s)"),
        (
            outcome([SAMPLES[3], STOPPED], settled=True),
            "no answer  (0 votes of 2 samples, 14 tokens, about 6 saved, 12.3 s)",
        ),
        (
            outcome(SAMPLES[:2]),
            'answer: 391  (1 vote of 2 samples, tied with "[bold]", 20 tokens, 12.3 s)',
        ),
        (
            outcome([make_sample(index, str(index)) for index in range(6)]),
            'answer: 0  (1 vote of 6 samples, tied with "1", "2", "3" and 2 more, 60 tokens, '
            "12.3 s)",
        ),
    ],
)
def test_the_last_line_says_answer_votes_tokens_and_seconds(found: Outcome, line: str) -> None:
    assert result_line(found) == line
    assert outcome_record(found)["tokens_spent_at_least"] == ("at least" in line)


@pytest.mark.parametrize(
    ("answers", "is_hinted"),
    [("12345678", True), ("12", True), ("1213", False), ("1", True), ("", False)],
)
def test_a_vote_in_which_no_two_samples_agree_is_hinted_at(answers: str, is_hinted: bool) -> None:
    samples = [SAMPLES[3], *(make_sample(n, answer) for n, answer in enumerate(answers, 4))]
    hint = disagreement(tally(samples, str.__eq__))
    assert (hint is not None) == is_hinted
    found = f"no two of the {len(answers)} answers agree"
    assert hint is None or (found if len(answers) > 1 else "a single sample has") in hint


def test_a_sample_that_was_asked_alone_is_no_vote_to_doubt() -> None:
    assert disagreement(tally([make_sample(0, "391")], str.__eq__)) is None


@pytest.mark.parametrize("terminal", [False, True])
def test_each_sample_is_shown_with_the_vote_and_markup_in_answers_is_text(terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100)
    with VoteDisplay(console, len(SAMPLES), str.__eq__) as display:
        for sample in SAMPLES:
            display.add(sample)
    if terminal:
        assert all(part in output.getvalue() for part in ("[bold]", "██", "6/6"))
    else:
        lines = output.getvalue().splitlines()
        assert lines[0] == "asking: at most 6 samples, 2,048 tokens each"
        assert len(lines) == 1 + len(SAMPLES)
        assert lines[3] == "3/6  sample 3: 391  (10 tokens, 1.5 s)  |  391: 2, [bold]: 1"


@pytest.mark.parametrize(
    ("program", "samples", "max_tokens", "lines"),
    [
        ("majority", SAMPLES[:3], 10, []),
        (
            "majority",
            SAMPLES,
            10,
            [
                "1 of 6 samples cut off after 10 tokens without an answer: raise --max-tokens",
                f"1 of 6 samples {UNANSWERED}, ",
                f"1 of 6 samples failed: HTTP 503: {START_ONE}",
            ],
        ),
        ("single", [SAMPLES[4]], 99, ["less than --max-tokens 99, so the server's context is"]),
        ("majority", [SAMPLES[0], STOPPED], 10, []),
        ("budget", [STOPPED], 10, ["the whole question is spent: raise --set tokens="]),
        ("majority", [CUT_WITH_ANSWER], 10, []),
        *(
            (
                program,
                [SAMPLES[4], CUT_WITH_ANSWER],
                10,
                [
                    "1 of 2 samples cut off after 10 tokens without an answer: raise --max-tokens",
                    f"with an answer that has no vote, since the program {program} counts none",
                ],
            )
            for program in ("budget", "short")
        ),
    ],
)
def test_each_reason_for_a_missing_vote_is_explained(
    program: str, samples: list[Sample], max_tokens: int, lines: list[str]
) -> None:
    found = hints(outcome(samples, program=program), PROGRAMS[program], max_tokens)
    assert len(found) == len(lines)
    assert all(line in text for line, text in zip(lines, found, strict=True))


def test_each_form_of_an_answer_that_is_named_is_read() -> None:
    forms = re.findall(r'\\boxed\{…\}|"(?:.+?) …"', UNANSWERED)
    assert (len(forms), f"({IN_A_BOX})" in UNANSWERED) == (3, True)
    for form in forms:
        found = [extract_answer(form.strip('"').replace("…", text)) for text in ("5", "Paris")]
        assert found == ["5", "Paris" if "boxed" in form else None]


@pytest.mark.parametrize(
    ("show", "samples", "shown"),
    [
        (Show.WINNER, SAMPLES, ["sample 1: 391"]),
        (Show.WINNER, [make_sample(0, "1"), *SAMPLES[2:3], make_sample(3, "391")], ["sample 3: "]),
        (Show.WINNER, [SAMPLES[4], SAMPLES[3]], ["sample 5: no answer"]),
        (Show.ALL, SAMPLES[:3], ["sample 1: ", "sample 2: [bold]", "sample 3: "]),
        (Show.NONE, SAMPLES, []),
    ],
)
def test_the_chains_that_are_shown(show: Show, samples: list[Sample], shown: list[str]) -> None:
    found = [*shown_chains(outcome(samples), show)]
    assert len(found) == len(shown)
    assert all(text.startswith(line) for line, text in zip(shown, found, strict=True))
    assert all("\n  " in text for text in found)


def test_only_the_end_of_a_long_chain_is_shown_and_it_commands_no_terminal() -> None:
    lines = last_lines("\n".join(map(str, range(50)))).splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("  …", 1 + SHOWN_LINES, "  49")
    assert len(last_lines("x" * 100_000)) < 2100
    assert last_lines(" one\ntwo \n") == "  one\n  two"
    assert printable("a\x1b[31m\tb\n") == "a\N{REPLACEMENT CHARACTER}[31m\tb\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_vote_so_far_is_counted_as_the_last_one(program: str) -> None:
    output = io.StringIO()
    late = make_sample(8, "392")
    console = Console(file=output, width=100)
    with VoteDisplay(console, 2, str.__eq__, PROGRAMS[program]) as display:
        voters = [CUT_WITH_ANSWER]
        display.begin(running({}, 0, voters))
        for sample in (CUT_WITH_ANSWER, late):
            display.add(sample)
    final = outcome(voters, program=program).vote
    first, second = output.getvalue().splitlines()[1:]
    assert first.endswith(f"|  {vote_line(final)}")
    assert second.endswith(f"392  (10 tokens, 1.5 s, no vote)  |  {vote_line(final)}")
    assert ("cut off, no vote" in first) == (final.winner is None) == ("cut off: 1" in first)


def test_a_wait_is_shown_with_speed_and_an_estimate_that_the_first_sample_betters() -> None:
    display = VoteDisplay(Console(file=io.StringIO()), 2, str.__eq__, max_tokens=1000)
    display._start_s = time.monotonic() - 10.0
    assert display.waiting_line() == "waiting for the first token, 10 s"
    flying = {1: in_flight(1, "so", 50)}
    flying[1]._sent_s = time.monotonic() - 10.0
    display.begin(running(flying, 50))
    assert display.waiting_line().startswith("50 tokens so far, 5.0 a second; at most 6m30s left")
    display.begin(running(flying, 16))
    assert display.waiting_line() == "16 tokens so far, 1.6 a second"
    display.add(make_sample(0, "391", num_tokens=100))
    display.begin(running(flying, 150))
    flying[1]._sent_s = time.monotonic() - 2.0
    assert display.waiting_line() == "150 tokens so far, 15 a second; about 1 s left"


def in_flight(index: int, text: str = "", num_tokens: int = 0) -> InFlightSample:
    """Return a sample whose server has sent this text."""
    sample, reader = InFlightSample(index), StreamReader("r")
    if text:
        reader.take({"choices": [{"delta": {"content": text}}]})
    sample.begin_try(reader)
    sample.num_tokens = num_tokens
    return sample


def test_samples_in_flight_are_shown_with_their_tokens_and_states() -> None:
    samples = [in_flight(index) for index in range(2, MAX_ROWS + 4)] + [InFlightSample(99)]
    first = in_flight(0, r"so \boxed{391}. Wait, \boxed{40", 1200)
    first._sent_s = time.monotonic() - 30.0
    second = in_flight(1, num_tokens=7)
    second.cancel()
    output = io.StringIO()
    Console(file=output, width=80).print(in_flight_table([*samples, second, first]))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert lines[0] == ["sample", "tokens", "tokens/s", "state", "answer", "so", "far"]
    assert lines[1] == ["1", "1,200", "40.0", "running", "391"]
    assert (lines[2][:2], lines[2][3:]) == (["2", "7"], ["ending"])
    assert lines[3] == ["3", "0", "0.0", "waiting"]
    assert lines[1 + MAX_ROWS] == ["…", "4", "more"]  # sample 99 has not been sent yet
    assert speed_line(1207, 10.0) == "1,207 tokens so far, 121 a second"
    assert speed_line(7, 20.0) == "7 tokens so far, 0.3 a second"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, no, \boxed{[red]} it is", "[red]"),
        (r"\boxed{1}, no, \boxed{\frac{1}{2", "1"),
        (r"\boxed{1} within \boxed{}, so \boxed{", "1"),
        (r"\boxed{7}</think>It is", ""),
        (r"the answer is 5", ""),
        ("", ""),
    ],
)
def test_the_answer_so_far_is_the_last_box_that_is_closed(text: str, answer: str) -> None:
    assert answer_so_far(text) == answer


def test_a_long_text_keeps_no_table_waiting() -> None:
    texts = [r"\boxed{1}" + " so what" * 300_000, r"\boxed{}" * 50_000, r"\boxed{1" * 20_000]
    start_s = time.process_time()
    for text in texts * 20:
        answer_so_far(text)
    assert time.process_time() - start_s < 1.0  # reading all of the texts would take seconds


def test_on_a_terminal_no_sample_runs_below_its_own_line() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    samples = {0: in_flight(0, "so", 77)}
    with VoteDisplay(console, 1, str.__eq__) as display:
        display.begin(running(samples, 87))
        display._live.refresh()
        samples.clear()
        display.add(SAMPLES[0])
        before, after = output.getvalue().split("1/1  sample 1: ")
    assert "running" in before
    assert "running" not in after


def test_on_a_terminal_samples_in_flight_stand_below_the_vote() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with VoteDisplay(console, 2, str.__eq__) as display:
        display.begin(running({3: in_flight(3, r"\boxed{12345}", 77)}, 87))
        display.add(SAMPLES[0])
        display._live.refresh()
    assert re.search("(?s)87 tokens so far.*12345|12345.*87 tokens so far", output.getvalue())
