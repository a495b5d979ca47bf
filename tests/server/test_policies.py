"""Each policy keeps what its definition on plain lists keeps, and as many tokens as it counts."""

import random

import pytest
import torch

from lim_sglang.config import LimConfig
from lim_sglang.policies.policy import LayerInputs, SharedBy, SparsePolicy
from tests.server.rivals import RIVALS
from tests.server.tiny_model import BUDGET

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3


def make_policy(name: str) -> SparsePolicy:
    """Return a rival policy."""
    policy = LimConfig.from_mapping({"budget": BUDGET, **RIVALS[name].settings}).make_policy()
    assert isinstance(policy, SparsePolicy)
    return policy


@pytest.mark.parametrize("length", [BUDGET + 1, 300, 512, 700])
@pytest.mark.parametrize("name", RIVALS)
def test_a_policy_keeps_what_its_definition_says(name: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(HEADS, DIM, generator=generator)
    keys = torch.randn(length, KV_HEADS, DIM, generator=generator)
    policy = make_policy(name)
    kept = policy.keep(LayerInputs(query, keys, SCALE))
    assert kept.tolist() == RIVALS[name].keep(query, keys, SCALE)
    lists = policy.sharing.num_lists(HEADS, KV_HEADS)
    assert kept.shape == (lists, policy.count_read(length))


@pytest.mark.parametrize("name", RIVALS)
def test_rows_within_the_budget_read_everything(name: str) -> None:
    policy = make_policy(name)
    lengths = random.Random(1).sample(range(1, BUDGET + 1), 20)
    assert [policy.count_read(length) for length in lengths] == lengths


def test_lists_are_counted_by_the_heads_that_share_them() -> None:
    counts = {shared.value: shared.num_lists(6, 2) for shared in SharedBy}
    assert counts == {"all": 1, "kv_head": 2, "query_head": 6}
