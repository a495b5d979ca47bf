"""Several servers: work goes to whichever has room, and those that live do what a dead one had."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lim_sglang.errors import ServerError
from lim_sglang.evals.grading import AnswerKind, Grader
from lim_sglang.evals.run_store import Failure, GradedSample
from lim_sglang.evals.scheduler import (
    Deliver,
    Event,
    Job,
    SampleResult,
    Scheduler,
    Server,
    ServerLost,
    stream,
)
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

NUM_SAMPLES = 2


class TextJudge:
    """Answers are the same when their texts are."""

    def equivalent(self, a: str, b: str) -> bool:
        return a == b

    correct = equivalent


def jobs(count: int, *, whole: bool = False) -> list[Job]:
    return [Job(Question(str(n), "?", "1"), (0, 1), whole) for n in range(count)]


class FakeServer:
    """Answers 1, until it dies, after so many samples."""

    def __init__(self, url: str, *, lives: int = 10_000, pace_s: float = 0.0) -> None:
        self.url = url
        self.lives = lives
        self.pace_s = pace_s
        self.asked: list[str] = []
        self.checked = 0
        self.closed = 0
        self.held = threading.Event()
        self.held.set()

    def draw(self, job: Job, deliver: Deliver) -> None:
        self.asked.append(job.question.question_id)
        self.held.wait(10)
        drawn = []
        for index in job.indices:
            time.sleep(self.pace_s)
            self.lives -= 1
            state = SampleState.FINISHED if self.lives >= 0 else SampleState.FAILED
            drawn.append(SampleResult(make_sample(index, "1", state)))
            if (not job.whole or state is SampleState.FAILED) and not deliver(drawn[-1]):
                return
        if job.whole:
            deliver(*drawn)

    def check(self) -> None:
        self.checked += 1
        if self.lives < 0:
            raise ServerError(f"no server answers at {self.url}")

    def close(self) -> None:
        self.closed += 1

    def as_server(self, concurrency: int = NUM_SAMPLES) -> Server:
        return Server(self.url, self.draw, self.check, self.close, concurrency)


def drawn(todo: list[Job], *servers: FakeServer) -> list[Event]:
    """All that comes of the jobs."""
    grader = Grader(AnswerKind.EXPRESSION, TextJudge())
    return list(stream(todo, [each.as_server() for each in servers], grader, in_flight=NUM_SAMPLES))


def keys(events: list[Event]) -> Counter[tuple[str, int]]:
    samples = [graded for event in events if isinstance(event, tuple) for graded in event]
    assert all(isinstance(graded, GradedSample) for graded in samples)
    return Counter(graded.key for graded in samples)


def every_key_once(count: int) -> dict[tuple[str, int], int]:
    return {(str(n), index): 1 for n in range(count) for index in range(NUM_SAMPLES)}


@contextmanager
def streamed(scheduler: Scheduler) -> Iterator[list[str]]:
    """What a thread is handed that asks for jobs until there are none."""
    handed: list[str] = []

    def ask() -> None:
        while task := scheduler.take():
            handed.append(task[0].question.question_id)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield handed
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_questions_go_in_turns_to_servers_that_have_as_much_room() -> None:
    servers = [FakeServer("a").as_server(), FakeServer("b").as_server()]
    scheduler = Scheduler(jobs(4), servers, NUM_SAMPLES)
    handed = [scheduler.take() for _ in range(4)]
    assert [task[1].url for task in handed if task] == ["a", "b", "a", "b"]
    assert [task[0].question.question_id for task in handed if task] == ["0", "1", "2", "3"]


def test_a_server_with_more_places_gets_more_questions() -> None:
    servers = [FakeServer("a").as_server(2), FakeServer("b").as_server(6)]
    scheduler = Scheduler(jobs(8), servers, NUM_SAMPLES)
    handed = [scheduler.take() for _ in range(8)]
    assert Counter(task[1].url for task in handed if task) == {"a": 2, "b": 6}


def test_the_next_question_goes_to_the_server_that_has_finished_one() -> None:
    servers = [FakeServer("a").as_server(), FakeServer("b").as_server()]
    scheduler = Scheduler(jobs(5), servers, NUM_SAMPLES)
    for _ in range(4):
        scheduler.take()
    with streamed(scheduler) as handed:
        time.sleep(0.05)
        assert handed == []
        scheduler.finish(servers[1])
        while not handed:
            time.sleep(0.001)
        assert handed == ["4"]
        assert scheduler._loads == {"a": 2, "b": 2}
        scheduler.close()


def test_all_is_drawn_once_and_the_faster_server_does_more() -> None:
    slow, fast = FakeServer("slow", pace_s=0.05), FakeServer("fast")
    assert keys(drawn(jobs(30), slow, fast)) == every_key_once(30)
    assert len(fast.asked) > len(slow.asked) > 0


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_dead_server_had_is_drawn_by_the_others(whole: bool) -> None:
    dying, living = FakeServer("dying", lives=7, pace_s=0.001), FakeServer("living", pace_s=0.002)
    events = drawn(jobs(30, whole=whole), dying, living)
    assert keys(events) == every_key_once(30)
    gone = [event for event in events if isinstance(event, ServerLost)]
    assert [event.url for event in gone] == ["dying"]
    assert not any(isinstance(event, Failure) for event in events)
    assert dying.closed == 1
    assert living.closed == 0


def test_what_comes_back_last_is_still_drawn_though_the_others_were_done() -> None:
    dying, living = FakeServer("dying", lives=0), FakeServer("living")
    dying.held.clear()
    threading.Timer(0.2, dying.held.set).start()
    assert keys(drawn(jobs(2), dying, living)) == every_key_once(2)


def test_a_question_that_kills_servers_comes_last() -> None:
    scheduler = Scheduler(jobs(3), [FakeServer("a").as_server(6)], NUM_SAMPLES)
    first = scheduler.take()
    assert first
    scheduler.give_back(*first)
    handed = [task[0].question.question_id for _ in range(3) if (task := scheduler.take())]
    assert handed == ["1", "2", "0"]


def test_the_run_ends_with_all_reasons_when_every_server_is_gone() -> None:
    servers = [FakeServer("http://a", lives=3), FakeServer("http://b", lives=4)]
    with pytest.raises(ServerError) as caught:
        drawn(jobs(30), *servers)
    message = str(caught.value)
    assert message.startswith("all 2 servers are gone:")
    assert "no server answers at http://a" in message
    assert "no server answers at http://b" in message


def test_samples_that_a_dying_server_brought_are_not_lost() -> None:
    server = FakeServer("a", lives=9, pace_s=0.001)
    grader = Grader(AnswerKind.EXPRESSION, TextJudge())
    events: list[Event] = []
    stream_ = stream(jobs(30), [server.as_server()], grader, in_flight=NUM_SAMPLES)
    with pytest.raises(ServerError, match="no server answers"):
        events.extend(stream_)
    assert sum(keys(events).values()) == 9


def test_a_living_server_is_asked_after_each_failure_and_the_failure_is_told() -> None:
    class Limping(FakeServer):
        def check(self) -> None:
            self.checked += 1

    limping = Limping("a", lives=10)
    events = drawn(jobs(8), limping)
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(failures) == limping.checked == 6
    assert not keys(events).keys() & {failure.key for failure in failures}
    assert sum(keys(events).values()) == 10


def test_what_a_server_failed_while_it_lived_is_not_given_to_the_others() -> None:
    class Failing(FakeServer):
        """Fails one sample, and dies over the next."""

        def draw(self, job: Job, deliver: Deliver) -> None:
            self.lives = 0
            assert deliver(SampleResult(make_sample(0, None, SampleState.FAILED)))
            self.lives = -1
            assert not deliver(SampleResult(make_sample(1, None, SampleState.FAILED)))

    todo = [Job(Question("0", "?", "1"), (0, 1, 2))]
    events = drawn(todo, Failing("a"), FakeServer("b"))
    assert [event.key for event in events if isinstance(event, Failure)] == [("0", 0)]
    assert keys(events) == {("0", 1): 1, ("0", 2): 1}


def test_nothing_to_do_asks_no_server() -> None:
    server = FakeServer("a")
    assert drawn([], server) == []
    assert server.asked == []
