"""Matrix of runs: rows of server settings times rows of task settings, from a TOML file.

A server whose runs are all complete is not started. Any other server is started once, and each of
its runs is completed by the function that `lim eval` uses.
"""

import re
import tomllib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import groupby, product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.text import Text

from lim_sglang.config import LimConfig
from lim_sglang.errors import ConfigError, DataError, LimError, ServerError, bullets, value_error
from lim_sglang.evals.metrics import published_name
from lim_sglang.evals.question_notes import question_notes
from lim_sglang.evals.run_config import RunConfig, folder_name, task_settings
from lim_sglang.evals.run_store import (
    RUN_FILE,
    SAMPLES_FILE,
    Run,
    load_run,
    read_questions,
    read_record,
)
from lim_sglang.evals.runner import (
    complete_run,
    describe_failures,
    load_benchmarks,
)
from lim_sglang.evals.settings import check_settings
from lim_sglang.evals.tasks import Question, find_task, short_name
from lim_sglang.launch.server import ServerSpec, serving
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.schema import Access
from lim_sglang.progress import print_plain

MATRICES = Path(__file__).parent / "matrices"
"""Files that come with the package, known by their stems."""

NO_BRACKETS = str.maketrans("", "", "[] ")

Count = Annotated[int, Field(ge=1)]
AsList = BeforeValidator(lambda value: value if isinstance(value, list) else [value])


class _Table(BaseModel):
    """Table of the file. Unknown keys are refused, and texts in the place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SamplingTable(_Table):
    """Sampling parameters. Missing ones come from the model, as for `lim eval`."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | Literal[-1] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


class TaskTable(_Table):
    """Row of task settings, as `lim eval` has them."""

    task: str
    samples: Count | None = None
    limit: Count | None = None
    program: str = "majority"
    options: dict[str, int | float] = {}
    system: str | None = None
    thinking: bool | None = None
    thinking_budget: Count | None = None
    sampling: SamplingTable = SamplingTable()
    """Parameters that replace those of the file."""
    name: str | None = None
    """None: the name of the task."""


class ServerTable(_Table):
    """Row of server settings. A list of models, policies or budgets stands for a row each."""

    model: Annotated[list[str], AsList] = []
    """Hub id or folder; none: the default model of the machine."""
    policy: Annotated[list[str], AsList] = [LimConfig.policy]
    budget: Annotated[list[Count], AsList] = []
    lim: dict[str, Any] = {}
    """Other fields of `LimConfig`: ranking, select_layers, …"""
    sglang: list[str] = []
    """Options of SGLang, after those of the file."""
    sampling: SamplingTable = SamplingTable()
    """Parameters that replace those of the tasks."""
    tasks: list[str] | None = None
    """Names of the task rows that run on this server; None: all."""
    name: str | None = None
    """None: model, policy, budget and the fields of `lim`."""


class MatrixFile(_Table):
    """Content of the file."""

    servers: Annotated[list[ServerTable], Field(min_length=1)]
    tasks: Annotated[list[TaskTable], Field(min_length=1)]
    sampling: SamplingTable = SamplingTable()
    sglang: list[str] = []
    """Options of SGLang for every server."""
    concurrency: Count = Access.max_concurrency
    """Requests that a server is sent at the same time."""
    timeout_s: Annotated[float, Field(ge=1)] = 3600.0
    """Time that a server has for one sample."""


TABLES: Mapping[str | int, type[_Table]] = {
    "servers": ServerTable,
    "tasks": TaskTable,
    "sampling": SamplingTable,
}


@dataclass(frozen=True)
class ServerRow:
    """One server. `lim` has the fields of `LimConfig` that the file gives."""

    name: str
    lim: Mapping[str, Any]
    spec: ServerSpec


@dataclass(frozen=True)
class MatrixRun:
    """One task on one server."""

    name: str
    server: ServerRow
    config: RunConfig
    path: Path


@dataclass(frozen=True)
class Matrix:
    """All runs, server by server, and how the servers are used."""

    runs: tuple[MatrixRun, ...]
    access: Access


def find_matrix(name: str) -> Path:
    """Return the file of that path, else the file of that name that comes with the package.

    Raises:
        ConfigError: neither exists.
    """
    for path in (Path(name), MATRICES / f"{name}.toml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in MATRICES.glob("*.toml")))
    raise ConfigError(f"no file {name}: name a TOML file, or one of {known}")


def read_matrix(
    path: Path, out: Path, data_dir: Path | None = None, only: Sequence[str] = ()
) -> Matrix:
    """Read the runs of a file.

    Args:
        out: folder of the runs' folders.
        only: shell patterns; a run is left out unless its name, or a word in the name, matches one.

    Raises:
        ConfigError: not TOML, impossible values (all are named with their keys), or patterns that
            match no run.
    """
    problems: list[str] = []
    runs: list[MatrixRun] = []
    try:
        content = MatrixFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        runs += _expand(content, out, data_dir, problems)
    except ValidationError as error:
        problems += map(_describe, error.errors())
    except (OSError, ValueError) as error:  # not readable, not UTF-8, not TOML
        raise ConfigError(f"cannot read {path}: {error}") from None
    for folder, count in Counter(run.path.name for run in runs).items():
        if count > 1:
            problems.append(f"{count} runs share the folder {folder}: give the rows a name")
    models = {run.server.spec.model for run in runs if run.server.spec.model}
    for name, count in Counter(map(published_name, models)).items():
        if count > 1:
            problems.append(f"{count} models are published as {name}: rename their folders")
    if problems:
        raise ConfigError(f"{path} is not a matrix of runs:{bullets(problems)}")
    found = [run for run in runs if not only or any(_matches(run, each, runs) for each in only)]
    if not found:
        names = bullets(run.name for run in runs)
        raise ConfigError(f"--only {' '.join(only)} matches none of these runs:{names}")
    access = Access(timeout_s=content.timeout_s, max_concurrency=content.concurrency)
    return Matrix(tuple(found), access)


def _matches(run: MatrixRun, pattern: str, runs: Iterable[MatrixRun]) -> bool:
    """Return True for a run that a pattern names: by the name of its server row, if any run has
    just that one, else by its own name or a word of it."""
    if any(each.server.name.endswith(f" {pattern}") for each in runs):
        return run.server.name.endswith(f" {pattern}")
    return any(fnmatch(text, pattern) for text in (run.name, *run.name.split()))


def _describe(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as a sentence that names the key."""
    *parents, key = problem["loc"]
    location = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        table = next((TABLES[name] for name in reversed(parents) if name in TABLES), MatrixFile)
        return f"{location}: unknown key {key}; known keys: {', '.join(table.model_fields)}"
    if problem["type"] == "missing":
        return f"{location}: missing"
    text = re.sub(r"a valid dictionary( or instance of \w+)?", "a table", problem["msg"])
    return f"{location}: {value_error({**problem, 'msg': text})}"


def _expand(
    content: MatrixFile, out: Path, data_dir: Path | None, problems: list[str]
) -> Iterator[MatrixRun]:
    """Yield the runs in the order of the file; append what does not fit together to `problems`."""
    names = [task.name or short_name(task.task) for task in content.tasks]
    tasks: list[tuple[str, RunConfig]] = []
    for number, task in enumerate(content.tasks):
        try:
            tasks.append((names[number], _config(task, content.sampling, data_dir)))
        except LimError as problem:
            problems.append(f"tasks.{number}: {problem}")
    for number, row in enumerate(content.servers):
        try:
            servers = list(_servers(row, content.sglang))
            given = names if row.tasks is None else row.tasks
            wanted = {each if each in names else short_name(each) for each in given}
            if unknown := wanted - {*names}:
                raise ConfigError(f"no task {', '.join(unknown)}; the tasks are {', '.join(names)}")
        except ConfigError as problem:
            problems.append(f"servers.{number}: {problem}")
            continue
        for server, (name, config) in product(servers, tasks):
            if name not in wanted:
                continue
            path = out / folder_name(f"{name} {server.name}")
            sampling = {**config.sampling, **row.sampling.model_dump(exclude_none=True)}
            served = (server.spec.model or "default model", *server.spec.sglang_options)
            try:
                config = replace(config, out=path, sampling=sampling, served=served)
            except ConfigError as problem:
                problems.append(f"servers.{number} with task {name}: {problem}")
                continue
            yield MatrixRun(f"{name} {server.name}", server, config, path)


def _config(task: TaskTable, defaults: SamplingTable, data_dir: Path | None) -> RunConfig:
    find_task(task.task)
    given, given_here = (each.model_dump(exclude_none=True) for each in (defaults, task.sampling))
    return RunConfig(
        num_samples=task.samples,
        sampling={**given, **given_here},
        data_dir=data_dir,
        retry_failed=True,  # the same command is given again to fill gaps
        **task.model_dump(exclude={"name", "samples", "sampling"}),
    )


def _servers(row: ServerTable, sglang: Sequence[str]) -> Iterator[ServerRow]:
    if ours := [word for word in (*sglang, *row.sglang) if word.startswith("--lim-")]:
        raise ConfigError(f"{', '.join(ours)} among SGLang's options: use policy, budget and lim")
    models: list[str | None] = [*row.model] or [None]
    budgets: list[int | None] = [*row.budget] or [None]
    for model, policy, budget in product(models, row.policy, budgets):
        lim = {"policy": policy, **({"budget": budget} if budget else {}), **row.lim}
        # Every field is given, so that the environment's LIM_CONFIG changes nothing.
        flags = {"--lim-config": LimConfig.from_mapping(lim).to_json()}
        words = [
            published_name(model) if model else "default-model",
            f"{policy}-{budget}" if budget else policy,
            *(f"{field}={value}".translate(NO_BRACKETS) for field, value in row.lim.items()),
        ]
        spec = ServerSpec(model, flags, (*sglang, *row.sglang))
        yield ServerRow(row.name or " ".join(words), lim, spec)


def find_stored(
    path: Path,
    config: RunConfig,
    benchmark: Sequence[Question] | None = None,
    server: Mapping[str, Any] = MappingProxyType({}),
) -> Run | None:
    """Return what a run's folder holds, checked by all settings that are known without a server;
    None: it has no sample yet.

    Args:
        benchmark: all questions of the task; None: the stored questions are not compared.
        server: settings of the server that are known, too.

    Raises:
        DataError: the folder is damaged, or holds a run of other settings.
    """
    if not _has_samples(path):
        return None
    record = read_record(path)
    sampling = {name: value for name, value in config.sampling.items() if value is not None}
    settings = task_settings(config, find_task(config.task), benchmark)
    expected = {**settings, "sampling": sampling, **server}
    found = _restrict(record.settings, expected)
    if "served" in expected:  # a run begun without a matrix does not say how its server was started
        found["served"] = record.about.get("served", expected["served"])
    asked = (benchmark or ())[: config.limit]
    check_settings(path, found, expected, asked, partial(read_questions, path))
    return load_run(path)


def _has_samples(path: Path) -> bool:
    """Return True if a folder holds a sample of a run; with none, nothing can be mixed."""
    samples = path / SAMPLES_FILE
    return (path / RUN_FILE).exists() and samples.exists() and samples.stat().st_size > 0


def _restrict(settings: Any, expected: Any) -> Any:
    """Return the part of some settings whose keys `expected` has."""
    if not isinstance(settings, Mapping) or not isinstance(expected, Mapping):
        return settings
    return {name: _restrict(settings.get(name), value) for name, value in expected.items()}


def stored_run(run: MatrixRun, benchmark: Sequence[Question] | None = None) -> Run | None:
    """Return what the folder of a run holds; None: the run has not begun.

    Args:
        benchmark: all questions of the task; None: the stored questions are not compared.

    Raises:
        DataError: the folder is damaged, or holds a run of other settings than the file's.
    """
    server = {"lim": {"config": run.server.lim}, "served": run.config.served}
    return find_stored(run.path, run.config, benchmark, server)


def stored_runs(
    runs: Sequence[MatrixRun], benchmarks: Mapping[str, Sequence[Question]] | None = None
) -> list[Run | None]:
    """Return what the folder of each run holds; see `stored_run`.

    Raises:
        DataError: damaged folders, and folders of other runs; all are named.
    """
    found, problems = [], []
    for run in runs:
        try:
            benchmark = benchmarks[run.config.task] if benchmarks else None
            found.append(stored_run(run, benchmark))
        except DataError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError("\n".join(problems))
    return found


def complete_matrix(matrix: Matrix, console: Console) -> dict[str, LimError]:
    """Complete every run, server by server. A server or run that fails does not stop the others.

    Returns:
        The reason why a run is not complete, by the run's name.

    Raises:
        LimError: questions cannot be read, or folders hold other runs; no server has started.
        KeyboardInterrupt: finished samples are safe, and the same matrix resumes.
    """
    benchmarks = load_benchmarks([run.config for run in matrix.runs], console)
    for note in question_notes(benchmarks):
        print_plain(console, f"warning: {note}")
    pairs = zip(matrix.runs, stored_runs(matrix.runs, benchmarks), strict=True)
    missing = [run for run, found in pairs if not (found and found.is_complete)]
    failed: dict[str, LimError] = {}
    with EquivalenceChecker() as checker:
        for server, group in groupby(missing, key=lambda run: run.server):
            console.rule(Text(server.name), align="left")
            left = deque(group)
            log = left[0].path.with_name(f"{folder_name(server.name)}.log")
            try:
                with serving(server.spec, console, log) as url:
                    while left:
                        name, config = left[0].name, left[0].config
                        benchmark = benchmarks[config.task]
                        try:
                            finished = complete_run(
                                config, benchmark, [url], matrix.access, checker, console
                            )
                            if failures := finished.run.failures:
                                failed[name] = ServerError(describe_failures(failures))
                        except (ConfigError, DataError) as error:  # the server can serve others
                            failed[name] = _show(error, console)
                        left.popleft()
            except LimError as error:
                failed |= dict.fromkeys((run.name for run in left), _show(error, console))
    return failed


def _show(error: LimError, console: Console) -> LimError:
    print_plain(console, str(error))
    return error


def describe_matrix(matrix: Matrix) -> str:
    """Return a heading, a line for each run with its state, its stored samples and what it asks,
    and the counts of all."""
    states, lines = [], []
    for run, found in zip(matrix.runs, stored_runs(matrix.runs), strict=True):
        states.append("complete" if found and found.is_complete else "begun" if found else "new")
        stored, each = len(found.samples) if found else 0, run.config.samples_per_question
        asked = run.config.limit or "all"
        lines.append(f"{states[-1]:8} {stored:7,} {each:11} {asked:>10}  {run.name}")
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "begun", "new"))
    head = f"{'state':8} {'stored':>7} {'a question':>11} {'questions':>10}  run"
    return "\n".join([head, *lines, f"{len(lines)} runs: {counts}"])


def next_commands(runs: Sequence[MatrixRun], folder: Path) -> list[list[str]]:
    """Return `lim compare` for the runs of each model and task row, the dense run first, and
    `lim report` for all runs.

    Args:
        runs: those with samples, of this session or an earlier one.
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    for run in sorted(runs, key=lambda run: run.server.lim["policy"] != "full"):
        key = run.name.removesuffix(run.server.name), run.server.spec.model
        groups.setdefault(key, []).append(str(run.path))
    compare = [["lim", "compare", *paths] for paths in groups.values() if len(paths) > 1]
    report = ["lim", "report", str(folder), "--html", str(folder / "report.html")]
    return [*compare, report] if runs else []
