"""The rival policies' settings, each with its definition on plain lists."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lim_sglang.gates.files import write_gates
from lim_sglang.kernels.reference_rivals import BlockGate
from tests.kernels import make_vectors_rivals as plain
from tests.server.oracle import Keep, Oracle, OracleRun, raw_scores
from tests.server.tiny_model import BUDGET, NUM_LAYERS


class Rival(NamedTuple):
    """A policy's settings and its oracle."""

    settings: Mapping[str, Any]
    keep: Keep
    dense_layers: Sequence[int] = (0, 1)
    picks: bool = False
    """Layers select for themselves, or by the length alone."""
    once_a_step: bool = False
    """The length alone decides, and one set a step is written, by the first layer."""

    def settings_with(self, gate: Path) -> dict[str, Any]:
        """Return the settings, with a gate where the policy needs one."""
        needs_gate = self.settings["policy"] == "seer"
        return {"budget": BUDGET, **self.settings} | ({"gate": str(gate)} if needs_gate else {})

    def oracle(self, model: Path, select_layers: Sequence[int]) -> Oracle:
        """Return the oracle of a model under this policy."""
        return Oracle(
            model,
            select_layers=() if self.picks else select_layers,
            budget=BUDGET,
            keep=self.keep,
            picks=self.picks,
            dense_layers=self.dense_layers,
        )

    def written(self, run: OracleRun) -> OracleRun:
        """Return a run with the sets that a server writes."""
        kept = {row: kept for row, kept in run.kept.items() if not self.once_a_step or row[1] == 0}
        return OracleRun(run.tokens, kept)


def by_scores(keep: Any, *scale: None, **options: Any) -> Keep:
    """Return a selection from raw scores; `scale` stands for a definition that takes the factor."""

    def of_inputs(
        query: torch.Tensor, keys: torch.Tensor, factor: float, _layer: int
    ) -> list[list[int]]:
        factors = [factor] if scale else []
        kept: list[list[int]] = keep(BUDGET, raw_scores(query, keys).tolist(), *factors, **options)
        return kept

    return of_inputs


def quest(shared_by: str) -> Rival:
    """Return Quest with pages for these heads."""
    settings = {"policy": "quest", "shared_by": shared_by}
    return Rival(
        settings,
        lambda query, keys, *_: plain.keep_quest(
            BUDGET, query.tolist(), keys.tolist(), shared_by=shared_by
        ),
        picks=True,
    )


GATE_HEADS, GATE_KV_HEADS, GATE_DIM, ROPE_THETA = 6, 2, 16, 10000.0
"""Of the tiny model."""


def tiny_gate(layer: int, dim: int = GATE_DIM) -> dict[str, Any]:
    """Return a random gate of a layer of the tiny model, or of one with another head dimension, by
    the names of `plain.gate_logits`."""
    generator = torch.Generator().manual_seed(100 + layer)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).tolist()

    group = GATE_HEADS // GATE_KV_HEADS
    return {
        "gate_q": random(GATE_KV_HEADS, group, dim, dim),
        "gate_k": random(GATE_KV_HEADS, 3 * dim, dim),
        "gate_qnorm": random(dim),
        "gate_knorm": random(dim),
    }


def write_tiny_gates(folder: Path, dim: int = GATE_DIM) -> Path:
    """Write `tiny_gate` of all layers in the published format."""
    gates = [
        BlockGate(*map(torch.tensor, tiny_gate(layer, dim).values())) for layer in range(NUM_LAYERS)
    ]
    write_gates(folder, gates, {"base_model": "tiny"})
    return folder


def keep_by_gate(
    query: torch.Tensor, keys: torch.Tensor, _factor: float, layer: int
) -> list[list[int]]:
    """Rotate back and keep the blocks that the layer's gate prefers."""
    rotated = keys.tolist()
    before = [
        [plain.rotate(row, -position, ROPE_THETA) for row in token]
        for position, token in enumerate(rotated)
    ]
    newest = [plain.rotate(row, -(len(rotated) - 1), ROPE_THETA) for row in query.tolist()]
    gate = tiny_gate(layer)
    return plain.keep_seer(BUDGET, before, query=newest, rope_theta=ROPE_THETA, **gate)


SCALED = (None,)
RIVALS = {
    "streaming": Rival(
        {"policy": "streaming"},
        lambda _query, keys, *_: plain.keep_streaming(BUDGET, len(keys)),
        dense_layers=(),
        picks=True,
        once_a_step=True,
    ),
    "tidal": Rival({"policy": "tidal"}, by_scores(plain.keep_tidal)),
    "tidal-recent": Rival(
        {"policy": "tidal", "recent_ratio": 0.25, "sinks": 4},
        by_scores(plain.keep_tidal, recent_ratio=0.25, sinks=4),
    ),
    "delta": Rival({"policy": "delta"}, by_scores(plain.keep_delta, *SCALED)),
    "omnikv": Rival({"policy": "omnikv"}, by_scores(plain.keep_omnikv, *SCALED)),
    "seer": Rival({"policy": "seer"}, keep_by_gate, dense_layers=(), picks=True),
    **{f"quest-{heads}": quest(heads) for heads in ("query_head", "kv_head", "all")},
}
