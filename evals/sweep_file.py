"""A sweep's file, as TOML has it: what it may say, and in which words a mistake is told."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lim_sglang.config import LimConfig
from lim_sglang.errors import DataError
from lim_sglang.evals.tasks import find_task
from lim_sglang.programs.program import find_program


def _refuse_unknown_task(name: str) -> str:
    try:
        find_task(name)
    except DataError as error:
        raise ValueError(error) from None
    return name


def _refuse_unknown_program(name: str) -> str:
    find_program(name)
    return name


def _refuse_no_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"should be a number, not {value!r}")
    return value


def _refuse_zero(value: int) -> int:
    if value == 0:
        raise ValueError("should be 1 or more, or -1 for all tokens, not 0")
    return value


def _refuse_our_options(words: list[str]) -> list[str]:
    ours = [word for word in words if word.startswith("--lim-")]
    if ours:
        raise ValueError(f"{', '.join(ours)} belongs to [[policies]], so that runs are told apart")
    return words


Count = Annotated[int, Field(ge=1)]
SGLangOptions = Annotated[list[str], AfterValidator(_refuse_our_options)]


class _Part(BaseModel):
    """A table of the file: other keys are refused, and texts in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SamplingEntry(_Part):
    """How samples are drawn. What is left out is the model's own, as for `lim eval`."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1), AfterValidator(_refuse_zero)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


class TaskEntry(_Part):
    """What one task has for its own; the rest is as for all."""

    samples: Count | None = None
    limit: Count | None = None
    budgets: Annotated[list[Count], Field(min_length=1)] | None = None
    """Only these of the policies' budgets; None: all."""


class ModelEntry(_Part):
    """How one model is served; its name is its hub id, or a folder."""

    path: str | None = None
    """A folder in place of the hub."""
    embedded: bool = False
    """Whether it is the small one that needs no hub and no GPU; it is served on the CPU."""
    sglang: SGLangOptions = []
    """Further options of SGLang."""
    sampling: SamplingEntry = SamplingEntry()

    @model_validator(mode="after")
    def _refuse_two_places(self) -> "ModelEntry":
        if self.path and self.embedded:
            raise ValueError("give either path or embedded = true")
        return self


class PolicyEntry(_Part):
    """One policy, at each of its budgets. What is left out has `lim serve`'s default."""

    policy: str
    budgets: list[int] = []
    """Tokens that a sparse layer reads."""
    ranking: str | None = None
    recent_ratio: float | None = None
    sinks: int | None = None
    select_layers: list[int] | None = None

    @model_validator(mode="after")
    def _refuse_what_no_server_takes(self) -> "PolicyEntry":
        if self.policy == "lessismore" and not self.budgets:
            raise ValueError("lessismore needs budgets, such as [1024, 2048]")
        if self.policy == "full" and len(self.model_fields_set) > 1:
            raise ValueError("full reads everything, so it has no budgets and nothing to select")
        for settings in self.settings():
            LimConfig.from_mapping(settings)
        return self

    def settings(self) -> list[dict[str, Any]]:
        """Fields of `LimConfig` that are given, one mapping a budget."""
        given = self.model_dump(exclude_none=True, exclude={"budgets"})
        return [given | {"budget": budget} for budget in self.budgets] or [given]


class Sweep(_Part):
    """The whole file."""

    tasks: Annotated[
        dict[Annotated[str, AfterValidator(_refuse_unknown_task)], TaskEntry], Field(min_length=1)
    ]
    models: Annotated[dict[str, ModelEntry], Field(min_length=1)]
    policies: Annotated[list[PolicyEntry], Field(min_length=1)]
    samples: Count | None = None
    """Of each question; None leaves it to the program."""
    limit: Count | None = None
    """Questions of each task, the first ones; None: all."""
    program: Annotated[str, AfterValidator(_refuse_unknown_program)] = "majority"
    options: dict[str, Annotated[Any, AfterValidator(_refuse_no_number)]] = {}
    """Of the program."""
    thinking: bool | None = None
    sampling: SamplingEntry = SamplingEntry()
    concurrency: Count = 64
    """Requests that a server is given at once."""
    timeout_s: Annotated[float, Field(ge=1)] = 3600.0
    """That a server has for one sample; nobody waits for it, so it is for one that hangs."""
    sglang: SGLangOptions = []
    """Options of SGLang for every server."""


TABLES: Mapping[str | int, type[_Part]] = {
    "tasks": TaskEntry,
    "models": ModelEntry,
    "policies": PolicyEntry,
    "sampling": SamplingEntry,
}


def describe(problem: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence that names the key."""
    keys = [key for key in problem["loc"] if key != "[key]"]
    place = ".".join(map(str, keys))
    if problem["type"] == "extra_forbidden":
        table = next((TABLES[key] for key in reversed(keys[:-1]) if key in TABLES), Sweep)
        return f"{place}: there is no {keys[-1]}; there are {', '.join(table.model_fields)}"
    if problem["type"] == "missing":
        return f"{place}: is missing"
    if problem["type"] == "value_error":
        return f"{place}: {problem['ctx']['error']}"
    said = re.sub(r"a valid dictionary( or instance of \w+)?", "a table", problem["msg"])
    said = re.sub(r"^(Input|List|Dictionary) |( after validation)?, not .*", "", said)
    return f"{place}: {said}, not {problem['input']!r}"
