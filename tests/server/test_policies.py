"""Each policy keeps what its definition on plain lists keeps, and as many tokens as it counts."""

import hashlib
import random
from pathlib import Path

import pytest
import torch

from lim_sglang.config import LimConfig
from lim_sglang.gates.files import WEIGHTS_FILE
from lim_sglang.kernels.compact import StepSlots
from lim_sglang.kernels.page_selector import PageSelector
from lim_sglang.kernels.selector import Room, ScoreSelector, WindowSelector
from lim_sglang.kernels.verify_pages import poison_summaries
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


def rope_table(positions: int, dim: int = DIM) -> torch.Tensor:
    """Return RoPE as SGLang keeps it, [positions, dim]."""
    angles = torch.arange(positions)[:, None] * ROPE_THETA ** -(torch.arange(0, dim, 2) / dim)
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


KERNEL_DIM = 64
LENGTHS = (BUDGET, BUDGET + 1, BUDGET + 90, BUDGET + 223)
KERNEL_CASES = {
    **{name: rival.settings for name, rival in RIVALS.items()},
    "lessismore": {"policy": "lessismore", "sinks": 3},
    "lessismore-by-mass": {"policy": "lessismore", "ranking": "mass"},
    "streaming-sinks": {"policy": "streaming", "sinks": 7},
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernels_of_a_policy_keep_what_its_definition_keeps(name: str, tmp_path: Path) -> None:
    """What a GPU serves is allocated beside the definition: both must mean the same."""
    settings = {"budget": BUDGET, **KERNEL_CASES[name]}
    if settings["policy"] == "seer":
        settings["gate"] = str(write_tiny_gates(tmp_path / "gate", KERNEL_DIM))
    policy = LimConfig.from_mapping(settings).make_policy()
    assert isinstance(policy, SparsePolicy)
    generator = torch.Generator().manual_seed(7)
    # Slots in shuffled pages of 64, as SGLang's.
    pages = [-(-length // 64) for length in LENGTHS]
    order = torch.randperm(sum(pages), generator=generator)
    slots = [
        (each[:, None] * 64 + torch.arange(64)).flatten()[:length]
        for each, length in zip(order.split(pages), LENGTHS, strict=True)
    ]
    query = torch.randn(len(LENGTHS), HEADS, KERNEL_DIM, generator=generator)
    query *= 0.4  # weights so even that their sums and their maxima rank pages differently
    keys = torch.randn(64 * len(order), KV_HEADS, KERNEL_DIM, generator=generator)
    table = rope_table(max(LENGTHS) + 9, KERNEL_DIM)
    room = Room(len(LENGTHS), HEADS, KV_HEADS, max(LENGTHS), sum(LENGTHS), "cpu", table)
    counts = [int(policy.count_read(length)) for length in LENGTHS]
    lists = policy.sharing.num_lists(HEADS, KV_HEADS)
    step = StepSlots(
        torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        torch.cat(slots).int(),
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.zeros((lists, sum(counts)) if lists > 1 else sum(counts), dtype=torch.int32),
    )
    selector = policy.allocate(room)
    if isinstance(selector, PageSelector):
        lengths = torch.cat([torch.arange(1, length + 1) for length in LENGTHS])
        summaries = poison_summaries(selector, keys)
        selector.summarize(LAYER, keys, lengths, step.slots.long(), summaries)
        selector.select(LAYER, query, summaries, step)
    elif isinstance(selector, ScoreSelector):
        selector.select(query, keys, step, scale=SCALE)
    else:
        assert isinstance(selector, WindowSelector)
        selector.keep_slots(step)
    kept = torch.atleast_2d(step.kept).split(counts, dim=1)
    assert torch.equal(kept[0], slots[0].int().expand_as(kept[0]))
    for row, found in list(enumerate(kept))[1:]:
        inputs = LayerInputs(query[row], keys[slots[row]], SCALE, LAYER, table)
        assert torch.equal(found, slots[row][policy.keep(inputs)].int())


@pytest.mark.parametrize("num_ranks", [1, 2, 6])
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_ranks_keep_what_one_rank_keeps(name: str, num_ranks: int, gate: Path) -> None:
    settings = {"budget": BUDGET, **KERNEL_CASES[name]}
    if settings["policy"] == "seer":
        settings["gate"] = str(gate)
    policy = LimConfig.from_mapping(settings).make_policy()
    assert isinstance(policy, SparsePolicy)
    by_kv_head = policy.sharing is SharedBy.KV_HEAD
    assert bool(policy.reasons_against_ranks(num_ranks, KV_HEADS)) == (by_kv_head and num_ranks > 2)
    if policy.reasons_against_ranks(num_ranks, KV_HEADS):
        return
    generator, length = torch.Generator().manual_seed(11), BUDGET + 90
    query = torch.randn(HEADS, DIM, generator=generator) * 0.4
    keys = torch.randn(length, KV_HEADS, DIM, generator=generator)
    copies = max(1, num_ranks // KV_HEADS)  # of each KV head, as SGLang hands them out
    own_keys = keys.repeat_interleave(copies, dim=1).chunk(num_ranks, dim=1)
    table = rope_table(length + 9)
    inputs = [
        LayerInputs(own, own_keys[rank], SCALE, LAYER, table, rank, num_ranks)
        for rank, own in enumerate(query.chunk(num_ranks))
    ]
    if policy.needs_all_heads:
        parts = torch.stack([policy.part_of_rank(each) for each in inputs])
        kept = policy.keep_by_parts(parts, length)
    elif policy.sharing is SharedBy.ALL:
        kept = policy.keep(inputs[-1])  # by the length alone
    else:
        kept = torch.cat([policy.keep(each) for each in inputs])
    assert torch.equal(kept, policy.keep(LayerInputs(query, keys, SCALE, LAYER, table)))


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
