"""Several runs on the same servers, one after the other: each planned, opened or resumed, sampled,
graded, stored and scored. What `lim eval` does.
"""

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lim_sglang.environment import installed_versions, project_commit
from lim_sglang.errors import ConfigError, DataError, LimError, ServerError
from lim_sglang.evals.grading import GRADING_VERSION, READERS, Grader
from lim_sglang.evals.metrics import Summary, summarise
from lim_sglang.evals.progress import Pace, show_progress
from lim_sglang.evals.regrade import grade_run
from lim_sglang.evals.run_config import (
    USUAL,
    Method,
    complete,
    differences,
    folder_name,
    in_flight,
    run_id,
    run_settings,
)
from lim_sglang.evals.run_store import (
    GRADES_FILE,
    Failure,
    GradedSample,
    RunFolder,
    RunRecord,
    load_run,
    open_run,
    read_record,
)
from lim_sglang.evals.scheduler import (
    Deliver,
    Event,
    Job,
    SampleResult,
    Server,
    ServerLost,
    open_jobs,
    stream,
)
from lim_sglang.evals.servers import Connection, Facts, connected
from lim_sglang.evals.tasks import Question, Task, find_task, load_questions, questions_digest
from lim_sglang.programs.equivalence import EquivalenceChecker
from lim_sglang.programs.program import Outcome, find_program, run_program
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    Access,
    Sample,
    SampleState,
    Sampling,
    SamplingRequest,
    ask_messages,
    resolve_sampling,
)
from lim_sglang.programs.vote import Equivalent


def run_jobs(
    jobs: Sequence[Job],
    servers: Sequence[Server],
    *,
    grader: Grader,
    folder: RunFolder,
    in_flight: int,
    on_event: Callable[[Event], object] = lambda _: None,
) -> None:
    """Draw, grade and store.

    Args:
        in_flight: samples of one question that are drawn at the same time.
        on_event: told of samples and failures once they are safe, and of servers that are gone.

    Raises:
        LimError: all servers are gone or the disk refuses; what was finished before is stored.
    """
    with closing(stream(jobs, servers, grader, in_flight=in_flight)) as events:
        for event in events:
            if isinstance(event, Failure):
                folder.append_failure(event)
            elif not isinstance(event, ServerLost):
                folder.append(*event)
            on_event(event)


class ProgramSampler:
    """Draws jobs with one program on one server, from any number of threads."""

    def __init__(
        self,
        backend: "Backend",
        method: Method,
        *,
        prompt: str,
        sampling: Sampling,
        parallel: int,
        equivalent: Equivalent,
    ) -> None:
        """Asks the server for nothing but whether it honours seeds.

        Args:
            prompt: of the task.
            parallel: samples of one question in flight.
            same: whether two answers share a vote.

        Raises:
            ConfigError: an option of the program or the prompt cannot be.
        """
        self._backend = backend
        self._method = method
        self._program = find_program(method.program)
        self._prompt = prompt
        self._sampling = sampling
        self._parallel = parallel
        # Votes are counted when the run is scored; only what stops by itself looks at them now.
        self._equivalent: Equivalent = equivalent if method.stops_by_itself else operator.eq
        self._seeds_honoured = sampling.seed is not None and backend.honours_seeds
        self._run("", ())

    def __call__(self, job: Job, deliver: Deliver) -> None:
        """Draw what a job lacks. Where a delivery is not wanted any more, the rest is aborted."""
        begun: list[SamplingRun] = []

        def tell(sample: Sample) -> None:
            is_news = not self._method.stops_by_itself or sample.state is SampleState.FAILED
            if is_news and not deliver(SampleResult(sample)):
                begun[0].abandon()

        outcome = self._run(job.question.text, job.indices, on_sample=tell, on_begin=begun.append)
        if self._method.stops_by_itself:
            deliver(*self._settled(outcome, begun[0]))

    def _settled(self, outcome: Outcome, run: "SamplingRun") -> Iterator[SampleResult]:
        """The samples of a question that has come to its end."""
        heard = {sample.index for sample in run.voters}
        for sample in outcome.samples:
            unheard = self._program.finished_only and sample.state is SampleState.TRUNCATED
            late = sample.state in COMPLETED_STATES and (sample.index not in heard or unheard)
            yield SampleResult(sample, late)

    def _run(
        self,
        text: str,
        indices: Sequence[int],
        *,
        on_sample: Callable[[Sample], None] = lambda _: None,
        on_begin: "Callable[[SamplingRun], None]" = lambda _: None,
    ) -> Outcome:
        question = SamplingRequest(
            ask_messages(text, template=self._prompt, system=self._method.system),
            self._sampling,
            parallel=self._parallel,
            streamed=self._program.streamed,
            seeds_honoured=self._seeds_honoured,
        )
        options: dict[str, Any] = dict(self._method.options)
        return run_program(
            *(self._program, self._backend, question),
            indices=indices,
            equivalent=self._equivalent,
            options=options,
            on_sample=on_sample,
            on_begin=on_begin,
        )


if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend
    from lim_sglang.programs.sampler import SamplingRun

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
        "grading_version": GRADING_VERSION,
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
            urls,
            replace(access, thinking=method.thinking, thinking_budget=method.thinking_budget),
            console,
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
    began_with = read_record(plan.path).about.get("grading_version")
    if began_with == GRADING_VERSION and not (plan.path / GRADES_FILE).exists():
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
