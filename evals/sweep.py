"""A sweep: which models, policies, budgets and tasks a file names, as runs grouped by server."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lim_sglang.errors import ConfigError, LimError
from lim_sglang.evals.tasks import find_task

Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Part(BaseModel):
    """A table of the file; a key that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Part):
    """How one model is served; its name is its hub id."""

    path: str | None = None
    """A folder in place of the hub."""
    default: bool = False
    """Whether the default model of the machine is meant."""
    sglang: list[str] = []
    """Further options of SGLang."""


class PolicyEntry(_Part):
    """One policy, at each of its budgets."""

    policy: Literal["full", "lessismore"]
    budgets: list[Annotated[int, Field(ge=1)]] = []
    """Tokens."""
    ranking: Literal["rank", "mass"] | None = None
    recent_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    sinks: Annotated[int, Field(ge=0)] | None = None
    select_layers: Layers | None = None

    @model_validator(mode="after")
    def _budgets_belong_to_lessismore(self) -> "PolicyEntry":
        if (self.policy == "full") == bool(self.budgets):
            raise ValueError(
                "full reads everything and has no budgets"
                if self.budgets
                else "lessismore needs budgets, such as [1024, 2048]"
            )
        return self


class Sweep(_Part):
    """The whole file. Sampling that it leaves out is the model's own."""

    tasks: Annotated[list[str], Field(min_length=1)]
    models: Annotated[dict[str, ModelEntry], Field(min_length=1)]
    policies: Annotated[list[PolicyEntry], Field(min_length=1)]
    samples: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    """Questions of each task, the first ones."""
    program: str = "majority"
    options: dict[str, int | float] = {}
    """Of the program."""
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    thinking: bool | None = None
    concurrency: Annotated[int, Field(ge=1)] = 64
    sglang: list[str] = []
    """Options of SGLang for every server."""


@dataclass(frozen=True)
class SweepServer:
    """One server of a sweep; all tasks are run on it."""

    model: str
    """As documents name it."""
    path: str | None
    """What is served; None for the machine's default model."""
    lim_flags: Mapping[str, str]
    sglang_options: tuple[str, ...]

    @property
    def name(self) -> str:
        """`MODEL full` or `MODEL lessismore-256 mass`: what --only is matched with."""
        flags = dict(self.lim_flags)
        policy = flags.pop("--lim-policy")
        budget = flags.pop("--lim-budget", None)
        others = [f"{flag.removeprefix('--lim-')}={text}" for flag, text in flags.items()]
        return " ".join([self.model, f"{policy}-{budget}" if budget else policy, *others])


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        ConfigError: it is no TOML, or has values that cannot be; all of them are named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the sweep {path}: {error}") from None
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        lines = "".join(f"\n  - {_describe(problem)}" for problem in error.errors())
        raise ConfigError(f"{path} is no sweep:{lines}") from None
    problems = list(_problems(sweep))
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{path} is no sweep:{lines}")
    return sweep


def _describe(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"])) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{place}: no such key"
    given = "" if problem["type"] == "missing" else f", not {problem['input']!r}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}{given}"


def _problems(sweep: Sweep) -> Iterator[str]:
    for task in sweep.tasks:
        try:
            find_task(task)
        except LimError as problem:
            yield f"tasks: {problem}"
    for name, model in sweep.models.items():
        if model.default and model.path:
            yield f"models.{name}: give either path or default = true"
    names = [server.name for server in expand(sweep)]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"policies: {name} is named {names.count(name)} times"


def expand(
    sweep: Sweep, paths: Mapping[str, str] | None = None, only: Sequence[str] = ()
) -> list[SweepServer]:
    """The servers of a sweep, in the order of the file.

    Args:
        paths: folders that are served in place of models, by the model's name.
        only: shell patterns, of which a server's name has to match one.

    Raises:
        ConfigError: a path of an unknown model, or patterns that leave nothing.
    """
    paths = paths or {}
    if unknown := sorted(set(paths) - set(sweep.models)):
        raise ConfigError(f"--model {', '.join(unknown)}: the sweep has {', '.join(sweep.models)}")
    servers = [
        SweepServer(
            name,
            paths.get(name) or model.path or (None if model.default else name),
            flags,
            (*sweep.sglang, *model.sglang),
        )
        for name, model in sweep.models.items()
        for policy in sweep.policies
        for flags in _flags(policy)
    ]
    found = [s for s in servers if not only or any(fnmatch(s.name, f"*{p}*") for p in only)]
    if not found:
        names = ", ".join(server.name for server in servers)
        raise ConfigError(f"--only leaves nothing of {names}")
    return found


def _flags(policy: PolicyEntry) -> Iterator[dict[str, str]]:
    layers = policy.select_layers
    shared = {
        "--lim-ranking": policy.ranking,
        "--lim-recent-ratio": policy.recent_ratio,
        "--lim-sinks": policy.sinks,
        "--lim-select-layers": ",".join(map(str, layers)) if layers else None,
    }
    given = {flag: str(value) for flag, value in shared.items() if value is not None}
    budgets: list[int | None] = [*policy.budgets] or [None]
    for budget in budgets:
        own = {"--lim-budget": str(budget)} if budget else {}
        yield {"--lim-policy": policy.policy, **own, **given}
