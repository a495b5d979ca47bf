"""`Audit` on steps whose scores and kept slots are written here, as kernels would."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang.audit import Audit, KeptSets, ObservedRow
from lim_sglang.kernels.packed import row_ends
from lim_sglang.kernels.reference import split_budget
from lim_sglang.kernels.selector import MassSelector, RankSelector, Room, ScoreSelector
from lim_sglang.policies.policy import LayerInputs

LAYER, BUDGET = 2, 8
LENGTHS = (20, 5, 30)
"""Of a step's rows, one of them within the budget."""


class AuditedLayers:
    """A server of one SELECT layer with an audit."""

    def __init__(self, kind: type[ScoreSelector]) -> None:
        self.selector: Any = kind.allocate(
            split_budget(BUDGET, 0.25, 4), Room(4, 2, 1, 64, 256, "cpu")
        )
        self.kept = torch.zeros(4 * BUDGET, dtype=torch.int32)
        policy: Any = SimpleNamespace(
            budget=BUDGET, block=1, count_read=lambda length: min(length, BUDGET)
        )
        self.audit = Audit(self.selector, self.kept, policy, [LAYER], max_rows=4)
        self.slots = torch.randperm(4 * 64, generator=torch.Generator().manual_seed(0))
        self.slots = self.slots.int().view(4, 64)

    def step(self, *, unwritten: int | None = None) -> None:
        """Run a step whose dense pass leaves one score of the last row out, if one is named."""
        batch = SimpleNamespace(
            batch_size=len(LENGTHS),
            seq_lens_cpu=torch.tensor(LENGTHS),
            req_pool_indices=torch.arange(len(LENGTHS)),
        )
        self.audit.begin_step(batch, self.slots)
        ends = row_ends(LENGTHS)
        for row, scores in enumerate(self.selector.deciding_scores.rows(ends)):
            written = torch.ones(LENGTHS[row], dtype=torch.bool)
            if unwritten is not None and row == len(LENGTHS) - 1:
                written[unwritten] = False
            scores[:, : LENGTHS[row]][:, written] = torch.randn(scores.shape[0], int(written.sum()))
        first = 0
        for row, scores in enumerate(self.selector.deciding_scores.rows(ends)):
            kept = self.slots[row, self.selector.keep(scores, LENGTHS[row])]
            self.kept[first : first + len(kept)] = kept
            first += len(kept)
        self.audit.note_layer(LAYER)
        self.audit.end_step()


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("kind", [RankSelector, MassSelector])
def test_right_sets_are_counted(kind: type[ScoreSelector]) -> None:
    layers = AuditedLayers(kind)
    for _ in range(3):
        layers.step()
    counts = layers.audit.counts()
    assert (counts["checked_sets"], counts["wrong_sets"]) == (9, 0)


def test_a_score_of_the_step_before_is_no_score() -> None:
    layers = AuditedLayers(RankSelector)
    layers.step()
    layers.step(unwritten=13)
    counts = layers.audit.counts()
    assert (counts["checked_sets"], counts["wrong_sets"]) == (6, 1)


def test_only_sets_of_sparse_rows_in_layers_that_select_are_written(tmp_path: Path) -> None:
    kept_sets = KeptSets(tmp_path, rank=1)
    for layer, length, selects in ((2, 4, True), (3, 4, False), (2, 2, True)):
        inputs = LayerInputs(torch.zeros(2, 8), torch.zeros(length, 1, 8), 1.0, layer)
        kept_sets.note_layer(ObservedRow(7, "r", inputs, torch.tensor([[0, 3]]), selects))
    (file,) = tmp_path.glob("kept-1-*.jsonl")
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line == {"step": 7, "rid": "r", "layer": 2, "seq_len": 4, "kept": [[0, 3]]}
