"""Linear layers: products of few rows by the skinny GEMM, all others by SGLang."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels.decode_layer import most_rows, skinny_linear


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
        found = [(layer, most_rows(layer.weight)) for layer in layers]
        self.layers = [layer for layer, most in found if most]
        for layer, most in found:
            if most:
                layer.quant_method.apply = partial(self._apply, layer.quant_method.apply, most)

    def _apply(
        self,
        original: Callable[..., Tensor],
        most: int,
        layer: Any,
        rows: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        if (
            self.enabled
            and not torch.compiler.is_compiling()
            and rows.ndim == 2
            and 0 < len(rows) <= most
            and rows.dtype == layer.weight.dtype
            and rows.is_contiguous()
        ):
            return skinny_linear(rows, layer.weight, bias)
        return original(layer, rows, bias)
