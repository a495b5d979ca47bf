"""Dense attention of the last tokens of each request."""

from typing import Any

import pytest
import torch

from lim_sglang.kernels import bench, reference
from lim_sglang.kernels.launch import run_block, run_tile_bytes
from lim_sglang.kernels.run_attention import (
    INTERPRETED_PROGRAMS,
    RunWorkspace,
    attend_runs,
    padded_run,
)
from lim_sglang.kernels.verify import Batch, relative_error
from lim_sglang.kernels.verify_attention import ATTENTION_TOLERANCE, run_attention_differences
from tests.kernels.batches import BF16, COMPILED_HERE, DEVICES, E4M3, E5M2, F32, FP16

SMALL = {
    "one-token": (Batch((5, 1, 200, 64), dtype=F32), 1),
    "two-tokens": (Batch((5, 64, 2, 65, 130), heads=2, kv_heads=2), 2),
    "five-tokens-of-seven-heads": (Batch((5, 70, 66), heads=7, kv_heads=1, dtype=F32), 5),
    "nine-tokens": (Batch((9, 100, 73, 64), heads=8, kv_heads=2, dtype=F32), 9),
    "nine-tokens-of-seven-heads": (Batch((9, 90), heads=14, kv_heads=2, dim=128), 9),
    "eight-tokens-of-eight-heads": (Batch((140, 8), heads=8, kv_heads=1, dim=128, dtype=F32), 8),
    "sixteen-tokens": (Batch((16, 79, 33), heads=4, kv_heads=1, dim=128, dtype=F32), 16),
    "more-splits-than-are-combined-at-a-time": (Batch((1210,), 1, 1, dtype=F32), 16),
    "more-requests-than-programs": (Batch(tuple(range(2, 30, 2)), 1, 1, dtype=F32), 2),
    "bf16": (Batch((40, 3), dtype=BF16), 3),
    "fp8-cache": (Batch((90, 20), key_dtype=E5M2), 4),
}
LARGE = {
    "qwen3-8b": (Batch((32768, 5000, 2048, 2049, 9), 32, 8, 128, dtype=BF16), 9),
    "qwen3-8b-alone": (Batch((32771,), 32, 8, 128, dtype=BF16), 16),
    "qwen3-8b-pairs": (Batch((4097, 300), 32, 8, 128, dtype=BF16), 2),
    "qwen3-1.7b": (Batch((7000, 12345), 16, 8, 128, dtype=BF16), 13),
    "coder-1.5b": (Batch((900, 513, 20000), 12, 2, 128, dtype=BF16), 9),
    "coder-7b": (Batch((900, 513, 3000), 28, 4, 128, dtype=BF16), 9),
    "coder-0.5b": (Batch((900, 5300), 14, 2, 64, dtype=FP16), 5),
    "smollm2": (Batch((1400, 257, 13), 9, 3, 64, dtype=FP16), 13),
    "group-of-one": (Batch((3000, 90), 6, 6, 64, dtype=FP16), 9),
    "group-of-eight": (Batch((3000, 90), 64, 8, 128, dtype=BF16), 8),
    "one-token": (Batch((3000, 1, 64, 65), 32, 8, 128, dtype=BF16), 1),
    "one-kv-head": (Batch((70000,), 8, 1, 128, dtype=BF16), 8),
    "wide-head": (Batch((700, 3000), 8, 4, 256, dtype=BF16), 9),
    "fp8-cache": (Batch((3000, 90), 32, 8, 128, dtype=BF16, key_dtype=E4M3), 9),
    "many-requests": (Batch(tuple(range(9, 6401, 50)), 16, 8, 128, dtype=BF16), 9),
    "most-requests": (Batch(tuple(range(4, 1028, 2)), 8, 8, 64, dtype=FP16), 4),
    "f32": (Batch((3000, 77), 8, 2, 64, dtype=F32), 5),
}


@pytest.mark.parametrize(
    ("batch", "width", "device"),
    [
        *(pytest.param(*SMALL[n], "cpu", id=f"{n}-cpu", marks=COMPILED_HERE) for n in SMALL),
        *(pytest.param(*LARGE[n], "cuda", id=n, marks=pytest.mark.gpu) for n in LARGE),
    ],
)
def test_attention_of_runs_is_the_reference_s(batch: Batch, width: int, device: str) -> None:
    assert not run_attention_differences(batch, device, width)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_may_be_capped(device: str) -> None:
    batch = Batch((100, 7), dtype=F32)
    assert not run_attention_differences(batch, device, 5, soft_cap=0.7)


def workspace(
    num_programs: int, heads: int = 4, kv_heads: int = 2, dim: int = 64, max_width: int = 4
) -> RunWorkspace:
    """Allocate for this many programs."""
    allocated = RunWorkspace.allocate(
        num_heads=heads, num_kv_heads=kv_heads, dim=dim, max_width=max_width, device="cpu"
    )
    return allocated.first_programs(num_programs)


def attended(
    lengths: list[int], width: int, given: RunWorkspace, heads: int = 4, kv_heads: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention [B * width, heads, D] f32, and the reference's."""
    generator = torch.Generator().manual_seed(2)
    dim, num_slots = given.outputs.shape[-1], sum(lengths) + 9
    shapes = (len(lengths) * width, heads, dim), *[(num_slots, kv_heads, dim)] * 2
    query, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    slots = torch.randperm(num_slots, generator=generator)[: sum(lengths)].int()
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = (query, keys, values, slots, indptr)
    out = torch.full_like(query, torch.nan)
    found = attend_runs(*tensors, width=width, scale=0.2, workspace=given, out=out)
    return found, reference.attend_runs(*tensors, width=width, scale=0.2)


@pytest.mark.parametrize("num_programs", [1, 2, 5, INTERPRETED_PROGRAMS])
def test_any_number_of_programs_gives_the_same_attention(num_programs: int) -> None:
    found, expected = attended([190, 3, 64, 129], 3, workspace(num_programs))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [[0, 70, 0, 0], [0], [1, 2, 0, 5]])
def test_rows_without_tokens_give_zeros_and_disturb_no_others(lengths: list[int]) -> None:
    """A request that pads a graph's batch has none, and needs no slot."""
    found, expected = attended(lengths, 4, workspace(4))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found[: 4 * (lengths[0] == 0)].any()


def test_a_workspace_serves_narrower_runs() -> None:
    found, expected = attended([170, 40], 2, workspace(5, max_width=32))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.gpu
def test_one_graph_serves_any_lengths() -> None:
    """Lengths and slots change in place between replays; nothing is planned."""
    width, heads, kv_heads, dim, room = 9, 32, 8, 128, 40_000
    generator = torch.Generator().manual_seed(2)
    keys, values, query = (
        torch.randn(shape, generator=generator).bfloat16().cuda()
        for shape in ((room, kv_heads, dim), (room, kv_heads, dim), (4 * width, heads, dim))
    )
    slots = torch.zeros(room, dtype=torch.int32, device="cuda")
    indptr = torch.zeros(5, dtype=torch.int32, device="cuda")
    given = RunWorkspace.allocate(
        num_heads=heads, num_kv_heads=kv_heads, dim=dim, max_width=width, device="cuda"
    )
    out = torch.empty_like(query)
    tensors, scale = (query, keys, values, slots, indptr), dim**-0.5
    graph = bench.capture(
        lambda: attend_runs(*tensors, width=width, scale=scale, workspace=given, out=out)
    )
    for lengths in ([9, 9, 9, 9], [30_000, 9, 700, 4001], [65, 20_000, 0, 12]):
        slots.copy_(torch.randperm(room, generator=generator))
        indptr.copy_(torch.tensor([0, *lengths]).cumsum(0))
        out.fill_(torch.nan)
        graph.replay()
        in_f32 = (tensor.float() for tensor in tensors[:3])
        expected = reference.attend_runs(*in_f32, slots, indptr, width=width, scale=scale)
        assert relative_error(out, expected) <= ATTENTION_TOLERANCE[torch.bfloat16]


def test_one_workspace_serves_step_after_step() -> None:
    given = workspace(INTERPRETED_PROGRAMS)
    for lengths in ([600], [30, 200, 9], [300, 300]):
        found, expected = attended(lengths, 3, given)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "element_bytes", "shared_kib", "tokens"),
    [
        (128, 2, 228, 64),
        (64, 2, 228, 64),
        (256, 2, 228, 32),
        (128, 4, 228, 32),
        (128, 2, 164, 32),
        (128, 2, 100, 32),
        (256, 4, 100, 16),
    ],
)
def test_a_tile_leaves_shared_memory_for_a_second_program(
    dim: int, element_bytes: int, shared_kib: int, tokens: int
) -> None:
    assert run_block(dim, element_bytes, run_tile_bytes(shared_kib << 10)) == tokens


@pytest.mark.parametrize(
    ("width", "group", "rows"), [(1, 1, 16), (9, 4, 64), (9, 7, 64), (4, 4, 16), (2, 9, 32)]
)
def test_query_rows_are_padded(width: int, group: int, rows: int) -> None:
    assert padded_run(width, group) == rows


@pytest.mark.parametrize(("width", "group"), [(17, 4), (9, 8), (0, 4)])
def test_more_rows_than_a_program_attends_for_are_refused(width: int, group: int) -> None:
    most = 64 // group
    with pytest.raises(ValueError, match=f"are {width * group} rows; .* at most {most} tokens"):
        padded_run(width, group)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": torch.zeros(9, 2, 32)}, "multiple of KV heads"),
        ({"keys": torch.zeros(9, 3, 64), "values": torch.zeros(9, 3, 64)}, "multiple of KV heads"),
        ({"out": torch.zeros(4, 4, 64).half()}, "out must be torch.float32 of shape"),
        ({"slots": torch.arange(9)}, "slots must be int32"),
        ({"indptr": torch.tensor([0, 9])}, "indptr must be int32"),
        ({"width": 3}, "1 requests of 3 query rows are 3, not 4"),
        ({"indptr": torch.zeros(1).int(), "width": 4}, "0 requests of 4 query rows are 0, not 4"),
        (
            dict.fromkeys(("keys", "values"), torch.zeros(9, 2, 96))
            | dict.fromkeys(("query", "out"), torch.zeros(4, 4, 96)),
            "power of two up to 256 dimensions, not 96",
        ),
        ({"workspace": workspace(4, dim=32)}, "at most 16 padded rows of 32 .* not 16 of 64"),
        (
            {"query": torch.zeros(513, 4, 64), "out": torch.zeros(513, 4, 64), "width": 1}
            | {"indptr": torch.zeros(514).int()},
            "1 to 512 requests, not 513",
        ),
        (
            {"query": torch.zeros(9, 4, 64), "out": torch.zeros(9, 4, 64), "width": 9},
            "at most 16 padded rows of 64 .* not 32 of 64",
        ),
    ],
)
def test_tensors_that_would_be_read_out_of_bounds_are_refused(
    changed: dict[str, Any], words: str
) -> None:
    cache, rows = torch.zeros(9, 2, 64), torch.zeros(4, 4, 64)
    arguments = {"query": rows, "keys": cache, "values": cache, "out": rows.clone(), "width": 4}
    arguments |= {"slots": torch.arange(9).int(), "indptr": torch.tensor([0, 9]).int()}
    arguments |= {"workspace": workspace(4), "scale": 1.0}
    with pytest.raises(ValueError, match=words):
        attend_runs(**(arguments | changed))
