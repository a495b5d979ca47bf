"""Scheduling: what is left of a run, servers that have room, servers that are lost, failures."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from lim_sglang.errors import ServerError
from lim_sglang.evals.grading import Grader
from lim_sglang.evals.run_store import Failure, Key
from lim_sglang.evals.scheduler import (
    Event,
    Job,
    SampleResult,
    SampleSink,
    Scheduler,
    Server,
    ServerLost,
    max_jobs_in_flight,
    remaining_jobs,
    requests_at_a_time,
    sample_jobs,
)
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import SampleState
from tests.builders import TextEquivalence, make_sample
from tests.fakes.job_server import FailingServer, JobServer

NUM_SAMPLES = 2
QUESTIONS = [Question(str(n), "?", "1") for n in range(30)]
GRADER = Grader(AnswerKind.EXPRESSION, TextEquivalence())


def jobs(count: int, *, all_or_nothing: bool = False) -> list[Job]:
    return [Job(question, (0, 1), all_or_nothing) for question in QUESTIONS[:count]]


def run(
    todo: list[Job], *servers: JobServer, on_event: Callable[[list[Event]], object] = len
) -> list[Event]:
    """Return every event of the jobs; `on_event` gets those so far after each."""
    known = [each.as_server(NUM_SAMPLES) for each in servers]
    events: list[Event] = []
    for event in sample_jobs(todo, known, GRADER, in_flight=NUM_SAMPLES):
        events.append(event)
        on_event(events)
    return events


def run_on(sample: Callable[[Job, SampleSink], object], todo: list[Job]) -> list[Event]:
    """Return every event of jobs on one server that never dies."""
    server = Server("http://here", sample, lambda: None, concurrency=NUM_SAMPLES)
    return list(sample_jobs(todo, [server], GRADER, in_flight=NUM_SAMPLES))


def keys(events: list[Event]) -> Counter[Key]:
    samples = [graded for event in events if isinstance(event, tuple) for graded in event]
    return Counter(graded.key for graded in samples)


def every_key_once(count: int) -> dict[Key, int]:
    return {(str(n), index): 1 for n in range(count) for index in range(NUM_SAMPLES)}


def taken(scheduler: Scheduler, count: int) -> list[tuple[str, str]]:
    """Return question and server of the next jobs."""
    tasks = [scheduler.take() for _ in range(count)]
    return [(job.question.question_id, server.url) for job, server in filter(None, tasks)]


def test_only_missing_samples_are_left_in_the_order_of_the_questions() -> None:
    done = [("0", 0), ("0", 1), ("0", 2), ("2", 1)]
    left = remaining_jobs(QUESTIONS[:4], 3, done, given_up=[("2", 0), ("3", 1)])
    assert left == [
        Job(QUESTIONS[1], (0, 1, 2)),
        Job(QUESTIONS[2], (2,)),
        Job(QUESTIONS[3], (0, 2)),
    ]
    # A question of all or nothing is done, or starts anew.
    left = remaining_jobs(QUESTIONS[:3], 40, [("0", 5)], given_up=[("1", 7)], all_or_nothing=True)
    assert left == [Job(QUESTIONS[2], tuple(range(40)), all_or_nothing=True)]


@pytest.mark.parametrize(
    ("concurrency", "in_flight", "all_or_nothing", "expected"),
    [
        (64, 1, False, 128),
        (64, 4, False, 32),
        (1, 16, False, 2),
        (64, 64, False, 2),
        (64, 8, True, 8),
        (64, 40, True, 1),
        (4, 8, True, 1),
    ],
)
def test_a_server_gets_as_many_jobs_as_fill_it(
    concurrency: int, in_flight: int, all_or_nothing: bool, expected: int
) -> None:
    found = max_jobs_in_flight(concurrency, in_flight, all_or_nothing=all_or_nothing)
    assert found == expected


@pytest.mark.parametrize(
    ("rooms", "num_jobs", "in_flight", "all_or_nothing", "expected"),
    [
        ((16,), 30, 2, False, 16),
        ((64,), 3, 2, False, 6),
        ((64,), 3, 1, False, 3),
        ((16, 8), 30, 2, False, 12),
        ((4, 4), 2, 2, False, 2),
        ((5,), 30, 2, True, 4),
        ((64,), 3, 2, True, 6),
        ((1,), 3, 2, True, 1),
    ],
)
def test_each_server_is_sent_no_more_requests_than_there_are_samples(
    rooms: tuple[int, ...], num_jobs: int, in_flight: int, all_or_nothing: bool, expected: int
) -> None:
    servers = [JobServer(str(n)).as_server(room) for n, room in enumerate(rooms)]
    waiting = [replace(job, all_or_nothing=all_or_nothing) for job in jobs(num_jobs)]
    assert requests_at_a_time(waiting, servers, in_flight) == expected


def test_servers_with_equal_room_take_turns() -> None:
    servers = [JobServer("a").as_server(), JobServer("b").as_server()]
    found = taken(Scheduler(jobs(4), servers, NUM_SAMPLES), 4)
    assert found == [("0", "a"), ("1", "b"), ("2", "a"), ("3", "b")]


def test_a_server_with_three_times_the_room_gets_three_times_the_jobs() -> None:
    servers = [JobServer("a").as_server(2), JobServer("b").as_server(6)]
    shares = Counter(url for _, url in taken(Scheduler(jobs(8), servers, NUM_SAMPLES), 8))
    assert shares == {"a": 2, "b": 6}


@contextmanager
def taking_in_a_thread(scheduler: Scheduler) -> Iterator[threading.Event]:
    """Take the next job in a thread until the block ends; yield the event that a job was taken."""
    has_job = threading.Event()

    def take() -> None:
        if scheduler.take():
            has_job.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield has_job
    scheduler.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_next_job_waits_until_a_server_has_finished_one() -> None:
    servers = [JobServer("a").as_server(), JobServer("b").as_server()]
    scheduler = Scheduler(jobs(6), servers, NUM_SAMPLES)
    taken(scheduler, 4)
    with taking_in_a_thread(scheduler) as has_job:
        assert not has_job.wait(0.05)
        scheduler.finish(servers[1])
        assert has_job.wait(10)
        assert scheduler._num_jobs == {"a": 2, "b": 2}


def test_closing_wakes_a_thread_that_waits_for_a_job() -> None:
    scheduler = Scheduler(jobs(3), [JobServer("a").as_server()], NUM_SAMPLES)
    taken(scheduler, 2)
    with taking_in_a_thread(scheduler) as has_job:
        pass
    assert not has_job.is_set()


def test_a_question_that_kills_servers_comes_last() -> None:
    scheduler = Scheduler(jobs(3), [JobServer("a").as_server(6)], NUM_SAMPLES)
    first = scheduler.take()
    assert first
    scheduler.requeue(*first)
    assert [question for question, _ in taken(scheduler, 3)] == ["1", "2", "0"]


def test_each_sample_is_generated_once_and_graded() -> None:
    def sample(job: Job, deliver: SampleSink) -> None:
        for index in job.indices:
            text = "no answer" if index else r"\boxed{1}"
            made = replace(make_sample(index, None if index else "1"), text=text)
            assert deliver(SampleResult(made))

    events = run_on(sample, jobs(6))
    assert keys(events) == every_key_once(6)
    graded = [graded for event in events if isinstance(event, tuple) for graded in event]
    assert all(each.correct == (each.sample.index == 0) for each in graded)
    assert all(each.written_together is None for each in graded)


def test_a_server_that_is_faster_does_more() -> None:
    slow, fast = JobServer("slow"), JobServer("fast")
    slow.begin.clear()
    events = run(jobs(30), slow, fast, on_event=lambda so_far: so_far[39:] and slow.begin.set())
    assert keys(events) == every_key_once(30)
    assert len(fast.asked) > len(slow.asked) > 0


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_the_jobs_of_a_lost_server_are_done_by_the_others(all_or_nothing: bool) -> None:
    dying, living = JobServer("dying", lives=7), JobServer("living")
    living.begin.clear()

    def begin_after_the_loss(events: list[Event]) -> None:
        if isinstance(events[-1], ServerLost):
            living.begin.set()

    todo = jobs(30, all_or_nothing=all_or_nothing)
    events = run(todo, dying, living, on_event=begin_after_the_loss)
    assert keys(events) == every_key_once(30)
    assert [event.url for event in events if isinstance(event, ServerLost)] == ["dying"]
    assert not any(isinstance(event, Failure) for event in events)
    assert (dying.num_closed, living.num_closed) == (1, 0)


def test_a_job_that_comes_back_last_is_done_although_the_others_have_ended() -> None:
    dying, living = JobServer("dying", lives=0), JobServer("living")
    dying.begin.clear()

    def die_when_the_living_is_done(events: list[Event]) -> None:
        if len(keys(events)) == NUM_SAMPLES:
            dying.begin.set()

    events = run(jobs(2), dying, living, on_event=die_when_the_living_is_done)
    assert keys(events) == every_key_once(2)


def test_the_run_ends_with_all_reasons_when_every_server_is_lost() -> None:
    servers = [JobServer("http://a", lives=3), JobServer("http://b", lives=4)]
    with pytest.raises(ServerError) as caught:
        run(jobs(30), *servers)
    message = str(caught.value)
    assert message.startswith("all 2 servers are gone:")
    assert "no server answers at http://a" in message
    assert "no server answers at http://b" in message


@pytest.mark.parametrize("lives", [0, 4, 9])
def test_samples_of_a_lost_server_are_kept_and_the_run_ends_at_its_first_failure(
    lives: int,
) -> None:
    server = JobServer("a", lives=lives)
    kept: list[Event] = []
    with pytest.raises(ServerError, match="no server answers"):
        run(jobs(30), server, on_event=lambda events: kept.append(events[-1]))
    assert sum(keys(kept).values()) == lives
    assert not any(isinstance(event, Failure) for event in kept)
    # Each of the two threads has asked for one sample at most after the loss.
    assert len(server.asked) <= lives + 2


def test_a_living_server_is_checked_after_each_failure_and_each_failure_is_told() -> None:
    server = FailingServer("a", lives=10)
    events = run(jobs(8), server)
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(failures) == server.num_checked == 6
    assert {failure.error for failure in failures} == {"connection refused"}
    assert not keys(events).keys() & {failure.key for failure in failures}
    assert sum(keys(events).values()) == 10


def test_a_failure_of_a_living_server_is_not_tried_by_the_others() -> None:
    class FailsThenDies(JobServer):
        def sample(self, job: Job, deliver: SampleSink) -> None:
            self.lives = 0
            assert deliver(SampleResult(make_sample(0, None, SampleState.FAILED)))
            self.lives = -1
            assert not deliver(SampleResult(make_sample(1, None, SampleState.FAILED)))

    failing, other = FailsThenDies("a"), JobServer("b")
    events = run([Job(QUESTIONS[0], (0, 1, 2))], failing, other)
    assert [event.key for event in events if isinstance(event, Failure)] == [("0", 0)]
    assert keys(events) == {("0", 1): 1, ("0", 2): 1}


def sample_three(job: Job, deliver: SampleSink) -> None:
    """Deliver three samples together, however many are offered; the last has no vote."""
    results = [SampleResult(make_sample(n, job.question.gold), late=n == 2) for n in range(3)]
    deliver(*results)


def test_samples_of_all_or_nothing_come_together_with_their_number() -> None:
    events = run_on(sample_three, jobs(6, all_or_nothing=True))
    assert [len(event) for event in events if isinstance(event, tuple)] == [3] * 6
    for event in events:
        assert isinstance(event, tuple)
        assert [each.written_together for each in event] == [3, 3, 3]
        assert [each.late for each in event] == [False, False, True]


def test_a_failure_in_a_question_of_all_or_nothing_keeps_all_of_it_out() -> None:
    wanted: list[bool] = []

    def fail_in_the_third(job: Job, deliver: SampleSink) -> None:
        if job.question.question_id == "2":
            wanted.append(deliver(SampleResult(make_sample(7, None, SampleState.FAILED))))
        sample_three(job, deliver)

    events = run_on(fail_in_the_third, jobs(6, all_or_nothing=True))
    assert wanted == [False]
    assert [event.key for event in events if isinstance(event, Failure)] == [("2", 7)]
    assert {question_id for question_id, _ in keys(events)} == {"0", "1", "3", "4", "5"}


def test_a_defect_in_a_program_is_raised_and_not_swallowed() -> None:
    def broken(job: Job, deliver: SampleSink) -> None:
        raise IndexError("list index out of range")

    with pytest.raises(IndexError):
        run_on(broken, jobs(3))


def test_no_job_starts_and_no_sample_is_wanted_once_the_run_is_left() -> None:
    begun: list[str] = []
    wanted: list[bool] = []
    left, ended = threading.Event(), threading.Event()

    def sample(job: Job, deliver: SampleSink) -> None:
        begun.append(job.question.question_id)
        deliver(SampleResult(make_sample(0, "1")))
        left.wait(10)
        wanted.append(deliver(SampleResult(make_sample(1, "1"))))
        ended.set()

    server = Server("http://here", sample, lambda: None, concurrency=1)
    with closing(sample_jobs(jobs(6), [server], GRADER, in_flight=NUM_SAMPLES)) as events:
        next(events)
    left.set()
    assert ended.wait(10)
    assert len(begun) <= 2
    assert not any(wanted)


def test_without_jobs_no_server_is_asked() -> None:
    server = JobServer("a")
    assert run([], server) == []
    assert server.asked == []
