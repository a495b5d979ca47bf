"""Each policy keeps what its definition on plain lists keeps, and as many tokens as it counts."""

import hashlib
import random
from pathlib import Path

import pytest
import torch

from lim_sglang.config import LimConfig
from lim_sglang.gates.files import WEIGHTS_FILE
from lim_sglang.policies.policy import LayerInputs, SharedBy, SparsePolicy
from tests.server.rivals import (
    GATE_DIM,
    GATE_HEADS,
    GATE_KV_HEADS,
    RIVALS,
    ROPE_THETA,
    write_tiny_gates,
)
from tests.server.tiny_model import BUDGET

HEADS, KV_HEADS, DIM, SCALE = GATE_HEADS, GATE_KV_HEADS, GATE_DIM, 0.3
LAYER = 3


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a trained gate's folder."""
    return write_tiny_gates(tmp_path_factory.mktemp("gate"))


def make_policy(name: str, gate: Path) -> SparsePolicy:
    """Return a rival policy."""
    policy = LimConfig.from_mapping(RIVALS[name].settings_with(gate)).make_policy()
    assert isinstance(policy, SparsePolicy)
    return policy


def rope_table(positions: int) -> torch.Tensor:
    """Return RoPE as SGLang keeps it, [positions, DIM]."""
    angles = torch.arange(positions)[:, None] * ROPE_THETA ** -(torch.arange(0, DIM, 2) / DIM)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("length", [BUDGET + 1, 300, 512, 700])
@pytest.mark.parametrize("name", RIVALS)
def test_a_policy_keeps_what_its_definition_says(name: str, length: int, gate: Path) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(HEADS, DIM, generator=generator)
    keys = torch.randn(length, KV_HEADS, DIM, generator=generator)
    policy = make_policy(name, gate)
    kept = policy.keep(LayerInputs(query, keys, SCALE, LAYER, rope_table(length + 9)))
    assert kept.tolist() == RIVALS[name].keep(query, keys, SCALE, LAYER)
    lists = policy.sharing.num_lists(HEADS, KV_HEADS)
    assert kept.shape == (lists, policy.count_read(length))


def test_a_gate_is_reported_by_the_digest_of_the_weights_that_serve(tmp_path: Path) -> None:
    folder = write_tiny_gates(tmp_path / "gate")
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    policy = make_policy("seer", folder)
    assert policy.digests() == {"gate_sha256": digest}
    (folder / WEIGHTS_FILE).write_bytes(b"a gate that was trained later")
    assert make_policy("seer", folder).digests() == {"gate_sha256": digest}
    assert make_policy("delta", folder).digests() == {}


@pytest.mark.parametrize("name", RIVALS)
def test_rows_within_the_budget_read_everything(name: str, gate: Path) -> None:
    policy = make_policy(name, gate)
    lengths = random.Random(1).sample(range(1, BUDGET + 1), 20)
    assert [policy.count_read(length) for length in lengths] == lengths


def test_lists_are_counted_by_the_heads_that_share_them() -> None:
    counts = {shared.value: shared.num_lists(6, 2) for shared in SharedBy}
    assert counts == {"all": 1, "kv_head": 2, "query_head": 6}
