"""A run from its configuration to its summary: load the questions, connect to the servers, plan,
open or resume the run's folder, generate, grade and store the missing samples, and summarise.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from lim_sglang.config import Drafts
from lim_sglang.environment import installed_versions, project_commit
from lim_sglang.errors import ConfigError, DataError, LimError, ServerError, bullets
from lim_sglang.evals.grading import GRADING_VERSION, Grader, grade_run, graded_by
from lim_sglang.evals.metrics import Summary, summarise
from lim_sglang.evals.run_config import RunConfig, run_id, run_settings, server_settings
from lim_sglang.evals.run_store import (
    AskedQuestion,
    Failure,
    GradedSample,
    Run,
    RunFolder,
    RunRecord,
    load_run,
    open_run,
    read_grades,
    read_record,
    write_questions,
)
from lim_sglang.evals.scheduler import (
    Event,
    InFlight,
    Server,
    ServerLost,
    remaining_jobs,
    requests_at_a_time,
    sample_jobs,
)
from lim_sglang.evals.servers import Connection, ProgramSampler, ServerFacts, connected
from lim_sglang.evals.settings import differences
from lim_sglang.evals.tasks import (
    Origin,
    Question,
    Task,
    find_task,
    load_questions,
    question_origin,
    questions_source,
    task_title,
)
from lim_sglang.markdown_section import counted
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    Access,
    Sampling,
    copies_note,
    resolve_sampling,
)
from lim_sglang.programs.vote import Equivalent
from lim_sglang.progress import (
    fitting,
    print_plain,
    rate,
    shortened,
    show_progress,
    time_left,
    waiting,
)

RUNS_FOLDER = Path("runs")
BAR_WIDTH = 22
"""Columns that a terminal's bar, percentage and time take beside the progress in words."""
ROOM = {"failed": 8, "left": 11, "right": 12, "running": 10, "speed": 14}
"""Columns kept for each figure on a terminal, the most important first: a figure is left out by
this room, not by its digits of the moment, so that none comes and goes."""
NAME_WIDTH = 12
"""Columns of a task's name on a terminal; a longer name takes those that no figure may need."""
NUM_GRADING_THREADS = 2
"""Verdicts computed at the same time: the number of the checker's workers."""


@dataclass(frozen=True)
class RunPlan:
    """A run whose questions are read and whose servers have answered; nothing is sampled yet."""

    config: RunConfig
    task: Task
    questions: tuple[Question, ...]
    """Questions of the run, in their order."""
    sampling: Sampling
    parallel: int
    """Samples of one question in flight."""
    record: RunRecord
    path: Path


@dataclass(frozen=True)
class FinishedRun:
    """A run at the end of its command; samples may be missing because their server failed them."""

    run: Run
    summary: Summary | None
    """None: the run has no sample."""


def load_benchmarks(configs: Sequence[RunConfig], console: Console) -> dict[str, list[Question]]:
    """Load all questions of each task, by the task's name in the configs.

    Args:
        console: is told which questions come from the hub, before the wait.

    Raises:
        ConfigError: unknown tasks, or files that do not exist; every problem is named.
        DataError: questions that cannot be read; every problem is named.
    """
    benchmarks: dict[str, list[Question]] = {}
    problems: dict[str, LimError] = {}
    for config in configs:
        if config.task not in benchmarks and config.task not in problems:
            try:
                task = find_task(config.task)
                is_from_hub = questions_source(task, config.data_dir) == task.hub_id
                opening = f"loading {task.name} from the hub: {task.hub_id}"
                with waiting(console, opening) if is_from_hub else nullcontext():
                    benchmarks[config.task] = load_questions(task, config.data_dir)
            except (ConfigError, DataError) as problem:
                problems[config.task] = problem
    if problems:
        is_misnamed = any(isinstance(problem, ConfigError) for problem in problems.values())
        text = "\n".join(map(str, problems.values()))
        raise ConfigError(text) if is_misnamed else DataError(text)
    return benchmarks


def complete_runs(
    configs: Sequence[RunConfig],
    benchmarks: Mapping[str, Sequence[Question]],
    urls: Sequence[str],
    access: Access,
    console: Console,
    on_finished: Callable[[FinishedRun], object] = lambda _: None,
) -> list[FinishedRun]:
    """Complete several runs on the same servers, one after the other.

    Args:
        benchmarks: questions by task; see `load_benchmarks`.
        on_finished: called with each run as it ends.

    Raises:
        LimError: see `complete_run`.
    """
    finished = []
    with EquivalenceChecker() as checker:
        for config in configs:
            benchmark = benchmarks[config.task]
            finished.append(complete_run(config, benchmark, urls, access, checker, console))
            on_finished(finished[-1])
    return finished


def complete_run(
    config: RunConfig,
    benchmark: Sequence[Question],
    urls: Sequence[str],
    access: Access,
    checker: EquivalenceChecker,
    console: Console,
) -> FinishedRun:
    """Generate, grade and store the samples that a run is missing, and summarise the run.

    Args:
        benchmark: all questions of the task.
        urls: addresses of the servers; all must serve the same.
        console: shows the progress.

    Raises:
        LimError: impossible options, servers that differ or do not answer, and a folder of another
            run are refused before anything is sampled. Where all servers are lost or the disk is
            full, finished samples are safe. Samples that a living server failed are no error.
    """
    access = replace(access, thinking=config.thinking, thinking_budget=config.thinking_budget)
    with connected(urls, access, console) as connections:
        plan = plan_run(config, benchmark, [each.facts for each in connections])
        if plan.task.answer_kind is AnswerKind.EXPRESSION:
            checker.warm_up()
        grader = Grader(plan.task.answer_kind, checker)
        servers = [server_of(plan, each, grader.equivalent) for each in connections]
        with _resume_hint(plan, console):
            run = sample_missing(plan, servers, grader, console)
            return finish_run(run, grader, console)


def plan_run(
    config: RunConfig, benchmark: Sequence[Question], servers: Sequence[ServerFacts]
) -> RunPlan:
    """Fix everything that the result depends on.

    Raises:
        ServerError: the servers differ in a setting that an answer depends on.
    """
    task = find_task(config.task)
    parallel = min(config.samples_in_flight(server.concurrency) for server in servers)
    samplings = [resolve_sampling(each.sampling_defaults, **config.sampling) for each in servers]
    settings, *others = (
        run_settings(
            config,
            task,
            benchmark,
            parallel=parallel,
            sampling=sampling,
            server_info=server.info,
        )
        for server, sampling in zip(servers, samplings, strict=True)
    )
    for server, other in zip(servers[1:], others, strict=True):
        _refuse_disagreement(servers[0].url, settings, server.url, other)
    about = _about(config, task, benchmark, servers)
    name = run_id(settings, task_title(task.name, about["origin"]))
    return RunPlan(
        config=config,
        task=task,
        questions=tuple(benchmark[: config.limit]),
        sampling=samplings[0],
        parallel=parallel,
        record=RunRecord(name, settings, about),
        path=config.out or RUNS_FOLDER / name,
    )


def _refuse_disagreement(
    url: str, settings: Mapping[str, Any], other_url: str, other_settings: Mapping[str, Any]
) -> None:
    found = list(differences(settings, other_settings))
    if found:
        lines = bullets(
            f"{name} is {json.dumps(here)} at {url} and {json.dumps(there)} at {other_url}"
            for name, here, there in found
        )
        raise ServerError(f"samples of these servers cannot be mixed, since they differ:{lines}")


def _about(
    config: RunConfig, task: Task, benchmark: Sequence[Question], servers: Sequence[ServerFacts]
) -> dict[str, Any]:
    source = questions_source(task, config.data_dir)
    is_from_hub = source == task.hub_id
    return {
        "commit": project_commit(),
        "client_versions": installed_versions(),
        "grading_version": GRADING_VERSION,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "urls": [server.url for server in servers],
        "concurrency": [server.concurrency for server in servers],
        **({"served": config.served} if config.served else {}),
        "prompt": task.prompt,
        "questions_from": source,
        "revision": task.revision if is_from_hub else None,
        "origin": question_origin(task, benchmark, from_hub=is_from_hub),
        # By mark: gold answers that stood behind it in a whole solution.
        "answers_behind": dict(Counter(q.answer_behind for q in benchmark if q.answer_behind)),
    }


def server_of(plan: RunPlan, connection: Connection, equivalent: Equivalent) -> Server:
    """Return a connected server as the scheduler needs it."""
    backend = connection.backend
    sampler = ProgramSampler(
        backend,
        plan.config,
        prompt=plan.task.prompt,
        sampling=plan.sampling,
        parallel=plan.parallel,
        equivalent=equivalent,
    )
    return Server(
        connection.facts.url,
        sampler,
        check=partial(check_unchanged, plan, connection.facts.url, backend.server_info),
        close=backend.close,
        concurrency=connection.facts.concurrency,
        in_flight=sampler.in_flight,
        drafts=backend.drafts,
    )


def check_unchanged(plan: RunPlan, url: str, server_info: Callable[[], Mapping[str, Any]]) -> None:
    """Check that the server that the run was planned for still answers.

    Raises:
        ServerError: the server is gone, or another one answers in its place.
    """
    try:
        now = server_settings(server_info(), plan.sampling)
    except CancelledError:  # another thread saw the loss first and closed the connection
        raise ServerError(f"the connection to {url} is closed") from None
    planned = plan.record.settings
    found = list(differences(planned, {**planned, **now}))
    if found:
        raise ServerError(f"another server answers at {url} by now:{bullets(found)}")


def sample_missing(
    plan: RunPlan, servers: Sequence[Server], grader: Grader, console: Console
) -> Run:
    """Generate, grade and store the samples that the run's folder is missing.

    Raises:
        LimError: the folder holds another run, all servers are lost, or the disk is full; finished
            samples are safe, and the message says where.
    """
    config = plan.config
    with open_run(plan.path, plan.record, plan.questions) as folder:
        if plan.task.may_be_shown:
            asked = {q.question_id: AskedQuestion(q.gold, q.text) for q in plan.questions}
            write_questions(plan.path, asked)
        jobs = remaining_jobs(
            plan.questions,
            config.samples_per_question,
            (graded.key for graded in folder.samples),
            given_up=() if config.retry_failed else folder.failures,
            all_or_nothing=config.stops_early,
        )
        drafted = [each.drafts() for each in servers if jobs]
        in_flight = min(plan.parallel, max((len(job.indices) for job in jobs), default=1))
        if jobs:
            folder.begin_session(requests_at_a_time(jobs, servers, in_flight))
        progress = RunProgress(plan, folder, servers)
        print_plain(console, _opening(plan, progress))
        if copies := copies_note(asdict(plan.sampling), config.samples_per_question):
            print_plain(console, f"warning: {copies}")

        def describe() -> str:
            return progress.describe(console.width - BAR_WIDTH if console.is_terminal else None)

        with (
            show_progress(
                console,
                progress.total,
                describe(),
                completed=progress.done,
                refresh=describe,
            ) as show,
            closing(sample_jobs(jobs, servers, grader, in_flight=in_flight)) as events,
        ):
            try:
                for event in events:
                    if isinstance(event, Failure):
                        folder.append_failure(event)
                    elif not isinstance(event, ServerLost):
                        folder.append(*event)
                    elif len(servers) > 1:
                        print_plain(console, f"{event.url} gets no more questions: {event.error}")
                    progress.count(event)
                    show(progress.done, describe())
            except ServerError as error:
                raise ServerError(f"{error}\n{_how_to_resume(plan)}") from None
            finally:
                _record_drafts(folder, servers, drafted, console)
        record = read_record(plan.path)
        return Run(plan.path, record, tuple(folder.samples), tuple(folder.failures.values()))


def _record_drafts(
    folder: RunFolder, servers: Sequence[Server], before: Sequence[Drafts | None], console: Console
) -> None:
    """Store and show what the servers have drafted in a session; nothing where none drafts."""
    now = (each.drafts() for each in servers)
    found = [after.since(first) for first, after in zip(before, now, strict=False) if after]
    if found:
        total = sum(found, Drafts())
        folder.add_to_session({"drafts": total.counts()})
        print_plain(console, total.describe())


class RunProgress:
    """Counts of a run, and the speed of this session.

    Samples are counted, or, where the program stops by itself, questions.
    """

    def __init__(
        self,
        plan: RunPlan,
        folder: RunFolder,
        servers: Sequence[Server] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at the samples that are stored already.

        Args:
            servers: generate the samples in flight.
        """
        self._servers = servers
        self._by_question = plan.config.stops_early
        self._parallel = plan.parallel
        self._max_tokens = plan.sampling.max_tokens
        samples = folder.samples
        failed = {key[0] if self._by_question else key for key in folder.failures}
        num_each = 1 if self._by_question else plan.config.samples_per_question
        self.total = len(plan.questions) * num_each
        self.done = (
            len({graded.question_id for graded in samples}) if self._by_question else len(samples)
        )
        self.num_failed = 0 if plan.config.retry_failed else len(failed)
        self.unit = "questions" if self._by_question else "samples"
        self._task = plan.task.name
        self._title = task_title(plan.task.name, plan.record.about["origin"])
        self._num_right = self._num_judged = 0
        self._count_verdicts(samples)
        self._ended_s: list[float] = []
        """Seconds of each sample, or question, that has ended in this session."""
        self._new_tokens = 0
        self._clock = clock
        self._start_s = clock()

    def count(self, event: Event) -> None:
        """Count samples that arrived together, or a failure."""
        if isinstance(event, Failure):
            self.num_failed += 1
        elif not isinstance(event, ServerLost):
            seconds = [graded.sample.latency_s for graded in event]
            if self._by_question:
                seconds = [max(max(seconds), sum(seconds) / self._parallel)]
            self.done += len(seconds)
            self._ended_s += seconds
            self._new_tokens += sum(graded.sample.num_tokens for graded in event)
            self._count_verdicts(event)

    def describe(self, width: int | None = None) -> str:
        """Return amount done, accuracy so far, samples in flight, tokens per second, time left (the
        tokens until a sample has ended) and failures; called from any thread.

        Args:
            width: columns of a terminal's line, which the least important figures do not enter
                where it is too short; None: all are told.
        """
        figures = self._figures()
        if width is None:
            done = f"{self._title}: {self.done}/{self.total} {self.unit}"
            return ", ".join([done, *figures.values()])
        if "left" in figures:
            figures["left"] = figures["left"].removeprefix("about ").partition(", ")[0]
        done = f": {self.done:{len(str(self.total))}}/{self.total}"
        unused = width - len(done) - sum(room + len(", ") for room in ROOM.values())
        name = shortened(self._task, max(NAME_WIDTH, unused))
        return ", ".join([name + done, *fitting(figures, ROOM, width - cell_len(name + done))])

    def _figures(self) -> dict[str, str]:
        """Return the figures that are known, in words, under the names of `ROOM`."""
        figures = {}
        if self._num_judged:
            of = " of samples" if self._by_question else ""
            figures["right"] = f"{100 * self._num_right / self._num_judged:.1f} %{of} right"
        in_flight = [server.in_flight() for server in self._servers]
        if num_running := sum(each.num_samples for each in in_flight):
            unit = f" {'sample' if num_running == 1 else 'samples'}" if self._by_question else ""
            figures["running"] = f"{num_running:,}{unit} running"
        elapsed_s = self._clock() - self._start_s
        running_s = [seconds for each in in_flight for seconds in each.running_s]
        num_tokens = self._new_tokens + self._running_tokens(in_flight, running_s)
        if num_tokens and elapsed_s > 0:
            figures["speed"] = f"{rate(num_tokens, elapsed_s)} tokens/s"
        if self._ended_s:
            figures["left"] = self._time_left(running_s, num_tokens)
        elif num_tokens:  # a bound by the token limit would stand still
            figures["left"] = f"{num_tokens:,.0f} tokens"
        if self.num_failed:
            figures["failed"] = f"{self.num_failed} failed"
        return {name: text for name, text in figures.items() if text}

    def _time_left(self, running_s: Sequence[float], num_tokens: float) -> str:
        """Return the time left in words, once a sample has ended; empty at the end."""
        num_left = self.total - self.done - self.num_failed
        if num_left <= 0:
            return ""
        return time_left(
            self._ended_s,
            running_s,
            max(num_left - len(running_s), 0),
            num_tokens=num_tokens,
            spent_s=sum(self._ended_s) + sum(running_s),
            max_tokens=math.inf if self._by_question else self._max_tokens,
        )

    def _running_tokens(self, in_flight: Sequence[InFlight], running_s: Sequence[float]) -> float:
        """Return the tokens of the samples in flight so far: counted where they are streamed, else
        at the speed of the samples that have ended.
        """
        counted_tokens = sum(each.num_tokens for each in in_flight)
        if counted_tokens or self._by_question or not self._ended_s:
            return counted_tokens
        return self._new_tokens / max(sum(self._ended_s), 1e-3) * sum(running_s)

    def _count_verdicts(self, samples: Sequence[GradedSample]) -> None:
        """Count samples that ended by themselves; an aborted one is neither right nor wrong."""
        completed = [graded for graded in samples if graded.sample.state in COMPLETED_STATES]
        self._num_judged += len(completed)
        self._num_right += sum(graded.correct for graded in completed)


ORIGIN_NOTES = {
    Origin.PUBLISHED: "",
    Origin.OWN: ", which are not the questions and answers of this benchmark",
    Origin.UNVERIFIED: ", of which only the number is known to be this benchmark's",
}


def _opening(plan: RunPlan, progress: RunProgress) -> str:
    about = plan.record.about
    note = "" if plan.task.file else ORIGIN_NOTES[about["origin"]]
    solutions = "".join(
        f"\nquestions whose reference answer is what "
        f"{'follows #### in' if mark == '####' else f'the last {mark} holds of'} "
        f"a whole solution: {count}"
        for mark, count in about["answers_behind"].items()
    )
    begun = f"resuming at {progress.done} of" if progress.done else "sampling"
    left_out = (
        f"; {progress.num_failed} that failed before are left out: --retry-failed tries them again"
        if progress.num_failed
        else ""
    )
    return (
        f"{begun} {counted(progress.total, progress.unit.removesuffix('s'))} in {plan.path}, "
        f"questions from {about['questions_from']}{note}{left_out}{solutions}"
    )


def finish_run(run: Run, grader: Grader, console: Console) -> FinishedRun:
    """Return a stored run with its score, by verdicts of this version of the grader."""
    current = _with_current_verdicts(run, grader, console)
    return FinishedRun(current, _summarise(current, grader))


def _with_current_verdicts(run: Run, grader: Grader, console: Console) -> Run:
    """Return the run with all verdicts by this version of the grader, renewed where needed.

    Verdicts of `grades.jsonl` name what gave them. Those of other samples are of the version with
    which the run began, or of a later one.
    """
    grades = read_grades(run.path)
    began_with = run.record.about.get("grading_version")
    is_current = {verdict.by == graded_by() for verdict in grades.values()}
    if any(graded.key not in grades for graded in run.samples):
        is_current.add(began_with == GRADING_VERSION)
    if all(is_current):
        return load_run(run.path) if grades else run
    result = grade_run(load_run(run.path), grader, num_threads=NUM_GRADING_THREADS)
    print_plain(
        console,
        f"verdicts of another version were renewed, as by lim grade: {result.num_changed} changed",
    )
    return load_run(run.path)


def describe_failures(failures: Sequence[Failure]) -> str:
    """Return the number of failed samples and the last reason."""
    return f"{counted(len(failures), 'sample')} failed, the last with: {failures[-1].error}"


def _summarise(run: Run, grader: Grader) -> Summary | None:
    if not run.samples:
        return None
    return summarise(run.record, run.samples, grader.equivalent, len(run.failures))


@contextmanager
def _resume_hint(plan: RunPlan, console: Console) -> Iterator[None]:
    """On Ctrl-C, print how to resume the run; the exception has the words that were printed."""
    try:
        yield
    except KeyboardInterrupt:
        told = f"interrupted; {_how_to_resume(plan)}"
        print_plain(console, told)
        raise KeyboardInterrupt(told) from None


def _how_to_resume(plan: RunPlan) -> str:
    return f"finished samples are safe in {plan.path}; the same command resumes the run"
