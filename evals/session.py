"""One run from its settings to its samples: planned, opened or resumed, drawn, graded, stored."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.evals.dispatch import Event, Server, ServerLost
from lim_sglang.evals.grade import Grader
from lim_sglang.evals.jobs import Job, open_jobs
from lim_sglang.evals.method import USUAL, Method, complete, in_flight
from lim_sglang.evals.progress import Pace, show_progress
from lim_sglang.evals.questions import Question, load_questions, questions_digest
from lim_sglang.evals.records import Failure, GradedSample
from lim_sglang.evals.run import run_jobs
from lim_sglang.evals.servers import Connection, Facts
from lim_sglang.evals.settings import differences, grading_digest, run_id, run_settings
from lim_sglang.evals.store import RunFolder, RunRecord, open_run
from lim_sglang.evals.tasks import Task
from lim_sglang.programs.records import Sampling
from lim_sglang.programs.sampling import resolve_sampling
from lim_sglang.programs.vote import Equivalent
from lim_sglang.provenance import installed_versions, project_commit

RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class TaskQuestions:
    """The questions of a run."""

    task: Task
    questions: tuple[Question, ...]
    """Those that are asked, in their order."""
    digest: str
    """Of all questions of the task, also those that are not asked."""
    origin: str
    """Where they were read from."""


@dataclass(frozen=True)
class Request:
    """What is to be run."""

    asked: TaskQuestions
    method: Method = USUAL
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that were given; the model's own are taken for the others."""
    out: Path | None = None
    """The run's folder; None: `runs/<id>`."""
    retry_failed: bool = False
    """Whether samples that failed in an earlier session are drawn again."""


@dataclass(frozen=True)
class Plan:
    """A run before anything of it is drawn."""

    request: Request
    """With all options of its program."""
    path: Path
    record: RunRecord
    sampling: Sampling
    parallel: int
    """Samples of one question that are in flight at once."""


@dataclass(frozen=True)
class RunOutcome:
    """What a run has when its command ends."""

    samples: tuple[GradedSample, ...]
    failures: tuple[Failure, ...]
    """Samples that are missing because a living server failed them, now or before."""


def load_asked(task: Task, data_dir: Path | None = None, limit: int | None = None) -> TaskQuestions:
    """The first `limit` questions of a task, all without one.

    Raises:
        DataError: they cannot be read, or rows are no questions.
    """
    everything = load_questions(task, data_dir)
    origin = str(task.file or data_dir or task.hub_id)
    return TaskQuestions(task, tuple(everything[:limit]), questions_digest(everything), origin)


def plan_run(request: Request, servers: Sequence[Facts]) -> Plan:
    """Fix everything that the result depends on.

    Raises:
        ConfigError: an option of the program that it does not have.
        ServerError: the servers differ in something that an answer depends on.
    """
    request = replace(request, method=complete(request.method))
    parallel = min(in_flight(request.method, server.concurrency) for server in servers)
    settings = _settings(request, servers[0], parallel)
    for other in servers[1:]:
        _refuse_disagreement(servers[0].url, settings, other, _settings(request, other, parallel))
    name = run_id(settings)
    return Plan(
        request,
        request.out or RUNS_FOLDER / name,
        RunRecord(name, settings, _about(request, servers)),
        _sampling(request, servers[0]),
        parallel,
    )


def servers_of(
    plan: Plan, connections: Sequence[Connection], equivalent: Equivalent
) -> tuple[Server, ...]:
    """Connected servers as those that a run is drawn from.

    Raises:
        ConfigError: an option of the program cannot be.
    """
    from lim_sglang.evals.draw import ProgramSampler

    return tuple(
        Server(
            facts.url,
            ProgramSampler(
                backend,
                plan.request.method,
                prompt=plan.request.asked.task.prompt,
                sampling=plan.sampling,
                parallel=plan.parallel,
                equivalent=equivalent,
            ),
            check=partial(check_unchanged, plan, facts, backend.server_info),
            close=backend.close,
            concurrency=facts.concurrency,
        )
        for facts, backend in ((each.facts, each.backend) for each in connections)
    )


def execute(
    plan: Plan, servers: Sequence[Server], grader: Grader, *, console: Console
) -> RunOutcome:
    """Draw what the run's folder lacks. `console` shows the progress.

    Raises:
        LimError: the folder holds another run, all servers are gone, or the disk refuses; the text
            says that what is finished is safe, and where.
    """
    with open_run(plan.path, plan.record) as folder:
        jobs = _open_jobs(plan, folder)
        pace = _pace(plan, folder)
        console.print(_opening(plan, folder, pace), highlight=False, soft_wrap=True)
        with show_progress(console, pace) as progress:

            def tell(event: Event) -> None:
                progress.update(event)
                if isinstance(event, ServerLost) and len(servers) > 1:
                    console.print(_farewell(event), highlight=False, soft_wrap=True)

            try:
                run_jobs(
                    *(jobs, servers),
                    grader=grader,
                    folder=folder,
                    in_flight=min(plan.parallel, max((len(j.indices) for j in jobs), default=1)),
                    on_event=tell,
                )
            except ServerError as error:
                raise ServerError(f"{error}\n{how_to_go_on(plan)}") from None
        return RunOutcome(tuple(folder.samples), tuple(folder.failures.values()))


def check_unchanged(
    plan: Plan, server: Facts, server_info: Callable[[], Mapping[str, Any]]
) -> None:
    """Ask a server whether it is still the one that the plan is for.

    Raises:
        ServerError: it is gone, or another one answers in its place.
    """
    try:
        now = replace(server, info=server_info())
    except CancelledError:  # another thread has found out before, and closed the connection
        raise ServerError(f"the connection to {server.url} is closed") from None
    found = list(differences(plan.record.settings, _settings(plan.request, now, plan.parallel)))
    if found:
        lines = "".join(f"\n  - {difference}" for difference in found)
        raise ServerError(f"another server answers at {server.url} by now:{lines}")


def how_to_go_on(plan: Plan) -> str:
    """What to do about a run that did not end."""
    return f"what is finished is safe in {plan.path}; the same command goes on from there"


def _settings(request: Request, server: Facts, parallel: int) -> dict[str, Any]:
    return run_settings(
        request.asked.task,
        request.asked.questions,
        digest=request.asked.digest,
        method=request.method,
        parallel=parallel,
        sampling=_sampling(request, server),
        server_info=server.info,
    )


def _sampling(request: Request, server: Facts) -> Sampling:
    return resolve_sampling(server.sampling_defaults, **request.sampling)


def _refuse_disagreement(
    url: str, settings: Mapping[str, Any], other: Facts, others: Mapping[str, Any]
) -> None:
    found = list(differences(settings, others))
    if found:
        lines = "".join(
            f"\n  - {name} is {json.dumps(here)} at {url} and {json.dumps(there)} at {other.url}"
            for name, here, there in found
        )
        raise ServerError(f"samples of these servers cannot be mixed, since they differ:{lines}")


def _about(request: Request, servers: Sequence[Facts]) -> dict[str, Any]:
    asked = request.asked
    return {
        "commit": project_commit(),
        "client_versions": installed_versions(),
        "grading_sha256": grading_digest(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "urls": [server.url for server in servers],
        "places": [server.concurrency for server in servers],
        "prompt": asked.task.prompt,
        "questions_from": asked.origin,
        "revision": asked.task.revision if asked.origin == asked.task.hub_id else None,
        "known_questions": asked.digest == asked.task.digest,
    }


def _open_jobs(plan: Plan, folder: RunFolder) -> list[Job]:
    request = plan.request
    return open_jobs(
        request.asked.questions,
        request.method.num_samples,
        (graded.key for graded in folder.samples),
        given_up=() if request.retry_failed else folder.failures,
        whole=request.method.stops_by_itself,
    )


def _pace(plan: Plan, folder: RunFolder) -> Pace:
    whole = plan.request.method.stops_by_itself
    num_questions = len(plan.request.asked.questions)
    failed = {key[0] if whole else key for key in folder.failures}
    return Pace(
        num_questions if whole else num_questions * plan.request.method.num_samples,
        folder.samples,
        name=plan.request.asked.task.name,
        by_question=whole,
        num_failed=0 if plan.request.retry_failed else len(failed),
    )


def _opening(plan: Plan, folder: RunFolder, pace: Pace) -> str:
    about = plan.record.about
    is_known = about["known_questions"] or plan.request.asked.task.digest is None
    origin = "" if is_known else ", which are not the questions of this benchmark"
    begun = f"going on at {pace.done} of" if pace.done else "drawing"
    left_out = (
        f"; {pace.failed} that failed before are left out: --retry-failed draws them again"
        if pace.failed
        else ""
    )
    return (
        f"{begun} {pace.total} {pace.unit} in {plan.path}, "
        f"questions from {about['questions_from']}{origin}{left_out}"
    )


def _farewell(gone: ServerLost) -> str:
    return f"{gone.url} is asked no more, and its questions go to the others: {gone.error}"
