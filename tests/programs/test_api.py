"""The Python interface, and the examples that use it, against a fake or the tiny real server."""

import asyncio
import inspect
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lim_sglang
from lim_sglang import LimError, Vote
from lim_sglang.errors import in_python
from lim_sglang.programs.schema import Sample, SampleState
from tests.fakes.sglang_server import FakeServer, completion, serving
from tests.forked_commands import ROOT, Forker
from tests.processes import LocalServer
from tests.programs.harness import boxed, by_sample, in_thread

QUESTION = "What is 17 * 23?"
NOBODY = "http://127.0.0.1:9"
REPLIES = {0: "391", 1: "0.5", 2: "\\frac{1}{2}", 3: "391"}


@contextmanager
def answering() -> Iterator[FakeServer]:
    """Run a server whose four samples give two answers, two votes each."""
    with serving(by_sample({n: completion(boxed(text)) for n, text in REPLIES.items()})) as fake:
        yield fake


def ask_four(url: str) -> Vote:
    """Ask for four samples."""
    return lim_sglang.ask(QUESTION, samples=4, url=url, seed=0)


def test_a_vote_holds_answer_votes_samples_and_cost_and_is_frozen() -> None:
    with answering() as fake:
        vote = ask_four(fake.url)
    assert (vote.answer, vote.votes, vote.margin) == ("391", {"391": 2, "0.5": 2}, 0)
    assert [sample.text for sample in vote.samples] == [boxed(text) for text in REPLIES.values()]
    assert {sample.state for sample in vote.samples} == {SampleState.FINISHED}
    assert vote.tokens == 4 * 7
    assert 0 < vote.seconds < 60
    with pytest.raises(FrozenInstanceError):
        vote.answer = "392"  # type: ignore[misc]


def test_a_template_takes_the_place_of_the_usual_request() -> None:
    with serving(lambda _: completion("391")) as fake:
        lim_sglang.ask(QUESTION, samples=1, url=fake.url, template="Say {x}: {question}")
        with pytest.raises(LimError, match=r"^template= must hold \{question\} exactly once"):
            lim_sglang.ask(QUESTION, url=fake.url, template="Say")
    sent = [request["messages"][0]["content"] for request in fake.requests]
    assert sent == [f"Say {{x}}: {QUESTION}"]


@pytest.mark.parametrize(("deterministic", "seed"), [(True, 0), (True, None), (False, 0)])
def test_samples_say_if_their_seed_is_heeded(deterministic: bool, seed: int | None) -> None:
    with serving(lambda _: completion("391"), deterministic=deterministic) as fake:
        vote = lim_sglang.ask(QUESTION, samples=2, url=fake.url, seed=seed)
    is_heeded = deterministic and seed is not None
    assert [sample.seed_honoured for sample in vote.samples] == [is_heeded] * 2


def test_help_names_every_argument_and_shows_no_function_as_a_default() -> None:
    for function in (lim_sglang.ask, lim_sglang.grade, lim_sglang.extract_answer):
        described = inspect.getdoc(function) or ""
        for name, parameter in inspect.signature(function).parameters.items():
            is_described = re.search(rf"^    [\w, ]*\b{name}\b[\w, ]*: ", described, re.MULTILINE)
            assert name == "question" or is_described, name
            assert not callable(parameter.default) or parameter.default is parameter.empty


def test_each_sample_is_told_as_it_ends() -> None:
    told: list[Sample] = []
    with answering() as fake:
        vote = lim_sglang.ask(QUESTION, samples=4, url=fake.url, seed=0, on_sample=told.append)
    assert sorted(told, key=lambda sample: sample.index) == [*vote.samples]


def test_no_stated_answer_is_none_and_no_error() -> None:
    with serving(lambda _: completion("who knows", reason="length")) as fake:
        vote = lim_sglang.ask(QUESTION, "single", url=fake.url)
    assert (vote.answer, vote.votes, vote.margin, len(vote.samples)) == (None, {}, 0, 1)


def test_numbers_of_numpy_are_numbers() -> None:
    with answering() as fake:
        vote = lim_sglang.ask(
            QUESTION,
            "adaptive",
            np.int64(4),
            fake.url,
            options={"confidence": np.float32(0.5625)},
            max_tokens=np.int32(99),
            temperature=np.float32(0.5),
            seed=np.int64(0),
        )
        sent = fake.requests[0]
    assert vote.answer == "391"
    assert (sent["max_tokens"], sent["temperature"]) == (99, 0.5)
    assert lim_sglang.grade("25", np.int64(25), "integer")
    with pytest.raises(LimError, match="max_tokens: expected a whole number of at least 1, got 0"):
        lim_sglang.ask(QUESTION, url=NOBODY, max_tokens=np.int64(0))


def test_a_vote_from_many_threads_and_beside_a_running_loop() -> None:
    async def in_a_notebook(url: str) -> Vote:
        assert threading.current_thread() is not threading.main_thread()
        return ask_four(url)

    with answering() as fake:
        asked = [in_thread(ask_four, fake.url) for _ in range(3)]
        asked.append(in_thread(lambda: asyncio.run(in_a_notebook(fake.url))))
        assert [vote.result(60).answer for vote in asked] == ["391"] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"question": QUESTION}, "no server answers at"),
        ({"question": " "}, "the question is empty"),
        ({"question": QUESTION, "program": "oracle"}, "unknown program 'oracle'"),
        ({"question": QUESTION, "options": {"window": 3}}, "has no option window"),
        (
            {"question": QUESTION, "program": "adaptive", "options": {"confidence": 2}},
            "confidence: expected above 0.5",
        ),
        (
            {"question": QUESTION, "samples": 0},
            "samples: expected a whole number of at least 1",
        ),
        (
            {"question": QUESTION, "max_tokens": -1},
            "max_tokens: expected a whole number of at least 1, got -1",
        ),
        ({"question": QUESTION, "samples": "8"}, "samples: expected a whole number"),
        ({"question": QUESTION, "samples": True}, "samples: expected a whole number"),
        *(
            ({"question": QUESTION, name: value}, f"{name}: {words}")
            for name, value, words in (
                ("temperature", 9, "expected a number from 0 to 2, got 9"),
                ("temperature", float("nan"), "expected a number from 0 to 2, got nan"),
                ("temperature", "hot", "expected a number from 0 to 2, got 'hot'"),
                ("top_p", 1.5, "expected a number from 0 to 1, got 1.5"),
                ("top_p", 0, "0 leaves no token to sample from; use more"),
                ("top_k", 0, "0 leaves no token to sample from; use 1 or more"),
                ("top_k", 2.5, "expected a whole number of at least -1, got 2.5"),
                ("seed", -1, "expected a whole number of at least 0, got -1"),
                ("thinking_budget", 0, "expected a whole number of at least 1, got 0"),
                ("timeout_s", 0, "expected a number from 1 to 86400, got 0"),
            )
        ),
        ({"question": 5}, "question: expected a text, got 5"),
        (
            {"question": QUESTION, "program": "single", "samples": 3},
            "single takes 1 sample of a question, not 3",
        ),
        (
            {"question": QUESTION, "program": "short", "samples": 2},
            "wanted=3 cannot stop before it has 3 samples",
        ),
        ({"question": QUESTION, "program": None}, "program: expected a name or a Program"),
        ({"question": QUESTION, "thinking_budget": 4096}, "leaves nothing of max_tokens"),
        ({"question": QUESTION, "url": "ftp://x"}, "is no server address.* after url=$"),
        ({"question": QUESTION}, r"`lim serve` .* or name a running one with url=$"),
        ({"question": QUESTION, "on_sample": 3}, "on_sample: expected a function"),
        (
            {"question": QUESTION, "thinking": False, "thinking_budget": 9},
            "^thinking_budget= limits thoughts that thinking=False forbids",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words_and_a_short_trace(
    arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(LimError, match=words) as found:
        lim_sglang.ask(**{"url": NOBODY, **arguments})  # type: ignore[arg-type]
    assert len(found.traceback) == 2  # this function's line and the interface's
    assert found.value.__suppress_context__
    assert "--" not in str(found.value)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (function, name)
        for function in (lim_sglang.ask, lim_sglang.grade, lim_sglang.extract_answer)
        for name in inspect.signature(function).parameters
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_each_argument_of_another_type_is_refused_before_a_server_is_asked(
    function: Any, name: str, by_name: bool
) -> None:
    parameters = inspect.signature(function).parameters
    required = {n: "1" for n, p in parameters.items() if p.default is p.empty and n != name}
    arguments = required | {name: object()}
    if by_name or parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
        before = []
    else:
        before = [
            arguments.pop(n, parameters[n].default)
            for n in [*parameters][: [*parameters].index(name) + 1]
        ]
    with pytest.raises(LimError, match=f"^{name}: expected .*, got <object"):
        function(*before, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("options", 3, "a mapping of names to numbers"),
        ("options", [1], "a mapping of names to numbers"),
        ("options", "window=2", "a mapping of names to numbers"),
        ("options", {"confidence": "high"}, "a mapping of names to numbers"),
        ("url", 5, "a text"),
        ("api_key", 5, "a text"),
        ("system", 5, "a text"),
        ("thinking", "yes", "True or False"),
        ("max_tokens", None, "a whole number of at least 1"),
    ],
)
def test_values_that_look_likely_are_refused_by_their_type(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(LimError, match=f"^{name}: expected {expected}"):
        lim_sglang.ask(QUESTION, **{"url": NOBODY, "program": "adaptive", name: value})  # type: ignore[arg-type]


def test_an_error_of_another_kind_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lim_sglang.programs.program.find_program", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as found:
        lim_sglang.ask(QUESTION, url=NOBODY)
    assert len(found.traceback) > 3


def test_a_server_that_fails_every_sample_is_an_error() -> None:
    with serving(lambda _: (400, {"detail": "too long"})) as fake, pytest.raises(LimError) as found:
        lim_sglang.ask(QUESTION, samples=2, url=fake.url)
    assert "the server failed all 2 samples, the first with:" in str(found.value)


def test_errors_of_samples_name_arguments_and_no_options() -> None:
    told: list[Sample] = []
    answers = by_sample({0: completion(boxed("1"))}, (401, {}))
    with serving(answers) as fake:
        vote = lim_sglang.ask(QUESTION, samples=2, url=fake.url, seed=0, on_sample=told.append)
    for sample in (vote.samples[1], max(told, key=lambda sample: sample.index)):
        assert str(sample.error).endswith("started with by api_key= or LIM_API_KEY")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise --max-tokens", "raise max_tokens="),
        ("less than --max-tokens 64, so", "less than max_tokens=64, so"),
        ("leave --no-thinking out", "leave thinking=False out"),
        ("raise --timeout", "raise timeout_s="),
        ("--thinking-budget: the template", "thinking_budget: the template"),
        ("`lim ask --api openai` with --url", "`lim ask --api openai` with url="),
        ("a -- b", "a -- b"),
    ],
)
def test_options_become_arguments_and_commands_stay(text: str, expected: str) -> None:
    assert in_python(text) == expected


@pytest.mark.parametrize("answer", [True, float("nan"), None, [5]])
def test_an_answer_that_is_neither_text_nor_number_is_refused(answer: Any) -> None:
    with pytest.raises(LimError, match="answer: expected a text or a finite number, got"):
        lim_sglang.grade("the answer is 5", answer)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("integer", "1000"),
        ("choice", "K"),
        ("expression", " "),
        ("expression", "\frac{1}{2}"),
        ("text", "'.'"),
    ],
)
def test_an_answer_that_no_reply_can_equal_is_refused(
    kind: lim_sglang.api.Kind, answer: str
) -> None:
    with pytest.raises(LimError, match=r"^answer: (must be|holds)"):
        lim_sglang.grade("the answer is 5", answer, kind)


@pytest.mark.parametrize(
    ("reply", "kind", "answer", "right"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "expression", "0.5", True),
        ("so it is \\boxed{\\frac{1}{2}}", "expression", "0.6", False),
        ("The answer is 070.", "integer", "70", True),
        ("The answer is 70.", "integer", "71", False),
        ("\\boxed{(b)}", "choice", "B", True),
        ("\\boxed{C}", "choice", "B", False),
        ("nothing", "expression", "0", False),
        ("the answer is 5", "expression", 5, True),
        ("the answer is 5", "integer", 5.0, True),
        ("the answer is 0.00001", "expression", 1e-5, True),
        ("the answer is 5", "integer", 6, False),
        ("\\boxed{\\text{blue lamp}}", "text", " blue lamp.", True),
        ("The answer is 070.", "text", "70", False),
        ("The answer is 5.", "text", 5, True),
        ("\\boxed{a}", "text", "#### a", False),
    ],
)
def test_replies_are_graded_by_kind_in_any_thread(
    reply: str, kind: lim_sglang.api.Kind, answer: str | float, right: bool
) -> None:
    assert lim_sglang.grade(reply, answer, kind) is right
    assert in_thread(lim_sglang.grade, reply, answer, kind).result(60) is right


@pytest.mark.parametrize(
    ("reply", "kind", "answer"),
    [
        ("first \\boxed{1}, then \\boxed{x+1}", "expression", "x+1"),
        ("The answer is 070.", "integer", "70"),
        ("\\boxed{x+1}", "integer", None),
        ("\\boxed{\\text{(b)}}", "choice", "B"),
        ("\\boxed{42}", "choice", None),
        ("who knows", "expression", None),
        ("", "choice", None),
        ("So it is \\boxed{\\text{blue lamp.}}", "text", "blue lamp"),
    ],
)
def test_an_answer_is_extracted_if_it_is_of_the_kind(
    reply: str, kind: lim_sglang.api.Kind, answer: str | None
) -> None:
    assert lim_sglang.extract_answer(reply, kind) == answer


@pytest.mark.parametrize("function", [lim_sglang.extract_answer, lim_sglang.grade])
def test_an_unknown_kind_is_refused_with_the_known_ones(function: object) -> None:
    words = "kind: expected expression, integer, choice, text, got 'word'"
    with pytest.raises(LimError, match=words):
        function(*["1"] * (1 + (function is lim_sglang.grade)), kind="word")  # type: ignore[operator]


def test_the_package_names_what_it_exports_and_nothing_else() -> None:
    assert set(lim_sglang.__all__) <= set(dir(lim_sglang))
    assert all(getattr(lim_sglang, name) for name in lim_sglang.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        lim_sglang.nonsense  # noqa: B018 - looking it up is the test


def run_example(forker: Forker, folder: Path, name: str, *words: str) -> str:
    """Run a file of examples/ to its end; return its output."""
    code, command = forker.run(folder, str(ROOT / "examples" / name), *words, timeout_s=120)
    assert code == 0, command.error
    return command.output


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
NEED_ARGUMENTS = ("engine.py", "own_task.py")


def call_example(name: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Call an example without site-packages, so that no slow import works."""
    command = [sys.executable, "-S", str(ROOT / "examples" / name), *words]
    environment = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)


@pytest.mark.parametrize("name", ["own_task.py", "self_consistency.py", "stopping_rule.py"])
def test_an_example_asks_the_server_of_the_environment(name: str, tmp_path: Path) -> None:
    first = str(tmp_path)  # own_task's folder, or the question
    assert f"asking {NOBODY} for" in call_example(name, first, LIM_URL=NOBODY).stdout
    assert f"asking {NOBODY} for" in call_example(name, first, NOBODY, LIM_URL="http://x").stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_how_it_is_called_before_it_imports_anything_slow(name: str) -> None:
    asked, wrong = (call_example(name, *words) for words in (["--help"], ["1", "2", "3", "4"]))
    assert (asked.returncode, wrong.returncode) == (0, 2)
    assert f"usage: {name}" in asked.stdout
    assert f"usage: {name}" in wrong.stderr
    if name in NEED_ARGUMENTS:
        assert call_example(name).returncode == 2
    assert f"`python examples/{name}" in (ROOT / "examples" / name).read_text()
    assert f"`examples/{name}" in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {"engine.py"}))
def test_an_example_without_a_server_says_so_without_a_trace(
    name: str, forker: Forker, tmp_path: Path
) -> None:
    code, command = forker.run(tmp_path, str(ROOT / "examples" / name), str(tmp_path), NOBODY)
    assert code == 1
    assert NOBODY in command.output  # said before the question is sent
    assert NOBODY in command.error
    assert "a line as each ends" not in command.output
    assert "Traceback" not in command.error


def test_the_examples_own_stopping_rule_stops(forker: Forker, tmp_path: Path) -> None:
    with serving(lambda _: completion(boxed("391"))) as fake:
        output = run_example(forker, tmp_path, "stopping_rule.py", QUESTION, fake.url)
    first, wait, *samples, last = output.splitlines()
    assert fake.url in first
    assert "minutes on a CPU" in wait
    assert len(samples) in (2, 3, 4)
    assert "sample 1: 391, finished, " in output
    begun = int(last.split(", ")[2].split()[0])
    assert last.startswith("391, ")
    assert 2 <= begun <= 4


def test_the_examples_own_task_is_scored(forker: Forker, tmp_path: Path) -> None:
    with serving(lambda _: completion(boxed("1000"))) as fake:
        output = run_example(forker, tmp_path, "own_task.py", str(tmp_path), fake.url)
        assert len(fake.requests) == 4 * 2
    assert "file:sums" in output
    assert len((tmp_path / "sums.jsonl").read_text().splitlines()) == 4


def test_the_examples_openai_client_gets_a_vote(forker: Forker, tmp_path: Path) -> None:
    folder = tmp_path / "proxy"
    folder.mkdir()
    with serving(lambda _: completion(boxed("391"))) as fake:
        proxy = forker.start(folder, "proxy", "--url", fake.url, "--port", "0")
        try:
            while "base url" not in proxy.output:
                assert "error" not in proxy.error
            url = proxy.output.split("base url")[1].split()[0]
            output = run_example(forker, tmp_path, "openai_client.py", QUESTION, url)
        finally:
            proxy.interrupt()
            proxy.wait(30)
    assert "391" in output
    assert "'votes': " in output
    assert "minutes on a CPU" in output


@pytest.mark.parametrize(
    ("text", "ended", "words"),
    [
        ("so \\boxed{391}", "length", "391"),
        ("let me", "length", "no answer, cut off after 256 tokens"),
        ("a poem", "stop", "no answer in a form that is read, such as \\boxed{391}"),
    ],
)
def test_the_examples_self_consistency_says_why_there_is_no_answer(
    text: str, ended: str, words: str
) -> None:
    class Fork(dict[str, str]):
        def get_meta_info(self, _: str) -> dict[str, Any]:
            return {"finish_reason": {"type": ended}}

    example = runpy.run_path(str(ROOT / "examples" / "self_consistency.py"))
    assert example["answer_or_reason"](Fork(solution=text)) == words


@pytest.mark.e2e
def test_the_examples_self_consistency_runs_on_a_real_server(
    forker: Forker, tmp_path: Path, tiny_server: LocalServer
) -> None:
    output = run_example(forker, tmp_path, "self_consistency.py", QUESTION, tiny_server.url)
    assert " of 4: " in output or "no chain states an answer" in output


@pytest.mark.e2e
@pytest.mark.slow
def test_the_examples_engine_decodes_with_lessismore(tiny_model: Path) -> None:
    shown = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "engine.py"), str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "LIM_CONFIG": '{"budget": 64, "select_layers": [2, 5]}'},
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    sparse, _, _, dense = shown.stdout.splitlines()[-1].split()[:4]
    assert (int(sparse) > 0, int(dense)) == (True, 0)
