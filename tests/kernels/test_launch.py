"""How kernels are launched: interpreted or compiled, with which tiles, on which tensors."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from lim_sglang.kernels.full_ranking import _rank_tokens
from lim_sglang.kernels.launch import attend_block, check_int32, check_tensors, interpreted
from tests.kernels.batches import COMPILED_HERE


@COMPILED_HERE
def test_kernels_are_interpreted_on_a_cpu() -> None:
    assert interpreted()
    assert isinstance(_rank_tokens, InterpretedFunction)


@pytest.mark.gpu
def test_kernels_are_compiled_on_a_gpu() -> None:
    assert not interpreted()


@pytest.mark.parametrize(
    ("dim", "group", "cache_bytes", "programs_per_sm", "block"),
    [
        (128, 4, 2, 2, 64),
        (128, 4, 2, 5, 64),
        (128, 4, 2, 5.1, 32),
        (128, 4, 2, 8, 32),
        (128, 4, 2, 8.1, 64),
        (128, 8, 2, 7, 64),
        (128, 4, 1, 7, 64),
        (128, 4, 4, 7, 64),
        (64, 7, 2, 7, 64),
        (64, 7, 2, 2, 128),
        (256, 2, 2, 7, 32),
        (512, 1, 2, 7, 16),
    ],
)
def test_tiles_are_narrow_where_only_so_all_programs_run_at_once(
    dim: int, group: int, cache_bytes: int, programs_per_sm: float, block: int
) -> None:
    assert attend_block(dim, group, cache_bytes, programs_per_sm) == block


def test_tensors_that_a_kernel_would_misread_are_refused() -> None:
    with pytest.raises(ValueError, match="must be on one device"):
        check_tensors(a=torch.zeros(2), b=torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="b must be contiguous in its last dimension"):
        check_tensors(a=torch.zeros(2), b=torch.zeros(2, 4)[:, ::2])
    with pytest.raises(ValueError, match=r"b must be int32, not torch\.int64"):
        check_int32(a=torch.zeros(2).int(), b=torch.zeros(2).long())
