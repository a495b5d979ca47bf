"""Attention of a cycle on a GPU: dense, over lists, or of runs.

The last two plan nothing: a CUDA graph serves any lengths.

Shapes: R rows of a pass, S SELECT layers, K budget, N drafts, H query heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.attention_backend import SECOND_READING
from lim_sglang.kernels.run_attention import RunWorkspace, attend_runs
from lim_sglang.kernels.selector import Room, ScoreSelector
from lim_sglang.kernels.sparse_attention import SplitWorkspace, attend_tokens
from lim_sglang.lossless.passes import KeptQueries, by_head
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.policy import Role

MAX_DRAFTED = 48
"""Most requests of a batch that drafts: as many as SGLang's own speculation runs by default."""


class LosslessGpuBackend(KeptQueries, compat.FlashInferAttnBackend):
    """SGLang's FlashInfer backend, which prefills and runs dense decode steps."""

    score_source = SECOND_READING

    def __init__(self, runner: Any, **options: Any) -> None:
        super().__init__(runner, **options)
        self.roles: tuple[Role, ...] = runner.lim_roles
        self.query_layers = runner.lim_drafting.selecting(len(self.roles))
        self.queries: dict[int, Tensor] = {}


class _CycleBackend(compat.AttentionBackend):
    """Attention of decode rows that writes the new keys and values first."""

    def __init__(self, backend: LosslessGpuBackend) -> None:
        super().__init__()
        self.token_to_kv_pool = backend.token_to_kv_pool
        self.req_to_token_pool = backend.req_to_token_pool

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        """Run one layer.

        Args:
            q: [R, H * D], like the result.
            k, v: [R, KV heads * D].
            layer, batch, save_kv_cache: SGLang's.
        """
        pool = self.token_to_kv_pool
        if save_kv_cache:
            location = compat.KVWriteLoc(batch.out_cache_loc, None)
            pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
        return self.attend(by_head(q, layer).contiguous(), layer).view(len(q), -1)

    def attend(self, query: Tensor, layer: Any) -> Tensor:
        """Attend [R, H, D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class DraftMemory:
    """Lists of slots that drafts read, and the selection's memory."""

    selector: ScoreSelector
    lists: Tensor
    """[S, rows * (K + N)] int32, each row's kept slots and those of its drafts."""
    starts: Tensor
    """[rows + 1] int32, where the lists of each row begin."""
    ends: Tensor
    """[rows] int32, where the lists of each row end, for the draft that runs."""
    longest: int
    """Slots of a row's list at most, K + N."""

    @classmethod
    def allocate(
        cls,
        policy: Lossless,
        most_drafts: int,
        depth: int,
        room: Callable[[int], Room],
        max_requests: int,
    ) -> "DraftMemory":
        """Allocate for batches that draft.

        Args:
            most_drafts: of a cycle.
            depth: layers of the model.
            room: returns the selection's room, given the most rows.
            max_requests: that SGLang runs at once.
        """
        rows = min(MAX_DRAFTED, max_requests)
        selector = policy.allocate(room(rows))
        assert isinstance(selector, ScoreSelector)
        length = policy.budget + most_drafts
        device = selector.scores.values.device
        lists = torch.zeros(
            len(policy.selecting(depth)), rows * length, dtype=torch.int32, device=device
        )
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return cls(selector, lists, starts, starts[:-1].clone(), length)

    @property
    def max_rows(self) -> int:
        """Most requests of a batch that drafts."""
        return len(self.ends)


class DraftBackend(_CycleBackend):
    """Every layer of a draft reads its list."""

    query_layers: Sequence[int] = ()
    """None keeps its queries."""

    def __init__(self, backend: LosslessGpuBackend, memory: DraftMemory, policy: Lossless) -> None:
        super().__init__(backend)
        shape = backend.indices_updater_decode
        self._memory = memory
        self._list_of_layer = policy.list_of_layer(len(backend.roles))
        self._workspace = SplitWorkspace.allocate(
            num_heads=shape.num_qo_heads,
            num_units=shape.num_kv_heads,
            dim=shape.head_dim,
            cache_dtype=shape.data_type,
            device=memory.lists.device,
        )

    def attend(self, query: Tensor, layer: Any) -> Tensor:
        """Attend over the kept tokens and the drafts so far."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        memory, rows = self._memory, len(query)
        return attend_tokens(
            query,
            keys,
            values,
            memory.lists[self._list_of_layer[layer.layer_id]],
            memory.starts[:rows],
            memory.ends[:rows],
            longest=memory.longest,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            workspace=self._workspace,
            out=torch.empty_like(query),
        )


@dataclass(frozen=True)
class RunMemory:
    """Slots of all tokens that a verification reads, and the kernel's memory."""

    slots: Tensor
    """[most tokens] int32, one request behind the other."""
    indptr: Tensor
    """[rows + 1] int32, where each request's begin; behind the last they stay where they are."""
    workspace: RunWorkspace

    @classmethod
    def allocate(
        cls, backend: LosslessGpuBackend, max_rows: int, max_width: int, longest: int
    ) -> "RunMemory":
        """Allocate for batches that draft.

        Args:
            max_rows: requests.
            max_width: tokens of a run.
            longest: tokens of a request, its run included.
        """
        shape, device = backend.indices_updater_decode, backend.kv_last_page_len.device
        return cls(
            torch.zeros(max_rows * longest, dtype=torch.int32, device=device),
            torch.zeros(max_rows + 1, dtype=torch.int32, device=device),
            RunWorkspace.allocate(
                num_heads=shape.num_qo_heads,
                num_kv_heads=shape.num_kv_heads,
                dim=shape.head_dim,
                max_width=max_width,
                device=device,
            ),
        )


class VerifyBackend(KeptQueries, _CycleBackend):
    """Dense attention of w rows a request, each over the tokens up to its own."""

    def __init__(self, backend: LosslessGpuBackend, memory: RunMemory, width: int) -> None:
        super().__init__(backend)
        self.query_layers = backend.query_layers
        self.queries: dict[int, Tensor] = {}
        self._memory, self._width = memory, width

    def attend(self, query: Tensor, layer: Any) -> Tensor:
        """Attend; nothing is planned."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        memory = self._memory
        return attend_runs(
            query,
            keys,
            values,
            memory.slots,
            memory.indptr[: len(query) // self._width + 1],
            width=self._width,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            workspace=memory.workspace,
            out=torch.empty_like(query),
        )
