"""`Policy`: what the layers of a decode step read. Each other file of this folder holds one.

A policy is made of the settings that it heeds and no others, so its fields say which options belong
to it, and their defaults. Clients import this folder: torch and the kernels are imported by the
methods that only a server calls.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lim_sglang.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lim_sglang.kernels.reference import BudgetSplit
    from lim_sglang.kernels.selector import Room, Selector


Lengths = TypeVar("Lengths", int, "NDArray[np.int64]")


class Role(StrEnum):
    """A layer's part in one decode step."""

    FULL = "full"
    """Reads the whole KV cache."""
    SELECT = "select"
    """Reads the whole KV cache and selects the kept tokens."""
    PICK = "pick"
    """Selects tokens and reads only those, in the same layer."""
    REUSE = "reuse"
    """Reads the tokens that the nearest SELECT or PICK layer below has kept; without such a layer
    those that the row's length decides."""


SPARSE = (Role.PICK, Role.REUSE)
"""Roles of layers that read less than everything."""


def window_layer(roles: Sequence[Role]) -> int | None:
    """Return the first layer that reads tokens which lengths alone decide; None if there is none.

    Kept tokens are written there, once a step.
    """
    chooses = Role.SELECT in roles or Role.PICK in roles
    return None if chooses or Role.REUSE not in roles else roles.index(Role.REUSE)


def choosing_layers(roles: Sequence[Role]) -> frozenset[int]:
    """Return the layers in which kept tokens are written: SELECT and PICK layers, or the first that
    reads what lengths alone decide."""
    chosen = {layer for layer, role in enumerate(roles) if role in (Role.SELECT, Role.PICK)}
    window = window_layer(roles)
    return frozenset(chosen if window is None else chosen | {window})


class SharedBy(StrEnum):
    """The heads that read one list of tokens."""

    ALL = "all"
    KV_HEAD = "kv_head"
    """The query heads of one KV head."""
    QUERY_HEAD = "query_head"

    def num_lists(self, heads: int, kv_heads: int) -> int:
        """Return the lists of one row and layer."""
        return {SharedBy.ALL: 1, SharedBy.KV_HEAD: kv_heads, SharedBy.QUERY_HEAD: heads}[self]


SINKS = 4
"""Oldest tokens that are kept by default."""


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of a layer that selects, of one request. H query heads, G KV heads, S tokens."""

    query: "Tensor"
    """[H, D]."""
    keys: "Tensor"
    """[S, G, D], oldest first, the newest included."""
    scale: float
    """Factor on q·k before the softmax."""
    layer: int = 0
    """Index of the layer."""
    cos_sin: "Tensor | None" = None
    """[>= S, D] f32, the model's RoPE, for a policy that `reads_before_rope`."""
    rank: int = 0
    """Rank of tensor parallelism, whose heads these are: a run of the model's, in rank order."""
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Policy of decode: the method, with its settings, that decides what each layer reads."""

    title: ClassVar[str]
    """The method's name in documents."""
    merges_on_gpu: ClassVar[bool] = True
    """True if kernels merge what the ranks of tensor parallelism contribute to one list."""
    may_pick: ClassVar[bool] = False
    """True if layers that settings name may pick, beside those that select."""

    def problems(self) -> list[str]:
        """List everything that is wrong with the settings together; each by itself is right."""
        return []

    def reasons_against_model(self, model_config: Any) -> list[str]:
        """List what keeps these settings from serving a model, but for its layers' number.

        Args:
            model_config: the Hugging Face text configuration.
        """
        return []

    def reasons_against_ranks(self, num_ranks: int, num_kv_heads: int) -> list[str]:
        """List what keeps the policy from being served by several ranks of tensor parallelism.

        Args:
            num_kv_heads: of the whole model.
        """
        return []

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the settings name by a path, for records."""
        return {}

    @abstractmethod
    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return the role of each of a model's `depth` layers.

        Raises:
            ConfigError: a layer list names a layer that the model does not have.
        """


@dataclass(frozen=True, kw_only=True)
class SparsePolicy(Policy):
    """A policy with layers that read no more than a budget.

    Every row within the budget reads everything, in every layer; the newest token is always read.
    """

    budget: int = 2048
    """Tokens that one query head reads in a sparse layer, all that is forced included."""
    dense_layers: tuple[int, ...] = (0, 1)
    """Layers that always read the whole KV cache."""

    block: ClassVar[int] = 1
    """Tokens that are kept or dropped together: those of positions j · block to (j + 1) · block."""
    reads_before_rope: ClassVar[bool] = False
    """True if queries and keys are rotated back, which needs the model's RoPE."""

    @property
    def weighs_by_softmax(self) -> bool:
        """True if softmax weights decide, which know no soft-cap on the logits."""
        return False

    @property
    def num_ranked(self) -> int:
        """Tokens, or blocks of them, that are taken from a ranking, for each list."""
        return self.budget // self.block - 1

    @property
    def sharing(self) -> SharedBy:
        """The heads that read one list."""
        return SharedBy.ALL

    def summary_shape(self, num_kv_heads: int, head_dim: int) -> tuple[int, ...] | None:
        """Return the shape of what is kept of a complete block's keys, in the cache's dtype, for
        each PICK layer; None if nothing is."""
        return None

    def count_read(self, length: Lengths) -> Lengths:
        """Return the tokens that one query head reads in a sparse layer; the newest block may be
        cut by the request's end.

        Args:
            length: tokens of a request, or an array of them.
        """
        read = self.budget - self.block + (length - 1) % self.block + 1
        return length - (length > self.budget) * (length - read)

    def keep(self, inputs: LayerInputs) -> "Tensor":
        """Return the kept positions of a row over the budget, by the definition in torch.

        Returns:
            [lists, `count_read(S)`] int64, ascending.
        """
        return self.keep_by_parts(self.part_of_rank(inputs)[None], inputs.keys.shape[0])

    @property
    def needs_all_heads(self) -> bool:
        """True if a list depends on the heads of all ranks: each contributes a part of it."""
        return self.sharing is SharedBy.ALL

    def part_of_rank(self, inputs: LayerInputs) -> "Tensor":
        """Return what one rank's heads contribute to a row's list, of a shape that is the same on
        all ranks."""
        raise NotImplementedError

    def keep_by_parts(self, parts: "Tensor", length: int) -> "Tensor":
        """Return the kept positions of a row over the budget, the same on all ranks.

        Args:
            parts: [ranks, …], from `part_of_rank`, in rank order.
            length: tokens of the request.
        """
        raise NotImplementedError

    def reasons_against_ranks(self, num_ranks: int, num_kv_heads: int) -> list[str]:
        """Refuse lists of KV heads whose query heads are on several ranks."""
        if self.sharing is not SharedBy.KV_HEAD or num_ranks <= num_kv_heads:
            return []
        return [
            f"the query heads of one KV head share a list, and {num_ranks} ranks have "
            f"{num_kv_heads} KV heads between them: use {num_kv_heads} or less"
        ]

    def allocate(self, room: "Room") -> "Selector":
        """Allocate the memory of the kernels that keep the same positions on a GPU."""
        raise NotImplementedError

    def _check_layers(self, layers: Sequence[int], depth: int, name: str) -> None:
        """Refuse a list with a layer that a model of `depth` layers does not have."""
        beyond = [layer for layer in layers if layer >= depth]
        if beyond:
            raise ConfigError(
                f"{name} names layer {', '.join(map(str, beyond))}, but the model has {depth} "
                f"layers: use indices from 0 to {depth - 1}"
            )

    def _all_but_dense(self, role: Role, depth: int) -> tuple[Role, ...]:
        """Return a role for each layer, FULL for the dense ones."""
        self._check_dense_layers(depth)
        return tuple(Role.FULL if layer in self.dense_layers else role for layer in range(depth))

    def _check_dense_layers(self, depth: int) -> None:
        # The default means "the first two layers", also in a model that has only one.
        if self.dense_layers != type(self).dense_layers:
            self._check_layers(self.dense_layers, depth, "dense_layers")


def sparse_policy(policy: Policy, roles: Sequence[Role]) -> SparsePolicy | None:
    """Return a policy if any of its layers reads less than everything."""
    is_sparse = any(role in SPARSE for role in roles)
    return policy if isinstance(policy, SparsePolicy) and is_sparse else None


@dataclass(frozen=True, kw_only=True)
class SelectingPolicy(SparsePolicy):
    """A policy whose SELECT layers read everything, and keep tokens for the layers above them."""

    select_layers: tuple[int, ...] | None = None
    """Layers that read the whole KV cache and select tokens. None: those of the preset."""
    preset: str | None = None
    """File of `lim calibrate` that names the SELECT layers, unless they are given, and pick layers
    for a policy that `may_pick`. None: the preset of the model's shape."""

    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return FULL below the first layer that selects and in dense layers, REUSE in others."""
        select, pick = self.selecting(depth), self.picking(depth)
        self._check_dense_layers(depth)
        first = min((*select, *pick), default=depth)

        def role(layer: int) -> Role:
            if layer in select:
                return Role.SELECT
            if layer in pick:
                return Role.PICK
            return Role.FULL if layer < first or layer in self.dense_layers else Role.REUSE

        return tuple(map(role, range(depth)))

    def selecting(self, depth: int) -> tuple[int, ...]:
        """Return the layers that select, in a model of `depth` layers."""
        select = default_select_layers(depth) if self.select_layers is None else self.select_layers
        self._check_layers(select, depth, "select_layers")
        return select

    def picking(self, depth: int) -> tuple[int, ...]:
        """Return the layers that select and read only what they select."""
        return ()


@dataclass(frozen=True, kw_only=True)
class SplitBudgetPolicy(SelectingPolicy):
    """A policy whose budget has a share for sinks and newest tokens; the rest is selected."""

    recent_ratio: float
    """Share of the budget kept for the newest tokens and the sinks; at 0 the newest token alone."""
    sinks: int
    """Oldest tokens that are always kept, taken out of that share."""

    def problems(self) -> list[str]:
        """Name sinks for which the share has no room."""
        return sinks_beyond(self.sinks, self.budget * self.recent_ratio)

    @property
    def budget_split(self) -> "BudgetSplit":
        """The parts of the budget."""
        from lim_sglang.kernels.reference import split_budget

        return split_budget(self.budget, self.recent_ratio, self.sinks)

    @property
    def num_ranked(self) -> int:
        """Tokens of a list that are neither sinks nor recent."""
        return self.budget_split.selected


def sinks_beyond(sinks: int, room: float) -> list[str]:
    """Return one reason if sinks take more tokens than there is room for; the default number is
    cut to the room without a word.
    """
    if sinks <= max(room, SINKS):
        return []
    return [
        f"sinks are taken out of the share for the newest tokens, {room:.0f} tokens of the budget "
        f"here: {sinks} do not fit"
    ]


def default_select_layers(num_layers: int) -> tuple[int, ...]:
    """Return the SELECT layers of a model that was never measured: 2, and a third of the depth."""
    return tuple(layer for layer in (2, max(3, round(num_layers / 3))) if layer < num_layers)
