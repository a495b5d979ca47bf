"""A model runner with a KV cache and our backend, in plain torch; its fields plant defects."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from lim_sglang import compat
from lim_sglang.bench.model_runner import FilledBatch
from lim_sglang.bench.verify import kept_slots
from lim_sglang.bench.workloads import Point
from lim_sglang.counters import Stats
from lim_sglang.kernels.packed import PackedRows
from lim_sglang.kernels.reference import BudgetSplit, attend_tokens, keep_tokens
from lim_sglang.policies.policy import Role

SLOTS = torch.tensor([[7, 3, 9, 5, 1, 8], [2, 12, 4, 10, 6, 11]])
SHORT = torch.tensor([14, 13, 15])
BATCH = FilledBatch(Point((6, 6)), tuple(SLOTS), None)
MIXED = FilledBatch(Point((6, 6, 3)), (*SLOTS, SHORT), None)
ROLES = (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE)
BUDGET, SHARES = 4, BudgetSplit(sinks=1, selected=2, recent=1)


def layers(k_scale: float | None = None, v_scale: float | None = None) -> list[Any]:
    """Return SGLang's attention layers, with the scales of K and V that a checkpoint may bring."""
    return [
        SimpleNamespace(
            layer_id=n,
            tp_q_head_num=2,
            head_dim=8,
            scaling=0.3,
            k_scale_float=k_scale,
            v_scale_float=v_scale,
        )
        for n in range(len(ROLES))
    ]


class Pool:
    """A KV cache of random K and V: 16 slots, one KV head; fp8 is stored as bytes, as SGLang's."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.store_dtype = torch.uint8 if dtype.itemsize == 1 else dtype
        generator = torch.Generator().manual_seed(0)

        def layers() -> list[torch.Tensor]:
            values = torch.randn(len(ROLES), 16, 1, 8, generator=generator).to(dtype)
            return list(values.view(self.store_dtype))

        self.k_buffer, self.v_buffer = layers(), layers()

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        """Return all slots, [P, G, D]."""
        return self.k_buffer[layer].view(self.dtype)

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        """Return all slots, [P, G, D]."""
        return self.v_buffer[layer].view(self.dtype)


def attend(
    pool: Pool, layer: Any, query: torch.Tensor, slots: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Attend to each row's slots, [B, 16], as FlashInfer, which knows no NaN in fp8."""
    buffers = [
        each.float() if pool.dtype.itemsize > 1 else each.float().nan_to_num(480.0)
        for each in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
    ]
    scale = layer.scaling * (layer.k_scale_float or 1.0)
    rows = [
        attend_tokens(each.view(2, 8), *buffers, mine, scale)
        for each, mine in zip(query, slots, strict=True)
    ]
    return torch.stack(rows).flatten(1) * (layer.v_scale_float or 1.0)


class Backend:
    """Our backend, as far as a benchmark sees it: attention of one layer over the kept slots."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        """Run one layer, [B, H * D]."""
        assert (k, v, save_kv_cache) == (None, None, False)
        assert ROLES[layer.layer_id] is Role.REUSE
        runner = self._runner
        kept = kept_slots(runner, runner.batch.point)
        assert kept is not None
        read = runner.batch.slots if runner.dense_layer else kept
        return attend(runner.token_to_kv_pool, runner.acts_as or layer, q, read)


@dataclass
class Runner:
    """Stands in for `LimModelRunner`; the defaults are sound."""

    logit: float = 0.0
    """Logit of dense backends."""
    chunk: int = 2
    """Rows of the selector."""
    writes: bool = True
    """The step writes slots and scores."""
    kept: Sequence[torch.Tensor] | None = None
    """Kept slots of each row instead of the definition's."""
    reads: Sequence[torch.Tensor] | None = None
    """Slots that the last layer of the graph reads instead; one unused slot for no kept slot."""
    dense_layer: bool = False
    """A REUSE layer by itself reads everything."""
    acts_as: Any = None
    """Layer with whose scales a REUSE layer by itself attends, instead of its own."""
    batch: FilledBatch = BATCH
    cache_dtype: torch.dtype = torch.float32
    lim_roles: tuple[Role, ...] = ROLES
    decode_cuda_graph_runner: Any = None
    model: Any = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.lim_stats = Stats()
        self.lim_kept_slots = torch.zeros(4 * BUDGET, dtype=torch.int32)
        self.lim_policy = SimpleNamespace(
            count_read=lambda length: min(length, BUDGET), budget=BUDGET, block=1
        )
        scores = PackedRows.allocate(
            lists=2, max_rows=self.chunk, longest=9, tokens=99, device="cpu"
        )
        self.lim_selector = SimpleNamespace(
            deciding_scores=scores,
            own_scores=scores,
            budget=BUDGET,
            keep=lambda scores, length: keep_tokens(scores[:, :length], SHARES),
            num_candidates=lambda length: length,
            of_all_ranks=lambda scores: scores,
        )
        self.token_to_kv_pool = Pool(self.cache_dtype)
        self.ours = Backend(self)
        self.attn_backend: Any = None

    def forward(self, _batch: Any) -> Any:
        """Run one step."""
        logits = torch.tensor([[0.0, self.logit]])
        if self.attn_backend is self.ours:
            self.lim_stats.sparse_rows += len(self.batch.point.rows_over(BUDGET))
            logits = self._sparse_step()
        return SimpleNamespace(
            can_run_graph=True, logits_output=SimpleNamespace(next_token_logits=logits)
        )

    def _sparse_step(self) -> torch.Tensor:
        slots, over = self.batch.slots, self.batch.point.rows_over(BUDGET)
        scores = torch.randn(len(slots), 2, 6, generator=torch.Generator().manual_seed(1))
        kept = self.kept or [
            mine[keep_tokens(scores[row, :, : len(mine)], SHARES)] for row, mine in enumerate(slots)
        ]
        if self.writes:
            slots_of_all = torch.cat(list(kept))
            self.lim_kept_slots[: len(slots_of_all)] = slots_of_all
            lengths = self.batch.point.lengths
            for first in range(0, len(slots), self.chunk):
                of_chunk = lengths[first : first + self.chunk]
                ends = [0, *itertools.accumulate(of_chunk)]
                views = self.lim_selector.deciding_scores.rows(ends)
                for row, view in enumerate(views, first):
                    if row in over:
                        view[:, :6] = scores[row]
        query = torch.ones(len(slots), 16)
        layer = compat.attention_layers(self.model)
        return attend(self.token_to_kv_pool, list(layer)[3], query, self.reads or kept)
