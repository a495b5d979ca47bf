"""Training of gates: targets, the gate's own arithmetic, losses, and that a gate learns."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from lim_sglang.errors import ModelError
from lim_sglang.gates import distillation
from lim_sglang.gates.distillation import (
    FrozenModel,
    GateShape,
    GateTrainer,
    attention_targets,
    batched_logits,
    distillation_loss,
    kept_mass,
    learning_rate,
    load_config,
    measured_positions,
    previous_blocks,
)
from lim_sglang.kernels.reference_rivals import (
    BlockGate,
    gate_logits,
    rotate,
    rotate_back,
    summarize_blocks,
)
from tests.gates.models import BUDGET, KV_HEADS, LAYERS, LENGTH, build_model, topical_words

CPU = torch.device("cpu")
G, GROUP, D, S = 2, 3, 8, 320


def load(folder: Path) -> FrozenModel:
    """Load a model on the CPU."""
    return FrozenModel(str(folder), load_config(str(folder)), CPU)


def draw(*size: int, seed: int = 0) -> Tensor:
    """Draw normal values."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def draw_gate(has_norms: bool) -> BlockGate:
    """Draw a gate in which each head and each dimension weighs differently."""
    return BlockGate(
        draw(G, GROUP, D, D, seed=1),
        draw(G, 3 * D, D, seed=2),
        draw(D, seed=3) if has_norms else None,
        draw(D, seed=4) if has_norms else None,
    )


def rope_table(length: int, dim: int) -> Tensor:
    """Return a RoPE table as `rotate` takes it, [length, dim]."""
    angles = torch.arange(length)[:, None] / 100.0 ** (torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@pytest.mark.parametrize("has_norms", [True, False])
def test_batched_logits_are_those_of_the_definition_query_by_query(has_norms: bool) -> None:
    queries, gate, table = draw(S, G * GROUP, D, seed=5), draw_gate(has_norms), rope_table(S, D)
    summaries = summarize_blocks(draw(S, G, D, seed=6))
    positions = torch.arange(S // 2, S, 7)
    found = batched_logits(queries[positions], summaries, gate, positions, table)
    for row, position in enumerate(positions.tolist()):
        expected = gate_logits(queries[position], summaries, gate, position, table)
        torch.testing.assert_close(found[:, row], expected, rtol=1e-4, atol=1e-4)


def targets_in_words(
    queries: Tensor, keys: Tensor, position: int, scale: float
) -> list[list[float]]:
    """Compute the targets of one query in plain lists, [G][B]."""
    rows = []
    for group in range(G):
        shares = [0.0] * (S // 64)
        for head in range(group * GROUP, (group + 1) * GROUP):
            scores = [
                scale * float(queries[position, head] @ keys[token, group])
                for token in range(position + 1)
            ]
            total = sum(map(math.exp, scores))
            for token, score in enumerate(scores):
                block = token // 64
                if block < position // 64:
                    shares[block] = max(shares[block], math.exp(score) / total)
        rows.append([share / (sum(shares) + 1e-9) for share in shares])
    return rows


@pytest.mark.parametrize("at_once", [1 << 28, 3 * 4 * G * GROUP * S], ids=["whole", "slices"])
def test_targets_are_the_groups_largest_weights_in_previous_blocks(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "SLICE_BYTES", at_once)
    queries, keys = 2 * draw(S, G * GROUP, D, seed=7), draw(S, G, D, seed=8)
    positions = torch.tensor([64, 127, 128, 191, 250, 319])
    found = attention_targets(queries[positions], keys, positions, 0.7)
    for row, position in enumerate(positions.tolist()):
        expected = torch.tensor(targets_in_words(queries, keys, position, 0.7))
        torch.testing.assert_close(found[:, row], expected, rtol=1e-4, atol=1e-6)
        assert not found[:, row, position // 64 :].any(), "own and later blocks"


def test_no_later_key_changes_a_target() -> None:
    queries, keys = draw(S, G * GROUP, D, seed=7), draw(S, G, D, seed=8)
    positions = torch.tensor([200])
    before = attention_targets(queries[positions], keys, positions, 1.0)
    keys[201:] = 100.0
    assert torch.equal(attention_targets(queries[positions], keys, positions, 1.0), before)


@pytest.mark.parametrize(
    ("position", "competing"), [(63, 0), (64, 1), (127, 1), (128, 2), (319, 4)]
)
def test_blocks_before_the_own_one_compete(position: int, competing: int) -> None:
    assert previous_blocks(torch.tensor([position]), 5).tolist() == [
        [j < competing for j in range(5)]
    ]


def test_the_loss_is_a_mean_of_divergences_over_all_elements() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0), 9.0], [1.0, 1.0, 1.0]]])
    targets = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    competing = torch.tensor([[True, True, False], [True, False, False]])
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    loss = distillation_loss(logits, targets, competing)
    assert float(loss) == pytest.approx(divergence / 6)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 5e-5), (9, 5e-4), (19, 1e-3), (20, 1e-3), (60, (1e-3 + 1e-5) / 2), (100, 1e-5)],
)
def test_the_learning_rate_rises_and_falls(step: int, rate: float) -> None:
    assert learning_rate(step, 100) == pytest.approx(rate)


def test_recall_is_the_mean_over_heads_of_kept_mass() -> None:
    mass = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert kept_mass(mass, torch.tensor([[0, 1], [1, 2]])) == pytest.approx(
        (0.8 + 0.2 + 0.0 + 1.0) / 4
    )


def test_recall_is_measured_in_the_second_half() -> None:
    for length in (384, 512, 4096):
        positions = measured_positions(length)
        assert max(positions) == length - 1
        assert min(positions) >= length // 2
        assert len(positions) == 32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_watched_model_shows_what_its_attention_reads(kind: str, tmp_path: Path) -> None:
    """Of the second layer, too, so that the first has attended causally."""
    from transformers import AutoModel

    folder = build_model(tmp_path, kind)
    tokens = topical_words(2, seed=1)
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32)
    seen: dict[tuple[int, str], Tensor] = {}

    def remember(layer: int, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen[layer, name] = output.detach()[0].view(len(tokens), -1, 16)

        return hook

    for index, layer in enumerate(plain.layers):
        for name in ("q", "k"):
            last = "_norm" if kind == "qwen3" else "_proj"
            getattr(layer.self_attn, name + last).register_forward_hook(remember(index, name))
    plain(tokens[None], use_cache=False)

    model = load(folder)
    table = model.cos_sin(len(tokens), model.dtype)
    shown = []

    def compare(layer: int, queries: Tensor, keys: Tensor, scale: float) -> None:
        for name, rotated in (("q", queries), ("k", keys)):
            torch.testing.assert_close(
                rotate_back(rotated, table), seen[layer, name], rtol=1e-4, atol=1e-4
            )
        assert keys.shape[1] == KV_HEADS
        assert scale == pytest.approx(0.25)
        shown.append(layer)

    model.watch(tokens, compare)
    assert shown == list(range(LAYERS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "gemma"}, "is a gemma model: gates can be trained for llama, qwen2, qwen3"),
        (
            {"kind": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "sliding_attention",
        ),
        ({"kind": "llama", "partial_rotary_factor": 0.5}, "RoPE turns 8 of 16 dimensions"),
    ],
)
def test_models_of_other_attention_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = build_model(tmp_path, **changes)
    with pytest.raises(ModelError, match=words):
        load_config(str(folder))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the weights of a model's folder."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


QUERIES = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "cannot be loaded .*: fetch"),
        (
            lambda f: change_weights(f, lambda w: w.update({QUERIES: torch.ones(7, 96)})),
            r"cannot be loaded \(.*",
        ),
        (
            lambda f: change_weights(f, lambda w: w.pop(QUERIES)),
            r"lacks 1 of its weights.*:\n  - layers.1.self_attn.q_proj.weight$",
        ),
    ],
    ids=["cut off", "another shape", "missing"],
)
def test_weights_that_are_not_the_models_are_refused(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    folder = build_model(tmp_path)
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){words}"):
        load(folder)


def test_a_step_whose_loss_is_not_finite_is_refused_and_changes_no_gate(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    change_weights(folder, lambda weights: weights[QUERIES].fill_(torch.nan))
    trainer = GateTrainer(load(folder), steps=9, length=LENGTH, seed=0)
    before = trainer.gates[0].query_weight.clone()
    with pytest.raises(ModelError, match="the loss of step 1 is nan: check the model's weights"):
        trainer.learn(topical_words(LENGTH // 64, 1))
    assert (trainer.step, torch.equal(trainer.gates[0].query_weight, before)) == (0, True)


def test_a_gate_learns_where_attention_goes(tmp_path: Path) -> None:
    model = load(build_model(tmp_path))
    trainer = GateTrainer(model, steps=40, length=LENGTH, seed=0)
    held_out = [topical_words(LENGTH // 64, seed) for seed in (100, 101)]
    before = trainer.recall(held_out, BUDGET)
    losses = [trainer.learn(topical_words(LENGTH // 64, seed)) for seed in range(40)]
    after = trainer.recall(held_out, BUDGET)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert after.gate > before.gate + 0.1
    assert after.gate > after.at_random + 0.1
    assert after.at_random == before.at_random


def test_first_weights_follow_from_the_seed(tmp_path: Path) -> None:
    model = load(build_model(tmp_path))
    first, again, other = (
        GateTrainer(model, steps=1, length=LENGTH, seed=seed).gates[0].key_weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_without_a_gradient_stay(tmp_path: Path) -> None:
    """Of two blocks one competes, and a single block has nothing to learn: no weight decays."""
    trainer = GateTrainer(load(build_model(tmp_path)), steps=1, length=LENGTH, seed=0)
    before = trainer.gates[0].query_weight.clone()
    trainer.learn(topical_words(2, 1))
    assert torch.equal(trainer.gates[0].query_weight, before)


def test_recall_is_of_the_gates_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = GateTrainer(
        load(build_model(tmp_path, dtype="bfloat16")), steps=1, length=LENGTH, seed=0
    )
    seen = set()

    def note(query: Tensor, summaries: Tensor, gate: BlockGate, *rest: Any) -> Tensor:
        seen.add(gate.query_weight.dtype)
        return gate_logits(query, summaries, gate, *rest)

    monkeypatch.setattr(distillation, "gate_logits", note)
    trainer.recall([topical_words(LENGTH // 64, 1)], BUDGET)
    assert (seen, trainer.gates[0].query_weight.dtype) == ({torch.bfloat16}, torch.float32)


def test_the_loss_of_a_layer_is_that_of_vectors_before_rope_in_the_second_half() -> None:
    table = rope_table(S, D)
    model = SimpleNamespace(
        shape=GateShape(1, G, GROUP, D),
        dtype=torch.float32,
        device=CPU,
        cos_sin=lambda length, dtype: table[:length],
    )
    trainer = GateTrainer(cast(FrozenModel, model), steps=1, length=S, seed=0)
    queries, keys = draw(S, G * GROUP, D, seed=5), draw(S, G, D, seed=6)
    turned_queries, turned_keys = rotate(queries, table), rotate(keys, table)
    summaries, divergences = summarize_blocks(keys), []
    for position in range(S // 2, S):
        own = position // 64
        logits = gate_logits(queries[position], summaries, trainer.gates[0], position, table)
        predicted = logits[:, :own].softmax(dim=-1)
        wanted = attention_targets(
            turned_queries[position, None], turned_keys, torch.tensor([position]), 0.5
        )[:, 0, :own]
        divergences.append((wanted * (wanted / predicted).log()).sum())
    expected = torch.stack(divergences).sum() / (G * (S // 2) * (S // 64))
    found = trainer.loss(0, turned_queries, turned_keys, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_step_has_its_learning_rate_and_the_scaled_loss_of_all_layers(tmp_path: Path) -> None:
    """AdamW's first step moves each weight by the rate, in the sign of its gradient."""
    model, text = load(build_model(tmp_path)), topical_words(LENGTH // 64, 1)
    trainer = GateTrainer(model, steps=100, length=LENGTH, seed=0)
    before = trainer.gates[0].key_weight.detach().clone()
    losses: list[float] = []
    model.watch(text, lambda *layer: losses.append(float(trainer.loss(*layer))))
    assert len(losses) == LAYERS
    assert trainer.learn(text) == pytest.approx(10 * sum(losses), rel=1e-5)
    moved = (trainer.gates[0].key_weight - before).abs().max()
    assert float(moved) == pytest.approx(learning_rate(0, 100), rel=0.01)


def test_each_layer_learns_alone(tmp_path: Path) -> None:
    """No gate changes the model: a layer's loss depends on that layer's gate only."""
    model = load(build_model(tmp_path))
    text = topical_words(LENGTH // 64, 1)
    trainer = GateTrainer(model, steps=2, length=LENGTH, seed=0)
    with torch.no_grad():
        trainer.gates[0].query_weight.mul_(5)
    twin = GateTrainer(model, steps=2, length=LENGTH, seed=0)
    for each in (trainer, twin):
        each.learn(text)
    assert torch.equal(trainer.gates[1].query_weight, twin.gates[1].query_weight)
    assert not torch.equal(trainer.gates[0].key_weight, twin.gates[0].key_weight)
    assert functional.mse_loss(trainer.gates[1].key_weight, twin.gates[1].key_weight) == 0
