"""`lim grade`: the verdicts of a run anew."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

MAX_WORKERS = 16
"""Unless asked for more: each has to import math-verify before it is of use."""


def grade(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of math-verify.",
            show_default=f"one a core, {MAX_WORKERS} at most",
        ),
    ] = None,
) -> None:
    """Extract the answers of a run's samples again and grade them: after a mend of the grader, or
    to check verdicts on another machine. Samples are left as they are; grades.jsonl beside them
    holds the new verdicts, all of them or, where this is interrupted, none."""
    from lim_sglang.evals.grade import Grader
    from lim_sglang.evals.regrade import grade_run
    from lim_sglang.evals.runs import load_run
    from lim_sglang.evals.tasks import find_task
    from lim_sglang.programs.judge import EquivalenceChecker

    num_workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    loaded = [load_run(path) for path in runs]  # what is none is refused before any is graded
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        EquivalenceChecker(num_workers=num_workers) as checker,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        for run in loaded:
            bar = progress.add_task(run.record.run_id, total=len(run.samples))
            kind = find_task(run.record.settings["task"]).answer_kind
            found = grade_run(
                run.path,
                Grader(kind, checker),
                num_threads=num_workers,
                on_graded=partial(_show, progress, bar),
            )
            typer.echo(
                f"{run.path}: {found.num_right} of {found.num_samples} right, "
                f"{found.num_changed} changed"
            )


def _show(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)
