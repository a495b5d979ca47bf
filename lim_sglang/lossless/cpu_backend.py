"""Attention of drafts and of verified rows on a CPU, through the definitions in torch.

A verified row is a row of a dense decode step, whatever request it belongs to: each attends as in a
dense server, in the same calls.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lim_sglang.compat import KVWriteLoc, TorchNativeAttnBackend
from lim_sglang.kernels.reference import attend_tokens
from lim_sglang.policies.policy import Role


class LosslessCpuBackend(TorchNativeAttnBackend):
    """SGLang's torch backend, dense but in drafts.

    Shapes: R rows of a step, H query heads, G KV heads, D head_dim.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.roles: tuple[Role, ...] = runner.lim_roles
        depth = len(self.roles)
        self._list_of_layer = runner.lim_drafting.list_of_layer(depth)
        self._select_layers = runner.lim_drafting.selecting(depth)
        self.queries: dict[int, Tensor] = {}
        """By SELECT layer, the queries of the last dense step: [R, H, D], a row a token; of a
        prefill, a row a request, its last token's."""
        self._lists: Sequence[Sequence[Tensor]] | None = None

    @contextmanager
    def drafting(self, lists: Sequence[Sequence[Tensor]]) -> Iterator[None]:
        """Let decode steps in this block read lists.

        Args:
            lists: for each SELECT layer and row the slots to read, [n] int64.
        """
        self._lists = lists
        try:
            yield
        finally:
            self._lists = None

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *others: Any, **options: Any
    ) -> Tensor:
        """Run one layer of a prefill; keep the query of each request's last token.

        Args:
            q: [T, H * D], of all new tokens, like the result.
            k, v: [T, G * D].
            layer, batch, others, options: SGLang's.
        """
        output: Tensor = super().forward_extend(q, k, v, layer, batch, *others, **options)
        if layer.layer_id in self._select_layers:
            last = batch.extend_seq_lens.long().cumsum(0) - 1
            self.queries[layer.layer_id] = _by_head(q, layer)[last]
        return output

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *others: Any, **options: Any
    ) -> Tensor:
        """Run one layer: over the lists in a draft, dense in any other step, which keeps queries.

        Args:
            q, k, v, layer, batch, others, options: as for `forward_extend`, of R rows.
        """
        if self._lists is None:
            output: Tensor = super().forward_decode(q, k, v, layer, batch, *others, **options)
            if layer.layer_id in self._select_layers:
                self.queries[layer.layer_id] = _by_head(q, layer)
            return output
        pool = self.token_to_kv_pool
        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        lists = self._lists[self._list_of_layer[layer.layer_id]]
        rows = zip(_by_head(q, layer), lists, strict=True)
        outputs = [attend_tokens(query, keys, values, kept, layer.scaling) for query, kept in rows]
        return torch.stack(outputs).flatten(1)


def _by_head(q: Tensor, layer: Any) -> Tensor:
    return q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
