"""Several runs on the same servers, one after the other, each with its score: what `lim eval` does.

Also called by `lim sweep`, which starts the servers itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lim_sglang.errors import ConfigError, DataError, LimError
from lim_sglang.evals.grade import READERS, Grader
from lim_sglang.evals.method import USUAL, Method
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.regrade import grade_run
from lim_sglang.evals.runs import GRADES_FILE, load_run
from lim_sglang.evals.servers import Access, Connection, connected
from lim_sglang.evals.session import (
    Plan,
    Request,
    RunOutcome,
    TaskQuestions,
    execute,
    how_to_go_on,
    load_asked,
    plan_run,
    servers_of,
)
from lim_sglang.evals.settings import folder_name, grading_digest
from lim_sglang.evals.store import read_record
from lim_sglang.evals.summary import Summary, summarise
from lim_sglang.evals.tasks import find_task
from lim_sglang.programs.judge import EquivalenceChecker

NUM_GRADING = 2
"""Verdicts at a time: as many as the judge has workers."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be run, before a server is known. Each task has a run of its own."""

    tasks: tuple[str, ...]
    method: Method = USUAL
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that were given."""
    limit: int | None = None
    """Questions of each task, the first ones; None: all."""
    data_dir: Path | None = None
    """Folder with `<task>.jsonl`; None: the hub."""
    out: Path | None = None
    """The run's folder, of several tasks the folder of theirs; None: `runs/<id>`."""
    retry_failed: bool = False


@dataclass(frozen=True)
class Finished:
    """A run whose command has come to its end."""

    plan: Plan
    outcome: RunOutcome
    summary: Summary | None
    """None where no sample is there."""


def run_evaluation(
    evaluation: Evaluation,
    urls: Sequence[str],
    access: Access,
    console: Console,
    on_finished: Callable[[Finished], object] = lambda _: None,
) -> list[Finished]:
    """Draw what is missing of each task.

    Args:
        urls: of the servers.
        console: shows the progress.
        on_finished: told of each run as it ends.

    Raises:
        LimError: what cannot be is refused before anything is drawn. Where all servers are gone or
            the disk refuses, what is finished is safe. Samples that a living server failed are in
            the outcome instead.
    """
    everything = load_all(evaluation)
    method = evaluation.method
    finished = []
    with (
        connected(
            *(urls, access, console),
            thinking=method.thinking,
            thinking_budget=method.thinking_budget,
        ) as connections,
        EquivalenceChecker() as checker,
    ):
        if any(asked.task.answer_kind not in READERS for asked in everything):
            checker.warm_up()
        facts = [connection.facts for connection in connections]
        plans = [plan_run(_request(evaluation, asked), facts) for asked in everything]
        for plan in plans:
            grader = Grader(plan.request.asked.task.answer_kind, checker)
            finished.append(_run(plan, connections, grader, console))
            on_finished(finished[-1])
    return finished


def load_all(evaluation: Evaluation) -> list[TaskQuestions]:
    """The questions of all tasks.

    Raises:
        LimError: a task is unknown or named twice, or its questions cannot be read; all that is
            wrong is named at once.
    """
    twice = {name for name in evaluation.tasks if evaluation.tasks.count(name) > 1}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is named twice: name each task once")
    everything: list[TaskQuestions] = []
    problems: list[LimError] = []
    for name in evaluation.tasks:
        try:
            everything.append(load_asked(find_task(name), evaluation.data_dir, evaluation.limit))
        except LimError as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError("\n".join(map(str, problems)))
    return everything


def _request(evaluation: Evaluation, asked: TaskQuestions) -> Request:
    out = evaluation.out
    if out and len(evaluation.tasks) > 1:
        out /= folder_name(asked.task.name)
    return Request(
        asked,
        evaluation.method,
        evaluation.sampling,
        out=out,
        retry_failed=evaluation.retry_failed,
    )


def _run(
    plan: Plan, connections: Sequence[Connection], grader: Grader, console: Console
) -> Finished:
    servers = servers_of(plan, connections, grader.equivalent)
    with _told_how_to_go_on(plan, console):
        outcome = execute(plan, servers, grader, console=console)
        samples = _of_one_version(plan, outcome.samples, grader, console)
    num_failed = len(outcome.failures)
    summary = summarise(plan.record, samples, grader.equivalent, num_failed) if samples else None
    return Finished(plan, outcome, summary)


def _of_one_version(
    plan: Plan, samples: tuple[GradedSample, ...], grader: Grader, console: Console
) -> tuple[GradedSample, ...]:
    """The samples with the verdicts of this version of the grader, all of them renewed where
    another one has judged some.
    """
    began_with = read_record(plan.path).about.get("grading_sha256")
    if began_with == grading_digest() and not (plan.path / GRADES_FILE).exists():
        return samples
    found = grade_run(plan.path, grader, num_threads=NUM_GRADING)
    console.print(
        f"verdicts of another version were renewed, as lim grade does: {found.num_changed} changed",
        highlight=False,
        soft_wrap=True,
    )
    return load_run(plan.path).samples


@contextmanager
def _told_how_to_go_on(plan: Plan, console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted; {how_to_go_on(plan)}", highlight=False, soft_wrap=True)
        raise
