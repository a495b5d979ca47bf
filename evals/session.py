"""One run from its settings to its samples: planned, opened or resumed, drawn, graded, stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.evals.grade import Grader
from lim_sglang.evals.progress import Pace, show_progress
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.run import Draw, count_workers, open_jobs, run_jobs
from lim_sglang.evals.settings import run_id, run_settings
from lim_sglang.evals.store import RunRecord, open_run
from lim_sglang.evals.tasks import Question, Task, load_questions, questions_digest
from lim_sglang.programs.prompts import MATH_PROMPT
from lim_sglang.programs.records import Sample, Sampling
from lim_sglang.provenance import installed_versions, project_commit

RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    task: Task
    num_samples: int
    sampling: Sampling
    limit: int | None = None
    data_dir: Path | None = None
    out: Path | None = None
    """The run's folder; None: `runs/<id>`."""
    concurrency: int = 64
    """Requests in flight at once."""


@dataclass(frozen=True)
class Plan:
    """A run before anything of it is drawn."""

    questions: tuple[Question, ...]
    num_samples: int
    path: Path
    record: RunRecord


@dataclass(frozen=True)
class Outcome:
    """What a run has when its command ends."""

    samples: tuple[GradedSample, ...]
    failed: tuple[Sample, ...]
    """Samples that the server failed in this session; they are not among `samples`."""


def plan_run(request: Request, server_info: Mapping[str, Any], url: str) -> Plan:
    """Load the questions and fix everything that the result depends on.

    Raises:
        DataError: the questions cannot be loaded.
    """
    everything = load_questions(request.task, request.data_dir)
    digest = questions_digest(everything)
    questions = tuple(everything[: request.limit])
    settings = run_settings(
        request.task,
        questions,
        digest=digest,
        num_samples=request.num_samples,
        sampling=request.sampling,
        prompt=MATH_PROMPT,
        server_info=server_info,
    )
    about = {
        "commit": project_commit(),
        "client_versions": installed_versions(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": url,
        "questions_from": str(request.data_dir) if request.data_dir else request.task.hub_id,
        "known_questions": digest == request.task.digest,
        "concurrency": request.concurrency,
    }
    name = run_id(settings)
    path = request.out or RUNS_FOLDER / name
    return Plan(questions, request.num_samples, path, RunRecord(name, settings, about))


def execute(
    plan: Plan,
    draw: Draw,
    grader: Grader,
    *,
    concurrency: int,
    check_server: Callable[[], object],
    console: Console,
) -> Outcome:
    """Draw what the run's folder lacks. `console` shows the progress.

    Raises:
        LimError: the folder holds another run, the server is gone, or the disk refuses; the text
            says that what is finished is safe, and where.
    """
    total = len(plan.questions) * plan.num_samples
    with open_run(plan.path, plan.record) as folder:
        jobs = open_jobs(plan.questions, plan.num_samples, (g.key for g in folder.samples))
        pace = Pace(total, folder.samples)
        console.print(_opening(plan, len(folder.samples), total), highlight=False, soft_wrap=True)
        try:
            with show_progress(console, pace) as progress:
                failed = run_jobs(
                    jobs,
                    draw,
                    grader=grader,
                    folder=folder,
                    num_workers=count_workers(jobs, concurrency),
                    check_server=check_server,
                    on_sample=progress.update,
                )
        except ServerError as error:
            raise ServerError(f"{error}\n{how_to_go_on(plan)}") from None
        return Outcome(tuple(folder.samples), tuple(failed))


def how_to_go_on(plan: Plan) -> str:
    """What to do about a run that did not end."""
    return f"what is finished is safe in {plan.path}; the same command goes on from there"


def _opening(plan: Plan, num_there: int, total: int) -> str:
    about = plan.record.about
    origin = "" if about["known_questions"] else ", which are not the questions of this benchmark"
    begun = f"going on at {num_there} of" if num_there else "drawing"
    return (
        f"{begun} {total} samples in {plan.path}, questions from {about['questions_from']}{origin}"
    )
