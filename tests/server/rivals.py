"""The rival policies' settings, each with its definition on plain lists."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tests.kernels import make_vectors_rivals as plain
from tests.server.oracle import Keep, raw_scores
from tests.server.tiny_model import BUDGET


class Rival(NamedTuple):
    """A policy's settings and its oracle."""

    settings: Mapping[str, Any]
    keep: Keep
    dense_layers: Sequence[int] = (0, 1)
    picks: bool = False
    """Layers select for themselves, or by the length alone."""


def by_scores(keep: Any, *scale: None, **options: Any) -> Keep:
    """Return a selection from raw scores; `scale` stands for a definition that takes the factor."""

    def of_inputs(query: torch.Tensor, keys: torch.Tensor, factor: float) -> list[list[int]]:
        factors = [factor] if scale else []
        kept: list[list[int]] = keep(BUDGET, raw_scores(query, keys).tolist(), *factors, **options)
        return kept

    return of_inputs


def quest(shared_by: str) -> Rival:
    """Return Quest with pages for these heads."""
    settings = {"policy": "quest", "shared_by": shared_by}
    return Rival(
        settings,
        lambda query, keys, _: plain.keep_quest(
            BUDGET, query.tolist(), keys.tolist(), shared_by=shared_by
        ),
        picks=True,
    )


SCALED = (None,)
RIVALS = {
    "streaming": Rival(
        {"policy": "streaming"},
        lambda _, keys, __: plain.keep_streaming(BUDGET, len(keys)),
        dense_layers=(),
        picks=True,
    ),
    "tidal": Rival({"policy": "tidal"}, by_scores(plain.keep_tidal)),
    "tidal-recent": Rival(
        {"policy": "tidal", "recent_ratio": 0.25, "sinks": 4},
        by_scores(plain.keep_tidal, recent_ratio=0.25, sinks=4),
    ),
    "delta": Rival({"policy": "delta"}, by_scores(plain.keep_delta, *SCALED)),
    "omnikv": Rival({"policy": "omnikv"}, by_scores(plain.keep_omnikv, *SCALED)),
    **{f"quest-{heads}": quest(heads) for heads in ("query_head", "kv_head", "all")},
}
