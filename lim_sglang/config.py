"""`LimConfig`, the one configuration object: its defaults, the presets measured by model, and the
role that each layer gets from it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from lim_sglang.errors import ConfigError

ENV_VAR = "LIM_CONFIG"
"""Environment variable with a `LimConfig` as JSON; it reaches every process that SGLang starts."""

POLICIES = ("lessismore", "full")
RANKINGS = ("rank", "mass")


@dataclass(frozen=True)
class LimConfig:
    """How decode chooses what to read. `budget` is the paper's K, `recent_ratio` its r.

    Source: Yang et al., "Less Is More", arXiv 2508.07101.
    """

    policy: str = "lessismore"
    budget: int = 2048
    """Tokens that a sparse layer reads: sinks, selected and recent together."""
    recent_ratio: float = 0.25
    """Share of the budget kept for the newest tokens and the sinks."""
    sinks: int = 4
    """Oldest tokens that are always kept, taken out of the recency share."""
    ranking: str = "rank"
    """How a SELECT layer orders tokens: `rank` is the paper's, heads in turns; `mass` adds up what
    the heads' softmax gives each token, which is not the paper's."""
    dense_layers: tuple[int, ...] = (0, 1)
    """Layers that always read everything."""
    select_layers: tuple[int, ...] | None = None
    """Layers that read everything and pick the set. None: the preset of the model's shape."""

    def __post_init__(self) -> None:
        for name in ("dense_layers", "select_layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = [p for p in _problems(self) if p]
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build from a mapping of field names; a missing field has its default.

        Raises:
            ConfigError: an unknown key (the message lists the known ones) or a bad value.
        """
        check_keys(settings)
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build from a JSON object; see `from_mapping`."""
        return cls.from_mapping(parse_settings(text, "the LessIsMore configuration"))

    def to_json(self) -> str:
        """The whole configuration as one line of JSON that `from_json` reads back."""
        return json.dumps(asdict(self))


def check_keys(settings: Mapping[str, Any]) -> None:
    """Refuse keys that are no field of `LimConfig`."""
    known = [field.name for field in fields(LimConfig)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown LessIsMore setting {', '.join(map(repr, unknown))}; "
            f"known settings: {', '.join(known)}"
        )


def parse_settings(text: str, source: str) -> dict[str, Any]:
    """Read a JSON object with some of `LimConfig`'s fields; `source` names it in errors."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f'{source} is not JSON ({error}); write an object such as {{"budget": 2048}}'
        ) from None
    if not isinstance(settings, dict):
        raise ConfigError(f'{source} must be a JSON object such as {{"budget": 2048}}, not {text}')
    check_keys(settings)
    return settings


def resolve_settings(
    environment: str | None, config_json: str | None, flags: Mapping[str, Any]
) -> LimConfig:
    """Merge the three sources key by key: a flag beats `--lim-config`, which beats `LIM_CONFIG`."""
    settings: dict[str, Any] = {}
    if environment:
        settings |= parse_settings(environment, f"the environment variable {ENV_VAR}")
    if config_json is not None:
        settings |= parse_settings(config_json, "--lim-config")
    settings |= flags
    return LimConfig.from_mapping(settings)


def parse_layers(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of layer indices; the empty text is the empty list."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ConfigError(
            f"layers must be integers separated by commas, such as 2,12; got {text!r}"
        ) from None


@dataclass(frozen=True)
class ModelShape:
    """What identifies an architecture when the model is a local folder without a hub name."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int


PRESETS: Mapping[ModelShape, tuple[int, ...]] = {
    # Qwen3-8B, Qwen3-14B, Qwen3-4B, Llama-3.1-8B and DeepSeek-R1-Distill-Llama-8B: the paper.
    ModelShape("qwen3", 36, 4096, 32): (2, 12),
    ModelShape("qwen3", 40, 5120, 40): (2, 12),
    ModelShape("qwen3", 36, 2560, 32): (2, 20),
    ModelShape("llama", 32, 4096, 32): (2, 12),
    # Qwen2.5-Coder-1.5B, Qwen2.5-Coder-0.5B, SmolLM2-135M: chosen by KL divergence, docs/design.md.
    ModelShape("qwen2", 28, 1536, 12): (2, 12),
    ModelShape("qwen2", 24, 896, 14): (2, 9),
    ModelShape("llama", 30, 576, 9): (2, 17),
}
"""SELECT layers that were measured, by model shape."""


def default_select_layers(num_layers: int) -> tuple[int, ...]:
    """SELECT layers for a model that nobody has measured."""
    return tuple(layer for layer in (2, max(3, round(num_layers / 3))) if layer < num_layers)


def with_preset(config: LimConfig, shape: ModelShape) -> LimConfig:
    """Fill in `select_layers` where the user named none."""
    if config.select_layers is not None:
        return config
    layers = PRESETS.get(shape, default_select_layers(shape.num_layers))
    return replace(config, select_layers=layers)


def _problems(config: LimConfig) -> list[str | None]:
    """What is wrong with each field, None where nothing is."""
    return [
        _unless(
            config.policy in POLICIES,
            f"policy must be one of {', '.join(POLICIES)}, not {config.policy!r}",
        ),
        _unless(
            config.ranking in RANKINGS,
            f"ranking must be one of {', '.join(RANKINGS)}, not {config.ranking!r}",
        ),
        _unless(
            _is_int(config.budget) and config.budget >= 1,
            f"budget must be an integer of at least 1 token, not {config.budget!r}",
        ),
        _unless(
            _is_number(config.recent_ratio) and 0 <= config.recent_ratio <= 1,
            f"recent_ratio must be a number from 0 to 1, not {config.recent_ratio!r}",
        ),
        _unless(
            _is_int(config.sinks) and config.sinks >= 0,
            f"sinks must be an integer of at least 0 tokens, not {config.sinks!r}",
        ),
        _unless(_is_layer_list(config.dense_layers), _layers_wanted("dense_layers", config)),
        _unless(
            config.select_layers is None or _is_layer_list(config.select_layers),
            _layers_wanted("select_layers", config),
        ),
    ]


def _unless(holds: bool, problem: str) -> str | None:
    return None if holds else problem


def _layers_wanted(name: str, config: LimConfig) -> str:
    return (
        f"{name} must be a sorted list of different layer indices from 0, "
        f"not {getattr(config, name)!r}"
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_layer_list(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and all(_is_int(layer) and layer >= 0 for layer in value)
        and list(value) == sorted(set(value))
    )


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
