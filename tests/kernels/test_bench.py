"""The operations that `lim bench kernel` times are the ones that serve, on the whole batch."""

import pytest
import torch

from lim_sglang.kernels import bench
from lim_sglang.kernels.bench import OPS, Case, prepare
from lim_sglang.kernels.reference import keep_tokens, score_tokens

CASE = Case(batch=3, context=90, heads=4, kv_heads=2, dim=64, budget=32, dtype=torch.float16)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_runs_again_and_again(op: str) -> None:
    prepared = prepare(op, CASE, "cpu")
    prepared.run()
    prepared.run()


def test_the_stages_and_the_whole_pick_the_reference_s_tokens() -> None:
    stages = bench._Stages(CASE, torch.device("cpu"), seed=1)
    stages.runs["keep"]()  # the scores are there
    in_stages = stages.kept.clone()
    stages.kept.fill_(-1)
    stages.select(stages.selector)
    assert torch.equal(stages.kept, in_stages)
    for row in range(CASE.batch):
        slots = stages.slots.view(CASE.batch, CASE.context)[row].long()
        scores = score_tokens(stages.query[row], stages.keys[slots])
        wanted = slots[keep_tokens(scores, CASE.budget_split)]
        assert torch.equal(in_stages.view(CASE.batch, -1)[row].long(), wanted)


def test_necessary_bytes_by_hand() -> None:
    rows, tokens, heads, recent = 3, 90, 4, 4 + 4
    selected = CASE.budget_split.selected
    assert (CASE.budget_split.sinks, CASE.budget_split.recent, selected) == (4, 4, 24)
    expected = {
        "score": rows * (tokens * (2 * 64 * 2 + 4) + heads * tokens * 4),
        "shortlist": rows * heads * (tokens - recent) * 4,
        "lse": rows * heads * tokens * 4,
        "pool": rows * (heads + 1) * tokens * 4,
        "heaviest": rows * (tokens * 4 + 32 * 8),
        "select-by-mass": None,
        "rank": rows * heads * ((tokens - recent) * 4 + selected * 4),
        "keep": None,
        "select": None,
    }
    assert {op: prepare(op, CASE, "cpu").num_bytes for op in OPS} == expected
