"""`LimConfig`, the one configuration object: what options and JSON say, and presets by model."""

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from lim_sglang.errors import ConfigError
from lim_sglang.policies import POLICIES
from lim_sglang.policies.lessismore import RANKINGS
from lim_sglang.policies.lossless import AUTO, MAX_DRAFT_TOKENS
from lim_sglang.policies.policy import Policy, SharedBy, default_select_layers

BACKEND = "lim"
"""The name of the attention backend and of the coupled sampler."""
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
"""Folder for the kept sets of a CPU server as JSON lines (`audit.KeptSets`); slow."""
LAYER_KERNELS_VAR = "LIM_LAYER_KERNELS"
"""0 leaves all of a decode layer but attention to SGLang's kernels (`lim_sglang/layers/`)."""
ALLOW_VAR = "LIM_ALLOW_SGLANG"
"""The one other release of SGLang that is let through, for a maintainer who tries it."""
CHECKED_MARK = "_lim_checked"
"""Attribute of SGLang's `ServerArgs`: True once our checks of a start ran and found nothing."""


@dataclass(frozen=True)
class LimConfig:
    """Settings of what decode reads, flat as options and JSON give them.

    A setting that its policy does not heed is None, and giving one is an error; one that the policy
    heeds has the policy's default until it is given. What each means is said by the policy's own
    class (`lim_sglang/policies/`).
    """

    policy: str = "lessismore"
    """A name of `POLICIES`; `full` for dense layers only."""
    budget: int | None = None
    recent_ratio: float | None = None
    sinks: int | None = None
    ranking: str | None = None
    shared_by: str | None = None
    gate: str | None = None
    dense_layers: tuple[int, ...] | None = None
    select_layers: tuple[int, ...] | None = None
    """None, under a policy that selects: those of the preset; never given beside one."""
    pick_layers: tuple[int, ...] | None = None
    """None, under a policy that picks: those of the preset, if it has any."""
    preset: str | None = None
    """File of `lim calibrate`; None: the preset of the model's shape."""
    draft_tokens: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("dense_layers", "select_layers", "pick_layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if problems := _problems(self):
            raise ConfigError("; ".join(problems))
        for name, default in _defaults(self.policy).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def make_policy(self) -> Policy:
        """Return the policy with these settings."""
        return POLICIES[self.policy](**{n: getattr(self, n) for n in _defaults(self.policy)})

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

    def settings(self) -> dict[str, Any]:
        """Return the policy's name and the settings that it heeds, with their values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_json(self) -> str:
        """Return the settings as one line of JSON that `from_json` reads."""
        return json.dumps(self.settings())


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


def _defaults(policy: str) -> dict[str, Any]:
    """Return the settings that a policy heeds, with its defaults."""
    return {field.name: field.default for field in fields(POLICIES[policy])}


def default_of(name: str, policy: str = LimConfig.policy) -> Any:
    """Return the default of a setting under a policy."""
    return _defaults(policy)[name]


def _problems(config: LimConfig) -> list[str]:
    """List everything that is wrong with a configuration's values, by themselves and together."""
    given = config.settings()
    given.pop("policy", None)
    policy = config.policy
    wrong = [name for name, value in given.items() if not CHECKS[name].accepts(value)]
    problems = [f"{name} must be {CHECKS[name].expected}, not {given[name]!r}" for name in wrong]
    if not isinstance(policy, str) or policy not in POLICIES:
        return [f"policy must be one of {', '.join(POLICIES)}, not {policy!r}", *problems]
    heeded = _defaults(policy)
    if ignored := [name for name in given if name not in heeded]:
        known = ", ".join(heeded) or "no settings"
        problems.append(f"policy {policy} does not heed {', '.join(ignored)}: it heeds {known}")
    if None not in (config.preset, config.select_layers):
        problems.append(
            "select_layers and preset both say which layers select: name layers or a preset, not "
            "both"
        )
    if not wrong:
        settings = {name: given.get(name, default) for name, default in heeded.items()}
        problems += POLICIES[policy](**settings).problems()
    return problems


@dataclass(frozen=True)
class Check:
    """The values that a setting may have."""

    accepts: Callable[[Any], bool]
    expected: str


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


_LAYERS = Check(_is_layer_list, "a sorted list of different layer indices from 0")
CHECKS: Mapping[str, Check] = {
    "budget": Check(lambda v: _is_int(v) and v >= 1, "an integer of at least 1 token"),
    "recent_ratio": Check(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "sinks": Check(lambda v: _is_int(v) and v >= 0, "an integer of at least 0 tokens"),
    "ranking": Check(lambda v: v in RANKINGS, f"one of {', '.join(RANKINGS)}"),
    "shared_by": Check(lambda v: v in list(SharedBy), f"one of {', '.join(SharedBy)}"),
    "gate": Check(lambda v: isinstance(v, str) and v != "", "the folder of a trained gate"),
    "preset": Check(lambda v: isinstance(v, str) and v != "", "a file that lim calibrate wrote"),
    "draft_tokens": Check(
        lambda v: v == AUTO or (_is_int(v) and 1 <= v <= MAX_DRAFT_TOKENS),
        f"{AUTO} or an integer from 1 to {MAX_DRAFT_TOKENS}",
    ),
    "dense_layers": _LAYERS,
    "select_layers": _LAYERS,
    "pick_layers": _LAYERS,
}


@dataclass(frozen=True)
class ModelShape:
    """Key of a preset: identifies an architecture also in a local folder without a hub name."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int

    def __str__(self) -> str:
        return (
            f"{self.model_type}, {self.num_layers} layers of {self.hidden_size} dimensions and "
            f"{self.num_heads} heads"
        )


@dataclass(frozen=True)
class Preset:
    """SELECT layers and pick layers, and the model that they were measured on."""

    layers: tuple[int, ...]
    model: str
    vocab_size: int | None
    """None: not known, as for the next two."""
    rope_theta: float | None
    fingerprint: str | None = None
    """`models.weights_fingerprint`; None: not known, so that weights cannot be compared."""
    pick_layers: tuple[int, ...] = ()

    def differences(self, traits: Mapping[str, Any]) -> list[str]:
        """List the traits in which a model of the same shape differs from the measured one.

        Args:
            traits: some of `vocab_size`, `rope_theta` and `fingerprint`; None: not known.
        """
        found = [
            f"{name.replace('_', ' ')} {traits[name]:,.0f} instead of {getattr(self, name):,.0f}"
            for name in ("vocab_size", "rope_theta")
            if None not in (traits.get(name), getattr(self, name))
            and traits[name] != getattr(self, name)
        ]
        known = self.fingerprint and traits.get("fingerprint")
        return [*found, *(["other weights"] if known and known != self.fingerprint else [])]


PRESETS: Mapping[ModelShape, Preset] = {
    # From the paper, arXiv 2508.07101. A shape is also that of other models, such as
    # DeepSeek-R1-Distill-Llama-8B, which the paper measured, too, with the same layers.
    ModelShape("qwen3", 36, 4096, 32): Preset((2, 12), "Qwen3-8B", 151936, 1e6),
    ModelShape("qwen3", 40, 5120, 40): Preset((2, 12), "Qwen3-14B", 151936, 1e6),
    ModelShape("qwen3", 36, 2560, 32): Preset((2, 20), "Qwen3-4B", 151936, 1e6),
    ModelShape("llama", 32, 4096, 32): Preset((2, 12), "Llama-3.1-8B", 128256, 5e5),
    # Chosen by KL divergence, docs/design.md.
    ModelShape("qwen2", 28, 1536, 12): Preset((2, 12), "Qwen2.5-Coder-1.5B", 151936, 1e6),
    ModelShape("qwen2", 24, 896, 14): Preset((2, 9), "Qwen2.5-Coder-0.5B", 151936, 1e6),
    ModelShape("llama", 30, 576, 9): Preset(
        (2, 17),
        "SmolLM2-135M-Instruct",
        49152,
        1e5,
        "59400d414e6fbe51c23c559ca6b8a4c1ca7dfeec4a8de5c0da3197c288fccf69",  # from its GGUF file
    ),
}
"""SELECT layers that were measured, by model shape: a local folder has no hub name."""


def read_preset(name: str) -> tuple[ModelShape, Preset]:
    """Read the shape and the preset in a file of `lim calibrate`; its other keys are evidence.

    Raises:
        ConfigError: the file cannot be read, is no preset, a layer has two roles in it, or no layer
            would read the sets.
    """
    try:
        found = json.loads(Path(os.path.expanduser(name)).read_bytes())
        found = {"pick_layers": (), **found}  # files of older versions have none
        shape = ModelShape(**found["shape"])
        preset = Preset(**{field.name: found[field.name] for field in fields(Preset)})
        layers, pick = tuple(preset.layers), tuple(preset.pick_layers)
        preset = replace(preset, layers=layers, pick_layers=pick)
        if not _is_preset(shape, preset):
            raise ValueError("a value is of another type")
    except OSError as error:
        raise ConfigError(
            f"the preset {name} cannot be read ({error.strerror}): name a file that lim calibrate "
            "wrote"
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError):
        keys = ", ".join(["shape", *(field.name for field in fields(Preset))])
        raise ConfigError(
            f"the preset {name} is damaged: expected is a JSON object with {keys}; lim calibrate "
            "MODEL writes one"
        ) from None
    if set(range(min(preset.layers), shape.num_layers)) <= {*preset.layers}:
        raise ConfigError(
            f"the preset {name} has SELECT layers {', '.join(map(str, preset.layers))} of "
            f"{shape.num_layers}, and no layer above to read their sets: name a preset that "
            "lim calibrate wrote"
        )
    if twice := sorted({*preset.layers} & {*preset.pick_layers}):
        raise ConfigError(
            f"the preset {name} has {', '.join(map(str, twice))} as SELECT and as pick layers: "
            "name a preset that lim calibrate wrote"
        )
    return shape, preset


def _is_preset(shape: ModelShape, preset: Preset) -> bool:
    """Return True if all values that a file gave are of their types."""
    numbers = (preset.vocab_size, preset.rope_theta)
    return (
        all(isinstance(text, str) for text in (shape.model_type, preset.model))
        and all(map(_is_int, (shape.num_layers, shape.hidden_size, shape.num_heads)))
        and _is_layer_list(preset.layers)
        and len(preset.layers) > 0
        and _is_layer_list(preset.pick_layers)
        and all(number is None or _is_number(number) for number in numbers)
        and isinstance(preset.fingerprint, str | None)
    )


def find_preset(config: LimConfig, shape: ModelShape) -> Preset | None:
    """Return the preset of the file that the settings name, else that of the shape; None if no
    model of the shape was measured.

    Raises:
        ConfigError: the file cannot be read, is no preset, or is of a model of another shape.
    """
    if config.preset is None:
        return PRESETS.get(shape)
    measured, preset = read_preset(config.preset)
    if measured != shape:
        raise ConfigError(
            f"the preset {config.preset} was measured on {preset.model} ({measured}), but the "
            f"model is {shape}: name a preset of this model, which lim calibrate writes"
        )
    return preset


def with_preset(config: LimConfig, shape: ModelShape) -> LimConfig:
    """Put `select_layers` in the place of a preset if the policy has SELECT layers and the user
    named none, and the preset's pick layers beside them, if the policy has any and the user named
    none.

    Raises:
        ConfigError: as `find_preset`, or a pick layer is dense.
    """
    if config.select_layers is not None or "select_layers" not in _defaults(config.policy):
        return config
    preset = find_preset(config, shape)
    layers = preset.layers if preset else default_select_layers(shape.num_layers)
    pick = config.pick_layers
    if preset and preset.pick_layers and pick is None and config.make_policy().may_pick:
        pick = preset.pick_layers
        if dense := sorted({*pick} & {*(config.dense_layers or ())}):
            raise ConfigError(
                f"the preset of {preset.model} has the pick layers {', '.join(map(str, dense))}, "
                "which dense_layers names: name pick_layers, too, without them"
            )
    return replace(config, select_layers=layers, pick_layers=pick, preset=None)


PROGRAM_NAMES = (
    *("single", "majority", "adaptive", "early_stop", "short", "confidence", "budget"),
)
"""Programs that vote; a server knows them by name alone."""
SIMILAR, VERY_SIMILAR = 0.8, 0.9
"""Similarity (`difflib`, 0 to 1) from which a name before `@` or `?`, and a name alone, are a
misspelt program: `majorty` has 0.93, `adapter` 0.8."""
_MAX_LETTERS = 40
"""Letters of a name that are compared, a limit of the time; no longer name is like a program's."""


def is_like_a_program(name: str, programs: Iterable[str], *, is_alone: bool) -> bool:
    """Return True for `majority`, `majorty`, `majority-3` and `majority:3`: the letters are a
    program's.

    Args:
        name: without the path of a provider.
        programs: the known ones.
        is_alone: neither samples nor options follow the name.
    """
    letters = re.sub(r"[^a-z]", "", name.casefold())[:_MAX_LETTERS]
    known = [program.replace("_", "") for program in programs]
    cutoff = VERY_SIMILAR if is_alone else SIMILAR
    return bool(difflib.get_close_matches(letters, known, n=1, cutoff=cutoff))


NAME_KEY = "lim_server"
"""Key of `/server_info` that holds the name of a server that `lim` started."""


_NO_COUNT = ("draft_tokens", "config", "preset", "sampling_defaults")
"""Keys of LessIsMore's state that hold numbers which are settings."""


def lim_state(server_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return LessIsMore's part of a server's `/server_info`, of all its workers added up; None if
    another backend decodes in any of them.
    """
    states = [state.get("lim") for state in server_info.get("internal_states") or [{}]]
    live = [state for state in states if state is not None]
    return add_up(live) if len(live) == len(states) else None


def add_up(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of several workers as that of one server.

    Counters are added, key by key where a counter has several; what is true of one is true only if
    it is true of all; all else is the first one's.
    """
    total = dict(states[0])
    for name in total.keys() - set(_NO_COUNT):
        values = [state.get(name) for state in states]
        if all(isinstance(value, bool) for value in values):
            total[name] = all(values)
        elif all(isinstance(value, int) for value in values):
            total[name] = sum(values)
        elif maps := [value for value in values if isinstance(value, Mapping)]:
            keys = dict.fromkeys(key for each in maps for key in each)
            total[name] = {key: sum(each.get(key, 0) for each in maps) for key in keys}
    return total


def server_name(server_info: Mapping[str, Any]) -> str | None:
    """Return the random name that a `lim` command gave to a server; None if it started another."""
    name: str | None = _first_state(server_info).get(NAME_KEY)
    return name


def honours_seeds(server_info: Mapping[str, Any]) -> bool:
    """Return True if equal seeds give equal samples at a server."""
    coupled = (lim_state(server_info) or {}).get("seeds_honoured", False)
    return bool(coupled or server_info.get("enable_deterministic_inference"))


WHY_UNDRAFTED = {
    "short": "no request was longer than the budget",
    "capped": "all requests asked for penalties, a grammar, a logit processor or hidden states",
    "large_batch": "more requests ran at a time than drafts are made for",
    "cost": "drafts would not have paid",
}
"""Reasons of a cycle without drafts, as `/server_info` counts them, in words."""


@dataclass(frozen=True)
class Drafts:
    """Counts of lossless drafting, of a server so far or of a time, whoever asked: by the names and
    with the keys of `/server_info`."""

    cycles: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_histogram: Mapping[str, int] = field(default_factory=dict)
    cycles_by_width: Mapping[str, int] = field(default_factory=dict)
    rows_capped: Mapping[str, int] = field(default_factory=dict)
    cycles_undrafted: Mapping[str, int] = field(default_factory=dict)
    budget: int | None = None
    """Tokens of the longest request that is not drafted; None if unknown."""

    @classmethod
    def of(cls, server_info: Mapping[str, Any]) -> Self | None:
        """Read a server's counts; None if it does not draft."""
        state = lim_state(server_info) or {}
        if "accepted_histogram" not in state:
            return None
        counts = {name: state[name] for name in cls().counts() if name in state}
        return cls(**counts, budget=state.get("config", {}).get("budget"))

    @property
    def runs(self) -> int:
        """Requests of the cycles that drafted, but for those whose runs have one token."""
        return sum(self.accepted_histogram.values())

    def counts(self) -> dict[str, Any]:
        """Return the counts by their names, as records hold them."""
        return {name: count for name, count in vars(self).items() if name != "budget"}

    def since(self, before: Self | None) -> Self:
        """Return the counts since then; a server that was started since counts from 0."""
        if before is None or before.cycles > self.cycles:
            return self
        return self._with(before, sign=-1)

    def __add__(self, other: Self) -> Self:
        return replace(self._with(other, sign=1), budget=self.budget or other.budget)

    def _with(self, other: Self, *, sign: int) -> Self:
        """Add the counts of another, or take them away; what none is left of is left out."""
        totals: dict[str, Any] = {}
        for name, count in self.counts().items():
            more = getattr(other, name)
            if isinstance(count, int):
                totals[name] = count + sign * more
            else:
                keys = [*count, *(key for key in more if key not in count)]
                each = {key: count.get(key, 0) + sign * more.get(key, 0) for key in keys}
                totals[name] = {key: number for key, number in each.items() if number}
        return replace(self, **totals)

    def describe(self) -> str:
        """Return the counts in words; without drafts, the reasons that the server gave."""
        if not self.runs:
            none = f"drafts: none in {self.cycles:,} cycles"
            reasons = [
                self._why(reason) for reason, _ in Counter(self.cycles_undrafted).most_common()
            ]
            return f"{none}: {', or '.join(reasons)}" if reasons else none
        return (
            f"drafts: {self.accepted_tokens:,} of {self.drafted_tokens:,} accepted, "
            f"{1 + self.accepted_tokens / self.runs:.1f} tokens a request and cycle"
        )

    def _why(self, reason: str) -> str:
        words = WHY_UNDRAFTED.get(reason, reason)
        tokens = f" of {self.budget:,} tokens" if reason == "short" and self.budget else ""
        return f"{words}{tokens}"


def _first_state(server_info: Mapping[str, Any]) -> Mapping[str, Any]:
    states = server_info.get("internal_states") or [{}]
    first: Mapping[str, Any] = states[0]
    return first
