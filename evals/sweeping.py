"""Running a sweep: what is missing, server by server."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lim_sglang.errors import LimError
from lim_sglang.evals.evaluation import Evaluation, Finished, run_evaluation
from lim_sglang.evals.method import choose_method
from lim_sglang.evals.runs import Run, load_run
from lim_sglang.evals.servers import Access
from lim_sglang.evals.serving import ServerSpec, serving
from lim_sglang.evals.store import RUN_FILE
from lim_sglang.evals.sweep import Sweep, SweepServer
from lim_sglang.evals.tasks import find_task

Serve = Callable[[ServerSpec, Console], AbstractContextManager[str]]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a task on a server, in a folder that the sweep chooses."""

    server: SweepServer
    task: str
    path: Path

    def load(self) -> Run | None:
        """What is there of it; None where it has not begun.

        Raises:
            DataError: the folder is damaged.
        """
        return load_run(self.path) if (self.path / RUN_FILE).exists() else None

    def is_complete(self, sweep: Sweep) -> bool:
        """Whether nothing is left to draw. One that was made with other numbers than the file's is
        not, so that going on with it names what differs.
        """
        run = self.load()
        if run is None or not run.is_complete:
            return False
        settings = run.record.settings
        sampling = settings["sampling"]
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        wanted = {name: value for name in names if (value := getattr(sweep, name)) is not None}
        method = choose_method(sweep.program, sweep.samples)
        return (
            all(sampling[name] == value for name, value in wanted.items())
            and settings["num_samples"] == method.num_samples
            and settings["program"]["name"] == sweep.program
            and (sweep.limit is None or settings["questions"]["asked"] <= sweep.limit)
        )


@dataclass(frozen=True)
class Failed:
    """A server's runs that did not come to their end."""

    server: SweepServer
    error: LimError


def runs_of(sweep: Sweep, servers: Sequence[SweepServer], out: Path) -> list[SweepRun]:
    """Every run, server by server."""
    return [
        SweepRun(server, task, out / folder_name(server.name) / folder_name(find_task(task).name))
        for server in servers
        for task in sweep.tasks
    ]


def folder_name(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.=-]+", "-", text)


def run_sweep(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    console: Console,
    *,
    data_dir: Path | None = None,
    serve: Serve = serving,
    on_finished: Callable[[Finished], object] = lambda _: None,
) -> list[Failed]:
    """Draw what is missing. Each server is started once, for all of its runs; one that fails does
    not keep the others from theirs.

    Args:
        serve: starts a server for the length of a block.
        on_finished: told of each run that came to its end.

    Raises:
        KeyboardInterrupt: what is finished is safe, and the same sweep goes on from there.
    """
    missing: dict[str, list[SweepRun]] = {}
    for run in runs:
        if not run.is_complete(sweep):
            missing.setdefault(run.server.name, []).append(run)
    failed = []
    for number, (name, ours) in enumerate(missing.items(), start=1):
        console.rule(f"server {number} of {len(missing)}: {name}")
        server = ours[0].server
        spec = ServerSpec(server.path, server.lim_flags, server.sglang_options)
        try:
            with serve(spec, console) as url:
                for run in ours:
                    access = Access(concurrency=sweep.concurrency)
                    run_evaluation(
                        _evaluation(sweep, run, data_dir), [url], access, console, on_finished
                    )
        except LimError as error:
            console.print(f"{name} failed: {error}", highlight=False, soft_wrap=True)
            failed.append(Failed(server, error))
    return failed


def _evaluation(sweep: Sweep, run: SweepRun, data_dir: Path | None) -> Evaluation:
    return Evaluation(
        tasks=(run.task,),
        method=choose_method(
            sweep.program, sweep.samples, options=sweep.options, thinking=sweep.thinking
        ),
        sampling={
            name: getattr(sweep, name)
            for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
        },
        limit=sweep.limit,
        data_dir=data_dir,
        out=run.path,
        # A sweep is given again to fill its gaps.
        retry_failed=True,
    )
