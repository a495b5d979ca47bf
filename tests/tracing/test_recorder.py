"""Records of steps: who reads what, which layers count, which steps are compared."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lim_sglang.audit import ObservedRow
from lim_sglang.kernels.reference import keep_tokens, score_tokens
from lim_sglang.policies import POLICIES
from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.policies.policy import LayerInputs, SelectingPolicy
from lim_sglang.tracing.recorder import Chooser, Recorder, sampled_steps
from lim_sglang.tracing.records import LayerRecord

DEPTH, BUDGET, HEADS, GROUPS, DIM = 6, 48, 4, 2, 8
SELECT = (2, 4)


def choosers(*names: str, served: str = "") -> dict[str, Chooser]:
    """Return choosers of policies with the test's budget and layers."""
    found = {}
    for name in names:
        kind = POLICIES[name]
        more: dict[str, Any] = (
            {"select_layers": SELECT} if issubclass(kind, SelectingPolicy) else {}
        )
        policy = kind(**({} if name == "full" else {"budget": BUDGET, **more}))
        found[name] = Chooser(policy, DEPTH, None, served=name == served)
    return found


def inputs(step: int, layer: int, length: int) -> LayerInputs:
    """Return a layer's random queries and keys."""
    generator = torch.Generator().manual_seed(100 * step + layer)
    query = torch.randn(HEADS, DIM, generator=generator)
    keys = torch.randn(length, GROUPS, DIM, generator=generator)
    return LayerInputs(query, keys, scale=0.5, layer=layer)


def run_step(
    recorder: Recorder,
    step: int,
    *,
    measures: bool = True,
    length: int = 90,
    kept: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Show a recorder all layers of a step; the backend has kept `kept` from each layer on."""
    recorder.begin_step(step, measures=measures)
    now = torch.arange(length)[None]
    for layer in range(DEPTH):
        now = (kept or {}).get(layer, now)
        row = ObservedRow(step, None, inputs(step, layer, length), now, layer in (kept or {}))
        recorder.note_layer(row)


def recorder_of(*names: str, served: str = "", layers: Any = range(DEPTH)) -> Recorder:
    split = LessIsMore(budget=BUDGET).budget_split
    return Recorder(choosers(*names, served=served), split, layers)


def recall_by_hand(at: LayerInputs, kept: list[list[int]]) -> float:
    """Compute recall from the definition, head by head."""
    total = 0.0
    for head, query in enumerate(at.query):
        logits = at.keys[:, head * GROUPS // HEADS] @ query * at.scale
        weights = logits.double().exp() / logits.double().exp().sum()
        total += float(sum(weights[token] for token in kept[head * len(kept) // HEADS]))
    return total / HEADS


def test_a_reuse_layer_is_measured_by_the_set_of_the_nearest_select_layer_below() -> None:
    recorder = recorder_of("lessismore", "tidal")
    run_step(recorder, 1)
    records = {record.layer: record for record in recorder.take()}
    read = {layer: [*record.recall] for layer, record in records.items()}
    assert read == {n: ["lessismore", "tidal"] if n in (3, 5) else [] for n in range(DEPTH)}
    for layer, below in ((3, 2), (5, 4)):
        chosen = inputs(1, below, 90)
        scores = score_tokens(chosen.query, chosen.keys)
        kept = keep_tokens(scores, LessIsMore(budget=BUDGET).budget_split)
        expected = recall_by_hand(inputs(1, layer, 90), [kept.tolist()])
        assert records[layer].recall["lessismore"] == pytest.approx(expected)
        best = [sorted([*row[:-1].topk(BUDGET - 1).indices.tolist(), 89]) for row in scores]
        expected = recall_by_hand(inputs(1, layer, 90), best)
        assert records[layer].recall["tidal"] == pytest.approx(expected)


def test_policies_that_pick_choose_in_each_layer_and_a_window_is_known_at_the_first() -> None:
    recorder = recorder_of("quest", "streaming")
    run_step(recorder, 1)
    first, *_, last = recorder.take()
    assert {*first.recall} == {"streaming"}  # Quest's first two layers are dense
    assert {*last.recall} == {"quest", "streaming"}
    window = [*range(4), *range(90 - BUDGET + 4, 90)]
    expected = recall_by_hand(inputs(1, DEPTH - 1, 90), [window])
    assert last.recall["streaming"] == pytest.approx(expected)
    assert {*last.from_layer} == {"quest"}  # one layer alone selects for the window
    run_step(recorder, 2)
    records = {record.layer: [*record.from_layer] for record in recorder.take()}
    assert records == {n: ["quest"] if n > 2 else [] for n in range(DEPTH)}


def test_the_served_policys_sets_are_those_that_the_backend_has_kept() -> None:
    recorder = recorder_of("lessismore", "tidal", served="lessismore")
    kept = {2: torch.arange(BUDGET)[None], 4: torch.arange(24, 24 + BUDGET)[None]}
    run_step(recorder, 1, kept=kept)
    records = {record.layer: record for record in recorder.take()}
    for layer, below in ((3, 2), (5, 4)):
        expected = recall_by_hand(inputs(1, layer, 90), kept[below].tolist())
        assert records[layer].recall["lessismore"] == pytest.approx(expected)
    assert records[4].from_layer["lessismore"] == 0.5


def test_sets_are_compared_with_those_of_the_step_before_and_of_no_other() -> None:
    recorder = recorder_of("lessismore", served="lessismore")
    sets = [torch.arange(first, first + BUDGET)[None] for first in (0, 12, 36)]
    run_step(recorder, 4, measures=False, kept={2: sets[0], 4: sets[0]})
    run_step(recorder, 5, kept={2: sets[1], 4: sets[2]})
    run_step(recorder, 7, kept={2: sets[1], 4: sets[1]})
    shares = {(r.step, r.layer): dict(r.from_step) for r in recorder.take()}
    assert {at: share for at, share in shares.items() if share} == {
        (5, 2): {"lessismore": 0.75},
        (5, 4): {"lessismore": 0.25},
    }


def test_a_next_request_is_not_compared_with_the_one_before() -> None:
    recorder = recorder_of("lessismore")
    run_step(recorder, 1)
    assert len(recorder.take()) == DEPTH
    run_step(recorder, 1)
    assert not [record for record in recorder.take() if record.from_step]
    assert recorder.take() == []


def test_full_attention_has_no_sets_and_a_row_within_the_budget_no_records() -> None:
    recorder = recorder_of("full", "lessismore")
    run_step(recorder, 1, length=BUDGET)
    assert recorder.take() == []
    run_step(recorder, 2, length=BUDGET + 1)
    assert {name for record in recorder.take() for name in record.recall} == {"lessismore"}


def test_only_the_chosen_layers_are_recorded_and_the_others_still_select() -> None:
    whole, part = recorder_of("lessismore"), recorder_of("lessismore", layers=(4, 5))
    for recorder in (whole, part):
        run_step(recorder, 1)
    found: list[LayerRecord] = part.take()
    assert found == whole.take()[4:]


def test_one_step_in_so_many_is_measured_and_the_one_before_is_seen() -> None:
    def first(every: int) -> list[tuple[int, bool, bool]]:
        return list(itertools.islice(sampled_steps(every), 6))

    assert [step for step, _, measured in first(3) if measured] == [3, 6]
    assert [step for step, seen, _ in first(3) if seen] == [2, 3, 5, 6]
    assert first(1) == [(step, True, True) for step in range(1, 7)]
