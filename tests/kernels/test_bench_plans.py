"""Timed steps plan as often as steps of a server do."""

from types import SimpleNamespace

import pytest
import torch

from lim_sglang.bench import timing
from lim_sglang.bench.points import Point


@pytest.mark.parametrize(("lengths", "forgotten"), [((6, 6), 0), ((4, 6), 0), ((6, 3), 1)])
def test_plans_are_made_anew_while_a_row_is_within_the_budget(
    lengths: tuple[int, ...], forgotten: int
) -> None:
    forgets: list[None] = []
    plan = SimpleNamespace(budget=4, forget=lambda: forgets.append(None))
    output = SimpleNamespace(
        can_run_graph=True, logits_output=SimpleNamespace(next_token_logits=torch.zeros(1))
    )
    runner = SimpleNamespace(
        attn_backend=SimpleNamespace(kept_plan=plan), forward=lambda _batch: output
    )
    timing.run_step(runner, SimpleNamespace(point=Point(lengths), forward_batch=None))
    assert len(forgets) == forgotten
