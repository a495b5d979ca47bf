"""`lim calibrate`: the search, texts that the model writes, the preset; a real runner on a CPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lim_sglang.bench import calibration
from lim_sglang.bench.calibration import (
    PROMPTS,
    Calibration,
    CalibrationOptions,
    LayersKl,
    num_search_steps,
    prepared,
    search,
    selectable_layers,
    write_preset,
)
from lim_sglang.bench.commands import calibrate
from lim_sglang.bench.divergence import StepClock
from lim_sglang.bench.results import read_divergences
from lim_sglang.bench.workloads import ModelChoice
from lim_sglang.config import ModelShape, Preset, read_preset
from lim_sglang.errors import INTERRUPTED, ConfigError, DataError
from lim_sglang.models import weights_fingerprint
from tests.bench.forced_runner import LENGTH, ROWS, STEPS, Runner, stand_in
from tests.processes import clean_environment
from tests.server.tiny_model import random_prompt

SHAPE = ModelShape("llama", 30, 576, 9)
GAIN = {2: 1, 9: 60, 13: 25, 17: 40, 20: 38, 25: 10}
"""Made-up worth of a SELECT layer; others have none."""
PICK_GAIN = {4: 3, 9: 5, 13: 8, 20: 20, 29: 14}
"""The same of a pick layer."""


class Made:
    """A made-up measurement that notes its calls: the best layers are told apart by all steps."""

    def __init__(self, decoys: dict[int, int]) -> None:
        self.decoys = decoys
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def __call__(
        self, select: tuple[int, ...], pick: tuple[int, ...], steps: int
    ) -> tuple[float, ...]:
        """Return a KL for each of two sequences."""
        self.calls.append((select, pick, steps))
        decoys = self.decoys if steps < 64 else {}
        kl = 200.0 - sum((GAIN | decoys).get(layer, 0) for layer in select)
        kl -= sum((PICK_GAIN | decoys).get(layer, 0) for layer in pick)
        return (kl - 5, kl + 5)


@pytest.mark.parametrize(
    ("num_layers", "num_pick_layers", "decoys", "layers", "pick"),
    [
        (1, 0, {}, (2,), ()),
        (2, 0, {}, (2, 9), ()),
        (2, 0, {5: 70, 25: 65}, (2, 9), ()),  # few steps flatter others, all steps do not
        (2, 0, {4: 70, 5: 70, 6: 70, 7: 70}, (2, 4), ()),  # four leave no place for layer 9
        (3, 0, {}, (2, 9, 17), ()),
        (4, 0, {}, (2, 9, 17, 20), ()),
        (1, 1, {}, (2,), (20,)),
        (2, 2, {}, (2, 9), (20, 29)),  # the last layer picks, and never selects
        (2, 2, {5: 70, 25: 65}, (2, 9), (20, 29)),
        (2, 3, {}, (2, 9), (13, 20, 29)),  # layer 9 selects, and picks no more
        (4, 1, {}, (2, 9, 17, 20), (29,)),
    ],
)
def test_layers_are_added_by_their_worth_on_all_steps(
    num_layers: int,
    num_pick_layers: int,
    decoys: dict[int, int],
    layers: tuple[int, ...],
    pick: tuple[int, ...],
) -> None:
    measure, candidates = Made(decoys), range(2, 29)
    numbers = (num_layers, num_pick_layers)
    best, measured = search(measure, candidates, *numbers, 64, 8)
    assert (best.layers, best.pick_layers, best.steps) == (layers, pick, 64)
    assert [(each.layers, each.pick_layers, each.steps) for each in measured] == measure.calls
    assert measured[0] == LayersKl((2,), 64, (194.0, 204.0))
    assert best in measured
    steps = sum(steps for *_, steps in measure.calls)
    assert steps == num_search_steps(len(candidates), *numbers, 64, 8)
    tried = [layers for layers, _, steps in measure.calls if steps == 8 and len(layers) == 2]
    rivals = [(2, layer) for layer in range(3, 29)]
    assert tried[: len(rivals)] == (rivals if num_layers > 1 else [])
    first = [pick for _, pick, steps in measure.calls if steps == 8 and len(pick) == 1]
    left = [(layer,) for layer in range(3, 30) if layer not in layers]
    assert first == (left if num_pick_layers else [])


def test_the_first_layer_stands_above_the_dense_ones_and_the_last_never_selects() -> None:
    small = ModelShape("llama", 5, 64, 2)
    assert selectable_layers(SHAPE, 4, 4) == range(2, 29)
    assert selectable_layers(small, 2, 1) == range(2, 4)
    words = "--layers 3: of 5 layers 2 can select, since layers 0, 1 are dense"
    with pytest.raises(ConfigError, match=words):
        selectable_layers(small, 3, 0)
    words = "--pick-layers 2: of 5 layers 1 can pick, since layers 0, 1 are dense and 2 select"
    with pytest.raises(ConfigError, match=words):
        selectable_layers(small, 2, 2)


def options(**changed: Any) -> CalibrationOptions:
    """Return options for the model in plain torch."""
    given = {"sequences": ROWS, "length": LENGTH, "steps": STEPS, "budget": 4, **changed}
    return CalibrationOptions(ModelChoice(None, "model"), None, **given)


def test_a_budget_that_covers_a_step_is_refused() -> None:
    options(budget=LENGTH - STEPS)
    with pytest.raises(ConfigError, match=r"--budget 25 covers the first steps, .* token 24 "):
        options(budget=LENGTH - STEPS + 1)


# Texts that the model writes, and what is measured on them

END = 7
ASKED = [[30, 31, END, 32], [33, 34]]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return the model, whose chats alternate between two prompts."""
    made = stand_in(monkeypatch)
    made.model_config.hf_eos_token_id = {END}
    made.table[..., END] += 0.3  # answers end
    monkeypatch.setattr(calibration, "chats", lambda *_: [cycle(ASKED) for _ in range(ROWS)])
    return made


def written(runner: Runner, **changed: Any) -> tuple[torch.Tensor, list[tuple[float, ...]]]:
    """Return the texts, and the KL of a set of layers on one step and on all."""
    runner.live, runner.budget = 0, LENGTH
    clock = StepClock(100, lambda *_: None)
    with prepared(options(**changed), "folder", runner, None, clock) as (tokens, measure):
        return tokens.clone(), [measure((2, 9), (), steps) for steps in (1, STEPS)]


def test_a_set_is_measured_with_the_layers_of_both_kinds(runner: Runner) -> None:
    shown: list[str] = []
    clock = StepClock(100, lambda _, text: shown.append(text))
    with prepared(options(), "folder", runner, None, clock) as (_, measure):
        measure((2, 9), (4, 20), 1)
    config = runner.lim_config  # type: ignore[attr-defined]
    assert (config.select_layers, config.pick_layers) == ((2, 9), (4, 20))
    assert "SELECT 2, 9, pick 4, 20 at 4" in shown[-1]


def test_a_sequence_is_prompts_with_the_models_own_answers(runner: Runner) -> None:
    tokens, _ = written(runner)
    for row in tokens.tolist():
        left, prompts = row, cycle(ASKED)
        while left:
            prompt = next(prompts)[: len(left)]
            assert left[: len(prompt)] == prompt
            left = left[len(prompt) :]
            left = left[left.index(END) + 1 :] if END in left else []
    assert sum(row.count(33) for row in tokens.tolist()) > 0  # an answer ended
    assert torch.equal(tokens, written(runner)[0])
    assert not torch.equal(tokens, written(runner, seed=1)[0])


def test_answers_are_drawn_from_the_models_distribution(runner: Runner) -> None:
    runner.table *= 100  # one token has all of the probability
    (row, *_), _ = written(runner)
    asked = len(ASKED[0])
    likeliest = int(runner.logits(row[:asked].tolist(), LENGTH).argmax())
    assert int(row[asked]) == likeliest


def test_layers_are_measured_on_the_last_tokens_that_the_model_wrote(runner: Runner) -> None:
    """The runner itself asserts that each pass reads the dense prefix and its own tokens."""
    tokens, found = written(runner)
    for steps, kl in zip((1, STEPS), found, strict=True):
        for text, mean in zip(tokens.tolist(), kl, strict=True):
            first = LENGTH - STEPS + 1
            pairs = [
                [runner.logits(text[:n], read).double().softmax(-1) for read in (LENGTH, 4)]
                for n in range(first, first + steps)
            ]
            expected = sum(float((p * (p / q).log()).sum()) for p, q in pairs) / steps
            assert mean == pytest.approx(expected, rel=1e-4)


def test_prompts_are_chats_in_an_order_of_each_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tokenizer:
        chat_template: str | None = "template"

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text), text.startswith("<user>")]}

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return f"<user>{messages[0]['content']}"

    monkeypatch.setattr(
        "transformers.AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: Tokenizer())
    )
    orders = [
        [next(own) for _ in PROMPTS] for own in calibration.chats(options(sequences=4), "folder")
    ]
    assert all(is_chat for order in orders for _, is_chat in order)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({str(order) for order in orders}) == 4
    Tokenizer.chat_template = None
    (plain, *_) = calibration.chats(options(sequences=4), "folder")
    assert not next(plain)[1]


# The preset

PRESET = Preset((2, 17), "SmolLM2-135M-Instruct", 49152, 1e5, "59400d41", (8, 20))
CONDITIONS = {"steps": 64, "budget": 128, "sequences": 2, "length": 1024, "texts": "own", "seed": 0}
FOUND = Calibration(
    SHAPE,
    PRESET,
    [
        LayersKl((2,), 64, (0.2, 0.4)),
        LayersKl((2, 3), 8, (0.1, 0.2)),
        LayersKl((2, 17), 64, (0.01, 0.03)),
        LayersKl((2, 17), 64, (0.01, 0.01), (8, 20)),
    ],
    CONDITIONS,
)


def test_a_written_preset_is_read_with_its_shape(tmp_path: Path) -> None:
    out = tmp_path / "presets" / "own.json"
    write_preset(FOUND, out)
    assert read_preset(str(out)) == (SHAPE, PRESET)
    evidence = json.loads(out.read_text())["evidence"]
    assert evidence.items() >= CONDITIONS.items()
    sets = [LayersKl(**each) for each in evidence["measured"]]
    assert [(*each.layers, each.steps, *each.kl) for each in sets[1:2]] == [(2, 3, 8, 0.1, 0.2)]
    assert (sets[3].layers, sets[3].pick_layers) == ([2, 17], [8, 20])
    with pytest.raises(DataError, match="name another --out"):
        write_preset(FOUND, out / "below-a-file.json")


def test_the_table_has_the_sets_that_were_measured_on_all_steps() -> None:
    table = FOUND.table()
    assert "| 2 | 300 ± 100 |\n| 2, 17 | 20 ± 10 |\n| 2, 17, pick 8, 20 | 10 ± 0 |\n" in table
    assert "2, 3" not in table
    assert "2 sequences of 1,024 tokens, the last 64 teacher-forced; own, seed 0." in table
    alone = replace(FOUND, conditions=CONDITIONS | {"sequences": 1})
    assert "over 1 sequence of" in alone.table()


def test_an_interruption_leaves_the_old_preset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> Calibration:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "calibrate", interrupted)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    out = tmp_path / "own.json"
    out.write_text("old")
    app = typer.Typer()
    app.command()(calibrate)
    done = CliRunner().invoke(app, ["model", "--out", str(out)])
    assert (done.exit_code, out.read_text()) == (INTERRUPTED, "old")
    assert "no preset was written" in done.output
    assert [*tmp_path.iterdir()] == [out]
    monkeypatch.setattr(calibration, "calibrate", lambda *_: FOUND)
    done = CliRunner().invoke(app, ["model", "--out", str(out)])
    assert "The preset of layers 2, 17, pick 8, 20 is in" in done.output
    assert f"lim serve model --lim-preset {out}" in done.output
    assert read_preset(str(out)) == (SHAPE, PRESET)
    monkeypatch.setattr(calibration, "calibrate", pytest.fail)
    for place, error in ((tmp_path, ConfigError), (out / "below-a-file.json", DataError)):
        done = CliRunner().invoke(app, ["model", "--out", str(place)])
        assert isinstance(done.exception, error)


def test_the_preset_of_the_working_folder_has_the_folders_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    monkeypatch.setattr(calibration, "calibrate", lambda *_: FOUND)
    app = typer.Typer()
    app.command()(calibrate)
    done = CliRunner().invoke(app, ["."])
    assert "is in presets/own.json" in done.output
    assert read_preset("presets/own.json") == (SHAPE, PRESET)


def run_lim(place: Path, *words: str) -> None:
    """Run a command in a process of its own, on the CPU, whose log stays out of sight."""
    command = [sys.executable, "-m", "lim_sglang", *words]
    environment = clean_environment({})
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("WARNING:(?!lim_sglang)|Warning|shards", done.stderr), done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_is_calibrated_as_it_is_measured_by_lim_bench_divergence(
    tiny_model: Path, tmp_path: Path
) -> None:
    """On texts that are given; on texts of its own the model is calibrated alike twice."""
    lines = (json.dumps({"tokens": random_prompt(700, seed)}) + "\n" for seed in range(4))
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    sizes = ("--sequences", "2", "--length", "600", "--steps", "24", "--budget", "64")
    given = ("--texts", "texts.jsonl", *sizes)
    words = ("calibrate", str(tiny_model), *given, "--pick-layers", "1")
    run_lim(tmp_path, *words, "--out", "given.json")
    evidence = json.loads((tmp_path / "given.json").read_text())["evidence"]
    final = {
        (tuple(each["layers"]), tuple(each["pick_layers"])): each["kl"]
        for each in evidence["measured"]
        if each["steps"] == 24
    }
    shape, preset = read_preset(str(tmp_path / "given.json"))
    assert (shape.num_layers, preset.model) == (8, tiny_model.name)
    assert preset.fingerprint == weights_fingerprint(str(tiny_model))
    found = (preset.layers, preset.pick_layers)
    for number, each in enumerate(((preset.layers, ()), found)):
        rivals = [
            (select, pick) for select, pick in final if (len(select), len(pick)) == (2, number)
        ]
        assert each == min(rivals, key=lambda layers: sum(final[layers]))
    policy = json.dumps({"policy": "lessismore", "preset": str(tmp_path / "given.json")})
    run_lim(
        tmp_path,
        *("bench", "divergence", str(tiny_model), *given, "--policy", policy),
        *("--out", "rows.jsonl"),
    )
    ((row, _),) = read_divergences(tmp_path / "rows.jsonl")
    assert row.settings["pick_layers"] == [*preset.pick_layers]
    assert row.kl == pytest.approx(final[found], rel=1e-3)

    alike = []
    for name in ("one.json", "two.json"):
        run_lim(tmp_path, "calibrate", str(tiny_model), *sizes, "--layers", "1", "--out", name)
        written = json.loads((tmp_path / name).read_text())
        assert (written["layers"], len(written["evidence"]["measured"])) == ([2], 1)
        alike.append([written["evidence"][key] for key in ("texts_sha256", "measured")])
    assert alike[0] == alike[1]
