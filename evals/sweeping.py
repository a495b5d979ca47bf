"""Running a sweep: what is there, what is missing, and drawing that, server by server."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lim_sglang.errors import DataError, LimError, ServerError
from lim_sglang.evals.metrics import score
from lim_sglang.evals.run_config import complete, differences, folder_name
from lim_sglang.evals.run_store import RUN_FILE, Run, load_run
from lim_sglang.evals.runner import Evaluation, TaskQuestions, load_asked, run_evaluation
from lim_sglang.evals.sweep import SweepRun, Wanted
from lim_sglang.evals.table import percent
from lim_sglang.evals.tasks import find_task, selection_digest
from lim_sglang.programs.schema import Access
from lim_sglang.server import ServerSpec, serving

Serve = Callable[[ServerSpec, Console, Path], AbstractContextManager[str]]


@dataclass(frozen=True)
class Standing:
    """How far a run is."""

    run: SweepRun
    path: Path
    stored: Run | None
    """None: it has not begun."""
    num_wanted: int | None
    """Samples of it when it is complete; None where its program decides, or nobody knows yet."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to draw."""
        return self.stored is not None and self.stored.is_complete

    @property
    def num_samples(self) -> int:
        """Those that are there."""
        return len(self.stored.samples) if self.stored else 0


@dataclass(frozen=True)
class Failed:
    """What did not come to its end: a run, or all that were left of a server."""

    name: str
    error: LimError


def load_questions_of(
    runs: Sequence[SweepRun], data_dir: Path | None
) -> tuple[dict[Wanted, TaskQuestions], dict[Wanted, DataError]]:
    """The questions of every run, each task read once, and why some cannot be read."""
    found: dict[Wanted, TaskQuestions] = {}
    problems: dict[Wanted, DataError] = {}
    for run in runs:
        if run.questions in found or run.questions in problems:
            continue
        try:
            found[run.questions] = load_asked(find_task(run.task), data_dir, run.limit)
        except DataError as problem:
            problems[run.questions] = problem
    return found, problems


def look(
    runs: Sequence[SweepRun], out: Path, asked: Mapping[Wanted, TaskQuestions]
) -> list[Standing]:
    """How far each run is.

    Args:
        out: the folder of their folders.
        asked: questions, as far as they can be read.

    Raises:
        DataError: folders are damaged, or hold runs of other settings than the file's; all of them
            are named.
    """
    standings, problems = [], []
    for run in runs:
        path = out / run.folder
        try:
            questions = asked.get(run.questions)
            stored = load_run(path) if (path / RUN_FILE).exists() else None
            if stored:
                _refuse_others(stored, run, questions)
            standings.append(Standing(run, path, stored, _num_wanted(run, questions)))
        except DataError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError("\n".join([*problems, "mend these, or name another folder with --out"]))
    return standings


def _num_wanted(run: SweepRun, asked: TaskQuestions | None) -> int | None:
    if asked is None or run.method.stops_by_itself:
        return None
    return len(asked.questions) * run.method.num_samples


def _refuse_others(stored: Run, run: SweepRun, asked: TaskQuestions | None) -> None:
    """Raise `DataError` where a run was made with other settings than those of the file."""
    wanted = _settings(run, asked)
    found = list(differences(_alike(stored.record.settings, wanted), wanted))
    if found:
        lines = "".join(f"\n  - {difference}" for difference in found)
        raise DataError(f"the run in {stored.path} was made with other settings:{lines}")


def _settings(run: SweepRun, asked: TaskQuestions | None) -> dict[str, Any]:
    """What of a run's settings is known before its server is; see `run_settings`."""
    task, method = find_task(run.task), complete(run.method)
    settings = {
        "task": task.name,
        "task_version": task.version,
        "program": {"name": method.program, "options": dict(method.options)},
        "num_samples": method.num_samples,
        "thinking": {"enabled": method.thinking},
        "sampling": dict(run.sampling),
        "lim": {"config": dict(run.server.lim)},
    }
    if asked:
        digest = selection_digest(asked.questions)
        settings["questions"] = {"asked": len(asked.questions), "asked_digest": digest}
    return settings


def _alike(settings: Any, wanted: Any) -> Any:
    """The part of some settings that others have, too."""
    if not isinstance(settings, Mapping) or not isinstance(wanted, Mapping):
        return settings
    return {name: _alike(settings.get(name), value) for name, value in wanted.items()}


def run_sweep(
    missing: Sequence[Standing],
    access: Access,
    console: Console,
    *,
    data_dir: Path | None = None,
    serve: Serve = serving,
) -> list[Failed]:
    """Draw what is missing. Each server is started once, for all of its runs; one that fails does
    not keep the others from theirs.

    Args:
        missing: runs that are not complete, server by server.
        access: how the servers are spoken to.
        console: shows what is done.
        serve: starts a server for the length of a block, with its log in a file.

    Raises:
        KeyboardInterrupt: what is finished is safe, and the same sweep goes on from there.
    """
    groups = [list(group) for _, group in groupby(missing, key=lambda each: each.run.server.name)]
    work = _Work(access, console, data_dir, serve)
    for number, standings in enumerate(groups, start=1):
        name = standings[0].run.server.name
        console.rule(Text(f"server {number} of {len(groups)}: {name}"), align="left")
        work.on_one_server(standings)
    return work.failed


class _Work:
    """Runs on servers, and what failed of them so far."""

    def __init__(
        self, access: Access, console: Console, data_dir: Path | None, serve: Serve
    ) -> None:
        self.failed: list[Failed] = []
        self._access = access
        self._console = console
        self._data_dir = data_dir
        self._serve = serve

    def on_one_server(self, standings: Sequence[Standing]) -> None:
        """Start it and draw its runs, as many as it lives to see."""
        server = standings[0].run.server
        spec = ServerSpec(server.path, server.lim_flags, server.sglang_options)
        log = standings[0].path.with_name(f"{folder_name(server.name)}.log")
        left = list(standings)
        try:
            with self._serve(spec, self._console, log) as url:
                while left:
                    self._draw(left[0], url)
                    left.pop(0)
        except LimError as error:
            others = f", and {len(left) - 1} more on its server" if len(left) > 1 else ""
            self._fail(f"{left[0].run.name}{others}", error)

    def _draw(self, standing: Standing, url: str) -> None:
        """Draw one run; raises `ServerError` where the server cannot draw the next one either."""
        run = standing.run
        evaluation = Evaluation(
            tasks=(run.task,),
            method=run.method,
            sampling=run.sampling,
            limit=run.limit,
            data_dir=self._data_dir,
            out=standing.path,
            # A sweep is given again to fill its gaps.
            retry_failed=True,
        )
        try:
            [finished] = run_evaluation(evaluation, [url], self._access, self._console)
        except ServerError:
            raise
        except LimError as error:
            self._fail(run.name, error)
            return
        if finished.summary:
            right = percent(score(finished.summary).pass_at_1)
            self._say(f"{run.name}: {right} of samples right")
        failures = finished.outcome.failures
        if failures:
            text = f"{len(failures)} samples failed, the last with: {failures[-1].error}"
            self._fail(run.name, ServerError(text))

    def _fail(self, name: str, error: LimError) -> None:
        self._say(f"{name}: {error}")
        self.failed.append(Failed(name, error))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
