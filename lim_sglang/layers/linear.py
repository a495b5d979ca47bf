"""Linear layers: products of few rows by the skinny GEMM, all others by SGLang."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels.decode_layer import MAX_SKINNY_ROWS, skinny_linear, suits


class SkinnyLinears:
    """The linear layers of a model that multiply few rows by `skinny_linear`."""

    def __init__(self, layers: Iterable[Any]) -> None:
        """Take over the layers that suit.

        Args:
            layers: each with a `weight`, and with a `quant_method` of its own, whose `apply` takes
                the layer, rows and a bias.
        """
        self.enabled = True
        """False: all products are SGLang's, also in a CUDA graph that is captured now."""
        self.layers = [layer for layer in layers if suits(layer.weight)]
        for layer in self.layers:
            layer.quant_method.apply = partial(self._apply, layer.quant_method.apply)

    def _apply(
        self, original: Callable[..., Tensor], layer: Any, rows: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if (
            self.enabled
            and not torch.compiler.is_compiling()
            and rows.ndim == 2
            and 0 < len(rows) <= MAX_SKINNY_ROWS
            and rows.dtype == layer.weight.dtype
            and rows.is_contiguous()
        ):
            return skinny_linear(rows, layer.weight, bias)
        return original(layer, rows, bias)
