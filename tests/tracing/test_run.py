"""`lim trace`: what is refused before a model is loaded, and a real trace beside the oracle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lim_sglang.bench.calibration import Calibration, write_preset
from lim_sglang.cli import app
from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.config import Preset
from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.tasks import find_task
from lim_sglang.gates.training import alone_in
from lim_sglang.models import known_shape
from lim_sglang.tracing import run
from lim_sglang.tracing.records import FILE, QuestionTrace, read_trace
from lim_sglang.tracing.run import encode_question, load_chat_tokenizer
from tests.processes import clean_environment
from tests.server.oracle import KeptSets, Oracle
from tests.tracing.traces import question

BUDGET, NEW = 48, 24
SELECT_LAYERS = (2, 3)
"""Of a model of 8 layers that was never measured."""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Return a file of two questions of 60 words."""
    path = tmp_path / "own.jsonl"
    rows = [" ".join(f"w{(7 * n * n + seed) % 400 + 5}" for n in range(60)) for seed in (1, 2)]
    path.write_text("".join(json.dumps({"question": r, "answer": "1"}) + "\n" for r in rows))
    return path


def refused(*words: object) -> BaseException | None:
    """Run the command; return its error."""
    return CliRunner().invoke(app, ["trace", *map(str, words)]).exception


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "lessismore,lossless"), "write --dense --policy lessismore"),
        (("--policy", "full"), "reads everything"),
        (("--policy", "quest", "--budget", "100"), "multiple of 16"),
        (("--layers", "2,x"), "integers separated by commas"),
        (("--layers", ""), "--layers takes layers from 0"),
        (("--layers", "-1"), "--layers takes layers from 0"),
    ],
)
def test_options_that_are_wrong_are_refused_in_words(
    tmp_path: Path, questions: Path, options: tuple[str, ...], words: str
) -> None:
    found = refused("M", "--questions", questions, "--out", tmp_path / "out", *options)
    assert isinstance(found, ConfigError)
    assert words in str(found)


def test_default_policies_that_do_not_take_the_budget_are_left_out_in_words(
    tmp_path: Path, questions: Path
) -> None:
    words = ("M", "--questions", questions, "--out", tmp_path / "file", "--budget", "32")
    (tmp_path / "file").touch()
    found = CliRunner().invoke(app, ["trace", *map(str, words)])
    assert "cannot be written" in str(found.exception)
    assert "Left out: quest, since budget must be a multiple of 16" in found.stderr


def test_a_budget_that_no_answer_can_exceed_is_refused_before_the_model_is_loaded(
    tiny_model: Path, tmp_path: Path, questions: Path
) -> None:
    words = ("--questions", questions, "--out", tmp_path / "out", "--max-tokens", 4)
    found = refused(tiny_model, *words)
    assert isinstance(found, DataError)
    assert "within the budget of 256" in str(found)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file of questions whose answers are letters; traces of them are made up."""
    monkeypatch.setattr(run, "load_runner", lambda *_: None)
    monkeypatch.setattr(run, "trace_questions", lambda _, __, prompts, *___: map(question, prompts))
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "A or B?", "answer": "A"}\n')
    return path


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused_before_questions_are_read(
    tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").touch()
    found = refused("M", "--questions", tmp_path / "none", "--out", tmp_path / out)
    assert isinstance(found, DataError)
    assert "cannot be written" in str(found)


def test_layers_beyond_the_models_are_refused_before_it_is_loaded(
    tiny_model: Path, tmp_path: Path, letters: Path
) -> None:
    out = tmp_path / "out"
    error = refused(tiny_model, "--questions", letters, "--out", out, "--layers", "7,8,99")
    assert "--layers names 8, 99: the model has layers 0 to 7" in str(error)
    assert not out.exists()


def test_another_prompt_is_another_trace(
    tiny_model: Path, tmp_path: Path, letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "out")
    monkeypatch.chdir(tiny_model)
    assert refused(".", "--questions", letters, *out) is None
    conditions = read_trace(tmp_path / "out" / FILE).conditions
    assert conditions["model"] == tiny_model.name
    assert conditions["policies"]["lessismore"]["select_layers"] == [*SELECT_LAYERS]
    assert refused(".", "--questions", letters, *out) is None
    words = "a trace of other settings (prompts_sha256):"
    assert words in str(refused(".", "--questions", f"{letters}:choice", *out))


def test_other_layers_of_a_preset_are_another_trace(
    tiny_model: Path, tmp_path: Path, letters: Path
) -> None:
    preset = tmp_path / "preset.json"
    policy = json.dumps({"policy": "lessismore", "preset": str(preset)})
    words = ("--questions", letters, "--out", tmp_path / "out", "--policy", policy)
    shape = known_shape(str(tiny_model))
    assert shape
    errors = []
    for layers in ((2, 4), (2, 5)):
        write_preset(Calibration(shape, Preset(layers, "own", None, None), []), preset)
        errors.append(refused(tiny_model, *words))
    assert errors[0] is None
    assert "a trace of other settings (policies):" in str(errors[1])
    conditions = read_trace(tmp_path / "out" / FILE).conditions
    (settings,) = conditions["policies"].values()
    assert settings["select_layers"] == [2, 4]
    assert "preset" not in settings


def test_two_commands_do_not_trace_into_one_folder(
    tiny_model: Path, tmp_path: Path, letters: Path
) -> None:
    out = tmp_path / "out"
    with alone_in(out, "lim trace"):
        error = refused(tiny_model, "--questions", letters, "--out", out)
        assert not (out / FILE).exists()
    assert f"another lim trace is writing to {out}: wait for its end" in str(error)
    assert refused(tiny_model, "--questions", letters, "--out", out) is None


def trace_by_command(folder: Path, questions: Path, out: Path) -> str:
    """Trace each step in a process of its own; return what the command printed."""
    command = [sys.executable, "-m", "lim_sglang", "trace", str(folder), "--out", str(out)]
    command += ["--questions", str(questions), "--budget", f"{BUDGET}", "--max-tokens", f"{NEW}"]
    command += ["--every", "1"]
    environment = clean_environment({CPU_ENGINE_VAR: "1"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = ("Loading ", "WARNING:lim_sglang.", "Tracing", "question ")
    assert all(line.startswith(ours) for line in filter(None, done.stderr.splitlines()))
    return done.stdout


def check_sets(traced: QuestionTrace, kept: KeptSets) -> None:
    """Compare the changes of the served policy's sets with those of the oracle's sets."""
    for record in traced.layers:
        length, layer = record.length, record.layer
        assert length == traced.prompt_tokens + record.step
        if layer not in SELECT_LAYERS:
            assert "lessismore" not in {*record.from_step, *record.from_layer}
            continue
        now = {*kept[length, layer][0]}
        if record.step > 1:
            before = kept[length - 1, layer][0]
            assert record.from_step["lessismore"] == len(now & {*before}) / BUDGET
        if layer == max(SELECT_LAYERS):
            below = kept[length, min(SELECT_LAYERS)][0]
            assert record.from_layer["lessismore"] == len(now & {*below}) / BUDGET


@pytest.mark.e2e
@pytest.mark.slow
def test_answers_and_sets_of_a_trace_are_the_oracles_and_a_second_command_traces_nothing(
    tiny_model: Path, tmp_path: Path, questions: Path
) -> None:
    printed = trace_by_command(tiny_model, questions, tmp_path / "out")
    found = read_trace(tmp_path / "out" / FILE)
    assert [each.question for each in found.questions] == ["0", "1"]
    tokenizer = load_chat_tokenizer(str(tiny_model))
    oracle = Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET)
    template = find_task(f"file:{questions}").prompt
    for traced, line in zip(found.questions, questions.read_text().splitlines(), strict=True):
        prompt = encode_question(tokenizer, json.loads(line)["question"], template)
        assert traced.prompt_tokens == len(prompt) > BUDGET
        decoded = oracle.generate(prompt, traced.new_tokens)
        assert traced.text == tokenizer.decode(decoded.tokens, skip_special_tokens=True)
        assert {record.step for record in traced.layers} == {*range(1, traced.new_tokens)}
        check_sets(traced, decoded.kept)
    again = trace_by_command(tiny_model, questions, tmp_path / "out")
    assert again == printed
    assert read_trace(tmp_path / "out" / FILE) == found
