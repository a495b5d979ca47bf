"""Which layer is dense, which selects, which reuses: decided once, from the configuration alone."""

from collections.abc import Sequence
from enum import StrEnum

from lim_sglang.config import LimConfig, default_select_layers
from lim_sglang.errors import ConfigError

DEFAULT_DENSE_LAYERS = LimConfig.dense_layers


class Role(StrEnum):
    """A layer's part in one decode step."""

    FULL = "full"
    """Reads the whole KV cache."""
    SELECT = "select"
    """Reads the whole KV cache and picks the token set."""
    REUSE = "reuse"
    """Reads the set of the nearest SELECT layer below."""


def layer_roles(config: LimConfig, depth: int) -> tuple[Role, ...]:
    """The role of each of a model's `depth` layers under `config.policy`.

    Raises:
        ConfigError: a layer list that names a layer which the model does not have.
    """
    select = config.select_layers
    if select is None:
        select = default_select_layers(depth)
    _check_within(select, depth, "select_layers")
    # The default means "the first two layers", also of a model that has only one.
    if config.dense_layers != DEFAULT_DENSE_LAYERS:
        _check_within(config.dense_layers, depth, "dense_layers")
    if config.policy == "full":
        return (Role.FULL,) * depth
    first = min(select, default=depth)
    return tuple(_role(layer, first, select, config.dense_layers) for layer in range(depth))


def _role(layer: int, first: int, select: Sequence[int], dense: Sequence[int]) -> Role:
    if layer in select:
        return Role.SELECT
    if layer < first or layer in dense:
        return Role.FULL
    return Role.REUSE


def _check_within(layers: Sequence[int], depth: int, name: str) -> None:
    beyond = [layer for layer in layers if layer >= depth]
    if beyond:
        raise ConfigError(
            f"{name} names layer {', '.join(map(str, beyond))}, but the model has {depth} layers: "
            f"use indices from 0 to {depth - 1}"
        )
