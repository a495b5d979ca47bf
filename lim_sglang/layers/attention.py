"""Attention layers: norms of q and k, RoPE and store of a decode step in one kernel."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lim_sglang.kernels.decode_layer import HeadNorms, norm_rotate_store


class AttentionLayers:
    """The attention layers of a model that prepare decode steps by `norm_rotate_store`."""

    def __init__(self, layers: Iterable[Any], pool: Any, dtype: torch.dtype) -> None:
        """Take over the layers whose RoPE and KV cache the kernel serves.

        Args:
            layers: of `compat.rotary_attention_layers`.
            pool: SGLang's KV cache.
            dtype: of activations.
        """
        self.enabled = True
        """False: all steps are SGLang's, also in a CUDA graph that is captured now."""
        self._pool, self._dtype = pool, dtype
        self.layers = [layer for layer in layers if self._serves(layer)]
        for layer in self.layers:
            layer.forward = partial(self._forward, layer, layer.forward)

    def _serves(self, layer: Any) -> bool:
        keys, rope, dim = self._cache(layer)[0], layer.rotary_emb, layer.head_dim
        angles = getattr(rope, "cos_sin_cache", None)
        return (
            keys.dtype == self._dtype
            and keys.shape[1:] == (layer.num_kv_heads, dim)
            and keys.is_contiguous()
            and dim & (dim - 1) == 0
            and rope.is_neox_style
            and rope.rotary_dim == rope.head_size == dim
            and angles is not None
            and angles.shape[1:] == (dim,)
            and not hasattr(rope, "mrope_section")
            and (_epsilon(layer, "q_norm") == _epsilon(layer, "k_norm"))
        )

    def _cache(self, layer: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._pool.get_kv_buffer(layer.attn.layer_id)
        return keys, values

    def _forward(
        self,
        layer: Any,
        original: Callable[..., Tensor],
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: Any,
    ) -> Tensor:
        if (
            not self.enabled
            or torch.compiler.is_compiling()
            or not forward_batch.forward_mode.is_decode()
        ):
            return original(positions, hidden_states, forward_batch)
        qkv, _ = layer.qkv_proj(hidden_states)
        query = norm_rotate_store(
            qkv,
            _norms(layer),
            layer.rotary_emb.cos_sin_cache,
            positions,
            forward_batch.out_cache_loc,
            *self._cache(layer),
        )
        attended = layer.attn(query, None, None, forward_batch, save_kv_cache=False)
        output: Tensor = layer.o_proj(attended)[0]
        return output


def _norms(layer: Any) -> HeadNorms | None:
    """Return the norms of a layer's heads, whose weights an update may replace."""
    if (epsilon := _epsilon(layer, "q_norm")) is None:
        return None
    return HeadNorms(layer.q_norm.weight, layer.k_norm.weight, epsilon)


def _epsilon(layer: Any, norm: str) -> float | None:
    epsilon: float | None = getattr(getattr(layer, norm, None), "variance_epsilon", None)
    return epsilon
