"""Attention layers whose decode steps norm, rotate and store by one kernel."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lim_sglang.kernels import reference
from lim_sglang.layers.attention import AttentionLayers
from tests.kernels.batches import BF16, COMPILED_HERE, FP16

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 32, 48


class Pool:
    """A KV cache of one layer."""

    def __init__(self, dtype: torch.dtype = FP16, dim: int = DIM) -> None:
        self.buffers = tuple(torch.zeros(9, KV_HEADS, dim, dtype=dtype) for _ in range(2))

    def get_kv_buffer(self, layer: int) -> tuple[Tensor, ...]:
        """Return keys and values."""
        assert layer == 7
        return self.buffers


class Attention:
    """An attention layer as SGLang has them; it attends by returning its queries."""

    def __init__(self, *, has_norms: bool = True, **rope: Any) -> None:
        angles = torch.randn(20, DIM // 2)
        self.weight = torch.randn((HEADS + 2 * KV_HEADS) * DIM, HIDDEN).to(FP16)
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, KV_HEADS, DIM
        if has_norms:
            self.q_norm, self.k_norm = (
                SimpleNamespace(weight=torch.randn(DIM).to(FP16), variance_epsilon=1e-6)
                for _ in range(2)
            )
        self.rotary_emb = SimpleNamespace(
            **{
                "is_neox_style": True,
                "rotary_dim": DIM,
                "head_size": DIM,
                "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], -1),
            }
            | rope
        )
        self.attn = Queries()
        self.own_steps = 0

    def qkv_proj(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Project to q, k and v."""
        return hidden @ self.weight.T, None

    def o_proj(self, attended: Tensor) -> tuple[Tensor, None]:
        """Return what attention returned, doubled."""
        return 2 * attended, None

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        """Run as SGLang does."""
        self.own_steps += 1
        return hidden_states


class Queries:
    """SGLang's attention, which finds k and v in the cache."""

    layer_id = 7

    def __call__(self, q: Tensor, k: None, v: None, batch: Any, *, save_kv_cache: bool) -> Tensor:
        assert k is v is None
        assert not save_kv_cache
        return q


def batch(*, decodes: bool = True) -> Any:
    """Return a batch of three new tokens."""
    mode = SimpleNamespace(is_decode=lambda: decodes)
    return SimpleNamespace(forward_mode=mode, out_cache_loc=torch.tensor([5, 1, 8]))


@COMPILED_HERE
@pytest.mark.parametrize("has_norms", [True, False])
def test_a_decode_step_attends_with_q_and_finds_k_and_v_in_the_cache(*, has_norms: bool) -> None:
    layer, pool = Attention(has_norms=has_norms), Pool()
    layers = AttentionLayers([layer], pool, FP16)
    hidden, positions = torch.randn(3, HIDDEN).to(FP16), torch.tensor([0, 19, 4])
    output = layer.forward(positions=positions, hidden_states=hidden, forward_batch=batch())
    assert (len(layers.layers), layer.own_steps) == (1, 0)

    heads = (hidden @ layer.weight.T).view(3, -1, DIM)
    q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
    of_rows = layer.rotary_emb.cos_sin_cache[positions]
    expected = (
        reference.norm_and_rotate(
            rows, getattr(layer, norm).weight if has_norms else None, 1e-6, of_rows
        )
        for rows, norm in ((q, "q_norm"), (k, "k_norm"))
    )
    keys, values = (buffer[[5, 1, 8]] for buffer in pool.buffers)
    queries = output.view(3, HEADS, DIM) / 2
    for found, wanted in zip((queries, keys), expected, strict=True):
        torch.testing.assert_close(found, wanted.to(FP16))
    assert torch.equal(values, v)
    assert all(buffer[[0, 2, 3, 4, 6, 7]].eq(0).all() for buffer in pool.buffers)


def test_prefills_and_disabled_layers_run_as_sglang_does() -> None:
    layer = Attention()
    layers, hidden = AttentionLayers([layer], Pool(), FP16), torch.randn(3, HIDDEN)
    arguments = {"positions": torch.arange(3), "hidden_states": hidden}
    assert layer.forward(**arguments, forward_batch=batch(decodes=False)) is hidden
    layers.enabled = False
    assert layer.forward(**arguments, forward_batch=batch()) is hidden
    assert layer.own_steps == 2


@pytest.mark.parametrize(
    ("layer", "pool"),
    [
        (Attention(), Pool(torch.float8_e5m2)),
        (Attention(), Pool(BF16)),
        (Attention(is_neox_style=False), Pool()),
        (Attention(rotary_dim=DIM // 2), Pool()),
        (Attention(mrope_section=[8, 4, 4]), Pool()),
        (Attention(cos_sin_cache=None), Pool()),
        (Attention(), Pool(dim=2 * DIM)),
    ],
    ids=[
        "fp8 cache",
        "other dtype",
        "interleaved",
        "partial",
        "of images",
        "no table",
        "other heads",
    ],
)
def test_other_layers_are_left_alone(layer: Attention, pool: Pool) -> None:
    assert not AttentionLayers([layer], pool, FP16).layers
    assert layer.forward.__func__ is Attention.forward  # type: ignore[attr-defined]
