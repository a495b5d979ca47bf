"""Kernels of a decode layer beside attention."""

import pytest
import torch
from torch import Tensor

from lim_sglang.kernels.decode_layer import MAX_SKINNY_ROWS, most_rows, skinny_linear
from lim_sglang.kernels.launch import MIN_DOT_ROWS
from lim_sglang.kernels.verify_attention import linear_differences, norm_and_rope_differences
from tests.kernels.batches import BF16, DEVICES, F32, FP16

SMALL = [(64, 128), (192, 384)]
LARGE = {
    "qwen3-8b qkv": (6144, 4096),
    "qwen3-8b gate and up": (24576, 4096),
    "qwen3-8b down": (4096, 12288),
    "qwen3-1.7b output": (2048, 2048),
    "coder-0.5b qkv": (1152, 896),
}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("features", "depth"), SMALL)
def test_products_are_the_reference_s(features: int, depth: int, dtype: torch.dtype) -> None:
    assert not linear_differences(features, depth, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", LARGE)
def test_products_are_the_reference_s_on_a_gpu(shape: str, dtype: torch.dtype) -> None:
    assert not linear_differences(*LARGE[shape], dtype, "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    rows, weight = (torch.randn(n, 256).to(device, BF16) for n in (MAX_SKINNY_ROWS, 128))
    for number in (1, 2, 7, 16, 17):
        # The interpreter multiplies by numpy, which adds products of 16 and 32 rows in two orders.
        is_padded_less = device == "cpu" and number <= MIN_DOT_ROWS
        together = skinny_linear(rows[:MIN_DOT_ROWS] if is_padded_less else rows, weight)
        assert torch.equal(skinny_linear(rows[:number], weight), together[:number])


@pytest.mark.gpu
def test_products_follow_one_another_in_a_graph() -> None:
    """Each kernel starts early and waits for the one before, whose result it reads."""
    weights = [(torch.randn(4096, 4096) / 64).to("cuda", BF16) for _ in range(4)]
    rows = torch.randn(8, 4096).to("cuda", BF16)

    def run() -> Tensor:
        values = rows
        for weight in weights * 8:
            values = skinny_linear(values, weight)
        return values

    expected = run().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(50):
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("features", "depth", "dtype", "expected"),
    [
        (6144, 4096, BF16, 32),
        (4096, 12288, FP16, 16),
        (2048, 6144, BF16, 0),  # few programs, each of a deep matrix
        (6144, 4096, F32, 0),
        (576, 576, BF16, 0),
        (128, 2048, BF16, 0),  # a router of experts
        (1000, 4096, BF16, 0),
    ],
)
def test_shapes_are_multiplied_by_so_many_rows(
    features: int, depth: int, dtype: torch.dtype, expected: int
) -> None:
    weight = torch.empty(features, depth, dtype=dtype, device="meta")
    assert most_rows(weight) == expected
    assert most_rows(weight.T) == 0


SHAPES = {
    "Qwen3-8B": (8, 32, 8, 128, BF16),
    "one row": (1, 16, 8, 128, BF16),
    "a rank of four": (5, 8, 2, 128, FP16),
    "narrow heads": (3, 6, 3, 64, FP16),
    "more rows than programs": (300, 4, 1, 32, BF16),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_q_and_k_are_normed_and_rotated_and_k_and_v_stored(shape: str, device: str) -> None:
    assert not norm_and_rope_differences(*SHAPES[shape], device)
