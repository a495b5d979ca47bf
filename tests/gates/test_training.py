"""`lim train-gate`: texts, checkpoints, interruption, progress, and what it prints and writes."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from lim_sglang.cli import command_line
from lim_sglang.errors import ConfigError, DataError, LimError, ModelError
from lim_sglang.gates import training
from lim_sglang.gates.distillation import GateTrainer
from lim_sglang.gates.files import CONFIG_FILE, WEIGHTS_FILE, read_gates
from lim_sglang.gates.training import (
    CHECKPOINT_FILE,
    HELD_OUT,
    python_sources,
    read_texts,
    tokenize,
)
from lim_sglang.progress import plain_console
from tests.gates.models import BUDGET, LAYERS, LENGTH, build_model, write_text

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of exactly as many tokens as are needed, with the end token."""
    tokens = (STEPS + HELD_OUT) * LENGTH
    return write_text(tmp_path_factory.mktemp("texts") / "words.txt", tokens)


def words_of(model: Path, texts: Path, out: Path, /, **changes: Any) -> list[str]:
    """Return the command line of a short training."""
    options = {"texts": texts, "out": out, "steps": STEPS, "length": LENGTH, "budget": BUDGET}
    pairs = [(f"--{name}", str(value)) for name, value in (options | changes).items()]
    return ["train-gate", str(model), *(word for pair in pairs for word in pair)]


def run(words: list[str]) -> int:
    """Run `lim`; return its exit code."""
    with pytest.raises(SystemExit) as end:
        command_line()(args=words)
    return int(end.value.code or 0)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the middle of a step."""
    learn = GateTrainer.learn

    def learn_interrupted(self: GateTrainer, tokens: torch.Tensor) -> float:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self, tokens)

    monkeypatch.setattr(GateTrainer, "learn", learn_interrupted)


def test_an_interrupted_training_ends_with_the_same_gate(
    model: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(words_of(model, texts, tmp_path / "straight")) == 0
    out = tmp_path / "resumed"
    with monkeypatch.context() as patched:
        interrupt_at(3, patched)
        assert run(words_of(model, texts, out)) == 130
    assert [path.name for path in out.iterdir()] == [CHECKPOINT_FILE]
    shown = capsys.readouterr().err
    assert f"Stopped after step 4 of {STEPS}, which is kept: the same command goes on" in shown
    assert run(words_of(model, texts, out)) == 0
    assert f"Going on from step 4 of {STEPS}" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]
    gates = [read_gates(folder) for folder in (tmp_path / "straight", out)]
    for straight, resumed in zip(*gates, strict=True):
        assert torch.equal(straight.query_weight, resumed.query_weight)
        assert torch.equal(straight.key_weight, resumed.key_weight)
        assert straight.query_norm is not None
        assert resumed.query_norm is not None
        assert torch.equal(straight.query_norm, resumed.query_norm)
    configs = [
        json.loads((tmp_path / n / CONFIG_FILE).read_text()) for n in ("straight", "resumed")
    ]
    assert configs[0] == configs[1]


def test_the_command_shows_progress_recall_and_the_next_command(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "the gate"
    assert run(words_of(model, texts, out)) == 0
    shown = capsys.readouterr()
    last = rf"step {STEPS} of {STEPS}, loss \d+\.\d{{4}}, [\d.,]+ tokens/s, 0 s left"
    assert re.search(last, shown.err)
    assert f"Share of attention mass in {BUDGET} tokens, mean over layers and 64 que" in shown.out
    shares = dict(re.findall(r"^ +(.+?)  +(\d+\.\d) %$", shown.out, re.MULTILINE))
    assert list(shares) == ["this gate", "Quest's pages", "random blocks"]
    assert shown.out.endswith(f"lim serve {model} --policy seer --lim-gate '{out}'\n")
    config = json.loads((out / CONFIG_FILE).read_text())
    assert config["base_model"] == str(model)
    assert config["tokens_seen"] == STEPS * LENGTH
    assert config["seerattn_use_qk_norm"] is True
    assert config["num_hidden_layers"] == LAYERS
    assert config["rope_theta"] == 1e6
    recall = config["lim_training"]["recall"]
    assert f"{100 * recall['gate']:.1f}" == shares["this gate"]
    assert config["lim_training"]["seed"] == 0


def test_a_finished_gate_is_not_trained_over(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a config.json already: name another --out"):
        training.read_checkpoint(tmp_path, training.Settings("m", (), 1, 64, 0))


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(0, patched)
        run(words_of(model, texts, tmp_path))
    with pytest.raises(ConfigError) as refused:
        command_line()(args=words_of(model, texts, tmp_path, steps=5, seed=9))
    message = str(refused.value)
    assert "--steps is 5, 6 in the checkpoint" in message
    assert "--seed is 9, 0 in the checkpoint" in message
    assert "--length" not in message
    before = texts.read_text()
    texts.write_text(before.replace("w9 ", "w8 "))
    with pytest.raises(ConfigError, match="the tokens of the texts changed since"):
        command_line()(args=words_of(model, texts, tmp_path))
    texts.write_text(before)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    monkeypatch.setattr(training, "check_model", lambda _model: str(other))
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="the model changed since"):
        command_line()(args=words_of(model, texts, tmp_path))


def half(file: Path) -> None:
    file.write_bytes(b"half")


def change_checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a change of a stored checkpoint."""

    def damage(file: Path) -> None:
        stored = torch.load(file, weights_only=False)
        change(stored)
        torch.save(stored, file)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (half, "it is damaged, or holds Python objects"),
        (change_checkpoint(lambda stored: stored.pop("gates")), "it lacks gates"),
        (change_checkpoint(lambda stored: stored.update(settings=["m"])), "it has no settings"),
        (
            change_checkpoint(lambda stored: stored.update(step=Path("x"))),
            "it is damaged, or holds",
        ),
        (lambda file: torch.save([1], file), "it has no settings"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    settings = training.Settings("m", (), 1, 64, 0)
    stored = dict.fromkeys(training._CHECKPOINT_KEYS, 0) | {"settings": training._plain(settings)}
    file = tmp_path / CHECKPOINT_FILE
    torch.save(stored, file)
    assert training.read_checkpoint(tmp_path, settings) == stored
    damage(file)
    with pytest.raises(DataError, match=rf"is no checkpoint \({words}.*: delete it to begin anew"):
        training.read_checkpoint(tmp_path, settings)


def test_the_gate_of_the_working_folders_model_has_the_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def train(_: object, __: object, ___: object, folder: Path, *____: object) -> None:
        folders.append(folder)
        raise KeyboardInterrupt

    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.setattr(training, "check_model", lambda model: model)
    monkeypatch.setattr(training, "train", train)
    with pytest.raises(typer.Exit):
        training.train_gate(".")
    assert folders == [Path("gates", "own")]


def test_two_trainings_do_not_share_a_folder(model: Path, texts: Path, tmp_path: Path) -> None:
    with training.alone_in(tmp_path, "lim train-gate"):
        words = "another lim train-gate is writing to .*: wait for its end, or name another --out"
        with pytest.raises(DataError, match=words):
            command_line()(args=words_of(model, texts, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_failure_of_the_device_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), training.disk_errors(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_checkpoints_are_kept_on_the_way(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    replace_file = training.replace_file

    def note(path: Path, content: bytes) -> None:
        replace_file(path, content)
        kept.append(torch.load(path, weights_only=True)["step"])

    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 4)
    monkeypatch.setattr(training, "replace_file", note)
    assert run(words_of(model, texts, tmp_path)) == 0
    assert kept == [4, 6]


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before_it(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = GateTrainer.loss

    def loss_of_step(self: GateTrainer, *layer: Any) -> torch.Tensor:
        return loss(self, *layer) * (float("nan") if self.step == 3 else 1.0)

    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(GateTrainer, "loss", loss_of_step)
    with pytest.raises(ModelError, match="the loss of step 4 is nan"):
        command_line()(args=words_of(model, texts, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]
    assert torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 500}, "--length 500: use a multiple of 64"),
        ({"budget": 100}, "--budget 100: use a multiple of 64 from 128"),
        ({"budget": 100, "length": 128}, "so use 384 or more, or a smaller --budget"),
        ({"budget": 256}, "--length 512: recall at 256 tokens is measured beyond them"),
        ({"length": 2048}, "--length 2048: the model takes 1024 tokens at most"),
        ({"steps": 7}, "have 4,097 tokens, expected 4,608 .* --texts, or --steps 6 at most"),
        ({"length": 1024, "steps": 3}, "or --steps 2 at most"),
        ({"texts": "missing.txt"}, "missing.txt is no readable text"),
        ({"out": "/dev/null/gate", "texts": "missing.txt"}, "/dev/null/gate cannot be written"),
        ({"out": __file__, "texts": "missing.txt"}, r"cannot be written \(.* is no folder\): make"),
        ({"out": "x" * 5000, "texts": "missing.txt"}, "cannot be written .*too long"),
    ],
)
def test_impossible_options_are_refused_in_words(
    changes: dict[str, Any], words: str, model: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(LimError, match=words):
        command_line()(args=words_of(model, texts, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_permission_is_refused_before_texts_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.os, "access", lambda place, _mode: place != tmp_path)
    with pytest.raises(DataError, match=r"cannot be written \(no permission in"):
        command_line()(args=words_of(model, Path("missing.txt"), tmp_path / "new" / "gate"))


@pytest.mark.parametrize("command", ["train-gate", "bench divergence"])
def test_a_seed_that_torch_does_not_take_is_refused(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--texts", "t", *(["--policy", "quest"] if "bench" in command else [])]
    assert run([*command.split(), "model", *texts, "--seed", str(2**63)]) == 2
    assert "seed" in capsys.readouterr().err


def test_texts_are_read_in_an_order_of_the_seed(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"text": "t{i}", "id": {i}}}\n' for i in range(20)))
    plain = tmp_path / "plain.md"
    plain.write_text("one\ntwo")
    files = [str(lines), str(plain)]
    first = list(read_texts(files, 0))
    assert sorted(first) == sorted(["one\ntwo", *(f"t{i}" for i in range(20))])
    assert list(read_texts(files, 0)) == first
    assert list(read_texts(files, 1)) != first


def test_lines_are_read_as_a_benchmark_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes('\ufeff{"text": "one\u2028line\x85"}\r\n\n{"text": "b"}'.encode())
    assert sorted(read_texts([str(file)], 0)) == ["b", "one\u2028line\x85"]
    plain = tmp_path / "plain.txt"
    plain.write_bytes("\ufeffa".encode())
    assert list(read_texts([str(plain)], 0)) == ["a"]
    file.write_text('{"text": "\\ud800"}')
    with pytest.raises(DataError, match="line 1 holds half a surrogate pair"):
        list(read_texts([str(file)], 0))


@pytest.mark.parametrize("line", ["text", '{"Text": "a"}', '{"text": 1}', '["text"]'])
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=r"lines.jsonl, line 2: expected an object such as"):
        list(read_texts([str(file)], 0))


def test_python_sources_leave_out_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("b/a.py", "a.py", "b/tests/c.py", "test_a.py", "b/a_test.py", "b/conftest.py", "c.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "dangling.py").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    monkeypatch.setattr(training.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in python_sources()] == ["a.py", "b/a.py"]
    assert sorted(read_texts([], 0)) == ["a.py", "b/a.py"]
    for number in range(20):
        (tmp_path / f"{number}.py").write_text(f"{number}")
    orders = [list(read_texts([], seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2])


def test_held_out_texts_are_not_trained_on(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(f"w{5 + i}" for i in range(64 * 5)))
    settings = training.Settings("m", (str(file),), 3, 64, 0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = training.load_texts(settings, tokenizer, plain_console(stderr=True))
    assert [list(part.shape) for part in parts] == [[HELD_OUT, 64], [3, 64]]
    assert torch.cat(parts).flatten().tolist() == list(range(5, 5 + 64 * 5))


def test_documents_end_with_the_end_token(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert list(tokenize(tokenizer, iter(["w7 w8", "w9"]))) == [[7, 8, 2], [9, 2]]
