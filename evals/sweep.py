"""A sweep: the runs that a file names, grouped by the servers that they need."""

import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lim_sglang.errors import ConfigError
from lim_sglang.evals.metrics import published_name
from lim_sglang.evals.run_config import Method, choose_method, complete, folder_name
from lim_sglang.evals.sweep_file import Sweep, describe
from lim_sglang.evals.tasks import find_task

SWEEPS = Path(__file__).parent / "sweeps"
"""Those that come with this package, each known by its file's name."""

Wanted = tuple[str, int | None]
"""A task, and how many of its questions."""


@dataclass(frozen=True)
class SweepServer:
    """One server of a sweep; all tasks that want it are run on it."""

    model: str
    """As documents name it."""
    path: str | None
    """What is served; None for the embedded model."""
    lim: Mapping[str, Any]
    """Fields of `LimConfig`."""
    sglang_options: tuple[str, ...] = ()

    @property
    def policy(self) -> str:
        """`full` or `lessismore-256 ranking=mass`."""
        given = {**self.lim}
        policy, budget = given.pop("policy"), given.pop("budget", None)
        others = [f"{field}={_as_text(value)}" for field, value in given.items()]
        return " ".join([f"{policy}-{budget}" if budget else policy, *others])

    @property
    def name(self) -> str:
        """`MODEL lessismore-256`."""
        return f"{self.model} {self.policy}"

    @property
    def lim_flags(self) -> dict[str, str]:
        """As `lim serve` takes them."""
        return {f"--lim-{k.replace('_', '-')}": _as_text(v) for k, v in self.lim.items()}


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a task on a server."""

    server: SweepServer
    task: str
    method: Method
    sampling: Mapping[str, Any]
    """Fields of `Sampling` that are given."""
    limit: int | None = None
    """Questions; None: all."""

    @property
    def questions(self) -> Wanted:
        """What it asks."""
        return self.task, self.limit

    @property
    def task_name(self) -> str:
        """Without the folder of a user's own file."""
        return find_task(self.task).name

    @property
    def name(self) -> str:
        """`MODEL lessismore-256 TASK`."""
        return f"{self.server.name} {self.task_name}"

    @property
    def folder(self) -> str:
        """Of the run, beside those of the others."""
        return folder_name(f"{self.task_name} {self.server.name}")


def find_sweep(name: str) -> Path:
    """The file of that path, else the one that comes with this package under that name.

    Raises:
        ConfigError: there is neither.
    """
    ours = SWEEPS / f"{name}.toml"
    for path in (Path(name), ours):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in SWEEPS.glob("*.toml")))
    raise ConfigError(f"there is no file {name}: name a TOML file, or one of ours: {known}")


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
        problems = [*_problems_of_tasks(sweep)] or [*_problems_of_folders(sweep)]
    except ValidationError as error:
        problems = [describe(problem) for problem in error.errors()]
    if problems:
        raise ConfigError(f"{path} is no sweep:{_lines(problems)}")
    return sweep


def _lines(texts: Iterable[str]) -> str:
    return "".join(f"\n  - {text}" for text in texts)


def _problems_of_tasks(sweep: Sweep) -> Iterator[str]:
    """What does not go together, although each value by itself can be."""
    budgets = [budget for policy in sweep.policies for budget in policy.budgets]
    for name, task in sweep.tasks.items():
        strange = [budget for budget in task.budgets or [] if budget not in budgets]
        if strange:
            yield f"tasks.{name}.budgets: no policy has {', '.join(map(str, strange))}"
        try:
            choose_method(sweep.program, task.samples or sweep.samples)
        except ConfigError as problem:
            yield f"tasks.{name}.samples: {problem}"


def _problems_of_folders(sweep: Sweep) -> Iterator[str]:
    for folder, count in Counter(run.folder for run in expand(sweep)).items():
        if count > 1:
            yield f"{count} runs would share the folder {folder}: let them differ in more"


def expand(
    sweep: Sweep, paths: Mapping[str, str] | None = None, only: Sequence[str] = ()
) -> list[SweepRun]:
    """The runs of a sweep, server by server, in the order of the file.

    Args:
        paths: folders that are served in place of models, by the model's name.
        only: shell patterns, of which a run's name, or a word of it, has to match one.

    Raises:
        ConfigError: a path of an unknown model, or patterns that leave nothing.
    """
    paths = paths or {}
    if unknown := sorted(set(paths) - set(sweep.models)):
        raise ConfigError(f"--model {', '.join(unknown)}: the sweep has {', '.join(sweep.models)}")
    runs = [
        _run(sweep, server, task)
        for name in sweep.models
        for server in _servers(sweep, name, paths.get(name))
        for task, entry in sweep.tasks.items()
        if not entry.budgets or server.lim.get("budget") in (None, *entry.budgets)
    ]
    found = [run for run in runs if not only or any(_matches(run.name, each) for each in only)]
    if not found:
        names = _lines(run.name for run in runs)
        raise ConfigError(f"--only {' '.join(only)} leaves none of these runs:{names}")
    return found


def check_runs(runs: Sequence[SweepRun]) -> None:
    """Refuse what would be seen only when a server runs, or when all is over.

    Raises:
        ConfigError: the program lacks an option, or models cannot be served or not be told apart.
    """
    for run in runs:
        complete(run.method)
    served = {run.server.model: run.server.path for run in runs}
    problems = [
        f"{model} is to be served from {path}, which is no folder"
        for model, path in served.items()
        if path not in (None, model) and not Path(path).expanduser().is_dir()
    ]
    names: dict[str, list[str]] = {}
    for model, path in served.items():
        names.setdefault(published_name(path or model), []).append(model)
    problems += [
        f"{' and '.join(models)} are served from folders that are both called {name}, the name "
        "that a report would give them: serve one from a folder of another name"
        for name, models in names.items()
        if len(models) > 1
    ]
    if problems:
        raise ConfigError(f"the sweep's models cannot be served:{_lines(problems)}")


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch(text, pattern) for text in (name, *name.split()))


def _servers(sweep: Sweep, name: str, folder: str | None) -> Iterator[SweepServer]:
    model = sweep.models[name]
    is_embedded = model.embedded and not folder
    path = None if is_embedded else folder or model.path or name
    options = [*sweep.sglang, *model.sglang, *(("--device", "cpu") if is_embedded else ())]
    for policy in sweep.policies:
        for settings in policy.settings():
            yield SweepServer(name, path, settings, tuple(options))


def _run(sweep: Sweep, server: SweepServer, task: str) -> SweepRun:
    entry = sweep.tasks[task]
    method = choose_method(
        sweep.program,
        entry.samples or sweep.samples,
        options=sweep.options,
        thinking=sweep.thinking,
    )
    of_model = sweep.models[server.model].sampling.model_dump(exclude_none=True)
    sampling = sweep.sampling.model_dump(exclude_none=True) | of_model
    return SweepRun(server, task, method, sampling, entry.limit or sweep.limit)
