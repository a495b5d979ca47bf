"""What every benchmark and `lim doctor` ask first."""

import pytest

from lim_sglang.verify_gpu import verify_gpu

pytestmark = pytest.mark.gpu


def test_kernels_are_exact_on_the_shapes_of_the_gate() -> None:
    assert verify_gpu() == []
