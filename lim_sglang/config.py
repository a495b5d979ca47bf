"""`LimConfig`, the one configuration object: defaults, presets by model, and each layer's role."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from lim_sglang.errors import ConfigError, reasons_that_hold

CONFIG_VAR = "LIM_CONFIG"
"""A `LimConfig` as JSON; the environment carries it to every process that SGLang starts."""
API_KEY_VAR = "LIM_API_KEY"
"""The key that a server asks of its clients and that clients send."""
URL_VAR = "LIM_URL"
"""Addresses of the running servers that clients ask."""
CACHE_VAR = "LIM_CACHE"
"""Folder of converted models; by default one in the user's cache folder."""
SERVER_VAR = "LIM_SERVER"
"""Random name of a server that `lim` starts: of its temporary files, and in its `/server_info`."""
COMMIT_VAR = "LIM_COMMIT"
"""Commit of the code in a copy whose git checkout, if any, is not the code's."""
AUDIT_VAR = "LIM_AUDIT"
"""1 checks every kept set and sparse output on a GPU (`audit.Audit`); slow, and takes memory."""
TRACE_VAR = "LIM_TRACE"
"""Folder for the kept sets of a CPU server as JSON lines (`audit.Trace`); slow."""

POLICIES = ("lessismore", "full")
RANKINGS = ("rank", "mass")


@dataclass(frozen=True)
class LimConfig:
    """Settings of decode's token selection. `budget` is the paper's K, `recent_ratio` its r.

    Source: Yang et al., "Less Is More", arXiv 2508.07101.
    """

    policy: str = "lessismore"
    """`lessismore`, or `full` for dense layers only."""
    budget: int = 2048
    """Tokens that a sparse layer reads: sinks, selected and recent together."""
    recent_ratio: float = 0.25
    """Share of the budget kept for the newest tokens and the sinks."""
    sinks: int = 4
    """Oldest tokens that are always kept, taken out of the recency share."""
    ranking: str = "rank"
    """Order of tokens at a SELECT layer: `rank` is the paper's, where heads take turns; `mass` sums
    the heads' softmax weights, which is not the paper's."""
    dense_layers: tuple[int, ...] = (0, 1)
    """Layers that always read the whole KV cache."""
    select_layers: tuple[int, ...] | None = None
    """Layers that read the whole KV cache and select tokens. None: the preset of the model."""

    def __post_init__(self) -> None:
        for name in ("dense_layers", "select_layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = _problems(self)
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build a configuration from field names and values; a missing field has its default.

        Raises:
            ConfigError: an unknown key (the message lists the known ones) or a bad value.
        """
        check_keys(settings)
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build a configuration from a JSON object; see `from_mapping`."""
        return cls.from_mapping(parse_settings(text, "the LessIsMore configuration"))

    def to_json(self) -> str:
        """Return all fields as one line of JSON that `from_json` reads."""
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
    """Parse a JSON object with some of `LimConfig`'s fields.

    Args:
        source: the name of the text's origin, for errors.
    """
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
    """Merge three sources key by key: flags over `--lim-config` over `LIM_CONFIG`.

    Args:
        environment: the value of `LIM_CONFIG`.
        config_json: the value of `--lim-config`.
        flags: fields that have a flag of their own.
    """
    settings: dict[str, Any] = {}
    if environment:
        settings |= parse_settings(environment, f"the environment variable {CONFIG_VAR}")
    if config_json is not None:
        settings |= parse_settings(config_json, "--lim-config")
    return LimConfig.from_mapping(settings | dict(flags))


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer indices separated by commas; the empty text is the empty list."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ConfigError(
            f"layers must be integers separated by commas, such as 2,12; got {text!r}"
        ) from None


def _problems(config: LimConfig) -> list[str]:
    """List everything that is wrong with a configuration's values."""
    layer_lists = {"dense_layers": config.dense_layers}
    if config.select_layers is not None:
        layer_lists["select_layers"] = config.select_layers
    return reasons_that_hold(
        (
            config.policy not in POLICIES,
            f"policy must be one of {', '.join(POLICIES)}, not {config.policy!r}",
        ),
        (
            config.ranking not in RANKINGS,
            f"ranking must be one of {', '.join(RANKINGS)}, not {config.ranking!r}",
        ),
        (
            not (_is_int(config.budget) and config.budget >= 1),
            f"budget must be an integer of at least 1 token, not {config.budget!r}",
        ),
        (
            not (_is_number(config.recent_ratio) and 0 <= config.recent_ratio <= 1),
            f"recent_ratio must be a number from 0 to 1, not {config.recent_ratio!r}",
        ),
        (
            not (_is_int(config.sinks) and config.sinks >= 0),
            f"sinks must be an integer of at least 0 tokens, not {config.sinks!r}",
        ),
        *(
            (
                not _is_layer_list(layers),
                f"{name} must be a sorted list of different layer indices from 0, not {layers!r}",
            )
            for name, layers in layer_lists.items()
        ),
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


@dataclass(frozen=True)
class ModelShape:
    """Key of a preset: identifies an architecture also in a local folder without a hub name."""

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
    """Return the SELECT layers of a model that was never measured: 2, and a third of the depth."""
    return tuple(layer for layer in (2, max(3, round(num_layers / 3))) if layer < num_layers)


def with_preset(config: LimConfig, shape: ModelShape) -> LimConfig:
    """Fill in `select_layers` if the user named none."""
    if config.select_layers is not None:
        return config
    layers = PRESETS.get(shape, default_select_layers(shape.num_layers))
    return replace(config, select_layers=layers)


class Role(StrEnum):
    """A layer's part in one decode step."""

    FULL = "full"
    """Reads the whole KV cache."""
    SELECT = "select"
    """Reads the whole KV cache and selects the kept tokens."""
    REUSE = "reuse"
    """Reads the tokens that the nearest SELECT layer below has kept."""


def layer_roles(config: LimConfig, depth: int) -> tuple[Role, ...]:
    """Return the role of each of a model's `depth` layers under `config.policy`.

    Raises:
        ConfigError: a layer list names a layer that the model does not have.
    """
    select = config.select_layers
    if select is None:
        select = default_select_layers(depth)
    _check_within(select, depth, "select_layers")
    # The default means "the first two layers", also in a model that has only one.
    if config.dense_layers != LimConfig.dense_layers:
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


NAME_KEY = "lim_server"
"""Key of `/server_info` that holds the name of a server that `lim` started."""


def lim_state(server_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return LessIsMore's part of a server's `/server_info`; None if another backend decodes."""
    live: dict[str, Any] | None = _first_state(server_info).get("lim")
    return live


def server_name(server_info: Mapping[str, Any]) -> str | None:
    """Return the random name that a `lim` command gave to a server; None if it started another."""
    name: str | None = _first_state(server_info).get(NAME_KEY)
    return name


def _first_state(server_info: Mapping[str, Any]) -> Mapping[str, Any]:
    states = server_info.get("internal_states") or [{}]
    first: Mapping[str, Any] = states[0]
    return first
