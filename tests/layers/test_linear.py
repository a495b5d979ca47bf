"""Linear layers that multiply few rows by our kernel."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lim_sglang.kernels.decode_layer import MAX_SKINNY_ROWS, skinny_linear
from lim_sglang.layers import linear
from lim_sglang.layers.linear import SkinnyLinears
from tests.kernels.batches import BF16, COMPILED_HERE


class Layer:
    """A linear layer as SGLang has them."""

    def __init__(self, features: int, depth: int, dtype: torch.dtype = BF16) -> None:
        self.weight = torch.randn(features, depth).to(dtype)
        self.quant_method: Any = SimpleNamespace(apply=self.multiply)
        self.own_products = 0

    def multiply(self, layer: "Layer", rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply as torch does."""
        self.own_products += 1
        return functional.linear(rows, layer.weight, bias)

    def __call__(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = self.quant_method.apply(self, rows, bias)
        return found


@pytest.mark.parametrize(
    "rows",
    [
        torch.randn(MAX_SKINNY_ROWS + 1, 128).to(BF16),
        torch.randn(0, 128).to(BF16),
        torch.randn(2, 2, 128).to(BF16),
        torch.randn(128, 4).to(BF16).T,
    ],
    ids=["too many", "none", "of three dimensions", "transposed"],
)
def test_other_rows_are_multiplied_as_before(rows: Tensor) -> None:
    layer = Layer(512, 128)
    linears = SkinnyLinears([layer])
    assert torch.equal(layer(rows), functional.linear(rows, layer.weight))
    assert (layer.own_products, len(linears.layers)) == (1, 1)


@COMPILED_HERE
def test_layers_multiply_few_rows_by_the_kernel_while_it_is_enabled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def count(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(len(rows))
        return skinny_linear(rows, weight, bias)

    monkeypatch.setattr(linear, "skinny_linear", count)
    layer, rows, bias = Layer(512, 128), torch.randn(3, 128).to(BF16), torch.randn(512).to(BF16)
    linears = SkinnyLinears([layer])
    expected = functional.linear(rows, layer.weight, bias)
    torch.testing.assert_close(layer(rows, bias), expected)
    assert (calls, layer.own_products) == ([3], 0)
    linears.enabled = False
    assert torch.equal(layer(rows, bias), expected)
    assert (calls, layer.own_products) == ([3], 1)
